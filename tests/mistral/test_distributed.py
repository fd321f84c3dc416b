"""Two processes and one; kill -9 and again: the same losses (slow, in processes of their own)."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_mistral
import yaml

pytestmark = pytest.mark.slow
RUN = "import sys; from vikhr_mistral.pretrain import pretrain; pretrain(sys.argv[1], sys.argv[2:])"
STEPS = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_mistral.folder(folder / "model")
    for language in ("ru", "en"):
        (folder / f"{language}.txt").write_text("\n\n".join(tiny_mistral.lines(language, 400)))
    (folder / "run.py").write_text(RUN)
    values = {
        "model": str(folder / "model"),
        "output_dir": "",
        "corpora": {
            "ru": {"files": str(folder / "ru.txt"), "share": 0.75},
            "en": {"files": str(folder / "en.txt"), "share": 0.25},
        },
        "held_out": {"ru": {"files": str(folder / "ru.txt"), "rows": 5}},
        "sequence_length": 64,
        "train": {
            "max_steps": STEPS, "batch_size": 8, "per_device_batch_size": 2, "warmup_steps": 2, "learning_rate": 0.005,
            "precision": "float32", "log_every": 1, "eval_every": 4, "save_every": 4, "data_workers": 0, "fsdp": True,
        },
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def command(base: Path, output: Path, processes: int, overrides: list[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv-backend=c10d"]
    launcher += ["--rdzv-endpoint=localhost:0"]
    start = [sys.executable, *(launcher if processes > 1 else []), str(base / "run.py"), str(base / "config.yaml")]
    return [*start, f"output_dir={output}", *overrides]


def run(base: Path, output: Path, processes: int, overrides: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(base, output, processes, overrides), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def lines(output: Path, kind: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def column(output: Path, name: str, kind: str = "train") -> list[float]:
    return [line[name] for line in lines(output, kind)]


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainable=full", "anchor.loss=slerp", "anchor.t=0.5"],
        ["trainable=lora", "lora.dropout=0.0", "anchor.loss=linear", "anchor.t=0.3"],
        ["trainable=embeddings"],
    ],
    ids=["full with a frozen copy", "lora without its adapters", "embeddings"],
)
def test_two_processes_give_the_losses_of_one_and_one_goes_on_from_two(base, tmp_path, overrides):
    run(base, tmp_path / "one", 1, overrides)
    run(base, tmp_path / "two", 2, overrides)
    names = ["loss", "loss/ru", "grad_norm", *(["kl", "objective"] if "anchor.t" in str(overrides) else [])]
    for name in names:
        assert column(tmp_path / "one", name) == pytest.approx(column(tmp_path / "two", name), abs=1e-4), name
    assert column(tmp_path / "one", "loss", "eval") == pytest.approx(column(tmp_path / "two", "loss", "eval"), abs=1e-4)
    assert lines(tmp_path / "two", "start")[0]["devices"] == 2
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    state = tmp_path / "resumed" / "checkpoints" / "checkpoint-4" / "state"
    assert len(list(state.glob("*.distcp"))) == 2  # each process wrote its shards
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"checkpoint-{STEPS}")
    shutil.rmtree(tmp_path / "resumed" / "model")
    run(base, tmp_path / "resumed", 1, overrides)
    assert [line["devices"] for line in lines(tmp_path / "resumed", "start")] == [2, 1]
    assert column(tmp_path / "one", "loss") == pytest.approx(column(tmp_path / "resumed", "loss"), abs=1e-4)
    assert (tmp_path / "resumed" / "model" / "tokenizer.json").exists()


def test_kill_9_at_random_moments(base, tmp_path):
    """LoRA with dropout, a mixture, slerp with a schedule; the losses after all kills are those without, to 1e-6."""
    overrides = ["trainable=lora", "lora.dropout=0.2", "anchor.loss=slerp", "anchor.t=0.1", "anchor.t_end=0.7"]
    overrides += ["train.max_steps=40", "train.save_every=3", "train.eval_every=0", "train.keep_checkpoints=2"]
    run(base, tmp_path / "whole", 1, overrides)
    seed = random.randrange(1 << 30)
    print("seed", seed)
    moments, killed, output = random.Random(seed), 0, tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while killed < 7:
        steps = len(lines(output)) if (output / "metrics.jsonl").exists() else 0
        with open(tmp_path / "log", "a") as log:
            process = subprocess.Popen(command(base, output, 1, overrides), env=environment, stdout=log, stderr=log)
        enough = steps + moments.randrange(1, 7)
        while process.poll() is None and (not (output / "metrics.jsonl").exists() or len(lines_safe(output)) < enough):
            time.sleep(0.01)
        time.sleep(moments.random() * 0.4)  # inside a step or a save
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        killed += 1
    assert killed >= 5
    run(base, output, 1, overrides)
    for name in ("loss", "objective", "kl", "t", "grad_norm"):
        assert column(output, name) == pytest.approx(column(tmp_path / "whole", name), abs=1e-6), name
    assert len(lines(output)) == 40
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["checkpoint-39", "checkpoint-40"]


def lines_safe(output: Path) -> list[str]:
    return [line for line in (output / "metrics.jsonl").read_text().splitlines() if '"kind": "train"' in line]
