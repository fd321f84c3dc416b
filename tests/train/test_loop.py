"""The loop: exact resume after kill -9, signals, restore precedence, non-finite losses, the run folder."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from tiny_run import CONFIG, TinyDataset, dataset_config, run, tiny_model

from conversion.stored import load
from conversion.vikhr import Checkpoint
from vikhr_t5.errors import UserError
from vikhr_t5.model.network import T5Config
from vikhr_t5.train import loop, optimizers
from vikhr_t5.train.loop import NonFiniteLoss
from vikhr_t5.train.step import Trainer

TESTS = Path(__file__).parents[1]


def lines(run_dir: Path, kind: str | None = None, file: str = "metrics.jsonl") -> list[dict]:
    records = [json.loads(line) for line in (run_dir / file).read_text().splitlines()]
    return [record for record in records if kind in (None, record.get("kind"))]


def same_params(a: Path, b: Path) -> bool:
    a, b = Checkpoint(a), Checkpoint(b)
    return a.step == b.step and jax.tree.all(jax.tree.map(np.array_equal, load(a), load(b)))


def start(run_dir: Path, **arguments) -> subprocess.Popen:
    """`tiny_run.run` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    return subprocess.Popen(
        [sys.executable, TESTS / "tiny_run.py", run_dir, json.dumps(arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """12 steps without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, 12) == 12
    return folder


def test_the_run_folder(whole_run):
    names = {"checkpoints", "config.gin", "model_config.json", "vocabulary", "metrics.jsonl", "samples.jsonl"}
    assert names <= set(os.listdir(whole_run))
    assert sorted(os.listdir(whole_run / "checkpoints"), key=int) == ["8", "10", "12"]
    assert sorted(os.listdir(whole_run / "vocabulary")) == ["spiece.model", "vocabulary.json"]
    assert T5Config.from_json((whole_run / "model_config.json").read_text()).vocab_size == 128


def test_metrics_lines(whole_run):
    assert [line["step"] for line in lines(whole_run, "train")] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines(whole_run, "eval")] == [4, 8, 12]
    (begin,), (end,) = lines(whole_run, "start"), lines(whole_run, "end")
    assert begin["parameters"] == tiny_model().config.param_count()
    assert end["finished"] is True
    for line in lines(whole_run, "train"):
        for name in (
            *("loss", "accuracy", "z_loss", "learning_rate", "grad_norm", "loss/copy", "accuracy/reverse", "mfu"),
            *("tokens_per_second", "step_seconds", "useful_inputs", "useful_targets", "memory_gib"),
        ):
            assert np.isfinite(line[name]), name
        assert 0 < line["mfu"] < 1
    losses = [line["loss"] for line in lines(whole_run, "eval")]
    assert losses == sorted(losses, reverse=True)


def test_metrics_are_those_of_the_batches(whole_run):
    """Useful shares from the batches themselves; the first loss about that of guessing."""
    batches = list(TinyDataset(dataset_config()).batches(0, num_steps=2))
    first = lines(whole_run, "train")[0]
    for side, tokens in (("inputs", "encoder_input_tokens"), ("targets", "decoder_target_tokens")):
        assert first[f"useful_{side}"] == pytest.approx(np.mean([(b[tokens] > 0).mean() for b in batches]), rel=1e-4)
    assert first["loss"] == pytest.approx(np.log(128), abs=1.0)


def test_samples(whole_run):
    samples = lines(whole_run, file="samples.jsonl")
    assert [(s["step"], s["task"]) for s in samples] == [(n, t) for n in (4, 8, 12) for t in ("copy", "reverse")]
    for sample in samples:
        words = sample["input"].split()
        assert sample["target"].split() == (words if sample["task"] == "copy" else words[::-1])
        assert isinstance(sample["prediction"], str)


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(whole_run, tmp_path):
    """With dropout: to the bit, the batches are the rest of the same sequence, and each line of metrics stands once."""
    first, rest = TinyDataset(dataset_config()), TinyDataset(dataset_config())
    run(tmp_path, 6, dataset=first)
    run(tmp_path, 12, dataset=rest)
    assert (first.seen, rest.seen) == (list(range(6)), list(range(6, 12)))
    assert same_params(tmp_path, whole_run)
    both = zip(lines(tmp_path, "train"), lines(whole_run, "train"), strict=True)
    assert all((a["step"], a["loss"], a["grad_norm"]) == (b["step"], b["loss"], b["grad_norm"]) for a, b in both)


@pytest.mark.slow
@pytest.mark.parametrize("moment_dtype", ["bfloat16", "8bit"])
def test_small_types_and_host_memory_resume_to_the_bit(tmp_path, moment_dtype):
    """Rounding draws by the step's number, and a checkpoint keeps parameters and moments as they are."""
    model = tiny_model(optimizer=optimizers.AdamW(moment_dtype=moment_dtype), param_dtype="bfloat16")
    trainer = Trainer(lambda _: np.float32(0.01))
    options = {"model": model, "trainer": trainer, "evaluate": False, "optimizer_memory": "pinned_host"}
    for run_dir, stops in (("whole", [4]), ("halves", [2, 4])):
        for stop in stops:
            run(tmp_path / run_dir, stop, **options)
    whole, halves = (tmp_path / name / "checkpoints" / "4" for name in ("whole", "halves"))
    assert Checkpoint(whole).dtype == "bfloat16"
    chunks = [path.relative_to(whole) for item in ("params", "opt_state") for path in (whole / item).glob("*/*")]
    assert any(".codes/" in str(chunk) for chunk in chunks) == (moment_dtype == "8bit")
    assert all((whole / chunk).read_bytes() == (halves / chunk).read_bytes() for chunk in chunks)


def test_a_finished_run_does_nothing_more(whole_run):
    before = (whole_run / "metrics.jsonl").read_bytes()
    with mock.patch.object(Trainer, "traced") as compiling:
        assert run(whole_run, 12) == 12
    compiling.assert_not_called()
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_the_step_is_compiled_while_the_data_start(tmp_path):
    compiling = threading.Event()
    traced = Trainer.traced

    def mark(*arguments):
        compiling.set()
        return traced(*arguments)

    class Packing(TinyDataset):
        def pack(self):
            assert compiling.wait(60), "packing came first"

    with mock.patch.object(Trainer, "traced", mark):
        assert run(tmp_path, 1, dataset=Packing(dataset_config())) == 1


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_compiled(whole_run, tmp_path):
    wider = tiny_model(dataclasses.replace(CONFIG, mlp_dim=64))
    with mock.patch.object(Trainer, "traced") as compiling, pytest.raises(UserError, match="set T5Config"):
        run(tmp_path, model=wider, initial=str(whole_run))
    compiling.assert_not_called()


def test_a_run_that_was_killed_before_its_last_line_gets_it(whole_run, tmp_path):
    """Whoever starts it again until the last line says so would never end."""
    shutil.copytree(whole_run, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_text().splitlines(keepends=True)
    path.write_text("".join(before[:-1]))
    assert run(tmp_path / "run", 12) == 12
    assert lines(tmp_path / "run")[-1]["finished"] is True
    assert len(lines(tmp_path / "run")) == len(before)


@pytest.mark.parametrize("never", [0, None])
def test_no_period_is_never(tmp_path, never):
    """No evaluation, and lines of metrics before checkpoints alone."""
    assert run(tmp_path, 4, period=3, eval_period=never, stats_period=never) == 4
    assert [line["step"] for line in lines(tmp_path, "train")] == [3, 4]
    assert not lines(tmp_path, "eval")


@pytest.mark.parametrize("name", ["eval_period", "stats_period"])
def test_a_negative_period_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"train.{name} cannot be -1"):
        run(tmp_path / "run", **{name: -1})
    assert not (tmp_path / "run").exists()


def test_counts_are_read_before_they_could_overflow(tmp_path, monkeypatch):
    """As if a counter held no more than three batches of padding-free inputs."""
    monkeypatch.setattr(loop, "COUNTED", 3 * 8 * 24)
    run(tmp_path, 7, period=7, stats_period=0, evaluate=False)
    assert [line["step"] for line in lines(tmp_path, "train")] == [3, 6, 7]
    batches = TinyDataset(dataset_config()).batches(0, num_steps=7)
    counted = sum((b[f"{side}_tokens"] > 0).sum() for b in batches for side in ("encoder_input", "decoder_target"))
    assert json.loads((tmp_path / "checkpoints" / "7" / "progress.json").read_text())["tokens"] == counted


def test_lines_past_the_checkpoint_are_dropped_on_resume(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    for step in (10, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut short by a kill
    run(tmp_path / "run", 12)
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == [4, 8, 12]
    assert same_params(tmp_path / "run", whole_run)


def test_a_cut_short_newest_checkpoint_is_passed_over(whole_run, tmp_path, capfd):
    shutil.copytree(whole_run, tmp_path / "run")
    data = max((tmp_path / "run" / "checkpoints" / "12" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    os.truncate(data, 10)
    assert run(tmp_path / "run", 12) == 12
    said = capfd.readouterr().err
    assert re.search(r"checkpoints/12 is not whole \(.* has 10 of \d+ bytes\): set aside as 12.damaged", said)
    assert "resumed from" in said
    assert "/checkpoints/10, step 10 of 12" in said
    assert same_params(tmp_path / "run", whole_run)


def test_restore_precedence(whole_run, tmp_path, capfd):
    """Own checkpoint, then the initial one, then fresh; the data of a run from an initial checkpoint begins anew."""
    fresh, started, resumed = (TinyDataset(dataset_config()) for _ in range(3))
    run(tmp_path / "a", 2, dataset=fresh, evaluate=False)
    run(tmp_path / "b", 14, initial=str(whole_run), dataset=started, evaluate=False)
    run(tmp_path / "b", 16, initial=str(whole_run / "checkpoints" / "8"), dataset=resumed, evaluate=False)
    assert (fresh.seen, started.seen, resumed.seen) == ([0, 1], [0, 1], [2, 3])
    said = capfd.readouterr().err
    assert "fresh parameters, seed 0, step 0 of 2" in said
    assert f"started from {whole_run}/checkpoints/12, step 12 of 14" in said
    assert f"resumed from {tmp_path}/b/checkpoints/14, step 14 of 16" in said


def test_relative_steps(whole_run, tmp_path):
    assert run(tmp_path, 0, relative_steps=2, initial=str(whole_run), evaluate=False) == 14
    assert (
        run(tmp_path, 0, relative_steps=4, initial=str(whole_run), evaluate=False) == 16
    )  # counted from the initial checkpoint
    with pytest.raises(UserError, match=r"step 12; training ends at 10, .*TRAIN_STEPS=22, or TRAIN_STEPS_RELATIVE=10"):
        run(tmp_path / "late", 10, initial=str(whole_run))


def test_another_optimizer_from_the_initial_checkpoint(whole_run, tmp_path):
    model = tiny_model(optimizer=optimizers.AdamW())
    with pytest.raises(UserError, match="reset_optimizer"):
        run(tmp_path, 14, initial=str(whole_run), model=model)
    assert run(tmp_path, 14, initial=str(whole_run), model=model, reset_optimizer=True, evaluate=False) == 14


def test_another_shape_is_refused(whole_run, tmp_path):
    wider = tiny_model(T5Config(**{**CONFIG.__dict__, "mlp_dim": 48}))
    with pytest.raises(UserError, match=r"mlp/wi_0/kernel is \[1, 16, 32\], this model's is \[1, 16, 48\]"):
        run(tmp_path, 14, initial=str(whole_run), model=wider)


def test_the_best_needs_an_evaluation_at_each_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"make its period \(6\) a multiple of EVAL_PERIOD \(4\)"):
        run(tmp_path, period=6, best_metric="loss")


def test_batch_size_is_checked_before_anything_else(tmp_path):
    trainer = Trainer(optimizers.create_learning_rate_scheduler("constant", 0.05), num_microbatches=3)
    with pytest.raises(UserError, match="batch size 8 does not divide"):
        run(tmp_path / "run", trainer=trainer)
    assert not (tmp_path / "run").exists()


class ExplodingDataset(TinyDataset):
    """A token that the embedding has no row for: the loss of step 6 (batch 5) is not finite."""

    def batches(self, *args, **kwargs):
        for number, batch in enumerate(super().batches(*args, **kwargs)):
            if number == 5:
                batch["encoder_input_tokens"][0, 0] = 1000
            yield batch


def test_a_non_finite_loss_stops_and_names_the_last_good_checkpoint(tmp_path):
    with pytest.raises(
        NonFiniteLoss, match=rf"not finite at step 6; the last good checkpoint is {tmp_path}/checkpoints/4:"
    ):
        run(tmp_path, 12, stats_period=4, period=4, dataset=ExplodingDataset(dataset_config()), evaluate=False)
    assert [line["step"] for line in lines(tmp_path, "train")] == [4]
    assert os.listdir(tmp_path / "checkpoints") == ["4"]


def test_a_non_finite_update_is_skipped_if_so_configured(tmp_path):
    trainer = Trainer(optimizers.create_learning_rate_scheduler("constant", 0.05), on_non_finite="skip")
    dataset = ExplodingDataset(dataset_config())
    assert run(tmp_path, 8, stats_period=4, period=4, dataset=dataset, evaluate=False, trainer=trainer) == 8
    assert [line["skipped_steps"] for line in lines(tmp_path, "train")] == [0, 1]
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path, "train"))
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(load(Checkpoint(tmp_path))))


def test_the_best_checkpoint_is_kept_besides_the_newest(tmp_path):
    """Here the largest loss is the best, so that it is not the newest."""
    run(tmp_path, 12, period=4, keep=1, best_metric="loss", best_mode="max")
    losses = {line["step"]: line["loss"] for line in lines(tmp_path, "eval")}
    best = max(losses, key=losses.get)
    assert best == 4
    assert sorted(os.listdir(tmp_path / "checkpoints"), key=int) == ["4", "12"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_0(whole_run, tmp_path, number):
    process = start(tmp_path, total_steps=12, period=1000, slow=0.5)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and lines(tmp_path, "train"), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    stopped = Checkpoint(tmp_path).step
    assert 0 < stopped < 12
    assert f"{number.name}: saved step {stopped} of 12; run the same command to go on" in said
    assert "Traceback" not in said
    run(tmp_path, 12)
    assert same_params(tmp_path, whole_run)


def test_a_second_signal_aborts(tmp_path):
    process = start(tmp_path, total_steps=10**6, period=10**6, slow=1.0)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and lines(tmp_path, "start"), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_changes_nothing(tmp_path, kills):
    """Killed at random moments (saves take much of the time), run again until it ends: equal to the bit."""
    steps, rng = 10 * kills, random.Random(0)
    run(tmp_path / "whole", steps, evaluate=False)
    killed, during_save = 0, 0
    for _ in range(10 * kills):
        process = start(tmp_path / "killed", total_steps=steps, slow=0.05, evaluate=False, period=1)
        begun = count_starts(tmp_path / "killed")
        wait_for(lambda begun=begun: count_starts(tmp_path / "killed") > begun, process)
        if killed < kills:
            time.sleep(rng.uniform(0, 0.8))
            if process.poll() is None:
                process.kill()
                killed += 1
        process.communicate(timeout=300)
        during_save += any((tmp_path / "killed" / "checkpoints").glob("*tmp*"))
        if process.returncode == 0:
            break
    assert process.returncode == 0
    assert killed == kills
    assert kills < 20 or during_save > 0
    assert same_params(tmp_path / "killed", tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "killed", "train")] == list(range(1, steps + 1))


def count_starts(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"kind": "start"') if path.exists() else 0
