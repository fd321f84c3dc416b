"""Arrays on their way to a file: the next one is read while this one is written, some rows at a time."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
_ROWS, _COLUMNS, _BLOCK_BYTES = 512, 16, 2**25  # of a tile: the fastest of those tried


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; the next one is made by a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item
            del item


@functools.lru_cache(1)
def _buffer(count: int) -> np.ndarray:
    """Bytes that are used again: fresh memory costs the kernel as much as copying into it."""
    return np.empty(count, np.uint8)


def blocks(value: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """`value` in C order and in `dtype`, some rows at a time; a transposed one is copied in tiles that fit a cache.

    Use each block before the next is taken: they share their memory.
    """
    if value.ndim < 2 or value.flags.c_contiguous:
        yield np.ascontiguousarray(value, dtype)
        return
    row_bytes = value.shape[1] * dtype.itemsize
    rows = max(_ROWS, _BLOCK_BYTES // row_bytes)
    buffer = _buffer(max(2 * _BLOCK_BYTES, rows * row_bytes))
    for start in range(0, len(value), rows):
        part = value[start : start + rows]
        block = buffer[: len(part) * row_bytes].view(dtype).reshape(part.shape)
        for i in range(0, part.shape[0], _ROWS):
            for j in range(0, part.shape[1], _COLUMNS):
                block[i : i + _ROWS, j : j + _COLUMNS] = part[i : i + _ROWS, j : j + _COLUMNS]
        yield block
