"""How a stack attends: what its layers share is computed once, and each layer calls it.

B batch, T query (target) length, S key (source) length, H heads, K head dim, G relative-position buckets.
"""

from functools import partial
from typing import Protocol

import jax
from jax import Array
from jax.sharding import PartitionSpec

from vikhr_t5.errors import UserError
from vikhr_t5.model import attention_kernel, ops
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.sharding import partition_spec


class Attention(Protocol):
    """Attention of queries to keys of known segments, without scaling."""

    def bias(self, table: Array) -> Array:
        """A table of relative-position biases [H, G] in the form that a call takes."""

    def __call__(self, query: Array, key: Array, value: Array, bias: Array | None) -> Array:
        """[B, T, H, K], [B, S, H, K], [B, S, H, K] -> [B, T, H*K]."""


def attention_between(config: T5Config, query_segments: Array, key_segments: Array, causal: bool = False) -> Attention:
    """How queries attend to keys.

    Args:
        query_segments: int [B, T], 0 at padding. key_segments: int [B, S].
        causal: a query sees no key after its own position, and offsets into the future have no bucket.

    Raises:
        UserError: `config.attention` is "fused", and the kernel cannot take heads of this size.
    """
    supported = attention_kernel.supports(config.head_dim, config.dtype)
    if config.attention == "fused" and not supported:
        raise UserError(
            f"T5Config.attention 'fused' takes a head_dim that is a power of 2 from 16, of at most 256 bytes; not"
            f" {config.head_dim} of {config.dtype}: use 'auto' or 'plain'"
        )
    if config.attention == "fused" or (config.attention == "auto" and supported and _on_ampere_or_later()):
        return FusedAttention(query_segments, key_segments, causal)
    return PlainAttention(query_segments, key_segments, causal, config.float32_attention_logits)


def _on_ampere_or_later() -> bool:
    """Whether arrays live on NVIDIA GPUs that XLA compiles Triton for."""
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "8.0"; AMD's are names, "gfx942"
    return "." in capability and float(capability) >= 8


class PlainAttention:
    """In XLA's own operations, for any device: the mask [B, T, S] and the bias [H, T, S] are arrays."""

    def __init__(self, query_segments: Array, key_segments: Array, causal: bool, float32_logits: bool):
        self._mask = ops.attention_mask(query_segments, key_segments, causal)
        self._bidirectional, self._float32_logits = not causal, float32_logits

    def bias(self, table: Array) -> Array:
        """table [H, G] -> [H, T, S]."""
        _, queries, keys = self._mask.shape
        return ops.relative_position_bias(table, queries, keys, self._bidirectional)

    def __call__(self, query: Array, key: Array, value: Array, bias: Array | None) -> Array:
        return ops.attention(query, key, value, self._mask, bias, self._float32_logits)


class FusedAttention:
    """In one kernel: see `attention_kernel`. On a mesh each device computes its own rows and heads.

    XLA cannot split a kernel by itself, so this does, by the logical axes "batch" and "joined_kv": see `sharding`.
    """

    def __init__(self, query_segments: Array, key_segments: Array, causal: bool):
        self._segments = query_segments, key_segments
        self._blocks = attention_kernel.visited_blocks(query_segments, key_segments, causal)
        self._causal = causal

    def bias(self, table: Array) -> Array:
        """table [H, G], as it is."""
        return table

    def __call__(self, query: Array, key: Array, value: Array, bias: Array | None) -> Array:
        attend = partial(attention_kernel.fused_attention, causal=self._causal)
        split = partition_spec(query.shape, ("batch", None, "joined_kv", None))
        if split is not None:
            rows, table = PartitionSpec(split[0]), PartitionSpec(split[2])
            given = (split, split, split, None if bias is None else table, rows, rows, rows, rows)
            attend = jax.shard_map(attend, in_specs=given, out_specs=split, check_vma=False)
        attended = attend(query, key, value, bias, *self._segments, *self._blocks)
        return attended.reshape(*query.shape[:2], -1)
