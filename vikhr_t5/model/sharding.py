"""How activations lie on a mesh, said at the few places from which XLA can derive the rest."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
from jax import Array, lax
from jax.sharding import PartitionSpec


def partition_spec(shape: Sequence[int], names: Sequence[str | None]) -> PartitionSpec | None:
    """Where an array lies by the rules of its logical axes; an axis that the mesh does not divide stays whole.

    None outside of a mesh and `flax.linen.logical_axis_rules`.

    Args:
        names: a logical axis of each dimension, or None for "whole".
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    if mesh.size <= 1 or not rules:
        return None

    def over(name: str | None, size: int) -> tuple[str, ...] | None:
        axes = rules.get(name or "") or ()
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        return axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None

    return PartitionSpec(*map(over, names, shape))


def constrain(x: Array, *names: str | None) -> Array:
    """x, split as `partition_spec` says.

    Where parameters are split too (fsdp), XLA may else gather all rows onto each device rather than the parameters.
    """
    spec = partition_spec(x.shape, names)
    return x if spec is None else lax.with_sharding_constraint(x, spec)
