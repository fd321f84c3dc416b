"""Counts of the documents that a task's preprocessors leave out, by reason.

A preprocessor in Python says `drop("too_short")` where it leaves one out. The cache reads the counts, shard by shard,
into the manifest; without the cache they are counted and nobody asks.
"""

from collections import Counter

_counts: Counter[str] = Counter()  # of this process, since it began


def drop(reason: str, count: int = 1) -> None:
    """Count `count` documents that were left out for `reason`, a short name such as that of the step."""
    if count:
        _counts[reason] += count


def counts() -> Counter[str]:
    """What was counted in this process until now: reason -> documents. Subtract an earlier answer for a stretch."""
    return _counts.copy()
