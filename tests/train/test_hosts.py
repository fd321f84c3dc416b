"""Real processes on loopback: the losses of one process, one of them killed, signals, errors of one or of all.

Two processes add the halves of a sum in another order than one process does, hence a tolerance: float32, relative.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import pytest
from tiny_run import run

from conversion.stored import load
from conversion.vikhr import Checkpoint
from vikhr_t5 import hosts
from vikhr_t5.errors import UserError

TESTS = Path(__file__).parents[1]
TOLERANCE = 2e-5  # of losses and gradient norms after a few updates
STEPS = 8


@dataclasses.dataclass
class Host:
    """A process and its parent, which explains how it ended."""

    parent: subprocess.Popen

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.parent.pid).children()[0]

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """(exit status, the last line on stderr), once it has ended."""
        said = self.parent.communicate(timeout=seconds)[1].strip()
        return self.parent.returncode, said.splitlines()[-1] if said else ""


@contextlib.contextmanager
def started(
    run_dir: Path, count: int, *, present: int | None = None, devices: int = 1, timeout: int = 60, **arguments: Any
) -> Iterator[list[Host]]:
    """`tiny_run.run` in `count` processes that find each other; what still runs at the end is killed.

    present: so many of them are started. devices: of each. timeout: seconds to wait for all.
    arguments: of `run`; a list of values is one for each process.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    parents = []
    for index in range(present or count):
        each = {"stats_period": 1, **arguments}  # a line for each step, whatever the step that a run stops at
        own = {name: value[index] if isinstance(value, list) else value for name, value in each.items()}
        command = [sys.executable, TESTS / "tiny_hosts.py", run_dir, json.dumps(own)]
        command += [f"--coordinator_address={address}", f"--process_count={count}", f"--process_index={index}"]
        command += [f"--initialization_timeout={timeout}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        parents.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        yield [Host(parent) for parent in parents]
    finally:
        for parent in parents:
            parent.kill()
            parent.communicate()


def lines(run_dir: Path, kind: str) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record for record in records if record["kind"] == kind]


def wait_for_step(run_dir: Path, step: int, processes: list[Host], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not any(line["step"] >= step for line in lines(run_dir, "train")):
        for host in processes:
            assert host.parent.poll() is None, host.end()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def figures(run_dir: Path) -> dict[tuple, float]:
    return {
        (kind, line["step"], name): line[name]
        for kind in ("train", "eval")
        for line in lines(run_dir, kind)
        for name in ("loss", "grad_norm", "accuracy")
        if name in line
    }


def assert_continues_as(run_dir: Path, whole: Path, tolerance: float = TOLERANCE) -> None:
    found, expected = figures(run_dir), figures(whole)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=tolerance), name


def assert_says_that_another_ended(word: str) -> None:
    """In one of two ways: a collective failed and the process says it itself, or JAX's heartbeat ended it first."""
    assert re.fullmatch(
        r"tiny: (host \d: another host ended or no longer answers \(.+\)"
        r"|another host did not start, ended or no longer answers, so this one was stopped \(JAX says more above\))"
        r"; run the same command on all hosts to go on from the newest checkpoint",
        word,
    ), word


def same_params(a: Path, b: Path) -> bool:
    a, b = Checkpoint(a), Checkpoint(b)
    return a.step == b.step and jax.tree.all(jax.tree.map(np.array_equal, load(a), load(b)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run of one process, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, STEPS, stats_period=1)
    return folder


@pytest.mark.slow
def test_one_of_two_is_killed_and_one_process_goes_on(whole, tmp_path):
    """Losses, evaluations and gradient norms are those of one process, before the kill and after the restart."""
    with started(tmp_path, 2, total_steps=STEPS, slow=0.4) as (first, second):
        wait_for_step(tmp_path, 6, [first, second])
        killed = time.monotonic()
        second.process.kill()
        assert second.end() == (1, "tiny: this process was killed (SIGKILL: by the system where memory ran out, or by "
            "a person); run the same command on all hosts to go on from the newest checkpoint")  # fmt: skip
        status, word = first.end()
    assert time.monotonic() - killed < 60
    assert status == 1
    assert_says_that_another_ended(word)
    assert max(line["step"] for line in lines(tmp_path, "train")) < STEPS
    assert run(tmp_path, STEPS, stats_period=1) == STEPS
    assert_continues_as(tmp_path, whole)


@pytest.mark.slow
def test_the_coordinator_is_killed(whole, tmp_path):
    with started(tmp_path, 2, total_steps=STEPS, slow=0.4) as (first, second):
        wait_for_step(tmp_path, 4, [first, second])
        killed = time.monotonic()
        first.process.kill()
        assert first.end()[0] == 1
        status, word = second.end()
    assert time.monotonic() - killed < 60
    assert status == 1
    assert_says_that_another_ended(word)
    run(tmp_path, STEPS, stats_period=1)
    assert_continues_as(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)], ids=lambda mesh: "x".join(map(str, mesh))
)
def test_four_processes_on_any_mesh(whole, tmp_path, mesh):
    """Where tensor spans processes, several of them read the same rows."""
    with started(tmp_path, 4, total_steps=STEPS, mesh=mesh) as processes:
        assert [host.end(200)[0] for host in processes] == [0] * 4
    assert_continues_as(tmp_path, whole)


@pytest.mark.slow
def test_a_signal_to_one_of_four_stops_all_and_two_or_one_go_on(whole, tmp_path):
    """Then two processes of two devices, then one of one: other meshes each time."""
    with started(tmp_path, 4, total_steps=STEPS, mesh=(2, 2, 1), slow=1.0, period=1000) as processes:
        wait_for_step(tmp_path, 1, processes)
        processes[2].parent.send_signal(signal.SIGTERM)
        ends = [host.end(200) for host in processes]
    assert [status for status, _ in ends] == [0] * 4
    (stopped,) = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert stopped < STEPS - 1
    assert ends[0][1] == f"SIGTERM: saved step {stopped} of {STEPS}; run the same command to go on"
    with started(tmp_path, 2, devices=2, total_steps=STEPS - 1, mesh=(1, 2, 2)) as processes:
        assert [host.end(200)[0] for host in processes] == [0] * 2
    run(tmp_path, STEPS, stats_period=1)
    found = figures(tmp_path)
    for name, value in figures(whole).items():
        assert found.get(name, value) == pytest.approx(value, rel=TOLERANCE), name
    assert ("train", STEPS, "loss") in found


@pytest.mark.slow
def test_killed_at_any_moment_two_processes_end_as_uninterrupted(tmp_path):
    """To the bit: the mesh is the same. Saves take much of the time, so that some are cut short."""
    steps, rng, cut_short = 30, np.random.default_rng(0), 0
    arguments = {"total_steps": steps, "period": 1, "evaluate": False}
    with started(tmp_path / "whole", 2, **arguments) as processes:
        assert [host.end(200)[0] for host in processes] == [0, 0]
    for kill in range(6):
        with started(tmp_path / "killed", 2, **arguments, slow=0.1) as processes:
            reached = max((line["step"] for line in lines(tmp_path / "killed", "train")), default=0)
            wait_for_step(tmp_path / "killed", reached + 2, processes)
            time.sleep(rng.uniform(0, 0.3))
            processes[kill % 2].process.kill()
            assert [host.end()[0] for host in processes] == [1, 1]
        cut_short += any((tmp_path / "killed" / "checkpoints").glob("*tmp*"))
    assert cut_short > 0
    with started(tmp_path / "killed", 2, **arguments) as processes:
        assert [host.end(200)[0] for host in processes] == [0, 0]
    assert same_params(tmp_path / "killed", tmp_path / "whole")
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")


def test_two_processes_train_as_one(tmp_path):
    run(tmp_path / "one", 2, stats_period=1, evaluate=False)
    with started(tmp_path / "two", 2, total_steps=2, evaluate=False) as processes:
        assert [host.end()[0] for host in processes] == [0, 0]
    assert_continues_as(tmp_path / "two", tmp_path / "one")


def test_bad_input_on_one_host_ends_all_with_its_line(tmp_path):
    with started(tmp_path, 2, period=[2, 0]) as processes:
        ends = [host.end() for host in processes]
    assert ends == [(2, "tiny: host 1: SaveCheckpointConfig.period cannot be 0")] * 2


@pytest.mark.slow
def test_a_host_that_never_comes(tmp_path):
    with started(tmp_path, 2, present=1, timeout=5) as (alone,):
        status, word = alone.end()
    assert status == 1
    assert word.startswith("tiny: another host did not start, ended or no longer answers, so this one was stopped (")


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    hosts.add_flags(parser)
    return parser.parse_args(arguments)


def test_what_asks_for_several_processes(monkeypatch):
    assert not hosts.wanted(parsed())
    assert hosts.wanted(parsed("--multiprocess_gpu"))
    assert hosts.wanted(parsed("--coordinator_address=a:1", "--process_count=2", "--process_index=1"))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match=r"Slurm started 4 processes, and each would train .*: add --multiprocess_gpu"):
        hosts.wanted(parsed())
    assert hosts.wanted(parsed("--multiprocess_gpu"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--process_count=2", "--process_index=2"], "--process_index=2 is not one of --process_count=2: give 0 to 1"),
        (["--coordinator_address=a"], "--coordinator_address=a has no port: write HOST:PORT"),
    ],
    ids=["index", "port"],
)
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(UserError, match=message):
        hosts.wanted(parsed(*flags))


def test_one_process_decides_alone():
    assert hosts.once(lambda: {"seed": 3}, "drawing") == {"seed": 3}
    with hosts.first("opening"):
        pass
    hosts.agreed("a", "the data")
