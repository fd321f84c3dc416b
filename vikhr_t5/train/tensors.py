"""Trees of parameters, seen as the tensors that an update rule speaks of: a stack of layers is one tensor per layer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any  # a nested dict of arrays
Axes = Any  # the same nested dict, with a tuple of logical axis names (or None) for each array


def rms(x: jax.Array) -> jax.Array:
    """Root of the mean square, float32."""
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def is_stacked(path: tuple) -> bool:
    """Whether the array at this path of a tree holds one tensor for each layer, on axis 0."""
    return any(key.key == "layers" for key in path)


def map_tensors(function: Callable, params: Tree, *trees: Tree) -> Tree:
    """function(path, tensor, *what `trees` have there) for each tensor of `params`: of a stack, for each layer."""

    def apply(path: tuple, p: jax.Array, *rest: Any) -> Any:
        one = functools.partial(function, path)
        return (jax.vmap(one) if is_stacked(path) else one)(p, *rest)

    return jax.tree_util.tree_map_with_path(apply, params, *trees)
