"""The token store: a cached task as memory-mapped Arrow files, read without TensorFlow.

    <cache_dir>/tasks/<task>/<split>/manifest.json
    <cache_dir>/tasks/<task>/<split>/shard-00000-of-00004.arrow
    <cache_dir>/mixtures/<name>.json

A shard is an uncompressed Arrow IPC file with one `large_list<int32>` column per feature and, where the task's
preprocessors tell which task an example comes from, a column of strings `task_name`. A split's folder appears as
a whole, by a rename, so a folder with a manifest is complete. `mixtures/<name>.json` says which tasks a name stands
for, at what rates and with which metric functions; a task alone is a mixture of itself. `vikhr_t5.data.cache` writes
all of this.

Letters: N examples.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vikhr_t5.data import seqio_process
from vikhr_t5.data.manifest import NEEDS_SEQIO, Manifest, Shard, TaskMetrics, provenance_from_json
from vikhr_t5.data.module_files import file_digest
from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import atomic_path

MANIFEST = "manifest.json"
TASK_NAME = "task_name"  # the column, and the feature of an example that it is made of
# Tokens of the widest feature in one record batch; a slice inside a batch is read without a copy.
BATCH_TOKENS = 1 << 22


class CacheMissing(UserError):
    """A task or mixture is not cached, or not this split of it."""


class CacheStale(UserError):
    """What is cached was made from something that has changed since."""


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Column:
    """One feature: per record batch its tokens, where in them each example starts (one more than examples), and where
    the batch starts in the concatenation of all (one more than batches)."""

    values: list[np.ndarray]
    offsets: list[np.ndarray]
    starts: list[int]


class _MappedFile:
    """A shard, mapped into memory. The disk is read where it is touched and nowhere else: rows are taken from random
    places, and around each of them the kernel would read ahead, 128 kB or, as some machines are set, megabytes."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._map.madvise(mmap.MADV_RANDOM)
        self._whole = pa.py_buffer(self._map)
        self.reader = pa.ipc.open_file(pa.BufferReader(self._whole))

    def batches(self) -> list[pa.RecordBatch]:
        return [self.reader.get_batch(number) for number in range(self.reader.num_record_batches)]

    def will_need(self, part: pa.Buffer) -> None:
        """A part is going to be read as a whole: read it in large pieces."""
        start = (part.address - self._whole.address) // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, start, part.address + part.size - self._whole.address - start)


class TokenStore:
    """One split of one cached task; memory-mapped, picklable (a worker process opens the files itself).

    Args:
        directory: `<cache_dir>/tasks/<task>/<split>`.
    Raises:
        CacheMissing: there is no manifest. CacheStale: it cannot be read, or a shard is missing or cut short.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        path = self.directory / MANIFEST
        try:
            self.manifest = Manifest.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CacheMissing(f"{self.directory} holds no cached split: there is no {MANIFEST}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CacheStale(f"{path} cannot be read ({error}): cache the task again") from None
        for shard in self.manifest.shards:
            file = self.directory / shard.file
            size = file.stat().st_size if file.exists() else 0
            if size != shard.num_bytes:
                raise CacheStale(f"{file} has {size} bytes instead of {shard.num_bytes}: cache the task again")

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        return TokenStore, (self.directory,)

    def __len__(self) -> int:
        return self.manifest.num_examples

    @property
    def fingerprint(self) -> str:
        """sha256 hex of the tokens, the vocabulary and the transform; equal for equal data wherever it was cached."""
        m = self.manifest
        vocabularies = {name: feature.vocabulary for name, feature in m.features.items()}
        content: list[Any] = [m.task, m.split, vocabularies, m.transform, [shard.digest for shard in m.shards]]
        if m.eos_after_trim:
            content.append("eos_after_trim")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def num_tokens(self, feature: str) -> int:
        """Tokens of all examples together."""
        return self.manifest.num_tokens[feature]

    def lengths(self, feature: str) -> np.ndarray:
        """Tokens of each example, int32 [N]; reads as many numbers."""
        for file in self._files:
            for batch in file.batches():
                file.will_need(batch.column(feature).offsets.buffers()[1])
        lengths = [np.diff(offsets).astype(np.int32) for offsets in self._columns[feature].offsets]
        return np.concatenate([np.empty(0, np.int32), *lengths])

    @functools.cached_property
    def names(self) -> tuple[np.ndarray, tuple[str, ...]] | None:
        """Which task each example comes from, where the preprocessors told it: int32 [N] places in the sorted names."""
        if TASK_NAME not in self._files[0].reader.schema.names:
            return None
        column = pa.chunked_array([batch.column(TASK_NAME) for batch in self._batches], pa.string())
        encoded = column.combine_chunks().dictionary_encode()
        found = encoded.dictionary.to_pylist()
        order = sorted(range(len(found)), key=found.__getitem__)
        ranks = np.empty(len(found), np.int32)
        ranks[order] = np.arange(len(found))
        return ranks[encoded.indices.to_numpy()], tuple(found[place] for place in order)

    def example(self, index: int) -> dict[str, np.ndarray]:
        """One example: feature -> int32 tokens (read-only)."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} in {self.directory}")
        batch = bisect.bisect_right(self._first_examples, index) - 1
        place, example = index - self._first_examples[batch], {}
        for name, column in self._columns.items():
            start, stop = column.offsets[batch][place : place + 2]
            example[name] = column.values[batch][start:stop]
        return example

    def tokens(self, feature: str, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the concatenation of all examples in store order: int32, read-only, and not copied
        unless they lie in two record batches."""
        column = self._columns[feature]
        if not 0 <= start <= stop <= column.starts[-1]:
            raise IndexError(f"tokens [{start}, {stop}) of {column.starts[-1]} in {self.directory}")
        if start == stop:
            return np.empty(0, np.int32)
        batch = bisect.bisect_right(column.starts, start) - 1
        first = column.starts[batch]
        if stop <= column.starts[batch + 1]:
            return column.values[batch][start - first : stop - first]
        parts = [column.values[batch][start - first :]]
        while column.starts[batch + 1] < stop:
            batch += 1
            parts.append(column.values[batch][: stop - column.starts[batch]])
        return np.concatenate(parts)

    @functools.cached_property
    def _files(self) -> list[_MappedFile]:
        return [_MappedFile(self.directory / shard.file) for shard in self.manifest.shards]

    @functools.cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return [batch for file in self._files for batch in file.batches()]

    @functools.cached_property
    def _columns(self) -> dict[str, _Column]:
        columns = {}
        for name in self.manifest.features:
            lists = [batch.column(name) for batch in self._batches]
            values = [column.values.to_numpy() for column in lists]
            offsets = [column.offsets.to_numpy() for column in lists]
            columns[name] = _Column(values, offsets, [0, *itertools.accumulate(map(len, values))])
        return columns

    @functools.cached_property
    def _first_examples(self) -> list[int]:
        """Of each record batch the first example's number."""
        return [0, *itertools.accumulate(batch.num_rows for batch in self._batches)][:-1]


# ---- writing ---------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes one shard; the file appears when the `with` block ends without an exception.

        with ShardWriter(path, ("inputs", "targets")) as writer:
            writer.write({"inputs": (tokens, lengths), "targets": (tokens, lengths)})
        shard = writer.shard(skipped_lines=0)

    `tokens` are the examples' tokens one after another, `lengths` int [n] cuts them; n is the same for all features.
    With `named`, each write also has the n names of the tasks that the examples come from.
    """

    def __init__(self, path: str | os.PathLike[str], features: tuple[str, ...], named: bool = False):
        self.path = Path(path)
        self.num_examples, self.num_tokens = 0, dict.fromkeys(features, 0)
        self._names: list[str] | None = [] if named else None
        names = [(TASK_NAME, pa.string())] if named else []
        self._schema = pa.schema([*((name, pa.large_list(pa.int32())) for name in features), *names])
        self._digest = hashlib.sha256()
        self._pending: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in features}
        self._flushed = dict(self.num_tokens)

    def __enter__(self) -> "ShardWriter":
        self._stack = contextlib.ExitStack()
        self._temporary = self._stack.enter_context(atomic_path(self.path))
        self._writer = self._stack.enter_context(pa.ipc.new_file(str(self._temporary), self._schema))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is None:
            self._flush()
        return self._stack.__exit__(*error)

    def write(self, columns: Mapping[str, tuple[np.ndarray, np.ndarray]], names: Sequence[str] | None = None) -> None:
        """Append n examples: feature -> (tokens [sum of lengths], lengths [n]); `names` [n] where they are named."""
        counts = {len(columns[name][1]) for name in self.num_tokens}
        if self._names is not None:
            counts.add(len(names or ()))
            self._names += names or ()
        if len(counts) != 1:
            raise ValueError(f"features of different numbers of examples: {counts}")
        self.num_examples += counts.pop()
        for name, pending in self._pending.items():
            tokens = np.ascontiguousarray(columns[name][0], np.int32)
            lengths = np.ascontiguousarray(columns[name][1], np.int64)
            if int(lengths.sum()) != len(tokens):
                raise ValueError(f"{name}: lengths add to {lengths.sum()} and there are {len(tokens)} tokens")
            pending.append((tokens, lengths))
            self.num_tokens[name] += len(tokens)
        if max(self.num_tokens[name] - self._flushed[name] for name in self._flushed) >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        arrays = []
        for name, pending in self._pending.items():
            if not pending:
                return
            tokens = np.concatenate([part for part, _ in pending])
            lengths = np.concatenate([part for _, part in pending])
            self._digest.update(lengths)
            self._digest.update(tokens)
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            arrays.append(pa.LargeListArray.from_arrays(offsets, tokens))
            pending.clear()
            self._flushed[name] = self.num_tokens[name]
        if self._names is not None:
            arrays.append(pa.array(self._names, pa.string()))
            self._digest.update("\0".join(self._names).encode())
            self._names.clear()
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))

    def shard(self, skipped_lines: int, num_read: int = 0, dropped: Mapping[str, int] | None = None) -> Shard:
        """The manifest's record of the finished file."""
        return Shard(
            self.path.name,
            self.num_examples,
            self.num_tokens,
            self.path.stat().st_size,
            self._digest.hexdigest(),
            skipped_lines,
            num_read,
            dict(dropped or {}),
        )


# ---- opening by name -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CachedMixture:
    """The stores of a mixture's tasks (one split), their rates, unnormalised, and their metrics, in the same order."""

    name: str
    stores: dict[str, TokenStore]
    rates: dict[str, float]
    metrics: dict[str, TaskMetrics]


def task_directory(cache_dir: str | os.PathLike[str], task: str, split: str) -> Path:
    return Path(cache_dir) / "tasks" / task / split


def mixture_file(cache_dir: str | os.PathLike[str], name: str) -> Path:
    return Path(cache_dir) / "mixtures" / f"{name}.json"


def open_cached(
    cache_dir: str | os.PathLike[str], mixture_or_task: str, split: str, vocabulary_fingerprint: str | None = None
) -> CachedMixture:
    """Open one split of a cached task or mixture. A mixture's tasks that lack the split are left out, as in seqio.

    Args:
        vocabulary_fingerprint: `Vocabulary.fingerprint()` of the run; None skips this check.
    Raises:
        CacheMissing: not cached (names what is). CacheStale: made from what has changed since (names it).
        UserError: no task of it has such a split (names those that exist).
    """
    path = mixture_file(cache_dir, mixture_or_task)
    if not path.exists():
        hint = nearest(mixture_or_task, [p.stem for p in path.parent.glob("*.json")])
        raise CacheMissing(
            f"{mixture_or_task} is not cached in {cache_dir} ({hint}): "
            f"run `vikhr-t5 cache --mixture {mixture_or_task} --cache_dir {cache_dir}`"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    if reason := provenance_from_json(record["provenance"]).change(file_digest):
        raise CacheStale(f"the cached definition of {mixture_or_task} is stale: {reason}")
    tasks = [task for task in record["rates"] if split in record["splits"][task]]
    if not tasks:
        splits = ", ".join(sorted({name for names in record["splits"].values() for name in names}))
        raise UserError(f"{mixture_or_task} has no split {split!r}; it has: {splits}")
    stores = {task: TokenStore(task_directory(cache_dir, task, split)) for task in tasks}
    for task, store in stores.items():
        if reason := store.manifest.stale_reason(vocabulary_fingerprint):
            raise CacheStale(f"the cache of {task}/{split} in {cache_dir} is stale: {reason}")
    found = {task: record.get("metrics", {}).get(task, {}) for task in tasks}  # earlier versions kept none
    metrics = {
        task: TaskMetrics(**{kind: tuple(names) for kind, names in kinds.items()}) for task, kinds in found.items()
    }
    return CachedMixture(mixture_or_task, stores, {task: record["rates"][task] for task in tasks}, metrics)


def ensure_cached(
    cache_dir: str | os.PathLike[str],
    mixture_or_task: str,
    split: str,
    module: str | None,
    vocabulary: AnyVocabulary,
    num_workers: int = 0,
) -> CachedMixture:
    """`open_cached`, but what is missing or stale is cached first, by a subprocess (it needs TensorFlow, this process
    does not) whose progress shows on stderr.

    Args:
        module: the Python module that registers the task (e.g. "tasks.demo"); None: only what is cached can be opened.
        num_workers: processes that cache; 0 = one per core.
    Raises:
        UserError: as `open_cached`, and what stopped the subprocess.
    """
    try:
        return open_cached(cache_dir, mixture_or_task, split, vocabulary.fingerprint())
    except (CacheMissing, CacheStale) as error:
        if module is None:
            raise type(error)(f"{error}; or set MIXTURE_OR_TASK_MODULE to the module that registers it") from None
        reason = str(error) if isinstance(error, CacheStale) else f"{mixture_or_task}/{split} is not cached yet"
        if importlib.util.find_spec("seqio") is None:
            raise UserError(f"{reason}; {NEEDS_SEQIO}") from error
        print(f"{reason}: caching it now", file=sys.stderr, flush=True)
    arguments = {
        "mixture_or_task": mixture_or_task,
        "module": module,
        "cache_dir": os.fspath(cache_dir),
        "vocabulary_file": vocabulary.source,
        "extra_ids": vocabulary.extra_ids,
        "num_workers": num_workers,
    }
    seqio_process.run("vikhr_t5.data.cache", arguments)
    return open_cached(cache_dir, mixture_or_task, split, vocabulary.fingerprint())
