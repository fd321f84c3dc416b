"""Products by oneDNN against float64, and when they are asked for."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vikhr_t5.model import network, ops, products
from vikhr_t5.plan_flops import matmul_flops

ROWS, HEADS, QUERIES, KEYS = 2, 3, 192, 320
SHAPES = {  # each takes more than LARGE
    "...d,df->...f": ((ROWS, QUERIES, 256), (256, 384)),
    "...f,df->...d": ((ROWS, QUERIES, 384), (256, 384)),
    "...d,...f->df": ((ROWS, QUERIES, 256), (ROWS, QUERIES, 384)),
    ops.QUERY_KEYS: ((QUERIES, HEADS, 128), (KEYS, HEADS, 128)),
    ops.OVER_KEYS: ((HEADS, QUERIES, KEYS), (KEYS, HEADS, 128)),
    ops.OVER_QUERIES: ((HEADS, QUERIES, KEYS), (QUERIES, HEADS, 128)),
}
TYPES = [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, jnp.float32)]


@pytest.fixture
def _fresh():
    """What was found out about this machine is found out again, in the test and after it."""
    products._onednn_multiplies.cache_clear()
    yield
    products._onednn_multiplies.cache_clear()


def arrays(formula, dtype):
    keys = jax.random.split(jax.random.key(0))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, SHAPES[formula], strict=True)]


def calls(function, *arguments):
    """How often a program calls oneDNN."""
    return jax.jit(lambda *arguments: function(*arguments)).lower(*arguments).as_text().count(products.ONEDNN_MATMUL)


@pytest.mark.parametrize("formula", SHAPES)
@pytest.mark.parametrize(("dtype", "returned"), TYPES)
def test_a_product_is_the_exact_one_rounded(formula, dtype, returned):
    a, b = arrays(formula, dtype)
    product = jax.jit(partial(products.trained_einsum, formula, dtype=returned))
    assert calls(product, a, b) == products._onednn_multiplies(a.dtype)
    value = product(a, b)
    exact = np.einsum(formula.replace("...", "bt"), np.asarray(a, np.float64), np.asarray(b, np.float64))
    assert (value.dtype, value.shape) == (returned, exact.shape)
    rounding = 2**-8 if returned == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(value, np.float64), exact, rtol=rounding, atol=1e-3)
    np.testing.assert_allclose(products.einsum(formula, a, b, returned), value, rtol=rounding, atol=1e-3)


@pytest.mark.skipif(not products._onednn_multiplies(np.dtype(np.float32)), reason="this jaxlib has no oneDNN")
class TestWhoCalls:
    def test_what_is_trained(self):
        x, kernel = arrays("...d,df->...f", jnp.float32)
        gradients = jax.grad(lambda x, kernel: ops.dense(x, kernel).sum(), (0, 1))
        assert calls(gradients, x, kernel) == 2  # the value itself is not needed
        assert calls(lambda x, kernel: jax.vjp(ops.dense, x, kernel)[1](x @ kernel), x, kernel) == 2
        assert calls(ops.dense, x, kernel) == 0
        q, k = arrays(ops.QUERY_KEYS, jnp.float32)
        mask, bias = jnp.ones((1, QUERIES, KEYS), bool), jnp.zeros((HEADS, QUERIES, KEYS))
        attend = lambda q, k: ops.attention(q[None], k[None], k[None], mask, bias, True)  # noqa: E731
        assert calls(attend, q, k) == 0
        assert calls(jax.grad(lambda q, k: attend(q, k).sum(), (0, 1)), q, k) == 7

    def test_not_a_small_product_nor_several_devices_nor_another_type(self, monkeypatch):
        product = partial(products.trained_einsum, "...d,df->...f", dtype=jnp.float32)
        x, kernel = arrays("...d,df->...f", jnp.float32)
        assert calls(product, x, kernel) == 1
        assert calls(product, x[:, :8], kernel) == 0
        assert calls(product, x.astype(jnp.float16), kernel.astype(jnp.float16)) == 0
        assert calls(product, x.astype(jnp.bfloat16), kernel) == 0
        monkeypatch.setattr(jax, "device_count", lambda: 2)
        assert calls(product, x, kernel) == 0

    @pytest.mark.usefixtures("_fresh")
    def test_no_jaxlib_without_it(self, monkeypatch):
        monkeypatch.setattr(products, "ONEDNN_MATMUL", "__none$matmul")
        product = partial(products.trained_einsum, "...d,df->...f", dtype=jnp.float32)
        assert calls(product, *arrays("...d,df->...f", jnp.float32)) == 0

    @pytest.mark.usefixtures("_fresh")
    @pytest.mark.parametrize(("flags", "expected"), [("avx2 avx512f", False), ("avx512f avx512_bf16", True)])
    def test_no_processor_without_the_instructions(self, monkeypatch, tmp_path, flags, expected):
        (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}\n")
        monkeypatch.setattr(products, "Path", lambda _: tmp_path / "cpuinfo")
        assert products._onednn_multiplies(np.dtype(jnp.bfloat16)) == expected
        monkeypatch.setattr(products, "Path", lambda _: Path("/nowhere"))
        products._onednn_multiplies.cache_clear()
        assert not products._onednn_multiplies(np.dtype(jnp.bfloat16))

    def test_gradients_of_single_rows(self):
        """vmap, which takes one row after the other."""
        x, kernel = arrays("...d,df->...f", jnp.float32)
        one = jax.grad(lambda kernel, x: (ops.dense(x, kernel) ** 2).sum())
        several = jax.vmap(one, (None, 0))(kernel, jnp.concatenate([x, x], 1))
        for gradient, row in zip(several, x, strict=True):
            np.testing.assert_allclose(gradient, 2 * one(kernel, row), rtol=1e-4, atol=1e-1)

    def test_the_plan_counts_them(self):
        a, b = arrays(ops.OVER_QUERIES, jnp.float32)
        for product in (products.einsum, products.trained_einsum):
            traced = jax.make_jaxpr(partial(product, ops.OVER_QUERIES, dtype=jnp.float32))(a, b)
            assert matmul_flops(traced.jaxpr) == 2 * HEADS * QUERIES * KEYS * 128

    def test_a_model_s_gradients_are_those_of_xla(self, monkeypatch):
        config = network.T5Config(
            vocab_size=512, dtype="float32", emb_dim=256, num_heads=4, num_encoder_layers=2, num_decoder_layers=2,
            head_dim=64, mlp_dim=512, mlp_activations=("gelu", "linear"), dropout_rate=0.0, remat_policy="matmuls",
        )  # fmt: skip
        params = network.init(config, jax.random.key(0))
        tokens = jax.random.randint(jax.random.key(1), (2, 512), 1, 512)

        def loss(params):
            return (network.Transformer(config).apply({"params": params}, tokens, tokens, tokens) ** 2).mean()

        values = {}
        for name, least in {"oneDNN": products.LARGE, "XLA": 2**60}.items():
            monkeypatch.setattr(products, "LARGE", least)
            compute = jax.value_and_grad(lambda params: loss(params))  # traced anew
            assert (calls(compute, params) > 20) == (name == "oneDNN")
            values[name] = jax.jit(compute)(params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(abs(b).max())),
            values["oneDNN"],
            values["XLA"],
        )
