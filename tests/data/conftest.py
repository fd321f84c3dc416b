"""Token stores made by hand from real Russian text, for tests of what reads them; tasks, for tests of what makes them.
No TensorFlow unless a test asks for `module`."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cached_tasks import write_data, write_module

from vikhr_t5.data import denoisers
from vikhr_t5.data.manifest import Feature, Manifest, Provenance
from vikhr_t5.data.store import ShardWriter
from vikhr_t5.data.vocabulary import Vocabulary, train_vocabulary

TEXT = Path(__file__).parents[2] / "tasks" / "demo_data" / "ru.txt"
PROVENANCE = Provenance("no_such_module", {})

# A task as features: the tokens of each example.
Examples = Mapping[str, list[np.ndarray]]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return TEXT.read_text(encoding="utf-8").split("\n\n")[:300]


@pytest.fixture(scope="session")
def small_vocabulary(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return train_vocabulary(documents, tmp_path_factory.mktemp("vocabulary") / "ru.model", size=1500)


@pytest.fixture(scope="session")
def text_task(documents: list[str], small_vocabulary: Vocabulary) -> Examples:
    return {"targets": [np.array(small_vocabulary.encode(text), np.int32) for text in documents]}


@pytest.fixture(scope="session")
def pairs_task(text_task: Examples) -> Examples:
    """Supervised examples of uneven lengths: a part of a document, and what follows it. A few are over-long."""
    rng = np.random.default_rng(5)
    inputs, targets = [], []
    for tokens in [tokens for tokens in text_task["targets"] if len(tokens) > 200] * 8:
        asked, answer = rng.integers(5, [60, 40]) if len(inputs) % 20 else (120, 60)
        start = rng.integers(0, len(tokens) - asked - answer)
        inputs.append(np.append(tokens[start : start + asked], 1).astype(np.int32))
        targets.append(np.append(tokens[start + asked : start + asked + answer], 1).astype(np.int32))
    return {"inputs": inputs, "targets": targets}


@pytest.fixture
def write_task(tmp_path: Path, small_vocabulary: Vocabulary) -> Callable[..., Path]:
    """Writes one split of a task into `tmp_path`/cache, in two shards; gives the split's folder."""

    def write(
        name: str,
        examples: Examples,
        mixture: str | None = None,
        split: str = "train",
        names: Sequence[str] | None = None,  # the set of each example
    ) -> Path:
        folder = tmp_path / "cache" / "tasks" / name / split
        folder.mkdir(parents=True)
        shards = []
        for number in range(2):
            part = {feature: values[number::2] for feature, values in examples.items()}
            file, named = folder / f"shard-{number:05d}-of-00002.arrow", names is not None
            with ShardWriter(file, tuple(examples), named=named) as writer:
                none = [np.zeros(0, np.int32)]
                columns = {f: (np.concatenate(v or none), np.array([len(x) for x in v])) for f, v in part.items()}
                writer.write(columns, names[number::2] if names is not None else None)
            shards.append(writer.shard(0))
        v = small_vocabulary
        features = {feature: Feature(True, v.fingerprint(), v.size, v.extra_ids) for feature in examples}
        transform: Any = denoisers.to_json(denoisers.mixture(mixture)) if mixture else None
        manifest = Manifest(name, split, features, shards, transform, [], PROVENANCE, {})
        (folder / "manifest.json").write_text(manifest.to_json())
        write_mixture(name, {name: 1.0}, split)
        return folder

    def write_mixture(name: str, rates: Mapping[str, float], split: str = "train") -> None:
        file = tmp_path / "cache" / "mixtures" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        splits = json.loads(file.read_text())["splits"] if file.exists() else {task: [] for task in rates}
        record = {
            "name": name,
            "rates": dict(rates),
            "splits": {task: [*splits[task], split] for task in rates},
            "provenance": dataclasses.asdict(PROVENANCE),
        }
        file.write_text(json.dumps(record))

    write.mixture = write_mixture  # type: ignore[attr-defined]
    return write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Real text: a few pages, a few pairs."""
    write_data(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def module(tmp_path: Path, data: Path, small_vocabulary: Vocabulary, monkeypatch) -> Callable[..., str]:
    """`write_module` into the current folder, which is an empty one; the tasks read `data`."""
    from vikhr_t5.data import sources

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "PIECE_BYTES", sources.PIECE_BYTES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return functools.partial(write_module, tmp_path, data, small_vocabulary.sentencepiece_model_file)
