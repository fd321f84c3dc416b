"""One shard of a cached task: its part of the source through the task's preprocessors into a file."""

import contextlib
import dataclasses
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vikhr_t5.data import dedup, drops
from vikhr_t5.data.byte_vocabulary import OFFSET
from vikhr_t5.data.manifest import Shard
from vikhr_t5.data.seqio_tasks import apply_step, explained, seqio, tf
from vikhr_t5.data.store import TASK_NAME, ShardWriter
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import atomic_path, write_text_atomic

BATCH = 256  # examples taken out of TensorFlow in one call
DUPLICATE = "duplicate"  # the reason of what deduplication drops

Preprocessor = Callable[..., tf.data.Dataset]
Report = Callable[[int], None]  # called with numbers of tokens, as they are written


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """A shard to be made of the task's source.

    Attributes:
        dedup: of `vikhr_t5.data.dedup`: the documents' signatures are written beside the shard.
    """

    task: str
    split: str
    features: tuple[str, ...]
    index: int
    num_shards: int
    folder: Path
    dedup: str | None = None

    @property
    def path(self) -> Path:
        return self.folder / f"shard-{self.index:05d}-of-{self.num_shards:05d}.arrow"

    @property
    def note(self) -> Path:
        """Written after the shard: it is finished, and this is the manifest's record of it."""
        return self.path.with_suffix(".json")

    @property
    def signatures(self) -> Path:
        return self.path.with_suffix(".signatures")

    def shard(self) -> Shard:
        """What the note says."""
        return Shard(**json.loads(self.note.read_text(encoding="utf-8")))

    def run(self, report: Report) -> None:
        """Write the shard, its signatures and its note. UserError for bad data."""
        with _ONE_AT_A_TIME:
            _write_shard(self, report)


@dataclasses.dataclass(frozen=True)
class WithoutDuplicates:
    """A finished shard to be written again, into another folder, without some of its examples.

    Attributes:
        goes: a file of NumPy, bool: of which examples of all shards; `start` is the shard's first.
    """

    shard: ShardJob
    folder: Path
    goes: Path
    start: int

    @property
    def note(self) -> Path:
        return self.folder / self.shard.note.name

    def run(self, report: Report) -> None:
        """Write the shard and its note, and remove the one that it is made of."""
        was = self.shard.shard()
        goes = np.load(self.goes, mmap_mode="r")[self.start : self.start + was.num_examples]
        with pa.memory_map(str(self.shard.path)) as file:
            reader = pa.ipc.open_file(file)
            named, start = TASK_NAME in reader.schema.names, 0
            with ShardWriter(self.folder / self.shard.path.name, self.shard.features, named) as writer:
                for batch in (reader.get_batch(number) for number in range(reader.num_record_batches)):
                    kept = batch.filter(pa.array(~goes[start : start + len(batch)]))
                    start += len(batch)
                    columns = {name: _tokens_and_lengths(kept.column(name)) for name in self.shard.features}
                    writer.write(columns, kept.column(TASK_NAME).to_pylist() if named else None)
                    report(sum(len(tokens) for tokens, _ in columns.values()))
        dropped = was.dropped | ({DUPLICATE: int(goes.sum())} if goes.any() else {})
        shard = writer.shard(was.skipped_lines, was.num_read, dropped)
        write_text_atomic(self.note, json.dumps(dataclasses.asdict(shard)))
        self.shard.path.unlink()


def _tokens_and_lengths(column: pa.LargeListArray) -> tuple[np.ndarray, np.ndarray]:
    return column.flatten().to_numpy(), pc.list_value_length(column).to_numpy()


# ---- a task's preprocessors ------------------------------------------------------------------------------------------


# Both add EOS to the whole example here; where it is trimmed, the manifest says whether EOS stays.
_APPEND_EOS = (seqio.preprocessors.append_eos, seqio.preprocessors.append_eos_after_trim)


def cut(task: seqio.Task) -> tuple[list[Preprocessor], list[str], dict[str, Any] | None]:
    """The preprocessors to run before the cache, the names of those that would come after it, what does come after.

    Raises:
        UserError: one stands after what is applied later, or needs sequence_length.
    """
    steps: list[Preprocessor] = []
    frozen: list[str] = []
    transform, after_placeholder = None, False
    for step in task.preprocessors:
        name = seqio.utils.function_name(step)
        if transform is not None:
            raise UserError(f"task {task.name}: {name} follows a preprocessor that is applied after the cache")
        if isinstance(step, seqio.CacheDatasetPlaceholder):
            after_placeholder = True
        elif hasattr(step, "post_cache_transform"):
            transform = json.loads(json.dumps(step.post_cache_transform()))  # as a manifest gives it back
        else:
            length = inspect.signature(step).parameters.get("sequence_length")
            if length is not None and length.default is inspect.Parameter.empty:
                raise UserError(
                    f"task {task.name}: {name} needs sequence_length, which is not known when a task is cached; "
                    "for denoising use tasks.preprocessors.Denoise"
                )
            steps.append(step)
            if after_placeholder and step not in _APPEND_EOS:
                frozen.append(name)
    return steps, frozen, transform


# ---- a shard ---------------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """A batch of n examples: feature -> (tokens, lengths [n]); the names of their tasks, and their texts, or None."""

    columns: dict[str, tuple[np.ndarray, np.ndarray]]
    names: list[str] | None
    texts: list[bytes] | None


_ONE_AT_A_TIME = threading.Lock()  # drops and skipped lines are counted per process; Beam runs threads


def _write_shard(job: ShardJob, report: Report) -> None:
    task = seqio.TaskRegistry.get(job.task)
    skipped, dropped = getattr(task.source, "skipped_lines", 0), drops.counts()
    read = tf.Variable(0, dtype=tf.int64)
    with contextlib.ExitStack() as stack, explained():
        named, batches = _examples(task, job, read)
        writer = stack.enter_context(ShardWriter(job.path, job.features, named))
        signatures, sign = None, None
        if job.dedup is not None:
            signatures = stack.enter_context(open(stack.enter_context(atomic_path(job.signatures)), "wb"))
            sign = dedup.method(job.dedup).sign
        for columns, names, texts in batches:
            writer.write(columns, names)
            if signatures is not None and sign is not None:
                signatures.write(b"".join(sign(text).tobytes() for text in texts or ()))
            report(sum(len(values) for values, _ in columns.values()))
    shard = writer.shard(
        getattr(task.source, "skipped_lines", 0) - skipped, int(read.numpy()), dict(drops.counts() - dropped)
    )
    write_text_atomic(job.note, json.dumps(dataclasses.asdict(shard)))


def _examples(task: seqio.Task, job: ShardJob, read: tf.Variable) -> tuple[bool, Iterator[Examples]]:
    """Whether the examples name their tasks, and batches of a shard's examples. `read` counts those of the source."""
    steps, _, _ = cut(task)
    append_eos = bool(steps) and steps[-1] in _APPEND_EOS
    head = steps[:-1] if append_eos else steps
    if head[-1:] == [seqio.preprocessors.tokenize]:
        texts = _features(task, _dataset(task, head[:-1], job, read), job)
        if all((spec.dtype, spec.shape.rank) == (tf.string, 0) for spec in texts.element_spec.values()):
            return TASK_NAME in texts.element_spec, _tokenized(task, texts, append_eos, job.dedup is not None)
    if job.dedup is not None:
        raise UserError(
            f"task {task.name}: --dedup compares texts, and its preprocessors do not end with seqio.preprocessors"
            ".tokenize (and append_eos): tokenize last, or cache it without --dedup"
        )
    dataset = _features(task, _dataset(task, steps, job, read), job)
    for name, spec in dataset.element_spec.items():
        if name != TASK_NAME and (spec.dtype, spec.shape.rank) != (tf.int32, 1):
            raise UserError(f"task {task.name}: {name} is {spec.dtype.name} of rank {spec.shape.rank}, no list of ids")
    return TASK_NAME in dataset.element_spec, _token_lists(dataset)


def _features(task: seqio.Task, dataset: tf.data.Dataset, job: ShardJob) -> tf.data.Dataset:
    """The features that are cached, and the name of the task; an example may have others."""
    for name in job.features:
        if name not in dataset.element_spec:
            hint = nearest(name, dataset.element_spec)
            raise UserError(f"task {task.name}: its preprocessors give no {name!r}; {hint}")
    kept = [*job.features]
    if spec := dataset.element_spec.get(TASK_NAME):
        if (spec.dtype, spec.shape.rank) != (tf.string, 0):
            raise UserError(f"task {task.name}: {TASK_NAME} is {spec.dtype.name} of rank {spec.shape.rank}, no string")
        kept.append(TASK_NAME)
    return dataset.map(lambda example: {name: example[name] for name in kept})


def _dataset(task: seqio.Task, steps: list[Preprocessor], job: ShardJob, read: tf.Variable) -> tf.data.Dataset:
    """The examples of one shard after `steps`; random ones are seeded by the shard."""

    def count(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        read.assign_add(1)
        return example

    shard_info = seqio.ShardInfo(job.index, job.num_shards) if job.num_shards > 1 else None
    dataset = task.source.get_dataset(split=job.split, shuffle=False, shard_info=shard_info).map(count)
    with seqio.utils.map_seed_manager(job.index):
        for step in steps:
            dataset = apply_step(task, step, dataset)
    return dataset


def _tokenized(task: seqio.Task, dataset: tf.data.Dataset, append_eos: bool, keep_texts: bool) -> Iterator[Examples]:
    """What `seqio.preprocessors.tokenize` (and append_eos) give, by SentencePiece itself: four times as fast."""
    for batch in dataset.batch(BATCH).prefetch(2).as_numpy_iterator():
        names, columns = _names(batch.pop(TASK_NAME, None)), {}
        for name, strings in batch.items():
            feature = task.output_features[name]
            ids = _encoded(feature.vocabulary, strings.tolist())
            if append_eos and feature.add_eos:
                ids = [np.append(one, np.int32(feature.vocabulary.eos_id)) for one in ids]
            columns[name] = np.concatenate(ids), np.array([len(one) for one in ids])
        texts = [b"\n".join(parts) for parts in zip(*batch.values(), strict=True)] if keep_texts else None
        yield Examples(columns, names, texts)


def _encoded(vocabulary: seqio.Vocabulary, texts: list[bytes]) -> list[np.ndarray]:
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return [np.frombuffer(text, np.uint8) + np.int32(OFFSET) for text in texts]
    # The same model as in TensorFlow: seqio has put the sentinels into it.
    return vocabulary.tokenizer.encode(texts, out_type="numpy", num_threads=1)


def _token_lists(dataset: tf.data.Dataset) -> Iterator[Examples]:
    for batch in dataset.ragged_batch(BATCH).prefetch(2):
        names = batch.pop(TASK_NAME, None)
        columns = {name: _flat(tokens) for name, tokens in batch.items()}
        yield Examples(columns, _names(None if names is None else names.numpy()), None)


def _names(column: np.ndarray | None) -> list[str] | None:
    return None if column is None else [name.decode() for name in column.tolist()]


def _flat(batch: tf.Tensor | tf.RaggedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Tokens end to end, and lengths. A batch is dense where TensorFlow knows the length beforehand."""
    ragged = batch if isinstance(batch, tf.RaggedTensor) else tf.RaggedTensor.from_tensor(batch)
    return ragged.flat_values.numpy(), ragged.row_lengths().numpy()
