"""Numbers kept in bfloat16: rounded up or down at random, so that the mean of the rounding is the number itself.

bfloat16 has 8 significant bits. Rounded to the nearest, x + u is x for every |u| < |x| / 512: a parameter whose
updates are smaller stands still, and a mean that decays by 0.999 does not decay. Rounded at random it moves by a whole
step once in a while, as far on average as float32 does (Gupta et al. 2015, arXiv:1502.02551). Kahan's compensation
would be another way, but keeps the lost bits in a second bfloat16: with it a parameter takes the 4 bytes of a float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def round_stochastically(x: Array, key: Array) -> Array:
    """float32 -> bfloat16: one of the two neighbours of x, with the probabilities whose mean is x. x is finite."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = lax.bitcast_convert_type(x, jnp.uint32) + noise  # the upper half is a bfloat16, the lower what is lost
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def round_tree(tree: Any, key: Array) -> Any:
    """`round_stochastically` of each array of a tree, with draws of its own."""
    leaves, structure = jax.tree.flatten(tree)
    rounded = [round_stochastically(x, jax.random.fold_in(key, number)) for number, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, rounded)


def apply_updates(params: Any, updates: Any, key: Array) -> Any:
    """params + updates (float32), each in the type of the parameter."""
    moved = jax.tree.map(lambda p, update: p.astype(jnp.float32) + update, params, updates)
    if all(p.dtype == jnp.float32 for p in jax.tree.leaves(params)):
        return moved
    rounded = round_tree(moved, key)
    return jax.tree.map(lambda p, exact, low: low if p.dtype == jnp.bfloat16 else exact, params, moved, rounded)
