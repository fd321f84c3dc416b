"""Between texts and the ids that a model reads and writes: mode tokens, blanks, and the limit of a prompt."""

import dataclasses
import re
from collections.abc import Sequence

from vikhr_t5.data.byte_vocabulary import ByteVocabulary
from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.errors import UserError, nearest

BLANK = "___"  # or longer
_BLANK = re.compile(r"_{3,}")
# UL2's names of its three groups of denoisers, and of the tokens of its mixtures here (data/denoisers.py).
_GROUPS = {"R": "NLU", "X": "NLG", "S": "S2S"}


class TooLong(UserError):
    """A prompt of more tokens than the model is given. `length`: in tokens."""

    def __init__(self, length: int, limit: int):
        super().__init__(
            f"{length} tokens, and the limit is {limit}: --max_input_length {length} reads it all, --truncate cuts it"
        )
        self.length = length


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text as a model reads it. ids: with EOS; parts: the text before, between and after its blanks."""

    ids: list[int]
    parts: list[str]

    @property
    def num_blanks(self) -> int:
        return len(self.parts) - 1


def modes(vocabulary: AnyVocabulary) -> dict[str, str]:
    """Names of the mode tokens: as they stand in the vocabulary ("[NLU]"), bare ("NLU"), and UL2's R, S and X."""
    known = {token: token for token in vocabulary.mode_tokens}
    known |= {token.strip("[]<>"): token for token in vocabulary.mode_tokens if token.strip("[]<>")}
    return known | {group: known[bare] for group, bare in _GROUPS.items() if bare in known and group not in known}


def mode_id(name: str, vocabulary: AnyVocabulary) -> int:
    """The id of a mode token, by any of its names.

    Raises:
        UserError: the vocabulary has none such; says the nearest.
    """
    known = modes(vocabulary)
    if name not in known:
        raise UserError(f"mode {name!r} is not in the vocabulary; {nearest(name, known)}")
    return vocabulary.mode_id(known[name])


def encode(
    text: str,
    vocabulary: AnyVocabulary,
    limit: int,
    mode: int | None = None,
    blanks: bool = True,
    truncate: bool = False,
) -> Prompt:
    """The ids of a prompt: the mode token, the text, EOS.

    Args:
        limit: the most ids, all of them counted.
        mode: id of a mode token.
        blanks: whether each "___" becomes a sentinel, in order.
        truncate: whether a longer text is cut at its end, where it is else refused.

    Raises:
        TooLong: it is longer.
        UserError: more blanks than the vocabulary has sentinels.
    """
    parts = _BLANK.split(text) if blanks else [text]
    if len(parts) - 1 > vocabulary.num_sentinels:
        raise UserError(f"{len(parts) - 1} blanks, and the vocabulary has {vocabulary.num_sentinels} sentinels")
    # A sentinel is a word of its own. A space before it belongs to it; where text follows at once, so it does here.
    separate = not isinstance(vocabulary, ByteVocabulary)
    joined = parts[0]
    for i, part in enumerate(parts[1:]):
        joined = f"{joined.rstrip()} <extra_id_{i}>{part}" if separate else f"{joined}<extra_id_{i}>{part}"
    ids = [*([] if mode is None else [mode]), *vocabulary.encode(joined)]
    if len(ids) >= limit and not truncate:
        raise TooLong(len(ids) + 1, limit)
    return Prompt([*ids[: limit - 1], vocabulary.eos_id], parts)


def blanks_of(answer: Sequence[int], prompt: Prompt, vocabulary: AnyVocabulary) -> list[list[int] | None]:
    """What an answer puts into each blank of its prompt: the ids between its sentinel and the next one, or None."""
    sentinels = {vocabulary.sentinel(i): i for i in range(vocabulary.num_sentinels)}
    found: dict[int, list[int]] = {}
    current: list[int] = []  # what stands before the first sentinel is nobody's
    for id in answer:
        if id == vocabulary.eos_id:
            break
        if id in sentinels:
            current = found.setdefault(sentinels[id], [])
        else:
            current.append(id)
    return [found.get(i) for i in range(prompt.num_blanks)]


def fill(prompt: Prompt, blanks: Sequence[Sequence[int] | None], vocabulary: AnyVocabulary) -> str:
    """The prompt's text with its blanks filled, "___" where there is nothing to fill one with.

    The text keeps every character. A blank that begins with a new word is divided from what stands before it.
    """
    filled = prompt.parts[0]
    for ids, part in zip(blanks, prompt.parts[1:], strict=True):
        if ids and vocabulary.piece(ids[0]).startswith("▁") and filled and not filled[-1].isspace():
            filled += " "
        filled += (BLANK if ids is None else vocabulary.decode(ids).strip()) + part
    return filled


def shown(blanks: Sequence[Sequence[int] | None], vocabulary: AnyVocabulary) -> list[str | None]:
    """The blanks' texts."""
    return [None if ids is None else vocabulary.decode(ids).strip() for ids in blanks]
