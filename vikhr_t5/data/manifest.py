"""What a token store holds and what it was made from: the manifest of a split, and whether it is still true.

Nothing here imports TensorFlow or a task module: modules are found and hashed as files.
"""

import contextlib
import dataclasses
import glob
import hashlib
import importlib.machinery
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
NEEDS_SEQIO = "caching needs seqio and TensorFlow: pip install 'vikhr-t5[seqio]', or bring a cache from another machine"


@dataclasses.dataclass(frozen=True)
class Feature:
    """One column of a store and the vocabulary of its ids (`Vocabulary.fingerprint`, `.size`)."""

    add_eos: bool
    vocabulary: str
    vocabulary_size: int
    extra_ids: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a store. `digest` is the sha256 of its lengths and tokens."""

    file: str
    num_examples: int
    num_tokens: dict[str, int]
    num_bytes: int
    digest: str
    skipped_lines: int


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a store, or a mixture's definition, was made from.

    module: the Python module that registers the task. modules: sha256 of the source of every module of its package
    that was loaded. data_files: (absolute path, bytes, mtime in ns). patterns: the globs which these files match.
    """

    module: str
    modules: dict[str, str]
    data_files: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    patterns: list[str] = dataclasses.field(default_factory=list)

    def change(self) -> str | None:
        """What has changed since, in words, or None. What is not on this machine cannot be checked and counts as
        unchanged: a cache may be carried to a training node without its sources."""
        for name, digest in self.modules.items():
            file = module_file(name)
            if file is not None and file_digest(file) != digest:
                return f"{file} has changed"
        for path, size, mtime in self.data_files:
            with contextlib.suppress(FileNotFoundError):
                now = os.stat(path)
                if now.st_size != size:
                    return f"{path} has changed: {size} bytes then, {now.st_size} now"
                if now.st_mtime_ns != mtime:
                    return f"{path} was written again"
        known = {path for path, _, _ in self.data_files}
        for pattern in self.patterns:
            if new := sorted(set(glob.glob(pattern, recursive=True)) - known):
                return f"{new[0]} is new ({pattern})"
        return None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about one split of one task. `transform` is what must still be applied to the tokens after the cache
    (the JSON of `post_cache_transform()`, e.g. a denoiser mixture) or None; `frozen` names the preprocessors that the
    task has after its cache placeholder and that were applied before it all the same."""

    task: str
    split: str
    features: dict[str, Feature]
    shards: list[Shard]
    transform: dict[str, Any] | None
    frozen: list[str]
    provenance: Provenance
    versions: dict[str, str]

    @property
    def num_examples(self) -> int:
        return sum(shard.num_examples for shard in self.shards)

    @property
    def num_tokens(self) -> dict[str, int]:
        return {name: sum(shard.num_tokens[name] for shard in self.shards) for name in self.features}

    @property
    def skipped_lines(self) -> int:
        return sum(shard.skipped_lines for shard in self.shards)

    def stale_reason(self, vocabulary_fingerprint: str | None = None) -> str | None:
        """Why the store must not be used, in words, or None. A vocabulary of None is not compared."""
        if vocabulary_fingerprint is not None:
            for name, feature in self.features.items():
                if feature.vocabulary != vocabulary_fingerprint:
                    was, now = feature.vocabulary[:12], vocabulary_fingerprint[:12]
                    return f"its {name} were made with another vocabulary (sha256 {was}…, now {now}…)"
        return self.provenance.change()

    def to_json(self) -> str:
        totals = {"examples": self.num_examples, "tokens": self.num_tokens, "skipped_lines": self.skipped_lines}
        record = {"format": FORMAT, "totals": totals, **dataclasses.asdict(self)}
        return json.dumps(record, ensure_ascii=False, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "Manifest":
        record = json.loads(text)
        if record.pop("format") != FORMAT:
            raise ValueError(f"the store's format is not {FORMAT}")
        record.pop("totals")
        record["features"] = {name: Feature(**feature) for name, feature in record["features"].items()}
        record["shards"] = [Shard(**shard) for shard in record["shards"]]
        record["provenance"] = provenance_from_json(record["provenance"])
        return Manifest(**record)


def provenance_from_json(record: dict[str, Any]) -> Provenance:
    files = [(path, size, mtime) for path, size, mtime in record["data_files"]]
    return Provenance(record["module"], record["modules"], files, record["patterns"])


def file_digest(path: Path) -> str:
    """sha256 hex of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def module_file(module: str) -> Path | None:
    """The source file of a module, found on sys.path and in the current folder without importing anything (importing
    a package may import seqio); None where there is none."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module that was made by hand has no spec
        spec = None
    spec = spec or importlib.machinery.PathFinder.find_spec(top, [os.getcwd()])
    for depth, name in enumerate(rest):
        if spec is None or spec.submodule_search_locations is None:
            return None
        path = list(spec.submodule_search_locations)
        spec = importlib.machinery.PathFinder.find_spec(".".join([top, *rest[:depth], name]), path)
    return Path(spec.origin) if spec is not None and spec.origin and os.path.isfile(spec.origin) else None
