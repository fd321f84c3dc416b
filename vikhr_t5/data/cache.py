"""From a seqio task or mixture to token stores: the only step of training that needs TensorFlow.

A task's preprocessors run up to its last but for the one that is applied after the cache (it has
`post_cache_transform`, such as `tasks.preprocessors.Denoise`). The work is cut into shards by the data alone, so the
files are the same whatever the number of processes; a finished shard is kept when the run is stopped and started again.

    vikhr-t5 cache --mixture demo_ul2 --module tasks.demo --vocabulary spiece.model --cache_dir cache

Here: the command. `cache_plan` says what there is to do, `cache_shards` does a shard of it, `cache_workers` runs shards
on this machine and `cache_beam` on a cluster, `dedup` finds duplicate documents.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from vikhr_t5.data import cache_workers, dedup, seqio_process
from vikhr_t5.data.cache_plan import Plan, plan
from vikhr_t5.data.cache_shards import ShardJob, WithoutDuplicates
from vikhr_t5.data.cache_workers import Job
from vikhr_t5.data.manifest import Manifest, Provenance
from vikhr_t5.data.module_files import file_digest, source_digests
from vikhr_t5.data.seqio_tasks import (
    check_rate,
    check_task_vocabulary,
    find_provider,
    import_tasks,
    metrics_of,
    seqio,
)
from vikhr_t5.data.store import MANIFEST, TokenStore, mixture_file, task_directory
from vikhr_t5.data.vocabulary import open_vocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.files import atomic_path, write_text_atomic
from vikhr_t5.progress import human

SMALL_BYTES = 128 << 20  # less is written in this process: starting others takes as long

Runner = Callable[[Sequence[Job]], None]


def cache(
    mixture_or_task: str,
    module: str,
    cache_dir: str | os.PathLike[str],
    splits: Sequence[str] | None = None,
    num_workers: int = 0,
    vocabulary_file: str | None = None,
    extra_ids: int | None = None,
    dedup_method: str | None = None,
    max_bad_lines: int | None = None,
    beam_runner: str | None = None,
    beam_options: str = "",
) -> dict[str, dict[str, Manifest]]:
    """Write the token stores of a task, or of every task of a mixture. What is there and still true is kept.

    Args:
        mixture_or_task: name in seqio's registries.
        module: the Python module that registers it; several, joined by commas.
        cache_dir: the folder of `vikhr_t5.data.store`.
        splits: all splits where None.
        num_workers: processes; 0 = one per core.
        vocabulary_file, extra_ids, max_bad_lines: for `tasks.settings`, which says what they may be; None leaves the
            environment as it is.
        dedup_method: of `vikhr_t5.data.dedup`, or "none"; None leaves each split as it is cached, at first without.
        beam_runner: an Apache Beam runner that writes the shards, instead of processes of this machine.
        beam_options: its pipeline options, as on a command line.
    Returns:
        task -> split -> manifest.
    Raises:
        UserError: unknown module, task or split; a task that cannot be cached; bad data (names file and line).
    """
    wanted = {
        "VIKHR_T5_VOCABULARY": vocabulary_file,
        "VIKHR_T5_EXTRA_IDS": extra_ids,
        "VIKHR_T5_MAX_BAD_LINES": max_bad_lines,
    }
    os.environ.update({name: str(value) for name, value in wanted.items() if value is not None})
    if dedup_method not in (None, "none"):
        dedup.method(dedup_method)
    import_tasks(module)
    provider = find_provider(mixture_or_task, module)
    tasks = seqio.get_subtasks(provider)
    if missing := [split for split in splits or () if split not in provider.splits]:
        known = ", ".join(sorted(provider.splits))
        raise UserError(f"{mixture_or_task} has no split {', '.join(missing)}; it has: {known}")
    wanted_splits = [(task, split) for task in tasks for split in task.splits if splits is None or split in splits]
    if vocabulary_file is not None:
        for task in tasks:
            check_task_vocabulary(task, open_vocabulary(vocabulary_file, extra_ids))
    place = Path(cache_dir)
    with _locked(place):
        methods = [_method(dedup_method, task_directory(place, task.name, split)) for task, split in wanted_splits]
        plans = [plan(task, split, module, how) for (task, split), how in zip(wanted_splits, methods, strict=True)]
        pending = [one for one in plans if _is_needed(one, place)]
        _write(pending, place, _runner(pending, module, num_workers, beam_runner, beam_options))
        _write_mixtures(provider, module, place)
    manifests: dict[str, dict[str, Manifest]] = {task.name: {} for task in tasks}
    for task, split in wanted_splits:
        manifests[task.name][split] = TokenStore(task_directory(cache_dir, task.name, split)).manifest
    return manifests


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


def _method(asked: str | None, folder: Path) -> str | None:
    """Of deduplication. The trainer, which caches what is stale, asks for none in particular, and must not lose it."""
    if asked is not None:
        return None if asked == "none" else asked
    try:
        made_with = TokenStore(folder).manifest.dedup
    except UserError:
        return None
    return made_with["method"] if made_with else None


def _is_needed(plan: Plan, cache_dir: Path) -> bool:
    reason, place = plan.reason(cache_dir), plan.folder(cache_dir)
    if reason is None:
        print(f"{place} is there: {summary(TokenStore(place).manifest)}", file=sys.stderr, flush=True)
    elif reason:
        print(f"{plan.name} is cached again: {reason}", file=sys.stderr, flush=True)
    return reason is not None


def _runner(plans: Sequence[Plan], module: str, num_workers: int, beam_runner: str | None, beam_options: str) -> Runner:
    if beam_runner is not None:
        from vikhr_t5.data import cache_beam

        return functools.partial(cache_beam.run, module=module, runner=beam_runner, options=beam_options)
    sizes = [size for plan in plans for _, size, _ in plan.manifest.provenance.data_files or [("", SMALL_BYTES, 0)]]
    workers = (num_workers or os.cpu_count() or 1) if sum(sizes) >= SMALL_BYTES else 1
    return functools.partial(cache_workers.run, module=module, num_workers=workers)


def _write(plans: Sequence[Plan], cache_dir: Path, run: Runner) -> None:
    """All shards of all plans; then each split's folder takes its place."""
    folders = [plan.partial_folder(cache_dir) for plan in plans]
    jobs = [_jobs(plan, folder) for plan, folder in zip(plans, folders, strict=True)]
    _run_unfinished([job for split in jobs for job in split], run)
    _run_unfinished([job for plan, s, f in zip(plans, jobs, folders, strict=True) for job in _unique(plan, s, f)], run)
    for one, folder in zip(plans, folders, strict=True):
        _finish(one, folder, one.folder(cache_dir))


def _run_unfinished(jobs: Sequence[Job], run: Runner) -> None:
    if unfinished := [job for job in jobs if not job.note.exists()]:
        run(unfinished)


def _jobs(plan: Plan, folder: Path) -> list[ShardJob]:
    """The shards; where duplicates are to go, those with all documents, in a folder of their own."""
    if plan.manifest.dedup is None:
        return plan.jobs(folder)
    whole = folder / "with-duplicates"
    whole.mkdir(exist_ok=True)
    return plan.jobs(whole)


def _unique(plan: Plan, jobs: Sequence[ShardJob], folder: Path) -> list[WithoutDuplicates]:
    """The second pass of deduplication: which documents go depends on all shards."""
    if plan.manifest.dedup is None:
        return []
    goes = jobs[0].folder / "goes.npy"
    if not goes.exists():
        method = dedup.method(plan.manifest.dedup["method"])
        found = method.duplicates(dedup.Signatures([job.signatures for job in jobs], method))
        with atomic_path(goes) as temporary, open(temporary, "wb") as handle:
            np.save(handle, found)
    starts = np.cumsum([0, *(job.shard().num_examples for job in jobs)]).tolist()
    return [WithoutDuplicates(job, folder, goes, start) for job, start in zip(jobs, starts, strict=False)]


def _finish(plan: Plan, folder: Path, place: Path) -> None:
    """Make a store of the finished shards in `folder`, at `place`."""
    jobs = plan.jobs(folder)
    manifest = dataclasses.replace(plan.manifest, shards=[job.shard() for job in jobs])
    plan.check(manifest)
    shutil.rmtree(folder / "with-duplicates", ignore_errors=True)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    with atomic_path(place) as temporary:
        folder.rename(temporary)
    for job in jobs:
        (place / job.note.name).unlink()
    print(f"{place}: {summary(manifest)}", file=sys.stderr, flush=True)


def summary(manifest: Manifest) -> str:
    """A split's counts in one line: read, kept, dropped by reason, tokens."""
    counts = ", ".join(f"{human(count)} {name}" for name, count in manifest.num_tokens.items())
    parts = [f"{manifest.num_read} read", f"{manifest.num_examples} examples", f"tokens: {counts}"]
    if manifest.dropped:
        parts.append("dropped: " + ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items()))
    if manifest.skipped_lines:
        parts.append(f"{manifest.skipped_lines} malformed lines skipped")
    return "; ".join(parts)


def _write_mixtures(provider: seqio.Task | seqio.Mixture, module: str, cache_dir: Path) -> None:
    """The definition of the name and, so that they can be opened alone, of each of its tasks: rates and metrics."""
    tasks = seqio.get_subtasks(provider)
    for task in tasks:
        # Rates may be functions of a task's size. seqio asks the source, which does not know; the store does.
        task.num_input_examples = functools.partial(_num_examples, cache_dir, task.name)
    rates = {task.name: 1.0 for task in tasks}
    if isinstance(provider, seqio.Mixture):
        level = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # seqio warns of sizes of tasks that it has not cached itself
        rates = {task.name: check_rate(provider.name, task.name, provider.get_rate(task)) for task in tasks}
        logging.set_verbosity(level)
    # All of the modules' source counts here, metric functions, too: this file is new in no time, a token store is not.
    provenance = dataclasses.asdict(Provenance(module, source_digests(module, file_digest)))
    for name, members in {**{task.name: {task.name: 1.0} for task in tasks}, provider.name: rates}.items():
        mixed = [task for task in tasks if task.name in members]
        record = {
            "name": name,
            "rates": members,
            "splits": {task.name: list(task.splits) for task in mixed},
            "metrics": {task.name: dataclasses.asdict(metrics_of(task)) for task in mixed},
            "provenance": provenance,
        }
        write_text_atomic(mixture_file(cache_dir, name), json.dumps(record, indent=1) + "\n")


def _num_examples(cache_dir: Path, task: str, split: str) -> int:
    return len(TokenStore(task_directory(cache_dir, task, split)))


def main() -> int:
    """`python -m vikhr_t5.data.cache JSON`, as `store.ensure_cached` runs it."""
    return seqio_process.main(cache)


if __name__ == "__main__":
    sys.exit(main())
