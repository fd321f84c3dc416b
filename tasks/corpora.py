"""Pre-training tasks on Russian corpora, cleaned and corrupted with UL2's denoisers.

    habr_ul2           IlyaGusev/habr        the 100,000 articles of the highest score, made plain
    ru_wikipedia_ul2   wikimedia/wikipedia   20231101.ru
    rulm_ul2           IlyaGusev/rulm
    darulm_ul2         dichspace/darulm
    ru_news_ul2        IlyaGusev/ru_news
    local_ul2          local                 a folder of one's own: text, JSON lines or Parquet with `text`

They are read from the hub, or from the folders VIKHR_T5_DATA_DIR/name[/config], as `tasks.settings.source` says.
Nothing is looked for before the first read. Every task has the splits `train` and `validation`: 1 document in 200 is
held out, by a hash of its text.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import seqio

from tasks import cleaning, settings
from tasks.cleaning import Preprocessor, Step, clean, highest
from tasks.preprocessors import Denoise
from vikhr_t5.data.denoisers import Denoiser
from vikhr_t5.data.sources import HuggingFaceSource, PieceSource, held_out
from vikhr_t5.errors import UserError

HELD_OUT = 0.005
HABR, HABR_ARTICLES = "IlyaGusev/habr", 100_000

CHARACTERS: tuple[Step, ...] = (cleaning.mend_encoding, cleaning.nfc, cleaning.strip_controls)
DOCUMENT: tuple[Step, ...] = (cleaning.squeeze, cleaning.enough_letters, cleaning.length_within)
STEPS: tuple[Step, ...] = (*CHARACTERS, cleaning.drop_lines, *DOCUMENT)


class _Converted(settings.Published):
    """A set whose repository has a loading script, which `datasets` no longer runs: the hub keeps it as Parquet too."""

    def _hub(self) -> PieceSource:
        splits = dict.fromkeys(self.splits, "train")
        return HuggingFaceSource(self.name, splits, self.fields, revision="refs/convert/parquet")


class _Local(settings.Published):
    """The folder `name` in VIKHR_T5_DATA_DIR, which is on no hub."""

    def _hub(self) -> PieceSource:
        raise UserError(f"set {settings.DATA_DIR} to the folder that has your texts in its folder {self.name}")

    def _local(self, folder: Path) -> PieceSource:
        try:
            return super()._local(folder)
        except UserError as error:
            raise UserError(f"{folder} has no text, JSON lines or Parquet: put your files there") from error

    def _read_or_explain(self, ask: Callable[[], list[Any]]) -> list[Any]:
        return ask()


def add_corpus(
    name: str,
    source: seqio.DataSource,
    field: str = "text",
    choose: Sequence[Preprocessor] = (),
    steps: Sequence[Step] = STEPS,
    denoisers: str | Sequence[Denoiser] = "ul2",
) -> seqio.Task:
    """Register a task of denoising.

    Args:
        name: of the task.
        source: of the documents.
        field: the source's feature that holds the text.
        choose: preprocessors that see all of the source's features, before the cleaning.
        steps: of `tasks.cleaning`, on the text.
        denoisers: as in `Denoise`.
    """
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            *choose,
            functools.partial(seqio.preprocessors.rekey, key_map={"text": field}),
            clean(*steps),
            functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            Denoise(denoisers),
        ],
        output_features=settings.output_features(),
    )


add_corpus(
    "habr_ul2",
    _Converted(HABR, ["text_markdown", "statistics"], held_out("text_markdown", HELD_OUT), None),
    field="text_markdown",
    choose=[highest(HABR_ARTICLES, _Converted(HABR, ["statistics"], None, None), "statistics", key="score")],
    steps=(*CHARACTERS, cleaning.markdown_to_text, cleaning.drop_lines, *DOCUMENT),
)

add_corpus(
    "ru_wikipedia_ul2",
    settings.source("wikimedia/wikipedia", ["text"], held_out("text", HELD_OUT), config="20231101.ru"),
    steps=(
        *CHARACTERS,
        functools.partial(cleaning.drop_lines, patterns=cleaning.BOILERPLATE + cleaning.WIKIPEDIA),
        *DOCUMENT,
    ),
)

for name in ("rulm", "darulm", "ru_news"):
    owner = "dichspace" if name == "darulm" else "IlyaGusev"
    add_corpus(f"{name}_ul2", _Converted(f"{owner}/{name}", ["text"], held_out("text", HELD_OUT), None))

add_corpus("local_ul2", _Local("local", ["text"], held_out("text", HELD_OUT), None))
