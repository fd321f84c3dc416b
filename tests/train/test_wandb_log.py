"""Weights & Biases as an option: what is sent, a resume, a service that fails. The package is one that writes a file.

That the real one takes it, offline, docs/experiments.md says.
"""

import json
import sys

import pytest
from tiny_run import run

from vikhr_t5.errors import UserError
from vikhr_t5.train.metrics import MetricsLog

WANDB = """
import json, os

class Settings(dict):
    pass

class Run:
    def define_metric(self, name, step_metric): say("define", name=name, step_metric=step_metric)
    def log(self, values):
        if os.environ.get("WANDB_FAILS") == "log": raise RuntimeError("the service is away\\nwith details")
        say("log", values=values)
    def finish(self, exit_code): say("finish", exit_code=exit_code)

def init(settings, **given):
    if os.environ.get("WANDB_FAILS") == "init": raise ConnectionError()
    say("init", **given)
    return Run()

def say(call, **what):
    with open(os.environ["WANDB_SAID"], "a") as file:
        file.write(json.dumps({"call": call, **what}) + "\\n")
"""


@pytest.fixture
def said(tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("WANDB_SAID", str(tmp_path / "said"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    return lambda call: [
        record for line in (tmp_path / "said").read_text().splitlines() if (record := json.loads(line))["call"] == call
    ]


def test_what_is_sent_and_a_resume(said, tmp_path):
    for steps in (2, 4):
        run(tmp_path / "run", steps, wandb_project="вихрь", config_text="A = 1")
    first, second = said("init")
    assert (first["project"], first["name"], first["config"]) == ("вихрь", "run", {"gin": "A = 1"})
    assert first["id"] == second["id"] == (tmp_path / "run" / "wandb_id").read_text().strip()
    assert second["resume"] == "allow"
    assert [record["exit_code"] for record in said("finish")] == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    sent = [record["values"] for record in said("log")]
    numbers = [line for line in lines if line["kind"] in ("train", "eval")]
    assert [values["step"] for values in sent] == [2, 2, 4, 4] == [line["step"] for line in numbers]
    for line, values in zip(numbers, sent, strict=True):
        folder = "train" if line["kind"] == "train" else "training_eval/tiny"
        assert values[f"{folder}/loss_per_nonpadding_target_token"] == pytest.approx(line["loss"], rel=1e-5)
        assert values[f"{folder}/accuracy/copy"] == pytest.approx(line["accuracy/copy"], rel=1e-5)


@pytest.mark.parametrize(("call", "reason"), [("init", "ConnectionError"), ("log", "the service is away")])
def test_a_service_that_fails_stops_nothing(said, tmp_path, monkeypatch, capfd, call, reason):
    monkeypatch.setenv("WANDB_FAILS", call)
    log = MetricsLog(tmp_path, 0, "p")
    log.write("train", 1, {"loss": 2.0})
    log.write("train", 2, {"loss": 1.0})
    log.close()
    assert capfd.readouterr().err == f"Weights & Biases: {reason}; training goes on without it\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_the_package_nothing_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb not installed: pip install 'vikhr-t5\[wandb\]'"):
        run(tmp_path / "run", 4, wandb_project="p")
    assert not (tmp_path / "run").exists()
