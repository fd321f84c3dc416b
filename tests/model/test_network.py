"""Properties of the whole network: every field counts, packing, dropout, remat, bfloat16, initial values."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex_core
from quick import quick_jit
from random_params import enlarged_params

from vikhr_t5.model import network, ops
from vikhr_t5.model.decoding import greedy
from vikhr_t5.train.losses import token_losses

CONFIG = network.T5Config(
    vocab_size=64, emb_dim=16, num_heads=2, num_encoder_layers=2, num_decoder_layers=3, head_dim=4, mlp_dim=24,
    mlp_activations=("gelu", "linear"), dropout_rate=0.2,
)  # fmt: skip
PARAMS = enlarged_params(CONFIG, 0)


def example(seed, source, target):
    rng = np.random.default_rng(seed)
    return rng.integers(2, 64, source), rng.integers(2, 64, target)


def batch_of(*rows, source=12, target=8):
    """Rows of examples -> (encoder inputs, decoder inputs, targets, encoder segments, decoder segments)."""
    arrays = [np.zeros((len(rows), n), np.int32) for n in (source, target, target, source, target)]
    for r, row in enumerate(rows):
        s = t = 0
        for number, (inputs, targets) in enumerate(row, start=1):
            arrays[0][r, s : s + len(inputs)], arrays[3][r, s : s + len(inputs)] = inputs, number
            arrays[1][r, t + 1 : t + len(targets)] = targets[:-1]
            arrays[2][r, t : t + len(targets)], arrays[4][r, t : t + len(targets)] = targets, number
            s, t = s + len(inputs), t + len(targets)
    return arrays


BATCH = batch_of([example(0, 12, 8)], [example(1, 5, 3)])[:3]


jit = partial(quick_jit, static_argnames="config")


@jit
def loss_sum(params, batch, config=CONFIG, key=None):
    dropout = {} if key is None else {"enable_dropout": True, "rngs": {"dropout": key}}
    hidden = network.Transformer(config).apply({"params": params}, *batch, **dropout, method="decoder_hidden")
    losses = token_losses(hidden, *network.head(params, config), batch[2], z_loss=1e-4)
    return (losses.loss * (batch[2] > 0)).sum()


value_and_gradient = jit(jax.value_and_grad(loss_sum.__wrapped__))


@jit
def logits(config, params, key=None):
    dropout = {} if key is None else {"enable_dropout": True, "rngs": {"dropout": key}}
    return network.Transformer(config).apply({"params": params}, *BATCH, **dropout)


CHANGES = {
    "vocab_size": 96, "dtype": "bfloat16", "emb_dim": 24, "num_heads": 3, "num_encoder_layers": 1,
    "num_decoder_layers": 1, "head_dim": 6, "mlp_dim": 16, "mlp_activations": ("relu",), "dropout_rate": 0.5,
    "logits_via_embedding": True, "float32_attention_logits": True, "relative_bias_per_layer": True,
}  # fmt: skip


def test_every_field_has_its_test():
    assert {field.name for field in dataclasses.fields(network.T5Config)} == CHANGES.keys() | {
        "remat_policy",
        "attention",
    }


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_output(field):
    # float32_attention_logits acts on lower precisions only
    config = dataclasses.replace(CONFIG, dtype="bfloat16" if field == "float32_attention_logits" else "float32")
    changed = dataclasses.replace(config, **{field: CHANGES[field]})
    key = jax.random.key(1) if field == "dropout_rate" else None
    before, after = (logits(c, enlarged_params(c, 0), key) for c in (config, changed))
    assert before.shape != after.shape or not np.allclose(before, after, atol=1e-6)


def test_remat_keeps_less():
    """Bytes that the forward pass leaves to the backward pass; that the gradients are equal is in test_against_t5x."""
    kept = {}
    for policy in ("everything", "matmuls", "attention", "layer_inputs"):
        config = dataclasses.replace(CONFIG, remat_policy=policy)
        pull = jax.eval_shape(lambda p, c=config: jax.vjp(lambda p: loss_sum.__wrapped__(p, BATCH, c), p)[1], PARAMS)
        kept[policy] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    assert kept["everything"] > 1.2 * kept["matmuls"] > 1.2 * kept["attention"] > 1.2 * kept["layer_inputs"]


def test_a_packed_row_gives_the_losses_of_its_examples():
    examples = [example(i, s, t) for i, (s, t) in enumerate([(5, 3), (4, 1), (3, 4), (7, 2), (5, 6)])]
    packed = batch_of(examples[:3], examples[3:])
    alone = batch_of(*([e] for e in examples))
    packed_value, packed_gradient = value_and_gradient(PARAMS, packed)
    value, gradient = value_and_gradient(PARAMS, alone[:3])
    assert float(packed_value) == pytest.approx(float(value), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), packed_gradient, gradient)


def test_the_loop_over_the_batch_and_the_batched_path_agree(monkeypatch):
    value, gradients = value_and_gradient(PARAMS, BATCH)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    other, other_gradients = jit(jax.value_and_grad(loss_sum.__wrapped__))(PARAMS, BATCH)
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradients, other_gradients)


def test_segments_are_given_for_both_sides_or_neither():
    packed = batch_of([example(0, 5, 3)])
    with pytest.raises(ValueError, match="together"):
        loss_sum(PARAMS, packed[:4])


def test_dropout_draws_as_t5x_does(monkeypatch):
    """t5x draws once along the length everywhere but at the encoder's output; attention once for all queries."""
    drawn = []

    def record(x, rate, key, broadcast_axis=-2):
        if key is not None:
            shape = list(x.shape)
            if broadcast_axis is not None:
                shape[broadcast_axis] = 1
            drawn.append((rate, *shape))
        return x

    monkeypatch.setattr(ops, "dropout", record)
    logits.__wrapped__(CONFIG, PARAMS, jax.random.key(0))
    b, s, t, h, d, f = 2, 12, 8, 2, 16, 24
    attention_over_s, attention_over_t = [(b, s, h, 1), (b, 1, d)], [(b, t, h, 1), (b, 1, d)]
    mlp = [(b, 1, f), (b, 1, d)]
    encoder = [(b, 1, d), *attention_over_s, *mlp, (b, s, d)]
    decoder = [(b, 1, d), *attention_over_t, *attention_over_s, *mlp, (b, 1, d)]
    assert drawn == [(0.2, *shape) for shape in encoder + decoder]


def test_dropout_follows_its_key():
    first, again, other = (logits(CONFIG, PARAMS, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_dropout_is_new_in_each_layer_and_place(monkeypatch):
    keys = []
    monkeypatch.setattr(jax.lax, "scan", lambda body, x, xs: (_unrolled(body, x, xs), None))
    monkeypatch.setattr(ops, "dropout", lambda x, rate, key, *_: keys.append(jax.random.key_data(key)) or x)
    monkeypatch.setattr(ops, "attention", lambda q, k, v, *_: v.reshape(*v.shape[:2], -1))
    stacked = quick_jit(
        lambda: network.encode(PARAMS, CONFIG, BATCH[0], dropout_key=jax.random.key(0)) is None or jnp.stack(keys)
    )()
    assert len(np.unique(stacked, axis=0)) == len(stacked) == 2 + 4 * CONFIG.num_encoder_layers


def _unrolled(body, x, xs):
    for i in range(jax.tree.leaves(xs)[0].shape[0]):
        x, _ = body(x, jax.tree.map(lambda a, i=i: a[i], xs))
    return x


def test_dropout_rate_zero_needs_no_key_and_changes_nothing():
    config = dataclasses.replace(CONFIG, dropout_rate=0.0)
    without = quick_jit(lambda p: network.Transformer(config).apply({"params": p}, *BATCH, enable_dropout=True))(PARAMS)
    np.testing.assert_allclose(without, logits(CONFIG, PARAMS), atol=1e-5)


def test_bfloat16_is_close_to_float32():
    low = dataclasses.replace(CONFIG, dtype="bfloat16")
    exact, rounded = np.asarray(logits(CONFIG, PARAMS)), np.asarray(logits(low, PARAMS))
    assert rounded.dtype == np.float32
    assert (rounded - exact).std() < 0.03 * exact.std()
    value, gradients = value_and_gradient(PARAMS, BATCH)
    low_value, low_gradients = value_and_gradient(PARAMS, BATCH, config=low)
    assert float(low_value) == pytest.approx(float(value), rel=5e-3)
    for a, b in zip(jax.tree.leaves(low_gradients), jax.tree.leaves(gradients), strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


def test_a_token_outside_the_embedding_is_not_silent():
    assert np.isnan(network.encode(PARAMS, CONFIG, np.array([[3, 64]]))).any()


def test_parameters_are_declared_once():
    axes, shapes = network.logical_axes(CONFIG), network.abstract_params(CONFIG)
    fresh = jax.eval_shape(lambda: network.init(CONFIG, jax.random.key(0)))
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    for leaf, shaped, value in zip(
        jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(shapes), jax.tree.leaves(fresh), strict=True
    ):
        assert len(leaf) == len(shaped.shape)
        assert (shaped.shape, shaped.dtype) == (value.shape, value.dtype)
    assert axes["encoder"]["layers"]["attention"]["query"]["kernel"] == ("layers", "embed", "joined_kv")
    linen = jax.eval_shape(network.Transformer(CONFIG).init, jax.random.key(0), *BATCH)["params"]
    assert jax.tree.map(jnp.shape, linen) == jax.tree.map(jnp.shape, PARAMS)


def test_initial_standard_deviations_are_t5x_s():
    config = dataclasses.replace(CONFIG, vocab_size=512, emb_dim=64, head_dim=16, num_heads=8, mlp_dim=256)
    params = quick_jit(lambda: network.init(config, jax.random.key(0)))()
    layer = params["decoder"]["layers"]
    expected = [
        (params["token_embedder"]["embedding"], 1.0),
        (layer["self_attention"]["query"]["kernel"], (64 * 16) ** -0.5),
        (layer["self_attention"]["key"]["kernel"], 64**-0.5),
        (layer["self_attention"]["out"]["kernel"], 128**-0.5),
        (layer["mlp"]["wi_1"]["kernel"], 64**-0.5),
        (layer["mlp"]["wo"]["kernel"], 256**-0.5),
        (params["decoder"]["logits_dense"]["kernel"], 64**-0.5),
        (params["encoder"]["relpos_bias"]["rel_embedding"], (1 / 20) ** 0.5),  # uniform of variance 2/(8+32)
    ]
    for array, deviation in expected:
        assert float(array.std()) == pytest.approx(deviation, rel=0.1 if array.size < 1000 else 0.03)
    assert not np.allclose(layer["mlp"]["wo"]["kernel"][0], layer["mlp"]["wo"]["kernel"][1])


def test_flops_are_those_of_the_matmuls_in_the_program():
    jaxpr = jax.make_jaxpr(lambda params: logits.__wrapped__(CONFIG, params))(PARAMS)
    assert CONFIG.flops_per_step(2, 12, 8) == 3 * _matmul_flops(jaxpr.jaxpr)


def _matmul_flops(jaxpr):
    flops = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            flops += 2 * equation.outvars[0].aval.size * int(np.prod([left[i] for i in contracted]))
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                flops += times * _matmul_flops(getattr(inner, "jaxpr", inner))
    return flops


def _is_jaxpr(x):
    return isinstance(x, jex_core.Jaxpr | jex_core.ClosedJaxpr)


def test_padding_of_the_vocabulary_is_never_generated():
    params = jax.tree.map(np.copy, PARAMS)
    params["decoder"]["logits_dense"]["kernel"][:, 60:] *= 50
    everything = greedy(params, CONFIG, BATCH[0], 20)
    allowed = greedy(params, CONFIG, BATCH[0], 20, vocab_size=60)
    assert (everything >= 60).any()
    assert (allowed < 60).all()
    assert (allowed > 0).any()


def test_generation_stops_a_row_at_eos_and_pads_it():
    free = np.asarray(greedy(PARAMS, CONFIG, BATCH[0], 12, eos_id=-1))
    eos = free[0, 3]  # some token that the first row does produce
    stopped = np.asarray(greedy(PARAMS, CONFIG, BATCH[0], 12, eos_id=int(eos)))
    end = int(np.argmax(stopped[0] == eos))
    np.testing.assert_array_equal(stopped[0, : end + 1], free[0, : end + 1])
    assert not stopped[0, end + 1 :].any()


def test_generation_in_bfloat16_follows_float32_at_first():
    low = dataclasses.replace(CONFIG, dtype="bfloat16")
    exact, rounded = greedy(PARAMS, CONFIG, BATCH[0], 8), greedy(PARAMS, low, BATCH[0], 8)
    assert (exact[:, 0] == rounded[:, 0]).all()
