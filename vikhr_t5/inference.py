"""A model that answers: what generates and scores token ids, for every command and the Python interface.

B rows, N answers of each, S source length, T target length.
"""

import dataclasses
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.model import decoding as model_decoding
from vikhr_t5.model import network
from vikhr_t5.model.beam_search import beam_search
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.decoding import Generated
from vikhr_t5.model.sampling import Sampling
from vikhr_t5.train import checkpoints
from vikhr_t5.train.checkpoints import RestoreCheckpointConfig
from vikhr_t5.train.losses import CHUNK_SIZE, token_losses
from vikhr_t5.train.partitioning import Partitioner, placed
from vikhr_t5.train.state import Batch, EncoderDecoderModel

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are found: greedily as it stands; by beam search; or drawn, where one of the last five says so.

    Args:
        num_beams: above 1: beam search, as `transformers.generate` does it.
        length_penalty: of beam search: above 0 favours long answers (see `model/beam_search.py`).
        temperature: divides the logits, 1 where another setting asks for drawing; 0 is greedy.
        top_k: draw from the k likeliest tokens.
        top_p: draw from the likeliest tokens that have this probability together; after top_k.
        num_samples: answers to each input: drawn, or the best of the beams.
        seed: of what is drawn; the same input at the same place then has the same answer, whatever stands beside it.

    Raises:
        UserError: a value out of range, or two that exclude each other.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "temperature": (self.temperature is None or 0 <= self.temperature < float("inf"), "at least 0"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 2**32 - 1"),
        }
        for name, (good, allowed) in ranges.items():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {allowed}")
        drawing = [name for name in ("temperature", "top_k", "top_p") if getattr(self, name) is not None]
        if self.num_beams > 1:
            if drawing:
                raise UserError(f"beam search draws nothing: leave out {drawing[0]}, or have one beam")
            if self.num_samples > self.num_beams:
                raise UserError(f"{self.num_samples} answers from {self.num_beams} beams: have as many beams")
        elif self.temperature == 0 and (len(drawing) > 1 or self.num_samples > 1):
            raise UserError("temperature 0 draws nothing, so that all answers are one: give another, or leave it out")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        drawing = self.temperature is not None or self.top_k is not None or self.top_p is not None
        return self.num_beams == 1 and self.temperature != 0 and (drawing or self.num_samples > 1)


class Tokens(NamedTuple):
    """One answer: its ids, EOS included where it came, and their log-probabilities by the model."""

    ids: list[int]
    log_probabilities: list[float]


class Score(NamedTuple):
    """Of given targets: the log-likelihood of each token, and how many the model finds likeliest."""

    log_likelihoods: list[float]
    correct: int

    @property
    def log_likelihood(self) -> float:
        """Their sum."""
        return math.fsum(self.log_likelihoods)


class Predictor:
    """A model's parameters on the mesh: what generates and scores token ids, in batches of alike lengths.

    Args:
        params: our tree, wherever it is.
        batch_size: the most rows that go through the model at one time.
        loss_chunk_size: see `EncoderDecoderModel`.

    Raises:
        UserError: the batch does not divide over the mesh.
    """

    def __init__(
        self,
        params: Any,
        config: T5Config,
        vocabulary: AnyVocabulary,
        partitioner: Partitioner,
        batch_size: int,
        loss_chunk_size: int | None = CHUNK_SIZE,
    ):
        partitioner.check_batch_size(batch_size)
        self.params, self.config, self.vocabulary = params, config, vocabulary
        self.partitioner, self.batch_size, self._loss_chunk_size = partitioner, batch_size, loss_chunk_size
        self._score = partitioner.jit(self._score_batch)
        self._prepared: Any = None
        self._preparing = threading.Lock()

    def generate(
        self, inputs: Sequence[Ids], decoding: Decoding, max_length: int, numbers: Sequence[int] | None = None
    ) -> list[list[Tokens]]:
        """The answers to each input, `decoding.num_samples` of them, best first where they were searched for.

        Args:
            max_length: longest answer, in tokens.
            numbers: of the inputs, from which with `decoding.seed` their draws come; None: 0, 1, …
        """
        answers: list[list[Tokens]] = [[] for _ in inputs]
        numbers = range(len(inputs)) if numbers is None else numbers
        for rows in self._batches([len(ids) for ids in inputs]):
            tokens = self._rows([inputs[row] for row in rows])
            drawn = self._draws(decoding, [numbers[row] for row in rows], len(tokens))
            found = self._answers(self._put({"inputs": tokens})["inputs"], decoding, max_length, drawn)
            for row, *several in zip(rows, *map(np.asarray, found), strict=False):
                answers[row] = [self._ended(*one) for one in zip(*several, strict=True)][: decoding.num_samples]
        return answers

    def stream(self, inputs: Ids, decoding: Decoding, max_length: int) -> Iterator[tuple[int, float]]:
        """(token, its log-probability), one by one, of the first answer that `generate` gives to this input alone.

        Raises:
            UserError: beam search is asked for, which knows its answer at its end.
        """
        if decoding.num_beams > 1:
            raise UserError("beam search gives no token before its end: stream greedily, or with a temperature")
        with self._preparing:  # one copy of the decoder for all that stream at a time
            if self._prepared is None:
                self._prepared = jax.jit(model_decoding.prepare, static_argnums=1)(self.params, self.config)
        return model_decoding.stream(
            self._prepared,
            self.config,
            jnp.asarray(self._rows([inputs], rows=1)),
            max_length,
            self._draws(decoding, [0], 1),
            eos_id=self.vocabulary.eos_id,
            vocab_size=self.vocabulary.size,
        )

    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Score]:
        """The log-likelihood of each pair's targets given its inputs, teacher-forced."""
        scores: list[Score] = [Score([], 0)] * len(pairs)
        for rows in self._batches([(len(inputs), len(targets)) for inputs, targets in pairs]):
            inputs, targets = (self._rows([pairs[row][side] for row in rows]) for side in (0, 1))
            found = self._score(self.params, self._put({"inputs": inputs, "targets": targets}))
            for row, likelihoods, correct in zip(rows, *map(np.asarray, found), strict=False):
                length = len(pairs[row][1])
                scores[row] = Score(likelihoods[:length].tolist(), int(correct[:length].sum()))
        return scores

    def _answers(self, inputs: jax.Array, decoding: Decoding, max_length: int, sampling: Sampling | None) -> Generated:
        vocabulary = {"eos_id": self.vocabulary.eos_id, "vocab_size": self.vocabulary.size}
        if decoding.num_beams == 1:
            answers = decoding.num_samples
            return model_decoding.generate(
                self.params, self.config, inputs, max_length, sampling, answers=answers, **vocabulary
            )
        return beam_search(
            self.params, self.config, inputs, max_length, decoding.num_beams, decoding.length_penalty, **vocabulary
        )

    def _draws(self, decoding: Decoding, numbers: Sequence[int], rows: int) -> Sampling | None:
        """A key of its own for each answer: it depends on the seed, the input's number and the answer's."""
        if not decoding.samples:
            return None
        padded = np.pad(np.asarray(numbers, np.uint32), (0, rows - len(numbers)))
        keys = _keys(np.uint32(decoding.seed), padded, np.arange(decoding.num_samples, dtype=np.uint32))
        temperature = 1.0 if decoding.temperature is None else decoding.temperature
        return Sampling(keys, temperature, decoding.top_k, decoding.top_p)

    def _ended(self, ids: np.ndarray, log_probabilities: np.ndarray) -> Tokens:
        (ends,) = np.nonzero(ids == self.vocabulary.eos_id)
        length = ends[0] + 1 if len(ends) else len(ids)
        return Tokens(ids[:length].tolist(), log_probabilities[:length].tolist())

    def _score_batch(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """[B, T] twice: log-likelihoods, and whether the target is the likeliest token."""
        inputs, targets = batch["inputs"], batch["targets"]
        encoded = network.encode(params, self.config, inputs)
        shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        hidden = network.decode(params, self.config, encoded, inputs, shifted, targets)
        kernel, scale = network.head(params, self.config)
        losses = token_losses(hidden, kernel, scale, targets, chunk_size=self._loss_chunk_size)
        return -losses.loss, losses.correct

    def _batches(self, lengths: Sequence[Any]) -> Iterator[list[int]]:
        """Numbers of the rows of each batch, the longest first: what is too large for the memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
        return (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size))

    def _rows(self, several: Sequence[Ids], rows: int | None = None) -> np.ndarray:
        """int32 [B, S]: few different shapes, since each is compiled. What is missing is padding."""
        shape = (rows or self._num_rows(len(several)), bucket(max(map(len, several))))
        tokens = np.zeros(shape, np.int32)
        for row, ids in zip(tokens, several, strict=False):
            row[: len(ids)] = ids
        return tokens

    def _num_rows(self, count: int) -> int:
        unit = self.partitioner.row_shards
        return min(self.batch_size, unit << max(0, (-(-count // unit) - 1).bit_length()))

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return self.partitioner.put_batch(batch, len(next(iter(batch.values()))))


def restored(
    model: EncoderDecoderModel,
    partitioner: Partitioner,
    restore: RestoreCheckpointConfig,
    batch_size: int,
    dtype: str = "float32",
) -> tuple[Predictor, int]:
    """A checkpoint's model, and its step.

    Args:
        dtype: "bfloat16" rounds the parameters to it, as t5x's `RestoreCheckpointConfig.dtype`.

    Raises:
        UserError: there is no whole checkpoint, or it is of another model or vocabulary.
    """
    partitioner.check_batch_size(batch_size)
    params, step = restored_params(model, partitioner, restore.one(), dtype)
    predictor = Predictor(params, model.config, model.vocabulary, partitioner, batch_size, model.loss_chunk_size)
    return predictor, step


def restored_params(
    model: EncoderDecoderModel, partitioner: Partitioner, path: Path, dtype: str = "float32"
) -> tuple[Any, int]:
    """(parameters on the mesh, step) of one checkpoint's folder. Arguments and errors as of `restored`."""
    checkpoints.check_vocabulary(path, model.vocabulary)
    shapes = model.abstract_state()
    like = placed(shapes, partitioner.shardings(model.state_axes(), shapes))
    state, progress = checkpoints.restore(path, like, reset_optimizer=True)
    params = state.params
    if dtype != "float32":
        params = jax.tree.map(lambda p: p.astype(dtype).astype(p.dtype), params)
    return params, int(progress["step"])


def bucket(length: int) -> int:
    """`length` up to a power of two or the middle of two, from 16 on: 16, 24, 32, 48, 64, …"""
    power = 1 << max(4, (length - 1).bit_length())
    return power * 3 // 4 if 16 < length <= power * 3 // 4 else power


@jax.jit
def _keys(seed: jax.Array, numbers: jax.Array, samples: jax.Array) -> jax.Array:
    """[B*N] keys."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    of_inputs = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    return fold(of_inputs, samples).ravel()
