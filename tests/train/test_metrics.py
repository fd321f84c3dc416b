"""metrics.jsonl, TensorBoard files as TensorBoard reads them, and the figures of a step."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from vikhr_t5.devices import KINDS
from vikhr_t5.errors import UserError
from vikhr_t5.train.metrics import Cost, MetricsLog, memory_gib, peak_flops, summarize, summarize_training

SUMS = {
    "loss": 60.0, "z_loss": 3.0, "correct": 10.0, "weight": 20.0, "grad_norm": 8.0, "learning_rate": 0.5,
    "inputs": 300, "targets": 100, "steps": 5, "bad_steps": 1,
    "source_loss": np.array([0.0, 40.0, 0.0, 20.0]),
    "source_correct": np.array([0.0, 4.0, 0.0, 6.0]),
    "source_weight": np.array([0.0, 8.0, 0.0, 12.0]),
}  # fmt: skip


def test_summary_by_hand():
    cost = Cost(batch_shape=(4, 25, 10), flops_per_step=1e9, flops_per_second=1e10)
    summary = summarize_training(SUMS, ("a", "unseen", "b"), seconds=2.0, cost=cost)
    del summary["memory_gib"]
    assert summary == pytest.approx({
        "loss": 3.0, "z_loss": 0.15, "accuracy": 0.5, "learning_rate": 0.5, "grad_norm": 2.0, "skipped_steps": 1,
        "loss/a": 5.0, "accuracy/a": 0.5, "loss/b": 20 / 12, "accuracy/b": 0.5,
        "tokens_per_second": 200.0, "target_tokens_per_second": 50.0, "step_seconds": 0.4, "steps_per_second": 2.5,
        "mfu": 0.25, "useful_inputs": 300 / (4 * 4 * 25), "useful_targets": 100 / (4 * 4 * 10),
    })  # fmt: skip


def test_hundreds_of_sets_are_one_figure_in_a_line_of_training_and_each_its_own_in_an_evaluation():
    names = ("text/R", *(f"flan/glue/{n}:1.0.0" for n in range(300)), "text/X")
    rng = np.random.default_rng(0)
    sums = SUMS | {f"source_{kind}": rng.integers(1, 9, 303).astype(float) for kind in ("loss", "correct", "weight")}
    cost = Cost(batch_shape=(4, 25, 10), flops_per_step=1e9, flops_per_second=1e10)
    training = summarize_training(sums, names, seconds=2.0, cost=cost)
    assert {name for name in training if name.startswith("loss/")} == {"loss/text/R", "loss/text/X", "loss/flan"}
    of_flan = slice(2, 302)
    assert training["loss/flan"] == sums["source_loss"][of_flan].sum() / sums["source_weight"][of_flan].sum()
    assert training["accuracy/flan"] == sums["source_correct"][of_flan].sum() / sums["source_weight"][of_flan].sum()
    every = summarize(sums, names)
    assert {name for name in every if name.startswith("loss/")} == {"loss/flan", *(f"loss/{name}" for name in names)}
    assert every["loss/flan/glue/7:1.0.0"] == sums["source_loss"][9] / sums["source_weight"][9]
    few = summarize(sums, names[:21])  # text/R, and twenty sets
    assert "loss/flan" not in few
    assert few["loss/flan/glue/19:1.0.0"] == sums["source_loss"][21] / sums["source_weight"][21]


def test_peak_is_measured_where_the_table_has_none():
    flops, source = peak_flops("float32")
    assert 1e9 < flops < 1e14
    assert "measured" in source


def test_peak_is_the_tables_where_it_has_the_device(monkeypatch):
    for kind, expected in (("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("Tesla V100-SXM2-32GB", 125),
                           ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362), ("TPU v5 lite", 197)):  # fmt: skip
        device = type("Device", (), {"device_kind": kind})
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert peak_flops("bfloat16")[0] == expected * 1e12, kind


def test_no_entry_of_the_peak_table_hides_another():
    names = [prefix for kind in KINDS for prefix in kind.prefixes]
    for i, name in enumerate(names):
        assert not any(name.startswith(earlier) for earlier in names[:i]), name


def test_memory_is_that_of_this_process():
    before = memory_gib()
    block = np.ones(2**28, np.uint8)
    assert before < 16
    assert memory_gib() >= max(before, block.nbytes / 2**30)


def test_lines_and_events(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write("start", 0, {"origin": "fresh"})
    log.write("train", 10, {"loss": 2.123456789, "useful_inputs": 0.5, "steps_per_second": 3.0})
    log.write("eval", 10, {"task": "a_mixture", "loss": 1.5})
    log.write_samples(10, [{"task": "t", "input": "Вихрь", "target": "x", "prediction": "y"}])
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("start", 0), ("train", 10), ("eval", 10)]
    assert lines[1]["loss"] == 2.123457
    assert "Вихрь" in (tmp_path / "samples.jsonl").read_text()
    assert scalars(tmp_path / "train") == {
        ("loss_per_nonpadding_target_token", 10): pytest.approx(2.1234568),
        ("non_padding_fraction/encoder", 10): 0.5,
        ("timing/steps_per_second", 10): 3.0,
    }
    assert scalars(tmp_path / "training_eval" / "a_mixture") == {("loss_per_nonpadding_target_token", 10): 1.5}


def scalars(folder) -> dict[tuple[str, int], float]:
    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found[value.tag, event.step] = (
                    value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
                )
    return found


def test_a_resume_drops_later_and_broken_lines(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 1, "lo')
    log = MetricsLog(tmp_path, 2)
    log.write("train", 3, {"loss": 30.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_json_has_no_nan(tmp_path):
    MetricsLog(tmp_path, 0).write("train", 1, {"loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["loss"] is None


def test_a_full_disk_is_one_line(tmp_path):
    log = MetricsLog(tmp_path, 0)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"No space left on device"):
        log.write("end", 1, {})


def test_the_trainer_imports_no_tensorflow():
    """Not even through TensorBoard's writer, which takes TensorFlow where it is installed."""
    code = (
        "import sys, pathlib, tempfile, vikhr_t5.train.loop as loop\n"
        "log = loop.metrics.MetricsLog(pathlib.Path(tempfile.mkdtemp()), 0)\n"
        "log.write('train', 1, {'loss': 1.0})\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'seqio', 'torch')]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
