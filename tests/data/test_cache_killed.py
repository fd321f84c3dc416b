"""`kill -9` at random moments of caching: the next run ends with the bytes of one that nobody killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cached_tasks import DEMO, files, store_of, write_module

ROOT = Path(__file__).parents[2]
KILLS = 20


def start(name: str, cache_dir: str, workers: int, dedup: str) -> subprocess.Popen:
    """Caching in a process group of its own; text of any size goes to the workers."""
    program = (
        "import sys\nfrom vikhr_t5.data import cache\ncache.SMALL_BYTES = 0\n"
        f"cache.cache('{name}_text', '{name}', {cache_dir!r}, ['train'], num_workers={workers}, dedup_method={dedup!r})"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()])}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "dedup"), [(1, "none"), (2, "minhash")])
def test_killed_at_random_moments(tmp_path, small_vocabulary, monkeypatch, workers, dedup):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    text = (DEMO / "ru.txt").read_text(encoding="utf-8")
    (tmp_path / "data" / "pages.txt").write_text(f"{text}\n\n{text[: len(text) // 3]}", encoding="utf-8")
    name = write_module(tmp_path, tmp_path / "data", small_vocabulary.sentencepiece_model_file, piece_bytes=100_000)
    task, began = f"{name}_text", time.monotonic()
    assert start(name, "whole", workers, dedup).wait() == 0
    duration, chance = time.monotonic() - began, random.Random(workers)
    expected, kills, inside = files(task, "whole"), 0, 0
    assert len(expected) > 20
    while kills < KILLS:
        process = start(name, "cache", workers, dedup)
        try:
            process.wait(chance.uniform(0.3, 1.1) * duration)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        inside += any(Path("cache").rglob("*.partial/**/*.json"))
        if Path("cache/tasks", task, "train", "manifest.json").exists():
            assert files(task) == expected
            subprocess.run(["rm", "-r", "cache"], check=True)
    assert inside > KILLS / 4
    assert start(name, "cache", workers, dedup).wait() == 0
    assert files(task) == expected
    assert store_of(task).manifest == store_of(task, cache_dir="whole").manifest
    assert sorted(path.name for path in store_of(task).directory.iterdir()) == sorted([*expected, "manifest.json"])
    assert [path.name for path in Path("cache/tasks", task).iterdir()] == ["train"]
