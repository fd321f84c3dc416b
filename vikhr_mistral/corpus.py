"""Corpora: rows of published files, without seqio; documents -> tokens on disk, once per tokenizer.

A tokenized corpus is a folder, whole or absent, named by what it was made from:

    tokens.bin   uint16 or uint32: <s> document </s>, one after another
    ends.npy     int64 [D] where each document ends
    alike.npy    bool [D] both tokenizers gave the same ids (only with a base tokenizer; see `anchoring`)

Letters: D documents.
"""

import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import atomic_path, write_text_atomic
from vikhr_t5.progress import Progress

BATCH_DOCUMENTS = 1000
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
            yield handle  # type: ignore[misc]
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
        for batch in pq.ParquetFile(file).iter_batches(BATCH_DOCUMENTS):
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


# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizedCorpus:
    """A folder that `tokenize` wrote; memory-mapped."""

    directory: Path

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32 [all tokens]."""
        return np.memmap(self.directory / "tokens.bin", self.manifest["dtype"], mode="r")

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 [D]."""
        return np.load(self.directory / "ends.npy")

    @cached_property
    def alike(self) -> np.ndarray | None:
        """bool [D]: both tokenizers gave the same ids; None where there was no base tokenizer."""
        path = self.directory / "alike.npy"
        return np.load(path) if path.exists() else None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.directory / "manifest.json").read_text(encoding="utf-8"))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of the tokenizer.json that a fast tokenizer would write: two with the same one give the same ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def tokenize(
    source: str | Sequence[str],
    tokenizer: Any,
    cache_dir: str | os.PathLike[str],
    field: str = "text",
    base_tokenizer: Any = None,
    name: str = "corpus",
) -> TokenizedCorpus:
    """Documents -> tokens on disk, as `<s> ids </s>`; at once where the same was done before.

    Args:
        source, field: as for `read_texts`.
        tokenizer: a fast Hugging Face tokenizer with bos and eos.
        cache_dir: holds one folder per (source, tokenizer).
        base_tokenizer: the base model's; with it `alike` says which documents both tokenize to the same ids.
        name: for the progress line and the folder's name.

    Raises:
        UserError: a row cannot be read, no document is there, or the tokenizer lacks bos or eos.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or eos is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no bos or eos token, which documents begin and end with"
        )
    sources = [source] if isinstance(source, str) else list(source)
    files = [file for one in sources for file in source_files(one) or [one]]
    made_from = {
        "files": [[file, *_stamp(file)] for file in files],
        "field": field,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "base_tokenizer": base_tokenizer and tokenizer_fingerprint(base_tokenizer),
    }
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    corpus = TokenizedCorpus(Path(cache_dir) / f"{name}-{key}")
    if (corpus.directory / "manifest.json").exists():
        return corpus
    dtype = np.dtype("uint16" if len(tokenizer) <= 1 << 16 else "uint32")
    ends, alike, total = list[int](), list[bool](), 0
    texts = read_texts(source, field)
    with atomic_path(corpus.directory) as folder:
        folder.mkdir()
        with open(folder / "tokens.bin", "wb") as file, Progress(f"tokenizing {name}", None, "documents") as bar:
            while batch := [text for _, text in itertools.islice(texts, BATCH_DOCUMENTS)]:
                ids = _encode(tokenizer, batch)
                base_ids = _encode(base_tokenizer, batch) if base_tokenizer is not None else ids
                for document, base in zip(ids, base_ids, strict=True):
                    np.array([bos, *document, eos], dtype).tofile(file)
                    total += len(document) + 2
                    ends.append(total)
                    alike.append(document == base)
                bar.advance(len(batch))
        if not ends:
            raise UserError(f"{', '.join(sources)}: no document; each is a row whose field {field!r} is not blank")
        np.save(folder / "ends.npy", np.array(ends, np.int64))
        if base_tokenizer is not None:
            np.save(folder / "alike.npy", np.array(alike))
        write_text_atomic(folder / "manifest.json", json.dumps({**made_from, "dtype": dtype.name}, indent=1))
    return corpus


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _stamp(file: str) -> tuple[int, int]:
    if not os.path.exists(file):  # of the hub
        return 0, 0
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
