"""One training step of T5 v1.1 beside real t5x, on the same machine in the same run.

    python benchmarks/t5x_step_time.py PATH_TO_T5X

PATH_TO_T5X: a checkout of github.com/google-research/t5x. Beside our own dependencies t5x imports `fiddle`,
`cached_property` and `jaxtyping`; and `airio` and `jestimator`, which are in no index and stand here as empty modules,
since nothing in a step uses them.

Its `models.EncoderDecoderModel` over `examples/t5`, its Adafactor as in base.gin, and its `trainer.train_with_lr`,
under jit with donated state; z-loss and label smoothing 0 on both sides. How the sides take turns: `step_time.py`.
"""

import argparse
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from step_time import GATED, LEARNING_RATE, SIZES, VOCABULARY, Ours, arguments, run, tokens


class T5x:
    """t5x: its trainer's step, compiled."""

    def __init__(self, options: argparse.Namespace, dtype: str, dropout_rate: float):
        sys.path.insert(0, options.t5x)
        for name in ("airio", "airio.core", "jestimator", "jestimator.amos", "jestimator.amos_helper"):
            sys.modules[name] = module = ModuleType(name)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
                module.__getattr__ = lambda attribute: type(attribute, (), {})  # type: ignore[method-assign]
        import jax
        import jax.numpy as jnp
        from t5x import adafactor, models, train_state, trainer
        from t5x.examples.t5 import network

        d, heads, k, f, layers = SIZES[options.size]
        sizes = (VOCABULARY, jnp.dtype(dtype), d, heads, layers, layers, k, f, GATED, dropout_rate)
        config = network.T5Config(*sizes, logits_via_embedding=False)
        optimizer = adafactor.Adafactor(
            decay_rate=0.8, step_offset=0, logical_factor_rules=adafactor.standard_logical_factor_rules()
        )
        vocabulary = MagicMock(vocab_size=VOCABULARY)
        model = models.EncoderDecoderModel(network.Transformer(config), vocabulary, vocabulary, optimizer, z_loss=0.0)
        inputs, targets = map(jnp.asarray, tokens(options))
        self.batch = {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": jnp.ones_like(targets),
        }
        shapes = {name: array.shape for name, array in self.batch.items()}

        def init(key: Any) -> Any:
            variables = model.get_initial_variables(key, shapes)
            return train_state.FlaxOptimTrainState.create(optimizer, variables)

        def step(state: Any, batch: Any, key: Any) -> Any:
            return trainer.train_with_lr(state, batch, LEARNING_RATE, key, model, num_microbatches=None)

        self.jax, self.key = jax, jax.random.key(1)
        self.state = jax.jit(init)(jax.random.key(0))
        self.compiled = jax.jit(step, donate_argnums=0).lower(self.state, self.batch, self.key).compile()

    def step(self) -> float:
        self.key, key = self.jax.random.split(self.key)
        self.state, metrics = self.jax.block_until_ready(self.compiled(self.state, self.batch, key))
        return float(metrics["loss"].total)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("t5x", metavar="PATH_TO_T5X")
    options = parser.parse_args()
    options.optimizer = "adafactor"
    run(options, {"ours": Ours, "theirs": T5x})


if __name__ == "__main__":
    main()
