"""A preview as coloured text in a terminal."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vikhr_t5.data.preview import SAMPLE, SHOWN_PARTS, Journey, Pieces, Preview, Row, Source, Task, cut, segment_title
from vikhr_t5.data.rows import Segment

SEGMENT_STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red")
FAINT = "bright_black"
STYLES = {"sentinel": "bold black on yellow", "mode": "bold black on cyan", "end": "bold red"}


def show(preview: Preview, console: Console) -> None:
    """Print everything."""
    painter = _Painter(preview)
    for task in preview.tasks:
        for journey in task.journeys:
            end = f"left out: {journey.dropped}" if journey.dropped else "kept"
            console.rule(f"[bold]a document[/] of {task.name}: {end}", align="left")
            console.print(painter.journey(journey))
    if preview.note:
        console.print(Text(preview.note, FAINT))
    for row in preview.rows:
        title = f"[bold]row {row.place}[/] of {preview.config.split}: {row.task}, {len(row.segments)} segments"
        console.rule(title, align="left")
        for number, segment in enumerate(row.segments, start=1):
            console.print(painter.segment(number, segment))
        console.print(painter.row(row))
    console.print(_sources(preview))
    console.print(_documents(preview.tasks))


class _Painter:
    """Tokens as coloured text, with the ids' meaning taken from the vocabulary."""

    def __init__(self, preview: Preview):
        self.vocabulary, self.lengths = preview.vocabulary, preview.lengths
        self.pieces = Pieces(preview.vocabulary)

    def token(self, token: int, style: str = "") -> Text:
        """One piece; sentinel i as <i>."""
        kind, piece = self.pieces(token)
        return Text(f"<{piece}>" if kind == "sentinel" else piece, STYLES.get(kind, style))

    def tokens(self, ids: Sequence[int] | np.ndarray, style: str = "", head: int = 60, tail: int = 12) -> Text:
        """Pieces divided by bars; the middle of a long sequence is left out."""
        left_out = len(ids) - head - tail
        if left_out <= 0:
            return self._joined(ids, style)
        text = self._joined(ids[:head], style).append(f" … {left_out} more … ", FAINT)
        return text.append(self._joined(ids[-tail:], style))

    def _joined(self, ids: Sequence[int] | np.ndarray, style: str) -> Text:
        text = Text()
        for place, token in enumerate(np.asarray(ids).tolist()):
            text.append("|" if place else "", FAINT).append(self.token(token, style))
        return text

    def text(self, ids: np.ndarray) -> Text:
        """Readable text, at most a few lines of it."""
        return Text(cut(self.vocabulary.decode(ids.tolist()), 240, 50))

    def journey(self, journey: Journey) -> Padding:
        """A document after each preprocessor that changes it, and where it went."""
        stages = _grid()
        for stage in journey.stages:
            if not stage.changed:
                stages.add_row("", Text(f"{stage.name} changes nothing", FAINT))
            for number, example in enumerate(stage.examples if stage.changed else ()):
                for feature, value in example.items():
                    shown = Text(cut(value, 240, 50)) if isinstance(value, str) else self.tokens(value, head=30, tail=6)
                    stages.add_row(feature, shown if number else Text(f"{stage.name}  ", FAINT).append(shown))
            if not stage.num_examples:
                stages.add_row("", Text(f"left out by {stage.name}: {journey.dropped}", "bold red"))
            if more := stage.num_examples - len(stage.examples):
                stages.add_row("", Text(f"and {more} more examples", FAINT))
        row = [] if journey.row is None else [self.row(journey.row)]
        return Padding(Group(stages, *row), (0, 0, 1, 0))

    def segment(self, number: int, segment: Segment) -> Padding:
        """One window or example at each stage."""
        style = SEGMENT_STYLES[(number - 1) % len(SEGMENT_STYLES)]
        stages = _grid()
        if segment.text is None:
            stages.add_row("inputs", self.text(segment.inputs))
            stages.add_row("targets", self.text(segment.targets))
        else:
            stages.add_row("text", self.text(segment.text))
            stages.add_row("tokens", self.tokens(segment.text, head=30, tail=6))
        stages.add_row(f"inputs {len(segment.inputs)}", self.tokens(segment.inputs))
        stages.add_row(f"targets {len(segment.targets)}", self.tokens(segment.targets))
        title = Text(f"segment {number}: {segment_title(segment)}", f"bold {style}")
        return Padding(Group(title, stages), (0, 0, 1, 0))

    def row(self, row: Row) -> Padding:
        """The packed row: a bar for either side, and the tokens where its segments begin and end."""
        grid = _grid()
        for side, length in zip(("inputs", "targets"), self.lengths, strict=True):
            contents = [getattr(segment, side) for segment in row.segments]
            grid.add_row(side, _bar([len(tokens) for tokens in contents], length))
            ends = Text()
            for number, tokens in enumerate(contents):
                style = SEGMENT_STYLES[number % len(SEGMENT_STYLES)]
                ends.append(Text(f"{'' if not number else ' '}{number + 1}:", f"bold {style}"))
                ends.append(self.tokens(tokens, style, head=5, tail=3))
            grid.add_row("", ends)
        return Padding(Group(Text("packed row", "bold"), grid), (0, 0, 1, 0))


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", style="bold", no_wrap=True, min_width=11)
    grid.add_column(overflow="fold")
    return grid


def _bar(counts: Sequence[int], length: int, width: int = 60) -> Text:
    """A row as a bar: each segment in its colour, padding as dots, then the figures."""
    ends = [round(width * end / length) for end in np.cumsum(counts)]
    bar = Text()
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        bar.append("█" * (end - start), SEGMENT_STYLES[number % len(SEGMENT_STYLES)])
    bar.append("·" * (width - ends[-1]), FAINT)
    return bar.append(f" {sum(counts)}/{length} = {sum(counts) / length:.1%}")


def _sources(preview: Preview) -> Group:
    """Shares, nominal and measured; mean lengths; how full rows are."""
    table = Table(title=f"sources, measured on {SAMPLE} rows", title_justify="left", title_style="bold")
    table.add_column("source", no_wrap=True)
    for heading in ("nominal", "measured", "text", "inputs", "targets", "examples"):
        table.add_column(heading, justify="right")
    for task in preview.tasks:
        table.add_row(*_cells(task.whole), style="bold")
        for part in task.parts[:SHOWN_PARTS]:
            table.add_row(*_cells(part, "  "))
        if more := len(task.parts[SHOWN_PARTS:]):
            table.add_row(f"  and {more} smaller", style=FAINT)
    notes = [Text(preview.legend, FAINT)]
    for side, length, useful, planned in zip(
        ("inputs", "targets"), preview.lengths, preview.useful, preview.planned, strict=True
    ):
        notes.append(Text(f"{side} {length}: {useful:.1%} useful (plan: {planned:.1%})"))
    natural = preview.natural_targets_length
    notes.append(Text(f"targets of {natural} would be as full as inputs of {preview.lengths[0]}"))
    return Group(table, *notes)


def _cells(source: Source, indent: str = "") -> list[str]:
    shares = f"{source.nominal:.2%}", f"{source.measured:.2%}"
    return [indent + source.name, *shares, *source.means, str(len(source.inputs))]


def _documents(tasks: Sequence[Task]) -> Table:
    """What the caches read, kept and left out."""
    table = Table(title="documents in the caches", title_justify="left", title_style="bold")
    for heading in ("task", "read", "kept", "left out"):
        table.add_column(heading, justify="left" if heading in ("task", "left out") else "right")
    for task in tasks:
        manifest = task.manifest
        reasons = ", ".join(f"{reason} {count}" for reason, count in manifest.dropped.items())
        table.add_row(task.name, str(manifest.num_read), str(manifest.num_examples), reasons)
    return table
