"""Cross-entropy with z-loss and label smoothing, in chunks of the target length.

B batch, T target length, C positions in a chunk, D model, V vocabulary.

z-loss: Shazeer et al. 2018 (Mesh TensorFlow, arXiv:1811.02084); normalising factors: t5x's `losses.py`.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vikhr_t5.errors import UserError, nearest
from vikhr_t5.model import ops

CHUNK_SIZE = 32  # target positions whose logits are held at one time: 1/13 of the plain loss's memory at 32 x 512 x 58k
SPECIAL_FACTORS = ("NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE")


class TokenLosses(NamedTuple):
    """Per target position, [B, T], not yet weighted."""

    loss: Array  # float32, cross-entropy + z-loss; the one part with a gradient
    z_loss: Array  # float32
    correct: Array  # bool: the largest logit is the target's


def token_losses(
    hidden: Array,
    head_kernel: Array,
    scale: float,
    targets: Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> TokenLosses:
    """The loss of each target position from the decoder's hidden states.

    Args:
        hidden: [B, T, D]. head_kernel: [D, V], float32. scale: logits = (hidden * scale) @ head_kernel.
        targets: int [B, T].
        z_loss: coefficient of log(Z)^2, which keeps the logits from drifting.
        label_smoothing: probability mass spread over the other classes; the entropy of the smoothed target is
            subtracted, so a perfect prediction has loss 0.
        chunk_size: positions of a row whose logits are held at one time (then recomputed in the backward pass), so
            logits take [B, chunk_size, V] floats instead of [B, T, V]. None: all positions, kept for the backward
            pass. Chunks run along the length because the batch may be sharded.
    """
    batch, length, _ = hidden.shape

    def chunk_losses(hidden: Array, targets: Array) -> TokenLosses:
        logits = ops.dense(hidden * scale, head_kernel, jnp.float32)
        return TokenLosses(*_cross_entropy(logits, targets, z_loss, label_smoothing))

    if chunk_size is None or chunk_size >= length:
        return chunk_losses(hidden, targets)

    chunks = -(-length // chunk_size)
    chunk_size = -(-length // chunks)  # alike, so that little is padded
    padding = chunks * chunk_size - length

    def split(x: Array) -> Array:  # [B, T, ...] -> [chunks, B, C, ...]
        padded = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(batch, chunks, chunk_size, *x.shape[2:]).swapaxes(0, 1)

    losses = lax.map(lambda chunk: jax.checkpoint(chunk_losses)(*chunk), (split(hidden), split(targets)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :length], losses)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cross_entropy(logits: Array, targets: Array, z_loss: float, label_smoothing: float) -> tuple[Array, Array, Array]:
    """logits float32 [..., V], targets int [...] -> (loss with z-loss, z-loss, correct), each [...].

    The gradient of the loss is softmax * (1 + 2 z log Z) - target distribution: written out, one pass over the logits
    instead of the four that automatic differentiation makes. The other outputs have none.
    """
    return _cross_entropy_forward(logits, targets, z_loss, label_smoothing)[0]


def _smoothing(classes: int, label_smoothing: float) -> tuple[float, float, float]:
    """(probability of the target, of any other class, entropy of that distribution)."""
    high = 1.0 - label_smoothing
    low = label_smoothing / (classes - 1)
    entropy = -(high * np.log(high) + (classes - 1) * low * np.log(low + 1e-20))
    return high, low, float(entropy)


def _cross_entropy_forward(
    logits: Array, targets: Array, z_loss: float, label_smoothing: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    high, low, entropy = _smoothing(logits.shape[-1], label_smoothing)
    largest = logits.max(axis=-1)
    log_z = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - (high - low) * at_target - entropy
    if label_smoothing:
        loss -= low * jnp.sum(logits, axis=-1)
    z = z_loss * lax.square(log_z)
    correct = at_target >= largest  # argmax costs as much as all the rest on a CPU
    return (loss + z, z, correct), (logits, targets, log_z)


def _cross_entropy_backward(
    z_loss: float, label_smoothing: float, kept: tuple[Array, Array, Array], cotangents: tuple[Array, Array, Array]
) -> tuple[Array, None]:
    logits, targets, log_z = kept
    high, low, _ = _smoothing(logits.shape[-1], label_smoothing)
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    softmax = jnp.exp(logits - log_z[..., None])
    gradient = softmax * (1 + 2 * z_loss * log_z[..., None]) - jnp.where(is_target, high, low)
    return gradient * cotangents[0][..., None], None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


class LossNormalizer(NamedTuple):
    """The batch's loss is sum(token loss * weights) / denominator."""

    weights: Array  # float32 [B, T]
    denominator: Array  # float32 scalar


def loss_normalizer(factor: float | str | None, batch: Mapping[str, Array]) -> LossNormalizer:
    """t5x's `loss_normalizing_factor`.

    Call it on the whole batch, before it is split for accumulation: then the parts' sums add up to the batch's loss.

    Args:
        factor: None: a plain sum. A number: divide by it. "NUM_REAL_TARGET_TOKENS": by the sum of the loss weights.
            "NUM_TOTAL_TARGET_TOKENS": by B*T, padding too. "AVERAGE_PER_SEQUENCE": the mean over sequences (segments,
            where the batch is packed) of each one's weighted mean.
        batch: `decoder_target_tokens` [B, T]; `decoder_loss_weights` [B, T] (absent: 1 where the target is not
            padding); `decoder_segment_ids` [B, T] where packed.

    Raises:
        UserError: an unknown name.
    """
    targets = batch["decoder_target_tokens"]
    weights = jnp.asarray(batch.get("decoder_loss_weights", targets > 0), jnp.float32)
    if factor is None:
        return LossNormalizer(weights, jnp.float32(1))
    if not isinstance(factor, str):
        return LossNormalizer(weights, jnp.float32(factor))
    name = factor.upper()
    if name == "NUM_REAL_TARGET_TOKENS":
        return LossNormalizer(weights, weights.sum())
    if name == "NUM_TOTAL_TARGET_TOKENS":
        return LossNormalizer(weights, jnp.float32(targets.size))
    if name == "AVERAGE_PER_SEQUENCE":
        segments = batch.get("decoder_segment_ids", jnp.ones_like(targets))
        sums = jax.vmap(partial(jax.ops.segment_sum, num_segments=targets.shape[1] + 1))(weights, segments)
        of_segment = jnp.take_along_axis(sums, segments, axis=1)
        weights = jnp.where((segments > 0) & (of_segment > 0), weights / jnp.maximum(of_segment, 1e-30), 0)
        return LossNormalizer(weights, weights.sum())
    raise UserError(f"loss_normalizing_factor {factor!r} is unknown; {nearest(name, SPECIAL_FACTORS)}")
