"""seqio data sources: plain text, JSON lines, Parquet, Hugging Face datasets.

A source is cut into pieces (byte ranges of text, row groups, ranges of rows) which are its seqio shards: any number of
processes read a corpus together, even where it is one file, and every example belongs to exactly one piece. Examples
are dicts of byte strings (`tf.string` scalars in the dataset); numbers arrive as their text.

A malformed line is reported by file and line number: it is not UTF-8 or JSON, lacks a field or has a null there, or is
longer than `LONGEST_LINE`, and then not read into memory. `max_bad_lines` of them are skipped, in each pass over the
data, before a UserError stops it; with the default of 0 the first one does.
"""

import abc
import codecs
import glob
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import seqio
import tensorflow as tf

from vikhr_t5.data.hashing import text_hash
from vikhr_t5.data.records import is_compressed, open_bytes
from vikhr_t5.errors import UserError, nearest

PIECE_BYTES = 32 << 20
LONGEST_LINE = 16 << 20  # bytes of a line, and of a document of plain text
PIECE_ROWS = 10_000  # of a Hugging Face dataset
BATCH = 256  # examples handed to TensorFlow in one call

Example = dict[str, bytes]
Belongs = Callable[[str, Example], bool]


class Piece(NamedTuple):
    """A part of a file: bytes, row groups or rows [start, stop)."""

    file: str
    start: int
    stop: int


def held_out(field: str, share: float) -> Belongs:
    """Splits "train" and "validation" of the same files: an example is held out when a hash of its `field` says so.

    Equal texts fall on the same side, and neither order nor number of the examples matters.

        TextSource({"train": "*.txt", "validation": "*.txt"}, belongs=held_out("text", 0.02))
    """

    def belongs(split: str, example: Example) -> bool:
        return (text_hash(example[field]) < share) == (split == "validation")

    return belongs


class _BadLines:
    """Counts the malformed lines of one pass; the one past the limit raises."""

    def __init__(self, limit: int):
        self.limit, self.count = limit, 0

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if self.count <= self.limit:
            print(f"{where}: {reason}: skipped", file=sys.stderr, flush=True)
        elif self.limit:
            raise UserError(f"{where}: {reason}; {self.count} are malformed, and max_bad_lines is {self.limit}")
        else:
            raise UserError(f"{where}: {reason}; mend it, or let the source skip some (max_bad_lines)")


class PieceSource(seqio.DataSource):
    """What the sources share: splits, globs, pieces, batches for TensorFlow.

    Args:
        split_to_filepattern: split -> glob, or several.
        fields: names of an example's features.
        belongs: `(split, example) -> bool`, by which splits share files; see `held_out`.
        max_bad_lines: malformed lines to skip in one pass.
    """

    supports_arbitrary_sharding = False

    def __init__(
        self,
        split_to_filepattern: Mapping[str, str | Iterable[str]],
        fields: Sequence[str],
        belongs: Belongs | None = None,
        max_bad_lines: int = 0,
    ):
        super().__init__(splits=split_to_filepattern)
        self.fields = tuple(fields)
        self.skipped_lines = 0  # of all passes in this process
        self._patterns = {
            split: [os.path.abspath(os.path.expanduser(p)) for p in ([value] if isinstance(value, str) else value)]
            for split, value in split_to_filepattern.items()
        }
        self._belongs, self.max_bad_lines = belongs, max_bad_lines

    def patterns(self, split: str) -> list[str]:
        """Absolute globs of a split."""
        return self._patterns[split]

    def files(self, split: str) -> list[str]:
        """The files of a split, sorted. UserError when a pattern matches none."""
        found: set[str] = set()
        for pattern in self.patterns(split):
            matches = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
            if not matches:
                raise UserError(f"no file matches {pattern} (split {split})")
            found.update(matches)
        return sorted(found)

    @abc.abstractmethod
    def _pieces(self, split: str) -> Iterator[Piece]:
        """All pieces of a split, in order."""

    @abc.abstractmethod
    def _read(self, split: str, piece: Piece, bad: _BadLines) -> Iterator[Example]:
        """The examples of a piece."""

    def list_shards(self, split: str) -> list[str]:
        return [f"{piece.file}[{piece.start}:{piece.stop}]" for piece in self._pieces(split)]

    def examples(self, split: str, pieces: Iterable[Piece] | None = None) -> Iterator[Example]:
        """Examples of a split (or of some of its pieces) in plain Python. UserError names file and line."""
        bad = _BadLines(self.max_bad_lines)
        for piece in self._pieces(split) if pieces is None else pieces:
            before = bad.count
            for example in self._read(split, piece, bad):
                if self._belongs is None or self._belongs(split, example):
                    yield example
            self.skipped_lines += bad.count - before

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """As in seqio: `shuffle` shuffles pieces (seqio shuffles examples), `shard_info` takes every n-th piece."""
        pieces = list(self._pieces(split))
        if shard_info is not None:
            if len(pieces) < shard_info.num_shards:
                raise ValueError(f"{len(pieces)} pieces for {shard_info.num_shards} shards")
            pieces = pieces[shard_info.index :: shard_info.num_shards]
        if shuffle:
            random.Random(None if seed is None else int(seed)).shuffle(pieces)

        def batches() -> Iterator[dict[str, np.ndarray]]:
            batch: list[Example] = []
            for example in self.examples(split, pieces):
                batch.append(example)
                if len(batch) == BATCH:
                    yield columns(batch)
                    batch.clear()
            if batch:
                yield columns(batch)

        def columns(batch: list[Example]) -> dict[str, np.ndarray]:
            return {field: np.array([example[field] for example in batch], dtype=object) for field in self.fields}

        signature = {field: tf.TensorSpec([None], tf.string) for field in self.fields}
        return tf.data.Dataset.from_generator(batches, output_signature=signature).unbatch()


class _LineSource(PieceSource):
    """A source of text files, which may be compressed (.gz, .zst): those are read as one piece each."""

    def _pieces(self, split: str) -> Iterator[Piece]:
        for file in self.files(split):
            size = os.path.getsize(file)
            step = size if is_compressed(file) else PIECE_BYTES
            for start in range(0, size, step or 1):
                yield Piece(file, start, sys.maxsize if is_compressed(file) else min(start + step, size))


def _lines(piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) from the first line that starts in the piece to the end of the file; the caller stops. A line
    longer than `LONGEST_LINE` is None.

    Raises UserError for a file that cannot be read, e.g. a truncated .gz.
    """
    try:
        with open_bytes(piece.file) as handle:
            offset = piece.start
            if offset:  # the line which the piece begins in belongs to the piece before
                handle.seek(offset - 1)
                offset += _line(handle)[0] - 1
            while True:
                length, line = _line(handle)
                if not length:
                    return
                yield offset, line if offset or line is None else line.removeprefix(codecs.BOM_UTF8)
                offset += length
    except OSError as error:
        raise UserError(f"{piece.file} cannot be read to its end: {error.strerror or error}") from error


def _line(handle: Any) -> tuple[int, bytes | None]:
    """The next line and its length in bytes; None for one that is too long."""
    line = handle.readline(LONGEST_LINE + 1)
    if len(line) <= LONGEST_LINE:
        return len(line), line
    length = len(line)
    while line and not line.endswith(b"\n"):
        line = handle.readline(1 << 20)
        length += len(line)
    return length, None


def _where(file: str, offset: int) -> str:
    """The line at an offset, in words. Lines are counted only when one is bad: pieces start anywhere."""
    before = sum(1 for _ in itertools.takewhile(lambda line: line[0] < offset, _lines(Piece(file, 0, offset))))
    return f"{file}, line {before + 1}"


def _too_long(what: str) -> str:
    return f"a {what} of more than {LONGEST_LINE >> 20} MiB"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start})"


class TextSource(_LineSource):
    """Plain text (.txt, .txt.gz, .txt.zst): documents separated by blank lines; feature `text`, lines joined by \\n.

    A document belongs to the piece in which the blank line before it starts.
    """

    def __init__(
        self,
        split_to_filepattern: Mapping[str, str | Iterable[str]],
        belongs: Belongs | None = None,
        max_bad_lines: int = 0,
    ):
        super().__init__(split_to_filepattern, ("text",), belongs, max_bad_lines)

    def _read(self, split: str, piece: Piece, bad: _BadLines) -> Iterator[Example]:
        document: list[bytes] = []
        length = 0
        mine = piece.start == 0
        for offset, line in _lines(piece):
            if line is not None and not line.strip():
                if document and length <= LONGEST_LINE:
                    yield {"text": b"\n".join(document)}
                if offset >= piece.stop:
                    return
                document, length, mine = [], 0, True
            elif mine and line is None:
                bad.add(_where(piece.file, offset), _too_long("line"))
            elif mine and line is not None and length <= LONGEST_LINE:
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    bad.add(_where(piece.file, offset), _not_utf8(error))
                    continue
                length += len(line)
                document.append(line.rstrip(b"\r\n"))
                if length > LONGEST_LINE:
                    document.clear()
                    where = _where(piece.file, offset)
                    bad.add(where, f"{_too_long('document')} ends here: separate documents by blank lines")
        if document and length <= LONGEST_LINE:
            yield {"text": b"\n".join(document)}


class JsonLinesSource(_LineSource):
    """JSON lines (.jsonl, .jsonl.gz, .jsonl.zst): one object per line, `fields` of it are the features."""

    def _read(self, split: str, piece: Piece, bad: _BadLines) -> Iterator[Example]:
        for offset, line in _lines(piece):
            if offset >= piece.stop:
                return
            if line is None:
                bad.add(_where(piece.file, offset), _too_long("line"))
                continue
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                bad.add(_where(piece.file, offset), _not_utf8(error))
                continue
            except (ValueError, RecursionError) as error:
                bad.add(_where(piece.file, offset), f"not a JSON line: {error}")
                continue
            try:
                yield self._example(record)
            except ValueError as error:
                bad.add(_where(piece.file, offset), str(error))

    def _example(self, record: Any) -> Example:
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__} instead of an object")
        for field in self.fields:
            if field not in record:
                raise ValueError(f"no {field!r} ({nearest(field, record)})")
            if record[field] is None:
                raise ValueError(f"{field!r} is null")
        values = {field: record[field] for field in self.fields}
        return {k: (v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)).encode() for k, v in values.items()}


class _TableSource(PieceSource):
    """A source of Arrow tables. A row with a null among `fields` is malformed."""

    def _check_columns(self, names: Sequence[str], where: str) -> None:
        for field in self.fields:
            if field not in names:
                raise UserError(f"{where} has no column {field!r}: {nearest(field, names)}")

    def _table_examples(self, table: pa.Table, where: str, first_row: int, bad: _BadLines) -> Iterator[Example]:
        columns = []
        for field in self.fields:
            if pa.types.is_nested(table[field].type):
                columns.append([_json(value) for value in table[field].to_pylist()])
                continue
            try:
                columns.append(table[field].cast(pa.large_string()).cast(pa.large_binary()).to_pylist())
            except pa.ArrowNotImplementedError:
                raise UserError(f"{where}: column {field!r} is {table[field].type}, neither text nor number") from None
        for row, values in enumerate(zip(*columns, strict=True), start=first_row):
            if None in values:
                bad.add(f"{where}, row {row}", f"{self.fields[values.index(None)]!r} is null")
            else:
                yield dict(zip(self.fields, values, strict=True))


def _json(value: Any) -> bytes | None:
    return None if value is None else json.dumps(value, ensure_ascii=False).encode()


class ParquetSource(_TableSource):
    """Parquet files: `fields` are columns of text or numbers; structs and lists arrive as JSON."""

    def _pieces(self, split: str) -> Iterator[Piece]:
        for file in self.files(split):
            for group in range(_parquet(file).num_row_groups):
                yield Piece(file, group, group + 1)

    def _read(self, split: str, piece: Piece, bad: _BadLines) -> Iterator[Example]:
        file = _parquet(piece.file)
        self._check_columns(file.schema_arrow.names, piece.file)
        first_row = 1 + sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        try:
            table = file.read_row_group(piece.start, self.fields)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{piece.file} cannot be read: {error}") from error
        yield from self._table_examples(table, piece.file, first_row, bad)


def _parquet(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is not a whole Parquet file: {error}") from error


class HuggingFaceSource(_TableSource):
    """A dataset of the Hugging Face hub, or a folder that `save_to_disk` wrote (needs the extra `hub`).

        HuggingFaceSource("d0rj/flan2021_submix_original-ru", {"train": "train"}, ["inputs", "targets"])
        HuggingFaceSource("/data/habr", {"train": "train", "validation": "test"}, ["text"])

    Args:
        path: name on the hub, or the folder.
        split_to_name: seqio's split -> the dataset's ("train[:1%]" works on the hub).
        fields: columns of text or numbers; structs and lists arrive as JSON.
        belongs, max_bad_lines: as in `PieceSource`.
        config, revision: of the hub.
    """

    def __init__(
        self,
        path: str,
        split_to_name: Mapping[str, str],
        fields: Sequence[str],
        belongs: Belongs | None = None,
        max_bad_lines: int = 0,
        config: str | None = None,
        revision: str | None = None,
    ):
        super().__init__({}, fields, belongs, max_bad_lines)
        self._splits = tuple(split_to_name)
        self._path, self._names = os.path.expanduser(path), dict(split_to_name)
        self._config, self._revision = config, revision
        self._loaded: dict[str, Any] = {}

    def patterns(self, split: str) -> list[str]:
        """Of the files that `save_to_disk` wrote; none for a dataset of the hub."""
        folder = glob.escape(os.path.abspath(self._path))
        if os.path.exists(os.path.join(self._path, "state.json")):
            return [f"{folder}/data-*.arrow"]
        if os.path.exists(os.path.join(self._path, "dataset_dict.json")):
            return [f"{folder}/{self._names[split]}/data-*.arrow"]
        return []

    def files(self, split: str) -> list[str]:
        return sorted(os.path.abspath(file["filename"]) for file in self._dataset(split).cache_files)

    def _dataset(self, split: str) -> Any:
        if split not in self._loaded:
            self._loaded[split] = self._load(self._names[split]).with_format("arrow")
        return self._loaded[split]

    def _load(self, name: str) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"{self._path} is a Hugging Face dataset: pip install 'vikhr-t5[hub]'") from error
        on_disk = any((Path(self._path) / file).exists() for file in ("dataset_dict.json", "state.json"))
        try:
            if not on_disk:
                return datasets.load_dataset(self._path, self._config, split=name, revision=self._revision)
            loaded = datasets.load_from_disk(self._path)
        except Exception as error:  # the hub's, the network's and pyarrow's, of many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if not on_disk:
                reason += (
                    "; it is read from the hub: mend the network or log in (`hf auth login`), or read a copy, a folder"
                    " that `save_to_disk` wrote"
                )
            raise UserError(f"dataset {self._path}, split {name}: {reason}") from error
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if name not in loaded:
            raise UserError(f"dataset {self._path} has no split {name!r}: {nearest(name, loaded)}")
        return loaded[name]

    def _pieces(self, split: str) -> Iterator[Piece]:
        rows = len(self._dataset(split))
        for start in range(0, rows, PIECE_ROWS):
            yield Piece(self._path, start, min(start + PIECE_ROWS, rows))

    def _read(self, split: str, piece: Piece, bad: _BadLines) -> Iterator[Example]:
        where, dataset = f"dataset {self._path}", self._dataset(split)
        self._check_columns(dataset.column_names, where)
        yield from self._table_examples(dataset[piece.start : piece.stop], where, piece.start + 1, bad)
