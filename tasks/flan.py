"""Translated FLAN: the published Russian sets, each as `inputs` and `targets`.

    flan_translated_300k             Vikhrmodels/Flan_translated_300k
    flan_alexwortega                 AlexWortega/flan (the same set under another name: in no mixture)
    flan2021_submix_ru               d0rj/flan2021_submix_original-ru
    flan_aya_cot, _qa, _coqa,        CohereForAI/aya_collection, its Russian rows of translated_flan_*
      _gem_wiki, _lambada
    vikhr_flan                       all but flan_alexwortega, at rates by size with a cap

Where they are read from, `tasks.settings.source` says. An instruction is held out by a hash of its inputs: always the
same ones, and a text that stands in two sets is held out of both.
"""

import functools

import seqio
import tensorflow as tf

from tasks import settings
from vikhr_t5.data.sources import Belongs, Example, held_out

HELD_OUT = 0.01
AYA = ("cot", "qa", "coqa", "gem_wiki", "lambada")  # translated_flan_*
RATE_MAXIMUM = 500_000  # examples: flan2021 has 5.4 million, 14 times as many as the 300k set

is_held_out = held_out("inputs", HELD_OUT)


def in_russian(split: str, example: Example) -> bool:
    """`is_held_out`, of the rows that Aya marks as Russian."""
    return example["language"] == b"rus" and is_held_out(split, example)


def drop_blank(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Without the instructions whose inputs or targets are blank: their translation failed."""

    def is_whole(example: dict[str, tf.Tensor]) -> tf.Tensor:
        lengths = [tf.strings.length(tf.strings.strip(example[side])) for side in ("inputs", "targets")]
        return tf.reduce_min(lengths) > 0

    return dataset.filter(is_whole)


def add_task(
    name: str,
    dataset: str,
    fields: tuple[str, ...] = ("inputs", "targets"),
    belongs: Belongs | None = None,
    config: str | None = None,
) -> None:
    """Register a published set of instructions.

    Args:
        name: of the task.
        dataset: its name on the hub.
        fields: the columns of the inputs and of the targets; then those that `belongs` asks for.
        belongs: by which its splits differ; None holds out by a hash of the inputs.
        config: of the hub.
    """
    seqio.TaskRegistry.add(
        name,
        source=settings.source(dataset, fields, belongs or held_out(fields[0], HELD_OUT), config),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"inputs": fields[0], "targets": fields[1]}),
            drop_blank,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos,
        ],
        output_features=settings.output_features(),
    )


add_task("flan_translated_300k", "Vikhrmodels/Flan_translated_300k", ("inputs", "target"))
add_task("flan_alexwortega", "AlexWortega/flan", ("inputs", "target"))
add_task("flan2021_submix_ru", "d0rj/flan2021_submix_original-ru")
for kind in AYA:
    add_task(
        f"flan_aya_{kind}",
        "CohereForAI/aya_collection",
        ("inputs", "targets", "language"),
        in_russian,
        f"translated_flan_{kind}",
    )

# By size, which is known when the sets are cached (plain seqio counts them): until then nothing is read.
seqio.MixtureRegistry.add(
    "vikhr_flan",
    ["flan_translated_300k", "flan2021_submix_ru", *(f"flan_aya_{kind}" for kind in AYA)],
    default_rate=functools.partial(seqio.mixing_rate_num_examples, maximum=RATE_MAXIMUM),
)
