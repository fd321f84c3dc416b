"""The model as the trainer sees it: network, vocabularies, optimizer and loss; and the state that training changes.

B batch, T target length.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.model import network
from vikhr_t5.model.config import DTYPES
from vikhr_t5.train.losses import CHUNK_SIZE, token_losses
from vikhr_t5.train.optimizers import OptimizerDef

Batch = Mapping[str, Array]
Sums = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that an update changes. step: updates done so far, int32 scalar."""

    step: Array
    params: Any
    opt_state: Any


class EncoderDecoderModel:
    """A T5 and how it is trained. The argument names are t5x's; `loss_chunk_size` and `param_dtype` are ours.

    Args:
      module: the network; a `vocab_size` of None in its configuration becomes the vocabulary's padded size.
      input_vocabulary, output_vocabulary: one vocabulary, since T5 has one embedding.
      optimizer_def: `optimizers.Adafactor` or `optimizers.AdamW`.
      z_loss: coefficient of log(Z)^2.
      label_smoothing: mass spread over the other classes.
      loss_normalizing_factor: None (a sum), a number, or one of t5x's names; see `losses.loss_normalizer`.
      loss_chunk_size: target positions of a row whose logits are held at one time; None: all of them.
      param_dtype: of the parameters and their gradients: "float32", or "bfloat16", rounded at random after each update
        (see `rounding`).

    Raises:
      UserError: two different vocabularies, fewer embedding rows than the vocabulary has ids, or another param_dtype.
    """

    def __init__(
        self,
        module: network.Transformer,
        input_vocabulary: AnyVocabulary,
        output_vocabulary: AnyVocabulary,
        optimizer_def: OptimizerDef,
        z_loss: float = 1e-4,
        label_smoothing: float = 0.0,
        loss_normalizing_factor: float | str | None = None,
        loss_chunk_size: int | None = CHUNK_SIZE,
        param_dtype: str = "float32",
    ):
        if param_dtype not in DTYPES:
            raise UserError(f"EncoderDecoderModel.param_dtype {param_dtype!r} ({nearest(param_dtype, DTYPES)})")
        if input_vocabulary.fingerprint() != output_vocabulary.fingerprint():
            raise UserError(f"two vocabularies for one embedding: {input_vocabulary!r} and {output_vocabulary!r}")
        rows = module.config.vocab_size or output_vocabulary.padded_size
        if rows < output_vocabulary.size:
            raise UserError(
                f"T5Config.vocab_size {rows} is less than the {output_vocabulary.size} ids of {output_vocabulary!r}:"
                " leave it None"
            )
        self.config = dataclasses.replace(module.config, vocab_size=rows)
        self.module = module.clone(config=self.config)
        self.vocabulary = output_vocabulary
        self.optimizer = optimizer_def
        self.z_loss = z_loss
        self.label_smoothing = label_smoothing
        self.loss_normalizing_factor = loss_normalizing_factor
        self.loss_chunk_size = loss_chunk_size
        self.param_dtype = param_dtype

    def init_state(self, key: Array) -> TrainState:
        """Fresh parameters and zero optimizer state at step 0; traceable, so it can be born sharded."""
        params = jax.tree.map(lambda p: p.astype(self.param_dtype), network.init(self.config, key))
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

    def abstract_state(self) -> TrainState:
        """Shapes and types of the state, without memory."""
        return jax.eval_shape(self.init_state, jax.random.key(0))

    def state_axes(self) -> TrainState:
        """Logical axes of every array of the state."""
        params, axes = network.abstract_params(self.config), network.logical_axes(self.config)
        return TrainState((), axes, self.optimizer.state_axes(params, axes))  # type: ignore[arg-type]

    def loss_sums(
        self, params: Any, batch: Batch, weights: Array, num_sources: int, dropout_key: Array | None = None
    ) -> tuple[Array, Sums]:
        """Sums over a batch, to be added to those of other batches and divided once, at the very end.

        Args:
          batch: see the batch contract; `decoder_source_ids` in [0, num_sources], 0 for padding.
          weights: [B, T], of each token's loss in the objective.
          dropout_key: None for evaluation.

        Returns:
          (objective: sum of weights * loss; the sums that metrics are made of, weighted by `decoder_loss_weights`).
        """
        hidden: Any = self.module.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            batch.get("encoder_segment_ids"),
            batch.get("decoder_segment_ids"),
            enable_dropout=dropout_key is not None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            method="decoder_hidden",
        )
        losses = token_losses(
            hidden,
            *network.head(params, self.config),
            batch["decoder_target_tokens"],
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            chunk_size=self.loss_chunk_size,
        )
        counted = batch["decoder_loss_weights"].astype(jnp.float32)
        by_token = {"loss": losses.loss * counted, "correct": losses.correct * counted, "weight": counted}
        by_source = {
            f"source_{name}": jax.ops.segment_sum(
                values.ravel(), batch["decoder_source_ids"].ravel(), num_segments=num_sources + 1
            )
            for name, values in by_token.items()
        }
        sums = {
            **{name: values.sum() for name, values in by_token.items()},
            "z_loss": (losses.z_loss * counted).sum(),
            "inputs": (batch["encoder_input_tokens"] > 0).sum(dtype=jnp.int32),
            "targets": (batch["decoder_target_tokens"] > 0).sum(dtype=jnp.int32),
            **by_source,
        }
        return (losses.loss * weights).sum(), jax.tree.map(jax.lax.stop_gradient, sums)
