"""Token stores for benchmarks: the demo's Russian text, repeated to any size, without seqio."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vikhr_t5.data import denoisers  # noqa: E402
from vikhr_t5.data.manifest import Feature, Manifest, Provenance  # noqa: E402
from vikhr_t5.data.store import ShardWriter, mixture_file, task_directory  # noqa: E402
from vikhr_t5.data.vocabulary import Vocabulary, train_vocabulary  # noqa: E402

CORPUS = ROOT / "tasks" / "demo_data" / "ru.txt"
PIECES = 8000


def vocabulary_and_documents(folder: Path) -> tuple[Vocabulary, list[np.ndarray]]:
    """A vocabulary trained on the demo's text (folder/ru.model), and the text's documents as its ids."""
    texts = CORPUS.read_text(encoding="utf-8").split("\n\n")
    vocabulary = train_vocabulary(texts, folder / "ru.model", PIECES)
    return vocabulary, [np.array(vocabulary.encode(text), np.int32) for text in texts]


def write_store(
    folder: Path,
    task: str,
    vocabulary: Vocabulary,
    columns: Mapping[str, list[np.ndarray]],
    repeats: int,
    mixture: str | None = None,
) -> int:
    """A task's examples, `repeats` times, as a cache in `folder`; how many bytes of tokens it has.

    Args:
        columns: feature -> ids of each example.
        mixture: denoisers of a task of text.
    """
    split = task_directory(folder, task, "train")
    split.mkdir(parents=True)
    once = {name: (np.concatenate(ids), np.array([len(x) for x in ids])) for name, ids in columns.items()}
    with ShardWriter(split / "shard-00000-of-00001.arrow", tuple(columns)) as writer:
        for _ in range(repeats):
            writer.write(once)
    feature = Feature(True, vocabulary.fingerprint(), vocabulary.size, vocabulary.extra_ids)
    provenance = Provenance("none", {})
    transform = denoisers.to_json(denoisers.mixture(mixture)) if mixture else None
    features = dict.fromkeys(columns, feature)
    manifest = Manifest(task, "train", features, [writer.shard(0)], transform, [], provenance, {})
    (split / "manifest.json").write_text(manifest.to_json())
    record = {"rates": {task: 1.0}, "splits": {task: ["train"]}, "provenance": dataclasses.asdict(provenance)}
    mixture_file(folder, task).parent.mkdir(exist_ok=True)
    mixture_file(folder, task).write_text(json.dumps(record))
    return 4 * repeats * sum(len(tokens) for tokens, _ in once.values())
