"""Duplicate documents: a signature of each text, and from all signatures which documents go. No TensorFlow.

A document goes where an earlier one, in the order of the store, is like it (whether that one stays or not).

    exact     equal texts: BLAKE2b of the normalised text, 8 bytes a document. (That any two of 200 million different
              texts share one has a chance of 0.1%.)
    minhash   near-duplicates: MinHash (Broder 1997) of the text's shingles of 5 words by `datasketch`, 128
              permutations, 512 bytes a document; as in Lee et al. 2022, "Deduplicating Training Data Makes Language
              Models Better", those that agree in one of 16 bands of 8 are compared, and are duplicates where the share
              of equal values, an estimate of the shingles' Jaccard index, is 0.8 or more. Of pairs at 0.8, bands find
              95%.

Normalised: NFKC, case folded, words alone. Signatures are files and are mapped; in memory `duplicates` holds 35 bytes a
document (exact) or 80 (minhash).

N documents, P permutations.
"""

import re
import unicodedata
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vikhr_t5.errors import UserError, nearest

SHINGLE_WORDS, NUM_PERM, BANDS, THRESHOLD = 5, 128, 16, 0.8
CHUNK = 1 << 16  # signatures that are read or compared at once

_WORDS = re.compile(r"\w+")


class Method(Protocol):
    """A kind of duplicates.

    parameters: for the manifest. dtype, width: of one signature.
    """

    parameters: dict[str, Any]
    dtype: type[np.unsignedinteger]
    width: int

    def sign(self, text: bytes) -> np.ndarray:
        """The signature [width] of a text in UTF-8."""

    def duplicates(self, signatures: "Signatures") -> np.ndarray:
        """bool [N]: whether a document goes."""


class Signatures:
    """The signatures of all documents, in files that `sign`'s results were appended to.

    Args:
        files: in the order of the documents.
        method: what they are of.
    """

    def __init__(self, files: Sequence[Path], method: Method):
        counts = [file.stat().st_size // (method.width * np.dtype(method.dtype).itemsize) for file in files]
        self._parts: list[np.ndarray] = [
            np.memmap(file, method.dtype, "r", shape=(count, method.width)) if count else np.zeros((0, 1), method.dtype)
            for file, count in zip(files, counts, strict=True)
        ]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._width, self._dtype = method.width, method.dtype

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, documents: np.ndarray) -> np.ndarray:
        """[n, width] of the documents [n]."""
        found: np.ndarray = np.empty((len(documents), self._width), self._dtype)
        parts = np.searchsorted(self._starts, documents, side="right") - 1
        for part in np.unique(parts):
            here = parts == part
            found[here] = self._parts[part][documents[here] - self._starts[part]]
        return found

    def hashes(self, columns: slice) -> np.ndarray:
        """uint64 [N] of some of the signatures' columns."""
        odd = np.random.default_rng(0).integers(1 << 63, size=self._width, dtype=np.uint64)[columns] * 2 + 1
        found = np.empty(len(self), np.uint64)
        for part, first in zip(self._parts, self._starts, strict=False):
            for start in range(0, len(part), CHUNK):
                chunk = part[start : start + CHUNK, columns].astype(np.uint64)
                mixed = (chunk + np.uint64(1)) * odd
                into = first + start
                found[into : into + len(chunk)] = (mixed ^ mixed >> np.uint64(29)).sum(axis=1, dtype=np.uint64)
        return found


def normalised(text: bytes) -> list[str]:
    """The words by which texts are compared; of a text without any, the text itself."""
    folded = unicodedata.normalize("NFKC", text.decode(errors="replace")).casefold()
    return _WORDS.findall(folded) or [folded.strip()]


class Exact:
    """Equal normalised texts."""

    parameters: dict[str, Any] = {"method": "exact"}  # noqa: RUF012
    dtype: type[np.unsignedinteger] = np.uint64
    width = 1

    def sign(self, text: bytes) -> np.ndarray:
        """BLAKE2b of the text."""
        return np.frombuffer(blake2b(" ".join(normalised(text)).encode(), digest_size=8).digest(), np.uint64)

    def duplicates(self, signatures: Signatures) -> np.ndarray:
        """Whether an earlier document has the same signature."""
        hashes = signatures.hashes(slice(None))
        order = np.argsort(hashes, kind="stable")
        goes = np.zeros(len(order), bool)
        goes[order[1:][hashes[order[1:]] == hashes[order[:-1]]]] = True
        return goes


class MinHash:
    """Texts most of whose shingles are the same."""

    parameters: dict[str, Any] = {  # noqa: RUF012
        "method": "minhash",
        "shingle_words": SHINGLE_WORDS,
        "num_perm": NUM_PERM,
        "bands": BANDS,
        "threshold": THRESHOLD,
    }
    dtype: type[np.unsignedinteger] = np.uint32
    width = NUM_PERM
    _odd = np.random.default_rng(1).integers(1 << 31, size=SHINGLE_WORDS, dtype=np.uint32) * 2 + 1

    def __init__(self) -> None:
        try:
            import datasketch
        except ImportError as error:
            raise UserError("--dedup minhash needs datasketch: pip install 'vikhr-t5[dedup]'") from error
        self._empty = datasketch.MinHash(NUM_PERM, seed=1, hashfunc=int, scheme="affine32")

    def sign(self, text: bytes) -> np.ndarray:
        """uint32 [P]: the least value of each permutation over the text's shingles."""
        sketch = self._empty.copy()
        sketch.update_batch(shingles(normalised(text)))
        return sketch.hashvalues

    def duplicates(self, signatures: Signatures) -> np.ndarray:
        """Whether an earlier document agrees in a band and in THRESHOLD of all values."""
        goes = np.zeros(len(signatures), bool)
        rows = NUM_PERM // BANDS
        for band in range(BANDS):
            hashes = signatures.hashes(slice(band * rows, (band + 1) * rows))
            order = np.argsort(hashes, kind="stable")
            same = hashes[order[1:]] == hashes[order[:-1]]
            del hashes
            # Places in the order whose document has an earlier one, `lag` places before it, in the same band.
            places, lag = np.flatnonzero(same) + 1, 1
            firsts = _group_starts(same)
            while len(places := places[(places - lag >= firsts[places]) & ~goes[order[places]]]):
                for start in range(0, len(places), CHUNK):
                    some = places[start : start + CHUNK]
                    equal = signatures[order[some]] == signatures[order[some - lag]]
                    goes[order[some[equal.mean(axis=1) >= THRESHOLD]]] = True
                lag += 1
        return goes


def _group_starts(same: np.ndarray) -> np.ndarray:
    """Where the run of equal neighbours that each place lies in begins. [n - 1] -> int64 [n]."""
    starts = np.arange(len(same) + 1)
    starts[1:][same] = 0
    return np.maximum.accumulate(starts)


def shingles(words: Sequence[str]) -> np.ndarray:
    """uint32: a hash of each run of SHINGLE_WORDS words, or of all where there are fewer."""
    hashes = np.array([zlib.crc32(word.encode()) for word in words], np.uint32)
    size = min(SHINGLE_WORDS, len(hashes))
    runs = np.lib.stride_tricks.sliding_window_view(hashes, size)
    return (runs * MinHash._odd[:size]).sum(axis=1, dtype=np.uint32)


METHODS: dict[str, type[Method]] = {"exact": Exact, "minhash": MinHash}


def method(name: str) -> Method:
    """UserError for a name that is not in METHODS, and where datasketch is missing."""
    if name not in METHODS:
        raise UserError(f"--dedup {name}: {nearest(name, METHODS)}, or none")
    return METHODS[name]()
