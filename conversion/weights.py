"""The tensors of a Hugging Face folder: safetensors or `pytorch_model.bin`, whole or in shards, read one at a time."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vikhr_t5.errors import UserError

_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"


class Tensor(NamedTuple):
    """A tensor on disk. read: gives it in its stored dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def open_weights(folder: Path) -> dict[str, Tensor]:
    """name -> tensor of all files that `model.safetensors[.index.json]` or `pytorch_model.bin[.index.json]` mean.

    Raises:
        UserError: there is no such file, a shard is missing, a file is cut short or not what its name says, or holds
            anything but tensors (a pickle is read for tensors only; code in it is not run).
    """
    for name, read in ((SAFETENSORS, read_safetensors), (TORCH, _torch)):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _sharded(index, read)
        if (folder / name).is_file():
            return read(folder / name)
    raise UserError(f"{folder} holds no weights: {SAFETENSORS}, {TORCH} or one of them with .index.json is needed")


def _sharded(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file: index.parent / Path(file).name for file in weight_map.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of shards ({type(error).__name__}: {error})") from error
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path} is missing, and {index.name} lists it: copy that shard, too")
    shards = {file: read(path) for file, path in files.items()}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise UserError(
                f"{files[file]} lacks {name}, which {index.name} says it holds: the shard is of another model"
            )
    listed = {name for shard in shards.values() for name in shard} - set(weight_map)
    if listed:
        raise UserError(f"{index} does not list {', '.join(sorted(listed)[:5])}: the shards are of another model")
    return {name: shards[file][name] for name, file in weight_map.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """name -> tensor of one file. UserError where it is not whole."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # checks the header against the file: lengths, offsets, types
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): copy it again") from error
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: dict[str, Any], data: int) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise UserError(f"{path}: {name} is stored as {entry['dtype']}; only {', '.join(_DTYPES)} can be converted")
    dtype, shape, offset = _DTYPES[entry["dtype"]], tuple(entry["shape"]), data + entry["data_offsets"][0]

    def read() -> np.ndarray:
        # Not mapped into memory: pages of a map count as memory of the process.
        flat = np.fromfile(path, dtype, int(np.prod(shape)), offset=offset)
        if flat.size != np.prod(shape):
            raise UserError(
                f"{path} was cut short while it was read: {name} has {flat.size} of {np.prod(shape)} values"
            )
        return flat.reshape(shape)

    return Tensor(shape, dtype, read)


def _torch(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} needs torch to be read: pip install 'vikhr-t5[hf]', or get safetensors") from error
    refused = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError)
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("it holds something else than tensors")
    except refused as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is not a file of tensors alone ({reason}): nothing in it was run; get safetensors"
        ) from error
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

    def tensor(name: str, value: Any) -> Tensor:
        if value.dtype not in kinds:
            raise UserError(f"{path}: {name} is stored as {value.dtype}; only {', '.join(_DTYPES)} can be converted")
        dtype = _DTYPES[kinds[value.dtype]]
        bits = torch.int32 if dtype.itemsize == 4 else torch.int16
        return Tensor(tuple(value.shape), dtype, lambda: value.contiguous().view(bits).numpy().view(dtype))

    return {name: tensor(name, value) for name, value in state.items()}
