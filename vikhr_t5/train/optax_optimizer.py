"""optax's transformations as an optimizer of ours.

Our parameters are stacks of layers, so only what treats each number of a tensor alone gives the updates that it gives
on single layers: adam, lion, sgd, clip and the like do, LAMB or Adafactor (whose trust ratios and factors are per
tensor) do not. Who builds the transformation sees to that; see `t5x_dialect.TABLE["optax"]`.
"""

import dataclasses
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptaxOptimizer:
    """`transformation` with its own learning rate, as in t5x's `OptaxWrapper`: the trainer's is reported, not used."""

    transformation: optax.GradientTransformation

    def init(self, params: Any) -> Any:
        return self.transformation.init(params)

    def update(self, grads: Any, state: Any, params: Any, learning_rate: jax.Array) -> tuple[Any, Any]:
        return self.transformation.update(grads, state, params)

    def state_axes(self, params: Any, axes: Any) -> Any:
        """Of an array that stands for a parameter, the parameter's axes; () for counters."""
        state = jax.eval_shape(self.transformation.init, params)
        return optax.tree_map_params(
            self.transformation, lambda _, names: names, state, axes, transform_non_params=lambda _: ()
        )
