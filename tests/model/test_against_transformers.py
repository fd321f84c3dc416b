"""Logits, gradients and generated tokens against transformers' T5, in float32."""

import jax
import numpy as np
import pytest
import torch
from hf_t5 import hf_model, to_hf
from quick import quick_jit
from random_params import enlarged_params

from vikhr_t5.model import network
from vikhr_t5.model.decoding import greedy
from vikhr_t5.train.losses import token_losses

V10 = network.T5Config(
    vocab_size=256, emb_dim=48, num_heads=3, head_dim=16, mlp_dim=80, num_encoder_layers=3, num_decoder_layers=2,
    mlp_activations=("relu",), logits_via_embedding=True,
)  # fmt: skip
V11 = network.T5Config(
    vocab_size=256, emb_dim=32, num_heads=4, head_dim=16, mlp_dim=48, num_encoder_layers=1, num_decoder_layers=3,
    mlp_activations=("gelu", "linear"),
)  # fmt: skip
B, S, T = 3, 150, 11  # inputs reach past the distance from which relative positions share a bucket


@pytest.fixture(scope="module", params=[V10, V11], ids=["v1.0", "v1.1"])
def pair(request, tmp_path_factory):
    params = enlarged_params(request.param, seed=1)
    return request.param, params, hf_model(request.param, params, tmp_path_factory.mktemp("hf"))


def padded_batch():
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, 256, (B, S))
    targets = rng.integers(2, 256, (B, T))
    for row, (s, t) in enumerate([(S, T), (60, 7), (2, 1)]):
        inputs[row, s:] = 0
        targets[row, t:] = 0
    return inputs, np.pad(targets, ((0, 0), (1, 0)))[:, :-1], targets


def test_logits(pair):
    config, params, hf = pair
    inputs, decoder_inputs, targets = padded_batch()
    ours = quick_jit(network.Transformer(config).apply)({"params": params}, inputs, decoder_inputs, targets)
    with torch.no_grad():
        theirs = hf(
            input_ids=torch.tensor(inputs),
            attention_mask=torch.tensor(inputs > 0),
            decoder_input_ids=torch.tensor(decoder_inputs),
            output_attentions=True,
        )
    sharpness = np.mean([float(w[0].amax(-1).mean()) for w in (*theirs.encoder_attentions, *theirs.cross_attentions)])
    assert sharpness > 0.2, "attention is close to uniform: this would prove little"
    real = targets > 0
    assert np.abs(np.asarray(ours) - theirs.logits.numpy())[real].max() <= 1e-4


def test_gradients(pair):
    config, params, hf = pair
    inputs, decoder_inputs, targets = padded_batch()
    module = network.Transformer(config)

    def loss(params):
        hidden = module.apply({"params": params}, inputs, decoder_inputs, targets, method="decoder_hidden")
        losses = token_losses(hidden, *network.head(params, config), targets).loss
        return (losses * (targets > 0)).sum() / (targets > 0).sum()

    value, gradients = quick_jit(jax.value_and_grad(loss))(params)
    hf.zero_grad()
    labels = torch.tensor(np.where(targets > 0, targets, -100))
    theirs = hf(
        input_ids=torch.tensor(inputs), attention_mask=torch.tensor(inputs > 0),
        decoder_input_ids=torch.tensor(decoder_inputs), labels=labels,
    ).loss  # fmt: skip
    theirs.backward()
    assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
    named = to_hf(gradients)
    compared = {name: parameter.grad.numpy() for name, parameter in hf.named_parameters()}
    assert named.keys() == compared.keys()
    for name, gradient in compared.items():
        assert np.abs(named[name] - gradient).max() <= 1e-3 * np.abs(gradient).max(), name


def test_greedy_tokens(pair):
    config, params, hf = pair
    inputs, _, _ = padded_batch()
    ours = greedy(params, config, inputs, 12, vocab_size=256)
    theirs = hf.generate(
        input_ids=torch.tensor(inputs),
        attention_mask=torch.tensor(inputs > 0),
        max_new_tokens=12,
        do_sample=False,
        use_cache=False,  # transformers 5.23 sizes its cache by the encoder's depth
    ).numpy()[:, 1:]
    np.testing.assert_array_equal(np.asarray(ours)[:, : theirs.shape[1]], theirs)
