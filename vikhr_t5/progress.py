"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere; always rate and time left."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_PERIOD_SECONDS = 10.0


def human(number: float) -> str:
    """1234567 -> '1.23M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """3700 -> '1:01:40'; 65 -> '1:05'."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """`with Progress("caching", total=n, unit="tokens") as bar: bar.advance(k, note="loss 3.2")`.

    Args:
        description: what is being done.
        total: in `unit`s; None where it is not known.
        unit: the thing counted; shown with the rate.
        done: units already done by an earlier run (a resume); they do not count for the rate.
        shown: False counts in silence (all processes of a run but one).
    """

    def __init__(self, description: str, total: float | None, unit: str = "steps", done: float = 0, shown: bool = True):
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self._first, self._start = done, time.monotonic()
        self._last_line, self._note, self._shown = self._start, "", shown
        console = Console(file=sys.stderr)
        self._bar: RichProgress | None = None
        if shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = RichProgress(*columns, TextColumn("{task.fields[note]}"), console=console)
            self._task = self._bar.add_task(description, total=total, completed=int(done), note="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and self._shown:
            self._line()

    def advance(self, count: float = 1, note: str | None = None) -> None:
        """Count `count` more units; `note` replaces the text at the end of the line."""
        self.done += count
        if note is not None:
            self._note = note
        if self._bar:
            self._bar.update(self._task, completed=self.done, note=f"{self._rate()} {self._note}")
        elif self._shown and time.monotonic() - self._last_line >= PLAIN_PERIOD_SECONDS:
            self._line()

    def _rate(self) -> str:
        return f"{human((self.done - self._first) / max(time.monotonic() - self._start, 1e-9))} {self.unit}/s"

    def _line(self) -> None:
        self._last_line = time.monotonic()
        parts = [f"{self.description}: {human(self.done)}"]
        if self.total:
            parts[0] += f"/{human(self.total)} {self.unit}"
            rate = (self.done - self._first) / max(self._last_line - self._start, 1e-9)
            if 0 < self.done < self.total and rate > 0:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        else:
            parts[0] += f" {self.unit}"
        print(", ".join([*parts, self._rate(), *([self._note] if self._note else [])]), file=sys.stderr, flush=True)
