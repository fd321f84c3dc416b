"""A file of JSON lines that is written in parts and appears when it is whole; a run that was killed goes on.

OUTPUT              when all is done
OUTPUT.partial/     while it runs: `lines`, and `state`: settings, how much is done, the size of its lines
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vikhr_t5.errors import UserError
from vikhr_t5.files import sync_directory, write_text_atomic


def json_line(value: Any) -> str:
    """As it is written; what JSON has no form for (a date of a Parquet file) as text."""
    return json.dumps(value, ensure_ascii=False, default=str)


class ResumableOutput:
    """`with ResumableOutput(path, settings) as file:`, then for each part, in order, `file.write` unless `file.has`.

    Args:
        output: must not be there yet.
        settings: as JSON; what was begun with others is not continued.

    Attributes:
        done: units (rows, say) of the parts that an earlier run wrote.

    Raises:
        UserError: `output` is there; another process writes it; it was begun with other settings or another source.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]):
        self.output = output
        self._settings = json.loads(json.dumps(settings))
        self._partial = Path(f"{output}.partial")
        self._state = self._partial / "state"
        self._sources = hashlib.sha256()
        self._end = self.done = 0

    def __enter__(self) -> "ResumableOutput":
        if self.output.exists():
            raise UserError(f"{self.output} is there already: remove it, or choose another --output")
        self._partial.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(open(self._partial / "lock", "wb"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self._partial}: another process writes it") from error
            before = self._record("", 0)
            if self._state.exists():
                before = json.loads(self._state.read_text(encoding="utf-8"))
            self._check(before["settings"])
            self.done, self._digest = before["done"], before["digest"]
            self._lines = stack.enter_context(open(self._partial / "lines", "ab"))
            if self._lines.tell() < before["size"]:
                raise UserError(f"{self._partial} is shorter than when it was written: remove it")
            self._lines.truncate(before["size"])
            self._stack = stack.pop_all()
        return self

    def _check(self, before: Mapping[str, Any]) -> None:
        for name in (name for name in self._settings if before.get(name) != self._settings[name]):
            raise UserError(
                f"{self._partial} was begun with {name} {before.get(name)!r}, not {self._settings[name]!r}: remove it,"
                " or choose another --output"
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._end < self.done:
                    raise self._changed()
                os.replace(self._partial / "lines", self.output)
                sync_directory(self.output.absolute().parent)
        finally:
            self._stack.close()
            if self.output.exists() or not self._state.exists():
                shutil.rmtree(self._partial)

    def has(self, end: int, source: bytes) -> bool:
        """Whether an earlier run wrote the part that ends at `end` and is made of `source`."""
        self._sources.update(source)
        self._end = end
        if end == self.done and self._sources.hexdigest() != self._digest:
            raise self._changed()
        return end <= self.done

    def write(self, lines: Iterable[Any]) -> None:
        """The lines of the part that `has` was asked for; they are on the disk before the state that counts them."""
        for line in lines:
            self._lines.write(f"{json_line(line)}\n".encode())
        self._lines.flush()
        os.fsync(self._lines.fileno())
        state = self._record(self._sources.hexdigest(), self._lines.tell())
        write_text_atomic(self._state, json.dumps(state, ensure_ascii=False))

    def _record(self, digest: str, size: int) -> dict[str, Any]:
        return {"settings": self._settings, "done": self._end, "digest": digest, "size": size}

    def _changed(self) -> UserError:
        return UserError(f"{self._partial} was begun with other input: remove it, or choose another --output")
