"""Files that are whole or absent: written beside their place, synced, then renamed."""

import contextlib
import glob
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vikhr_t5.errors import UserError


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


def _writer(process: int | str) -> str:
    return f"{socket.gethostname()}-{process}"


def _remove_abandoned(final: Path) -> None:
    """What processes that are no more were writing beside `final`."""
    pattern = glob.escape(f".{final.name}.") + glob.escape(_writer("")) + "*"
    for path in final.parent.glob(pattern):
        process = re.fullmatch(re.escape(f".{final.name}.{_writer('')}") + r"(\d+)\.[0-9a-f]{8}\.(tmp|old)", path.name)
        if process and not _runs(int(process[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def check_file(destination: str | os.PathLike[str]) -> None:
    """Before long work whose result is one file. UserError where a folder has that name."""
    if Path(destination).is_dir():
        raise _other_kind(Path(destination))


def _other_kind(final: Path) -> UserError:
    kind, wanted = ("folder", "file") if final.is_dir() else ("file", "folder")
    return UserError(f"{final} is a {kind}, and a {wanted} is to be written: give another name")


@contextlib.contextmanager
def atomic_path(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `destination`; on success what was written there takes its name.

    Works for a file or a folder (the caller creates either at the yielded path). An existing file is replaced
    atomically; an existing folder is moved aside first and removed after. On an exception nothing is left; what a
    process of this machine left when it was killed, the next one removes.

    Raises:
        UserError: a folder is there, and a file was written; or the other way round.
    """
    final = Path(destination)
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    temporary = final.parent / f".{final.name}.{_writer(os.getpid())}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        _sync_tree(temporary)
        if final.exists() and final.is_dir() != temporary.is_dir():
            raise _other_kind(final)
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


def system_error(error: Exception) -> int | None:
    """The system's number of an error, also of one that TensorStore wraps in a ValueError; None where it has none."""
    if number := getattr(error, "errno", None):
        return int(number)
    wrapped = re.search(r"os_error_code='(\d+)'", str(error))
    return int(wrapped[1]) if wrapped else None


def write_text_atomic(destination: str | os.PathLike[str], text: str) -> None:
    """`Path.write_text`, but whole or absent. UTF-8."""
    with atomic_path(destination) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Indented UTF-8, as Hugging Face's libraries write their files; into a folder that `atomic_path` makes."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def records(path: Path) -> Iterator[dict[str, Any]]:
    """What a run wrote down, step by step, in a file of JSON lines; none where there is no file.

    A line that was cut short, by a kill or a full disk, is left out.
    """
    for _, record in _lines_and_records(path):
        yield record


def keep_lines_up_to(path: Path, step: int) -> None:
    """Rewrite a file of `records` without those of later steps, and without a last line that was cut short."""
    if path.exists():
        write_text_atomic(path, "".join(line for line, record in _lines_and_records(path) if record["step"] <= step))


def _lines_and_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    yield line.removesuffix("\n") + "\n", record
