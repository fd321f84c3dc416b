"""Writes t5x's legacy checkpoints, array by array; the format is described in `t5x_files`."""

import collections
import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vikhr_t5.files import system_error

_CHUNK_BYTES = 2**24  # each part is compressed on its own, on all cores; t5x takes any size
_WHOLE_BYTES = 2**24  # an array of all layers is written in one piece up to this, else layer by layer
_PENDING_BYTES = 2**27  # being compressed and written while the next are read
_GZIP = {"id": "gzip", "level": 1}


class LegacyWriter:
    """Writes a checkpoint in the legacy format into `folder`, array by array; `finish` writes the index.

    Args:
        advance: called with the number of bytes after each part.
    """

    def __init__(self, folder: Path, advance: Callable[[int], None]):
        self._folder = folder
        self._advance = advance
        self._index: dict[str, Any] = {}
        self._pending: collections.deque[tuple[Any, np.ndarray]] = collections.deque()  # a write, and its data
        folder.mkdir(parents=True, exist_ok=True)

    def put(
        self,
        name: str,
        shape: tuple[int, ...],
        layer_axis: int,
        dtype: str,
        parts: Iterable[np.ndarray],
        inline: bool = False,
    ) -> None:
        """Write one array; returns while the last parts of it may still be compressed.

        Args:
            layer_axis: -1: `parts` gives the whole array; else it gives one layer after the other. A part has any
                shape of that many elements, or is a scalar.
            inline: in the index; else in a folder of its own.

        Raises:
            OSError: as the system says (a full disk), also where TensorStore wraps it.
        """
        kind = _numpy_type(dtype)
        one = tuple(size for axis, size in enumerate(shape) if axis != layer_axis)
        shaped = ((p.reshape(one) if p.ndim else np.broadcast_to(p, one)).astype(kind, copy=False) for p in parts)
        if layer_axis < 0:
            pieces: Iterable = (((), part) for part in shaped)
        else:
            pieces = (((*[slice(None)] * layer_axis, layer), part) for layer, part in enumerate(shaped))
            if inline or math.prod(shape) * kind.itemsize <= _WHOLE_BYTES:
                pieces = [((), np.stack([part for _, part in pieces], axis=layer_axis))]
        if inline:
            ((_, self._index[name]),) = pieces
            self._advance(self._index[name].nbytes)
            return
        streamed = not isinstance(pieces, list) and layer_axis >= 0
        handle = self._create(name, dtype, shape, layer_axis if streamed else -1)
        for index, part in pieces:
            self._wait(_PENDING_BYTES - part.nbytes)
            self._pending.append((handle[index].write(part), part))

    def _create(self, name: str, dtype: str, shape: tuple[int, ...], layer_axis: int) -> Any:
        """An empty array on disk, in parts of one layer (-1: of any) and of _CHUNK_BYTES at most."""
        import tensorstore

        chunks = [1 if axis == layer_axis else size for axis, size in enumerate(shape)]
        row_bytes = math.prod(chunks[1:]) * _numpy_type(dtype).itemsize
        chunks[0] = min(chunks[0], max(1, _CHUNK_BYTES // row_bytes))
        key = name.replace("/", ".")
        self._index[name] = {
            "driver": "zarr",
            "dtype": dtype,
            "kvstore": {"driver": "file", "path": f"{key}/"},  # relative: the checkpoint can be moved
            "metadata": {"shape": list(shape), "chunks": chunks, "compressor": _GZIP},
        }
        here = {"driver": "file", "path": f"{self._folder / key}/"}
        with _system_errors():
            return tensorstore.open({**self._index[name], "kvstore": here}, create=True, open=True).result()

    def _wait(self, limit: int) -> None:
        """Until `limit` bytes at most are pending, or nothing is."""
        while self._pending and sum(part.nbytes for _, part in self._pending) > limit:
            write, part = self._pending.popleft()
            with _system_errors():
                write.result()
            self._advance(part.nbytes)

    def finish(self) -> None:
        """Wait for every write, and write the index. Raises as `put`."""
        from flax.serialization import msgpack_serialize
        from flax.traverse_util import unflatten_dict

        self._wait(0)
        tree = unflatten_dict(self._index, sep="/")
        (self._folder / "checkpoint").write_bytes(msgpack_serialize({"version": 3, "optimizer": tree}))


def _numpy_type(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        code = system_error(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code)) from error
