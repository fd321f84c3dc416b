"""Folders that commands write: never in place of somebody's own, and one line where the disk is too small."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from vikhr_t5.errors import UserError
from vikhr_t5.files import system_error
from vikhr_t5.progress import human


def check_output(output: Path, *marks: str, foreign: str | None = None) -> None:
    """Refuses a folder that holds something else than what a command wrote: it would be replaced.

    Args:
        marks: files of which the command writes one.
        foreign: what is wrong with a folder that has none.
    """
    if output.is_file():
        raise UserError(f"{output} is a file: give a new folder")
    if output.is_dir() and any(output.iterdir()) and not any((output / mark).is_file() for mark in marks):
        foreign = foreign or f"this command did not write it (no {', '.join(marks)})"
        raise UserError(f"{output} is not empty, and {foreign}: give a new folder")


@contextlib.contextmanager
def room(
    output: Path, needed: int, says: str = "{needed} are needed and {free} are free: make room; nothing was kept"
) -> Iterator[None]:
    """Refuses to write `needed` bytes where the disk has less, and says so in one line if it fills.

    Args:
        says: how much is missing, and what to do.
    """
    parent = next(place for place in output.absolute().parents if place.exists())

    def refusal(what: str) -> UserError:
        free = shutil.disk_usage(parent).free
        return UserError(f"{parent}: {what}: " + says.format(needed=f"{human(needed)}B", free=f"{human(free)}B"))

    if shutil.disk_usage(parent).free < needed:
        raise refusal("no room for the model")
    try:
        yield
    except (OSError, ValueError) as error:  # a ValueError is TensorStore's
        if system_error(error) in (errno.ENOSPC, errno.EDQUOT):
            raise refusal("the disk filled while the model was written") from error
        raise
