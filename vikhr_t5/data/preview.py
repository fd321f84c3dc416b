"""A look at the data: text, tokens, what the denoiser makes of them, the packed row; and the mixture in figures."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vikhr_t5.data.pipeline import Dataset, DatasetConfig, open_dataset
from vikhr_t5.data.rows import Segment, WindowRows
from vikhr_t5.data.vocabulary import AnyVocabulary

SAMPLE = 2048  # rows that the table is measured on
SEGMENT_STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red")
SENTINEL, MODE, END, FAINT = "bold black on yellow", "bold black on cyan", "bold red", "bright_black"


def preview(config: DatasetConfig, vocabulary: AnyVocabulary, n: int, console: Console) -> None:
    """Print `n` rows of the training sequence at each stage, and a table of the mixture's sources.

    Raises:
        UserError: as `open_dataset`.
    """
    dataset = open_dataset(dataclasses.replace(config, num_workers=0), vocabulary)
    painter = _Painter(vocabulary)
    for place in range(n):
        task, segments = dataset.segments(place)
        console.rule(f"[bold]row {place}[/] of {config.split}: {task}, {len(segments)} segments", align="left")
        for number, segment in enumerate(segments, start=1):
            console.print(painter.segment(number, segment))
        console.print(painter.row(segments, dataset.lengths))
    console.print(sources_table(dataset))


class _Painter:
    """Tokens as coloured text, with the ids' meaning taken from a vocabulary."""

    def __init__(self, vocabulary: AnyVocabulary):
        self.vocabulary = vocabulary
        self.modes = {vocabulary.mode_id(token) for token in vocabulary.mode_tokens}

    def token(self, token: int, style: str = "") -> Text:
        """One piece; sentinel i as <i>."""
        if token >= self.vocabulary.last_sentinel:
            return Text(f"<{self.vocabulary.first_sentinel - token}>", SENTINEL)
        if token in self.modes:
            return Text(self.vocabulary.piece(token), MODE)
        if token == self.vocabulary.eos_id:
            return Text("</s>", END)
        return Text(self.vocabulary.piece(token), style)

    def tokens(self, ids: np.ndarray, style: str = "", head: int = 60, tail: int = 12) -> Text:
        """Pieces divided by bars; the middle of a long sequence is left out."""
        left_out = len(ids) - head - tail
        if left_out <= 0:
            return self._joined(ids, style)
        text = self._joined(ids[:head], style).append(f" … {left_out} more … ", FAINT)
        return text.append(self._joined(ids[-tail:], style))

    def _joined(self, ids: np.ndarray, style: str) -> Text:
        text = Text()
        for place, token in enumerate(ids.tolist()):
            text.append("|" if place else "", FAINT).append(self.token(token, style))
        return text

    def text(self, ids: np.ndarray) -> Text:
        """Readable text, at most a few lines of it."""
        text = self.vocabulary.decode(ids.tolist())
        return Text(text if len(text) <= 300 else f"{text[:240]} … {text[-50:]}")

    def segment(self, number: int, segment: Segment) -> Padding:
        """One window or example at each stage."""
        style = SEGMENT_STYLES[(number - 1) % len(SEGMENT_STYLES)]
        stages = Table.grid(padding=(0, 2))
        stages.add_column(justify="right", style="bold", no_wrap=True, min_width=11)
        stages.add_column(overflow="fold")
        if segment.text is None or segment.denoiser is None:
            stages.add_row("inputs", self.text(segment.inputs))
            stages.add_row("targets", self.text(segment.targets))
            title = f"segment {number}: example"
        else:
            stages.add_row("text", self.text(segment.text))
            stages.add_row("tokens", self.tokens(segment.text, head=30, tail=6))
            denoiser = segment.denoiser
            hides = "the end, " if denoiser.mean_span is None else f"spans of {denoiser.mean_span:g}, "
            title = f"segment {number}: {denoiser.name} hides {hides}{denoiser.rate:.0%} of {len(segment.text)} tokens"
        stages.add_row(f"inputs {len(segment.inputs)}", self.tokens(segment.inputs))
        stages.add_row(f"targets {len(segment.targets)}", self.tokens(segment.targets))
        return Padding(Group(Text(title, f"bold {style}"), stages), (0, 0, 1, 0))

    def row(self, segments: Sequence[Segment], lengths: tuple[int, int]) -> Padding:
        """The packed row: a bar for either side, and the tokens where its segments begin and end."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(justify="right", style="bold", no_wrap=True, min_width=11)
        grid.add_column(overflow="fold")
        for side, length in zip(("inputs", "targets"), lengths, strict=True):
            contents = [getattr(segment, side) for segment in segments]
            grid.add_row(side, _bar([len(tokens) for tokens in contents], length))
            ends = Text()
            for number, tokens in enumerate(contents):
                style = SEGMENT_STYLES[number % len(SEGMENT_STYLES)]
                ends.append(Text(f"{'' if not number else ' '}{number + 1}:", f"bold {style}"))
                ends.append(self.tokens(tokens, style, head=5, tail=3))
            grid.add_row("", ends)
        return Padding(Group(Text("packed row", "bold"), grid), (0, 0, 1, 0))


def _bar(counts: Sequence[int], length: int, width: int = 60) -> Text:
    """A row as a bar: each segment in its colour, padding as dots, then the figures."""
    ends = [round(width * end / length) for end in np.cumsum(counts)]
    bar = Text()
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        bar.append("█" * (end - start), SEGMENT_STYLES[number % len(SEGMENT_STYLES)])
    bar.append("·" * (width - ends[-1]), FAINT)
    return bar.append(f" {sum(counts)}/{length} = {sum(counts) / length:.1%}")


def sources_table(dataset: Dataset) -> Group:
    """Shares, nominal and measured on the first rows of the training sequence; mean lengths; how full rows are."""
    totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(4))  # segments, text, inputs, targets
    for place in range(SAMPLE):
        task, segments = dataset.segments(place)
        for segment in segments:
            source = task if segment.denoiser is None else f"{task}/{segment.denoiser.name}"
            text = 0 if segment.text is None else len(segment.text)
            counts = np.array([1, text, len(segment.inputs), len(segment.targets)])
            totals[source] += counts
            if source != task:
                totals[task] += counts
    table = Table(title=f"sources, measured on {SAMPLE} rows", title_justify="left", title_style="bold")
    table.add_column("source", no_wrap=True)
    for heading in ("nominal", "measured", "text", "inputs", "targets", "examples"):
        table.add_column(heading, justify="right")
    examples = sum(totals[task][0] for task in dataset.tasks)
    for task, rows in dataset.tasks.items():
        rate, measured = dataset.example_rates[task], totals[task][0] / examples
        table.add_row(task, f"{rate:.2%}", f"{measured:.2%}", *_means(totals[task]), style="bold")
        for denoiser in rows.plan.denoisers if isinstance(rows, WindowRows) else ():
            total = totals[f"{task}/{denoiser.name}"]
            share = f"{total[2] / totals[task][2]:.2%}"
            table.add_row(f"  {denoiser.name}", f"{denoiser.weight:.2%}", share, *_means(total))
    legend = "share of a task: of examples; of a denoiser: of its task's input tokens. Mean lengths in tokens."
    notes = [Text(legend, FAINT)]
    for side, length, fill, column in zip(("inputs", "targets"), dataset.lengths, dataset.fill, (2, 3), strict=True):
        useful = sum(totals[task][column] for task in dataset.tasks) / (SAMPLE * length)
        notes.append(Text(f"{side} {length}: {useful:.1%} useful (plan: {fill:.1%})"))
    natural = dataset.natural_targets_length
    notes.append(Text(f"targets of {natural} would be as full as inputs of {dataset.lengths[0]}"))
    return Group(table, *notes)


def _means(total: np.ndarray) -> list[str]:
    """Cells: mean text, inputs and targets of a source, and its number of segments."""
    text, inputs, targets = (f"{mean:.0f}" for mean in total[1:] / max(total[0], 1))
    return [text if total[1] else "", inputs, targets, f"{total[0]:.0f}"]
