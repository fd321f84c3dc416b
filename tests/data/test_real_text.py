"""Debian's documentation in Russian, fetched, cleaned, without duplicates, cached, and learned from. Slow: 10 MB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import debian_text
from vikhr_t5.data.store import TokenStore, task_directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/local`: a file of JSON lines for each package."""
    folder = tmp_path_factory.mktemp("debian")
    local, size = folder / "data" / "local", 0
    local.mkdir(parents=True)
    for package in debian_text.PACKAGES:
        try:
            pages = debian_text.fetch(package)
        except OSError as error:
            pytest.skip(f"apt-get cannot fetch Debian's packages here: {error}")
        lines = [json.dumps({"text": text, "file": file}, ensure_ascii=False) + "\n" for file, text in pages]
        (local / f"{package}.jsonl").write_text("".join(lines), encoding="utf-8")
        size += sum(len(text.encode()) for _, text in pages)
    assert size > 10_000_000
    return folder


def command(folder: Path, *arguments: str) -> str:
    """stderr of `vikhr-t5`, which must succeed."""
    environment = os.environ | {"VIKHR_T5_DATA_DIR": "data"}
    line = [sys.executable, "-m", "vikhr_t5.cli", *arguments]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.mark.slow
def test_real_text_is_cached_and_learned(folder: Path) -> None:
    task = ("--mixture=local_ul2", "--module=tasks.corpora")
    command(folder, "vocab", "train", *task, "--output=spiece.model", "--size=7892")
    said = command(folder, "cache", *task, "--vocabulary=spiece.model", "--cache_dir=cache", "--dedup=minhash")
    manifest = TokenStore(task_directory(folder / "cache", "local_ul2", "train")).manifest
    assert manifest.num_read == manifest.num_examples + sum(manifest.dropped.values()) > 1000
    assert {"enough_letters", "length_within", "duplicate"} <= set(manifest.dropped)  # the packages have some English
    assert f"dropped: {manifest.dropped['enough_letters']} enough_letters" in said
    assert manifest.num_tokens["targets"] > 1_000_000
    gin = {
        "MODEL_DIR": "'run'",
        "VOCABULARY_FILE": "'spiece.model'",
        "CACHE_DIR": "'cache'",
        "MIXTURE_OR_TASK_NAME": "'local_ul2'",
        "MIXTURE_OR_TASK_MODULE": "'tasks.corpora'",
        "TRAIN_STEPS": "100",
        "BATCH_SIZE": "2",
        "checkpoints.SaveCheckpointConfig.period": "100",
    }
    command(folder, "train", "--gin_file=recipes/demo.gin", *(f"--gin.{name}={value}" for name, value in gin.items()))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 1.5
    held_out = [line["loss"] for line in lines if line["kind"] == "eval"]
    assert held_out[-1] < losses[0] - 1.5
