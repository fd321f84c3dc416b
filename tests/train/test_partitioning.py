"""Meshes and rules; and that a step on four devices is the step on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec
from tiny_run import tiny_model

from vikhr_t5.errors import UserError
from vikhr_t5.train.partitioning import STANDARD_RULES, Partitioner

TESTS = Path(__file__).parents[1]


def test_every_array_of_the_state_has_a_sharding():
    model = tiny_model()
    shapes = model.abstract_state()
    shardings = Partitioner().shardings(model.state_axes(), shapes)
    assert jax.tree.structure(shapes) == jax.tree.structure(shardings)
    assert shardings.params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert shardings.params["token_embedder"]["embedding"].spec == PartitionSpec("tensor", "fsdp")


@pytest.mark.parametrize("axis", ["layers", "embed", "vocab", "mlp", "joined_kv", "heads", "relpos_buckets"])
def test_an_axis_without_a_rule_is_refused(axis):
    model = tiny_model()
    partitioner = Partitioner(logical_axis_rules=[rule for rule in STANDARD_RULES if rule[0] != axis])
    with pytest.raises(UserError, match=f"no sharding rule for the logical axis '{axis}' of params/"):
        partitioner.shardings(model.state_axes(), model.abstract_state())


def test_a_rule_for_an_unknown_mesh_axis_is_refused():
    with pytest.raises(UserError, match=r"'fsd' \(nearest: fsdp"):
        _ = Partitioner(logical_axis_rules=[("batch", "fsd")]).batch


def test_a_mesh_that_does_not_fit_names_the_devices():
    with pytest.raises(UserError, match=r"-1 x 3 x 1 does not use the 1 device"):
        _ = Partitioner(num_fsdp=3).mesh


def test_batch_size():
    Partitioner().check_batch_size(6, num_microbatches=3)
    with pytest.raises(UserError, match=r"batch size 10 does not divide .* 1 x 1 x 4 = 4: use a multiple of 4"):
        Partitioner().check_batch_size(10, num_microbatches=4)


def test_four_devices_equal_one():
    """Data, fsdp and tensor meshes, in a process of its own: losses, parameters, evaluation, restored checkpoints."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "NPROC": "16",  # several fake devices can deadlock on few threads
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    done = subprocess.run(
        [sys.executable, TESTS / "sharded_steps.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    alone = results.pop("alone")
    dimension, batch_size = results.pop("refused")
    assert "mlp/wi_0/kernel [1, 16, 30]: its axis 'mlp' of 30 does not divide over the mesh's tensor = 4" in dimension
    assert "batch size 12 does not divide over data x fsdp x microbatches = 2 x 2 x 2 = 8" in batch_size
    assert {mesh: report["held"] for mesh, report in results.items()} == {"4x1x1": 1.0, "1x2x2": 0.25}
    for mesh, report in results.items():
        assert report["difference"] < 2e-5, mesh
        assert report["loss"] == pytest.approx(alone["loss"], rel=1e-5), mesh
        assert report["eval"] == pytest.approx(alone["eval"], rel=1e-5), mesh
        assert report["restored"], mesh
