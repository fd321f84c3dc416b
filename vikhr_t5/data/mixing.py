"""Shares turned into sequences: exact counts, evenly spaced, known at any place without drawing what comes before.

Templates of rows, tasks of a mixture, and the rows of one evaluation pass are all laid out in this way.

K things that share a sequence.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.integer]]

_WORD = (1 << 64) - 1


def apportion(weights: Sequence[float] | np.ndarray, total: int) -> IntArray:
    """[K] counts that add to `total`, as near to proportional to [K] `weights` as whole numbers can be (the method of
    largest remainders)."""
    exact = np.asarray(weights, np.float64) * (total / np.sum(weights))
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def spread(counts: Sequence[int] | IntArray) -> IntArray:
    """[sum(counts)] each index k `counts[k]` times, evenly spaced: any stretch holds all in nearly their shares."""
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]


class Interleaving:
    """An endless sequence in which k stands `counts[k]` times in every stretch of sum(counts) places.

    Attributes:
        counts: int64 [K].
        cycle: int [sum(counts)] the first stretch.
    """

    def __init__(self, counts: Sequence[int] | IntArray):
        self.counts = np.asarray(counts, np.int64)
        self.cycle = spread(self.counts)
        self._first = np.cumsum(self.counts) - self.counts
        self._places = np.argsort(self.cycle, kind="stable")  # of all 0s, then of all 1s, …
        self._ranks = np.empty_like(self._places)
        self._ranks[self._places] = np.arange(len(self.cycle)) - np.repeat(self._first, self.counts)

    def __getitem__(self, place: int) -> tuple[int, int]:
        """(k, how often k stands before `place`)."""
        cycles, place = divmod(place, len(self.cycle))
        k = int(self.cycle[place])
        return k, cycles * int(self.counts[k]) + int(self._ranks[place])

    def place(self, k: int, before: int) -> int:
        """The inverse of `[]`."""
        cycles, rank = divmod(before, int(self.counts[k]))
        return cycles * len(self.cycle) + int(self._places[self._first[k] + rank])

    def count(self, stop: int) -> IntArray:
        """int64 [K] how often each k stands before `stop`."""
        cycles, rest = divmod(stop, len(self.cycle))
        return cycles * self.counts + np.bincount(self.cycle[:rest], minlength=len(self.counts))


def permuted(index: int, size: int, key: int) -> int:
    """Where the permutation of range(size) number `key` takes `index`, computed alone: the rest is never made.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of an even count of bits, at most four times `size`;
    it is applied until it meets one that is in range. Grain's `index_shuffle` does the same on at least 2¹⁶ numbers,
    which for the few hundred rows of a small corpus takes a hundred steps a row.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for step in range(6):
            mixed = (right + key + step * 0x632BE59BD9B4E019) * 0x9E3779B97F4A7C15 & _WORD
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & _WORD
            left, right = right, left ^ mixed >> 64 - half
        index = left << half | right
        if index < size:
            return index


def digest(*values: object) -> bytes:
    """32 bytes that depend on all of `values` (by their repr): seeds and names that must not collide."""
    return hashlib.sha256(repr(values).encode()).digest()


def key(*values: object) -> int:
    """64 bits that depend on all of `values`: seeds, and names that must not be shuffled alike."""
    return int.from_bytes(digest(*values)[:8])
