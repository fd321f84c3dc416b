"""How a stack attends: what its layers share is computed once, and each layer calls it.

B batch, T query (target) length, S key (source) length, H heads, K head dim, G relative-position buckets.
"""

from jax import Array

from vikhr_t5.model import ops
from vikhr_t5.model.config import T5Config


class PlainAttention:
    """Attention of queries to keys of given segments, in XLA's own operations.

    Args:
        query_segments: int [B, T], 0 at padding. key_segments: int [B, S].
        causal: a query sees no key after its own position, and offsets into the future have no bucket.
        float32_logits: see `ops.attention`.
    """

    def __init__(self, query_segments: Array, key_segments: Array, causal: bool, float32_logits: bool):
        self._mask = ops.attention_mask(query_segments, key_segments, causal)
        self._bidirectional, self._float32_logits = not causal, float32_logits

    def bias(self, table: Array) -> Array:
        """A table of relative-position biases [H, G], in the form that a call takes: here [H, T, S]."""
        _, queries, keys = self._mask.shape
        return ops.relative_position_bias(table, queries, keys, self._bidirectional)

    def __call__(self, query: Array, key: Array, value: Array, bias: Array | None) -> Array:
        """[B, T, H, K], [B, S, H, K], [B, S, H, K] -> [B, T, H*K]."""
        return ops.attention(query, key, value, self._mask, bias, self._float32_logits)


def attention_between(
    config: T5Config, query_segments: Array, key_segments: Array, causal: bool = False
) -> PlainAttention:
    """The attention of queries [B, T] to keys [B, S]: see `PlainAttention`."""
    return PlainAttention(query_segments, key_segments, causal, config.float32_attention_logits)
