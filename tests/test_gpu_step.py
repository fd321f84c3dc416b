"""benchmarks/gpu_step.py on a machine without a GPU: it refuses, and all of it but the card works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_step.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_without_a_gpu_it_refuses_in_one_line():
    done = run("--model", "xl", "--sides", "vikhr-t5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("no GPU is visible to vikhr-t5: this needs one, and pip install")


@pytest.mark.slow
def test_the_tiny_model_goes_through_both_sides():
    arguments = ["--model", "tiny", "--inputs", "32", "--targets", "16", "--steps", "1", "--repeats", "2", "--json"]
    done = run(*arguments, "--variants", "matmuls", "layer_inputs", "eager", "eager, checkpointed")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ratio"] > 0
    for side in ("vikhr-t5", "transformers"):
        losses = [variant["loss"] for variant in result["sides"][side]]
        assert len(losses) == 2
        assert losses[0] == pytest.approx(losses[1], rel=0.01)  # recomputation changes no loss
        # log(32128) is 10.4; transformers starts with an output layer of unit variance, and so from further away
        assert 9 < losses[0] < {"vikhr-t5": 13, "transformers": 60}[side]
        for variant in result["sides"][side]:
            assert variant["batch_size"] == 4
            assert len(variant["seconds"]) == 2
            assert variant["mfu"] is None
