"""Run folders -> one HTML page: curves, speed, samples and configuration, with no other file and no network.

Everything is read from what a run leaves behind (config.gin or config.yaml, model_config.json, vocabulary/,
metrics.jsonl, samples.jsonl). Several folders are the stages of one model and share the axes. The page draws its charts
itself, from numbers that are thinned here: a curve of any length becomes at most `POINTS` buckets with their mean,
least and greatest value.
"""

import difflib
import json
import math
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vikhr_t5 import __version__
from vikhr_t5.errors import UserError
from vikhr_t5.page import escape, write_page
from vikhr_t5.progress import duration, human

POINTS = 300
_SAMPLES, _PREDICTIONS = 12, 6  # shown at once
_DIRECT = 10  # sources with a colour of their own
_MOST_CURVES = 50  # sources in a chart
_SENTINEL = re.compile(r"&lt;extra_id_(\d+)&gt;")
_MODE = re.compile(r"^(\[[A-Z0-9]+\]|&lt;[A-Z]+\d*&gt;)")


class Small(NamedTuple):
    """A chart of all stages: the metrics in it, its title and what is said under it, unit, range of its axis."""

    names: dict[str, str]
    title: str
    note: str
    unit: str = ""
    floor: float | None = 0.0
    ceiling: float | None = None


SMALL = (
    Small({"tokens_per_second": ""}, "Throughput", "useful tokens per second", "tokens/s"),
    Small({"mfu": ""}, "MFU", "model FLOPs against the peak", "%"),
    Small(
        {"useful_inputs": "inputs", "useful_targets": "targets"}, "Useful tokens", "share of positions", "%", 0.0, 1.0
    ),
    Small({"step_seconds": ""}, "Step time", "seconds", "s"),
    Small({"memory_gib": ""}, "Memory", "peak, GiB", "GiB"),
    Small({"grad_norm": ""}, "Gradient norm", "before clipping"),
    Small({"learning_rate": ""}, "Learning rate", "of the schedule"),
    Small({"param_norm": ""}, "Parameter norm", "all parameters"),
)


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
    """A run folder, read. Axes are cumulated over the stages before it: step, tokens, hours."""

    name: str
    settings: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    finished: bool | None = None  # None: no end was written; it runs, or was killed
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

    def axes_of(self, table: Table) -> np.ndarray:
        """[3, lines] of an evaluation's lines."""
        steps = np.asarray(table.steps)
        if not len(self.train.steps):
            return np.stack([steps, np.zeros_like(steps), np.zeros_like(steps)])
        known = np.concatenate([self.begin[:, None], self.train_axes], axis=1)
        raw = np.concatenate([[self.train.steps[0] + self.begin[0] - self.train_axes[0, 0]], self.train.steps])
        return np.stack([np.interp(steps, raw, axis) for axis in known])


def report(run_dirs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> None:
    """Writes the page.

    Args:
        run_dirs: run folders, in the order of their stages.
        output: the HTML file; replaced whole.

    Raises:
        UserError: a folder is missing or holds no metrics.
    """
    runs = [read_run(Path(folder)) for folder in run_dirs]
    if not runs:
        raise UserError("no run folder to report on: give at least one")
    at = np.zeros(3)
    for run in runs:
        at = run.place(at)
    charts: list[dict[str, Any]] = []
    summary, body = "\n".join(_head(runs)), "\n".join(_body(runs, charts))
    stages = [{"name": run.name, **dict(zip(_AXES, map(float, run.begin), strict=True))} for run in runs]
    # "<" is escaped, so that no text can end the script element.
    data = json.dumps({"stages": stages, "charts": charts}, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    title = escape(" → ".join(run.name for run in runs))
    template = Path(__file__).with_name("report_template.html")
    write_page(output, template, title=title, summary=summary, body=body, charts=data)


# ---- reading ---------------------------------------------------------------------------------------------------------

_AXES = ("step", "tokens", "hours")


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
    for record in _lines(folder / "metrics.jsonl"):
        kind = record.get("kind")
        if kind == "train":
            run.train.add(record)
        elif kind == "eval":
            run.evals.setdefault(str(record.get("task", "evaluation")), Table()).add(record)
        elif kind == "start":
            run.start = run.start or record
            run.finished = None
        elif kind == "end":
            run.finished = bool(record.get("finished", True))
    run.samples = [record for record in _lines(folder / "samples.jsonl") if "input" in record]
    return run


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


# ---- curves ----------------------------------------------------------------------------------------------------------


def thin(axes: np.ndarray, values: np.ndarray, points: int = POINTS) -> dict[str, Any] | None:
    """A curve for the page: {"step", "tokens", "hours", "y"}, and "low", "high" where points were put together.

    Args:
        axes: [3, N], increasing.
        values: [N]; NaN is left out.
        points: buckets of equally many values.

    Returns:
        None where there is no value.
    """
    kept = ~np.isnan(values)
    axes, values = axes[:, kept], values[kept]
    if not len(values):
        return None
    if len(values) <= 2 * points:
        return {**{name: _numbers(axis) for name, axis in zip(_AXES, axes, strict=True)}, "y": _numbers(values)}
    starts = np.linspace(0, len(values), points + 1).astype(int)[:-1]
    counts = np.diff(starts, append=len(values))
    curve = {name: _numbers(np.add.reduceat(axis, starts) / counts) for name, axis in zip(_AXES, axes, strict=True)}
    curve["y"] = _numbers(np.add.reduceat(values, starts) / counts)
    curve["low"], curve["high"] = (_numbers(f.reduceat(values, starts)) for f in (np.minimum, np.maximum))
    return curve


def _numbers(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _by_source(run: Run, metric: str, sources: Sequence[str], unit: str) -> dict[str, Any]:
    """The chart of a metric in one stage: all sources together in ink, each of them, and evaluations dashed."""
    series = []
    for slot, source in [(-1, ""), *enumerate(sources)]:
        name = f"{metric}/{source}" if source else metric
        curves = [
            (run.train_axes, run.train, False),
            *((run.axes_of(table), table, True) for table in run.evals.values()),
        ]
        for axes, table, dots in curves:
            if curve := thin(axes, table[name]):
                series.append({"name": _short(source, sources) or "all", "slot": slot, "dots": dots, **curve})
    note = "per source; dashed: held out" if run.evals else "per source"
    return {
        "title": f"{metric.capitalize()}, {run.name}",
        "note": note if sources else "",
        "unit": unit,
        "wide": True,
        "floor": 0.0 if unit == "%" else None,
        "ceiling": None,
        "series": series,
    }


def _of_all(runs: Sequence[Run], chart: Small) -> dict[str, Any] | None:
    """A chart over all stages; None where no stage has the metric."""
    series = []
    for slot, (metric, name) in enumerate(chart.names.items()):
        axes = np.concatenate([run.train_axes for run in runs], axis=1)
        if curve := thin(axes, np.concatenate([run.train[metric] for run in runs])):
            series.append({"name": name, "slot": slot, "dots": False, **curve})
    if not series:
        return None
    spec = {name: getattr(chart, name) for name in ("title", "note", "unit", "floor", "ceiling")}
    return {**spec, "wide": False, "series": series}


def _sources(run: Run) -> list[str]:
    """Sources of a stage, in the order in which they were logged."""
    tables = [run.train, *run.evals.values()]
    return list(dict.fromkeys(name.removeprefix("loss/") for table in tables for name in table.names("loss/")))


def _charted(run: Run) -> list[str]:
    """Sources that have a curve. Where there are many, those of the training lines: it is evaluations that tell the
    sets of a task apart, and the table has them."""
    trained = [name.removeprefix("loss/") for name in run.train.names("loss/")]
    return trained if trained and len(_sources(run)) > _MOST_CURVES else _sources(run)[:_MOST_CURVES]


def _short(source: str, sources: Sequence[str]) -> str:
    """A source without the task that all share."""
    shared = {other.partition("/")[0] for other in sources}
    return source.partition("/")[2] or source if len(shared) == 1 else source


# ---- the page --------------------------------------------------------------------------------------------------------


def _head(runs: Sequence[Run]) -> Iterator[str]:
    """Title, key figures of each stage, final loss of each source."""
    last = runs[-1]
    parameters = last.start.get("parameters")
    about = [f"{human(parameters)} parameters"] if parameters else []
    about += [f"{last.start['devices']} × {last.start['device_kind']}"] if "device_kind" in last.start else []
    about += [f"vikhr-t5 {__version__}"]
    yield f"<h1>{escape(' → '.join(run.name for run in runs))}</h1>"
    yield f'<p class="soft">{escape(" · ".join(about))}</p>'
    for run in runs:
        yield f'<section class="stage">{"".join(_key_figures(run, len(runs) > 1))}</section>'


def _body(runs: Sequence[Run], charts: list[dict[str, Any]]) -> Iterator[str]:
    """Everything below the controls; puts what its figures show into `charts`."""

    def figure(spec: dict[str, Any]) -> str:
        charts.append(spec)
        return f'<figure data-chart="{len(charts) - 1}" class="{"wide" if spec["wide"] else ""}"></figure>'

    for run in runs:
        sources = _charted(run)
        yield f"<h2>{escape(run.name)}</h2>" if len(runs) > 1 else "<h2>Learning</h2>"
        yield f'<div class="charts">{figure(_by_source(run, "loss", sources, "loss"))}</div>'
        if "accuracy" in run.train.names("accuracy"):
            yield f'<div class="charts">{figure(_by_source(run, "accuracy", sources, "%"))}</div>'
    small = [spec for chart in SMALL if (spec := _of_all(runs, chart))]
    yield f'<h2>Machine and optimizer</h2><div class="charts">{"".join(map(figure, small))}</div>'
    for run in runs:
        yield from _samples(run)
    yield from _configuration(runs)
    yield f"<footer>Written by vikhr-t5 {__version__} from {len(runs)} run folder{'s'[: len(runs) > 1]}.</footer>"


def _key_figures(run: Run, titled: bool) -> Iterator[str]:
    """Key figures of a stage and the table of its sources."""
    steps, tokens, hours = run.end - run.begin
    speed = run.train["tokens_per_second"]
    state = {True: "", False: "stopped before its end", None: "no end was written: running, or interrupted"}
    keys = [(f"{steps:,.0f}", "steps"), (human(tokens), "useful tokens"), (duration(hours * 3600), "training time")]
    if not np.isnan(speed).all():
        keys.append((human(float(np.nanmedian(speed))), "tokens per second"))
    keys.append((_figure(run.train.ends("loss")[1]), "training loss"))
    for task, table in run.evals.items():
        held_out = "held-out loss" + (f", {task}" if len(run.evals) > 1 else "")
        keys.append((_figure(table.ends("loss")[1]), held_out))
    if titled or state[run.finished]:
        yield f"<h3>{escape(run.name)} <span class='soft'>{state[run.finished]}</span></h3>"
    cells = "".join(f'<div class="key"><b>{value}</b><span>{escape(name)}</span></div>' for value, name in keys)
    yield f'<div class="keys">{cells}</div>'
    sources = _sources(run)
    rows = []
    for slot, source in enumerate(sources):
        first, final = run.train.ends(f"loss/{source}")
        loss, accuracy = (_last_held_out(run, f"{metric}/{source}") for metric in ("loss", "accuracy"))
        color = f"var(--c{slot})" if slot < _DIRECT else "var(--line)"
        rows.append(
            f'<tr><td><i style="background:{color}"></i>{escape(_short(source, sources))}</td>'
            f'<td class="wide">{_figure(first)}</td><td>{_figure(final)}</td><td>{_figure(loss)}</td>'
            f"<td>{'–' if math.isnan(accuracy) else f'{accuracy:.1%}'}</td></tr>"
        )
    head = '<tr><th>loss of</th><th class="wide">at first</th><th>at last</th><th>held out</th><th>accuracy</th></tr>'
    table_html = f'<table class="sources">{head}{"".join(rows)}</table>'
    if len(rows) > 2 * _DIRECT:
        yield f"<details><summary>{len(rows)} sources</summary>{table_html}</details>"
    elif rows:
        yield table_html


def _last_held_out(run: Run, name: str) -> float:
    """The last value of the evaluation that has this metric; NaN where none has."""
    return next((end for table in run.evals.values() if not math.isnan(end := table.ends(name)[1])), math.nan)


def _samples(run: Run) -> Iterator[str]:
    """Each example once: input, target, and what was predicted as training went on."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for sample in run.samples:
        key = (str(sample.get("task", "")), sample["input"], str(sample.get("target", "")))
        grouped.setdefault(key, []).append(sample)
    if not grouped:
        return
    yield f"<h2>Samples, {escape(run.name)}</h2><p class='soft'>Greedy predictions on held-out examples.</p>"
    for (task, given, target), found in list(grouped.items())[:_SAMPLES]:
        found.sort(key=lambda sample: sample["step"])
        shown = np.unique(np.linspace(0, len(found) - 1, min(_PREDICTIONS, len(found))).astype(int))
        lines = "".join(
            f"<dt>step {found[i]['step']:,}{_TICK if found[i].get('prediction') == target else ''}</dt>"
            f'<dd class="long">{_text(str(found[i].get("prediction", "")))}</dd>'
            for i in shown
        )
        yield (
            f'<article class="sample"><h3 class="soft">{escape(task)}</h3><dl>'
            f'<dt>input</dt><dd class="long">{_text(given)}</dd>'
            f'<dt>target</dt><dd class="long target">{_text(target)}</dd>{lines}</dl></article>'
        )
    if len(grouped) > _SAMPLES:
        yield f'<p class="soft">{len(grouped) - _SAMPLES} more examples are in samples.jsonl.</p>'


_TICK = ' <span class="tick" title="as the target">✓</span>'


def _text(text: str) -> str:
    """Escaped, sentinels and a leading mode token as coloured chips."""
    chips = _SENTINEL.sub(
        lambda m: f'<span class="sentinel" style="background:var(--c{int(m[1]) % 10})" title="{m[0]}">{m[1]}</span>',
        escape(text),
    )
    return _MODE.sub(r'<span class="mode">\1</span>', chips) or '<span class="soft">(empty)</span>'


def _configuration(runs: Sequence[Run]) -> Iterator[str]:
    yield "<h2>Configuration</h2>"
    facts = {**runs[-1].model, **{f"vocabulary {name}": value for name, value in runs[-1].vocabulary.items()}}
    if runs[-1].start.get("peak"):
        facts["peak for MFU"] = runs[-1].start["peak"]
    if facts:
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(_value(v))}</td></tr>" for name, v in facts.items())
        yield f"<details><summary>model and vocabulary</summary><table>{rows}</table></details>"
    for before, run in zip([None, *runs[:-1]], runs, strict=True):
        if run.settings:
            yield f"<details><summary>settings, {escape(run.name)}</summary><pre>{escape(run.settings)}</pre></details>"
        if before and before.settings and run.settings:
            changed = f"what {escape(run.name)} changes from {escape(before.name)}"
            difference = _difference(before.settings, run.settings)
            yield f"<details open><summary>{changed}</summary><pre>{difference}</pre></details>"


def _difference(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    tags = {"+": "ins", "-": "del"}
    kept = [line for line in list(lines)[2:] if line[0] in tags and line[1:].strip() and not line[1:].startswith("#")]
    return "\n".join(f"<{tags[line[0]]}>{escape(line)}</{tags[line[0]]}>" for line in kept) or "nothing"


def _value(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
