"""Folders that commands write: never in place of somebody's own."""

from pathlib import Path

from vikhr_t5.errors import UserError


def check_output(output: Path, mark: str) -> None:
    """Refuses a folder that holds something else than what a command wrote: it would be replaced.

    Args:
        mark: a file that the command writes.
    """
    if output.is_file():
        raise UserError(f"{output} is a file: give a new folder")
    if output.is_dir() and any(output.iterdir()) and not (output / mark).is_file():
        raise UserError(f"{output} is not empty, and this command did not write it (no {mark}): give a new folder")
