"""Generation over an explicit cache of keys and values: greedy and sampled; beam_search.py has the other.

B inputs, N answers of each, T longest answer, S source length, H heads, K head dim, D model, V vocabulary.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vikhr_t5.model import network, ops
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.network import Params
from vikhr_t5.model.sampling import Sampling, choose


class Generated(NamedTuple):
    """Answers. A token's log-probability is the model's own, whatever temperature or truncation it was drawn with."""

    tokens: Array  # int32 [B, N, T]: EOS included where it came, then 0
    log_probabilities: Array  # float32 [B, N, T], 0 after the end


class LayerCache(NamedTuple):
    """What a decoder layer remembers, in `config.dtype`: of the encoder, fixed; of the answer, filled step by step."""

    encoder_keys: Array  # [B, H, S, K]
    encoder_values: Array
    keys: Array  # [B*N, H, T, K]
    values: Array


class Cache(NamedTuple):
    encoder_mask: Array  # bool [B, S]
    layers: tuple[LayerCache, ...]


def prepare(params: Params, config: T5Config) -> Params:
    """Parameters as steps read them, once rather than at each step: matmul operands in the compute type, and the
    decoder's layers apart, so that no step copies a layer out of its stack."""

    def cast(path: tuple, leaf: Array) -> Array:
        return leaf.astype(config.dtype) if path[-1].key in ("kernel", "embedding") else leaf

    params = jax.tree_util.tree_map_with_path(cast, dict(params))
    stacked = params["decoder"]["layers"]
    layers = [jax.tree.map(lambda p, i=i: p[i], stacked) for i in range(config.num_decoder_layers)]
    return {**params, "decoder": {**params["decoder"], "layers": layers}}


def start(params: Params, config: T5Config, encoder_input_tokens: Array, max_length: int, answers: int = 1) -> Cache:
    """Runs the encoder on int [B, S] and each decoder layer's projection of its output. params: from `prepare`."""
    encoded = network.encode(params, config, encoder_input_tokens)
    shape = (encoded.shape[0] * answers, config.num_heads, max_length, config.head_dim)
    empty = jnp.zeros(shape, config.dtype)

    def layer(p: Params) -> LayerCache:
        block = p["encoder_decoder_attention"]
        keys, values = (network.project(block, config, encoded, name).swapaxes(1, 2) for name in ("key", "value"))
        return LayerCache(keys, values, empty, empty)

    return Cache(encoder_input_tokens > 0, tuple(layer(p) for p in params["decoder"]["layers"]))


def attend(query: Array, keys: Array, values: Array, mask: Array, bias: Array | float, float32_logits: bool) -> Array:
    """`ops.attention` of N queries over a cache: [B, N, H, K], twice [B, H, S, K], [B, S], bias [H, S] -> [B, N, H*K].

    Heads stand before the length in what is cached, so that a step transposes nothing.
    """
    logits = jnp.einsum("bnhk,bhsk->bnhs", query, keys, preferred_element_type=jnp.float32) + bias
    logits = logits if float32_logits else logits.astype(query.dtype).astype(jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], logits, ops.MASKED)).astype(values.dtype)
    attended = jnp.einsum("bnhs,bhsk->bnhk", weights, values, preferred_element_type=jnp.float32)
    return attended.astype(query.dtype).reshape(*query.shape[:2], -1)


def step(params: Params, config: T5Config, cache: Cache, tokens: Array, position: Array) -> tuple[Array, Cache]:
    """One step of the decoder.

    Args:
        params: from `prepare`.
        tokens: int [B*N], the decoder's input at `position` (0 at the first).
        position: int scalar, counted from 0.

    Returns:
        Logits [B*N, V] float32 of the next token, and the cache with this position filled.
    """
    stack = params["decoder"]
    rows, inputs, max_length = tokens.shape[0], cache.encoder_mask.shape[0], cache.layers[0].keys.shape[2]
    places = jnp.arange(max_length)
    seen = jnp.broadcast_to(places <= position, (rows, max_length))
    buckets = jnp.asarray(ops.relative_position_buckets(-np.arange(max_length), bidirectional=False))
    buckets = buckets[jnp.maximum(position - places, 0)]
    nothing = network.Dropout(0.0, None)
    filled = []
    x = network.embed(params, config, tokens[:, None], nothing)
    for p, remembered in zip(stack["layers"], cache.layers, strict=True):
        bias = (p if config.relative_bias_per_layer else stack)["relpos_bias"]["rel_embedding"][:, buckets]

        def attend_self(block: Params, y: Array, bias: Array = bias, old: LayerCache = remembered) -> Array:
            query, key, value = (network.project(block, config, y, name) for name in ("query", "key", "value"))
            keys = lax.dynamic_update_slice(old.keys, key.swapaxes(1, 2), (0, 0, position, 0))
            values = lax.dynamic_update_slice(old.values, value.swapaxes(1, 2), (0, 0, position, 0))
            filled.append(old._replace(keys=keys, values=values))
            attended = attend(query, keys, values, seen, bias, config.float32_attention_logits)
            return ops.dense(attended, block["out"]["kernel"])

        def attend_encoded(block: Params, y: Array, old: LayerCache = remembered) -> Array:
            query = network.project(block, config, y, "query").reshape(inputs, -1, config.num_heads, config.head_dim)
            keys, values, mask = old.encoder_keys, old.encoder_values, cache.encoder_mask
            attended = attend(query, keys, values, mask, 0.0, config.float32_attention_logits)
            return ops.dense(attended.reshape(rows, 1, -1), block["out"]["kernel"])

        x = network.decoder_layer(p, config, x, attend_self, attend_encoded, nothing)
    x = ops.rms_norm(x[:, 0], stack["decoder_norm"]["scale"])
    kernel, scale = network.head(params, config)
    return ops.dense(x * scale, kernel, jnp.float32), cache._replace(layers=tuple(filled))


def real_tokens(config: T5Config, vocab_size: int | None) -> Array:
    """bool [V]: what may be produced. Rows of the embedding from `vocab_size` on are padding."""
    rows = config.known_vocab_size()
    return jnp.arange(rows) < (vocab_size or rows)


@partial(jax.jit, static_argnames=("config", "max_length", "answers", "eos_id", "vocab_size"))
def generate(
    params: Params,
    config: T5Config,
    encoder_input_tokens: Array,
    max_length: int,
    sampling: Sampling | None = None,
    *,
    answers: int = 1,
    eos_id: int = 1,
    vocab_size: int | None = None,
) -> Generated:
    """Token by token: the likeliest, or one drawn as `sampling` says.

    Args:
        encoder_input_tokens: int [B, S], 0 is padding; a row of padding alone is answered with padding.
        max_length: longest answer.
        sampling: with a key for each of B*N rows; None: greedy.
        answers: N.
        eos_id: ends an answer.
        vocab_size: the real vocabulary; ids from here on are padding of the embedding and are never produced.
    """
    params = prepare(params, config)
    rows, allowed = encoder_input_tokens.shape[0] * answers, real_tokens(config, vocab_size)

    def unfinished(state: tuple) -> Array:
        position, _, _, done, _ = state
        return (position < max_length) & ~done.all()

    def advance(state: tuple) -> tuple:
        position, tokens, log_probabilities, done, cache = state
        previous = jnp.where(position > 0, tokens[:, position - 1], 0)
        logits, cache = step(params, config, cache, previous, position)
        token, log_probability = choose(logits, allowed, sampling, position)
        tokens = tokens.at[:, position].set(jnp.where(done, 0, token))
        log_probabilities = log_probabilities.at[:, position].set(jnp.where(done, 0.0, log_probability))
        return position + 1, tokens, log_probabilities, done | (token == eos_id), cache

    cache = start(params, config, encoder_input_tokens, max_length, answers)
    done = jnp.repeat(~(encoder_input_tokens > 0).any(-1), answers)
    tokens, log_probabilities = (jnp.zeros((rows, max_length), dtype) for dtype in (jnp.int32, jnp.float32))
    state = lax.while_loop(unfinished, advance, (0, tokens, log_probabilities, done, cache))
    return Generated(*(array.reshape(-1, answers, max_length) for array in state[1:3]))


def greedy(
    params: Params,
    config: T5Config,
    encoder_input_tokens: Array,
    max_length: int,
    *,
    eos_id: int = 1,
    vocab_size: int | None = None,
) -> Array:
    """int32 [B, max_length]: the tokens of `generate` without sampling."""
    found = generate(params, config, encoder_input_tokens, max_length, eos_id=eos_id, vocab_size=vocab_size)
    return found.tokens[:, 0]


def stream(
    params: Params,
    config: T5Config,
    encoder_input_tokens: Array,
    max_length: int,
    sampling: Sampling | None = None,
    *,
    eos_id: int = 1,
    vocab_size: int | None = None,
) -> Iterator[tuple[int, float]]:
    """(token, its log-probability), one by one, as `generate` gives for one input [1, S]. params: from `prepare`."""
    cache = _start(params, config, encoder_input_tokens, max_length)
    token = jnp.zeros(1, jnp.int32)
    for position in range(max_length):
        token, log_probability, cache = _advance(params, config, cache, token, position, sampling, vocab_size)
        yield int(token[0]), float(log_probability[0])
        if int(token[0]) == eos_id:
            return


_start = jax.jit(start, static_argnames=("config", "max_length"))


@partial(jax.jit, static_argnames=("config", "vocab_size"), donate_argnames="cache")
def _advance(
    params: Params,
    config: T5Config,
    cache: Cache,
    token: Array,
    position: int,
    sampling: Sampling | None,
    vocab_size: int | None,
) -> tuple[Array, Array, Cache]:
    logits, cache = step(params, config, cache, token, position)  # type: ignore[arg-type]  # traced
    return (*choose(logits, real_tokens(config, vocab_size), sampling, position), cache)  # type: ignore[arg-type]
