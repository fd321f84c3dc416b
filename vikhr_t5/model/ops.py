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

NUM_BUCKETS = 32
MAX_DISTANCE = 128
NORM_EPSILON = 1e-6
MATMUL, ATTENTION = "matmul", "attention"  # names by which a remat policy can keep what `dense`, `attention` computed
MASKED = -1e10  # t5x's value: a query that may see nothing attends uniformly instead of giving NaN


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """x [..., D] times kernel [D, F] -> [..., F] in `dtype` (x's where None).

    The kernel is rounded to x's dtype, products accumulate in float32, and the kernel's gradient stays in float32.
    That gradient is x^T g over rows; automatic differentiation would contract (g^T x)^T over batch and length, for
    which XLA first transposes both arrays on a CPU.
    """
    return _dense_forward(x, kernel, dtype)[0]


def _dense_forward(x: Array, kernel: Array, dtype: DTypeLike | None) -> tuple[Array, tuple[Array, Array]]:
    dtype = dtype or x.dtype
    product = _contract(x, kernel.astype(x.dtype), [x.ndim - 1], [0], dtype).astype(dtype)
    return _named(product, MATMUL), (x, kernel)


def _dense_backward(dtype: DTypeLike | None, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    g = g.astype(x.dtype)
    dx = _contract(g, kernel.astype(x.dtype), [g.ndim - 1], [1], x.dtype)
    return dx.astype(x.dtype), sum_over_rows(x, g).astype(kernel.dtype)


def sum_over_rows(x: Array, g: Array) -> Array:
    """x^T g, summed over all rows: [..., D], [..., F] -> [D, F], float32.

    In bfloat16 on a CPU, XLA multiplies fast what is contracted on the last dimension of its left side, and turns
    anything else into float32 first. So one side is transposed: x, which several kernels share, unless g is half as
    wide. A barrier before it keeps XLA from computing x element by element as it transposes; the one behind is for
    what transposes the result: XLA would swap the sides of the product, and fails when that runs.
    """
    if x.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        return _contract(_rows(x), _rows(g), [0], [0])
    if 2 * g.shape[-1] <= x.shape[-1]:
        return lax.optimization_barrier(_contract(_columns(g), _rows(x), [1], [0])).T
    return lax.optimization_barrier(_contract(_columns(x), _rows(g), [1], [0]))


def _rows(x: Array) -> Array:
    """[..., D] -> [N, D]"""
    return x.reshape(-1, x.shape[-1])


def _columns(x: Array) -> Array:
    """[..., D] -> [D, N]"""
    return jnp.moveaxis(lax.optimization_barrier(x), -1, 0).reshape(x.shape[-1], -1)


def _contract(
    a: Array, b: Array, a_axes: Sequence[int], b_axes: Sequence[int], dtype: DTypeLike = jnp.float32
) -> Array:
    """The product in `dtype`, but on a CPU in float32, since XLA has fast products for no other there.

    Accelerators add up in float32 whatever they return.
    """
    returned = jnp.float32 if jax.default_backend() == "cpu" else dtype
    return lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=returned)


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
    return _attention_forward(query, key, value, mask, bias, float32_logits)[0]


def _logits(q: Array, k: Array, mask: Array, bias: Array | None, float32_logits: bool) -> Array:
    """Masked logits [..., H, T, S], float32."""
    logits = query_keys(q, k)
    if bias is not None:
        logits += bias
    if not float32_logits:
        logits = logits.astype(q.dtype).astype(jnp.float32)
    return jnp.where(mask[..., None, :, :], logits, MASKED)


def query_keys(queries: Array, keys: Array) -> Array:
    """Products of queries [..., T, H, K] with keys [..., S, H, K] -> [..., H, T, S]."""
    return _einsum("...thk,...shk->...hts", queries, keys)


def over_keys(weights: Array, values: Array) -> Array:
    """Sum of weights [..., H, T, S] times values [..., S, H, K] over the keys -> [..., T, H, K].

    Here and below the product has the order of axes that XLA's fast one on a CPU gives: asked for another, einsum would
    swap the sides, which takes 1.3 times as long.
    """
    return _einsum("...hts,...shk->...htk", weights, values).swapaxes(-3, -2)


def over_queries(weights: Array, values: Array) -> Array:
    """Sum of weights [..., H, T, S] times values [..., T, H, K] over the queries -> [..., S, H, K]."""
    return jnp.moveaxis(_einsum("...thk,...hts->...hks", values, weights), -1, -3)


def _einsum(formula: str, a: Array, b: Array) -> Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _attention_forward(
    query: Array, key: Array, value: Array, mask: Array, bias: Array | None, float32_logits: bool
) -> tuple[Array, tuple]:
    def attend(q: Array, k: Array, v: Array, mask: Array) -> tuple[tuple, None]:
        logits = _logits(q, k, mask, bias, float32_logits)
        largest = logits.max(axis=-1)
        weights = jnp.exp(logits - largest[..., None])
        inverse = 1 / weights.sum(axis=-1)
        attended = over_keys(weights.astype(q.dtype), v) * inverse.mT[..., None]
        return (attended.astype(q.dtype).reshape(*q.shape[:-2], -1), largest, inverse), None

    results, _ = _over_batch(attend, (query, key, value, mask), None)
    attended, largest, inverse = (_named(result, ATTENTION) for result in results)
    return attended, (query, key, value, mask, bias, attended, largest, inverse)


def _attention_backward(float32_logits: bool, kept: tuple, g: Array) -> tuple:
    query, key, value, mask, bias, *results = kept

    def differentiate(
        q: Array, k: Array, v: Array, mask: Array, attended: Array, largest: Array, inverse: Array, g: Array
    ) -> tuple[tuple, Array | None]:
        dtype = q.dtype
        attended, g = attended.reshape(q.shape), g.reshape(q.shape)
        weights = jnp.exp(_logits(q, k, mask, bias, float32_logits) - largest[..., None]) * inverse[..., None]
        along = jnp.sum(g.astype(jnp.float32) * attended, axis=-1).mT[..., None]  # [..., H, T, 1]
        d_logits = weights * (query_keys(g, v) - along)
        low = d_logits.astype(dtype)
        dq = over_keys(low, k).astype(dtype)
        dk = over_queries(low, q).astype(dtype)
        dv = over_queries(weights.astype(dtype), g).astype(dtype)
        return (dq, dk, dv), None if bias is None else d_logits

    zero = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    (dq, dk, dv), d_bias = _over_batch(differentiate, (query, key, value, mask, *results, g), zero)
    return dq, dk, dv, None, d_bias


attention.defvjp(_attention_forward, _attention_backward)


def _over_batch(
    function: Callable[..., tuple[tuple, Array | None]], arguments: Sequence[Array], zero: Array | None
) -> tuple[tuple, Array | None]:
    """function(arguments) -> (results, summand): the results of the whole batch, and the sum of summands over it.

    On one CPU the batch is looped over, so that the weights of a row stay in the cache; on an accelerator that would
    serialise it, on several devices it would gather what is sharded.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        results, summand = function(*arguments)
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
