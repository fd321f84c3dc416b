"""Folders that commands write: never in place of somebody's own, and one line where the disk is too small."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from vikhr_t5.errors import UserError
from vikhr_t5.files import system_error
from vikhr_t5.progress import human


def check_output(output: Path, mark: str) -> None:
    """Refuses a folder that holds something else than what a command wrote: it would be replaced.

    Args:
        mark: a file that the command writes.
    """
    if output.is_file():
        raise UserError(f"{output} is a file: give a new folder")
    if output.is_dir() and any(output.iterdir()) and not (output / mark).is_file():
        raise UserError(f"{output} is not empty, and this command did not write it (no {mark}): give a new folder")


@contextlib.contextmanager
def room(output: Path, needed: int) -> Iterator[None]:
    """Refuses to write `needed` bytes where the disk has less, and says so in one line if it fills."""
    parent = next(place for place in output.absolute().parents if place.exists())

    def refusal(what: str) -> UserError:
        free = human(shutil.disk_usage(parent).free)
        return UserError(
            f"{parent}: {what}: {human(needed)}B are needed and {free}B are free: make room; nothing was kept"
        )

    if shutil.disk_usage(parent).free < needed:
        raise refusal("no room for the model")
    try:
        yield
    except OSError as error:
        if system_error(error) in (errno.ENOSPC, errno.EDQUOT):
            raise refusal("the disk filled while the model was written") from error
        raise
