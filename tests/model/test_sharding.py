"""On a mesh of eight fake devices: what is communicated, and that the loss stays the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, re
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from random_params import enlarged_params
from vikhr_t5.model import network
from vikhr_t5.train.losses import token_losses

B, S, T, D = 16, 40, 24, 64
config = network.T5Config(256, "float32", D, 4, 2, 2, 16, 128, ("gelu", "linear"), dropout_rate=0.0)
rules = [("batch", ("data", "fsdp")), ("embed", "fsdp"), ("joined_kv", "tensor"), ("mlp", "tensor"),
         ("vocab", "tensor"), ("layers", None), ("heads", None), ("relpos_buckets", None)]
mesh = jax.make_mesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
params = enlarged_params(config, 0)
rng = np.random.default_rng(0)
inputs, targets = rng.integers(2, 256, (B, S)), rng.integers(2, 256, (B, T))

def loss(params, inputs, targets):
    decoder_inputs = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    arguments = ({"params": params}, inputs, decoder_inputs, targets)
    hidden = network.Transformer(config).apply(*arguments, method="decoder_hidden")
    return token_losses(hidden, *network.head(params, config), targets, z_loss=1e-4, chunk_size=8).loss.sum()

axes = jax.tree.map(lambda names: NamedSharding(mesh, nn.logical_to_mesh_axes(names, rules)),
                    network.logical_axes(config), is_leaf=lambda node: isinstance(node, tuple))
rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
step = jax.jit(jax.value_and_grad(loss), in_shardings=(axes, rows, rows), out_shardings=(None, axes))
with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    compiled = step.lower(params, inputs, targets).compile()
    arguments = jax.device_put((params, inputs, targets), (axes, rows, rows))
    value, gradients = compiled(*arguments)
norm = lambda tree: float(sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(tree)))
alone, alone_gradients = jax.jit(jax.value_and_grad(loss))(params, inputs, targets)
gathered = re.findall(r"= \\w+\\[([\\d,]+)\\]\\S* all-gather", compiled.as_text())
print(json.dumps({"sharded": [float(value), norm(gradients)], "alone": [float(alone), norm(alone_gradients)],
                  "gathered": [[int(n) for n in shape.split(",")] for shape in gathered]}))
"""


def test_fsdp_gathers_parameters_and_never_the_batch():
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "16",  # several fake devices in one process can wait for each other for ever with fewer threads
        "PYTHONPATH": f"{root}:{root / 'tests'}",
    }
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    for sharded, alone in zip(result["sharded"], result["alone"], strict=True):
        assert abs(sharded - alone) <= 1e-5 * abs(alone)
    weights = [shape for shape in result["gathered"] if len(shape) == 2]
    activations = [shape for shape in result["gathered"] if len(shape) == 3 and shape[-1] > 1]
    assert weights, "no parameter is gathered: is anything sharded at all?"
    # A gradient of the embedding may gather its own rows; nothing else of [B, length, D] goes over the wire whole.
    assert all(shape[-1] < 64 for shape in activations), activations
