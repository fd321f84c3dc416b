"""t5x's checkpoints as files: which arrays one has, and reading one of them or a part of it.

    legacy   checkpoint                              msgpack {version: 3, optimizer: {target, state}}; a small array
                                                     stands in it, of a large one a TensorStore specification
             target.encoder.<...>.kernel/{.zarray, 0.0}   a large array: zarr 2, gzip
    Orbax    state/{_METADATA, manifest.ocdbt, d/}   every array is a zarr in one OCDBT key-value store

Arrays are named by their path: "target/encoder/layers_0/mlp/wo/kernel", "state/step". The files may come from
anywhere: nothing in them is run, no path in them leaves the folder, and what they declare is checked against what is
stored before memory is taken for it. Source: t5x `checkpoints.py`.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vikhr_t5.errors import UserError

_GZIP_RATIO = 1032  # what deflate can reach
_DTYPES = {"<f4": ("float32", 4), "bfloat16": ("bfloat16", 2), "<i4": ("int32", 4)}  # as zarr names them


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint, not read yet. chunks: the shape of its parts on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    checkpoint: Path
    content: Any  # np.ndarray or tensorstore.TensorStore

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """The array or, given an index as NumPy takes it, that part; a UserError where the file is damaged."""
        if isinstance(self.content, np.ndarray):
            return self.content[index]
        try:
            return np.asarray(self.content[index].read().result())
        except (ValueError, OSError) as error:
            raise damaged(self.checkpoint, f"{self.name} cannot be read", error) from error


def damaged(checkpoint: Path, what: str, error: Exception | None = None) -> UserError:
    reason = f" ({str(error).splitlines()[0][:200]})" if error and str(error) else ""
    return UserError(f"t5x checkpoint {checkpoint}: {what}{reason}: copy the checkpoint again")


def find(path: str | os.PathLike[str]) -> Path:
    """The checkpoint meant by `path`: itself, or the newest `checkpoint_<step>` of a model_dir.

    Raises:
        UserError: there is none.
    """
    if "://" in str(path):
        raise UserError(f"{path} is not on this machine: copy the checkpoint's folder here and give its path")
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"t5x checkpoint {path}: no such folder")
    if (folder / "checkpoint").is_file() or (folder / "state").is_dir():
        return folder
    steps = [child for child in folder.iterdir() if re.fullmatch(r"checkpoint_\d+", child.name) and child.is_dir()]
    if not steps:
        raise UserError(f"{path} holds no t5x checkpoint: give a checkpoint_<step> folder, or the folder of several")
    return max(steps, key=lambda child: int(child.name.split("_")[1]))


def arrays(checkpoint: Path) -> dict[str, StoredArray]:
    """Every array of a checkpoint by name, in either format. Opens each, so that a missing one is noticed here.

    Raises:
        UserError: the checkpoint is not t5x's, or is damaged.
    """
    if (checkpoint / "state").is_dir():
        found = _orbax_arrays(checkpoint)
    elif (checkpoint / "checkpoint").is_file():
        found = _legacy_arrays(checkpoint)
    else:
        raise UserError(f"{checkpoint} is no t5x checkpoint: it has neither a file `checkpoint` nor a folder `state`")
    return {array.name: array for array in found}


def _legacy_arrays(checkpoint: Path) -> Iterator[StoredArray]:
    from flax.serialization import msgpack_restore

    content = (checkpoint / "checkpoint").read_bytes()
    if content.startswith(b"model_checkpoint_path"):
        raise UserError(f"{checkpoint} is TensorFlow's: convert it with t5x/scripts/convert_tf_checkpoint.py first")
    try:
        root = msgpack_restore(content)
    except Exception as error:  # msgpack and NumPy raise what they like on damaged input
        raise damaged(checkpoint, "the file `checkpoint` is not whole msgpack", error) from error
    version = root.get("version") if isinstance(root, dict) else None
    if version != 3 or not isinstance(root.get("optimizer"), dict):
        raise UserError(f"{checkpoint} has version {version!r} of t5x's format, not 3: save it again with a newer t5x")
    for name, leaf in _leaves(root["optimizer"]):
        if isinstance(leaf, np.ndarray | np.generic | int):
            value = np.asarray(leaf)
            yield StoredArray(name, value.shape, value.dtype.name, value.shape, checkpoint, value)
        elif isinstance(leaf, dict):
            yield _legacy_zarr(checkpoint, name, leaf)
        elif leaf is not None:
            raise damaged(checkpoint, f"{name} is a {type(leaf).__name__}, not an array")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and "driver" not in value:
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _legacy_zarr(checkpoint: Path, name: str, specification: Mapping[str, Any]) -> StoredArray:
    import tensorstore

    try:
        store = specification["kvstore"]
        folder = checkpoint / Path(store.get("path", specification.get("path"))).name
        if folder.name in ("", ".."):
            raise ValueError(f"path {folder.name!r}")
        declared = tuple(specification["metadata"]["shape"])
        text = (folder / ".zarray").read_text()
        metadata = json.loads(text)
        shape, chunks = tuple(metadata["shape"]), tuple(metadata["chunks"])
        dtype, itemsize = _DTYPES[metadata["dtype"]]
        sizes = [*shape, *chunks]
        if not all(isinstance(n, int) and n >= 1 for n in sizes) or len(shape) != len(chunks):
            raise ValueError(f"shape {list(shape)}, chunks {list(chunks)}")
        if metadata["zarr_format"] != 2 or (metadata["compressor"] or {}).get("id") != "gzip" or metadata["filters"]:
            raise ValueError("not zarr 2 with gzip")
    except OSError as error:
        raise damaged(checkpoint, f"{name} is missing", error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(checkpoint, f"{name} is described in a way that t5x does not write", error) from error
    if shape != declared:
        raise damaged(checkpoint, f"{name} is {list(shape)}, and {list(declared)} by the file `checkpoint`")
    _check_chunks(checkpoint, name, folder, shape, chunks, itemsize, metadata.get("dimension_separator", "."))
    specification = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    try:
        opened = tensorstore.open(specification, open=True).result()
    except (ValueError, OSError) as error:
        raise damaged(checkpoint, f"{name} cannot be opened", error) from error
    return StoredArray(name, shape, dtype, chunks, checkpoint, opened)


def _check_chunks(
    checkpoint: Path,
    name: str,
    folder: Path,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    itemsize: int,
    separator: str,
) -> None:
    """TensorStore reads an absent chunk as zeros, does not miss a gzip's last bytes, and aborts where memory ends."""
    expected = math.prod(chunks) * itemsize
    grid = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    present = sum(1 for path in folder.rglob("*") if path.is_file()) - 1
    if present < math.prod(grid):
        raise damaged(checkpoint, f"{name} has {present} of its {math.prod(grid)} parts")
    for place in itertools.product(*map(range, grid)):
        file = folder / separator.join(map(str, place) if place else "0")
        try:
            with open(file, "rb") as handle:
                size = handle.seek(0, os.SEEK_END)
                handle.seek(-min(size, 4), os.SEEK_END)
                length = int.from_bytes(handle.read(4), "little")  # the last four bytes of gzip: its content's length
        except OSError as error:
            raise damaged(checkpoint, f"{name}: part {file.name} is missing", error) from error
        if length != expected % 2**32 or expected > _GZIP_RATIO * size:
            raise damaged(checkpoint, f"{name}: part {file.name} does not hold the {expected} bytes that it should")


def _orbax_arrays(checkpoint: Path) -> Iterator[StoredArray]:
    import tensorstore

    state = checkpoint / "state"
    try:
        metadata = json.loads((state / "_METADATA").read_text())
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        names = [
            "/".join(str(key["key"]) for key in leaf["key_metadata"])
            for leaf in metadata["tree_metadata"].values()
            if not leaf["value_metadata"].get("skip_deserialize")
        ]
    except OSError as error:
        raise damaged(checkpoint, "state/_METADATA is missing", error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(checkpoint, "state/_METADATA is not Orbax's", error) from error
    stored = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    ocdbt = (state / "manifest.ocdbt").is_file()

    def open_array(name: str) -> Any:
        key = name.replace("/", ".") + "/"
        base = {"driver": "file", "path": f"{state}/"}
        store = (
            {"driver": "ocdbt", "base": base, "path": key} if ocdbt else {"driver": "file", "path": f"{state}/{key}"}
        )
        return tensorstore.open({"driver": driver, "kvstore": store}, open=True, context=context)

    context = tensorstore.Context()
    total = 0
    for name, future in [(name, open_array(name)) for name in names]:
        try:
            opened = future.result()
        except (ValueError, OSError) as error:
            raise damaged(checkpoint, f"{name} cannot be opened", error) from error
        chunks = opened.chunk_layout.read_chunk.shape or ()
        itemsize = np.dtype(opened.dtype.numpy_dtype).itemsize
        total += max(math.prod(opened.shape), math.prod(chunks)) * itemsize
        if total > 2**20 + _GZIP_RATIO * stored:
            raise damaged(checkpoint, f"{name} is {list(opened.shape)}, more than {stored} bytes of files can hold")
        yield StoredArray(name, opened.shape, opened.dtype.name, chunks, checkpoint, opened)
