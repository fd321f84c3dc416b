"""Beam search as `transformers.generate` does it (5.x, `do_sample=False`, `early_stopping=False`), as one XLA loop.

The running answers of an input, its beams, are extended by the likeliest tokens over all of them. One that reaches EOS
is scored by its sum of log-probabilities over its length, EOS counted, to the power of `length_penalty`; the best N are
kept. An input is done when its best running answer, scored so at its present length, is no better than the worst of N
kept ones: a heuristic for positive penalties, since a longer answer could still be better.

B inputs, N beams, T longest answer, V vocabulary.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vikhr_t5.model.config import T5Config
from vikhr_t5.model.decoding import Cache, Generated, prepare, real_tokens, start, step
from vikhr_t5.model.network import Params

NEVER = -1e9  # a score below any real one; transformers' value


class Beams(NamedTuple):
    """Answers of each input. tokens: int32 [B, N, T]; log_probabilities: of each token; scores: float32 [B, N]."""

    tokens: Array
    log_probabilities: Array
    scores: Array

    def best(self, count: int, scores: Array) -> tuple["Beams", Array]:
        """The `count` best by `scores` [B, M], and their indices [B, count]."""
        _, chosen = lax.top_k(scores, count)
        return _gather(self._replace(scores=scores), chosen), chosen


@partial(jax.jit, static_argnames=("config", "max_length", "num_beams", "length_penalty", "eos_id", "vocab_size"))
def beam_search(
    params: Params,
    config: T5Config,
    encoder_input_tokens: Array,
    max_length: int,
    num_beams: int,
    length_penalty: float = 1.0,
    *,
    eos_id: int = 1,
    vocab_size: int | None = None,
) -> Generated:
    """The best answers that are found, best first.

    Args:
        encoder_input_tokens: int [B, S], 0 is padding; a row of padding alone is not searched.
        max_length: longest answer; one that reaches it without EOS counts as finished.
        num_beams: N.
        length_penalty: above 0 favours long answers, below 0 short ones; 0 leaves the sums as they are.
        eos_id: ends an answer.
        vocab_size: the real vocabulary; ids from here on are padding of the embedding and are never produced.
    """
    params = prepare(params, config)
    batch, allowed = encoder_input_tokens.shape[0], real_tokens(config, vocab_size)
    lengths = jnp.asarray((np.arange(1, max_length + 1) ** float(length_penalty)).astype(np.float32))
    first = jnp.arange(num_beams) == 0  # all beams begin alike: the others must not be extended in the first step

    def beams(scores: Array) -> Beams:
        shape = (batch, num_beams, max_length)
        return Beams(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.broadcast_to(scores, shape[:2]))

    def unfinished(state: tuple) -> Array:
        position, _, _, _, improvable, _ = state
        return (position < max_length) & improvable.any()

    def advance(state: tuple) -> tuple:
        position, running, kept, finished, improvable, cache = state
        previous = jnp.where(position > 0, running.tokens[:, :, position - 1], 0)
        logits, cache = step(params, config, cache, previous.ravel(), position)
        candidates, parents = _extend(running, logits, allowed, position)

        ended = (candidates.tokens[:, :, position] == eos_id) | (position == max_length - 1)
        running, chosen = candidates.best(num_beams, candidates.scores + jnp.where(ended, NEVER, 0.0))

        # Of 2N candidates the first N may be kept; the others are there so that N go on even if N end.
        counted = ended & (jnp.arange(2 * num_beams) < num_beams)
        scores = candidates.scores / lengths[position]
        scores = scores + jnp.where(improvable[:, None] & counted, 0.0, NEVER)
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), kept, candidates._replace(scores=scores))
        kept, places = both.best(num_beams, both.scores)
        finished = _gather(jnp.concatenate((finished, counted), axis=1), places)

        worst = jnp.where(finished, kept.scores.min(axis=-1, keepdims=True), NEVER)
        improvable &= (running.scores[:, :1] / lengths[position] > worst).any(-1)
        return position + 1, running, kept, finished, improvable, _reorder(cache, _gather(parents, chosen))

    cache = start(params, config, encoder_input_tokens, max_length, num_beams)
    finished, improvable = jnp.zeros((batch, num_beams), bool), (encoder_input_tokens > 0).any(-1)
    state = (0, beams(jnp.where(first, 0.0, NEVER)), beams(jnp.float32(NEVER)), finished, improvable, cache)
    kept = lax.while_loop(unfinished, advance, state)[2]
    return Generated(kept.tokens, kept.log_probabilities)


def _extend(running: Beams, logits: Array, allowed: Array, position: Array) -> tuple[Beams, Array]:
    """The best 2N extensions of N beams by one token, best first, and the beam [B, 2N] that each extends."""
    batch, num_beams, _ = running.tokens.shape
    log_probabilities = jnp.where(allowed, jax.nn.log_softmax(logits), -jnp.inf).reshape(batch, num_beams, -1)
    sums = (log_probabilities + running.scores[:, :, None]).reshape(batch, -1)
    scores, places = lax.top_k(sums, 2 * num_beams)
    parents, tokens = jnp.divmod(places, logits.shape[-1])
    candidates = _gather(running, parents)
    added = jnp.take_along_axis(log_probabilities.reshape(batch, -1), places, axis=1)
    return (
        Beams(
            candidates.tokens.at[:, :, position].set(tokens.astype(jnp.int32)),
            candidates.log_probabilities.at[:, :, position].set(added),
            scores,
        ),
        parents,
    )


def _gather(tree: Any, indices: Array) -> Any:
    """Of arrays [B, M, ...] the places `indices` [B, N] -> [B, N, ...]."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, chosen: row[chosen])(x, indices), tree)


def _reorder(cache: Cache, parents: Array) -> Cache:
    """The cache of the beams `parents` [B, N]; what is the encoder's is one for all beams."""
    rows = (jnp.arange(parents.shape[0])[:, None] * parents.shape[1] + parents).ravel()
    layers = tuple(layer._replace(keys=layer.keys[rows], values=layer.values[rows]) for layer in cache.layers)
    return cache._replace(layers=layers)
