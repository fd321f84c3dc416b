"""Pure functions that T5 is made of. No parameters are declared here.

B batch, T query (target) length, S key (source) length, H heads, K head dim, D model, F feed-forward or other output
features, G relative-position buckets.

T5: Raffel et al. 2020 (arXiv:1910.10683); gated feed-forward: Shazeer 2020 (arXiv:2002.05202).
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from vikhr_t5.model.products import einsum, on_one_cpu, trained_einsum

NUM_BUCKETS = 32
MAX_DISTANCE = 128
NORM_EPSILON = 1e-6
MATMUL, ATTENTION = "matmul", "attention"  # names by which a remat policy can keep what `dense`, `attention` computed
Product = Callable[[str, Array, Array, DTypeLike], Array]  # of a formula, as in `products`
MASKED = -1e10  # t5x's value: a query that may see nothing attends uniformly instead of giving NaN


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """x [..., D] times kernel [D, F] -> [..., F] in `dtype` (x's where None).

    The kernel is rounded to x's dtype, and its gradient stays in float32.
    """
    return einsum("...d,df->...f", x, kernel.astype(x.dtype), dtype or x.dtype)


def _dense_forward(x: Array, kernel: Array, dtype: DTypeLike | None) -> tuple[Array, tuple[Array, Array]]:
    product = trained_einsum("...d,df->...f", x, kernel.astype(x.dtype), dtype or x.dtype)
    return _named(product, MATMUL), (x, kernel)


def _dense_backward(dtype: DTypeLike | None, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    g = g.astype(x.dtype)
    dx = trained_einsum("...f,df->...d", g, kernel.astype(x.dtype), x.dtype)
    return dx, trained_einsum("...d,...f->df", x, g, jnp.float32).astype(kernel.dtype)


dense.defvjp(_dense_forward, _dense_backward)


@jax.checkpoint
def rms_norm(x: Array, scale: Array) -> Array:
    """T5's layer norm: no mean, no bias; computed in float32, returned in x's dtype. x [..., D], scale [D]."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(lax.square(x32), axis=-1, keepdims=True) + NORM_EPSILON) * scale).astype(x.dtype)


def dropout(x: Array, rate: float, key: Array | None, broadcast_axis: int | None = -2) -> Array:
    """Zeroes a share `rate` of x and scales the rest by 1/(1-rate); one draw along `broadcast_axis`, as in t5x.

    A `key` of None means that dropout is off.
    """
    if key is None or rate == 0:
        return x
    shape = list(x.shape)
    if broadcast_axis is not None:
        shape[broadcast_axis] = 1
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return x * (keep / (1 - rate)).astype(x.dtype)


@partial(jax.checkpoint, static_argnums=(1,))
def gated_activation(hidden: Sequence[Array], activations: Sequence[str]) -> Array:
    """The product of `activations[i](hidden[i])`, each [..., F] -> [..., F]. Its intermediate values are recomputed.

    Computed in float32 and rounded once: fewer errors and, since nothing is rounded in between, faster.
    """
    parts = (_ACTIVATIONS[name](x.astype(jnp.float32)) for name, x in zip(activations, hidden, strict=True))
    return reduce(jnp.multiply, parts).astype(hidden[0].dtype)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,  # the tanh approximation: Hugging Face's gelu_new
    "silu": jax.nn.silu,
    "swish": jax.nn.swish,
}


def relative_position_buckets(offsets: np.ndarray, bidirectional: bool) -> np.ndarray:
    """Bucket of each offset = key position - query position (t5's rule, same rounding). Any shape -> same shape.

    Half of the buckets hold one offset each, the others grow with the logarithm up to MAX_DISTANCE. A bidirectional
    stack gives half of all buckets to either direction; a causal one has none for the future.
    """
    buckets = NUM_BUCKETS // 2 if bidirectional else NUM_BUCKETS
    first = np.where(bidirectional & (offsets > 0), buckets, 0)
    distance = np.abs(offsets) if bidirectional else np.maximum(-offsets, 0)
    exact = buckets // 2
    ratio = np.log(distance.astype(np.float32) / exact + np.finfo(np.float32).eps) / np.log(MAX_DISTANCE / exact)
    large = np.minimum(exact + (ratio * (buckets - exact)).astype(np.int32), buckets - 1)
    return (first + np.where(distance < exact, distance, large)).astype(np.int32)


def relative_position_bias(table: Array, queries: int, keys: int, bidirectional: bool) -> Array:
    """table [H, G] -> bias [H, T, S] for row positions 0..T-1 and 0..S-1.

    The bias depends on the offset alone, so T+S values per head are gathered and sheared into the matrix: repeated
    on end and cut again into rows one shorter, each row is the one above moved by one place. The transpose is as
    cheap, where the gradient of a gather of all T*S values would be a scatter into a few cells.
    """
    period = queries + keys
    place = np.arange(period)
    offsets = np.where(place < keys, place, place - period)
    values = table[:, relative_position_buckets(offsets, bidirectional)]
    rows = jnp.tile(values, (1, queries))[:, : queries * (period - 1)].reshape(-1, queries, period - 1)
    return rows[:, :, :keys]


def segments_of(tokens: Array, segment_ids: Array | None) -> Array:
    """0 at padding (token 0), else 1 + the segment id, or 1 where nothing is packed. Any shape."""
    return jnp.where(tokens > 0, 1 if segment_ids is None else 1 + segment_ids, 0)


def attention_mask(query_segments: Array, key_segments: Array, causal: bool = False) -> Array:
    """Who sees whom: [B, T], [B, S] -> bool [B, T, S].

    A query sees the keys of its own segment; padding is seen by none. causal: nor a key after the query's position.
    """
    mask = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] > 0)
    return jnp.tril(mask) if causal else mask


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention(query: Array, key: Array, value: Array, mask: Array, bias: Array | None, float32_logits: bool) -> Array:
    """Multi-head attention without scaling (T5 folds 1/sqrt(K) into the initialiser of the query).

    The weights [H, T, S] are computed again in the backward pass, as in FlashAttention (Dao et al. 2022,
    arXiv:2205.14135): what is kept for it is linear in the length.

    Args:
        query: [B, T, H, K]. key, value: [B, S, H, K].
        mask: bool [B, T, S]. bias: [H, T, S], added to the logits; or None.
        float32_logits: keep the logits in float32; else they are rounded to query's dtype.

    Returns:
        [B, T, H*K]
    """
    attended, _, _ = _attend(einsum, query, key, value, mask, bias, float32_logits)
    return attended


# Products of the heads of one row of the batch: T queries, S keys.
QUERY_KEYS = "thk,shk->hts"
OVER_KEYS = "hts,shk->thk"
OVER_QUERIES = "hts,thk->shk"


def _logits(product: Product, q: Array, k: Array, mask: Array, bias: Array | None, float32_logits: bool) -> Array:
    """Masked logits of one row [H, T, S], float32."""
    logits = product(QUERY_KEYS, q, k, jnp.float32)
    if bias is not None:
        logits += bias
    if not float32_logits:
        logits = logits.astype(q.dtype).astype(jnp.float32)
    return jnp.where(mask, logits, MASKED)


def _attend(
    product: Product, query: Array, key: Array, value: Array, mask: Array, bias: Array | None, float32_logits: bool
) -> tuple:
    """(attended [B, T, H*K], each query's largest logit and 1 / sum of its weights [B, H, T])."""

    def attend(q: Array, k: Array, v: Array, mask: Array) -> tuple[tuple, None]:
        logits = _logits(product, q, k, mask, bias, float32_logits)
        largest = logits.max(axis=-1)
        weights = jnp.exp(logits - largest[..., None])
        inverse = 1 / weights.sum(axis=-1)
        attended = product(OVER_KEYS, weights.astype(q.dtype), v, jnp.float32) * inverse.T[..., None]
        return (attended.astype(q.dtype).reshape(q.shape[0], -1), largest, inverse), None

    return _over_batch(attend, (query, key, value, mask), None)[0]


def _attention_forward(
    query: Array, key: Array, value: Array, mask: Array, bias: Array | None, float32_logits: bool
) -> tuple[Array, tuple]:
    results = _attend(trained_einsum, query, key, value, mask, bias, float32_logits)
    attended, largest, inverse = (_named(result, ATTENTION) for result in results)
    return attended, (query, key, value, mask, bias, attended, largest, inverse)


def _attention_backward(float32_logits: bool, kept: tuple, g: Array) -> tuple:
    query, key, value, mask, bias, *results = kept
    product = trained_einsum

    def differentiate(
        q: Array, k: Array, v: Array, mask: Array, attended: Array, largest: Array, inverse: Array, g: Array
    ) -> tuple[tuple, Array | None]:
        dtype = q.dtype
        attended, g = attended.reshape(q.shape), g.reshape(q.shape)
        logits = _logits(product, q, k, mask, bias, float32_logits)
        weights = jnp.exp(logits - largest[..., None]) * inverse[..., None]
        along = jnp.sum(g.astype(jnp.float32) * attended, axis=-1).T[..., None]  # [H, T, 1]
        d_logits = weights * (product(QUERY_KEYS, g, v, jnp.float32) - along)
        low = d_logits.astype(dtype)
        dq = product(OVER_KEYS, low, k, dtype)
        dk = product(OVER_QUERIES, low, q, dtype)
        dv = product(OVER_QUERIES, weights.astype(dtype), g, dtype)
        return (dq, dk, dv), None if bias is None else d_logits

    zero = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    (dq, dk, dv), d_bias = _over_batch(differentiate, (query, key, value, mask, *results, g), zero)
    return dq, dk, dv, None, d_bias


attention.defvjp(_attention_forward, _attention_backward)


def _over_batch(
    function: Callable[..., tuple[tuple, Array | None]], arguments: Sequence[Array], zero: Array | None
) -> tuple[tuple, Array | None]:
    """function(row of arguments) -> (results, summand): the results of all rows, and the sum of the summands.

    On one CPU the batch is looped over, so that the weights of a row stay in the cache; on an accelerator that would
    serialise it, on several devices it would gather what is sharded.
    """
    if not on_one_cpu():
        results, summand = jax.vmap(function)(*arguments)
        return results, None if summand is None else summand.sum(axis=0)

    def row(total: Array | None, values: Sequence[Array]) -> tuple[Array | None, tuple]:
        results, summand = function(*values)
        return None if total is None or summand is None else total + summand, tuple(map(_to_bits, results))

    total, results = lax.scan(row, zero, tuple(arguments))
    return tuple(_from_bits(x) for x in results), total


def _named(x: Array, name: str) -> Array:
    """x under a name for remat policies; inside of a custom VJP, since a gradient does not pass through bits."""
    if jax.default_backend() != "cpu":
        return checkpoint_name(x, name)
    return _from_bits(checkpoint_name(_to_bits(x), name))


def _to_bits(x: Array) -> Array:
    """bfloat16 as uint16, for a scan to stack: on a CPU XLA would turn a whole stack into float32 and back for it."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
