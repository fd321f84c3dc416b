"""Corpora: documents -> tokens on disk, once per tokenizer.

A tokenized corpus is a folder, whole or absent, named by what it was made from:

    tokens.bin   uint16 or uint32: <s> document </s>, one after another
    ends.npy     int64 [D] where each document ends
    alike.npy    bool [D] both tokenizers gave the same ids (only with a base tokenizer; see `anchoring`)

Letters: D documents.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vikhr_t5.data.records import read_texts, source_files
from vikhr_t5.errors import UserError
from vikhr_t5.files import atomic_path, write_text_atomic
from vikhr_t5.progress import Progress

BATCH_DOCUMENTS = 1000


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
