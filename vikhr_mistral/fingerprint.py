"""Which base an adapter was trained on: a hash of every weight, kept beside the adapter.

An adapter is a difference; on another base it gives another model and no error. peft keeps the base's path only.
"""

import hashlib
import json
import math
import os
from pathlib import Path

from conversion.weights import open_weights
from vikhr_t5.errors import UserError
from vikhr_t5.files import write_text_atomic
from vikhr_t5.progress import Progress

FILE = "base_fingerprint.json"


def fingerprint(base_dir: str | os.PathLike[str]) -> str:
    """A hash of names, dtypes, shapes and bytes of all weights of a model folder; one tensor in memory at a time.

    Raises:
        UserError: the folder holds no weights, or a file of them is not whole.
    """
    tensors = open_weights(Path(base_dir))
    digest = hashlib.blake2b(digest_size=16)
    size = sum(tensor.dtype.itemsize * math.prod(tensor.shape) for tensor in tensors.values())
    with Progress(f"reading {base_dir}", size, "bytes") as progress:
        for name in sorted(tensors):
            tensor = tensors[name]
            value = tensor.read()
            digest.update(f"{name} {tensor.dtype.name} {tensor.shape}\n".encode())
            digest.update(value.view("uint8").data if value.ndim else value.tobytes())
            progress.advance(value.nbytes)
    return digest.hexdigest()


def write(adapter_dir: str | os.PathLike[str], base_dir: str | os.PathLike[str]) -> None:
    """Note beside an adapter which base it belongs to."""
    record = {"base": str(base_dir), "blake2b": fingerprint(base_dir)}
    write_text_atomic(Path(adapter_dir) / FILE, json.dumps(record, indent=2) + "\n")


def check(adapter_dir: str | os.PathLike[str], base_dir: str | os.PathLike[str]) -> bool:
    """Whether the adapter says what its base is; that of another tool says nothing.

    Raises:
        UserError: it says another base than this one.
    """
    path = Path(adapter_dir) / FILE
    if not path.is_file():
        return False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        trained_on, expected = record["base"], record["blake2b"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): copy the adapter again") from None
    if fingerprint(base_dir) != expected:
        raise UserError(
            f"{adapter_dir} was trained on other weights than those in {base_dir}: give the base of its training"
            f" ({trained_on} then)"
        )
    return True
