"""Run folders -> one HTML page: curves, speed, cost, samples and configuration, with no other file and no network.

Several folders are the stages of one model, whose curves go on from one to the next, or runs that are compared.
"""

import datetime
import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vikhr_t5 import __version__, report_charts
from vikhr_t5.errors import UserError
from vikhr_t5.page import escape, write_page
from vikhr_t5.progress import duration, human
from vikhr_t5.report_charts import short, sources_of
from vikhr_t5.run_folder import AXES, Run, read_run

_SAMPLES, _PREDICTIONS = 12, 6  # shown at once
_DIRECT = 10  # sources with a colour of their own
_SENTINEL = re.compile(r"&lt;extra_id_(\d+)&gt;")
_MODE = re.compile(r"^(\[[A-Z0-9]+\]|&lt;[A-Z]+\d*&gt;)")


def report(
    run_dirs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    compare: bool = False,
    price_per_hour: float | None = None,
) -> None:
    """Writes the page.

    Args:
        run_dirs: run folders, in the order of their stages; or runs to compare.
        output: the HTML file; replaced whole.
        compare: the folders are runs beside one another, each from its own beginning.
        price_per_hour: of one device, in dollars: the page then says what was spent, and what will have been.

    Raises:
        UserError: a folder is missing or holds no metrics, or there is nothing to compare.
    """
    runs = [read_run(Path(folder)) for folder in run_dirs]
    if not runs:
        raise UserError("no run folder to report on: give at least one")
    if compare and len(runs) < 2:
        raise UserError(f"{run_dirs[0]} alone: --compare needs two run folders or more")
    at = np.zeros(3)
    for run in runs:
        at = run.place(np.zeros(3) if compare else at)
    charts: list[dict[str, Any]] = []
    parts = _head(runs, compare, price_per_hour), _body(runs, compare, charts)
    summary, body = ("\n".join(part) for part in parts)
    stages = [{"name": run.name, **dict(zip(AXES, map(float, run.begin), strict=True))} for run in runs]
    # "<" is escaped, so that no text can end the script element.
    data = {"stages": [] if compare else stages, "charts": charts}
    numbers = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    template = Path(__file__).with_name("report_template.html")
    write_page(output, template, title=escape(_title(runs, compare)), summary=summary, body=body, charts=numbers)


def _title(runs: Sequence[Run], compare: bool) -> str:
    return (", " if compare else " → ").join(run.name for run in runs)


def _head(runs: Sequence[Run], compare: bool, price: float | None) -> Iterator[str]:
    """Title, key figures of each run, final loss of each source."""
    last = runs[-1]
    parameters = last.start.get("parameters")
    about = [f"{human(parameters)} parameters"] if parameters else []
    about += [f"{last.start['devices']} × {last.start['device_kind']}"] if "device_kind" in last.start else []
    about = [f"{len(runs)} runs"] if compare else about
    yield f"<h1>{escape(_title(runs, compare))}</h1>"
    yield f'<p class="soft">{escape(" · ".join([*about, f"vikhr-t5 {__version__}"]))}</p>'
    if compare:
        yield f'<section class="stage">{_side_by_side(runs, price)}</section>'
        return
    for run in runs:
        yield f'<section class="stage">{"".join(_key_figures(run, len(runs) > 1, price))}</section>'


def _body(runs: Sequence[Run], compare: bool, charts: list[dict[str, Any]]) -> Iterator[str]:
    """Everything below the controls; puts what its figures show into `charts`."""

    def figures(*specs: dict[str, Any] | None) -> str:
        shown = [spec for spec in specs if spec]
        charts.extend(shown)
        first = len(charts) - len(shown)
        html = (
            f'<figure data-chart="{first + i}" class="{"wide" if spec["wide"] else ""}"></figure>'
            for i, spec in enumerate(shown)
        )
        return f'<div class="charts">{"".join(html)}</div>'

    metrics = {"loss": "loss", "accuracy": "%"}
    if compare:
        yield "<h2>Learning</h2>"
        for metric, unit in metrics.items():
            if any(run.train.names(metric) for run in runs):
                yield figures(report_charts.by_run(runs, metric, unit))
        for metric in report_charts.generated(runs):
            yield figures(report_charts.by_run(runs, metric, ""))
        shared = [s for s in report_charts.charted(runs[0]) if all(s in sources_of(run) for run in runs)]
        if shared:
            yield figures(*(report_charts.by_run(runs, "loss", "loss", source) for source in shared))
    for run in runs if not compare else ():
        yield f"<h2>{escape(run.name)}</h2>" if len(runs) > 1 else "<h2>Learning</h2>"
        for metric, unit in metrics.items():
            if metric == "loss" or metric in run.train.names(metric):
                yield figures(report_charts.by_source(run, metric, unit))
        for metric in report_charts.generated([run]):
            yield figures(report_charts.by_source(run, metric, ""))
    lanes = [[run] for run in runs] if compare else [runs]
    yield f"<h2>Machine and optimizer</h2>{figures(*(report_charts.of_all(lanes, c) for c in report_charts.SMALL))}"
    for run in runs:
        yield from _samples(run)
    yield from _configuration(runs, compare)
    yield f"<footer>Written by vikhr-t5 {__version__} from {len(runs)} run folder{'s'[: len(runs) > 1]}.</footer>"


_STATE = {True: "", False: "stopped before its end", None: "no end was written: running, or interrupted"}


def _figures_of(run: Run, price: float | None) -> list[tuple[str, str]]:
    """What one wants to know of a run first: (figure, what it is)."""
    steps, tokens, hours = run.end - run.begin
    speed, mfu = run.train["tokens_per_second"], run.train["mfu"]
    keys = [(f"{steps:,.0f}", "steps"), (human(tokens), "useful tokens"), (duration(hours * 3600), "training time")]
    if not np.isnan(speed).all():
        keys.append((human(float(np.nanmedian(speed))), "tokens per second"))
    if not np.isnan(mfu).all():
        keys.append((f"{float(np.nanmedian(mfu)):.0%}", "MFU"))
    keys.append((_figure(run.train.ends("loss")[1]), "training loss"))
    for task, table in run.evals.items():
        held_out = "held-out loss" + (f", {task}" if len(run.evals) > 1 else "")
        keys.append((_figure(table.ends("loss")[1]), held_out))
    for metric in report_charts.generated([run]):
        keys.append((f"{_last_held_out(run, metric):.1f}", f"{metric}, held out"))
    return keys + _cost_of(run, price)


def _cost_of(run: Run, price: float | None) -> list[tuple[str, str]]:
    """Device time and money so far, and at the run's end: of all time on the clock, not training alone, except lost
    work (see `Run`)."""
    keys = []
    if run.device_hours:
        keys.append((duration(run.device_hours * 3600), "device time"))
    if price is not None:
        keys.append((f"${run.device_hours * price:,.2f}", "spent"))
    if (remaining := run.remaining()) is not None:
        end = datetime.datetime.fromtimestamp(run.last_time + remaining * 3600, datetime.UTC)
        keys.append((f"{end:%Y-%m-%d %H:%M}", "expected end, UTC"))
        if price is not None:
            whole = run.device_hours + remaining * run.devices
            keys.append((f"${whole * price:,.2f}", "expected in the end"))
    return keys


def _side_by_side(runs: Sequence[Run], price: float | None) -> str:
    """The key figures of runs that are compared: a row each."""
    figures = [{name: value for value, name in _figures_of(run, price)} for run in runs]
    names = list(dict.fromkeys(name for found in figures for name in found))
    rows = (
        f'<tr><td><i style="background:var(--c{i % _DIRECT})"></i>{escape(run.name)}'
        f' <span class="soft">{_STATE[run.finished]}</span></td>'
        + "".join(f"<td>{escape(found.get(name, '–'))}</td>" for name in names)
        + "</tr>"
        for i, (run, found) in enumerate(zip(runs, figures, strict=True))
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in ["run", *names])
    return f'<div class="scroll"><table class="sources"><tr>{head}</tr>{"".join(rows)}</table></div>'


def _key_figures(run: Run, titled: bool, price: float | None) -> Iterator[str]:
    """Key figures of a stage and the table of its sources."""
    if titled or _STATE[run.finished]:
        yield f"<h3>{escape(run.name)} <span class='soft'>{_STATE[run.finished]}</span></h3>"
    cells = "".join(
        f'<div class="key"><b>{value}</b><span>{escape(name)}</span></div>' for value, name in _figures_of(run, price)
    )
    yield f'<div class="keys">{cells}</div>'
    sources = sources_of(run)
    rows = []
    for slot, source in enumerate(sources):
        first, final = run.train.ends(f"loss/{source}")
        loss, accuracy = (_last_held_out(run, f"{metric}/{source}") for metric in ("loss", "accuracy"))
        color = f"var(--c{slot})" if slot < _DIRECT else "var(--line)"
        rows.append(
            f'<tr><td><i style="background:{color}"></i>{escape(short(source, sources))}</td>'
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


def _configuration(runs: Sequence[Run], compare: bool) -> Iterator[str]:
    """What the last run is made of, each run's settings, and how they differ: from the stage before, or from the first
    of the runs that are compared."""
    yield "<h2>Configuration</h2>"
    facts = {**runs[-1].model, **{f"vocabulary {name}": value for name, value in runs[-1].vocabulary.items()}}
    if runs[-1].start.get("peak"):
        facts["peak for MFU"] = runs[-1].start["peak"]
    if facts:
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(_value(v))}</td></tr>" for name, v in facts.items())
        yield f"<details><summary>model and vocabulary</summary><table>{rows}</table></details>"
    for before, run in zip([None, *([runs[0]] * len(runs) if compare else runs)], runs, strict=False):
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
