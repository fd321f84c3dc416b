"""What a token store holds and what it was made from: the manifest of a split, and whether it is still true.

Nothing here imports TensorFlow or a task module: modules are found and hashed as files.
"""

import dataclasses
import glob
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vikhr_t5.data.module_files import module_file, preprocessing_digest

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
    """One file of a store.

    digest: sha256 of its lengths and tokens, and of its task names where it has them. num_read: examples of the source,
    before any preprocessor. dropped: documents that were left out, by reason.
    """

    file: str
    num_examples: int
    num_tokens: dict[str, int]
    num_bytes: int
    digest: str
    skipped_lines: int
    num_read: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a store, or a mixture's definition, was made from.

    module: the Python module that registers the task; several, joined by commas. modules: digests of the source of
    these modules and of those that they import. data_files: (absolute path, bytes, mtime in ns). patterns: the globs
    which these files match. folders: environment variable -> the folder it named, of those that say where the data lie.
    """

    module: str
    modules: dict[str, str]
    data_files: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    patterns: list[str] = dataclasses.field(default_factory=list)
    folders: dict[str, str] = dataclasses.field(default_factory=dict)

    def change(self, digest: Callable[[Path], str] = preprocessing_digest) -> str | None:
        """What has changed since, in words, or None. What is not on this machine cannot be checked and counts as
        unchanged: a cache may be carried to a training node without its sources. `digest` is that of `modules`."""
        for name, recorded in self.modules.items():
            file = module_file(name)
            if file is not None and digest(file) != recorded:
                return f"{file} has changed"
        for variable, folder in self.folders.items():
            now = os.environ.get(variable)
            if now and os.path.abspath(now) != folder:
                return f"{variable} was {folder or 'not set'} and is {now}"
        return self._change_of_files()

    def _change_of_files(self) -> str | None:
        gone = [path for path, _, _ in self.data_files if not os.path.exists(path)]
        if 0 < len(gone) < len(self.data_files):
            return f"{gone[0]} is gone"
        for path, size, mtime in self.data_files if not gone else []:
            stat = os.stat(path)
            if stat.st_size != size:
                return f"{path} has changed: {size} bytes then, {stat.st_size} now"
            if stat.st_mtime_ns != mtime:
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
    task has after its cache placeholder and that were applied before it all the same; `dedup` has the parameters of the
    deduplication of documents, or None; `eos_after_trim`: an example that is too long keeps its EOS when it is trimmed
    (`seqio.preprocessors.append_eos_after_trim`)."""

    task: str
    split: str
    features: dict[str, Feature]
    shards: list[Shard]
    transform: dict[str, Any] | None
    frozen: list[str]
    provenance: Provenance
    versions: dict[str, str]
    dedup: dict[str, Any] | None = None
    eos_after_trim: bool = False

    @property
    def num_examples(self) -> int:
        return sum(shard.num_examples for shard in self.shards)

    @property
    def num_tokens(self) -> dict[str, int]:
        return {name: sum(shard.num_tokens[name] for shard in self.shards) for name in self.features}

    @property
    def skipped_lines(self) -> int:
        return sum(shard.skipped_lines for shard in self.shards)

    @property
    def num_read(self) -> int:
        return sum(shard.num_read for shard in self.shards)

    @property
    def dropped(self) -> dict[str, int]:
        """Documents that were left out, by reason; the most frequent first."""
        return dict(sum((Counter(shard.dropped) for shard in self.shards), Counter()).most_common())

    def stale_reason(self, vocabulary_fingerprint: str | None = None) -> str | None:
        """Why the store must not be used, in words, or None. A vocabulary of None is not compared."""
        if vocabulary_fingerprint is not None:
            for name, feature in self.features.items():
                if feature.vocabulary != vocabulary_fingerprint:
                    was, now = feature.vocabulary[:12], vocabulary_fingerprint[:12]
                    return f"its {name} were made with another vocabulary (sha256 {was}…, now {now}…)"
        return self.provenance.change()

    def change_to(self, planned: "Manifest") -> str | None:
        """What would be made otherwise by `planned`, which has no shards yet, in words, or None."""
        mine, other = self.provenance, planned.provenance
        if self.features != planned.features:
            return "its features or their vocabulary have changed"
        if (self.transform, self.eos_after_trim) != (planned.transform, planned.eos_after_trim):
            return "what is applied after the cache, such as its denoisers, has changed"
        if self.dedup != planned.dedup:
            return f"deduplication was {_in_words(self.dedup)} and is {_in_words(planned.dedup)}"
        if not set(mine.module.split(",")) & set(other.module.split(",")):
            return f"{mine.module} registered it, and now {other.module}"
        if changed := sorted(set(mine.data_files) ^ set(other.data_files)):
            return f"its files have changed: {changed[0][0]}"
        if sorted(mine.patterns) != sorted(other.patterns):
            return f"its patterns of files were {', '.join(mine.patterns)} and are {', '.join(other.patterns)}"
        return mine.change()

    def to_json(self) -> str:
        totals = {
            "read": self.num_read,
            "examples": self.num_examples,
            "tokens": self.num_tokens,
            "dropped": self.dropped,
            "skipped_lines": self.skipped_lines,
        }
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


@dataclasses.dataclass(frozen=True)
class TaskMetrics:
    """The metric functions of a task: `text`, names in `vikhr_t5.text_metrics`; `other`, names of what needs the task
    itself: functions of its own, and all where it has a postprocessor."""

    text: tuple[str, ...] = ()
    other: tuple[str, ...] = ()


def provenance_from_json(record: dict[str, Any]) -> Provenance:
    return Provenance(**{**record, "data_files": [tuple(file) for file in record["data_files"]]})


def _in_words(dedup: dict[str, Any] | None) -> str:
    return " ".join(f"{name}={value}" for name, value in dedup.items()) if dedup else "none"
