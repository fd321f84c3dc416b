"""From a seqio task or mixture to token stores: the only step of training that needs TensorFlow.

A task's preprocessors run up to its last but for the one that is applied after the cache (it has
`post_cache_transform`, such as `tasks.preprocessors.Denoise`). The work is cut into shards by the data alone, so the
files are the same whatever the number of processes; a finished shard is kept when the run is stopped and started again.

    vikhr-t5 cache --mixture demo_ul2 --module tasks.demo --vocabulary spiece.model --cache_dir cache
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from vikhr_t5 import __version__
from vikhr_t5.data.byte_vocabulary import OFFSET
from vikhr_t5.data.manifest import NEEDS_SEQIO, Feature, Manifest, Provenance, Shard, file_digest
from vikhr_t5.data.store import MANIFEST, ShardWriter, TokenStore, mixture_file, task_directory
from vikhr_t5.data.vocabulary import AnyVocabulary, ByteVocabulary, Vocabulary, open_vocabulary
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import atomic_path, write_text_atomic
from vikhr_t5.packages import require_own
from vikhr_t5.progress import Progress, human


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Caching needs no GPU: TensorFlow must neither take one nor warn, in C++, that there is none."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # set, not by default: JAX has set it to 1 for its subprocesses
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


with _quiet():
    try:
        import seqio
        import tensorflow as tf
    except ImportError as error:
        raise UserError(f"{NEEDS_SEQIO} ({error})") from error

MAX_SHARDS = 256
SMALL_BYTES = 64 << 20  # less is written in this process: starting another one takes as long
BATCH = 256  # examples taken out of TensorFlow in one call

Step = Callable[..., tf.data.Dataset]
Columns = dict[str, tuple[np.ndarray, np.ndarray]]  # feature -> tokens, lengths


def cache(
    mixture_or_task: str,
    module: str,
    cache_dir: str | os.PathLike[str],
    splits: Sequence[str] | None = None,
    num_workers: int = 0,
    vocabulary_file: str | None = None,
    extra_ids: int | None = None,
) -> dict[str, dict[str, Manifest]]:
    """Write the token stores of a task, or of every task of a mixture. What is there and still true is kept.

    Args:
        mixture_or_task: name in seqio's registries.
        module: the Python module that registers it; several, joined by commas.
        cache_dir: the folder of `vikhr_t5.data.store`.
        splits: all splits where None.
        num_workers: processes; 0 = one per core.
        vocabulary_file, extra_ids: for `tasks.settings`, which says what they may be; None leaves the environment as it
            is.
    Returns:
        task -> split -> manifest.
    Raises:
        UserError: unknown module, task or split; a task that cannot be cached; bad data (names file and line).
    """
    wanted = {"VIKHR_T5_VOCABULARY": vocabulary_file, "VIKHR_T5_EXTRA_IDS": extra_ids}
    os.environ.update({name: str(value) for name, value in wanted.items() if value is not None})
    import_tasks(module)
    provider = find_provider(mixture_or_task, module)
    tasks = seqio.get_subtasks(provider)
    wanted_splits = [(task, split) for task in tasks for split in task.splits if splits is None or split in splits]
    if not wanted_splits:
        known = ", ".join(sorted(provider.splits))
        raise UserError(f"{mixture_or_task} has no split {', '.join(splits or [])}; it has: {known}")
    plans = [_plan(task, split, module) for task, split in wanted_splits]
    if vocabulary_file is not None:
        for task in tasks:
            check_task_vocabulary(task, open_vocabulary(vocabulary_file, extra_ids))
    with _locked(Path(cache_dir)):
        pending = [plan for plan in plans if not plan.is_done(Path(cache_dir))]
        _write(pending, Path(cache_dir), module, num_workers or os.cpu_count() or 1)
        _write_mixtures(provider, module, Path(cache_dir))
    manifests: dict[str, dict[str, Manifest]] = {task.name: {} for task in tasks}
    for task, split in wanted_splits:
        manifests[task.name][split] = TokenStore(task_directory(cache_dir, task.name, split)).manifest
    return manifests


def import_tasks(module: str) -> None:
    """Import the modules, joined by commas, that register tasks; the current folder is searched last.

    Raises:
        UserError: there is no such module, or `tasks` is another package than vikhr-t5's.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in module.split(","):
        require_own(name)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise UserError(
                f"no Python module {name} (from {os.getcwd()}): it should register the seqio tasks; install the package"
                " that has it, or register them in a module of yours and set MIXTURE_OR_TASK_MODULE"
            ) from error


def find_provider(name: str, module: str) -> seqio.Task | seqio.Mixture:
    """A registered task or mixture. UserError with the nearest names."""
    mixtures, tasks = seqio.MixtureRegistry.names(), seqio.TaskRegistry.names()
    if name not in mixtures and name not in tasks:
        raise UserError(f"unknown task or mixture {name!r} in {module}; {nearest(name, [*mixtures, *tasks])}")
    return seqio.MixtureRegistry.get(name) if name in mixtures else seqio.TaskRegistry.get(name)


# ---- what is to be done ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One split of one task, before it is written: the manifest has no shards yet."""

    manifest: Manifest
    num_shards: int

    def folder(self, cache_dir: Path) -> Path:
        return task_directory(cache_dir, self.manifest.task, self.manifest.split)

    def is_done(self, cache_dir: Path) -> bool:
        """Whether the store is there and is what would be written."""
        try:
            found = TokenStore(self.folder(cache_dir)).manifest
        except UserError:
            return False
        same = (found.features, found.transform) == (self.manifest.features, self.manifest.transform)
        return same and found.provenance.change() is None


@dataclasses.dataclass(frozen=True)
class _Job:
    """One shard."""

    task: str
    split: str
    features: tuple[str, ...]
    index: int
    num_shards: int
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / f"shard-{self.index:05d}-of-{self.num_shards:05d}.arrow"

    @property
    def note(self) -> Path:
        """Written after the shard: it is finished, and this is the manifest's record of it."""
        return self.path.with_suffix(".json")


def _plan(task: seqio.Task, split: str, module: str) -> _Plan:
    _, frozen, transform = _cut(task)
    files = _data_files(task.source, split)
    num_shards = min(len(task.source.list_shards(split)), MAX_SHARDS)
    if not num_shards:
        raise UserError(f"{task.name}/{split} is empty: its files hold no text ({_some(files)})")
    features = {name: _feature(task.name, name, feature) for name, feature in task.output_features.items()}
    if transform is not None:  # it makes the other features out of the targets
        features = {"targets": features["targets"]}
    stats = [(file, os.stat(file)) for file in files]
    provenance = Provenance(
        module,
        _modules(module),
        [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats],
        task.source.patterns(split) if hasattr(task.source, "patterns") else [],
    )
    versions = {name: importlib.metadata.version(name) for name in ("seqio", "tensorflow", "sentencepiece")}
    versions["vikhr_t5"] = __version__
    return _Plan(Manifest(task.name, split, features, [], transform, frozen, provenance, versions), num_shards)


def _modules(module: str) -> dict[str, str]:
    """Name -> sha256 of the source of each module that is loaded from the packages of `module`."""
    tops = {name.split(".")[0] for name in module.split(",")}
    files = {name: getattr(loaded, "__file__", None) for name, loaded in sys.modules.items()}
    ours = {name: file for name, file in files.items() if file and name.split(".")[0] in tops}
    return {name: file_digest(Path(file)) for name, file in sorted(ours.items())}


def _cut(task: seqio.Task) -> tuple[list[Step], list[str], dict[str, Any] | None]:
    """The preprocessors to run before the cache, the names of those that would come after it, what does come after."""
    steps: list[Step] = []
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
            if after_placeholder and step is not seqio.preprocessors.append_eos:
                frozen.append(name)
    return steps, frozen, transform


def check_task_vocabulary(task: seqio.Task, vocabulary: AnyVocabulary) -> None:
    """UserError where a feature of the task has another vocabulary than the run."""
    for name, feature in task.output_features.items():
        found = _feature(task.name, name, feature)
        if found.vocabulary != vocabulary.fingerprint():
            raise UserError(
                f"task {task.name}: its {name} use another vocabulary ({found.vocabulary_size} ids, "
                f"{found.extra_ids} sentinels) than the run ({vocabulary.size} ids, {vocabulary.extra_ids} "
                f"sentinels, {vocabulary.source}); register it with tasks.settings.vocabulary()"
            )


def _feature(task: str, name: str, feature: seqio.Feature) -> Feature:
    vocabulary = feature.vocabulary
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        ours = _vocabulary(vocabulary.sentencepiece_model_file, vocabulary.extra_ids)
    elif isinstance(vocabulary, seqio.ByteVocabulary):
        ours = ByteVocabulary(vocabulary.extra_ids)
    else:
        kind = type(vocabulary).__name__
        raise UserError(f"task {task}: {name} has a {kind}; use SentencePieceVocabulary or ByteVocabulary")
    return Feature(feature.add_eos, ours.fingerprint(), ours.size, ours.extra_ids)


@functools.cache
def _vocabulary(file: str, extra_ids: int) -> AnyVocabulary:
    return Vocabulary(file, extra_ids)


def _data_files(source: seqio.DataSource, split: str) -> list[str]:
    if hasattr(source, "files"):
        return source.files(split)
    return sorted(os.path.abspath(file) for file in source.list_shards(split) if os.path.isfile(file))


def _some(files: list[str]) -> str:
    return ", ".join(files[:2]) + (f" and {len(files) - 2} more" if len(files) > 2 else "")


# ---- doing it --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(cache_dir: Path) -> Iterator[None]:
    """One process at a time writes into a cache; another one waits, and then finds the work done."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with open(cache_dir / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is writing to {cache_dir}: waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write(plans: list[_Plan], cache_dir: Path, module: str, num_workers: int) -> None:
    """All shards of all plans; then each split's folder takes its place."""
    jobs = [_jobs(plan, _partial_folder(plan, cache_dir)) for plan in plans]
    sizes = [[size for _, size, _ in plan.manifest.provenance.data_files] or [SMALL_BYTES] for plan in plans]
    if sum(map(sum, sizes)) < SMALL_BYTES:
        num_workers = 1
    _run([job for split in jobs for job in split if not job.note.exists()], module, num_workers)
    for plan, split in zip(plans, jobs, strict=True):
        shards = [Shard(**json.loads(job.note.read_text(encoding="utf-8"))) for job in split]
        manifest = dataclasses.replace(plan.manifest, shards=shards)
        _check_whole(manifest)
        folder, place = split[0].folder, plan.folder(cache_dir)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        with atomic_path(place) as temporary:
            folder.rename(temporary)
        for job in split:
            (place / job.note.name).unlink()
        counts = ", ".join(f"{human(count)} {name}" for name, count in manifest.num_tokens.items())
        print(f"{place}: {manifest.num_examples} examples, tokens: {counts}", file=sys.stderr, flush=True)


def _jobs(plan: _Plan, folder: Path) -> list[_Job]:
    manifest, count = plan.manifest, plan.num_shards
    return [_Job(manifest.task, manifest.split, tuple(manifest.features), i, count, folder) for i in range(count)]


def _partial_folder(plan: _Plan, cache_dir: Path) -> Path:
    """Where finished shards wait for the others: one folder per state of the task's sources, so that a shard made from
    what has changed since is never taken up again."""
    state = hashlib.sha256(plan.manifest.to_json().encode()).hexdigest()[:12]
    place = plan.folder(cache_dir)
    folder = place.parent / f".{place.name}-{state}.partial"
    for other in place.parent.glob(f".{place.name}-*.partial"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".*.tmp"):  # of a process that was killed
        unfinished.unlink()
    return folder


def _check_whole(manifest: Manifest) -> None:
    where = f"{manifest.task}/{manifest.split}"
    if not all(manifest.num_tokens.values()):
        files = _some([path for path, _, _ in manifest.provenance.data_files])
        raise UserError(f"{where} is empty: {manifest.num_examples} examples, no tokens ({files})")
    limit = getattr(seqio.TaskRegistry.get(manifest.task).source, "max_bad_lines", 0)
    if manifest.skipped_lines > limit:
        raise UserError(f"{where}: {manifest.skipped_lines} malformed lines, and max_bad_lines is {limit}")


def _run(jobs: list[_Job], module: str, num_workers: int) -> None:
    """Write shards, here or in processes."""
    if not jobs:
        return
    spawn, start = multiprocessing.get_context("spawn"), time.monotonic()
    tokens = spawn.Value("q", 0)
    with Progress("caching", len(jobs), "shards") as bar:

        def show(finished: int) -> None:
            rate = tokens.value / max(time.monotonic() - start, 1e-9)
            bar.advance(finished, note=f"{human(tokens.value)} tokens, {human(rate)} tokens/s")

        if num_workers == 1 or len(jobs) == 1:
            for job in jobs:
                _write_shard(job, tokens, lambda: show(0))
                show(1)
            return
        with ProcessPoolExecutor(min(num_workers, len(jobs)), spawn, _start_worker, (module, tokens)) as pool:
            waiting = {pool.submit(_work, job) for job in jobs}
            try:
                while waiting:
                    done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    show(len(done))
            except BrokenProcessPool:
                raise UserError(
                    f"a process that cached {jobs[0].task} was killed, perhaps for want of memory: "
                    f"run it again with fewer than {num_workers} workers; finished shards are kept"
                ) from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


_tokens: Any = None  # in a worker: the tokens written by all, shared with the parent


def _start_worker(module: str, tokens: Any) -> None:
    global _tokens
    _tokens = tokens
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    import_tasks(module)


def _end_with_parent() -> None:
    """A pool's workers would wait for work for ever if the parent were killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: _Job) -> None:
    _write_shard(job, _tokens, lambda: None)


def _write_shard(job: _Job, tokens: Any, report: Callable[[], None]) -> None:
    task = seqio.TaskRegistry.get(job.task)
    skipped = getattr(task.source, "skipped_lines", 0)
    try:
        with ShardWriter(job.path, job.features) as writer:
            for columns in _columns(task, job):
                writer.write(columns)
                with tokens.get_lock():
                    tokens.value += sum(len(values) for values, _ in columns.values())
                report()
    except tf.errors.OpError as error:
        if found := re.search(r"\bUserError: (.*)", error.message):  # raised in Python code that TensorFlow calls
            raise UserError(found[1]) from None
        raise
    shard = writer.shard(getattr(task.source, "skipped_lines", 0) - skipped)
    write_text_atomic(job.note, json.dumps(dataclasses.asdict(shard)))


def _columns(task: seqio.Task, job: _Job) -> Iterator[Columns]:
    """Batches of examples of one shard, as the writer takes them."""
    steps, _, _ = _cut(task)
    append_eos = steps[-1:] == [seqio.preprocessors.append_eos]
    head = steps[:-1] if append_eos else steps
    if head[-1:] == [seqio.preprocessors.tokenize]:
        texts = _features(task, _dataset(task, head[:-1], job), job)
        if all((spec.dtype, spec.shape.rank) == (tf.string, 0) for spec in texts.element_spec.values()):
            yield from _tokenized(task, texts, append_eos)
            return
    dataset = _features(task, _dataset(task, steps, job), job)
    for name, spec in dataset.element_spec.items():
        if (spec.dtype, spec.shape.rank) != (tf.int32, 1):
            raise UserError(f"task {task.name}: {name} is {spec.dtype.name} of rank {spec.shape.rank}, no list of ids")
    for batch in dataset.ragged_batch(BATCH).prefetch(2):
        yield {name: _flat(tokens) for name, tokens in batch.items()}


def _features(task: seqio.Task, dataset: tf.data.Dataset, job: _Job) -> tf.data.Dataset:
    """The features that are cached; a task may carry others."""
    for name in job.features:
        if name not in dataset.element_spec:
            hint = nearest(name, dataset.element_spec)
            raise UserError(f"task {task.name}: its preprocessors give no {name!r}; {hint}")
    return dataset.map(lambda example: {name: example[name] for name in job.features})


def _dataset(task: seqio.Task, steps: list[Step], job: _Job) -> tf.data.Dataset:
    """The examples of one shard after `steps`; random ones are seeded by the shard."""
    shard_info = seqio.ShardInfo(job.index, job.num_shards) if job.num_shards > 1 else None
    dataset = task.source.get_dataset(split=job.split, shuffle=False, shard_info=shard_info)
    with seqio.utils.map_seed_manager(job.index):
        for step in steps:
            adapted = seqio.utils.add_kwargs_to_transform(
                step, sequence_length=None, output_features=task.output_features
            )
            dataset = adapted(dataset)
    return dataset


def _tokenized(task: seqio.Task, texts: tf.data.Dataset, append_eos: bool) -> Iterator[Columns]:
    """What `seqio.preprocessors.tokenize` (and append_eos) give, by SentencePiece itself: four times as fast."""
    for batch in texts.batch(BATCH).prefetch(2).as_numpy_iterator():
        columns = {}
        for name, strings in batch.items():
            feature = task.output_features[name]
            ids = _encoded(feature.vocabulary, strings.tolist())
            if append_eos and feature.add_eos:
                ids = [np.append(one, np.int32(feature.vocabulary.eos_id)) for one in ids]
            columns[name] = np.concatenate(ids), np.array([len(one) for one in ids])
        yield columns


def _encoded(vocabulary: seqio.Vocabulary, texts: list[bytes]) -> list[np.ndarray]:
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return [np.frombuffer(text, np.uint8) + np.int32(OFFSET) for text in texts]
    # The same model as in TensorFlow: seqio has put the sentinels into it.
    return vocabulary.tokenizer.encode(texts, out_type="numpy", num_threads=1)


def _flat(batch: tf.Tensor | tf.RaggedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Tokens end to end, and lengths. A batch is dense where TensorFlow knows the length beforehand."""
    ragged = batch if isinstance(batch, tf.RaggedTensor) else tf.RaggedTensor.from_tensor(batch)
    return ragged.flat_values.numpy(), ragged.row_lengths().numpy()


def _write_mixtures(provider: seqio.Task | seqio.Mixture, module: str, cache_dir: Path) -> None:
    """The definition of the name and, so that they can be opened alone, of each of its tasks."""
    tasks = seqio.get_subtasks(provider)
    for task in tasks:
        # Rates may be functions of a task's size. seqio asks the source, which does not know; the store does.
        task.num_input_examples = functools.partial(_num_examples, cache_dir, task.name)
    rates = {task.name: provider.get_rate(task) if isinstance(provider, seqio.Mixture) else 1.0 for task in tasks}
    provenance = dataclasses.asdict(Provenance(module, _modules(module)))
    for name, members in {**{task.name: {task.name: 1.0} for task in tasks}, provider.name: rates}.items():
        splits = {task.name: list(task.splits) for task in tasks if task.name in members}
        record = {"name": name, "rates": members, "splits": splits, "provenance": provenance}
        write_text_atomic(mixture_file(cache_dir, name), json.dumps(record, indent=1) + "\n")


def _num_examples(cache_dir: Path, task: str, split: str) -> int:
    return len(TokenStore(task_directory(cache_dir, task, split)))


def main() -> int:
    """`python -m vikhr_t5.data.cache JSON`, as `store.ensure_cached` runs it: arguments of `cache` as JSON; a
    UserError goes to stdout and gives 2."""
    try:
        cache(**json.loads(sys.argv[1]))
    except UserError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    from vikhr_t5.data import cache as this_module  # so that workers find _work under the module's name

    sys.exit(this_module.main())
