"""The charts of a report: curves of one or several runs, thinned to what a page can show.

A curve of any length becomes at most `POINTS` buckets with their mean, least and greatest value; the page draws them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vikhr_t5.run_folder import AXES, Run

POINTS = 300
FORCED = ("loss", "accuracy")  # of targets that are given
_MOST_CURVES = 50  # sources in a chart


class Small(NamedTuple):
    """A chart of all runs: the metrics in it, its title and what is said under it, unit, range of its axis."""

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
        return {**{name: _numbers(axis) for name, axis in zip(AXES, axes, strict=True)}, "y": _numbers(values)}
    starts = np.linspace(0, len(values), points + 1).astype(int)[:-1]
    counts = np.diff(starts, append=len(values))
    curve = {name: _numbers(np.add.reduceat(axis, starts) / counts) for name, axis in zip(AXES, axes, strict=True)}
    curve["y"] = _numbers(np.add.reduceat(values, starts) / counts)
    curve["low"], curve["high"] = (_numbers(f.reduceat(values, starts)) for f in (np.minimum, np.maximum))
    return curve


def _numbers(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def by_source(run: Run, metric: str, unit: str) -> dict[str, Any]:
    """The chart of a metric in one run: all sources together in ink, each of them, and evaluations dashed."""
    sources = charted(run)
    measured = [name.removeprefix(f"{metric}/") for table in run.evals.values() for name in table.names(f"{metric}/")]
    series: list[dict[str, Any]] = []
    for slot, source in [(-1, ""), *enumerate(dict.fromkeys([*sources, *(measured if metric not in FORCED else ())]))]:
        name = f"{metric}/{source}" if source else metric
        series += _curves(run, name, short(source, sources) or "all", slot)
    note = "per source; dashed: held out" if run.evals else "per source"
    note = note if metric in FORCED else "of answers to held-out examples, per task"
    return _chart(f"{_titled(metric)}, {run.name}", note if sources else "", unit, series)


def generated(runs: Sequence[Run]) -> list[str]:
    """The metrics of generated text that evaluations have, such as "chrf": besides loss and accuracy."""
    names = (name for run in runs for table in run.evals.values() for name in table.names("") if "/" in name)
    return [metric for metric in dict.fromkeys(name.partition("/")[0] for name in names) if metric not in FORCED]


def by_run(runs: Sequence[Run], metric: str, unit: str, source: str = "") -> dict[str, Any]:
    """The chart of a metric in several runs, of all their sources together or of one."""
    name = f"{metric}/{source}" if source else metric
    series = [curve for slot, run in enumerate(runs) for curve in _curves(run, name, run.name, slot)]
    note = "per run; dashed: held out" if any(run.evals for run in runs) else "per run"
    title = f"{_titled(metric)} of {source}" if source else _titled(metric)
    return _chart(title, note, unit, series, wide=not source)


def _titled(metric: str) -> str:
    return metric.capitalize() if metric in FORCED else metric


def _curves(run: Run, metric: str, name: str, slot: int) -> list[dict[str, Any]]:
    """The curve of the training lines, and those of evaluations."""
    tables = [(run.train_axes, run.train, False), *((run.axes_of(t), t, True) for t in run.evals.values())]
    curves = ((thin(axes, table[metric]), dots) for axes, table, dots in tables)
    return [{"name": name, "slot": slot, "dots": dots, **curve} for curve, dots in curves if curve]


def _chart(title: str, note: str, unit: str, series: list[dict[str, Any]], wide: bool = True) -> dict[str, Any]:
    floor = 0.0 if unit == "%" else None
    return {
        "title": title,
        "note": note,
        "unit": unit,
        "wide": wide,
        "floor": floor,
        "ceiling": None,
        "series": series,
    }


def of_all(lanes: Sequence[Sequence[Run]], chart: Small) -> dict[str, Any] | None:
    """A chart over all runs; None where none has the metric. A lane is the stages of one model, joined to one curve."""
    series: list[dict[str, Any]] = []
    for lane in lanes:
        for metric, name in chart.names.items():
            axes = np.concatenate([run.train_axes for run in lane], axis=1)
            if curve := thin(axes, np.concatenate([run.train[metric] for run in lane])):
                label = " ".join(filter(None, [lane[0].name if len(lanes) > 1 else "", name]))
                series.append({"name": label, "slot": len(series), "dots": False, **curve})
    if not series:
        return None
    spec = {name: getattr(chart, name) for name in ("title", "note", "unit", "floor", "ceiling")}
    return {**spec, "wide": False, "series": series}


def sources_of(run: Run) -> list[str]:
    """Sources of a run, in the order in which they were logged."""
    tables = [run.train, *run.evals.values()]
    return list(dict.fromkeys(name.removeprefix("loss/") for table in tables for name in table.names("loss/")))


def charted(run: Run) -> list[str]:
    """Sources that have a curve. Where there are many, those of the training lines: it is evaluations that tell the
    sets of a task apart, and the table has them."""
    trained = [name.removeprefix("loss/") for name in run.train.names("loss/")]
    return trained if trained and len(sources_of(run)) > _MOST_CURVES else sources_of(run)[:_MOST_CURVES]


def short(source: str, sources: Sequence[str]) -> str:
    """A source without the task that all share."""
    shared = {other.partition("/")[0] for other in sources}
    return source.partition("/")[2] or source if len(shared) == 1 else source
