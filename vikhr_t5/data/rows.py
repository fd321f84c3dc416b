"""One packed row: the tokens of several windows or examples, and where each of them lies.

B rows, S inputs length, T targets length. Features (int32; 0 is padding), for the windows `a b c | d` and `e | f`:

    encoder_input_tokens    [B, S]   a b <0> EOS   e <0> EOS   0    segments one after another from the left
    encoder_segment_ids     [B, S]   1 1 1   1     2 2   2     0    from 1; attention stays inside a segment
    encoder_positions       [B, S]   0 1 2   3     0 1   2     0    from 0 in each segment
    decoder_target_tokens   [B, T]   <0> c EOS     <0> f EOS   0
    decoder_input_tokens    [B, T]   0 <0> c       0 <0> f     0    targets shifted right inside each segment
    decoder_loss_weights    [B, T]   1 1 1         1 1 1       0
    decoder_segment_ids     [B, T]   1 1 1         2 2 2       0
    decoder_positions       [B, T]   0 1 2         0 1 2       0
    decoder_source_ids      [B, T]   3 3 3         5 5 5       0    task or denoiser, from 1; for metrics alone

The names are those of seqio's `EncDecFeatureConverter`, `decoder_source_ids` apart.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from vikhr_t5.data import denoisers
from vikhr_t5.data.denoisers import Codes, Denoiser
from vikhr_t5.data.mixing import digest, key, permuted
from vikhr_t5.data.packing import ExamplePlan, WindowPlan, plan_examples, plan_windows
from vikhr_t5.data.store import TokenStore
from vikhr_t5.errors import UserError
from vikhr_t5.files import atomic_path

ENCODER_FEATURES = ("encoder_input_tokens", "encoder_segment_ids", "encoder_positions")
DECODER_FEATURES = (
    "decoder_target_tokens",
    "decoder_input_tokens",
    "decoder_loss_weights",
    "decoder_segment_ids",
    "decoder_positions",
    "decoder_source_ids",
)
GOLDEN_RATIO = (5**0.5 - 1) / 2

Batch = dict[str, np.ndarray]


def empty_batch(rows: int, inputs_length: int, targets_length: int) -> Batch:
    """A batch of padding: int32 [rows, S] encoder features, [rows, T] decoder features."""
    lengths = dict.fromkeys(ENCODER_FEATURES, inputs_length) | dict.fromkeys(DECODER_FEATURES, targets_length)
    return {feature: np.zeros((rows, length), np.int32) for feature, length in lengths.items()}


class Segment(NamedTuple):
    """One window or example of a row: what it was made of (None for an example), what the model sees, and the source
    id of its target tokens."""

    text: np.ndarray | None
    denoiser: Denoiser | None
    inputs: np.ndarray
    targets: np.ndarray
    source: int


class Layout:
    """Where the segments of a row lie: all of a row but its tokens. Rows of one template share it.

    Args:
        lengths: (inputs, targets) of each segment.
        sources: the source id of each segment.
        inputs_length: S.
        targets_length: T.
    """

    def __init__(
        self, lengths: Sequence[tuple[int, int]], sources: Sequence[int], inputs_length: int, targets_length: int
    ):
        self.inputs = _slices([inputs for inputs, _ in lengths])
        self.targets = _slices([targets for _, targets in lengths])
        row = empty_batch(1, inputs_length, targets_length)
        for side, slices in (("encoder", self.inputs), ("decoder", self.targets)):
            for segment, at in enumerate(slices, start=1):
                row[f"{side}_segment_ids"][0, at] = segment
                row[f"{side}_positions"][0, at] = np.arange(at.stop - at.start)
        for source, at in zip(sources, self.targets, strict=True):
            row["decoder_source_ids"][0, at] = source
        row["decoder_loss_weights"][0] = row["decoder_segment_ids"][0] > 0
        self._arrays = {feature: values[0] for feature, values in row.items() if not feature.endswith("_tokens")}

    def write(self, batch: Batch, place: int, segments: Sequence[Segment]) -> None:
        """Put `segments`, of this layout's lengths, into row `place` of `batch`, which holds padding there."""
        for feature, values in self._arrays.items():
            batch[feature][place] = values
        inputs, shifted = batch["encoder_input_tokens"][place], batch["decoder_input_tokens"][place]
        targets = batch["decoder_target_tokens"][place]
        for segment, at_inputs, at_targets in zip(segments, self.inputs, self.targets, strict=True):
            inputs[at_inputs] = segment.inputs
            targets[at_targets] = segment.targets
            shifted[at_targets.start + 1 : at_targets.stop] = segment.targets[:-1]


def _slices(lengths: Sequence[int]) -> list[slice]:
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


class Rows(Protocol):
    """All rows of one task. Row `row` of epoch `epoch` depends on nothing but these two numbers and the seed."""

    store: TokenStore
    sources: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows in an epoch."""

    @property
    def examples_per_row(self) -> float:
        """Mean number of examples, or windows, in a row."""

    @property
    def fill(self) -> tuple[float, float]:
        """Mean share of positions that hold tokens: (inputs, targets)."""

    def shuffled(self, epoch: int, place: int) -> int:
        """The row at `place` of an epoch's random order."""

    def segments(self, epoch: int, row: int) -> list[Segment]:
        """The contents of a row."""

    def first(self, count: int | None) -> list[Segment]:
        """The first `count` examples in the order of the store, or windows of epoch 0; None: all."""

    def write(self, batch: Batch, place: int, epoch: int, row: int) -> None:
        """Put a row into place `place` of `batch`, which holds padding there."""


class WindowRows:
    """Rows of a denoised task: windows of the text, which goes on from one document to the next as in T5.

    The text is a ring. An epoch starts somewhere on it and its rows divide it, so that every token is used once, up to
    a last part smaller than a row; other epochs start elsewhere, so other denoisers meet other text.

    Args:
        store: holds the text as the feature `targets`.
        mixture: the denoisers.
        codes: ids of EOS, sentinels and mode tokens.
        lengths: (S, T).
        seed: of the corruption and the order.
        first_source: source id of the first denoiser.
        pack: False for one window in a row.

    Raises:
        UserError: lengths too short, too few sentinels, or a text shorter than one row.
    """

    def __init__(
        self,
        store: TokenStore,
        mixture: Sequence[Denoiser],
        codes: Codes,
        lengths: tuple[int, int],
        seed: int,
        first_source: int,
        pack: bool = True,
    ):
        denoisers.check(mixture, codes, *lengths)
        self.store, self.codes = store, codes
        self.plan: WindowPlan = plan_windows(mixture, *lengths, pack=pack)
        self.sources = tuple(f"{store.manifest.task}/{denoiser.name}" for denoiser in mixture)
        self._first_source = first_source
        self.num_tokens = store.num_tokens("targets")
        self.num_rows = self.plan.num_rows(self.num_tokens)
        if not self.num_rows:
            raise UserError(
                f"{store.manifest.task}, split {store.manifest.split!r}, holds {self.num_tokens} tokens; its first row"
                f" of {lengths[0]}/{lengths[1]} takes {self.plan.starts[1]}: shorten TASK_FEATURE_LENGTHS or add text"
            )
        self._of_template = self.plan.order.count(self.num_rows).tolist()
        self._keys = [key(seed, store.manifest.task, template) for template in range(len(self.plan.templates))]
        self._philox_key = np.frombuffer(digest(seed, store.manifest.task)[:16], np.uint64)
        self._layouts = [
            Layout(
                [(counts.inputs, counts.targets) for _, counts in template.windows],
                [first_source + part.owner for part, _ in template.windows],
                *lengths,
            )
            for template in self.plan.templates
        ]

    @property
    def examples_per_row(self) -> float:
        """Windows in a row: seqio, too, counts each corrupted window as an example."""
        return self.plan.windows_per_row

    @property
    def fill(self) -> tuple[float, float]:
        """As the plan has it."""
        return self.plan.fill

    def shuffled(self, epoch: int, place: int) -> int:
        """See `Rows`. Rows change places with rows of their own template, so every batch has the shares of the plan."""
        template, before = self.plan.order[place]
        before = permuted(before, self._of_template[template], self._keys[template] + epoch)
        return self.plan.order.place(template, before)

    def segments(self, epoch: int, row: int) -> list[Segment]:
        """See `Rows`."""
        return self._segments(epoch, row, *self.plan.locate(row))

    def first(self, count: int | None) -> list[Segment]:
        """See `Rows`."""
        windows = itertools.chain.from_iterable(self.segments(0, row) for row in range(self.num_rows))
        return list(itertools.islice(windows, count))

    def write(self, batch: Batch, place: int, epoch: int, row: int) -> None:
        """See `Rows`."""
        template, start = self.plan.locate(row)
        self._layouts[template].write(batch, place, self._segments(epoch, row, template, start))

    def _segments(self, epoch: int, row: int, template: int, start: int) -> list[Segment]:
        # Multiples of the golden ratio spread the starts of successive epochs evenly over the ring.
        start = (start + int(self.num_tokens * (epoch * GOLDEN_RATIO % 1))) % self.num_tokens
        rng = np.random.Generator(np.random.Philox(key=self._philox_key, counter=[0, 0, row, epoch]))
        segments = []
        for part, counts in self.plan.templates[template].windows:
            text = self._text(start, counts.raw)
            inputs, targets = denoisers.corrupt(text, part.denoiser, counts, rng, self.codes)
            segments.append(Segment(text, part.denoiser, inputs, targets, self._first_source + part.owner))
            start += counts.raw
        return segments

    def _text(self, start: int, length: int) -> np.ndarray:
        start %= self.num_tokens
        stop = start + length
        if stop <= self.num_tokens:
            return self.store.tokens("targets", start, stop)
        around = self.store.tokens("targets", 0, stop - self.num_tokens)
        return np.concatenate([self.store.tokens("targets", start, self.num_tokens), around])


class ExampleRows:
    """Rows of a supervised task: whole examples, each trimmed to (S, T), as many as fit.

    The examples that share a row are found once, when first asked for, and stay together in all epochs.

    Args:
        store: holds the features `inputs` and `targets`.
        lengths: (S, T).
        seed: of the order, and of which examples share a row.
        first_source: source id of the task, or of the first of the names that its examples have.
        pack: False for one example in a row.

    Raises:
        UserError: the task lacks one of the features, or has no example.
    """

    def __init__(self, store: TokenStore, lengths: tuple[int, int], seed: int, first_source: int, pack: bool = True):
        task = store.manifest.task
        if missing := {"inputs", "targets"} - set(store.manifest.features):
            raise UserError(
                f"task {task} has no feature {missing.pop()!r}, which training from inputs to targets needs:"
                " name denoisers to train on its text, or change the task"
            )
        if not len(store):
            raise UserError(f"task {task}, split {store.manifest.split!r}, has no examples: change its source or split")
        self.store, self.lengths, self._seed, self._first_source, self._pack = store, lengths, seed, first_source, pack
        self.sources: tuple[str, ...] = (task,)
        if store.names is not None:
            self.sources = tuple(f"{task}/{name}" for name in store.names[1])
        self._key = key(seed, task)

    @functools.cached_property
    def plan(self) -> ExamplePlan:
        """Which examples share a row: found once, kept beside the store and mapped. No later start reads it all."""
        if not self._pack:
            return plan_examples(self._trimmed_lengths(), *self.lengths, self._seed, pack=False)
        examples = len(self.store)
        file = self.store.directory / f"rows-{digest(self.store.fingerprint, self.lengths, self._seed).hex()[:16]}.npy"
        try:
            saved = np.load(file, mmap_mode="r")
            if saved[-1] == examples:
                return ExamplePlan(saved[:examples], saved[examples:])
        except (OSError, ValueError, EOFError):
            pass  # none, or cut short
        plan = plan_examples(self._trimmed_lengths(), *self.lengths, self._seed)
        try:
            with atomic_path(file) as temporary, open(temporary, "wb") as handle:
                np.save(handle, np.concatenate([plan.order, plan.bounds]))
        except OSError:
            pass  # a cache that may only be read: the plan is made again next time
        return plan

    @property
    def num_rows(self) -> int:
        """See `Rows`."""
        return self.plan.num_rows

    @property
    def examples_per_row(self) -> float:
        """See `Rows`."""
        return len(self.store) / self.num_rows

    @property
    def fill(self) -> tuple[float, float]:
        """See `Rows`."""
        inputs, targets = self._trimmed_lengths().sum(axis=0) / self.num_rows / self.lengths
        return float(inputs), float(targets)

    def shuffled(self, epoch: int, place: int) -> int:
        """See `Rows`."""
        return permuted(place, self.num_rows, self._key + epoch)

    def segments(self, epoch: int, row: int) -> list[Segment]:
        """See `Rows`."""
        return [self._segment(index) for index in self.plan.examples(row)]

    def first(self, count: int | None) -> list[Segment]:
        """See `Rows`."""
        return [self._segment(index) for index in range(len(self.store))[:count]]

    def write(self, batch: Batch, place: int, epoch: int, row: int) -> None:
        """See `Rows`."""
        segments = self.segments(epoch, row)
        lengths = [(len(segment.inputs), len(segment.targets)) for segment in segments]
        sources = [segment.source for segment in segments]
        Layout(lengths, sources, *self.lengths).write(batch, place, segments)

    def _segment(self, index: int) -> Segment:
        example, names = self.store.example(index), self.store.names
        sides = zip(("inputs", "targets"), self.lengths, strict=True)
        inputs, targets = (self._trimmed(side, example[side], length) for side, length in sides)
        source = self._first_source + (0 if names is None else int(names[0][index]))
        return Segment(None, None, inputs, targets, source)

    def _trimmed(self, feature: str, tokens: np.ndarray, length: int) -> np.ndarray:
        """As seqio trims: the first tokens, of which the last is EOS where the task appends it after trimming."""
        manifest = self.store.manifest
        if len(tokens) > length and manifest.eos_after_trim and manifest.features[feature].add_eos:
            return np.append(tokens[: length - 1], tokens[-1:])
        return tokens[:length]

    def _trimmed_lengths(self) -> np.ndarray:
        """int [E, 2] input and target tokens of each example."""
        return np.minimum(np.stack([self.store.lengths(side) for side in ("inputs", "targets")], axis=1), self.lengths)
