"""Run by test_sharding in a process with 8 fake CPU devices: one step's loss and gradients, computed in many ways.

    python tests/mesh_equality.py 2x2x2 some|every

The reference is one device with everything plain: layers one by one, nothing recomputed, the whole loss, one batch.
Prints a line of JSON for each way: "loss": relative error; "gradients": the largest over arrays of
|error| / |reference|; "lost": bytes of donated buffers that the result does not take over.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tiny_run import CONFIG, make_batch, tiny_model

from vikhr_t5.model import network
from vikhr_t5.model.config import REMAT_POLICIES
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.step import Trainer, zero_sums

ROWS, LENGTHS = 32, (24, 12)
SHAPE = dataclasses.replace(CONFIG, dropout_rate=0.0, num_decoder_layers=2)
MESH_AXES = ("data", "fsdp", "tensor")
SOME = [  # (remat, scan, chunk, parts): each value at least once on each mesh
    ("everything", True, None, None),
    ("matmuls", True, 5, 4),
    ("attention", False, 5, None),
    ("layer_inputs", False, None, 4),
    ("layer_inputs_on_host", True, 5, 4),
]
EVERY = list(itertools.product(REMAT_POLICIES, (True, False), (None, 5), (None, 4)))


class Gradients:
    """An optimizer that changes nothing and whose state is the last gradient."""

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, grads, state, params, learning_rate):
        return jax.tree.map(jnp.zeros_like, params), grads

    def state_axes(self, params, axes):
        return axes


class OneDevice(Partitioner):
    mesh = jax.make_mesh((1, 1, 1), MESH_AXES, devices=jax.devices()[:1],
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)  # fmt: skip


class Unrolled:
    """jax.lax for the network, with a scan that is a loop of Python."""

    def __getattr__(self, name):
        return getattr(jax.lax, name)

    @staticmethod
    def scan(body, carry, scanned):
        for i in range(jax.tree.leaves(scanned)[0].shape[0]):
            carry, _ = body(carry, jax.tree.map(lambda x, i=i: x[i], scanned))
        return carry, None


def compiled_step(partitioner, remat, scan, chunk, parts):
    """(the whole road of an update, compiled as the training loop does; its arguments)."""
    model = tiny_model(dataclasses.replace(SHAPE, remat_policy=remat), Gradients(), loss_chunk_size=chunk)
    trainer = Trainer(lambda step: jnp.float32(0.1), num_microbatches=parts)
    shardings, replicated = partitioner.state_shardings(model), partitioner.replicated
    jitted = trainer.jitted(model, partitioner, 2)
    state = jax.device_put(initial_state(), shardings)
    sums, key = jax.device_put((zero_sums(2), jax.random.key(1)), replicated)
    batch = partitioner.put_batch(make_batch(ROWS, LENGTHS, 0), ROWS)
    with contextlib.nullcontext() if scan else mock.patch.object(network, "lax", Unrolled()):
        return jitted.lower(state, sums, batch, key).compile(), (state, sums, batch, key)


@functools.cache
def initial_state():
    model = tiny_model(SHAPE, Gradients())
    return jax.device_get(jax.jit(model.init_state)(jax.random.key(0)))


def step(*way):
    """(loss, gradients, bytes of donated buffers that the result does not take over)."""
    compiled, arguments = compiled_step(*way)
    donated = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arguments[:2]))
    state, sums, _ = compiled(*arguments)
    lost = donated - compiled.memory_analysis().alias_size_in_bytes
    return float(sums["loss"]), jax.device_get(state.opt_state), lost


def norm(x):
    return float(np.linalg.norm(np.asarray(x, np.float64)))


if __name__ == "__main__":
    sizes = tuple(map(int, sys.argv[1].split("x")))
    partitioner = OneDevice() if sizes == (1, 1, 1) else Partitioner(*sizes)
    loss, gradients, _ = step(OneDevice(), "everything", False, None, None)
    for way in SOME if sys.argv[2] == "some" else EVERY:
        found, found_gradients, lost = step(partitioner, *way)
        errors = jax.tree.map(lambda a, b: norm(a - b) / norm(b), found_gradients, gradients)
        result = {
            "way": "remat={} scan={} chunk={} parts={}".format(*way),
            "loss": abs(found - loss) / abs(loss),
            "gradients": max(jax.tree.leaves(errors)),
            "lost": lost,
        }
        print(json.dumps(result), flush=True)
