"""What a task takes from the run: the vocabulary and the data folder, by environment variables.

seqio registers tasks when their module is imported, before any argument can reach them. The commands of vikhr-t5 set
these variables from the gin macros; whoever imports the tasks elsewhere (real t5x, a notebook) sets them first.

    VIKHR_T5_VOCABULARY   path of a SentencePiece model, or "bytes"   gin: VOCABULARY_FILE
    VIKHR_T5_EXTRA_IDS    number of sentinels                         gin: EXTRA_IDS (300; bytes: 0, as in ByT5)
    VIKHR_T5_DATA_DIR     folder of the corpora                       (none: published sets are read from the hub)

    VIKHR_T5_MAX_BAD_LINES   malformed lines or rows of a published set that may be skipped   (0: the first one stops)
"""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import seqio

from vikhr_t5.data.sources import (
    Belongs,
    Example,
    HuggingFaceSource,
    JsonLinesSource,
    ParquetSource,
    Piece,
    PieceSource,
    TextSource,
)
from vikhr_t5.errors import UserError

VOCABULARY, EXTRA_IDS, DATA_DIR = "VIKHR_T5_VOCABULARY", "VIKHR_T5_EXTRA_IDS", "VIKHR_T5_DATA_DIR"
MAX_BAD_LINES = "VIKHR_T5_MAX_BAD_LINES"


def vocabulary() -> seqio.SentencePieceVocabulary | seqio.ByteVocabulary:
    """The run's vocabulary; its file is read at first use, so it need not exist yet.

    Raises:
        UserError: VIKHR_T5_VOCABULARY is not set, or VIKHR_T5_EXTRA_IDS is no number.
    """
    path = os.environ.get(VOCABULARY)
    if not path:
        raise UserError(f"no vocabulary: set {VOCABULARY} to a SentencePiece model (in gin: VOCABULARY_FILE)")
    extra_ids = os.environ.get(EXTRA_IDS, "0" if path == "bytes" else "300")
    if not extra_ids.isdigit():
        raise UserError(f"{EXTRA_IDS}={extra_ids!r} is no number of sentinels (in gin: EXTRA_IDS)")
    if path == "bytes":
        return seqio.ByteVocabulary(int(extra_ids))
    return seqio.SentencePieceVocabulary(path, extra_ids=int(extra_ids))


def output_features() -> dict[str, seqio.Feature]:
    """`inputs` and `targets` of the run's vocabulary, each ending in EOS."""
    return {name: seqio.Feature(vocabulary(), add_eos=True) for name in ("inputs", "targets")}


def data_dir() -> Path:
    """The folder of the corpora. UserError when VIKHR_T5_DATA_DIR is not set or names no folder."""
    path = os.environ.get(DATA_DIR)
    if not path or not os.path.isdir(path):
        raise UserError(f"{DATA_DIR}={path!r} is no folder: set it to the folder of your corpora")
    return Path(path)


def max_bad_lines() -> int:
    """Malformed lines of a split that may be skipped. UserError when VIKHR_T5_MAX_BAD_LINES is no number."""
    limit = os.environ.get(MAX_BAD_LINES, "0")
    if not limit.isdigit():
        raise UserError(f"{MAX_BAD_LINES}={limit!r} is no number of lines")
    return int(limit)


def source(
    name: str,
    fields: Sequence[str],
    belongs: Belongs | None = None,
    config: str | None = None,
    max_bad_lines: int | None = None,
) -> PieceSource:
    """A set published on the hub, with the splits `train` and `validation`, of which `belongs` makes the difference.

    Without VIKHR_T5_DATA_DIR it is read from the hub, with it from the folder `VIKHR_T5_DATA_DIR/name[/config]`: what
    `save_to_disk` wrote there, or else its Parquet, JSON lines or (for the field `text`) text files. Both are its
    published split `train`. Nothing is looked for before the first read.

        settings.source("d0rj/flan2021_submix_original-ru", ["inputs", "targets"], held_out("inputs", 0.01))

    Args:
        name, config: of the hub.
        fields: columns.
        belongs: as in `PieceSource`.
        max_bad_lines: malformed lines, or rows with a null, that a split may have; None for VIKHR_T5_MAX_BAD_LINES.
    Raises:
        UserError: when it is read, and is not there.
    """
    return Published(name, fields, belongs, config, max_bad_lines)


class Published(PieceSource):
    """Hands every question to the source that holds the set where VIKHR_T5_DATA_DIR points now."""

    def __init__(
        self,
        name: str,
        fields: Sequence[str],
        belongs: Belongs | None,
        config: str | None,
        bad_lines: int | None = None,
    ):
        limit = max_bad_lines() if bad_lines is None else bad_lines
        super().__init__({"train": (), "validation": ()}, fields, belongs, limit)
        self.name, self.config = name, config
        self._found: dict[str | None, PieceSource] = {}
        self._counts: dict[tuple[str | None, str], int] = {}

    def _source(self) -> PieceSource:
        place = os.environ.get(DATA_DIR) or None
        if place not in self._found:
            self._found[place] = self._hub() if place is None else self._local(data_dir() / self.name)
        return self._found[place]

    def _hub(self) -> PieceSource:
        return HuggingFaceSource(self.name, dict.fromkeys(self.splits, "train"), self.fields, config=self.config)

    def _local(self, folder: Path) -> PieceSource:
        folder = folder / (self.config or "")
        for saved in ("dataset_dict.json", "state.json"):  # of a DatasetDict, of one split
            if (folder / saved).exists():
                return HuggingFaceSource(str(folder), dict.fromkeys(self.splits, "train"), self.fields)
        if parquet := self._files(folder, ".parquet"):
            return ParquetSource(parquet, self.fields)
        if lines := self._files(folder, ".jsonl", ".jsonl.gz", ".jsonl.zst"):
            return JsonLinesSource(lines, self.fields)
        if self.fields == ("text",) and (text := self._files(folder, ".txt", ".txt.gz", ".txt.zst")):
            return TextSource(text)
        raise UserError(
            f"no {self.name} in {folder}: put its Parquet or JSONL files or its save_to_disk folder there, or unset"
            f" {DATA_DIR} to read it from the hub"
        )

    def _files(self, folder: Path, *endings: str) -> dict[str, list[str]]:
        """Split -> globs of the published `train`, or of all files where none is named so; {} where there are none.

        Globs, and not names: the cache of the files is stale when another one appears.
        """
        for name in ("train*", "*"):
            globs = [f"{glob.escape(str(folder))}/**/{name}{ending}" for ending in endings]
            if globs := [pattern for pattern in globs if glob.glob(pattern, recursive=True)]:
                return dict.fromkeys(self.splits, globs)
        return {}

    def folders(self) -> dict[str, str]:
        """The environment variable that says where the set lies, and what it says: for the cache's manifest."""
        place = os.environ.get(DATA_DIR)
        return {DATA_DIR: os.path.abspath(place) if place else ""}

    def patterns(self, split: str) -> list[str]:
        return self._source().patterns(split)

    def files(self, split: str) -> list[str]:
        return self._read_or_explain(lambda: self._source().files(split))

    def _pieces(self, split: str) -> Iterator[Piece]:
        return iter(self._read_or_explain(lambda: list(self._source()._pieces(split))))

    def _read(self, split: str, piece: Piece, bad: Any) -> Iterator[Example]:
        return self._source()._read(split, piece, bad)

    def _read_or_explain(self, ask: Callable[[], list[Any]]) -> list[Any]:
        """The answer; an error of the hub also says how to do without it."""
        try:
            return ask()
        except UserError as error:
            if os.environ.get(DATA_DIR):
                raise
            place = f"{self.name}/{self.config}" if self.config else self.name
            raise UserError(f"{error}; or put its files into a folder DIR/{place} and set {DATA_DIR}=DIR") from error

    def num_input_examples(self, split: str) -> int:
        """Counted in one pass, for rates by size in plain seqio (vikhr-t5 asks its token store instead)."""
        key = os.environ.get(DATA_DIR), split
        if key not in self._counts:
            self._counts[key] = sum(1 for _ in self.examples(split))
        return self._counts[key]
