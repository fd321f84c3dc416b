"""Files that are whole or absent: written beside their place, synced, then renamed."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power cut (POSIX keeps names in the directory, not in the file)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


@contextlib.contextmanager
def atomic_path(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `destination`; on success what was written there takes its name.

    Works for a file or a folder (the caller creates either at the yielded path). An existing file is replaced
    atomically; an existing folder is moved aside first and removed after. On an exception nothing is left.
    """
    final = Path(destination)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        _sync_tree(temporary)
        if final.is_dir():
            aside = temporary.with_suffix(".old")
            final.rename(aside)
            temporary.rename(final)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, final)
        sync_directory(final.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text_atomic(destination: str | os.PathLike[str], text: str) -> None:
    """`Path.write_text`, but whole or absent. UTF-8."""
    with atomic_path(destination) as temporary:
        temporary.write_text(text, encoding="utf-8")
