"""Metrics of generated text during training: those of greedy answers, one by one; the best checkpoint by one."""

import dataclasses
import importlib.util
import json
import os

import jax
import numpy as np
import pytest
from tiny_run import CONFIG, LENGTHS, TinyDataset, dataset_config, run, tiny_model

from vikhr_t5 import text_metrics
from vikhr_t5.data.manifest import TaskMetrics
from vikhr_t5.data.rows import Segment
from vikhr_t5.errors import UserError
from vikhr_t5.model import decoding
from vikhr_t5.train import generation
from vikhr_t5.train.generation import GenerativeEvaluator
from vikhr_t5.train.partitioning import Partitioner

METRICS = {
    "copy": TaskMetrics(("chrf", "sequence_accuracy"), ("own_f1",)),
    "reverse": TaskMetrics(("chrf",)),
    "plain": TaskMetrics(),
}


class FewExamples:
    """`Rows` of a task, as far as they are asked."""

    def __init__(self, reverse: bool):
        self.reverse = reverse

    def first(self, count):
        rng = np.random.default_rng(0)
        inputs = [rng.integers(3, 90, rng.integers(1, 9)).astype(np.int32) for _ in range(7)]
        sides = [(np.append(ids, 1), np.append(ids[::-1] if self.reverse else ids, 1)) for ids in inputs]
        return [Segment(None, None, *pair, 1) for pair in sides][:count]


@dataclasses.dataclass
class MeasuredDataset(TinyDataset):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.metrics = METRICS
        self.tasks = {"copy": FewExamples(False), "reverse": FewExamples(True)}


def test_metrics_are_those_of_each_answer_alone(monkeypatch, capfd):
    """Over several batches, the last of them not full; 5 examples of a task, and 7, which are all."""
    monkeypatch.setattr(generation, "ROWS_PER_DEVICE", 4)
    model, dataset = tiny_model(dataclasses.replace(CONFIG, dropout_rate=0.5)), MeasuredDataset(dataset_config())
    params = jax.jit(model.init_state)(jax.random.key(0)).params
    decode = model.vocabulary.decode
    pairs = {}
    for task, rows in dataset.tasks.items():
        for example in rows.first(None):
            tokens = np.zeros((1, LENGTHS["inputs"]), np.int32)  # one shape, one compilation
            tokens[0, : len(example.inputs)] = example.inputs
            ids = decoding.greedy(params, model.config, tokens, LENGTHS["targets"], eos_id=1, vocab_size=100)
            pair = decode(example.targets.tolist()), decode(np.asarray(ids)[0].tolist())
            pairs.setdefault(task, []).append(pair)
    for count in (5, None):
        evaluator = GenerativeEvaluator(model, Partitioner(), dataset, count)
        found = evaluator.metrics(params)
        chrf = {task: text_metrics.chrf(*zip(*some[:count], strict=True))["chrf"] for task, some in pairs.items()}
        assert found == pytest.approx({
            "chrf/copy": chrf["copy"], "chrf/reverse": chrf["reverse"], "chrf": sum(chrf.values()) / 2,
            "sequence_accuracy/copy": 0, "sequence_accuracy": 0,
        })  # fmt: skip
        assert found["chrf"] > 0
        assert set(evaluator.names) == set(found)
    assert capfd.readouterr().err.splitlines()[0] == (
        "evaluation: `vikhr-t5 eval` computes own_f1 of copy, which training cannot"
    )


def test_a_metric_without_its_package_is_left_out(monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    evaluator = GenerativeEvaluator(tiny_model(), Partitioner(), MeasuredDataset(dataset_config()), 1)
    assert set(evaluator.names) == {"sequence_accuracy", "sequence_accuracy/copy"}
    assert "chrf is left out: sacrebleu not installed: pip install 'vikhr-t5[metrics]'" in capfd.readouterr().err


def test_the_best_checkpoint_by_a_metric_of_generated_text(tmp_path, monkeypatch):
    """Its values are made up, so that the best is neither the first nor the last."""
    values = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(GenerativeEvaluator, "metrics", lambda self, params: {"chrf/copy": next(values)})
    dataset = MeasuredDataset(dataset_config())
    best = {"best_metric": "chrf/copy", "best_mode": "max", "keep": 1}
    run(tmp_path, 6, eval_period=2, dataset=dataset, infer_eval_examples=2, **best)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["chrf/copy"] for line in lines if line["kind"] == "eval"] == [10, 30, 20]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4", "6"]


def test_a_best_metric_that_no_evaluation_gives_is_refused_at_the_start(tmp_path):
    dataset = MeasuredDataset(dataset_config())
    known = r"'chrff/copy' is no metric of this evaluation \(nearest: chrf/copy"
    with pytest.raises(UserError, match=known):
        run(tmp_path, 4, period=4, dataset=dataset, infer_eval_examples=2, best_metric="chrff/copy")
    with pytest.raises(UserError, match=r"'chrf' is no .*; metrics of generated text need loop.train.infer_eval_exam"):
        run(tmp_path, 4, period=4, dataset=dataset, best_metric="chrf")
    assert not (tmp_path / "metrics.jsonl").exists()
