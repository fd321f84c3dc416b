"""`vikhr-t5 eval` over the checkpoints of a run: each once, in their order, and the best by each metric."""

import json
import shutil

import numpy as np
import pytest
from tiny_run import run, tiny_model

from vikhr_t5 import eval as eval_script
from vikhr_t5 import infer as infer_script
from vikhr_t5 import inference, launch, task_examples
from vikhr_t5.data.pipeline import DatasetConfig
from vikhr_t5.errors import UserError
from vikhr_t5.train.checkpoints import RestoreCheckpointConfig
from vikhr_t5.train.partitioning import Partitioner


class CopyTask:
    """A seqio task, as far as it is asked; without metric functions of its own."""

    name, metric_objs = "copy", ()

    def get_dataset(self, **_):
        return self

    def as_numpy_iterator(self):
        rng = np.random.default_rng(0)
        for length in (3, 5, 4):
            ids = np.append(rng.integers(3, 90, length), 1).astype(np.int32)
            yield {"inputs": ids, "targets": ids}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, 6, evaluate=False)
    return folder


@pytest.fixture
def evaluate(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(task_examples, "open_tasks", lambda config, vocabulary: [CopyTask()])
    shutil.copytree(trained, tmp_path / "run")
    config = DatasetConfig("copy", {"inputs": 8, "targets": 8}, "validation", 2)

    def call(mode="all", config_text="A = 1", path="run"):
        restore = RestoreCheckpointConfig(str(tmp_path / path), mode=mode)
        return eval_script.evaluate(
            tiny_model(), config, restore, Partitioner(), str(tmp_path / "out"), config_text=config_text
        )

    return call


def test_all_checkpoints_once_and_the_best(evaluate, tmp_path, capfd, monkeypatch):
    newest = evaluate("latest")
    assert list(newest) == [6]
    shutil.rmtree(tmp_path / "out")
    shutil.move(tmp_path / "run" / "checkpoints" / "6", tmp_path / "6")
    first = evaluate()
    assert list(first) == [2, 4]
    shutil.move(tmp_path / "6", tmp_path / "run" / "checkpoints" / "6")
    capfd.readouterr()
    every = evaluate()
    said = capfd.readouterr()
    assert said.err.splitlines()[:2] == ["step 2 is there already", "step 4 is there already"]
    assert every[6] == newest[6]
    metrics = [json.loads(line) for line in (tmp_path / "out/inference_eval/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["task"]) for line in metrics] == [(2, "copy"), (4, "copy"), (6, "copy")]
    for line in metrics:
        assert {"loss": line["loss"], "accuracy": line["accuracy"]} == pytest.approx(
            {name: every[line["step"]]["copy"][name] for name in ("loss", "accuracy")}, rel=1e-6
        )
    assert len({line["loss"] for line in metrics}) == 3  # each by its own parameters
    lowest = min(metrics, key=lambda line: line["loss"])
    evaluated, best = said.out.splitlines()
    assert evaluated.startswith("copy, step 6: loss ")
    assert best.startswith(
        f"copy, best of 3: lowest loss {lowest['loss']:.4g} at step {lowest['step']}, highest accuracy"
    )
    # Nothing is left to do, and no checkpoint is read; another configuration is another evaluation.
    monkeypatch.setattr(inference, "restored_params", None)
    assert evaluate() == {step: {"copy": pytest.approx(found["copy"], rel=1e-6)} for step, found in every.items()}


@pytest.mark.parametrize(
    ("command", "function"), [("eval", eval_script.evaluate), ("infer", infer_script.infer)], ids=["eval", "infer"]
)
def test_the_checkpoint_is_the_one_given_not_the_one_that_a_fine_tuning_run_started_from(command, function):
    given = ["MODEL=None", "CHECKPOINT_PATH='tuned'", "INITIAL_CHECKPOINT_PATH='before'"]
    given += [f"{command.upper()}_OUTPUT_DIR='out'", "RestoreCheckpointConfig.mode='all'"]
    launch.load([f"runs/{command}.gin", "recipes/demo_finetune.gin"], given)
    restore = launch.arguments(function, supplied=["config_text"])["restore_checkpoint_cfg"]
    assert (restore.path, restore.mode) == ("tuned", "all")


def test_another_configuration_is_evaluated_anew(evaluate, tmp_path, capfd):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    (tmp_path / "run" / "checkpoints" / "4" / "progress.json").unlink()
    evaluate()
    said = capfd.readouterr().err
    assert "checkpoints/4 is not whole (progress.json is missing): left out" in said
    evaluate(config_text="A = 2")
    assert "is of another configuration: all checkpoints are evaluated" in capfd.readouterr().err
    lines = (tmp_path / "out/inference_eval/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [6]


def test_an_interrupted_evaluation_takes_nothing_of_the_configuration_before(evaluate, tmp_path, capfd, monkeypatch):
    evaluate()
    real, calls = inference.restored_params, []

    def restored(model, partitioner, path, dtype):
        calls.append(int(path.name))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, partitioner, path, dtype)

    monkeypatch.setattr(inference, "restored_params", restored)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config_text="A = 2")
    capfd.readouterr()
    assert list(evaluate(config_text="A = 2")) == [2, 4, 6]
    assert calls == [2, 4, 4, 6]
    assert capfd.readouterr().err.splitlines()[0] == "step 2 is there already"
    lines = (tmp_path / "out/inference_eval/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


def test_what_is_refused(evaluate, tmp_path):
    with pytest.raises(UserError, match=r"mode 'al' is unknown \(nearest: all\)"):
        RestoreCheckpointConfig("run", mode="al")
    with pytest.raises(UserError, match="no such folder"):
        evaluate(path="nowhere")
    every = RestoreCheckpointConfig(str(tmp_path / "run"), mode="all")
    with pytest.raises(UserError, match="'all' is for `vikhr-t5 eval`"):
        inference.restored(tiny_model(), Partitioner(), every, 2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluate()
    assert not (tmp_path / "out").exists()
