"""T5's encoder and decoder over a tree of parameters whose layers are stacked and scanned.

B batch, T target length, S source length, H heads, K head dim, D model, F feed-forward, V vocabulary, L layers.

The parameters are declared in `parameters.py`. `encode`, `decode` and `head` are functions of (params, config, ...);
`Transformer` is their Flax Linen shell.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from vikhr_t5.model import ops
from vikhr_t5.model.attention import Attention, attention_between
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.parameters import abstract_params, declare, init, initialise, logical_axes, mlp_inputs
from vikhr_t5.model.remat import LAYER_INPUT, remat
from vikhr_t5.model.sharding import constrain

__all__ = ["T5Config", "Transformer", "abstract_params", "decode", "encode", "head", "init", "logical_axes"]

Params = Mapping[str, Any]


class Dropout:
    """The dropout of one layer or stack: a rate, and a stream of keys (None: dropout is off)."""

    def __init__(self, rate: float, key: Array | None):
        self.rate = rate
        self._key, self._sites = key, 0

    def next_key(self) -> Array | None:
        self._sites += 1
        return None if self._key is None or self.rate == 0 else jax.random.fold_in(self._key, self._sites)

    def __call__(self, x: Array, broadcast_axis: int | None = -2) -> Array:
        return ops.dropout(x, self.rate, self.next_key(), broadcast_axis)


def project(params: Params, config: T5Config, x: Array, name: str) -> Array:
    """x [B, T, D] -> [B, T, H, K], by the kernel of "query", "key" or "value"."""
    projected = ops.dense(x, params[name]["kernel"])
    heads = projected.reshape(*x.shape[:-1], config.num_heads, config.head_dim)
    return constrain(heads, "batch", None, "joined_kv", None)


def _attention_block(
    params: Params,
    config: T5Config,
    x: Array,
    memory: Array,
    attend: Attention,
    bias: Array | None,
    drop: Dropout,
) -> Array:
    """Attention of x [B, T, D] to memory [B, S, D], which is x in self-attention -> [B, T, D]."""
    query = project(params, config, x, "query")
    key = project(params, config, memory, "key")
    # Dropout of the weights with one draw for all queries, as in t5x, is dropout of whole keys: of rows of value.
    value = drop(project(params, config, memory, "value"), broadcast_axis=-1)
    attended = attend(query, key, value, bias)
    return ops.dense(attended, params["out"]["kernel"])


def _mlp_block(params: Params, config: T5Config, x: Array, drop: Dropout) -> Array:
    """The feed-forward block, x [B, T, D] -> [B, T, D]."""
    hidden = [constrain(ops.dense(x, params[name]["kernel"]), "batch", None, "mlp") for name in mlp_inputs(config)]
    return ops.dense(drop(ops.gated_activation(hidden, config.mlp_activations)), params["wo"]["kernel"])


def decoder_layer(
    params: Params,
    config: T5Config,
    x: Array,
    attend_self: Callable[[Params, Array], Array],
    attend_encoded: Callable[[Params, Array], Array],
    drop: Dropout,
) -> Array:
    """One decoder layer, x [B, T, D] -> [B, T, D].

    The two attention blocks, (their parameters, normalised x) -> [B, T, D], are the caller's: over whole sequences
    in training, over a cache in decoding.
    """
    y = ops.rms_norm(x, params["pre_self_attention_layer_norm"]["scale"])
    x += drop(attend_self(params["self_attention"], y))
    y = ops.rms_norm(x, params["pre_cross_attention_layer_norm"]["scale"])
    x += drop(attend_encoded(params["encoder_decoder_attention"], y))
    y = ops.rms_norm(x, params["pre_mlp_layer_norm"]["scale"])
    return x + drop(_mlp_block(params["mlp"], config, y, drop))


def _scan_layers(
    layer: Callable[[Params, Array, Dropout], Array], config: T5Config, params: Params, x: Array, key: Array | None
) -> Array:
    """x through all layers; `layer(params of one layer, x, dropout) -> x`."""
    depth = jax.tree.leaves(params)[0].shape[0]
    keys = None if key is None else jax.random.split(key, depth)

    def body(carry: Array, scanned: tuple[Params, Array | None]) -> tuple[Array, None]:
        carry = checkpoint_name(carry, LAYER_INPUT)
        return _between_layers(layer(scanned[0], carry, Dropout(config.dropout_rate, scanned[1]))), None

    return lax.scan(remat(body, config.remat_policy), x, (params, keys))[0]


def _stack_bias(params: Params, config: T5Config, attend: Attention) -> Callable[[Params], Array]:
    """layer parameters -> the relative-position bias of that layer: its own, or the stack's, computed once."""
    if config.relative_bias_per_layer:
        return lambda layer: attend.bias(layer["relpos_bias"]["rel_embedding"].astype(jnp.float32))
    bias = attend.bias(params["relpos_bias"]["rel_embedding"].astype(jnp.float32))
    return lambda layer: bias


def embed(params: Params, config: T5Config, tokens: Array, drop: Dropout) -> Array:
    """int [B, T] -> [B, T, D] in `config.dtype`. A token outside of the embedding gives NaN, not another row."""
    table = params["token_embedder"]["embedding"].astype(jnp.float32)  # so its gradient adds up in float32
    return _between_layers(drop(jnp.take(table, tokens, axis=0).astype(config.dtype)))


def _between_layers(x: Array) -> Array:
    """The residual stream x [B, T, D], split by rows and by length: sequence parallelism.

    Korthikanti et al. 2022 (arXiv:2205.05198). Inside a layer rows are split, and heads or features over tensor.
    """
    return constrain(x, "batch", "length", None)


def encode(
    params: Params,
    config: T5Config,
    encoder_input_tokens: Array,
    encoder_segment_ids: Array | None = None,
    *,
    dropout_key: Array | None = None,
) -> Array:
    """encoder_input_tokens int [B, S] -> [B, S, D] in `config.dtype`. A dropout_key of None: no dropout."""
    stack = params["encoder"]
    segments = ops.segments_of(encoder_input_tokens, encoder_segment_ids)
    attend = attention_between(config, segments, segments)
    bias = _stack_bias(stack, config, attend)

    def layer(p: Params, x: Array, drop: Dropout) -> Array:
        y = ops.rms_norm(x, p["pre_attention_layer_norm"]["scale"])
        x += drop(_attention_block(p["attention"], config, y, y, attend, bias(p), drop))
        y = ops.rms_norm(x, p["pre_mlp_layer_norm"]["scale"])
        return x + drop(_mlp_block(p["mlp"], config, y, drop))

    drop = Dropout(config.dropout_rate, dropout_key)
    x = embed(params, config, encoder_input_tokens, drop)
    x = _scan_layers(layer, config, stack["layers"], x, drop.next_key())
    return drop(ops.rms_norm(x, stack["encoder_norm"]["scale"]), broadcast_axis=None)  # t5x draws here per position


def decode(
    params: Params,
    config: T5Config,
    encoded: Array,
    encoder_input_tokens: Array,
    decoder_input_tokens: Array,
    decoder_target_tokens: Array,
    encoder_segment_ids: Array | None = None,
    decoder_segment_ids: Array | None = None,
    *,
    dropout_key: Array | None = None,
) -> Array:
    """Teacher-forced decoder: hidden states [B, T, D] before the output layer.

    As in t5x padding is read from the targets: the input at the first position is 0 and is no padding.
    """
    if (encoder_segment_ids is None) != (decoder_segment_ids is None):
        raise ValueError("give encoder_segment_ids and decoder_segment_ids together, or neither")
    stack = params["decoder"]
    segments = ops.segments_of(decoder_target_tokens, decoder_segment_ids)
    attend = attention_between(config, segments, segments, causal=True)
    encoded_segments = ops.segments_of(encoder_input_tokens, encoder_segment_ids)
    attend_across = attention_between(config, segments, encoded_segments)
    bias = _stack_bias(stack, config, attend)

    def layer(p: Params, x: Array, drop: Dropout) -> Array:
        def attend_self(block: Params, y: Array) -> Array:
            return _attention_block(block, config, y, y, attend, bias(p), drop)

        def attend_encoded(block: Params, y: Array) -> Array:
            return _attention_block(block, config, y, encoded, attend_across, None, drop)

        return decoder_layer(p, config, x, attend_self, attend_encoded, drop)

    drop = Dropout(config.dropout_rate, dropout_key)
    x = embed(params, config, decoder_input_tokens, drop)
    x = _scan_layers(layer, config, stack["layers"], x, drop.next_key())
    return drop(ops.rms_norm(x, stack["decoder_norm"]["scale"]))


def head(params: Params, config: T5Config) -> tuple[Array, float]:
    """The output layer as (kernel [D, V], scale): logits = (hidden * scale) @ kernel. Tied: embedding.T, 1/sqrt(D)."""
    if config.logits_via_embedding:
        return params["token_embedder"]["embedding"].T, config.emb_dim**-0.5
    return params["decoder"]["logits_dense"]["kernel"], 1.0


class Transformer(nn.Module):
    """The encoder-decoder as a Linen module with one collection, `params`.

    Attributes:
        config: the model's shape.
    """

    config: T5Config

    def setup(self) -> None:
        self.tree = {
            name: self.param(name, lambda key, subtree=subtree: initialise(subtree, key))
            for name, subtree in declare(self.config).items()
        }

    def _dropout_key(self, enable_dropout: bool) -> Array | None:
        return self.make_rng("dropout") if enable_dropout and self.config.dropout_rate > 0 else None

    def encode(
        self, encoder_input_tokens: Array, encoder_segment_ids: Array | None = None, *, enable_dropout: bool = False
    ) -> Array:
        """int [B, S] -> [B, S, D]."""
        key = self._dropout_key(enable_dropout)
        return encode(self.tree, self.config, encoder_input_tokens, encoder_segment_ids, dropout_key=key)

    def decoder_hidden(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Array:
        """The whole model up to the output layer: [B, S], [B, T], [B, T] -> [B, T, D] in `config.dtype`.

        With `head` this is what a loss needs that never holds [B, T, V]. Dropout needs an rng named "dropout".
        """
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout=enable_dropout)
        return decode(
            self.tree,
            self.config,
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            dropout_key=self._dropout_key(enable_dropout),
        )

    def __call__(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Array:
        """Logits [B, T, V], float32."""
        hidden = self.decoder_hidden(
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            enable_dropout=enable_dropout,
        )
        kernel, scale = head(self.tree, self.config)
        return ops.dense(hidden * scale, kernel, jnp.float32)
