"""Cross-entropy against torch and closed forms; chunks; normalising factors. (Against t5x: tests/model.)"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vikhr_t5.errors import UserError
from vikhr_t5.train.losses import loss_normalizer, token_losses

B, T, D, V = 3, 11, 8, 50


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, T, D), dtype)
    kernel = 2 * jax.random.normal(keys[1], (D, V))
    return hidden, kernel, jax.random.randint(keys[2], (B, T), 0, V)


def weighted(hidden, kernel, targets, **options):
    """A scalar whose gradient meets every position with another weight."""
    losses = token_losses(hidden, kernel, 0.5, targets, **options)
    return (losses.loss * jnp.linspace(0.1, 2, B * T).reshape(B, T)).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_value_and_gradient_are_torch_s(smoothing, z_loss, chunk_size):
    hidden, kernel, targets = inputs()
    options = {"z_loss": z_loss, "label_smoothing": smoothing, "chunk_size": chunk_size}
    value, gradients = jax.value_and_grad(weighted, (0, 1))(hidden, kernel, targets, **options)

    h, k = (torch.tensor(np.asarray(x), requires_grad=True) for x in (hidden, kernel))
    logits = (0.5 * h) @ k
    # torch spreads the smoothed mass over all classes, t5x over the others, and t5x subtracts the entropy.
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, V), torch.tensor(np.asarray(targets)).reshape(-1).long(), reduction="none",
        label_smoothing=smoothing * V / (V - 1),
    )  # fmt: skip
    low = smoothing / (V - 1)
    entropy = -((1 - smoothing) * np.log(1 - smoothing) + (V - 1) * low * np.log(low + 1e-20))
    loss = loss - entropy + z_loss * logits.logsumexp(-1).reshape(-1) ** 2
    theirs = (loss * torch.linspace(0.1, 2, B * T)).sum()
    theirs.backward()
    assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
    np.testing.assert_allclose(gradients[0], h.grad, atol=2e-5)
    np.testing.assert_allclose(gradients[1], k.grad, atol=2e-5)


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 64])
def test_chunks_change_nothing(chunk_size):
    hidden, kernel, targets = inputs()
    whole, in_chunks = (
        token_losses(hidden, kernel, 0.5, targets, z_loss=1e-2, label_smoothing=0.1, chunk_size=size)
        for size in (None, chunk_size)
    )
    np.testing.assert_allclose(in_chunks.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(in_chunks.z_loss, whole.z_loss, rtol=1e-6)
    np.testing.assert_array_equal(in_chunks.correct, whole.correct)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_chunks_bound_what_is_held(chunk_size):
    """No buffer of the compiled gradient is as large as [B, T, V] where the loss is chunked."""
    length = 20
    hidden = jnp.zeros((B, length, D))
    targets = jnp.zeros((B, length), jnp.int32)
    vocabulary = 1000

    def loss(hidden, kernel):
        return token_losses(hidden, kernel, 1.0, targets, chunk_size=chunk_size).loss.sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, jnp.zeros((D, vocabulary))).compile()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\[([\d,]+)\]", compiled.as_text())]
    temporary = compiled.memory_analysis().temp_size_in_bytes
    if chunk_size:
        assert max(sizes) < B * length * vocabulary / 2
        assert temporary < 4 * B * length * vocabulary
    else:
        assert max(sizes) == B * length * vocabulary
        assert temporary > 4 * B * length * vocabulary


def test_bfloat16_hidden_states_give_float32_losses():
    hidden, kernel, targets = inputs(jnp.bfloat16)
    exact = token_losses(hidden.astype(jnp.float32), kernel, 0.5, targets).loss
    rounded = token_losses(hidden, kernel, 0.5, targets).loss
    assert rounded.dtype == jnp.float32
    assert float(jnp.abs(rounded - exact).mean()) < 0.02
    gradients = jax.grad(weighted, (0, 1))(hidden, kernel, targets)
    assert (gradients[0].dtype, gradients[1].dtype) == (jnp.bfloat16, jnp.float32)


def test_correct_is_the_largest_logit():
    hidden, kernel, targets = inputs()
    predicted = (0.5 * hidden @ kernel).argmax(-1)
    assert token_losses(hidden, kernel, 0.5, predicted).correct.all()
    np.testing.assert_array_equal(token_losses(hidden, kernel, 0.5, targets).correct, predicted == targets)


def test_huge_logits_do_not_overflow():
    hidden = jnp.full((1, 2, 1), 1e4)
    kernel = jnp.array([[1.0, -1.0, 0.5]])
    losses = token_losses(hidden, kernel, 1.0, jnp.array([[0, 1]]))
    np.testing.assert_allclose(losses.loss, [[0, 2e4]], rtol=1e-6)


BATCH = {
    "decoder_target_tokens": jnp.array([[5, 6, 7, 8, 0, 0], [5, 6, 7, 1, 9, 1]]),
    "decoder_loss_weights": jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 1]]),
    "decoder_segment_ids": jnp.array([[1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 2, 2]]),
}


def test_average_per_sequence_weighs_segments_equally():
    weights, denominator = loss_normalizer("average_per_sequence", BATCH)
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0.5, 0.5, 0, 0], [0.25] * 4 + [0, 1]])
    assert float(denominator) == 4
    unpacked = {name: array for name, array in BATCH.items() if name != "decoder_segment_ids"}
    weights, denominator = loss_normalizer("AVERAGE_PER_SEQUENCE", unpacked)
    np.testing.assert_allclose(weights, [[0.25] * 4 + [0, 0], [0.2, 0.2, 0.2, 0.2, 0, 0.2]])
    assert float(denominator) == pytest.approx(2)


def test_a_segment_without_weight_counts_for_nothing():
    batch = BATCH | {"decoder_loss_weights": jnp.array([[0, 0, 1, 1, 0, 0], [0] * 6])}
    weights, denominator = loss_normalizer("AVERAGE_PER_SEQUENCE", batch)
    np.testing.assert_allclose(weights, [[0, 0, 0.5, 0.5, 0, 0], [0] * 6])
    assert float(denominator) == 1


@pytest.mark.parametrize(
    ("factor", "denominator"),
    [(None, 1), (233472, 233472), ("NUM_REAL_TARGET_TOKENS", 9), ("num_total_target_tokens", 12)],
)
def test_other_factors(factor, denominator):
    weights, found = loss_normalizer(factor, BATCH)
    assert float(found) == denominator
    np.testing.assert_array_equal(weights, BATCH["decoder_loss_weights"])


def test_weights_default_to_the_targets_that_are_no_padding():
    weights, _ = loss_normalizer(None, {"decoder_target_tokens": BATCH["decoder_target_tokens"]})
    np.testing.assert_array_equal(weights, BATCH["decoder_target_tokens"] > 0)


def test_an_unknown_factor_is_named():
    with pytest.raises(UserError, match="'NUM_REAL_TOKENS' is unknown; nearest: NUM_REAL_TARGET_TOKENS"):
        loss_normalizer("NUM_REAL_TOKENS", BATCH)
