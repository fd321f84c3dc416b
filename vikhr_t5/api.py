"""The Python interface: `vikhr_t5.load(path)` gives a model that answers texts, fills blanks and scores targets.

>>> model = vikhr_t5.load("runs/demo/hf")
>>> model.generate(["…"])[0].text
>>> model.fill("Съешь ещё этих ___ булок.")
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from vikhr_t5 import prompts
from vikhr_t5.data.vocabulary import AnyVocabulary, named_vocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.inference import Decoding, Predictor, Tokens
from vikhr_t5.model import network
from vikhr_t5.model.config import T5Config
from vikhr_t5.packages import require_own
from vikhr_t5.prompts import Prompt
from vikhr_t5.remote import local_copy
from vikhr_t5.train.checkpoint_files import find_checkpoint
from vikhr_t5.train.partitioning import Partitioner

GREEDY = Decoding()
MAX_INPUT_LENGTH = 512  # tokens, where a checkpoint does not say what it was trained with: T5's own
MAX_LENGTH = 128  # tokens of an answer
_MOST_PADDING = 1024  # rows of an embedding past the last id


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer of a model.

    Attributes:
        text: as the vocabulary decodes it; sentinels read `<extra_id_i>`.
        tokens: its ids, EOS included where it came.
        token_log_probabilities: of each, by the model itself, whatever temperature or truncation it was drawn with.
        blanks: of a prompt with blanks, what fills each; None where the answer left one out.
        filled: the prompt with its blanks filled.
    """

    text: str
    tokens: list[int]
    token_log_probabilities: list[float]
    blanks: list[str | None] | None = None
    filled: str | None = None

    @property
    def log_probability(self) -> float:
        """Their sum."""
        return math.fsum(self.token_log_probabilities)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answers to one input: in beam search the best first."""

    answers: list[Answer]

    @property
    def text(self) -> str:
        """The first answer's."""
        return self.answers[0].text


class TextModel:
    """A model with its vocabulary; `load` makes one. Methods may be called from several threads.

    Args:
        predictor: the model.
        max_input_length: the most tokens of a prompt, the mode token and EOS counted. T5 itself has no limit: what was
            never seen in training is answered badly.
    """

    def __init__(self, predictor: Predictor, max_input_length: int):
        self._predictor = predictor
        self.max_input_length = max_input_length

    @property
    def vocabulary(self) -> AnyVocabulary:
        return self._predictor.vocabulary

    @property
    def config(self) -> T5Config:
        return self._predictor.config

    def prompt(self, text: str, *, mode: str | None = None, blanks: bool = True, truncate: bool = False) -> Prompt:
        """A text as the model reads it.

        Args:
            mode: a mode token put first: its name, or R, S or X.
            blanks: whether "___" is a blank to be filled.
            truncate: whether a text that is too long is cut at its end.

        Raises:
            UserError: the text is too long, the mode unknown, or there are more blanks than sentinels.
        """
        return prompts.encode(text, self.vocabulary, self.max_input_length, self._mode(mode), blanks, truncate)

    def generate(
        self,
        texts: Sequence[str],
        decoding: Decoding = GREEDY,
        *,
        max_length: int = MAX_LENGTH,
        mode: str | None = None,
        blanks: bool = True,
        truncate: bool = False,
        first: int = 0,
    ) -> list[Prediction]:
        """The model's answers to each text.

        Args:
            decoding: greedy, beam search or drawn.
            max_length: longest answer, in tokens.
            mode, blanks, truncate: see `prompt`.
            first: the number of the first text, where these are a part of more: what is drawn depends on it.

        Raises:
            UserError: as `prompt`.
        """
        asked = [self.prompt(text, mode=mode, blanks=blanks, truncate=truncate) for text in texts]
        numbers = range(first, first + len(asked))
        found = self._predictor.generate([prompt.ids for prompt in asked], decoding, max_length, numbers)
        return [
            Prediction([self._answer(prompt, tokens) for tokens in several])
            for prompt, several in zip(asked, found, strict=True)
        ]

    def fill(
        self, text: str, decoding: Decoding = GREEDY, *, max_length: int = MAX_LENGTH, mode: str | None = None
    ) -> str:
        """A text with each "___" filled. UserError where there is none."""
        if (filled := self.generate([text], decoding, max_length=max_length, mode=mode)[0].answers[0].filled) is None:
            raise UserError(f"there is no blank to fill: write it as {prompts.BLANK}")
        return filled

    def stream(
        self,
        text: str,
        decoding: Decoding = GREEDY,
        *,
        max_length: int = MAX_LENGTH,
        mode: str | None = None,
        blanks: bool = True,
        truncate: bool = False,
    ) -> Iterator[Answer]:
        """The answer to one text after each of its tokens; the last is what `generate([text])` gives.

        Raises:
            UserError: as `prompt`; beam search, or several answers.
        """
        if decoding.num_samples > 1:
            raise UserError("only one answer can be streamed: leave num_samples out")
        prompt = self.prompt(text, mode=mode, blanks=blanks, truncate=truncate)
        return self._stream(prompt, self._predictor.stream(prompt.ids, decoding, max_length), mode)

    def _stream(self, prompt: Prompt, tokens: Iterator[tuple[int, float]], mode: str | None) -> Iterator[Answer]:
        ids: list[int] = []
        log_probabilities: list[float] = []
        for id, log_probability in tokens:
            ids.append(id)
            log_probabilities.append(log_probability)
            yield self._answer(prompt, Tokens(ids[:], log_probabilities[:]))

    def score(
        self,
        inputs: Sequence[str],
        targets: Sequence[Sequence[str]],
        *,
        mode: str | None = None,
        blanks: bool = True,
        truncate: bool = False,
        eos: bool = True,
    ) -> list[list[Answer]]:
        """How likely the model finds given targets: of each input, its targets with their log-probabilities.

        Args:
            targets: of each input, one or several. "___" is no blank in them; they are never cut.
            eos: whether the end of a target counts. lm-eval's log-likelihoods are without it.

        Raises:
            UserError: as `prompt`; a target without tokens.
        """
        pairs = []
        for text, several in zip(inputs, targets, strict=True):
            prompt = self.prompt(text, mode=mode, blanks=blanks, truncate=truncate).ids
            pairs += [(prompt, self._target(target, eos)) for target in several]
        scores = iter(zip(pairs, self._predictor.score(pairs), strict=True))
        return [
            [
                Answer(target, ids, score.log_likelihoods)
                for target, ((_, ids), score) in zip(several, scores, strict=False)
            ]
            for several in targets
        ]

    def _target(self, text: str, eos: bool) -> list[int]:
        ids = [*self.vocabulary.encode(text), *([self.vocabulary.eos_id] if eos else [])]
        if not ids:
            raise UserError("a target has no tokens: leave it out, or count its end (eos)")
        return ids

    def _mode(self, name: str | None) -> int | None:
        return None if name is None else prompts.mode_id(name, self.vocabulary)

    def _answer(self, prompt: Prompt, tokens: Tokens) -> Answer:
        answer = Answer(self.vocabulary.decode(tokens.ids), tokens.ids, tokens.log_probabilities)
        if not prompt.num_blanks:
            return answer
        blanks = prompts.blanks_of(tokens.ids, prompt, self.vocabulary)
        filled = prompts.fill(prompt, blanks, self.vocabulary)
        return dataclasses.replace(answer, blanks=prompts.shown(blanks, self.vocabulary), filled=filled)


def load(
    path: str | os.PathLike[str],
    *,
    vocabulary: str | None = None,
    extra_ids: int | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    max_input_length: int | None = None,
) -> TextModel:
    """A model of any format, read into memory.

    Args:
        path: a run folder, a checkpoint's folder, a t5x checkpoint (or its model_dir), or a Hugging Face folder.
        vocabulary: a SentencePiece model or "bytes", where the format carries none, as t5x's.
        extra_ids: its sentinels; None: 100, and none for bytes.
        dtype: "float32", or "bfloat16", which computes with half of the bits.
        batch_size: the most rows that go through the model at one time, rounded up to a multiple of the devices.
        max_input_length: the most tokens of a prompt; None: what the run was trained with, where that is known, else
            MAX_INPUT_LENGTH.

    Raises:
        UserError: the model cannot be read, has no vocabulary, or one of another size; `extra_ids` alone.
    """
    require_own("conversion")
    from conversion import convert, stored

    given = named_vocabulary(vocabulary, extra_ids)
    source_format, source = find(path)
    model = convert.open_model(source, source_format, given)
    words = model.vocabulary
    if words is None:
        raise UserError(
            f"{path} carries no vocabulary: give --vocabulary, the SentencePiece model that it was trained with"
        )
    if given is not None and given.fingerprint() != words.fingerprint():
        raise UserError(f"{path} has its own vocabulary, and it is not {given!r}: leave --vocabulary out")
    rows = model.config.known_vocab_size()
    if not words.size <= rows < words.size + _MOST_PADDING:
        raise UserError(
            f"{path} has {rows} rows of embedding, and {words!r} has {words.size} ids: that is another vocabulary than"
            " it was trained with"
        )
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is not one of float32, bfloat16")
    config = dataclasses.replace(model.config, dtype=dtype, dropout_rate=0.0, remat_policy="everything")
    partitioner = Partitioner()
    unit = partitioner.row_shards
    shardings = partitioner.shardings(network.logical_axes(config), network.abstract_params(config))
    params = jax.device_put(stored.load(model), shardings)
    if dtype != "float32":
        params = jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)
    predictor = Predictor(params, config, words, partitioner, -(-batch_size // unit) * unit)
    return TextModel(predictor, max_input_length or trained_length(source) or MAX_INPUT_LENGTH)


def find(path: str | os.PathLike[str]) -> tuple[str, Path]:
    """(format, folder) of what `load` reads: of a run, its newest checkpoint; of a URL, the local copy."""
    require_own("conversion")
    from conversion import convert

    return convert.find(local_copy(os.fspath(path), "or give a local copy"))


def trained_length(path: str | os.PathLike[str]) -> int | None:
    """The length of inputs in a run's configuration; None where there is none, as in other formats."""
    try:
        text = (find_checkpoint(path) / "config.gin").read_text(encoding="utf-8")
    except (UserError, OSError):
        return None
    found = re.search(r"^TASK_FEATURE_LENGTHS = .*?'inputs': (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None
