"""Results as the table of the VikhrT5 card: a line for each benchmark, a column for each model.

shown = table(results)
print(markdown(shown))
write(shown, Path("scores"), command)        table.md, table.html, table.png, results.json
"""

import io
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vikhr_t5 import outputs
from vikhr_t5.benchmark_results import BENCHMARKS, PUBLISHED, Result
from vikhr_t5.errors import UserError
from vikhr_t5.files import atomic_path, write_text_atomic
from vikhr_t5.page import escape, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NONE = "–"
_FILES = ("table.md", "table.html", "table.png", "results.json")
_METRICS = {"acc": "accuracy ↑", "chrf": "chrF ↑", "bits_per_byte": "bits per byte ↓"}


class Column(NamedTuple):
    """title: the model's name; kind: "measured", "chance" or "published"."""

    title: str
    kind: str


class Line(NamedTuple):
    """title: the benchmark's; metric: in words; cells: one for each column; best: of the measured ones, where several
    are; is_part: a category of the line above."""

    title: str
    metric: str
    cells: tuple[str, ...]
    best: int | None = None
    is_part: bool = False


class Table(NamedTuple):
    """What all forms of the table show."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    results: tuple[Result, ...]


def table(results: Sequence[Result], limit: int | None = None) -> Table:
    """Measured models in their order, the random baseline, then what was published of the same benchmarks.

    Args:
        limit: items of each task, where not all were scored.
    """
    models = tuple(dict.fromkeys(result.model for result in results))
    names = [name for name in BENCHMARKS if any(result.benchmark == name for result in results)]
    published = tuple(column for column in PUBLISHED if any(name in column.values for name in names))
    columns = [Column(model, "measured") for model in models]
    by_chance = any(BENCHMARKS[name].chance for name in names)
    columns += [Column("random", "chance")] if by_chance else []
    columns += [Column(one.model, "published") for one in published]
    lines: list[Line] = []
    for name in names:
        chance = BENCHMARKS[name].chance
        ours = {result.model: result for result in results if result.benchmark == name}
        cells = [_value(one.value, one.stderr, name) if (one := ours.get(model)) else NONE for model in models]
        cells += [f"{chance:.3g}" if chance else NONE] if by_chance else []
        cells += [one.values.get(name, NONE) for one in published]
        shots = next(iter(ours.values())).num_fewshot
        title = f"{name} ({shots}-shot)" if BENCHMARKS[name].num_fewshot is not None else name
        lines.append(Line(title, _METRICS[BENCHMARKS[name].metric], tuple(cells), _best(name, models, ours)))
        lines += _parts(name, models, ours, len(columns))
    return Table(tuple(columns), tuple(lines), tuple(_notes(results, limit, bool(published))), tuple(results))


def _value(value: float, stderr: float | None, name: str) -> str:
    digits = {"acc": 3, "chrf": 1, "bits_per_byte": 3}[BENCHMARKS[name].metric]
    return f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")


def _best(name: str, models: Sequence[str], ours: dict[str, Result]) -> int | None:
    """The column of the best measured value, where there are several."""
    if len(ours) < 2:
        return None
    pick = min if BENCHMARKS[name].metric == "bits_per_byte" else max
    return models.index(pick(ours.values(), key=lambda result: result.value).model)


def _parts(name: str, models: Sequence[str], ours: dict[str, Result], width: int) -> Iterator[Line]:
    """ru_mmlu's categories."""
    for part in next(iter(ours.values())).parts:
        cells = [_value(*ours[model].parts[part], name) if model in ours else NONE for model in models]
        cells += [""] * (width - len(cells))
        yield Line(part.replace("_", " "), "", tuple(cells), is_part=True)


def _notes(results: Sequence[Result], limit: int | None, published: bool) -> Iterator[str]:
    yield "± is one standard error, over items."
    if any(result.parts for result in results):
        yield "ru_mmlu is the mean over its four categories, each the mean over its subjects."
    for result in results:
        if result.cut:
            yield (
                f"{result.model}, {result.benchmark}: {result.cut:,} of {result.prompts:,} prompts are longer than the"
                f" {result.max_length:,} tokens that the model reads; their beginning was cut."
            )
    if limit:
        yield f"A trial: at most {limit} items of each task or subject were scored."
    if published:
        sources = ", ".join(dict.fromkeys(column.source for column in PUBLISHED))
        yield f"Published: as the model cards have it ({sources}); they name neither the shots nor the standard errors."


# ---- forms -----------------------------------------------------------------------------------------------------------


def _heads(shown: Table) -> list[str]:
    return [f"{column.title} (published)" if column.kind == "published" else column.title for column in shown.columns]


def markdown(shown: Table) -> str:
    """The table and its notes."""
    rows = [["Dataset", "Metric", *_heads(shown)], ["---", "---", *(["--:"] * len(shown.columns))]]
    for line in shown.lines:
        cells = [f"**{cell}**" if number == line.best else cell for number, cell in enumerate(line.cells)]
        rows.append([f"· {line.title}" if line.is_part else line.title, line.metric, *cells])
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return text + "\n\n" + "\n".join(f"- {note}" for note in shown.notes)


def html_rows(shown: Table) -> str:
    """The table's rows."""
    heads = "".join(
        f'<th class="{column.kind}">{escape(column.title)}'
        + ('<span class="soft"> published</span>' if column.kind == "published" else "")
        + "</th>"
        for column in shown.columns
    )
    rows = [f"<tr><th>Dataset</th><th></th>{heads}</tr>"]
    for line in shown.lines:
        cells = "".join(
            f'<td class="{column.kind}">'
            + (f"<b>{escape(cell)}</b>" if number == line.best else escape(cell))
            + "</td>"
            for number, (column, cell) in enumerate(zip(shown.columns, line.cells, strict=True))
        )
        kind = ' class="part"' if line.is_part else ""
        rows.append(f'<tr{kind}><td>{escape(line.title)}</td><td class="unit">{escape(line.metric)}</td>{cells}</tr>')
    return "\n".join(rows)


def check_output(output: Path) -> None:
    """UserError where the folder holds something else than an earlier table."""
    if (output / "results").is_dir():  # an evaluation that has not come to its table yet
        return
    outputs.check_output(output, *_FILES)


def write(shown: Table, output: Path, command: Sequence[str]) -> None:
    """table.md, table.html, table.png and results.json, each whole.

    Args:
        command: that made it, for the record.

    Raises:
        UserError: matplotlib is not installed.
    """
    write_text_atomic(output / "table.md", markdown(shown) + "\n")
    record = {"command": shlex.join(command), "results": [result.record() for result in shown.results]}
    write_text_atomic(output / "results.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    notes = "\n".join(f"<li>{escape(note)}</li>" for note in shown.notes)
    template = Path(__file__).with_name("benchmark_template.html")
    values = {
        "rows": html_rows(shown),
        "notes": notes,
        "details": _details(shown),
        "command": escape(shlex.join(command)),
    }
    write_page(output / "table.html", template, title="Benchmarks", **values)
    with atomic_path(output / "table.png") as temporary:
        temporary.write_bytes(png(shown))


def _details(shown: Table) -> str:
    """What was evaluated how: a row for each result."""
    rows = [
        "<tr><th>Model</th><th>Task</th><th>Items</th><th>Shots</th><th>dtype</th><th>Limit</th><th>lm-eval</th></tr>"
    ]
    for result in shown.results:
        settings = result.settings
        values = [result.model, result.benchmark, f"{result.items:,}", str(result.num_fewshot)]
        values += [settings["dtype"], f"{result.max_length:,}", settings["lm_eval"]]
        rows.append("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in values) + "</tr>")
    return "\n".join(rows)


# ---- picture ---------------------------------------------------------------------------------------------------------

_INK, _SOFT, _LINE, _FAINT, _BLUE = "#1d2127", "#5f6773", "#e6e2db", "#f6f4f0", "#2f6db5"
_ROW = 0.3  # inches


def png(shown: Table) -> bytes:
    """The table as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the picture needs the extra [benchmark]: pip install 'vikhr-t5[benchmark]'") from error
    texts = [["", "", *(column.title for column in shown.columns)]]
    texts += [[("   " if line.is_part else "") + line.title, line.metric, *line.cells] for line in shown.lines]
    widths = [0.085 * max(len(row[number]) for row in texts) + 0.35 for number in range(len(texts[0]))]
    has_published = any(column.kind == "published" for column in shown.columns)
    height = _ROW * (len(shown.lines) + (3.2 if has_published else 2.3))
    figure = Figure(figsize=(sum(widths) + 0.3, height), dpi=160, facecolor="white")
    _draw(figure, shown, texts, [sum(widths[: number + 1]) + 0.05 for number in range(len(widths))], height)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw(figure: "Figure", shown: Table, texts: list[list[str]], edges: list[float], height: float) -> None:
    """Numbers end at the right edge of their column, as in print."""
    from matplotlib.patches import Rectangle

    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, edges[-1] + 0.25), ylim=(height, 0))
    axes.axis("off")
    left = 0.15
    first_published = next((i for i, column in enumerate(shown.columns) if column.kind == "published"), None)
    top = (0.8 if first_published is None else 1.7) * _ROW
    if first_published is not None:
        start = edges[first_published + 1] + 0.08
        axes.add_patch(Rectangle((start, 0), edges[-1] + 0.25 - start, height, facecolor=_FAINT, linewidth=0))
        middle = (start + edges[-1] + 0.25) / 2
        axes.text(middle, 0.6 * _ROW, "published", ha="center", va="center", fontsize=8, color=_SOFT)
    for number, row in enumerate(texts):
        y = top + number * _ROW
        line = shown.lines[number - 1] if number else None
        small = line is not None and line.is_part
        if line is None or not small:
            axes.plot((left, edges[-1] + 0.1), [y - _ROW / 2] * 2, color=_LINE, linewidth=0.8 if number else 0)
        for place, text in enumerate(row):
            measured = place >= 2 and shown.columns[place - 2].kind == "measured"
            soft = small or place == 1 or not (measured or place == 0)
            bold = (number == 0 and measured) or (line is not None and place - 2 == line.best)
            axes.text(
                left if place == 0 else edges[0] + 0.1 if place == 1 else edges[place],
                y,
                text,
                ha="left" if place < 2 else "right",
                va="center",
                fontsize=7.5 if small or place == 1 else 9,
                fontweight="bold" if bold else "normal",
                color=_BLUE if bold and number else _SOFT if soft else _INK,
            )
    below = top + len(texts) * _ROW
    axes.text(left, below, "± one standard error", fontsize=7, color=_SOFT, va="center")
