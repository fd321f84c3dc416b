"""From any format to any other, array by array: whole or not at all."""

import os
from pathlib import Path

from conversion import huggingface, t5x, t5x_files, vikhr
from conversion.safetensors import parse_size
from conversion.stored import DTYPES, StoredModel
from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import atomic_path
from vikhr_t5.model.config import T5Config
from vikhr_t5.outputs import check_output, room
from vikhr_t5.progress import Progress
from vikhr_t5.train.checkpoint_files import find_checkpoint

FORMATS = ("hf", "t5x", "vikhr")
# What a folder of each format holds: one with none of these, and not empty, is not replaced.
_MARKS = ("config.json", "manifest.json", "checkpoint")
_NO_ROOM = (
    "its parameters alone take {needed} and {free} are free; nothing was written: make room, or convert with --dtype"
    " bfloat16"
)


def open_model(
    path: str | os.PathLike[str],
    source_format: str,
    vocabulary: AnyVocabulary | None = None,
    config: T5Config | None = None,
) -> StoredModel:
    """A stored model, opened but not read.

    Args:
        path: vikhr: a run folder or a checkpoint's; t5x: the same of t5x's; hf: a model's folder.
        source_format: one of FORMATS.
        vocabulary: t5x's checkpoints carry none; hf: in place of its own.
        config: of a t5x checkpoint, for what shapes cannot tell.

    Raises:
        UserError: it cannot be read, or is not what it should be.
    """
    if source_format == "vikhr":
        return vikhr.Checkpoint(path)
    if source_format == "hf":
        return huggingface.HuggingFaceModel(path, vocabulary)
    return t5x.open(path, config, vocabulary)


def write_model(
    model: StoredModel,
    destination: str | os.PathLike[str],
    destination_format: str,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    scanned: bool = False,
    license: str | None = None,
) -> None:
    """Writes `destination` in another format. It appears whole or not at all; an earlier model there is replaced.

    Args:
        destination: a folder; t5x: of a model_dir, in which checkpoint_<step> is made, or one of that name.
        dtype: of the stored parameters, "float32" or "bfloat16"; None: as in the source.
        max_shard_size: hf: bytes, or a size such as "5GB".
        scanned: t5x: the layout of examples/scalable_t5 in place of examples/t5's.
        license: hf: the hub's name of one, for the model card.

    Raises:
        UserError: the format cannot express the model; `destination` holds something else; the disk is too small.
    """
    limit, kind = parse_size(max_shard_size), dtype or model.dtype
    if kind not in DTYPES:
        raise UserError(f"dtype {kind!r} cannot be written; {nearest(kind, DTYPES)}")
    folder = Path(destination).expanduser().absolute()
    if destination_format == "t5x":
        folder = t5x.folder_for(folder, model.step)
    check_output(folder, *_MARKS, foreign="it holds no converted model")
    total = model.config.param_count() * DTYPES[kind].itemsize
    more = destination_format == "t5x" or (destination_format == "vikhr" and model.updates is not None)
    shown = Progress(f"writing {destination}", None if more else total, unit="bytes")  # optimizer state comes on top
    with room(folder, total, _NO_ROOM), atomic_path(folder) as temporary, shown as progress:
        if destination_format == "hf":
            huggingface.write(model, temporary, kind, limit, folder.name, progress.advance, license)
        elif destination_format == "vikhr":
            vikhr.write(model, temporary, kind, progress.advance)
        else:
            t5x.write(model, temporary, kind, scanned, progress.advance)


def verify(
    model: StoredModel,
    source: str | os.PathLike[str],
    source_format: str,
    destination: str | os.PathLike[str],
    destination_format: str,
    with_transformers: bool = True,
) -> bool:
    """Is what `write_model` wrote the same model? Prints a table or a line; deletes nothing.

    Args:
        with_transformers: compute with it where one side is Hugging Face's. Elsewhere every array is compared.
    """
    from conversion import verify as comparison  # JAX's compiler and, in there, torch

    written = open_model(destination, destination_format, model.vocabulary, model.config)
    if not with_transformers or (source_format == "hf") == (destination_format == "hf"):
        same = comparison.same_arrays(model, written)
        print(f"{destination}: every array is {'equal to' if same else 'compared, and some DIFFER from'} {source}'s")
        return same
    if destination_format == "hf":
        return comparison.verify(model, destination, pairs=comparison.held_out(source))
    return comparison.verify(written, source)


def initial_checkpoint(
    path: str | os.PathLike[str], model_dir: str | os.PathLike[str], config: T5Config, vocabulary: AnyVocabulary
) -> str:
    """What a run can start from: `path` where it is ours, else <model_dir>/initial_checkpoint, converted from it.

    Raises UserError as `open_model` and `write_model`.
    """
    source_format, _ = find(path)
    if source_format == "vikhr":
        return os.fspath(path)
    destination = Path(model_dir).expanduser().absolute() / "initial_checkpoint"
    write_model(open_model(path, source_format, vocabulary, config), destination, "vikhr")
    return os.fspath(destination)


def find(path: str | os.PathLike[str]) -> tuple[str, Path]:
    """(format, folder) of a model: of a run or a model_dir, the folder of its newest whole checkpoint.

    Raises:
        UserError: it is none of FORMATS.
    """
    folder = Path(path).expanduser().absolute()
    if t5x.is_checkpoint(folder):
        return "t5x", t5x_files.find(folder)
    if (folder / "config.json").is_file():
        return "hf", folder
    return "vikhr", find_checkpoint(folder)
