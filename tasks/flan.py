"""Translated FLAN: the published Russian sets, each as `inputs` and `targets`, and a mixture of them as in FLAN 2022.

    flan_translated_300k             Vikhrmodels/Flan_translated_300k
    flan_alexwortega                 AlexWortega/flan (the same set under another name: in no mixture)
    flan2021_submix_ru               d0rj/flan2021_submix_original-ru, all of it (in no mixture, for its parts are)
    flan2021_submix_ru_zs_opt,       its rows of one template type: zero-shot or few-shot, the options listed or not
      _fs_opt, _zs_noopt, _fs_noopt
    flan_aya_cot, _qa, _coqa,        CohereForAI/aya_collection, its Russian rows of translated_flan_*
      _gem_wiki, _lambada
    vikhr_flan                       all but the two that are in no mixture

FLAN 2022 (Longpre et al. 2023, `flan/v2/run_example.py`) mixes five collections at fixed rates; inside each, sets have
rates by size with a cap. Not all of them have been published in Russian:

    FLAN 2022      rate   cap       here
    flan 2021      .40    30,000    flan2021_submix_ru: its template types at equal rates, as there, together as many as
                                    the caps of 59 sets; and qa, gem_wiki, lambada of Aya at rates by size with the cap
    t0, niv2       .52    20,000    not published on their own. flan_translated_300k, a sample of the whole collection
                          5,000     that does not say where a row is from, stands for them
    cot            .05    100,000   flan_aya_cot
    dialog         .03    200,000   flan_aya_coqa: questions about a text, asked in a conversation

Where they are read from, `tasks.settings.source` says. An instruction is held out by a hash of its inputs: always the
same ones, and a text that stands in two sets is held out of both. `task_name`, where a set has it, goes to the metrics.
"""

import functools
from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf

from tasks import settings
from tasks.cleaning import Preprocessor, leave_out
from vikhr_t5 import text_metrics
from vikhr_t5.data.sources import Belongs, Example, held_out
from vikhr_t5.errors import UserError, nearest

HELD_OUT = 0.01
AYA = ("cot", "qa", "coqa", "gem_wiki", "lambada")  # translated_flan_*
TEMPLATE_TYPES = ("zs_opt", "fs_opt", "zs_noopt", "fs_noopt")
SUBMIX, SUBMIX_FIELDS = "d0rj/flan2021_submix_original-ru", ("inputs", "targets", "task_name", "template_type")
FLAN2021_CAP, FLAN2021_SETS = 30_000, 62  # examples of a set at most; sets (Wei et al. 2022, figure 3)

is_held_out = held_out("inputs", HELD_OUT)


def in_russian(split: str, example: Example) -> bool:
    """`is_held_out`, of the rows that Aya marks as Russian."""
    return example["language"] == b"rus" and is_held_out(split, example)


def of_type(template_type: str) -> Belongs:
    """`is_held_out`, of the rows of a template type of FLAN. UserError for a row whose type FLAN has not."""

    def belongs(split: str, example: Example) -> bool:
        found = example["template_type"].decode()
        if found not in TEMPLATE_TYPES:
            raise UserError(f"{SUBMIX}: a row's template_type is {found!r}; {nearest(found, TEMPLATE_TYPES)}")
        return found == template_type and is_held_out(split, example)

    return belongs


def blank(inputs: bytes, targets: bytes) -> str | None:
    """Instructions whose inputs or targets are blank are left out: their translation failed."""
    return None if inputs.strip() and targets.strip() else "blank"


def first_name(names: Sequence[str]) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """An example with the feature `task_name`: the first of the fields `names` that says something ("-" does not)."""

    def named(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        name = example[names[-1]]
        for field in reversed(names[:-1]):
            name = tf.where(tf.equal(example[field], "-"), name, example[field])
        return {**example, "task_name": name}

    return named


def add_task(
    name: str,
    dataset: str,
    fields: Sequence[str] = ("inputs", "targets"),
    belongs: Belongs | None = None,
    config: str | None = None,
    task_name: Sequence[str] = (),
    steps: Sequence[Preprocessor] = (),
) -> None:
    """Register a published set of instructions.

    Args:
        name: of the task.
        dataset: its name on the hub.
        fields: the columns of the inputs and of the targets; then others to read, for `belongs` and `task_name`.
        belongs: by which its splits differ; None holds out by a hash of the inputs.
        config: of the hub.
        task_name: the columns that name the set which a row is from, for the metrics; the first that is not "-".
        steps: preprocessors of {inputs, targets} as text, such as `tasks.decontamination.not_evaluated_on`.
    """
    key_map = {"inputs": fields[0], "targets": fields[1]} | ({"task_name": "task_name"} if task_name else {})
    seqio.TaskRegistry.add(
        name,
        source=settings.source(dataset, fields, belongs or held_out(fields[0], HELD_OUT), config),
        preprocessors=[
            *([seqio.map_over_dataset(first_name(task_name))] if task_name else []),
            functools.partial(seqio.preprocessors.rekey, key_map=key_map),
            leave_out(blank, "inputs", "targets"),
            *steps,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=settings.output_features(),
        metric_fns=[text_metrics.chrf, text_metrics.rouge, text_metrics.exact_match],  # texts, and labels
    )


add_task("flan_translated_300k", "Vikhrmodels/Flan_translated_300k", ("inputs", "target"))
add_task("flan_alexwortega", "AlexWortega/flan", ("inputs", "target"))
add_task("flan2021_submix_ru", SUBMIX, SUBMIX_FIELDS[:3], task_name=["task_name"])
for kind in TEMPLATE_TYPES:
    add_task(f"flan2021_submix_ru_{kind}", SUBMIX, SUBMIX_FIELDS, of_type(kind), task_name=["task_name"])
for kind in AYA:
    add_task(
        f"flan_aya_{kind}",
        "CohereForAI/aya_collection",
        ("inputs", "targets", "language", "dataset_name", "sub_dataset_name"),
        in_russian,
        f"translated_flan_{kind}",
        task_name=["sub_dataset_name", "dataset_name"],
    )

# Rates by size: sizes are known when the sets are cached (plain seqio counts them); until then nothing is read.
_by_size = functools.partial(seqio.mixing_rate_num_examples, maximum=FLAN2021_CAP)
seqio.MixtureRegistry.add("flan2021_submix_ru_types", [f"flan2021_submix_ru_{kind}" for kind in TEMPLATE_TYPES], 1.0)
seqio.MixtureRegistry.add(
    "flan2021_ru",
    [
        ("flan2021_submix_ru_types", float(FLAN2021_CAP * (FLAN2021_SETS - 3))),
        *((f"flan_aya_{kind}", _by_size) for kind in ("qa", "gem_wiki", "lambada")),
    ],
)
seqio.MixtureRegistry.add(
    "vikhr_flan",
    [("flan2021_ru", 0.40), ("flan_translated_300k", 0.52), ("flan_aya_cot", 0.05), ("flan_aya_coqa", 0.03)],
)
