"""Arrays of float32 in 8 bits each: block-wise dynamic quantization (Dettmers et al. 2022, arXiv:2110.02861).

A block is a run along the last axis. Its scale is its largest absolute value; a number divided by the scale becomes
the nearest of 256 values, which stand closer the smaller they are. Codes have the array's shape and scales its shape
with blocks for the last axis, so both are split over a mesh as the array is.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256


class Quantized(NamedTuple):
    """codes: uint8 [..., N]. scales: float32 [..., N / block]."""

    codes: Array
    scales: Array


def block_size(length: int) -> int | None:
    """Numbers in a block of an axis of this length; None where it has no fit divisor.

    The number of blocks is divisible by as many twos as leaves 32 numbers in each, so a mesh axis that divides the
    axis divides its blocks too.
    """
    blocks = 1
    while length % (2 * blocks) == 0 and length // (2 * blocks) >= 32:
        blocks *= 2
    longest = length // blocks
    block = max(n for n in range(1, min(longest, LARGEST_BLOCK) + 1) if longest % n == 0)
    return block if block >= SMALLEST_BLOCK else None


def values(signed: bool) -> np.ndarray:
    """The 256 values in [-1, 1] or [0, 1], ascending, float32.

    Each of seven decades below 1 has twice as many as the one below it: the middles of equal parts of it. 0 and 1 come
    on top. Where there is no sign to keep, a decade has twice as many.
    """
    decades = []
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        decades.append(10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = np.concatenate(decades)
    negative = -positive if signed else positive[:0]
    return np.sort(np.concatenate([negative, [0.0, 1.0], positive])).astype(np.float32)


def quantize(x: Array, signed: bool) -> Quantized:
    """x float32 [..., N], none negative where not signed.

    Unsigned, only 0 becomes 0: a second moment that vanished would make its next step as many times too large.
    """
    block = block_size(x.shape[-1])
    assert block is not None, x.shape
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scales = jnp.abs(blocks).max(axis=-1)
    relative = blocks / jnp.where(scales > 0, scales, 1)[..., None]
    table = values(signed)
    middles = (table[1:] + table[:-1]) / 2
    if not signed:
        middles[0] = 0.0
    codes = jnp.searchsorted(middles, relative, method="scan_unrolled")  # how many middles are below
    return Quantized(codes.astype(jnp.uint8).reshape(x.shape), scales)


def dequantize(quantized: Quantized, signed: bool) -> Array:
    """The inverse, as far as there is one: float32 [..., N]."""
    codes, scales = quantized
    relative = jnp.take(values(signed), codes.astype(jnp.int32), mode="clip")
    blocks = relative.reshape(*scales.shape, -1) * scales[..., None]
    return blocks.reshape(codes.shape)
