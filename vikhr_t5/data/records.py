"""Rows of published files, all their fields, without seqio: text, JSON lines, Parquet, saved datasets, hub names."""

import codecs
import glob
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

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
        if (text := text_of(row, field, where)).strip():
            yield where, text


def text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    """A row's field. UserError where the row lacks it, or it is no text; `where` says which row it is."""
    if field not in row:
        raise UserError(f"{where} has no field {field!r}; {nearest(field, row)}")
    if not isinstance(row[field], str):
        raise UserError(f"{where}: field {field!r} is {type(row[field]).__name__}, and text is wanted")
    return row[field]


def json_row(line: str, where: str) -> dict[str, Any]:
    """A line of JSON lines. UserError where it is no object, or a string in it is no text; `where` says which."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); mend or remove the line") from None
    return _object(row, where, "\\ud" in line or "\\uD" in line)


def read_lines(source: str | Sequence[str], field: str = "text") -> Iterator[str]:
    """Text files line by line, however long they are; of other rows the texts of `field`, which may hold several lines.

    Raises:
        UserError: as `read_texts`; a text file has the field "text" alone.
    """
    for one in [source] if isinstance(source, str) else source:
        for file in source_files(one) or [one]:
            if split_suffix(file)[1] != ".txt":
                yield from (text for _, text in read_texts(file, field))
            elif field != "text":
                raise UserError(f"{file} has no field {field!r}: it is plain text, whose field is 'text'")
            else:
                yield from (line for _, line in _lines(file))


def text_lines(source: str) -> Iterator[tuple[str, str]]:
    """("file:line", line with its end) of the text files that a source names. UserError as `read_texts`."""
    for file in source_files(source) or [source]:
        yield from ((f"{file}:{number}", line) for number, line in _lines(file))


def source_files(source: str) -> list[str]:
    """The files that a source names, sorted; none for a saved dataset or a hub name."""
    path = Path(source)
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if file.is_file() and split_suffix(file.name)[1])
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
        and not split_suffix(source)[1]
        and not glob.has_magic(source)
        and not source.startswith((".", "/"))
    ):
        return []
    raise UserError(f"{source}: no such file or folder")


def split_suffix(name: str) -> tuple[str, str | None]:
    """(name without its suffix and `.gz` or `.zst`, the suffix); the suffix is None where it is none that is read."""
    bare = name.removesuffix(".gz").removesuffix(".zst")
    suffix = next((suffix for suffix in _SUFFIXES if bare.endswith(suffix)), None)
    return bare.removesuffix(suffix or ""), suffix


def is_compressed(file: str) -> bool:
    """By its name."""
    return file.endswith((".gz", ".zst"))


def open_bytes(file: str) -> BinaryIO:
    """The bytes of a file, decompressed where its name says so."""
    import pyarrow as pa

    if is_compressed(file):
        return io.BufferedReader(pa.input_stream(file, compression="detect"), 1 << 20)
    return open(file, "rb")


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end). UserError names the line that cannot be read."""
    number = 0
    try:
        with open_bytes(file) as handle:
            for number, line in enumerate(handle, 1):
                yield number, line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 ({error.reason} at byte {error.start})"
        raise UserError(f"{file}:{number}: cannot be read: {reason}; convert the file or drop the line") from None
    except OSError as error:
        raise UserError(f"{file}:{number + 1}: cannot be read ({error})") from None


def _rows_of_file(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    _, kind = split_suffix(file)
    if kind is None:
        raise UserError(f"{file}: not one of {', '.join(_SUFFIXES)} (.gz, .zst)")
    if kind == ".parquet":
        yield from _parquet_rows(file)
    elif kind == ".txt":
        yield from _documents(file)
    elif kind == ".json" and (whole := _json_list(file)) is not None:
        rows, escaped = whole
        for i, row in enumerate(rows):
            yield f"{file}[{i}]", _object(row, f"{file}[{i}]", escaped)
    else:
        for number, line in _lines(file):
            if line.strip():
                where = f"{file}:{number}"
                yield where, json_row(line, where)


def _documents(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    first, paragraph = 1, list[str]()
    for number, line in itertools.chain(_lines(file), [(0, "")]):
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line.rstrip("\r\n"))
        elif paragraph:
            yield f"{file}:{first}", {"text": "\n".join(paragraph)}
            paragraph = []


def _json_list(file: str) -> tuple[list[Any], bool] | None:
    """A .json file that is one list, and whether surrogates are escaped in it; None where it is lines of objects."""
    try:
        with open_bytes(file) as handle:
            start = handle.read(4096).lstrip()[:1]
        if start != b"[":
            return None
        with open_bytes(file) as handle:
            content = handle.read()
        return json.loads(content), b"\\ud" in content or b"\\uD" in content
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: not JSON ({error})") from None


def _object(row: Any, where: str, escaped: bool) -> dict[str, Any]:
    """escaped: surrogates may stand in it; the half of a pair is no text, and nothing could encode it."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, and an object {{...}} is wanted")
    for name, value in row.items() if escaped else ():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):x}"
            raise UserError(
                f"{where}: field {name!r} holds {half}, half of a surrogate pair, which is no text; mend or remove it"
            ) from None
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
