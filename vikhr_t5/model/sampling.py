"""The next token from logits: the likeliest, or one drawn after temperature, top-k and top-p, in this order.

B rows, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Sampling(NamedTuple):
    """How tokens are drawn.

    Attributes:
        keys: [B], of `jax.random.key`: the draws of a row depend on its key and the position alone.
        temperature: float scalar > 0, divides the logits.
        top_k: int scalar, or None: the k likeliest are left, and what equals the last of them.
        top_p: float scalar, or None: then the likeliest whose probabilities reach p together (the nucleus of Holtzman
            et al. 2020, arXiv:1904.09751).
    """

    keys: Array
    temperature: Array | float = 1.0
    top_k: Array | int | None = None
    top_p: Array | float | None = None


def choose(logits: Array, allowed: Array, sampling: Sampling | None, position: Array) -> tuple[Array, Array]:
    """Tokens int32 [B] for logits [B, V], and their log-probabilities [B] by the logits as they are.

    Args:
        allowed: bool [V], what may be chosen.
        sampling: None: the likeliest.
        position: int scalar, the place in the answer.
    """
    candidates = jnp.where(allowed, logits, -jnp.inf)
    if sampling is not None:
        candidates = truncate(candidates / sampling.temperature, sampling.top_k, sampling.top_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(sampling.keys, position)
        candidates += jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    token = candidates.argmax(-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def truncate(logits: Array, top_k: Array | int | None, top_p: Array | float | None) -> Array:
    """-inf in place of all logits [B, V] but those that top-k, then top-p leave; see `Sampling`."""
    if top_k is not None:
        enough = jnp.minimum(top_k, logits.shape[-1])
        floor = _largest(lambda value: (logits >= value).sum(-1, keepdims=True) >= enough, logits)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    if top_p is not None:
        probabilities = jax.nn.softmax(logits)
        floor = _largest(
            lambda value: jnp.where(logits < value, probabilities, 0).sum(-1, keepdims=True) <= 1 - top_p, logits
        )
        floor = jnp.minimum(floor, logits.max(-1, keepdims=True))
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def _largest(holds: Callable[[Array], Array], like: Array) -> Array:
    """The largest float32 [B, 1] for which `holds` (true of the smallest, false from some value on).

    Bisection over the bits of a float, whose order as whole numbers is that of the floats. It costs 32 passes over the
    vocabulary where sorting, on a CPU, costs ten times as much.
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        good = holds(_float(middle))
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    shape = (*like.shape[:-1], 1)
    lowest, highest = (jnp.full(shape, _order(jnp.float32(bound))) for bound in (-jnp.inf, jnp.inf))
    return _float(lax.fori_loop(0, 32, halve, (lowest, highest))[0])


def _order(value: Array) -> Array:
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _float(order: Array) -> Array:
    return lax.bitcast_convert_type(jnp.where(order < 0, order ^ 0x7FFFFFFF, order), jnp.float32)
