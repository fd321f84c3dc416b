"""FlashAttention with T5's relative-position bias and packing mask, as Pallas kernels for GPUs.

B batch, T query (target) length, S key (source) length, H heads, K head dim, G relative-position buckets, N blocks.

Dao 2023 (FlashAttention-2, arXiv:2307.08691): softmax over blocks of keys with running statistics; the backward pass
computes the weights again. What T5 adds stays out of memory too: a tile's bias is read from the T+S-1 values by offset,
its mask is compared from segment ids, and blocks that nothing sees are not visited. The table's gradient is summed over
rows in registers, then by bucket, in a fixed order: no [B, H, T, S], no atomics, the same bits each time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vikhr_t5.model import ops

BLOCK = 64  # queries, and keys, of a tile
ROWS = 8  # of the batch, that one program of the table's gradient adds up


def supports(head_dim: int, dtype: str) -> bool:
    """Whether tiles [BLOCK, K] suit tensor cores and fit shared memory: K a power of 2 from 16, at most 256 bytes."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0 and head_dim * jnp.dtype(dtype).itemsize <= 256


def visited_blocks(query_segments: Array, key_segments: Array, causal: bool) -> tuple[Array, Array]:
    """Between which blocks there is something to see, as (first, end).

    Args:
        query_segments: int [B, T], 0 at padding. key_segments: int [B, S].

    Returns:
        For each block of queries, its blocks of keys: int32 [B, N, 2]. For each block of keys, its blocks of queries.
    """
    padded = [jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))) for x in (query_segments, key_segments)]
    mask = ops.attention_mask(padded[0], padded[1], causal)
    rows, queries, keys = mask.shape
    seen = mask.reshape(rows, queries // BLOCK, BLOCK, keys // BLOCK, BLOCK).any((2, 4))

    def ranges(seen: Array) -> Array:
        first, end = seen.argmax(-1), seen.shape[-1] - seen[..., ::-1].argmax(-1)
        return jnp.stack([first, jnp.where(seen.any(-1), end, first)], -1).astype(jnp.int32)

    return ranges(seen), ranges(seen.mT)


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def fused_attention(
    query: Array,
    key: Array,
    value: Array,
    table: Array | None,
    query_segments: Array,
    key_segments: Array,
    key_blocks: Array,
    query_blocks: Array,
    causal: bool,
) -> Array:
    """Attention without scaling; logits and softmax in float32. A query that sees nothing gives zeros.

    Args:
        query: [B, T, H, K]. key, value: [B, S, H, K].
        table: float32 [H, G], the relative-position biases (bidirectional unless causal); or None.
        query_segments, key_segments: int32 [B, T], [B, S]: a query sees the keys of its segment; 0 is padding.
        key_blocks, query_blocks: `visited_blocks(query_segments, key_segments, causal)`.

    Returns:
        [B, T, H, K]
    """
    return _forward(query, key, value, table, query_segments, key_segments, key_blocks, query_blocks, causal)[0]


def _forward(
    query: Array,
    key: Array,
    value: Array,
    table: Array | None,
    query_segments: Array,
    key_segments: Array,
    key_blocks: Array,
    query_blocks: Array,
    causal: bool,
) -> tuple[Array, tuple]:
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    results = _call(
        partial(_forward_kernel, causal=causal),
        (key_blocks.shape[1], batch, heads),
        [
            *_of_row_and_head(query, key, value, query_segments, key_segments),
            ("b..", key_blocks),
            ("h.", _bias_by_offset(table, queries, keys, causal)),
        ],
        [("b.h.", query), ("bh.", jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32))],
    )
    attended, log_total = (checkpoint_name(result, ops.ATTENTION) for result in results)
    given = (query, key, value, table, query_segments, key_segments, key_blocks, query_blocks)
    return attended, (*given, attended, log_total)


def _backward(causal: bool, kept: tuple, g: Array) -> tuple[Array | None, ...]:
    query, key, value, table, query_segments, key_segments, key_blocks, query_blocks, attended, log_total = kept
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    along = jnp.einsum("bthk,bthk->bht", g, attended, preferred_element_type=jnp.float32)
    bias = _bias_by_offset(table, queries, keys, causal)
    arguments = [
        *_of_row_and_head(query, key, value, query_segments, key_segments),
        ("b.h.", g),
        ("bh.", log_total),
        ("bh.", along),
        ("h.", bias),
    ]
    grid = (key_blocks.shape[1], batch, heads)
    (dq,) = _call(partial(_dq_kernel, causal=causal), grid, [*arguments, ("b..", key_blocks)], [("b.h.", query)])
    grid = (query_blocks.shape[1], batch, heads)
    like = [("b.h.", key), ("b.h.", value)]
    dk, dv = _call(partial(_dkv_kernel, causal=causal), grid, [*arguments, ("b..", query_blocks)], like)
    if table is None:
        return dq, dk, dv, None, None, None, None, None

    tiles, parts = key_blocks.shape[1] * query_blocks.shape[1], pl.cdiv(batch, ROWS)
    (sums,) = _call(
        partial(_dtable_kernel, causal=causal),
        (tiles, parts, heads),
        [
            *((axes.replace("b", "."), argument) for axes, argument in arguments),
            (".", jnp.asarray(_buckets(queries, keys, causal))),
        ],
        [("bhn.", jax.ShapeDtypeStruct((parts, heads, tiles, ops.NUM_BUCKETS), jnp.float32))],
    )
    return dq, dk, dv, sums.sum((0, 2)), None, None, None, None


fused_attention.defvjp(_forward, _backward)


def _buckets(queries: int, keys: int, causal: bool) -> np.ndarray:
    """The bucket of each offset (key position - query position) from 1-T to S-1: int [T+S-1]."""
    return ops.relative_position_buckets(np.arange(1 - queries, keys), bidirectional=not causal)


def _bias_by_offset(table: Array | None, queries: int, keys: int, causal: bool) -> Array | None:
    """[H, G] -> [H, T+S-1]."""
    return None if table is None else table[:, _buckets(queries, keys, causal)]


Argument = tuple[str, Any]  # how an array is cut for a program, and the array (a result's shape; None: absent)


def _of_row_and_head(q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array) -> list[Argument]:
    return [("b.h.", q), ("b.h.", k), ("b.h.", v), ("b.", q_segments), ("b.", k_segments)]


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, int, int],
    arguments: Sequence[Argument],
    results: Sequence[Argument],
) -> Sequence[Array]:
    """Runs `kernel`, a program for each (n, b, h) of the grid.

    How an array is cut is a letter an axis: the program sees one n, b or h of it; of an axis "." all.
    """

    def spec(axes: str, array: Any) -> pl.BlockSpec | None:
        if array is None:
            return None
        shape = [size if axis == "." else None for axis, size in zip(axes, array.shape, strict=True)]
        return pl.BlockSpec(shape, lambda *ids: tuple(0 if axis == "." else ids["nbh".index(axis)] for axis in axes))

    call = partial(
        pl.pallas_call,
        kernel,
        grid=grid,
        in_specs=[spec(*argument) for argument in arguments],
        out_specs=[spec(*result) for result in results],
        out_shape=[jax.ShapeDtypeStruct(result.shape, result.dtype) for _, result in results],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    )
    arrays = [array for _, array in arguments]
    return lax.platform_dependent(*arrays, cpu=call(interpret=True), default=call())


def _places(block: Array) -> Array:
    return block * BLOCK + jnp.arange(BLOCK)


def _tile(ref: Any, block: Array, *row: Array) -> tuple[tuple, Array]:
    """Where a block of a ref's (or of its row's) positions is, and which of it lies within the array."""
    place = (*row, pl.ds(block * BLOCK, BLOCK))
    inside = _places(block) < ref.shape[len(row)]
    return (place, inside) if len(ref.shape) == len(place) else ((*place, slice(None)), inside[:, None])


def _load(ref: Any, block: Array, *row: Array) -> Array:
    place, inside = _tile(ref, block, *row)
    return triton.load(ref.at[place], mask=inside, other=ref.dtype.type(0))


def _store(ref: Any, block: Array, values: Array) -> None:
    place, inside = _tile(ref, block)
    triton.store(ref.at[place], values.astype(ref.dtype), mask=inside)


def _offsets(i: Array, j: Array) -> Array:
    """Key position - query position, [BLOCK, BLOCK], of a block i of queries and a block j of keys."""
    return _places(j)[None, :] - _places(i)[:, None]


def _logits(
    q: Array,
    k: Array,
    q_segments: Array,
    k_segments: Array,
    bias_ref: Any,
    i: Array,
    j: Array,
    queries: int,
    causal: bool,
) -> Array:
    """Of one tile: [BLOCK, K] of q and k -> float32 [BLOCK, BLOCK], -inf where a query does not see the key."""
    offsets = _offsets(i, j)
    seen = (q_segments[:, None] == k_segments[None, :]) & (k_segments > 0)[None, :]
    if causal:
        seen &= offsets <= 0
    logits = triton.dot(q, k, trans_b=True)
    if bias_ref is not None:
        logits += triton.load(bias_ref.at[offsets + (queries - 1)], mask=seen, other=0.0)
    return jnp.where(seen, logits, -jnp.inf)


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, q_segments_ref: Any, k_segments_ref: Any, blocks_ref: Any, bias_ref: Any,
    attended_ref: Any, log_total_ref: Any, *, causal: bool,
) -> None:  # fmt: skip
    """What one block of queries attends to, and the logarithms of its sums of exp(logits)."""
    i = pl.program_id(0)
    q, q_segments = _load(q_ref, i), _load(q_segments_ref, i)

    def attend(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        attended, largest, total = carry
        k, v, k_segments = _load(k_ref, j), _load(v_ref, j), _load(k_segments_ref, j)
        logits = _logits(q, k, q_segments, k_segments, bias_ref, i, j, q_ref.shape[0], causal)
        larger = jnp.maximum(largest, logits.max(axis=1))
        weights, shrunk = jnp.exp(logits - larger[:, None]), jnp.exp(largest - larger)
        attended = attended * shrunk[:, None] + triton.dot(weights.astype(v.dtype), v)
        return attended, larger, total * shrunk + weights.sum(axis=1)

    # The largest logit so far is finite from the start: exp(-inf - largest) is then 0, never NaN.
    start = jnp.zeros(q.shape, jnp.float32), jnp.full(BLOCK, ops.MASKED), jnp.zeros(BLOCK)
    attended, largest, total = lax.fori_loop(blocks_ref[i, 0], blocks_ref[i, 1], attend, start)
    total = jnp.where(total > 0, total, 1.0)
    _store(attended_ref, i, attended / total[:, None])
    _store(log_total_ref, i, largest + jnp.log(total))


def _d_logits(logits: Array, log_total: Array, along: Array, g: Array, v: Array) -> tuple[Array, Array]:
    """The weights of a tile [BLOCK, BLOCK], and the gradient of its logits."""
    weights = jnp.exp(logits - log_total[:, None])
    return weights, weights * (triton.dot(g, v, trans_b=True) - along[:, None])


def _dq_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, q_segments_ref: Any, k_segments_ref: Any, g_ref: Any, log_total_ref: Any,
    along_ref: Any, bias_ref: Any, blocks_ref: Any, dq_ref: Any, *, causal: bool,
) -> None:  # fmt: skip
    """The gradient of one block of queries."""
    i = pl.program_id(0)
    q, q_segments = _load(q_ref, i), _load(q_segments_ref, i)
    g, log_total, along = _load(g_ref, i), _load(log_total_ref, i), _load(along_ref, i)

    def add(j: Array, dq: Array) -> Array:
        k, v, k_segments = _load(k_ref, j), _load(v_ref, j), _load(k_segments_ref, j)
        logits = _logits(q, k, q_segments, k_segments, bias_ref, i, j, q_ref.shape[0], causal)
        _, d_logits = _d_logits(logits, log_total, along, g, v)
        return dq + triton.dot(d_logits.astype(k.dtype), k)

    _store(dq_ref, i, lax.fori_loop(blocks_ref[i, 0], blocks_ref[i, 1], add, jnp.zeros(q.shape, jnp.float32)))


def _dkv_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, q_segments_ref: Any, k_segments_ref: Any, g_ref: Any, log_total_ref: Any,
    along_ref: Any, bias_ref: Any, blocks_ref: Any, dk_ref: Any, dv_ref: Any, *, causal: bool,
) -> None:  # fmt: skip
    """The gradients of one block of keys and values."""
    j = pl.program_id(0)
    k, v, k_segments = _load(k_ref, j), _load(v_ref, j), _load(k_segments_ref, j)

    def add(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk, dv = carry
        q, g, q_segments = _load(q_ref, i), _load(g_ref, i), _load(q_segments_ref, i)
        logits = _logits(q, k, q_segments, k_segments, bias_ref, i, j, q_ref.shape[0], causal)
        weights, d_logits = _d_logits(logits, _load(log_total_ref, i), _load(along_ref, i), g, v)
        dk += triton.dot(d_logits.astype(q.dtype), q, trans_a=True)
        return dk, dv + triton.dot(weights.astype(g.dtype), g, trans_a=True)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = lax.fori_loop(blocks_ref[j, 0], blocks_ref[j, 1], add, start)
    _store(dk_ref, j, dk)
    _store(dv_ref, j, dv)


def _dtable_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, q_segments_ref: Any, k_segments_ref: Any, g_ref: Any, log_total_ref: Any,
    along_ref: Any, bias_ref: Any, buckets_ref: Any, sums_ref: Any, *, causal: bool,
) -> None:  # fmt: skip
    """The gradient of the logits of one tile, summed over ROWS rows and then by bucket."""
    batch, queries, keys = q_ref.shape[0], q_ref.shape[1], k_ref.shape[1]
    across = pl.cdiv(keys, BLOCK)
    i, j = lax.div(pl.program_id(0), across), lax.rem(pl.program_id(0), across)

    def add(b: Array, total: Array) -> Array:
        q, k, v, g = _load(q_ref, i, b), _load(k_ref, j, b), _load(v_ref, j, b), _load(g_ref, i, b)
        q_segments, k_segments = _load(q_segments_ref, i, b), _load(k_segments_ref, j, b)
        logits = _logits(q, k, q_segments, k_segments, bias_ref, i, j, queries, causal)
        return total + _d_logits(logits, _load(log_total_ref, i, b), _load(along_ref, i, b), g, v)[1]

    first = pl.program_id(1) * ROWS
    end = jnp.minimum(first + ROWS, batch)
    if causal:
        end = jnp.where(j * BLOCK < (i + 1) * BLOCK, end, first)  # nothing above the diagonal
    total = lax.fori_loop(first, end, add, jnp.zeros((BLOCK, BLOCK), jnp.float32))
    inside = (_places(i) < queries)[:, None] & (_places(j) < keys)[None, :]
    buckets = triton.load(buckets_ref.at[_offsets(i, j) + (queries - 1)], mask=inside, other=-1)

    def store(bucket: Array, _: None) -> None:
        sums_ref[bucket] = jnp.where(buckets == bucket, total, 0.0).sum()

    lax.fori_loop(0, ops.NUM_BUCKETS, store, None)
