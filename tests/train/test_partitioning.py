"""Meshes and rules; and that a step on four devices is the step on one."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from tiny_run import CONFIG, make_batch, tiny_model

from vikhr_t5.errors import UserError
from vikhr_t5.train.optimizers import AdamW
from vikhr_t5.train.partitioning import STANDARD_RULES, Partitioner
from vikhr_t5.train.step import Trainer, zero_sums

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
    with pytest.raises(UserError, match=r"-1 x 0 x 1 does not use the 1 device"):
        _ = Partitioner(num_fsdp=0).mesh


def test_batch_size():
    Partitioner().check_batch_size(6, num_microbatches=3)
    with pytest.raises(UserError, match=r"batch size 10 does not divide .* 1 x 1 x 4 = 4: use a multiple of 4"):
        Partitioner().check_batch_size(10, num_microbatches=4)


def test_an_unknown_memory_is_refused():
    with pytest.raises(UserError, match=r"Partitioner\.optimizer_memory 'host' \(nearest: pinned_host"):
        Partitioner(optimizer_memory="host")


@pytest.mark.parametrize("platform", ["cuda", pytest.param("tpu", marks=pytest.mark.slow)])
def test_an_accelerator_fetches_the_optimizer_and_offloads_layer_inputs(platform):
    """Lowered here: the optimizer's arrays come from the host's memory, and what layers receive goes there."""
    model = tiny_model(dataclasses.replace(CONFIG, remat_policy="layer_inputs_on_host"), AdamW())
    partitioner = Partitioner(optimizer_memory="pinned_host")
    shardings, replicated = partitioner.state_shardings(model), partitioner.replicated
    step = partitioner.jit(
        Trainer(lambda _: jnp.float32(0.1)).step_function(model, 2),
        in_shardings=(shardings, replicated, partitioner.batch, replicated),
        out_shardings=(shardings, replicated, replicated),
    )
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), model.abstract_state(), shardings
    )
    arguments = (state, zero_sums(2), make_batch(8, (24, 12), 0), jax.random.key(0))
    program = step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    moves = r'@annotate_device_placement\((\S+)\) \{[^}]*_xla_buffer_placement = "(\w+)"'
    moved = re.findall(moves, program[program.index("func.func public @main") :])
    arrays = sum(leaf.ndim > 0 for leaf in jax.tree.leaves(state.opt_state))
    assert sum(where == "device" and argument.startswith("%arg") for argument, where in moved) >= arrays
    # Back go as many, and what enters the layers of either stack.
    assert sum(where == "pinned_host" for _, where in moved) == arrays + 2


@pytest.mark.slow
def test_four_devices_equal_one():
    """Data, fsdp and tensor meshes, in a process of its own: losses, parameters, evaluation, restored checkpoints.

    On the last mesh the optimizer's state rests in the host's memory.
    """
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
    assert {mesh: report["rests"] for mesh, report in results.items()} == {
        "4x1x1": ["device"],
        "1x2x2": ["pinned_host"],
    }
    for mesh, report in results.items():
        assert report["difference"] < 2e-5, mesh
        assert report["loss"] == pytest.approx(alone["loss"], rel=1e-5), mesh
        assert report["eval"] == pytest.approx(alone["eval"], rel=1e-5), mesh
        assert report["restored"], mesh
