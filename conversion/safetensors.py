"""Writing safetensors files array by array, so that no more than one array is copied at a time.

The format (github.com/huggingface/safetensors): 8 bytes of header length, little-endian; a JSON header of
name -> {dtype, shape, data_offsets}; the arrays' bytes in that order. The `safetensors` package writes what is in
memory as a whole.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from conversion.blocks import blocks
from vikhr_t5.errors import UserError

_KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
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
    dtype: np.dtype,
    max_shard_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes `model.safetensors`, or shards and their index where the arrays exceed `max_shard_size` bytes.

    Args:
        folder: an existing folder.
        shapes: name -> shape, in the order of `arrays`.
        arrays: each is converted to `dtype`, written and let go before the next is taken.
        dtype: float32, bfloat16 or float16.
        max_shard_size: in bytes; an array alone may exceed it.
        advance: called with the bytes of each array once it is written.
    """
    kind = _KINDS[dtype.name]
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_size)
    total = sum(sizes.values())
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    remaining = iter(arrays)
    for file, names in zip(files, shards, strict=True):
        with open(folder / file, "wb") as out:
            out.write(_header(names, shapes, sizes, kind))
            for name in names:
                given, value = next(remaining)
                if (given, value.shape) != (name, shapes[name]):
                    raise ValueError(f"{name} {shapes[name]} was announced, {given} {value.shape} came")
                for block in blocks(value, dtype):
                    out.write(block.view(np.uint8).data)
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
