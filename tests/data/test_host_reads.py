"""A training host reads its own rows and no others: which tokens it asks for, and what comes from the disk."""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from vikhr_t5.data.pipeline import Dataset, DatasetConfig, open_dataset
from vikhr_t5.data.store import TokenStore, task_directory
from vikhr_t5.data.vocabulary import Vocabulary

S, T, B, STEPS = 512, 240, 8, 6
MEGABYTES = 64
COUNTERS = Path("/proc/self/io")


@pytest.fixture
def config(write_task: Callable[..., Path], tmp_path: Path) -> DatasetConfig:
    """64 MB of tokens in two files, 1000 documents."""
    documents = np.random.default_rng(3).integers(10, 1000, (1000, MEGABYTES * 262), np.int32)
    write_task("text", {"targets": list(documents)}, mixture="ul2")
    return DatasetConfig("text", {"inputs": S, "targets": T}, "train", B, seed=1, cache_dir=str(tmp_path / "cache"))


def read(dataset: Dataset, rows: range) -> None:
    with closing(dataset.batches(0, rows, STEPS)) as batches:
        assert sum(1 for _ in batches) == STEPS


def test_hosts_ask_for_different_tokens(config: DatasetConfig, small_vocabulary: Vocabulary, monkeypatch):
    asked: list[range] = []
    tokens = TokenStore.tokens

    def record(store: TokenStore, feature: str, start: int, stop: int) -> np.ndarray:
        asked.append(range(start, stop))
        return tokens(store, feature, start, stop)

    monkeypatch.setattr(TokenStore, "tokens", record)
    dataset, by_host = open_dataset(config, small_vocabulary), []
    for rows in (range(B), range(B // 2), range(B // 2, B)):
        asked.clear()
        read(dataset, rows)
        by_host.append({place for part in asked for place in part})
    alone, first, second = by_host
    assert first | second == alone
    assert not first & second
    assert len(first) == pytest.approx(len(alone) / 2, rel=0.05)
    assert len(alone) < 1.2 * STEPS * B * (S + T)  # about the tokens of the rows


def from_disk(action: Callable[[], object]) -> int:
    """Bytes that this process had read from a disk."""

    def count() -> int:
        return int(COUNTERS.read_text().split("\nread_bytes: ")[1].split()[0])

    before = count()
    action()
    return count() - before


def forget(folder: Path) -> int:
    """Let the system forget what it holds of the files; how many bytes they have."""
    for file in folder.glob("*.arrow"):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return sum(file.stat().st_size for file in folder.glob("*.arrow"))


@pytest.mark.skipif(not COUNTERS.exists(), reason="Linux counts what a process reads from disks")
def test_rows_alone_come_from_the_disk(config: DatasetConfig, small_vocabulary: Vocabulary):
    folder = task_directory(config.cache_dir, "text", "train")
    size = forget(folder)
    if from_disk(lambda: [file.read_bytes() for file in folder.glob("*.arrow")]) < size / 2:
        pytest.skip("the folder of temporary files is on no disk")
    forget(folder)
    dataset = open_dataset(config, small_vocabulary)
    rows = (STEPS + 2) * B // 2  # two more steps are made ahead
    assert 0 < from_disk(lambda: read(dataset, range(B // 2))) < rows * 5 * 4096 + 2**20 < size / 30
    assert from_disk(lambda: dataset.tasks["text"].store.lengths("targets")) < 2**20
