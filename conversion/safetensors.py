"""Writing safetensors files array by array, so that no more than one array is copied at a time.

The format (github.com/huggingface/safetensors): 8 bytes of header length, little-endian; a JSON header of
name -> {dtype, shape, data_offsets}; the arrays' bytes in that order. The `safetensors` package writes what is in
memory as a whole.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from vikhr_t5.errors import UserError

DTYPES = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16))}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(size: int | str) -> int:
    """`5GB` -> 5,000,000,000 bytes, as in Hugging Face's `max_shard_size`; a number is bytes. UserError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", str(size).strip().upper())
    count = float(match[1]) * _UNITS[match[2] or ""] if match else 0
    if count < 1:
        raise UserError(f"max_shard_size {size!r}: give bytes or a size such as 500MB or 5GB")
    return int(count)


def write_sharded(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    max_shard_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes `model.safetensors`, or shards and their index where the arrays exceed `max_shard_size` bytes.

    Args:
        folder: an existing folder.
        shapes: name -> shape, in the order of `arrays`.
        arrays: each is converted to `dtype`, written and let go before the next is taken.
        dtype: "float32" or "bfloat16".
        max_shard_size: in bytes; an array alone may exceed it.
        advance: called with the bytes of each array once it is written.

    Raises:
        UserError: the disk is full or too small.
    """
    kind, stored = DTYPES[dtype]
    sizes = {name: int(np.prod(shape)) * stored.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_size)
    total = sum(sizes.values())
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    remaining = iter(arrays)
    with _room(folder, total):
        for file, names in zip(files, shards, strict=True):
            with open(folder / file, "wb") as out:
                out.write(_header(names, shapes, sizes, kind))
                for name in names:
                    given, value = next(remaining)
                    if (given, value.shape) != (name, shapes[name]):
                        raise ValueError(f"{name} {shapes[name]} was announced, {given} {value.shape} came")
                    np.ascontiguousarray(value, dtype=stored).view(np.uint8).tofile(out)
                    advance(sizes[name])
        if len(shards) > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(names: list[str], shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], kind: str) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + sizes[name]
        entries[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _room:
    """Says in one line that the disk is too small, before writing or when it fills."""

    def __init__(self, folder: Path, needed: int):
        self.folder, self.needed = folder, needed

    def __enter__(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < self.needed:
            raise self._error(free)

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise self._error(shutil.disk_usage(self.folder).free) from error

    def _error(self, free: int) -> UserError:
        where = os.fspath(self.folder.parent)
        return UserError(
            f"{where}: the model takes {self.needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free;"
            " nothing was written: make room, or export with dtype bfloat16"
        )
