"""From token stores to batches. The whole position is a step number.

B rows in a global batch, S inputs length, T targets length.

Batch s holds the places s·B … s·B+B-1 of one endless sequence of rows. Which row stands at a place is arithmetic: the
mixture says which task and how many of its rows came before, hence the epoch; a keyed permutation says which row of
that epoch; the row's contents depend on (seed, epoch, row). So a resume costs nothing and is exact, and so is a run on
another number of hosts: each takes its rows of the same batch. Grain runs it ahead of the training step.
"""

import atexit
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence

import grain
import numpy as np
from absl import flags

from vikhr_t5.data import denoisers
from vikhr_t5.data.denoisers import Codes, Denoiser
from vikhr_t5.data.manifest import TaskMetrics
from vikhr_t5.data.mixing import Interleaving, apportion
from vikhr_t5.data.rows import Batch, ExampleRows, Rows, Segment, WindowRows, empty_batch
from vikhr_t5.data.store import CachedMixture, TokenStore, ensure_cached
from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.errors import UserError

MIXING_CYCLE = 1 << 16  # rows after which the sequence of tasks repeats; a task's rate is met to about one in so many
STEPS_AHEAD = 2  # batches that each process makes before they are asked for


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """What to train or evaluate on; the first arguments are t5x's.

    Attributes:
        mixture_or_task_name: a seqio mixture or task.
        task_feature_lengths: {"inputs": S, "targets": T}.
        split: of every task.
        batch_size: rows in a global batch.
        shuffle: False for rows in the order of the store.
        seed: of row order and corruption; None is 0.
        use_cached: t5x's; either way the tokens come from the token store, which is made first where it is missing.
        pack: False for one window or example in a row.
        module: the Python module that registers the task, imported only to cache it.
        cache_dir: where token stores are.
        denoisers: instead of those of the denoised tasks: a mixture's name, or denoisers.
        num_workers: processes that make batches; 0 for a thread of this one.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    split: str
    batch_size: int
    shuffle: bool = True
    seed: int | None = None
    use_cached: bool = True
    pack: bool = True
    module: str | None = None
    cache_dir: str = "cache"
    denoisers: str | Sequence[Denoiser] | None = None
    num_workers: int = 0


class Dataset:
    """Batches of a mixture.

    Attributes:
        config: what it was opened with.
        tasks: the rows of each task, by name.
        source_names: `decoder_source_ids` == i + 1 stands for `source_names[i]`: a task, "task/denoiser", or
            "task/name" where a task's examples are named.
        example_rates: the share of examples of each task, by name.
        metrics: the metric functions of each task, by name.
        fingerprint: sha256 hex of all that decides what batch s holds; goes into checkpoints.
    """

    def __init__(
        self,
        config: DatasetConfig,
        tasks: Mapping[str, Rows],
        rates: Mapping[str, float],
        metrics: Mapping[str, TaskMetrics],
        fingerprint: str,
    ):
        self.metrics = dict(metrics)
        self.config, self.tasks, self.fingerprint = config, dict(tasks), fingerprint
        self.batch_size = config.batch_size
        self.lengths = _lengths(config)
        self.source_names = tuple(name for rows in tasks.values() for name in rows.sources)
        self._rates = {task: rates[task] for task in tasks}
        self.example_rates = _normalized(self._rates)

    def pack(self) -> None:
        """Finds which examples share a row, unless an earlier run left that beside the store; else first use does."""
        for rows in self.tasks.values():
            _ = rows.num_rows

    @functools.cached_property
    def row_rates(self) -> dict[str, float]:
        """The share of rows of each task, by name: a row holds several examples, and seqio's rates count examples."""
        return _normalized({task: rate / self.tasks[task].examples_per_row for task, rate in self._rates.items()})

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows in an epoch of each task."""
        return {task: rows.num_rows for task, rows in self.tasks.items()}

    @property
    def fill(self) -> tuple[float, float]:
        """Expected share of useful tokens: (inputs, targets)."""
        fills = [(rate, self.tasks[task].fill) for task, rate in self.row_rates.items()]
        return sum(rate * fill[0] for rate, fill in fills), sum(rate * fill[1] for rate, fill in fills)

    @property
    def natural_targets_length(self) -> int:
        """The T that would be about as full as inputs are, at this S."""
        inputs, targets = self.fill
        return round(self.lengths[1] * targets / inputs)

    @functools.cached_property
    def order(self) -> "TrainingOrder":
        """Which row stands where in the endless sequence."""
        return TrainingOrder(self)

    def segments(self, place: int) -> tuple[str, list[Segment]]:
        """The task and the contents of the row at `place` of the endless sequence."""
        task, epoch, row = self.order[place]
        name = list(self.tasks)[task]
        return name, self.tasks[name].segments(epoch, row)

    def batches(
        self, start_step: int = 0, rows: Sequence[int] | None = None, num_steps: int | None = None
    ) -> grain.DatasetIterator[Batch]:
        """Training batches from `start_step` on, without end or `num_steps` of them. Close the iterator after use.

        Args:
            rows: of each batch, those that this host makes; None: all.
        """
        stop = sys.maxsize if num_steps is None else start_step + num_steps
        return self._iterate(self.order, range(start_step, stop), rows)

    def eval_batches(
        self, num_steps: int | None = None, rows: Sequence[int] | None = None
    ) -> grain.DatasetIterator[Batch]:
        """Every row once, tasks evenly interleaved, always in the same order; the last batch is filled with padding.

        Args:
            num_steps: stop after so many batches.
            rows: as in `batches`.
        """
        steps = -(-sum(self.num_rows.values()) // self.batch_size)
        steps = steps if num_steps is None else min(steps, num_steps)
        return self._iterate(OnePass(list(self.num_rows.values())), range(steps), rows)

    def _iterate(
        self, order: "TrainingOrder | OnePass", steps: range, rows: Sequence[int] | None
    ) -> grain.DatasetIterator[Batch]:
        rows = range(self.batch_size) if rows is None else list(map(int, rows))
        make = _MakeBatch(order, list(self.tasks.values()), self.batch_size, rows, self.lengths)
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=STEPS_AHEAD)
        batches = grain.MapDataset.range(steps.start, steps.stop).map(make).to_iter_dataset(ahead)
        if self.config.num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's processes read absl flags, which our command line does not use
            processes = grain.MultiprocessingOptions(self.config.num_workers, per_worker_buffer_size=STEPS_AHEAD)
            batches = batches.mp_prefetch(processes, _end_with_parent).map(_out_of_shared_memory)
        iterator = iter(batches)
        _OPEN.add(iterator)
        return iterator


class TrainingOrder:
    """Which (task, epoch, row) stands at a place of the endless sequence."""

    def __init__(self, dataset: Dataset):
        self.rows, self.shuffle = list(dataset.tasks.values()), dataset.config.shuffle
        counts = apportion(list(dataset.row_rates.values()), MIXING_CYCLE)
        self.tasks = Interleaving(counts.clip(min=1))

    def __getitem__(self, place: int) -> tuple[int, int, int]:
        task, before = self.tasks[place]
        epoch, row = divmod(before, self.rows[task].num_rows)
        return task, epoch, self.rows[task].shuffled(epoch, row) if self.shuffle else row


class OnePass:
    """Which (task, epoch 0, row) stands at a place of a single pass over all rows; None past its end."""

    def __init__(self, num_rows: Sequence[int]):
        self.tasks, self.end = Interleaving(num_rows), sum(num_rows)

    def __getitem__(self, place: int) -> tuple[int, int, int] | None:
        if place >= self.end:
            return None
        task, row = self.tasks[place]
        return task, 0, row


@dataclasses.dataclass(frozen=True)
class _MakeBatch:
    """Step number -> this host's rows of its batch, which has `batch_size`."""

    order: TrainingOrder | OnePass
    tasks: Sequence[Rows]
    batch_size: int
    rows: Sequence[int]
    lengths: tuple[int, int]

    def __call__(self, step: int) -> Batch:
        batch = empty_batch(len(self.rows), *self.lengths)
        for place, of_batch in enumerate(self.rows):
            address = self.order[step * self.batch_size + of_batch]
            if address is not None:
                task, epoch, row = address
                self.tasks[task].write(batch, place, epoch, row)
        return batch


def _end_with_parent(index: int, count: int) -> None:
    """Run in each process of Grain's: a killed training run must not leave it waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    atexit.register(os._exit, 0)  # Grain's iterators complain when Python takes its modules away from them


def _out_of_shared_memory(batch: Batch) -> Batch:
    """A copy that outlives the process that made the batch."""
    return {feature: np.array(values) for feature, values in batch.items()}


# Threads and processes that still make batches when Python ends must be stopped before its modules are gone.
_OPEN: weakref.WeakSet[grain.DatasetIterator[Batch]] = weakref.WeakSet()
atexit.register(lambda: [iterator.close() for iterator in list(_OPEN)])


def open_dataset(config: DatasetConfig, vocabulary: AnyVocabulary) -> Dataset:
    """Opens what `config` names; a task that is not cached is cached first, by a subprocess.

    Raises:
        UserError: unknown mixture or split, lengths missing or too short for a denoiser, too few sentinels, or a text
            shorter than one row.
    """
    lengths = _lengths(config)
    if config.batch_size < 1:
        raise UserError(f"batch size is {config.batch_size}: set BATCH_SIZE to 1 or more")
    cached = ensure_cached(config.cache_dir, config.mixture_or_task_name, config.split, config.module, vocabulary)
    mixtures = {task: _denoisers(config, store) for task, store in cached.stores.items()}
    if config.denoisers is not None and not any(mixtures.values()):
        raise UserError(f"denoisers are given, and {cached.name} has no task of text to denoise: leave them out")
    tasks: dict[str, Rows] = {}
    source, seed = 1, config.seed or 0
    for task, store in cached.stores.items():
        if mixture := mixtures[task]:
            codes = Codes.of(vocabulary, mixture)
            tasks[task] = WindowRows(store, mixture, codes, lengths, seed, source, config.pack)
        else:
            tasks[task] = ExampleRows(store, lengths, seed, source, config.pack)
        source += len(tasks[task].sources)
    return Dataset(config, tasks, cached.rates, cached.metrics, _fingerprint(config, cached, mixtures))


def _lengths(config: DatasetConfig) -> tuple[int, int]:
    lengths = config.task_feature_lengths
    if set(lengths) != {"inputs", "targets"} or min(lengths.values()) < 1:
        raise UserError(f'TASK_FEATURE_LENGTHS is {dict(lengths)}; it must be like {{"inputs": 512, "targets": 240}}')
    return lengths["inputs"], lengths["targets"]


def _denoisers(config: DatasetConfig, store: TokenStore) -> tuple[Denoiser, ...]:
    """The task's denoisers, or none where it is supervised."""
    if config.denoisers is not None and "inputs" not in store.manifest.features:
        return denoisers.mixture(config.denoisers)
    return denoisers.from_json(store.manifest.transform) if store.manifest.transform else ()


def _normalized(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _fingerprint(config: DatasetConfig, cached: CachedMixture, mixtures: Mapping[str, tuple[Denoiser, ...]]) -> str:
    content = {
        "stores": {task: store.fingerprint for task, store in cached.stores.items()},
        "rates": cached.rates,
        "denoisers": {task: denoisers.to_json(mixture) for task, mixture in mixtures.items()},
        "lengths": _lengths(config),
        "batch_size": config.batch_size,
        "shuffle": config.shuffle,
        "seed": config.seed or 0,
        "pack": config.pack,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
