"""Logits, losses, gradients and greedy tokens against what t5x computed (tests/reference)."""

from functools import partial

import jax
import numpy as np
import pytest
from quick import quick_jit
from reference_checkpoint import flat, load_arrays, reference_params, stack_layers, under

from vikhr_t5.model import network
from vikhr_t5.model.decoding import greedy, prepare, start, step
from vikhr_t5.train.losses import loss_normalizer, token_losses

FACTORS = (None, 10.0, "NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE")


def load(name):
    config = network.T5Config(
        vocab_size=1024,
        emb_dim=64,
        num_heads=4,
        head_dim=16,
        mlp_dim=128,
        num_encoder_layers=2,
        num_decoder_layers=2,
        mlp_activations=("gelu", "linear"),
        relative_bias_per_layer=name == "scan_d64",
    )
    return name, config, reference_params(name), load_arrays(name, "inputs.npz"), load_arrays(name, "outputs.npz")


@pytest.fixture(scope="module", params=["t511_d64", "scan_d64"])
def reference(request):
    return load(request.param)


def network_inputs(batch):
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    return [batch[n] for n in names] + [batch.get(f"{side}_segment_ids") for side in ("encoder", "decoder")]


def hidden_of(config, params, batch):
    return network.Transformer(config).apply({"params": params}, *network_inputs(batch), method="decoder_hidden")


@partial(quick_jit, static_argnames=("config", "smoothing", "chunk_size"))
def losses_of(config, params, batch, smoothing=0.0, chunk_size=None):
    hidden, head = hidden_of(config, params, batch), network.head(params, config)
    targets = batch["decoder_target_tokens"]
    return token_losses(hidden, *head, targets, z_loss=1e-4, label_smoothing=smoothing, chunk_size=chunk_size)


def test_the_tree_is_ours(reference):
    _, config, params, _, _ = reference
    ours = {path: shaped.shape for path, shaped in jax.tree_util.tree_leaves_with_path(network.abstract_params(config))}
    theirs = {path: array.shape for path, array in jax.tree_util.tree_leaves_with_path(params)}
    assert ours == theirs


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_logits_and_token_losses(reference, kind, chunk_size):
    _, config, params, inputs, outputs = reference
    batch, expected = under(inputs, f"{kind}/"), under(outputs, f"{kind}/")
    targets = batch["decoder_target_tokens"]
    real = targets > 0

    logits = quick_jit(network.Transformer(config).apply)({"params": params}, *network_inputs(batch))
    assert np.abs(logits - expected["logits"]).max() <= 1e-4  # at padding too: a masked row is uniform, as in t5x
    losses = losses_of(config, params, batch, chunk_size=chunk_size)
    assert np.abs(losses.loss - expected["token_loss_incl_z"])[real].max() <= 1e-4
    assert np.abs(losses.z_loss - expected["token_z_loss"])[real].max() <= 1e-6
    assert (losses.correct & real).sum() == expected["correct_sum"]
    assert float(losses.loss[real].sum()) == pytest.approx(float(expected["loss_sum"]), abs=1e-4)
    assert float(losses.z_loss[real].sum()) == pytest.approx(float(expected["z_loss_sum"]), abs=1e-4)


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_every_normaliser_with_every_smoothing(reference, kind):
    _, config, params, inputs, outputs = reference
    batch = under(inputs, f"{kind}/")
    for smoothing in (0.0, 0.1):
        losses = losses_of(config, params, batch, smoothing)
        for factor in FACTORS:
            loss, z_loss, _ = outputs[f"{kind}/loss[lnf={factor},label_smoothing={smoothing},z=1e-4]"]
            weights, denominator = loss_normalizer(factor, batch)
            where = (factor, smoothing)
            assert abs(float((losses.loss * weights).sum() / denominator) - loss) <= 1e-4, where
            assert abs(float((losses.z_loss * weights).sum() / denominator) - z_loss) <= 1e-6, where


@pytest.mark.parametrize(("remat_policy", "chunk_size"), [("everything", None), ("matmuls", 5), ("layer_inputs", 12)])
def test_gradients(remat_policy, chunk_size):
    _, config, params, inputs, outputs = load("t511_d64")
    config = network.T5Config(**{**vars(config), "remat_policy": remat_policy})
    batch = under(inputs, "plain/")

    @jax.grad
    def gradient(params):
        losses = losses_of.__wrapped__(config, params, batch, chunk_size=chunk_size)
        return (losses.loss * batch["decoder_loss_weights"]).sum()

    ours = flat(quick_jit(gradient)(params))
    theirs = flat(stack_layers(under(outputs, "plain/grad/")))
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        assert np.abs(ours[path] - expected).max() <= 1e-4, path
        assert np.abs(ours[path] - expected).max() <= 1e-5 * np.abs(expected).max(), path


def test_greedy_tokens(reference):
    name, config, params, inputs, _ = reference
    tokens = greedy(params, config, inputs["plain/encoder_input_tokens"], 12)
    np.testing.assert_array_equal(tokens, load_arrays(name, "decode.npz")["greedy/tokens"][:, 0])


def test_steps_over_the_cache_give_the_teacher_forced_logits(reference):
    _, config, params, inputs, _ = reference
    encoder_inputs = inputs["plain/encoder_input_tokens"]
    targets = np.random.default_rng(0).integers(3, 1000, (4, 12))
    decoder_inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    whole = quick_jit(network.Transformer(config).apply)({"params": params}, encoder_inputs, decoder_inputs, targets)
    params = quick_jit(prepare, static_argnums=1)(params, config)
    cache = quick_jit(start, static_argnums=(1, 3))(params, config, encoder_inputs, 12)
    one_step = quick_jit(step, static_argnums=1)
    for position in range(12):
        logits, cache = one_step(params, config, cache, decoder_inputs[:, position], position)
        np.testing.assert_allclose(logits, whole[:, position], atol=1e-5)
