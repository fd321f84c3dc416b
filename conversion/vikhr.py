"""Our own checkpoints, array by array.

Training writes them through Orbax, which wants a whole tree in memory. Here the same files are read with TensorStore,
and written as Orbax's layout without OCDBT: a folder for each array in zarr's format, a file for
each layer, not compressed. Orbax reads that as it reads what it wrote itself.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from conversion import names
from conversion.blocks import ahead, blocks
from conversion.stored import DTYPES, StoredModel, arrays, shapes
from vikhr_t5.data.vocabulary import AnyVocabulary, load_vocabulary, vocabulary_files
from vikhr_t5.errors import UserError
from vikhr_t5.model.config import T5Config
from vikhr_t5.train.checkpoint_files import find_checkpoint, read_progress, seal

# Chunks are read once and in order: no cache.
_CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
_CHUNK_BYTES = 2**26


class Checkpoint:
    """A `StoredModel`: a checkpoint of a run, or one that `write` made.

    Raises:
        UserError: there is no whole checkpoint; it does not hold the parameters that its configuration asks for.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.folder = find_checkpoint(path)
        self.config = T5Config.from_json((self.folder / "model_config.json").read_text())
        self.vocabulary: AnyVocabulary | None = load_vocabulary(self.folder / "vocabulary")
        self.step = read_progress(self.folder)["step"]
        self._params = _Arrays(self.folder / "params")
        names.account(self._params.shapes(), shapes(self.config), f"checkpoint {self.folder}")
        self.dtype = self._params.open("token_embedder/embedding").dtype.name
        self.updates: int | None = None
        state = self.folder / "opt_state"
        if state.is_dir():
            self._moments = _Arrays(state)
            if "updates" in self._moments.shapes():  # another optimizer's state is of no use to another format
                self.updates = int(self._moments.read("updates"))

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        return self._params.read(name, layer)

    def read_moments(self, name: str, layer: int | None = None) -> dict[str, np.ndarray]:
        prefix = f"moments/{name}/"
        found = [path for path in self._moments.shapes() if path.startswith(prefix)]
        return {path.removeprefix(prefix): self._moments.read(path, layer) for path in found}


class _Arrays:
    """The arrays of one folder that Orbax or `write` made, by their paths in the tree."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._ocdbt = (folder / "manifest.ocdbt").exists()
        try:
            listed = json.loads((folder / "_METADATA").read_text())["tree_metadata"].values()
            self._paths = ["/".join(key["key"] for key in leaf["key_metadata"]) for leaf in listed]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}/_METADATA cannot be read ({error}): take another checkpoint") from error
        self._open: dict[str, Any] = {}
        self._last: tuple[str, np.ndarray] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(self.open(path).shape) for path in self._paths}

    def open(self, path: str) -> Any:
        if path not in self._open:
            name = path.replace("/", ".")
            store = {"driver": "file", "path": f"{self.folder}/{name}/"}
            if self._ocdbt:
                store = {"driver": "ocdbt", "base": f"file://{self.folder}/", "path": f"{name}/"}
            try:
                opened = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True, context=_CONTEXT)
                self._open[path] = opened.result()
            except ValueError as error:
                raise UserError(f"{self.folder}: array {path} cannot be opened: {_first(error)}") from error
        return self._open[path]

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        array = self.open(path)
        if layer is None or array.chunk_layout.read_chunk.shape[0] == 1:
            return self._content(path, array, layer)
        if self._last is None or self._last[0] != path:  # a chunk of several layers: read it once
            self._last = None
            self._last = (path, self._content(path, array))
        return self._last[1][layer]

    def _content(self, path: str, array: Any, layer: int | None = None) -> np.ndarray:
        """An array, or a layer of it that is a chunk of its own."""
        shape, kind = array.shape, array.dtype.numpy_dtype
        plain = not self._ocdbt and array.spec().to_json()["metadata"]["compressor"] is None
        if plain and layer is not None and array.chunk_layout.read_chunk.shape[1:] == shape[1:]:
            file = self.folder / path.replace("/", ".") / ".".join(map(str, [layer, *[0] * (len(shape) - 1)]))
            content = np.fromfile(file, kind) if file.exists() else np.empty(0, kind)
            if content.size != np.prod(shape[1:]):
                raise UserError(f"{file} has {content.size} values, not {np.prod(shape[1:])}: take another checkpoint")
            return content.reshape(shape[1:])
        try:
            return (array if layer is None else array[layer]).read().result()
        except ValueError as error:
            raise UserError(f"{self.folder}: array {path} cannot be read: {_first(error)}") from error


def _first(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


def write(model: StoredModel, folder: Path, dtype: str, advance: Callable[[int], None] = lambda count: None) -> None:
    """Writes one checkpoint's folder (a run starts from it by INITIAL_CHECKPOINT_PATH), array by array.

    Args:
        folder: does not exist yet; the caller renames it into place.
        dtype: of the stored parameters, "float32" or "bfloat16". Adafactor's state, where there is one, is float32.
        advance: called with the bytes of each array once it is written.

    Raises:
        UserError: the model has no vocabulary.
    """
    if model.vocabulary is None:
        raise UserError("the source carries no vocabulary, and a checkpoint needs one: give --vocabulary")
    folder.mkdir(parents=True)
    whole = shapes(model.config)
    writer = _Writer(folder / "params", advance)
    for name, layer, value in ahead((name, layer, model.read(name, layer)) for name, layer in arrays(model.config)):
        writer.write(name, layer, whole[name], value.astype(DTYPES[dtype], copy=False))
    writer.close()
    if model.updates is not None:
        writer = _Writer(folder / "opt_state", advance)
        writer.write("updates", None, (), np.asarray(model.updates, np.int32))
        for name, layer in arrays(model.config):
            for moment, value in model.read_moments(name, layer).items():
                shape = value.shape if layer is None else (whole[name][0], *value.shape)
                writer.write(f"moments/{name}/{moment}", layer, shape, value)
        writer.close()
    for file, content in _description(model):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
    seal(folder)


def _description(model: StoredModel) -> Iterator[tuple[str, bytes]]:
    assert model.vocabulary is not None
    progress = {"step": model.step, "first_step": model.step, "seed": 0, "tokens": 0}
    yield "progress.json", json.dumps(progress).encode()
    yield "model_config.json", model.config.to_json().encode()
    yield "config.gin", b"# converted by vikhr-t5 convert: no run made this checkpoint\n"
    for name, content in vocabulary_files(model.vocabulary).items():
        yield f"vocabulary/{name}", content


class _Writer:
    """One folder of arrays; a stacked array is written layer by layer."""

    def __init__(self, folder: Path, advance: Callable[[int], None]):
        folder.mkdir()
        self.folder, self._advance = folder, advance
        self._listed: dict[str, tuple[int, ...]] = {}

    def write(self, path: str, layer: int | None, shape: tuple[int, ...], value: np.ndarray) -> None:
        """An array of `shape`, or one layer of it."""
        folder = self.folder / path.replace("/", ".")
        chunk = (1, *shape[1:]) if layer is not None else self._chunk(shape, value.dtype.itemsize)
        if path not in self._listed:
            folder.mkdir()
            (folder / ".zarray").write_text(json.dumps(_zarray(shape, chunk, value.dtype)))
            self._listed[path] = shape
        for part in range(1 if layer is not None or not shape else shape[0] // chunk[0]):
            rows = value if layer is not None or not shape else value[part * chunk[0] : (part + 1) * chunk[0]]
            place = [part if layer is None else layer, *[0] * (len(shape) - 1)] if shape else [0]
            with open(folder / ".".join(map(str, place)), "wb") as file:
                for block in blocks(rows, value.dtype):
                    file.write(block.view(np.uint8).data)
        self._advance(value.nbytes)

    @staticmethod
    def _chunk(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
        """As many rows as make _CHUNK_BYTES, of those numbers that divide the array (zarr would pad the last chunk)."""
        if not shape:
            return ()
        most = max(1, _CHUNK_BYTES // max(1, int(np.prod(shape[1:])) * itemsize))
        return (max(rows for rows in range(1, min(most, shape[0]) + 1) if shape[0] % rows == 0), *shape[1:])

    def close(self) -> None:
        content = {
            "tree_metadata": {str(tuple(path.split("/"))): _leaf(path, shape) for path, shape in self._listed.items()},
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self.folder / "_METADATA").write_text(json.dumps(content))


def _zarray(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """A zarr array's metadata, version 2; `bfloat16` is TensorStore's."""
    return {
        "chunks": chunk,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": "bfloat16" if dtype == DTYPES["bfloat16"] else dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": shape,
        "zarr_format": 2,
    }


def _leaf(path: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """An array's entry in Orbax's _METADATA."""
    return {
        "key_metadata": [{"key": key, "key_type": 2} for key in path.split("/")],
        "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
    }
