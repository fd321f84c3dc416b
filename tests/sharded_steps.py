"""Run by test_partitioning in a process with 4 fake CPU devices: the same steps on several meshes.

Prints JSON: {mesh: {"loss": [...], "difference": largest difference of a parameter from one device's, ...}}.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from tiny_run import CONFIG, LENGTHS, TinyDataset, dataset_config, make_batch, tiny_model

from vikhr_t5.errors import UserError
from vikhr_t5.train import checkpoints, optimizers
from vikhr_t5.train.checkpoints import Checkpoints, SaveCheckpointConfig
from vikhr_t5.train.evaluate import Evaluator
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.step import Trainer, zero_sums

BATCHES = [make_batch(8, (LENGTHS["inputs"], LENGTHS["targets"]), seed) for seed in range(3)]
NO_DROPOUT = dataclasses.replace(CONFIG, dropout_rate=0.0)  # accumulation draws other masks


class OneDevice(Partitioner):
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1],
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)  # fmt: skip


def run(partitioner, parts, folder):
    model = tiny_model(NO_DROPOUT, optimizers.Adafactor(min_dim_size_to_factor=8))
    trainer = Trainer(optimizers.create_learning_rate_scheduler("constant", 0.05), num_microbatches=parts)
    shardings = partitioner.state_shardings(model)
    replicated = partitioner.replicated
    state = jax.jit(model.init_state, out_shardings=shardings)(jax.random.key(0))
    step = trainer.jitted(model, partitioner, 2)
    key, losses = jax.device_put(jax.random.key(1), replicated), []
    for batch in BATCHES:
        sums = jax.device_put(zero_sums(2), replicated)
        state, sums, _ = step(state, sums, partitioner.put_batch(batch, 8), key)
        losses.append(float(sums["loss"]))
    evaluation = Evaluator(model, partitioner, TinyDataset(dataset_config(8)), 2, 2, shardings.params).metrics(
        state.params
    )
    saver = Checkpoints(folder, SaveCheckpointConfig())
    saver.save(3, state, {"progress.json": b'{"step": 3}'})
    saver.wait()
    kernel = state.params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    held = kernel.addressable_shards[0].data.size / kernel.size
    return jax.device_get(state), {"loss": losses, "eval": evaluation["loss"], "held": held}, shardings


with tempfile.TemporaryDirectory() as temporary:
    alone, report, _ = run(OneDevice(), None, Path(temporary) / "alone")
    results = {"alone": report}
    for mesh, parts, memory in (((4, 1, 1), None, "device"), ((1, 2, 2), 2, "pinned_host")):
        partitioner = Partitioner(*mesh, optimizer_memory=memory)
        state, report, shardings = run(partitioner, parts, Path(temporary) / str(mesh))
        differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, alone.params)
        report["difference"] = max(jax.tree.leaves(differences))
        # A checkpoint of one device, onto this mesh.
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), alone, shardings)
        restored, _ = checkpoints.restore(Path(temporary) / "alone" / "3", like)
        report["rests"] = sorted({x.sharding.memory_kind for x in jax.tree.leaves(restored.opt_state) if x.ndim})
        report["restored"] = jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(restored), alone))
        results["x".join(map(str, mesh))] = report

results["refused"] = []
odd = tiny_model(dataclasses.replace(CONFIG, mlp_dim=30))
for refused in (
    lambda: Partitioner(num_tensor=4).shardings(odd.state_axes(), odd.abstract_state()),
    lambda: Partitioner(num_fsdp=2).check_batch_size(12, 2),
):
    try:
        refused()
    except UserError as error:
        results["refused"].append(str(error))
json.dump(results, sys.stdout)
