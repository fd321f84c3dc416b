"""Rows of published files, all their fields, without seqio: text, JSON lines, Parquet, saved datasets, hub names."""

import contextlib
import glob
import gzip
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from vikhr_t5.errors import UserError, nearest

_BATCH = 1000  # rows of a Parquet file read at once
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


def read_rows(source: str | Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line" or "name[row]", row) of each row of a source, in order, streaming.

    Args:
        source: a file, a glob, a folder of such files, a folder that `datasets` saved, or a hub name "owner/name"; or
            several of them. `.txt` (documents between blank lines; field `text`), `.jsonl`, `.json` (a list of
            objects, or lines), `.parquet`; text files also as `.gz` and `.zst`.

    Raises:
        UserError: nothing is there, or a row cannot be read; names file and line.
    """
    for one in [source] if isinstance(source, str) else source:
        files = source_files(one)
        if files:
            yield from itertools.chain.from_iterable(map(_rows_of_file, files))
        else:
            yield from _rows_of_dataset(one)


def read_texts(source: str | Sequence[str], field: str = "text") -> Iterator[tuple[str, str]]:
    """(where, document) of each row of a source whose `field` is not blank. UserError where a row lacks the field."""
    for where, row in read_rows(source):
        if field not in row:
            raise UserError(f"{where} has no field {field!r}; {nearest(field, row)}")
        text = row[field]
        if not isinstance(text, str):
            raise UserError(f"{where}: field {field!r} is {type(text).__name__}, and text is wanted")
        if text.strip():
            yield where, text


def source_files(source: str) -> list[str]:
    """The files that a source names, sorted; none for a saved dataset or a hub name."""
    path = Path(source)
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if file.is_file() and _kind(file.name))
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return []
        if not found:
            raise UserError(f"{source}: the folder has none of {', '.join(_SUFFIXES)} (.gz, .zst)")
        return found
    found = sorted(glob.glob(source, recursive=True))
    if found:
        return found
    if (
        source.count("/") == 1
        and not _kind(source)
        and not glob.has_magic(source)
        and not source.startswith((".", "/"))
    ):
        return []
    raise UserError(f"{source}: no such file or folder")


def _kind(name: str) -> str | None:
    bare = name.removesuffix(".gz").removesuffix(".zst")
    return next((suffix for suffix in _SUFFIXES if bare.endswith(suffix)), None)


@contextlib.contextmanager
def _open_text(file: str) -> Iterator[TextIO]:
    if file.endswith(".gz"):
        with gzip.open(file, "rt", encoding="utf-8") as handle:
            yield handle
    elif file.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{file} needs the package zstandard: pip install zstandard") from None
        with zstandard.open(file, "rt", encoding="utf-8") as handle:
            yield handle
    else:
        with open(file, encoding="utf-8") as handle:
            yield handle


def _rows_of_file(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = _kind(file)
    if kind is None:
        raise UserError(f"{file}: not one of {', '.join(_SUFFIXES)} (.gz, .zst)")
    if kind == ".parquet":
        yield from _parquet_rows(file)
        return
    number = 0
    try:
        with _open_text(file) as lines:
            if kind == ".txt":
                first, paragraph = 1, list[str]()
                for number, line in enumerate(itertools.chain(lines, [""]), 1):
                    if line.strip():
                        first = first if paragraph else number
                        paragraph.append(line)
                    elif paragraph:
                        yield f"{file}:{first}", {"text": "".join(paragraph).strip("\n")}
                        paragraph = []
                return
            if kind == ".json" and (whole := _json_list(file)) is not None:
                for i, row in enumerate(whole):
                    yield f"{file}[{i}]", _object(row, f"{file}[{i}]")
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file}:{number}"
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{where}: not JSON ({error}); mend or remove the line") from None
                    yield where, _object(row, where)
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise UserError(f"{file}:{number + 1}: cannot be read ({error})") from None


def _json_list(file: str) -> list[Any] | None:
    """A .json file that is one list; None where it is lines of objects."""
    with _open_text(file) as handle:
        if handle.read(4096).lstrip()[:1] != "[":
            return None
    with _open_text(file) as handle:
        try:
            return json.load(handle)
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error})") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, and an object {{...}} is wanted")
    return row


def _parquet_rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(_BATCH):
            for row in batch.to_pylist():
                yield f"{file}[{number}]", row
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not Parquet, or cut short ({' '.join(str(error).split())})") from None


def _rows_of_dataset(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name}: a saved dataset or a hub name needs the package datasets: pip install datasets"
        ) from None
    try:
        data = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, streaming=True)
    except Exception as error:  # the hub's errors have no common class
        raise UserError(f"{name}: cannot be opened ({type(error).__name__}: {' '.join(str(error).split())})") from None
    if isinstance(data, dict):
        if "train" not in data:
            raise UserError(f"{name}: no split 'train'; {nearest('train', data)}")
        data = data["train"]
    for i, row in enumerate(data):
        yield f"{name}[{i}]", dict(row)
