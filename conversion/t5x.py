"""t5x's checkpoints as models: both of its formats in, the legacy one out; the layouts are in `t5x_layout`.

t5x restores a folder named `checkpoint_<step>`, which lies in a model_dir: `folder_for` gives it, `write` fills it.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from conversion import t5x_files
from conversion.names import Parameter, account
from conversion.stored import DTYPES, StoredModel
from conversion.t5x_files import StoredArray
from conversion.t5x_layout import UNUSED, Layout, infer
from conversion.t5x_writer import LegacyWriter
from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.model.config import T5Config

_TARGET, _STATE = "target/{}", "state/param_states/{}"


class T5xModel:
    """A `StoredModel`. Of an array that holds all layers in one part on disk, the last one read is kept."""

    def __init__(
        self,
        arrays: dict[str, StoredArray],
        layout: Layout,
        step: int,
        updates: int | None,
        vocabulary: AnyVocabulary | None,
    ):
        self.config = layout.config
        self.step = step
        self.vocabulary = vocabulary
        self.updates = updates
        self.dtype = _parameter_type(arrays)
        self._arrays = arrays
        self._layout = layout
        self._last: dict[str, tuple[str, np.ndarray]] = {}

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        row = self._layout.rows[name]
        value = self._part(_TARGET.format(self._layout.path(row, layer)), self._layout.axes(row), layer)
        return value.reshape(self._layout.our_shape(row)).astype(DTYPES[self.dtype], copy=False)

    def read_moments(self, name: str, layer: int | None = None) -> dict[str, np.ndarray]:
        row, layout = self._layout.rows[name], self._layout
        path = _STATE.format(layout.path(row, layer))
        factored, momentum = (self._arrays[f"{path}/{slot}"].shape != UNUSED for slot in ("v_row", "m"))
        axes = layout.slot_axes(row, factored, momentum)
        theirs = {slot: self._part(f"{path}/{slot}", axes[slot], layer).astype(np.float32, copy=False) for slot in axes}
        return layout.moments_to_ours(row, theirs)

    def _part(self, name: str, axes: str, layer: int | None) -> np.ndarray:
        """The layer's part of one of t5x's arrays, or the whole of one that is of one layer or of none."""
        array, axis = self._arrays[name], axes.find("L")
        if axis < 0:
            return array.read()
        assert layer is not None
        index: tuple[int | slice, ...] = (*[slice(None)] * axis, layer)
        if array.chunks[axis] == 1:
            return array.read(index)
        kind = name.rsplit("/", 1)[1]  # "kernel", "v": each slot of the optimizer's has its own place
        if self._last.get(kind, ("", None))[0] != name:
            self._last.pop(kind, None)  # before the next is read
            self._last[kind] = name, array.read()
        return self._last[kind][1][index]


def open(
    path: str | os.PathLike[str], config: T5Config | None = None, vocabulary: AnyVocabulary | None = None
) -> T5xModel:
    """A t5x checkpoint, by what its arrays' shapes say. Adafactor's state is kept, any other is left out in one line.

    Args:
        path: a `checkpoint_<step>` folder, or a model_dir (its newest).
        config: checked against the shapes, and believed in what they cannot say.
        vocabulary: t5x's checkpoints have none.

    Raises:
        UserError: there is none, it is damaged, it is not T5's, or not the model of `config`; lists what differs.
    """
    checkpoint = t5x_files.find(path)
    arrays = t5x_files.arrays(checkpoint)
    where = f"t5x checkpoint {checkpoint}"
    shapes = {name.removeprefix("target/"): a.shape for name, a in arrays.items() if name.startswith("target/")}
    found, scanned, split_heads = infer(shapes, where)
    layout = Layout(_agreed(config, found, where), scanned, split_heads)
    wanted = {path: layout.shape(row) for row in layout.rows.values() for path, _ in layout.arrays(row)}
    account(shapes, wanted, where)
    others = [name for name in arrays if name.split("/")[0] not in ("target", "state")]
    if others:
        raise UserError(f"{where} holds arrays that are neither parameters nor optimizer state: {', '.join(others)}")
    step = _step(arrays, checkpoint)
    has_moments = _has_moments(arrays, layout, where)
    model = T5xModel(arrays, layout, step, step if has_moments else None, vocabulary)
    if has_moments and not any(moment.any() for moment in model.read_moments("decoder/decoder_norm/scale").values()):
        model.updates = None  # zeros: no update was ever done, see `write`
    return model


def _step(arrays: dict[str, StoredArray], checkpoint: Path) -> int:
    if "state/step" not in arrays:
        named = re.fullmatch(r"checkpoint_(\d+)", checkpoint.name)
        return int(named[1]) if named else 0
    array = arrays["state/step"]
    if array.shape != () or array.dtype not in ("int32", "int64") or array.read() < 0:
        raise t5x_files.damaged(checkpoint, f"state/step is no count: {array.dtype} {list(array.shape)}")
    return int(array.read())


def _agreed(given: T5Config | None, found: T5Config, where: str) -> T5Config:
    if given is None:
        return found
    seen = ["emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers", "num_decoder_layers"]
    seen += ["logits_via_embedding", "relative_bias_per_layer"]
    seen += ["vocab_size"] if given.vocab_size is not None else []
    seen += ["mlp_activations"] if len(given.mlp_activations) != len(found.mlp_activations) else []
    pairs = [(field, getattr(found, field), getattr(given, field)) for field in seen]
    told = [f"{field} {theirs} instead of {ours}" for field, theirs, ours in pairs if theirs != ours]
    if told:
        raise UserError(f"{where} holds another model than T5Config says: {', '.join(told)}: set T5Config to it")
    return dataclasses.replace(given, vocab_size=found.vocab_size)


def _has_moments(arrays: dict[str, StoredArray], layout: Layout, where: str) -> bool:
    """Whether the optimizer's state is Adafactor's; tells what of it is left out.

    Raises:
        UserError: it is Adafactor's, and not that of these parameters.
    """
    names = [name for name in arrays if name.startswith("state/") and name != "state/step"]
    if not names:
        return False
    found = {name: arrays[name].shape for name in names}
    wanted: dict[str, tuple[int, ...]] = {}
    for row in layout.rows.values():
        for path, _ in layout.arrays(row):
            path = _STATE.format(path)
            factored, momentum = (found.get(f"{path}/{slot}", UNUSED) != UNUSED for slot in ("v_row", "m"))
            slots = layout.slot_shapes(row, factored, momentum)
            wanted |= {f"{path}/{slot}": shape for slot, shape in slots.items()}
    if not wanted.keys() & found.keys():
        print(f"{where}: the optimizer's state is not Adafactor's and is left out ({names[0]}, …)", file=sys.stderr)
        return False
    if "state/step" not in arrays:
        raise UserError(f"{where} has Adafactor's state and no state/step: copy the checkpoint again")
    account(found, wanted, where)
    return True


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint of t5x's or a model_dir with one."""
    try:
        return bool(t5x_files.find(path))
    except UserError:
        return False


def folder_for(destination: Path, step: int) -> Path:
    """Where t5x looks for a checkpoint: `destination` where it is so named, else checkpoint_<step> inside it."""
    name = f"checkpoint_{step}"
    return destination if destination.name == name else destination / name


def write(
    model: StoredModel,
    folder: Path,
    dtype: str = "float32",
    scanned: bool = False,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Write `model` as a checkpoint of t5x's legacy format, array by array; see `folder_for`.

    Without stored moments the optimizer state is zeros, which t5x's strict restore needs.

    Args:
        folder: the checkpoint's own folder, new.
        dtype: of the parameters, "float32" or "bfloat16".
        scanned: for examples/scalable_t5.
        advance: called with the number of bytes that were written.

    Raises:
        UserError: t5x has no such model.
        OSError: the disk is full.
    """
    config = model.config
    layout = Layout(config, scanned, split_heads=config.relative_bias_per_layer)
    if model.updates not in (None, model.step):
        print(
            f"t5x counts Adafactor's updates by the step ({model.step}), and this state has done {model.updates}:"
            f" bind adafactor.Adafactor.step_offset = {model.step - model.updates} to go on with it",
            file=sys.stderr,
        )
    embedding = {} if model.updates is None else model.read_moments("token_embedder/embedding")
    momentum = "m" in embedding
    factoring = "v" not in embedding or not layout.is_factored(layout.rows["token_embedder/embedding"])
    writer = LegacyWriter(folder, advance)
    for row in layout.rows.values():
        factored = factoring and layout.is_factored(row)
        used = layout.slot_axes(row, factored, momentum)

        def moments(slot: str, layer: int | None, row: Parameter = row, factored: bool = factored) -> np.ndarray:
            if model.updates is None:
                return np.zeros(())
            return layout.moments_from_ours(row, model.read_moments(row.ours, layer), factored)[slot]

        for path, layers in layout.arrays(row):
            axis = layout.axes(row).find("L")
            parameter = (model.read(row.ours, layer) for layer in layers)
            writer.put(_TARGET.format(path), layout.shape(row), axis, dtype, parameter)
            for slot, shape in layout.slot_shapes(row, factored, momentum).items():
                name = f"{_STATE.format(path)}/{slot}"
                if slot in used:
                    parts = (moments(slot, layer) for layer in layers)
                    inline = slot in ("v_row", "v_col")  # as t5x does: those have no logical axes
                    writer.put(name, shape, used[slot].find("L"), "float32", parts, inline)
                else:
                    writer.put(name, shape, -1, "float32", [np.zeros(())], inline=True)
    writer.put("state/step", (), -1, "int32", [np.asarray(model.step)], inline=True)
    writer.finish()


def _parameter_type(arrays: dict[str, StoredArray]) -> str:
    """float32 where any parameter is: bfloat16 ones are then widened."""
    types = {array.dtype: array for name, array in arrays.items() if name.startswith("target/")}
    for dtype, array in types.items():
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"{array.checkpoint}: {array.name} is {dtype}; only float32 and bfloat16 are read")
    return "float32" if "float32" in types else "bfloat16"
