"""What a training step keeps in the memory of one device, part by part, without allocating any of it.

State: the shapes and shardings of its arrays. Activations: the residuals that JAX itself would keep for the backward
pass, from an abstract trace of the model's loss under its remat policy; so they follow the code, not a formula about
it. What is computed by a formula is the transient part: one layer, and one chunk of logits.

B rows, S inputs, T targets, D model, F feed-forward, H heads, V vocabulary, L layers.
"""

import collections
import copy
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vikhr_t5.data.rows import empty_batch
from vikhr_t5.model.attention import FusedAttention, attention_between
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.network import Transformer
from vikhr_t5.plan_flops import matmul_flops
from vikhr_t5.train.state import EncoderDecoderModel

ROWS = 1009  # of the abstract trace: a prime that no width has, so an array grows with the batch if it divides its size
DEPTHS = (3, 5)  # of encoder and decoder, where one layer is looked at: they tell its arrays apart


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step.

    Attributes:
        parameters: at rest, and what is gathered of other devices' shards for one layer or for the output layer.
        gradients: one set, in the type of the parameters; and their float32 sum, where microbatches add up.
        optimizer: its state.
        activations: kept for the backward pass; and what one layer needs more than the logits do, as the two are never
            there at one time.
        logits: of one chunk, and their gradient.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes `kept` of one row for the whole backward pass, and `shared` by all rows.

    `flops`: matmul FLOPs that a forward and backward pass over one row executes, recomputation too.
    """

    kept: float
    shared: int
    flops: float


def activations(model: EncoderDecoderModel, inputs_length: int, targets_length: int) -> Activations:
    """What the backward pass of `model` needs besides its parameters, traced on the devices that JAX shows."""
    batch = empty_batch(ROWS, inputs_length, targets_length)
    kept, shared = 0.0, 0
    for x in _residuals(model, batch):
        kept, shared = (kept + _bytes(x) / ROWS, shared) if x.size % ROWS == 0 else (kept, shared + _bytes(x))
    return Activations(kept, shared, _flops(model, batch) / ROWS)


def layer_bytes(model: EncoderDecoderModel, inputs_length: int, targets_length: int) -> float:
    """Bytes of one row in the larger of an encoder's and a decoder's layer while its gradient is computed."""
    batch = empty_batch(ROWS, inputs_length, targets_length)
    encoder, decoder = DEPTHS
    shallow = with_config(model, num_encoder_layers=encoder, num_decoder_layers=decoder, remat_policy="everything")
    layers = dict.fromkeys(DEPTHS, 0.0)
    for x in _residuals(shallow, batch):
        if x.ndim > 2 and x.shape[0] in layers and x.shape[1] == ROWS:
            layers[x.shape[0]] += _bytes(x) / ROWS / x.shape[0]
    return max(layers.values()) + _backward(model.config, inputs_length, targets_length)


def _backward(c: T5Config, s: int, t: int) -> float:
    """Of one row: the widest gradients inside of one layer: of the feed-forward block, or of attention's weights."""
    length, fused = max(s, t), "fused" in (c.attention, _auto_attention(c))
    feed_forward = (len(c.mlp_activations) + 1) * length * c.mlp_dim * jnp.dtype(c.dtype).itemsize
    weights = 0 if fused else 3 * c.num_heads * max(s * s, t * s, t * t) * 4
    return max(feed_forward, weights)


def _auto_attention(config: T5Config) -> str:
    """What attention "auto" is on the devices that JAX shows."""
    one = jnp.zeros((1, 16), jnp.int32)
    return "fused" if isinstance(attention_between(config, one, one), FusedAttention) else "plain"


def _flops(model: EncoderDecoderModel, batch: Mapping[str, Any]) -> float:
    model = with_config(model, attention="plain")  # the kernel's loops have no length in a trace

    def gradient(params: Any, batch: Any, weights: Any) -> Any:
        return jax.grad(lambda p: model.loss_sums(p, batch, weights, 1)[0])(params)

    weights = jax.ShapeDtypeStruct(batch["decoder_target_tokens"].shape, jnp.float32)
    return matmul_flops(jax.make_jaxpr(gradient)(model.abstract_state().params, dict(batch), weights).jaxpr)


def _residuals(model: EncoderDecoderModel, batch: Mapping[str, Any]) -> list[Any]:
    """Shapes of what a backward pass is given by its forward pass, less the parameters."""
    params = model.abstract_state().params
    weights = jax.ShapeDtypeStruct(batch["decoder_target_tokens"].shape, jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0)) if model.config.dropout_rate else None

    def forward(params: Any, batch: Any, weights: Any, key: Any) -> Any:
        return jax.vjp(lambda p: model.loss_sums(p, batch, weights, 1, key)[0], params)[1]

    kept = jax.tree.leaves(jax.eval_shape(forward, params, dict(batch), weights, key))
    given = collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(params))
    rest = []
    for x in kept:
        if given[x.shape, x.dtype] > 0:
            given[x.shape, x.dtype] -= 1
        else:
            rest.append(x)
    return rest


def with_config(model: EncoderDecoderModel, **fields: Any) -> EncoderDecoderModel:
    """The model with other fields of its T5Config."""
    return with_fields(model, config=dataclasses.replace(model.config, **fields))


def with_fields(model: EncoderDecoderModel, **fields: Any) -> EncoderDecoderModel:
    """The model with other attributes: config, optimizer, param_dtype, loss_chunk_size."""
    other = copy.copy(model)
    vars(other).update(fields)
    other.module = Transformer(other.config)
    return other


def memory(
    model: EncoderDecoderModel,
    mesh: Mapping[str, int],
    rows: int,
    targets_length: int,
    num_microbatches: int,
    active: Activations,
    one_layer: float,
    state: "StateBytes",
) -> Memory:
    """Bytes of one device.

    Args:
        mesh: sizes of "data", "fsdp", "tensor".
        rows: of one microbatch on one device.
        active, one_layer, state: of this model; `state` on this mesh.
    """
    config, tensor = model.config, mesh["tensor"]
    compute, rest = jnp.dtype(config.dtype).itemsize, jnp.dtype(model.param_dtype).itemsize
    layer = state.largest_layer / tensor
    head = config.known_vocab_size() * config.emb_dim / tensor
    cast = compute if compute < rest else 0
    gathered = max(layer, head) * (cast + (rest if mesh["fsdp"] > 1 else 0))
    chunk = min(model.loss_chunk_size or targets_length, targets_length)
    logits = rows * chunk * config.known_vocab_size() / tensor * (4 + 4 + (compute if compute < 4 else 0))
    # A gradient of a whole layer exists before it is scattered over fsdp.
    unscattered = layer * 4 if mesh["fsdp"] > 1 else 0
    transient = rows * one_layer / tensor + unscattered
    return Memory(
        parameters=int(state.parameters + gathered),
        gradients=int(state.parameters + (state.gradients if num_microbatches > 1 else 0)),
        optimizer=int(state.optimizer),
        activations=int((rows * active.kept + active.shared) / tensor + max(0.0, transient - logits)),
        logits=int(logits),
    )


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of the state on one device; `gradients` adds up in float32; `largest_layer`: numbers in one layer."""

    parameters: int
    gradients: int
    optimizer: int
    largest_layer: int


def state_bytes(model: EncoderDecoderModel, partitioner: Any) -> StateBytes:
    """From shapes and shardings: exact. Raises UserError where a dimension does not divide over the mesh."""
    state = model.abstract_state()
    shardings = partitioner.shardings(model.state_axes(), state)
    held = {
        name: sum(jax.tree.leaves(jax.tree.map(functools.partial(_shard, itemsize=size), shapes, split)))
        for name, shapes, split, size in (
            ("parameters", state.params, shardings.params, None),
            ("gradients", state.params, shardings.params, 4),
            ("optimizer", state.opt_state, shardings.opt_state, None),
        )
    }
    layers = [
        sum(x.size // x.shape[0] for x in jax.tree.leaves(state.params[side]["layers"]))
        for side in ("encoder", "decoder")
    ]
    return StateBytes(**held, largest_layer=max(layers))


def _shard(shape: Any, sharding: Any, itemsize: int | None) -> int:
    return math.prod(sharding.shard_shape(shape.shape)) * (itemsize or np.dtype(shape.dtype).itemsize)


def _bytes(x: Any) -> int:
    return int(x.size * x.dtype.itemsize)
