"""One update: loss, gradient, optimizer; all on the device.

B batch, T target length. The loss is a pair (sum, weight) up to the last division, so neither accumulation nor
sharding can change it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from vikhr_t5.errors import UserError, nearest
from vikhr_t5.train.losses import loss_normalizer
from vikhr_t5.train.optimizers import clip_by_global_norm
from vikhr_t5.train.partitioning import Partitioner, on_device
from vikhr_t5.train.rounding import apply_updates
from vikhr_t5.train.schedules import Schedule
from vikhr_t5.train.state import Batch, EncoderDecoderModel, Sums, TrainState

NEVER = 2**31 - 1
ROUNDING = 2**31 - 1  # what the step's key is folded with for the draws of `rounding`; dropout's are split from it
StepFunction = Callable[[TrainState, Sums, Batch, Array], tuple[TrainState, Sums, Array]]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """How one batch becomes one update.

    Args:
      learning_rate_fn: a schedule, step -> rate.
      num_microbatches: parts of the batch that go through the network one after another; their gradients add up.
      max_grad_norm: gradients (of the loss as `loss_normalizing_factor` divides it) are scaled to this global norm
        where theirs is larger; None: never.
      on_non_finite: what an update with a non-finite loss, gradient or rate does: "stop" the run, or "skip" itself.
    """

    learning_rate_fn: Schedule
    num_microbatches: int | None = None
    max_grad_norm: float | None = None
    on_non_finite: str = "stop"

    def __post_init__(self) -> None:
        if (self.num_microbatches or 1) < 1:
            raise UserError(f"Trainer.num_microbatches cannot be {self.num_microbatches}")
        if self.on_non_finite not in ("stop", "skip"):
            raise UserError(
                f"Trainer.on_non_finite {self.on_non_finite!r} ({nearest(self.on_non_finite, ['stop', 'skip'])})"
            )

    def step_function(self, model: EncoderDecoderModel, num_sources: int) -> StepFunction:
        """(state, sums, batch, key) -> (next state, sums with this batch's added, the number of updates done).

        key: the run's dropout key; each step and microbatch folds its number in, so a resume draws the same masks.
        sums: see `zero_sums`; they stay on the device between two lines of metrics.
        """

        def step(state: TrainState, sums: Sums, batch: Batch, key: Array) -> tuple[TrainState, Sums, Array]:
            state = state._replace(opt_state=on_device(state.opt_state))
            weights, denominator = loss_normalizer(model.loss_normalizing_factor, batch)
            key = jax.random.fold_in(key, state.step)
            grads, batch_sums = self._gradients(model, state.params, batch, weights, num_sources, key)
            grads = jax.tree.map(lambda g: g / jnp.maximum(denominator, 1e-30), grads)
            norm = optax.global_norm(grads)
            if self.max_grad_norm is not None:
                grads = clip_by_global_norm(grads, norm, self.max_grad_norm)

            rate = self.learning_rate_fn(state.step)
            updates, opt_state = model.optimizer.update(grads, state.opt_state, state.params, rate)
            params = apply_updates(state.params, updates, jax.random.fold_in(key, ROUNDING))

            # A bad batch leaves everything as it was but the step; whether the run goes on is the loop's decision.
            good = jnp.isfinite(norm) & jnp.isfinite(batch_sums["loss"]) & jnp.isfinite(rate)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(good, new, old), (params, opt_state), (state.params, state.opt_state)
            )
            batch_sums["grad_norm"] = norm
            sums = {
                **{name: sums[name] + jnp.where(good, value, 0) for name, value in batch_sums.items()},
                "learning_rate": rate,
                "steps": sums["steps"] + 1,
                "bad_steps": sums["bad_steps"] + ~good,
                "first_bad_step": jnp.minimum(sums["first_bad_step"], jnp.where(good, NEVER, state.step + 1)),
            }
            return TrainState(state.step + 1, params, opt_state), sums, state.step + 1

        return step

    def jitted(self, model: EncoderDecoderModel, partitioner: Partitioner, num_sources: int) -> Any:
        """`step_function` on the mesh: state and batch divided, sums and key on every device, old state given up."""
        state, everywhere = partitioner.state_shardings(model), partitioner.replicated
        return partitioner.jit(
            self.step_function(model, num_sources),
            in_shardings=(state, everywhere, partitioner.batch, everywhere),
            out_shardings=(state, everywhere, everywhere),
            donate_argnums=(0, 1),
        )

    def traced(
        self, model: EncoderDecoderModel, partitioner: Partitioner, num_sources: int, batch: Mapping[str, Any]
    ) -> Any:
        """`jitted`, traced for shapes, those of `batch` among them: its `lower()`, compiled, is a step."""
        sums, key = jax.eval_shape(lambda: (zero_sums(num_sources), jax.random.key(0)))
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
        return self.jitted(model, partitioner, num_sources).trace(model.abstract_state(), sums, batch, key)

    def _gradients(
        self, model: EncoderDecoderModel, params: Any, batch: Batch, weights: Array, num_sources: int, key: Array
    ) -> tuple[Any, Sums]:
        """Gradient of the objective's sum over the batch, and the batch's sums."""

        def gradients(part: Batch, weights: Array, key: Array) -> tuple[Any, Sums]:
            dropout_key = key if model.config.dropout_rate > 0 else None
            return jax.grad(model.loss_sums, has_aux=True)(params, part, weights, num_sources, dropout_key)

        parts = self.num_microbatches or 1
        if parts == 1:
            return gradients(batch, weights, key)

        def split(x: Array) -> Array:  # [B, ...] -> [parts, B/parts, ...]: strided, so that no row leaves its device
            return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

        def add(total: tuple[Any, Sums], scanned: tuple[Batch, Array, Array]) -> tuple[tuple[Any, Sums], None]:
            return jax.tree.map(jnp.add, total, gradients(*scanned)), None

        scanned = (jax.tree.map(split, dict(batch)), split(weights), jax.random.split(key, parts))
        shapes = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], scanned))
        # The gradients of bfloat16 parameters add up in float32; what is counted stays int32.
        wide = {jnp.dtype(jnp.bfloat16): jnp.float32}
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide.get(x.dtype, x.dtype)), shapes)
        return jax.lax.scan(add, zeros, scanned)[0]


def zero_sums(num_sources: int) -> Sums:
    """What the step adds up. Scalars but for `source_*` [num_sources + 1]: index i + 1 is source i, 0 is padding.

    Per target token, weighted: loss (with z_loss), z_loss, correct, weight; useful tokens: inputs, targets; steps;
    grad_norm (a sum over the good steps); bad_steps and first_bad_step (non-finite; NEVER if none); learning_rate is
    the last.
    """
    scalars = ("loss", "z_loss", "correct", "weight", "grad_norm", "learning_rate")
    return {
        **{name: jnp.zeros((), jnp.float32) for name in scalars},
        **{name: jnp.zeros((), jnp.int32) for name in ("inputs", "targets", "steps", "bad_steps")},
        **{f"source_{name}": jnp.zeros((num_sources + 1,), jnp.float32) for name in ("loss", "correct", "weight")},
        "first_bad_step": jnp.full((), NEVER, jnp.int32),
    }
