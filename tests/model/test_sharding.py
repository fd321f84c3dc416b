"""On a mesh of eight fake devices: what is communicated, and that loss and gradients stay the same in every way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
MESHES = ["1x1x1", "8x1x1", "1x8x1", "2x2x2"]  # data x fsdp x tensor
TOLERANCE = 1e-5  # relative: of the loss, and of each gradient's array by its norm; float32

COMMUNICATION = """
import json, re
import jax
import mesh_equality
from vikhr_t5.train.partitioning import Partitioner

compiled = mesh_equality.compiled_step(Partitioner(1, 4, 2), "layer_inputs", True, 5, None)[0]
gathered = re.findall(r"= \\w+\\[([\\d,]+)\\]\\S* all-gather", compiled.as_text())
print(json.dumps([[int(n) for n in shape.split(",")] for shape in gathered]))
"""


def on_eight_devices(*command: str) -> list:
    """The lines of JSON that a program prints."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # compiling is most of the time
        "NPROC": "16",  # several fake devices in one process can wait for each other for ever with fewer threads
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_equality(results: list) -> None:
    for result in results:
        assert result["loss"] <= TOLERANCE, result
        assert result["gradients"] <= TOLERANCE, result
        assert result["lost"] <= 4, result  # the last learning rate, which the step does not read


def test_loss_and_gradients_are_those_of_one_device_with_everything_plain():
    results = on_eight_devices(str(TESTS / "mesh_equality.py"), "2x2x2", "some")
    assert len(results) == 5
    check_equality(results)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_policy_scanned_or_not_in_chunks_or_not_accumulated_or_not(mesh):
    results = on_eight_devices(str(TESTS / "mesh_equality.py"), mesh, "every")
    assert len(results) == 5 * 2 * 2 * 2
    print(mesh, *(max(result[name] for result in results) for name in ("loss", "gradients")))
    check_equality(results)


def test_fsdp_gathers_parameters_and_never_the_batch():
    (gathered,) = on_eight_devices("-c", COMMUNICATION)
    width, rows = 16, 32
    assert [shape for shape in gathered if len(shape) == 2], "no parameter is gathered: is anything sharded at all?"
    # Tokens are gathered for the embedding's gradient; the residual stream may be along the length, over tensor.
    activations = [shape for shape in gathered if len(shape) == 3 and shape[-1] == width]
    assert all(shape[0] < rows for shape in activations), activations
