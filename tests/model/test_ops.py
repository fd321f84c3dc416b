"""The pure functions against closed forms, automatic differentiation and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from quick import quick_jit
from transformers.models.t5.modeling_t5 import T5Attention

from vikhr_t5.model import ops

B, T, S, H, K = 3, 6, 10, 2, 4


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.fixture(params=["looped", "batched"])
def batch_path(request, monkeypatch):
    """Both ways over the batch: the one for a single CPU, and the one for every other machine."""
    monkeypatch.setattr(jax, "device_count", lambda: 1 if request.param == "looped" else 2)
    return request.param


def plain_attention(q, k, v, q_segments, k_segments, bias, causal):
    """The definition, with a mask as t5x makes it: -1e10 is added."""
    mask = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] > 0)
    if causal:
        mask &= jnp.tril(jnp.ones(mask.shape[1:], bool))
    logits = jnp.einsum("bthk,bshk->bhts", q, k) + (0 if bias is None else bias)
    weights = jax.nn.softmax(logits + jnp.where(mask, 0, -1e10)[:, None])
    return jnp.einsum("bhts,bshk->bthk", weights, v).reshape(*q.shape[:2], -1)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_its_gradient(batch_path, with_bias, causal):
    q, k, v = normal(0, B, T, H, K), normal(1, B, S, H, K), normal(2, B, S, H, K)
    bias = normal(3, H, T, S) if with_bias else None
    # packed, padded, and a row in which the last query sees nothing
    q_segments = jnp.array([[1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 3]])
    k_segments = jnp.array([[1, 1, 1, 2, 2, 0, 0, 0, 0, 0], [1] * 10, [1, 1, 1, 2, 2, 2, 2, 2, 2, 0]])
    cotangent = normal(4, B, T, H * K)

    def ours(q, k, v, bias):
        return ops.attention(q, k, v, ops.attention_mask(q_segments, k_segments, causal), bias, True)

    def plain(q, k, v, bias):
        return plain_attention(q, k, v, q_segments, k_segments, bias, causal)

    @quick_jit
    def both(*arguments):
        pairs = (jax.vjp(function, *arguments) for function in (ours, plain))
        return [(value, pull(cotangent)) for value, pull in pairs]

    (value, gradients), (expected, expected_gradients) = both(q, k, v, bias)
    np.testing.assert_allclose(value, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, expected_gradients)


def test_dropout_of_value_rows_is_dropout_of_weights():
    """What the network does instead of dropping weights with one draw for all queries."""
    rng = np.random.default_rng(0)
    weights, v = rng.random((B, H, T, S)), rng.normal(size=(B, S, H, K))
    keep = (rng.random((B, H, 1, S)) < 0.9) / 0.9
    of_weights = np.einsum("bhts,bshk->bthk", weights * keep, v)
    of_rows = np.einsum("bhts,bshk->bthk", weights, v * keep[:, :, 0].swapaxes(1, 2)[..., None])
    np.testing.assert_allclose(of_weights, of_rows, atol=1e-6)


@pytest.mark.parametrize("features", [5, 13])  # narrower and wider than the input
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_and_its_gradient(dtype, features):
    x, kernel, g = normal(0, B, T, 8, dtype=dtype), normal(1, 8, features), normal(2, B, T, features, dtype=dtype)
    exact = (np.asarray(a, np.float64) for a in (x, kernel.astype(dtype), g))
    x64, kernel64, g64 = exact
    value, pull = jax.vjp(ops.dense, x, kernel)
    dx, d_kernel = pull(g)
    assert (value.dtype, dx.dtype, d_kernel.dtype) == (dtype, dtype, jnp.float32)
    rounding = 2**-8 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(np.asarray(value, np.float64), x64 @ kernel64, rtol=rounding, atol=rounding)
    np.testing.assert_allclose(np.asarray(dx, np.float64), g64 @ kernel64.T, rtol=rounding, atol=rounding)
    # The kernel's gradient is summed and kept in float32, whatever the inputs were rounded to.
    np.testing.assert_allclose(d_kernel, np.einsum("btd,btf->df", x64, g64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", [5, 13])
@pytest.mark.parametrize("shape", [(B, T), (1, T), (B, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transposed_kernel_has_its_gradient(dtype, shape, features):
    """An output layer tied to the embedding. XLA once compiled the transposed product and could not run it."""
    x, table, g = normal(0, *shape, 8, dtype=dtype), normal(1, features, 8), normal(2, *shape, features, dtype=dtype)
    gradient = jax.jit(lambda x, table, g: jax.vjp(lambda table: ops.dense(x, table.T), table)[1](g)[0])(x, table, g)
    expected = np.einsum("btf,btd->fd", *(np.asarray(a, np.float64) for a in (g, x)))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_a_gated_activation_is_rounded_once():
    hidden = [normal(0, 3, 50, dtype=jnp.bfloat16), normal(1, 3, 50, dtype=jnp.bfloat16)]
    gate, linear = (np.asarray(x, np.float64) for x in hidden)
    exact = linear * gate * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    value = ops.gated_activation(hidden, ("gelu", "linear"))
    assert value.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(value, np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers(bidirectional):
    offsets = np.arange(-700, 701)
    theirs = T5Attention._relative_position_bucket(torch.tensor(offsets), bidirectional, 32, 128).numpy()
    np.testing.assert_array_equal(ops.relative_position_buckets(offsets, bidirectional), theirs)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (9, 1), (5, 200), (200, 5)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_sheared_bias_is_the_gathered_one(queries, keys, bidirectional):
    table, g = normal(0, H, ops.NUM_BUCKETS), normal(1, H, queries, keys)
    offsets = np.arange(keys)[None, :] - np.arange(queries)[:, None]
    buckets = ops.relative_position_buckets(offsets, bidirectional)
    value, pull = jax.vjp(lambda table: ops.relative_position_bias(table, queries, keys, bidirectional), table)
    expected, expected_pull = jax.vjp(lambda table: table[:, buckets], table)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_allclose(pull(g)[0], expected_pull(g)[0], atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 50, 60), (4, 5, 60)])
def test_dropout_keeps_its_share_and_the_mean(shape):
    x = jnp.ones(shape)
    full = ops.dropout(x, 0.25, jax.random.key(0), broadcast_axis=None)
    assert set(np.unique(full)) == {0, np.float32(1 / 0.75)}
    if x.size > 100_000:
        assert float((full > 0).mean()) == pytest.approx(0.75, abs=0.01)
        assert float(full.mean()) == pytest.approx(1, abs=0.01)
    along = ops.dropout(x, 0.25, jax.random.key(0), broadcast_axis=-2)
    assert (along == along[:, :1]).all()
    assert not (along == along[:1]).all()


def test_dropout_is_off_without_a_key_or_a_rate():
    x = normal(0, 4, 5)
    assert ops.dropout(x, 0.5, None) is x
    assert ops.dropout(x, 0.0, jax.random.key(0)) is x


def test_rms_norm_is_computed_in_float32():
    x = (300 * normal(0, 4, 64)).astype(jnp.bfloat16)  # squares would lose bits in bfloat16
    x64, scale = np.asarray(x, np.float64), np.linspace(0.5, 2, 64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(np.asarray(ops.rms_norm(x, jnp.asarray(scale)), np.float64), expected, rtol=2**-8)
