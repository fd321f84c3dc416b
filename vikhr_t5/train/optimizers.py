"""Adafactor as in t5x, and what gin files name as `optimizers.…`. States mirror the parameter tree.

An optimizer is written for one tensor and mapped over the parameters. A parameter below a `layers` node is a stack of
per-layer tensors (axis 0), and everything that is "per tensor" in an update rule - clipping by the update's RMS,
scaling by the parameter's RMS, factoring - is vmapped over that axis, so stacking layers changes no update.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from vikhr_t5.train.adamw import AdamW
from vikhr_t5.train.schedules import cosine, create_learning_rate_scheduler, warmup_stable_decay
from vikhr_t5.train.tensors import Axes, Tree, is_stacked, map_tensors, rms

__all__ = [
    "Adafactor",
    "AdamW",
    "OptimizerDef",
    "clip_by_global_norm",
    "cosine",
    "create_learning_rate_scheduler",
    "warmup_stable_decay",
]


class OptimizerDef(Protocol):
    """What the step needs of an optimizer. The learning rate comes from outside, so that the step can report it."""

    def init(self, params: Tree) -> Any:
        """Zero state for `params`."""

    def update(self, grads: Tree, state: Any, params: Tree, learning_rate: jax.Array) -> tuple[Tree, Any]:
        """(what to add to the parameters, next state)."""

    def state_axes(self, params: Tree, axes: Axes) -> Any:
        """Logical axes of every array of the state, given those of the parameters (arrays or their shapes)."""


class AdafactorState(NamedTuple):
    """updates: how many were done, int32; a fresh state begins at step_offset. moments: per parameter {"v"} or,
    factored, {"v_row", "v_col"}, and with momentum {"m"}."""

    updates: jax.Array
    moments: Tree


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer & Stern, 1804.04235) with t5x's defaults and argument names.

    With t the number of this update counted from 1, beta = 1 - (t - step_offset)^-decay_rate:
      v <- beta v + (1 - beta) (g^2 + epsilon1), kept as row and column means where the tensor's two largest
      dimensions are both >= min_dim_size_to_factor; u = g / sqrt(v); u <- u / max(1, RMS(u) / clipping_threshold);
      p <- p - learning_rate * max(RMS(p), epsilon2) * u (without the RMS if not multiply_by_parameter_scale).

    Args:
      beta1: momentum: what is subtracted is m <- beta1 m + (1 - beta1) (the step above).
      weight_decay_rate: p is also multiplied by 1 - weight_decay_rate, whatever the learning rate.
      weight_decay_rate_lr_exponent: multiply that rate (1 where it is None) by learning_rate to this power.
      global_norm_clip_threshold: gradients are first scaled to this global norm where theirs is larger.
      max_parameter_scale: the upper limit of RMS(p) above.
      factor_layer_kernels: a layer's kernels are factored whatever their size, as those of t5x's scanned models.
    """

    decay_rate: float = 0.8
    step_offset: int = 0
    clipping_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool = True
    factored: bool = True
    min_dim_size_to_factor: int = 128
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3
    beta1: float | None = None
    weight_decay_rate: float | None = None
    weight_decay_rate_lr_exponent: float | None = None
    global_norm_clip_threshold: float | None = None
    max_parameter_scale: float | None = None
    factor_layer_kernels: bool = False

    def init(self, params: Tree) -> AdafactorState:
        return AdafactorState(jnp.full((), self.step_offset, jnp.int32), map_tensors(self._init_tensor, params))

    def update(
        self, grads: Tree, state: AdafactorState, params: Tree, learning_rate: jax.Array
    ) -> tuple[Tree, AdafactorState]:
        if self.global_norm_clip_threshold:
            grads = clip_by_global_norm(grads, optax.global_norm(grads), self.global_norm_clip_threshold)
        count = state.updates + 1
        beta = 1.0 - (count - self.step_offset).astype(jnp.float32) ** -self.decay_rate

        def tensor(
            path: tuple, p: jax.Array, g: jax.Array, moments: dict[str, jax.Array]
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            return self._update_tensor(path, p, g, moments, beta, learning_rate)

        pairs = map_tensors(tensor, params, grads, state.moments)
        updates, moments = (jax.tree.map(lambda _, pair, i=i: pair[i], params, pairs) for i in (0, 1))
        return updates, AdafactorState(count, moments)

    def state_axes(self, params: Tree, axes: Axes) -> AdafactorState:
        def tensor(path: tuple, p: Any, names: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
            stacked = is_stacked(path)
            momentum = {} if self.beta1 is None else {"m": names}
            dims = self._factored_dims(p.shape[stacked:], path)
            if dims is None:
                return {"v": names, **momentum}
            row, column = (dim + stacked for dim in dims)
            factors = {"v_row": names[:column] + names[column + 1 :], "v_col": names[:row] + names[row + 1 :]}
            return {**factors, **momentum}

        return AdafactorState((), jax.tree_util.tree_map_with_path(tensor, params, axes))  # type: ignore[arg-type]

    def _factored_dims(self, shape: tuple[int, ...], path: tuple) -> tuple[int, int] | None:
        """(row, column): the second largest and the largest dimension; None where v is kept whole."""
        order = sorted(range(len(shape)), key=lambda dim: shape[dim])
        any_size = self.factor_layer_kernels and is_stacked(path) and path[-1].key == "kernel"
        if not self.factored or len(shape) < 2 or (shape[order[-2]] < self.min_dim_size_to_factor and not any_size):
            return None
        return order[-2], order[-1]

    def _init_tensor(self, path: tuple, p: jax.Array) -> dict[str, jax.Array]:
        dims = self._factored_dims(p.shape, path)
        zeros = jnp.zeros(p.shape, jnp.float32)
        momentum = {} if self.beta1 is None else {"m": zeros}
        if dims is None:
            return {"v": zeros, **momentum}
        row, column = dims
        return {"v_row": zeros.mean(column), "v_col": zeros.mean(row), **momentum}

    def _update_tensor(
        self,
        path: tuple,
        p: jax.Array,
        g: jax.Array,
        moments: dict[str, jax.Array],
        beta: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        g = g.astype(jnp.float32)
        square = jnp.square(g) + self.epsilon1
        dims = self._factored_dims(p.shape, path)
        previous = moments.get("m")
        if dims is None:
            v = beta * moments["v"] + (1 - beta) * square
            update, moments = g * jax.lax.rsqrt(v), {"v": v}
        else:
            row, column = dims
            v_row = beta * moments["v_row"] + (1 - beta) * square.mean(column)
            v_col = beta * moments["v_col"] + (1 - beta) * square.mean(row)
            kept_row = row - (column < row)  # where `row` stands in v_row, which has lost `column`
            row_factor = jax.lax.rsqrt(v_row / v_row.mean(kept_row, keepdims=True))
            update = g * jnp.expand_dims(row_factor, column) * jnp.expand_dims(jax.lax.rsqrt(v_col), row)
            moments = {"v_row": v_row, "v_col": v_col}
        if self.clipping_threshold is not None:
            update = update / jnp.maximum(1.0, rms(update) / self.clipping_threshold)
        scale = jnp.maximum(rms(p), self.epsilon2) if self.multiply_by_parameter_scale else 1.0
        if self.multiply_by_parameter_scale and self.max_parameter_scale is not None:
            scale = jnp.minimum(scale, self.max_parameter_scale)
        step = learning_rate * scale * update
        if self.beta1 is not None and previous is not None:
            step = self.beta1 * previous + (1 - self.beta1) * step
            moments["m"] = step
        if (decay := self._decay(learning_rate)) is not None:
            step = step + decay * p.astype(jnp.float32)
        return -step, moments

    def _decay(self, learning_rate: jax.Array) -> jax.Array | float | None:
        if not self.weight_decay_rate_lr_exponent:
            return self.weight_decay_rate
        return (self.weight_decay_rate or 1.0) * learning_rate**self.weight_decay_rate_lr_exponent


def clip_by_global_norm(grads: Tree, norm: jax.Array, max_norm: float) -> Tree:
    """`grads` scaled so that their global norm, which the caller has as `norm`, is at most `max_norm`."""
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return jax.tree.map(lambda g: g * scale, grads)
