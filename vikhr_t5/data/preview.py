"""A look at a mixture before training on it: what `preview_terminal` and `preview_html` show is gathered here.

For each task: its rate, nominal and measured; lengths; how many documents were left out, and why; one document followed
from the source to the row that it stands in. Then rows of the training sequence, at every stage from the text on.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vikhr_t5.data import seqio_process
from vikhr_t5.data.manifest import NEEDS_SEQIO, Manifest
from vikhr_t5.data.pipeline import Dataset, DatasetConfig, open_dataset
from vikhr_t5.data.rows import ExampleRows, Rows, Segment, WindowRows
from vikhr_t5.data.store import TokenStore
from vikhr_t5.data.vocabulary import AnyVocabulary

SAMPLE = 2048  # rows that shares and lengths are measured on
SHOWN_PARTS = 20  # of a task: translated FLAN has hundreds of sets
SEARCHED = 64  # examples of a store among which a document's tokens are looked for


@dataclasses.dataclass(frozen=True)
class Source:
    """A task, or a part of it (a denoiser, or one of the sets that its examples name), on the measured rows.

    Attributes:
        name: of the task or part.
        nominal, measured: its share; see `Preview.legend`.
        text, inputs, targets: int [K] tokens of its windows or examples; an example's `text` is 0.
    """

    name: str
    nominal: float
    measured: float
    text: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray

    @property
    def means(self) -> list[str]:
        """Of text, inputs and targets, as shown; "" where there are none."""
        return [f"{lengths.mean():.0f}" if lengths.any() else "" for lengths in (self.text, self.inputs, self.targets)]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a document is after a preprocessor: `num_examples`, of which `examples` are some. `changed`: it was not that
    before."""

    name: str
    examples: list[dict[str, str | list[int]]]
    num_examples: int
    changed: bool


@dataclasses.dataclass(frozen=True)
class Journey:
    """One document of the source on its way: `dropped` says why it was left out, or is None. `row` is the row of the
    first epoch where its first token stands, where that is known."""

    stages: list[Stage]
    dropped: str | None
    row: "Row | None" = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A packed row. `place` is where it stands in the training sequence, None for one of the unshuffled epoch."""

    task: str
    place: int | None
    segments: Sequence[Segment]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: all of it, its parts with the greatest first, and documents on their way. `denoised`: its parts are
    denoisers."""

    whole: Source
    parts: list[Source]
    denoised: bool
    manifest: Manifest
    documents: np.ndarray  # int [N] tokens of each document, or of each example's targets, in the store
    journeys: list[Journey]

    @property
    def name(self) -> str:
        return self.whole.name


@dataclasses.dataclass(frozen=True)
class Preview:
    """All that is shown.

    Attributes:
        lengths: (S, T).
        useful: measured share of positions that hold tokens: (inputs, targets).
        planned: the same, as the plan has it.
        natural_targets_length: the T that would be as full as inputs are.
        note: why no documents are followed, or "".
    """

    config: DatasetConfig
    vocabulary: AnyVocabulary
    lengths: tuple[int, int]
    tasks: list[Task]
    rows: list[Row]
    useful: tuple[float, float]
    planned: tuple[float, float]
    natural_targets_length: int
    note: str

    @property
    def legend(self) -> str:
        """What the shares are."""
        return (
            "Share of a task: of all examples; of a denoiser: of its task's input tokens; of a set: of its task's"
            " examples. Mean lengths in tokens."
        )


def gather(config: DatasetConfig, vocabulary: AnyVocabulary, n: int) -> Preview:
    """Look at a mixture, which is cached first where it is not.

    Args:
        config: the mixture; `module` None leaves out what needs seqio, the documents on their way.
        n: rows of the training sequence.

    Raises:
        UserError: as `open_dataset`.
    """
    dataset = open_dataset(dataclasses.replace(config, num_workers=0), vocabulary)
    rows = [Row(*_row(dataset, place)) for place in range(n)]
    followed, note = _follow(config, vocabulary)
    tasks = list(_tasks(dataset, followed))
    totals = [sum(int(getattr(task.whole, side).sum()) for task in tasks) for side in ("inputs", "targets")]
    useful = totals[0] / (SAMPLE * dataset.lengths[0]), totals[1] / (SAMPLE * dataset.lengths[1])
    natural = dataset.natural_targets_length
    return Preview(config, vocabulary, dataset.lengths, tasks, rows, useful, dataset.fill, natural, note)


def _row(dataset: Dataset, place: int) -> tuple[str, int, Sequence[Segment]]:
    task, segments = dataset.segments(place)
    return task, place, segments


def _measure(dataset: Dataset) -> list[np.ndarray]:
    """For each of `dataset.source_names` int [K, 3]: text, inputs, targets of its segments in the first rows."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in dataset.source_names]
    for place in range(SAMPLE):
        for segment in dataset.segments(place)[1]:
            text = 0 if segment.text is None else len(segment.text)
            found[segment.source - 1].append((text, len(segment.inputs), len(segment.targets)))
    return [np.array(lengths, int).reshape(-1, 3) for lengths in found]


def _tasks(dataset: Dataset, followed: dict[str, list[dict[str, Any]]]) -> Iterator[Task]:
    measured = _measure(dataset)
    examples = sum(map(len, measured))
    for name, rows in dataset.tasks.items():
        mine, measured = measured[: len(rows.sources)], measured[len(rows.sources) :]
        whole = np.concatenate(mine)
        denoised = isinstance(rows, WindowRows)
        parts = []
        if rows.sources != (name,):
            shares = [lengths[:, 1].sum() if denoised else len(lengths) for lengths in mine]
            names = [source.removeprefix(f"{name}/") for source in rows.sources]
            for part, nominal, share, lengths in zip(names, _nominal(rows), shares, mine, strict=True):
                parts.append(Source(part, nominal, float(share / max(sum(shares), 1)), *lengths.T))
        if not denoised:
            parts.sort(key=lambda part: -part.nominal)
        yield Task(
            Source(name, dataset.example_rates[name], len(whole) / examples, *whole.T),
            parts,
            denoised,
            rows.store.manifest,
            rows.store.lengths("targets"),
            [_journey(name, rows, document) for document in followed.get(name, [])],
        )


def _nominal(rows: Rows) -> list[float]:
    """The share of each of `rows.sources`."""
    if isinstance(rows, WindowRows):
        return [denoiser.weight for denoiser in rows.plan.denoisers]
    assert rows.store.names is not None
    ids, names = rows.store.names
    return (np.bincount(ids, minlength=len(names)) / len(ids)).tolist()


# ---- documents on their way ------------------------------------------------------------------------------------------


def _follow(config: DatasetConfig, vocabulary: AnyVocabulary) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """What `preview_raw.follow` gives; nothing, and why, where it cannot run."""
    if config.module is None:
        return {}, "Documents are not followed from their source: no module of tasks was named."
    if importlib.util.find_spec("seqio") is None:
        return {}, f"Documents are not followed from their source: {NEEDS_SEQIO}."
    arguments = {
        "mixture_or_task": config.mixture_or_task_name,
        "module": config.module,
        "split": config.split,
        "vocabulary_file": vocabulary.source,
        "extra_ids": vocabulary.extra_ids,
    }
    return json.loads(seqio_process.run("vikhr_t5.data.preview_raw", arguments)), ""


def _journey(task: str, rows: Rows, document: dict[str, Any]) -> Journey:
    stages: list[Stage] = []
    for name, examples, number in document["stages"]:
        changed = not stages or _values(examples) != _values(stages[-1].examples)
        stages.append(Stage(name, examples, number, changed))
    row = None if document["dropped"] else _row_of(rows, stages[-1].examples[0])
    return Journey(stages, document["dropped"], None if row is None else Row(task, None, rows.segments(0, row)))


def _values(examples: Iterable[dict[str, Any]]) -> list[list[Any]]:
    return [list(example.values()) for example in examples]


def _row_of(rows: Rows, example: dict[str, Any]) -> int | None:
    """The row of epoch 0 where the example's first token stands; None where its tokens are not among the store's first
    (its preprocessors are random, say), or in the part of the text after the last row."""
    index = _index(rows.store, example)
    if index is None:
        return None
    if isinstance(rows, WindowRows):
        row = rows.plan.num_rows(int(rows.store.lengths("targets")[:index].sum()))
        return row if row < rows.num_rows else None
    assert isinstance(rows, ExampleRows)
    place = int(np.flatnonzero(rows.plan.order == index)[0])
    return int(np.searchsorted(rows.plan.bounds, place, side="right")) - 1


def _index(store: TokenStore, example: dict[str, Any]) -> int | None:
    """The place in the store of an example with these tokens."""
    for index in range(min(SEARCHED, len(store))):
        if all(np.array_equal(tokens, example[name]) for name, tokens in store.example(index).items()):
            return index
    return None


# ---- in words --------------------------------------------------------------------------------------------------------


class Pieces:
    """What ids are: for showing them one by one."""

    def __init__(self, vocabulary: AnyVocabulary):
        self.vocabulary = vocabulary
        self._modes = {vocabulary.mode_id(token) for token in vocabulary.mode_tokens}

    def __call__(self, token: int) -> tuple[str, str]:
        """(kind, text) of an id: "sentinel" and its number, "mode", "end", or "piece" with "▁" for a space."""
        if token >= self.vocabulary.last_sentinel:
            return "sentinel", str(self.vocabulary.first_sentinel - token)
        if token == self.vocabulary.eos_id:
            return "end", "</s>"
        return "mode" if token in self._modes else "piece", self.vocabulary.piece(token)


def segment_title(segment: Segment) -> str:
    """What was done to a window, in words; "example" for an example."""
    denoiser = segment.denoiser
    if segment.text is None or denoiser is None:
        return "example"
    hides = "the end, " if denoiser.mean_span is None else f"spans of {denoiser.mean_span:g}, "
    return f"{denoiser.name} hides {hides}{denoiser.rate:.0%} of {len(segment.text)} tokens"


def cut(text: str, head: int, tail: int = 0) -> str:
    """A long text without its middle."""
    left_out = len(text) - head - tail
    return text if left_out <= tail else f"{text[:head]} … {left_out:,} more characters … {text[len(text) - tail :]}"
