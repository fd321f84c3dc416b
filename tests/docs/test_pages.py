"""Every page of the documentation, followed line by line: its bash blocks are run in order, its Python too, in a folder
that holds what the page takes for granted. `train-your-own.md` runs as it stands; for the other pages models and
vocabularies are made small (`small.py`)."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import benchmark_sets
import blocks
import mistral_common
import published
import pytest

pytestmark = pytest.mark.slow

DATA = blocks.ROOT / "tasks" / "demo_data"
AS_IT_STANDS = {"train-your-own.md"}
PAGES = [
    page
    for page in blocks.PAGES
    if any(b.language in ("bash", "python") and not b.not_run for b in blocks.blocks(page))
]


class World:
    """A folder that a reader works in, with our commands on its PATH."""

    def __init__(self, folder: Path, commands: Path | None):
        self.folder = folder
        places = [str(place) for place in (commands, Path(sys.executable).parent) if place]
        hidden = {"VIKHR_T5_VOCABULARY", "VIKHR_T5_DATA_DIR", "PYTHONPATH"}
        self.variables = {name: value for name, value in os.environ.items() if name not in hidden}
        self.variables |= {
            "PATH": os.pathsep.join([*places, os.environ["PATH"]]),
            "HF_HUB_OFFLINE": "1",
            "VIKHR_T5_DATA_DIR": "data",
        }

    def run(self, *command: str | Path, where: str = "") -> None:
        done = subprocess.run(command, cwd=self.folder, env=self.variables, capture_output=True, text=True)
        assert done.returncode == 0, f"{where}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"

    def follow(self, block: blocks.Block) -> None:
        if block.language == "bash":
            self.run("bash", "-euo", "pipefail", "-c", block.text, where=str(block))
        elif block.language == "python":
            first = block.text.split("\n")[0]
            if first.startswith("# ") and first.endswith(".py"):
                (self.folder / first.removeprefix("# ")).write_text(block.text + "\n", encoding="utf-8")
            else:
                self.run(sys.executable, "-c", block.text, where=str(block))


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "vikhr-t5"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "small.py"} "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, commands: Path) -> Path:
    """What a reader has who went the road once: spiece.model, runs/{ul2,instruct} in our format, hf and t5x."""
    world = World(tmp_path_factory.mktemp("trained"), commands)
    world.run(
        "vikhr-t5",
        "vocab",
        "train",
        "--input",
        f"{DATA}/ru.txt,{DATA}/en.txt",
        "--output=spiece.model",
        "--size",
        "1500",
    )
    vocabulary = ["--gin.VOCABULARY_FILE=./spiece.model", "--gin.CACHE_DIR=./cache"]
    world.run("vikhr-t5", "train", "--gin_file=recipes/demo.gin", "--gin.MODEL_DIR=runs/ul2", *vocabulary)
    start = ["--gin.INITIAL_CHECKPOINT_PATH=runs/ul2", "--gin.MODEL_DIR=runs/instruct"]
    world.run("vikhr-t5", "train", "--gin_file=recipes/demo_finetune.gin", *start, *vocabulary)
    world.run("vikhr-t5", "convert", "--from=vikhr", "--to=hf", "runs/ul2", "hf", "--no-verify")
    world.run("vikhr-t5", "convert", "--from=vikhr", "--to=t5x", "runs/ul2", "t5x", "--no-verify")
    return world.folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_can_be_followed(page, request, tmp_path):
    small = page.name not in AS_IT_STANDS
    world = World(tmp_path, request.getfixturevalue("commands") if small else None)
    if page.name in PREPARE:
        PREPARE[page.name](tmp_path, request.getfixturevalue("trained"))
    followed = [block for block in blocks.blocks(page) if not block.not_run]
    for block in followed:
        world.follow(block)
    assert {block.language for block in followed} & {"bash", "python"}


# ---- what a page takes for granted -----------------------------------------------------------------------------------


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def conversion(folder: Path, trained: Path) -> None:
    copy(trained / "runs/ul2", folder / "runs/ul2")
    copy(trained / "runs/instruct", folder / "runs/demo/instruct")
    for name in ("google-flan-t5-base", "flan-t5-xl"):
        copy(trained / "hf", folder / name)
    (checkpoint,) = (trained / "t5x").glob("checkpoint_*")
    copy(checkpoint, folder / "t5_1_1_base/checkpoint_1000000")
    for name in ("spiece.model", "sentencepiece.model"):
        copy(trained / "spiece.model", folder / name)
    copy(DATA / "ru.txt", folder / "sample.txt")
    published_sets(folder / "data", published.CORPORA)


def vocabularies(folder: Path, trained: Path) -> None:
    for name in ("ru.txt", "parquet_folder/rows.txt"):
        copy(DATA / "ru.txt", folder / name)
    (folder / "articles.jsonl").write_text('{"text": "Статья."}\n')
    copy(trained / "hf", folder / "flan-t5-xl")
    copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model.v1")
    bytes_alone = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (folder / "o200k_base.tiktoken").write_text(bytes_alone)
    published_sets(folder / "data", published.CORPORA)


def mixtures(folder: Path, trained: Path) -> None:
    ukrainian = str.maketrans("ыэёъЫЭЁЪ", "иеєїИЕЄЇ")  # its letters, if not its words
    pages = (DATA / "ru.txt").read_text(encoding="utf-8").translate(ukrainian).split("\n\n")
    (folder / "data/uk").mkdir(parents=True)
    (folder / "data/uk/pages.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    copy(trained / "spiece.model", folder / "spiece.model")
    copy(DATA / "ru.txt", folder / "data/validation.txt")
    copy(DATA / "ru.txt", folder / "data/local/mine.txt")
    subprocess.run(["gzip", "-k", "-S", ".gz", "data/validation.txt"], cwd=folder, check=True)
    (folder / "data/validation.txt.gz").rename(folder / "data/train-1.txt.gz")
    published_sets(folder / "data", published.SETS)
    for name in ("me/answers", "me/quiz"):
        place = folder / "data" / name
        place.mkdir(parents=True)
        lines = (
            f'{{"question": "Сколько будет {n} + 1?", "options": ["{n + 1}", "{n + 2}"], "answer": "{n + 1}"}}'
            for n in range(600)
        )
        (place / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("xwinograd_ru", "xnli_ru", "ru_mmlu"):
        one = {"xwinograd_ru": published.XWINOGRAD, "xnli_ru": published.XNLI, "ru_mmlu": published.MMLU}[name]
        published.write(folder / "evaluation" / one.folder, one.table(published.PAGES[:9]), "parquet")
        for file in (folder / "evaluation" / one.folder).rglob("train-*"):
            file.rename(file.with_name(file.name.replace("train-", "test-")))


def published_sets(folder: Path, sets: dict[str, published.Published]) -> None:
    """Each in its published schema, with rows enough that one in 200 is there."""
    for one in sets.values():
        pages = [page for page in published.PAGES if len(page) > 300]
        texts = [f"{page} {n}" for n in range(2400 // len(pages)) for page in pages]
        published.write(folder / one.folder, one.table(texts), "parquet")


def inference(folder: Path, trained: Path) -> None:
    for stage in ("ul2", "instruct"):
        copy(trained / "runs" / stage, folder / "runs/demo" / stage)
    copy(trained / "hf", folder / "runs/demo/hf")
    for place in ("spiece.model", "runs/demo/vocabulary/spiece.model"):
        copy(trained / "spiece.model", folder / place)


def training(folder: Path, trained: Path) -> None:
    copy(trained / "runs", folder / "runs")
    copy(trained / "spiece.model", folder / "data/spiece.model")
    copy(DATA / "ru.txt", folder / "data/text.txt")
    copy(DATA / "parallel.jsonl", folder / "data/parallel.jsonl")
    (tasks,) = (
        b.text for b in blocks.blocks(blocks.ROOT / "docs/train-your-own.md") if b.text.startswith("# my_tasks.py")
    )
    (folder / "my_tasks.py").write_text(tasks, encoding="utf-8")


def translation(folder: Path, trained: Path) -> None:
    copy(trained / "spiece.model", folder / "spiece.model")
    rows = ({"inputs": f"Сколько будет {n}?", "targets": str(n), "task_name": "sums"} for n in range(60))
    place = folder / "data/me/flan_ru/rows.jsonl"
    place.parent.mkdir(parents=True)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scaling(folder: Path, trained: Path) -> None:
    copy(trained / "spiece.model", folder / "spiece.model")


def benchmarks(folder: Path, trained: Path) -> None:
    copy(trained / "hf", folder / "runs/demo/hf")
    benchmark_sets.write_all(folder / "evaluation", items=9, of_subject=1)


PREPARE: dict[str, Callable[[Path, Path], None]] = {
    "benchmarks.md": benchmarks,
    "conversion.md": conversion,
    "inference.md": inference,
    "vocabularies.md": vocabularies,
    "mixtures.md": mixtures,
    "scaling.md": scaling,
    "training.md": training,
    "translation.md": translation,
}
