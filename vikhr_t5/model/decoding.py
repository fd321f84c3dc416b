"""Generation over an explicit cache of keys and values.

B batch, T longest output, S source length, H heads, K head dim, D model, V vocabulary, L layers.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vikhr_t5.model import network, ops
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.network import Params


class Cache(NamedTuple):
    """What the decoder remembers, in `config.dtype`; the encoder's part is fixed, the rest is filled step by step."""

    encoder_mask: Array  # bool [B, S]
    encoder_keys: Array  # [L, B, H, S, K]
    encoder_values: Array
    keys: Array  # [L, B, H, T, K]
    values: Array


def start(params: Params, config: T5Config, encoder_input_tokens: Array, max_length: int) -> Cache:
    """Runs the encoder on int [B, S] and each decoder layer's projection of its output."""
    encoded = network.encode(params, config, encoder_input_tokens)

    def project(_: None, block: Params) -> tuple[None, list[Array]]:
        return None, [network.project(block, config, encoded, name).swapaxes(1, 2) for name in ("key", "value")]

    keys, values = lax.scan(project, None, params["decoder"]["layers"]["encoder_decoder_attention"])[1]
    shape = (config.num_decoder_layers, encoded.shape[0], config.num_heads, max_length, config.head_dim)
    empty = jnp.zeros(shape, config.dtype)
    return Cache(encoder_input_tokens > 0, keys, values, empty, empty)


def attend(query: Array, keys: Array, values: Array, mask: Array, bias: Array | float, float32_logits: bool) -> Array:
    """`ops.attention` of one query per row: [B, 1, H, K], twice [B, H, S, K], [B, S], bias [H, S] -> [B, 1, H*K].

    Heads stand before the length in what is cached, so that a step transposes nothing.
    """
    logits = jnp.einsum("bthk,bhsk->bhs", query, keys, preferred_element_type=jnp.float32) + bias
    logits = logits if float32_logits else logits.astype(query.dtype).astype(jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, :], logits, ops.MASKED)).astype(values.dtype)
    attended = jnp.einsum("bhs,bhsk->bhk", weights, values, preferred_element_type=jnp.float32)
    return attended.astype(query.dtype).reshape(query.shape[0], 1, -1)


def step(params: Params, config: T5Config, cache: Cache, tokens: Array, position: Array) -> tuple[Array, Cache]:
    """One step of the decoder.

    Args:
        tokens: int [B], the decoder's input at `position` (0 at the first).
        position: int scalar, counted from 0.

    Returns:
        Logits [B, V] float32 of the next token, and the cache with this position filled.
    """
    stack = params["decoder"]
    batch, _, max_length, _ = cache.keys.shape[1:]
    places = jnp.arange(max_length)
    seen = jnp.broadcast_to(places <= position, (batch, max_length))
    buckets = jnp.asarray(ops.relative_position_buckets(-np.arange(max_length), bidirectional=False))
    buckets = buckets[jnp.maximum(position - places, 0)]

    def layer(carry: tuple[Array, Array, Array], scanned: tuple[Params, Array, Array, Array]) -> tuple[tuple, None]:
        x, keys, values = carry
        p, index, encoder_keys, encoder_values = scanned
        bias = (p if config.relative_bias_per_layer else stack)["relpos_bias"]["rel_embedding"][:, buckets]

        def attend_self(block: Params, y: Array) -> Array:
            nonlocal keys, values
            query, key, value = (network.project(block, config, y, name) for name in ("query", "key", "value"))
            place = (index, 0, 0, position, 0)
            keys = lax.dynamic_update_slice(keys, key.swapaxes(1, 2)[None], place)
            values = lax.dynamic_update_slice(values, value.swapaxes(1, 2)[None], place)
            return output(block, query, keys[index], values[index], seen, bias)

        def attend_encoded(block: Params, y: Array) -> Array:
            query = network.project(block, config, y, "query")
            return output(block, query, encoder_keys, encoder_values, cache.encoder_mask, 0.0)

        def output(block: Params, q: Array, k: Array, v: Array, mask: Array, bias: Array | float) -> Array:
            attended = attend(q, k, v, mask, bias, config.float32_attention_logits)
            return ops.dense(attended, block["out"]["kernel"])

        x = network.decoder_layer(p, config, x, attend_self, attend_encoded, network.Dropout(0.0, None))
        return (x, keys, values), None

    x = network.embed(params, config, tokens[:, None], network.Dropout(0.0, None))
    layers = (stack["layers"], jnp.arange(config.num_decoder_layers), cache.encoder_keys, cache.encoder_values)
    (x, keys, values), _ = lax.scan(layer, (x, cache.keys, cache.values), layers)
    x = ops.rms_norm(x[:, 0], stack["decoder_norm"]["scale"])
    kernel, scale = network.head(params, config)
    return ops.dense(x * scale, kernel, jnp.float32), cache._replace(keys=keys, values=values)


@partial(jax.jit, static_argnames=("config", "max_length", "eos_id", "vocab_size"))
def greedy(
    params: Params,
    config: T5Config,
    encoder_input_tokens: Array,
    max_length: int,
    *,
    eos_id: int = 1,
    vocab_size: int | None = None,
) -> Array:
    """The likeliest token at each step.

    Args:
        encoder_input_tokens: int [B, S], 0 is padding.
        max_length: longest output.
        eos_id: ends a row; what follows is 0.
        vocab_size: the real vocabulary; ids from here on are padding of the embedding and are never produced.

    Returns:
        int32 [B, max_length], EOS included where it was produced.
    """
    params = _cast_kernels(params, config)
    batch = encoder_input_tokens.shape[0]
    allowed = jnp.arange(config.known_vocab_size()) < (vocab_size or config.known_vocab_size())

    def unfinished(state: tuple) -> Array:
        position, _, done, _ = state
        return (position < max_length) & ~done.all()

    def advance(state: tuple) -> tuple:
        position, output, done, cache = state
        previous = jnp.where(position > 0, output[:, position - 1], 0)
        logits, cache = step(params, config, cache, previous, position)
        token = jnp.where(done, 0, jnp.where(allowed, logits, -jnp.inf).argmax(-1)).astype(jnp.int32)
        return position + 1, output.at[:, position].set(token), done | (token == eos_id), cache

    first = (0, jnp.zeros((batch, max_length), jnp.int32), jnp.zeros(batch, bool))
    return lax.while_loop(unfinished, advance, (*first, start(params, config, encoder_input_tokens, max_length)))[1]


def _cast_kernels(params: Params, config: T5Config) -> Params:
    """Matmul operands in the compute type once, rather than at each step."""

    def cast(path: tuple, leaf: Array) -> Array:
        return leaf.astype(config.dtype) if path[-1].key in ("kernel", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
