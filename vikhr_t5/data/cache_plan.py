"""What caching a task means: which of its preprocessors run, over which files, in how many shards; what is stale."""

import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
from pathlib import Path

from vikhr_t5 import __version__
from vikhr_t5.data import dedup
from vikhr_t5.data.cache_shards import ShardJob, cut
from vikhr_t5.data.manifest import Manifest, Provenance
from vikhr_t5.data.module_files import source_digests
from vikhr_t5.data.seqio_tasks import feature_of, seqio
from vikhr_t5.data.store import CacheMissing, CacheStale, TokenStore, task_directory
from vikhr_t5.errors import UserError

MAX_SHARDS = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """One split of one task, before it is written: the manifest has no shards yet."""

    manifest: Manifest
    num_shards: int
    max_bad_lines: int

    @property
    def name(self) -> str:
        return f"{self.manifest.task}/{self.manifest.split}"

    def folder(self, cache_dir: Path) -> Path:
        """Where the store is to be."""
        return task_directory(cache_dir, self.manifest.task, self.manifest.split)

    def reason(self, cache_dir: Path) -> str | None:
        """Why the store must be written, in words, "" where there is none yet; None: it is what would be written."""
        try:
            found = TokenStore(self.folder(cache_dir)).manifest
        except CacheMissing:
            return ""
        except CacheStale as error:
            return str(error)
        if found.skipped_lines > self.max_bad_lines:
            return f"{found.skipped_lines} malformed lines were skipped, and max_bad_lines is {self.max_bad_lines}"
        return found.change_to(self.manifest)

    def partial_folder(self, cache_dir: Path) -> Path:
        """Where finished shards wait for the others: one folder per state of the task's sources, so that a shard made
        from what has changed since is never taken up again."""
        state = hashlib.sha256(self.manifest.to_json().encode()).hexdigest()[:12]
        place = self.folder(cache_dir)
        folder = place.parent / f".{place.name}-{state}.partial"
        for other in place.parent.glob(f".{place.name}-*.partial"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.rglob(".*.tmp"):  # of a process that was killed
            unfinished.unlink()
        return folder

    def jobs(self, folder: Path) -> list[ShardJob]:
        """The shards, to be written into `folder`."""
        m, count = self.manifest, self.num_shards
        method = m.dedup["method"] if m.dedup else None
        return [ShardJob(m.task, m.split, tuple(m.features), i, count, folder, method) for i in range(count)]

    def check(self, manifest: Manifest) -> None:
        """UserError for a finished split without tokens, or with too many malformed lines."""
        if not all(manifest.num_tokens.values()):
            files = _some([path for path, _, _ in manifest.provenance.data_files])
            raise UserError(f"{self.name} is empty: {manifest.num_examples} examples, no tokens ({files})")
        if manifest.skipped_lines > self.max_bad_lines:
            raise UserError(
                f"{self.name}: {manifest.skipped_lines} malformed lines, and max_bad_lines is {self.max_bad_lines}"
            )


def plan(task: seqio.Task, split: str, module: str, method: str | None) -> Plan:
    """How to cache a split.

    Args:
        task: seqio's.
        split: one of its splits.
        module: what registers it.
        method: of deduplication, see `vikhr_t5.data.dedup`; None for none.
    Raises:
        UserError: a task that cannot be cached; a split without data.
    """
    steps, frozen, transform = cut(task)
    files = _data_files(task.source, split)
    num_shards = min(len(task.source.list_shards(split)), MAX_SHARDS)
    if not num_shards:
        raise UserError(f"{task.name}/{split} is empty: its files hold no text ({_some(files)})")
    features = {name: feature_of(task.name, name, feature) for name, feature in task.output_features.items()}
    if transform is not None:  # it makes the other features out of the targets
        features = {"targets": features["targets"]}
    stats = [(file, os.stat(file)) for file in files]
    provenance = Provenance(
        module,
        source_digests(module),
        [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats],
        task.source.patterns(split) if hasattr(task.source, "patterns") else [],
        getattr(task.source, "folders", dict)(),
    )
    versions = {name: importlib.metadata.version(name) for name in ("seqio", "tensorflow", "sentencepiece")}
    versions["vikhr_t5"] = __version__
    manifest = Manifest(
        task.name,
        split,
        features,
        [],
        transform,
        frozen,
        provenance,
        versions,
        dedup.method(method).parameters if method else None,
        seqio.preprocessors.append_eos_after_trim in steps,
    )
    return Plan(manifest, num_shards, getattr(task.source, "max_bad_lines", 0))


def _data_files(source: seqio.DataSource, split: str) -> list[str]:
    if hasattr(source, "files"):
        return source.files(split)
    return sorted(os.path.abspath(file) for file in source.list_shards(split) if os.path.isfile(file))


def _some(files: list[str]) -> str:
    """Two of the names, in words."""
    return ", ".join(files[:2]) + (f" and {len(files) - 2} more" if len(files) > 2 else "")
