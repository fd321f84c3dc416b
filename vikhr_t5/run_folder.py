"""A run folder, read: settings, metrics as columns, samples; where each line stands in steps, tokens and hours.

The folder is what training leaves behind (config.gin or config.yaml, model_config.json, vocabulary/, metrics.jsonl,
samples.jsonl), of vikhr-t5 or of vikhr-mistral.
"""

import json
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vikhr_t5.errors import UserError
from vikhr_t5.files import records

AXES = ("step", "tokens", "hours")


class Table:
    """Lines of one kind as columns; a metric that a line lacks, or that is not finite, is NaN there."""

    def __init__(self) -> None:
        self.steps = array("d")
        self._columns: dict[str, array[float]] = {}

    def add(self, record: dict[str, Any]) -> None:
        rows = len(self.steps)
        self.steps.append(record["step"])
        for name, value in record.items():
            if name not in ("step", "time") and isinstance(value, (int, float)):
                column = self._columns.setdefault(name, array("d"))
                column.extend([math.nan] * (rows - len(column)))
                column.append(value if math.isfinite(value) else math.nan)

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._columns if name.startswith(prefix)]

    def __getitem__(self, name: str) -> np.ndarray:
        column = self._columns.get(name, array("d"))
        return np.concatenate([column, np.full(len(self.steps) - len(column), np.nan)])

    def ends(self, name: str) -> tuple[float, float]:
        """The first and the last value; NaN where there is none."""
        values = self[name]
        values = values[~np.isnan(values)]
        return (float(values[0]), float(values[-1])) if len(values) else (math.nan, math.nan)


@dataclass
class Run:
    """A run folder, read. Axes are cumulated over the stages before it: step, tokens, hours.

    start: of its last start, except "step", which is the first one's.
    device_seconds: on the clock, times the devices of each start: training, evaluations, checkpoints, start-up. Lost
        work is not counted: a resume drops the lines after the checkpoint that it goes on from.
    last_time: of the last line, in seconds since 1970.
    """

    name: str
    settings: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    finished: bool | None = None  # None: no end was written; it runs, or was killed
    device_seconds: float = 0.0
    last_time: float = 0.0
    train: Table = field(default_factory=Table)
    evals: dict[str, Table] = field(default_factory=dict)  # by task
    samples: list[dict[str, Any]] = field(default_factory=list)
    train_axes: np.ndarray = field(default_factory=lambda: np.zeros((3, 0)))  # [3, train lines]
    begin: np.ndarray = field(default_factory=lambda: np.zeros(3))
    end: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def place(self, before: np.ndarray) -> np.ndarray:
        """Fills the axes, given where the previous stage ended; returns where this one ends."""
        steps = np.asarray(self.train.steps)
        first = min(float(self.start.get("step", 0)), steps[0] if len(steps) else 0.0)
        lengths = np.diff(steps, prepend=first)
        seconds = np.nan_to_num(self.train["step_seconds"]) * lengths
        tokens = np.nan_to_num(self.train["tokens_per_second"]) * seconds
        # A stage that counts its steps from 0 goes on where the one before it ended.
        self.begin = np.array([max(first, before[0]), before[1], before[2]])
        shifted = steps - first + self.begin[0]
        self.train_axes = np.stack(
            [shifted, self.begin[1] + np.cumsum(tokens), self.begin[2] + np.cumsum(seconds) / 3600]
        )
        self.end = self.train_axes[:, -1] if len(steps) else self.begin
        return self.end

    @property
    def device_hours(self) -> float:
        """What the run took so far, of all its devices."""
        return self.device_seconds / 3600

    @property
    def devices(self) -> int:
        return int(self.start.get("devices", 1))

    def remaining(self) -> float | None:
        """Hours to its last step with the devices that it has, at the pace of a device so far; None where the run has
        ended, or its end is not known."""
        done = self.end[0] - self.begin[0]
        left = self.start.get("total_steps", 0) - (self.train.steps[-1] if len(self.train.steps) else math.inf)
        known = self.finished is None and left > 0 and done > 0
        return self.device_hours / self.devices / done * left if known else None

    def axes_of(self, table: Table) -> np.ndarray:
        """[3, lines] of an evaluation's lines."""
        steps = np.asarray(table.steps)
        if not len(self.train.steps):
            return np.stack([steps, np.zeros_like(steps), np.zeros_like(steps)])
        known = np.concatenate([self.begin[:, None], self.train_axes], axis=1)
        raw = np.concatenate([[self.train.steps[0] + self.begin[0] - self.train_axes[0, 0]], self.train.steps])
        return np.stack([np.interp(steps, raw, axis) for axis in known])


def read_run(folder: Path) -> Run:
    """A run folder; lines that were cut short are skipped. UserError where it holds no metrics."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: no metrics.jsonl; give a run folder (MODEL_DIR) that training has written to")
    run = Run(folder.resolve().name)
    for name in ("config.gin", "config.yaml"):  # of vikhr-t5, of vikhr-mistral
        if (folder / name).is_file():
            run.settings = (folder / name).read_text(encoding="utf-8")
    for name, file in (("model", "model_config.json"), ("vocabulary", "vocabulary/vocabulary.json")):
        if (folder / file).is_file():
            setattr(run, name, json.loads((folder / file).read_text(encoding="utf-8")))
    for record in records(folder / "metrics.jsonl"):
        kind, now = record.get("kind"), float(record.get("time", 0.0))
        if kind == "start":
            run.start = {**record, "step": run.start.get("step", record["step"])}
            run.finished = None
        # From one start to the next the clock runs up to the last line before it.
        passed = record.get("startup_seconds", 0.0) if kind == "start" else now - (run.last_time or now)
        run.device_seconds += max(0.0, passed) * run.devices
        run.last_time = now
        if kind == "train":
            run.train.add(record)
        elif kind == "eval":
            run.evals.setdefault(str(record.get("task", "evaluation")), Table()).add(record)
        elif kind == "end":
            run.finished = bool(record.get("finished", True))
    run.samples = [record for record in records(folder / "samples.jsonl") if "input" in record]
    return run
