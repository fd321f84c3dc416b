"""A preview as one HTML page, with no other file, no script and no network."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vikhr_t5 import __version__
from vikhr_t5.data.preview import (
    SAMPLE,
    SHOWN_PARTS,
    Journey,
    Pieces,
    Preview,
    Row,
    Source,
    Stage,
    Task,
    cut,
    segment_title,
)
from vikhr_t5.data.rows import Segment
from vikhr_t5.page import escape, write_page
from vikhr_t5.progress import human

BARS = 32  # of a histogram
COLORS = 10  # of page.css
SEGMENT_COLORS = (0, 2, 6, 3, 7, 4)  # those of them that are easiest told from one another
LONGEST = 200  # tokens, and five times as many characters, that are shown of a document


def write(preview: Preview, path: str | os.PathLike[str]) -> None:
    """Write the page; replaces what is there."""
    name = escape(preview.config.mixture_or_task_name)
    template = Path(__file__).with_name("preview_template.html")
    write_page(path, template, title=f"{name}: preview", body="\n".join(_Page(preview).body()))


class _Page:
    def __init__(self, preview: Preview):
        self.preview, self.pieces = preview, Pieces(preview.vocabulary)

    def body(self) -> Iterator[str]:
        preview = self.preview
        inputs, targets = preview.lengths
        about = f"split {preview.config.split} · inputs {inputs}, targets {targets} · {preview.vocabulary.size} ids"
        yield f"<h1>{escape(preview.config.mixture_or_task_name)}</h1>"
        yield f'<p class="soft">{escape(about)} · vikhr-t5 {__version__}</p>'
        tokens = sum(sum(task.manifest.num_tokens.values()) for task in preview.tasks)
        keys = [
            (str(len(preview.tasks)), "task" + "s"[: len(preview.tasks) > 1]),
            (f"{sum(task.manifest.num_examples for task in preview.tasks):,}", "documents or examples"),
            (human(tokens), "tokens in the caches"),
            (f"{preview.useful[0]:.1%}", f"useful inputs (plan: {preview.planned[0]:.1%})"),
            (f"{preview.useful[1]:.1%}", f"useful targets (plan: {preview.planned[1]:.1%})"),
            (str(preview.natural_targets_length), "targets that would be as full as inputs"),
        ]
        cells = "".join(f'<div class="key"><b>{value}</b><span>{name}</span></div>' for value, name in keys)
        yield f'<div class="keys">{cells}</div>'
        yield from self._rates()
        yield from _documents(preview.tasks)
        yield from self._lengths()
        yield "<h2>Documents on their way</h2>"
        yield f'<p class="soft">{escape(preview.note or "From the source through each preprocessor to a row.")}</p>'
        for task in preview.tasks:
            for journey in task.journeys:
                yield self._journey(task, journey)
        yield "<h2>Rows of the training sequence</h2>"
        yield '<p class="soft">Tokens are shaded in turn; what a span hides stands in the targets after its number.</p>'
        for row in preview.rows:
            yield self._row_with_stages(row)
        yield f"<footer>Written by vikhr-t5 {__version__}.</footer>"

    def _rates(self) -> Iterator[str]:
        yield f'<h2>Rates</h2><p class="soft">Measured on {SAMPLE} rows. {escape(self.preview.legend)}</p>'
        head = "".join(f"<th>{name}</th>" for name in ("source", "nominal", "measured"))
        head += "".join(f'<th class="narrow">{name}</th>' for name in ("text", "inputs", "targets", "number"))
        rows = []
        for slot, task in enumerate(self.preview.tasks):
            rows.append(_rate(task.whole, slot))
            rows += [_rate(part, slot, "part") for part in task.parts[:SHOWN_PARTS]]
            if more := len(task.parts[SHOWN_PARTS:]):
                rows.append(f'<tr class="part"><td>and {more} smaller</td></tr>')
        yield f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'

    def _lengths(self) -> Iterator[str]:
        inputs, targets = self.preview.lengths
        yield '<h2>Lengths</h2><p class="soft">In tokens; the last bar has all that are longer.</p>'
        for slot, task in enumerate(self.preview.tasks):
            longest = int(np.quantile(task.documents, 0.99)) if len(task.documents) else 1
            what = "document" if task.denoised else "cached targets"
            pairs = [f"<div>{_histogram(what, task.documents, longest)}</div>"]
            for source in task.parts[:SHOWN_PARTS] or [task.whole]:
                name = f"{source.name} " if task.parts else ""
                pairs.append(
                    f"<div>{_histogram(f'{name}inputs', source.inputs, inputs)}"
                    f"{_histogram(f'{name}targets', source.targets, targets)}</div>"
                )
            yield f'<h3>{escape(task.name)}</h3><div class="lengths" style="{_color(slot)}">{"".join(pairs)}</div>'

    def _journey(self, task: Task, journey: Journey) -> str:
        end = f'<span class="bad">left out: {escape(journey.dropped)}</span>' if journey.dropped else "kept"
        stages = "".join(map(self._stage, journey.stages))
        row = ""
        if journey.row is not None:
            row = f"<details><summary>the row where it begins</summary>{self._row(journey.row, 'row')}</details>"
        title = f'<h3>{escape(task.name)} <span class="soft">{end}</span></h3>'
        return f'<article class="sample">{title}<dl class="stages">{stages}</dl>{row}</article>'

    def _stage(self, stage: Stage) -> str:
        if not stage.changed:
            return f'<dt>{escape(stage.name)}</dt><dd class="soft">changes nothing</dd>'
        if not stage.num_examples:
            return f'<dt>{escape(stage.name)}</dt><dd class="bad">leaves it out</dd>'
        shown = []
        for example in stage.examples:
            for feature, value in example.items():
                content = self._tokens(value) if not isinstance(value, str) else _text(value)
                shown.append(f'<p><span class="feature">{escape(feature)}</span>{content}</p>')
        if more := stage.num_examples - len(stage.examples):
            shown.append(f'<p class="soft">and {more} more examples</p>')
        return f"<dt>{escape(stage.name)}</dt><dd>{''.join(shown)}</dd>"

    def _row_with_stages(self, row: Row) -> str:
        parts = []
        for number, segment in enumerate(row.segments, start=1):
            opened = " open" if number == 1 and row.place == 0 else ""
            title = f"segment {number}: {escape(segment_title(segment))}"
            stages = "".join(f"<dt>{name}</dt><dd>{content}</dd>" for name, content in self._stages(segment))
            parts.append(f'<details{opened}><summary>{title}</summary><dl class="stages">{stages}</dl></details>')
        title = f'<h3>row {row.place} <span class="soft">{escape(row.task)}, {len(row.segments)} segments</span></h3>'
        return (
            f'<article class="sample">{title}{"".join(parts)}{self._row(row, "packed row", row.place == 0)}</article>'
        )

    def _stages(self, segment: Segment) -> Iterator[tuple[str, str]]:
        decode = self.preview.vocabulary.decode
        if segment.text is not None:
            yield "text", _text(decode(segment.text.tolist()))
            yield "tokens", self._tokens(segment.text)
        yield f"inputs {len(segment.inputs)}", self._tokens(segment.inputs, len(segment.inputs))
        yield f"targets {len(segment.targets)}", self._tokens(segment.targets, len(segment.targets))

    def _row(self, row: Row, title: str, opened: bool = False) -> str:
        """A bar for either side, and under it the tokens, each segment in its colour."""
        sides = []
        for side, length in zip(("inputs", "targets"), self.preview.lengths, strict=True):
            contents = [getattr(segment, side) for segment in row.segments]
            used = sum(map(len, contents))
            bar = "".join(
                f'<span style="width:{len(ids) / length:.3%};{_segment_color(number)}">{number + 1}</span>'
                for number, ids in enumerate(contents)
            )
            tokens = "".join(
                f'<span class="segment" style="{_segment_color(number)}">{self._pieces(ids)}</span> '
                for number, ids in enumerate(contents)
            )
            sides.append(
                f'<dt>{side}<br>{used} of {length} = {used / length:.1%}</dt><dd><div class="packed">{bar}</div>'
                f'<div class="tokens">{tokens}</div></dd>'
            )
        start = f"<details{' open' if opened else ''}><summary>{title}</summary>"
        return f'{start}<dl class="stages">{"".join(sides)}</dl></details>'

    def _tokens(self, ids: Sequence[int] | np.ndarray, longest: int = LONGEST) -> str:
        more = f'<span class="soft"> … {len(ids) - longest:,} more</span>' if len(ids) > longest else ""
        return f'<span class="tokens">{self._pieces(ids[:longest])}{more}</span>'

    def _pieces(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join(map(self._piece, np.asarray(ids).tolist()))

    def _piece(self, token: int) -> str:
        kind, text = self.pieces(token)
        if kind == "piece":
            return f'<b title="{token}">{escape(text.replace("▁", " "))}</b>'
        color = f' style="background:var(--c{int(text) % COLORS})"' if kind == "sentinel" else ""
        return f'<span class="{kind}" title="{token}"{color}>{escape(text)}</span>'


def _text(text: str) -> str:
    return f'<span class="text">{escape(cut(text, 5 * LONGEST, 100))}</span>'


def _documents(tasks: Sequence[Task]) -> Iterator[str]:
    """What the caches read, kept and left out, and why."""
    yield '<h2>Left out</h2><p class="soft">Documents or examples of the source, by what left them out.</p>'
    rows = []
    for task in tasks:
        manifest = task.manifest
        rows.append(
            f"<tr><td>{escape(task.name)}</td><td>{manifest.num_read:,} read</td>"
            f"<td>{manifest.num_examples:,} kept</td></tr>"
        )
        reasons = {
            **manifest.dropped,
            **({"malformed lines": manifest.skipped_lines} if manifest.skipped_lines else {}),
        }
        rows += [
            f'<tr class="part"><td>{escape(reason)}</td><td></td><td>{count:,}</td></tr>'
            for reason, count in reasons.items()
        ]
    yield f"<table>{''.join(rows)}</table>"


def _rate(source: Source, slot: int, kind: str = "") -> str:
    shares = "".join(
        f'<td class="share" style="--share:{share:.4f};{_color(slot)}">{share:.2%}<i></i></td>'
        for share in (source.nominal, source.measured)
    )
    figures = "".join(f'<td class="narrow">{figure}</td>' for figure in (*source.means, f"{len(source.inputs):,}"))
    return f'<tr class="{kind}"><td>{escape(source.name)}</td>{shares}{figures}</tr>'


def _histogram(name: str, lengths: np.ndarray, longest: int) -> str:
    """Bars from 0 to `longest`; all that are longer are in the last one."""
    counts, edges = np.histogram(np.minimum(lengths, longest), bins=BARS, range=(0, max(longest, 1)))
    tall = 48 * counts / max(counts.max(), 1)
    bars = "".join(
        f'<rect x="{10 * bar + 1}" y="{50 - height:.1f}" width="8" height="{height:.1f}">'
        f"<title>{edges[bar]:.0f} to {edges[bar + 1]:.0f}: {counts[bar]:,}</title></rect>"
        for bar, height in enumerate(tall)
        if counts[bar]
    )
    middle = f"median {np.median(lengths):.0f}, longest {lengths.max():,}" if len(lengths) else "none"
    return (
        f'<figure><svg viewBox="0 0 {10 * BARS} 52" preserveAspectRatio="none" role="img"'
        f' aria-label="{escape(name)}: {middle}">{bars}<line x1="0" x2="{10 * BARS}" y1="51" y2="51"/></svg>'
        f"<figcaption><b>{escape(name)}</b>, 0 to {longest:,}<br>{middle}</figcaption></figure>"
    )


def _color(slot: int) -> str:
    return f"--c:var(--c{slot % COLORS})"


def _segment_color(number: int) -> str:
    return _color(SEGMENT_COLORS[number % len(SEGMENT_COLORS)])
