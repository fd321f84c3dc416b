"""What the playground asks of a T5: to fill blanks, to continue, to answer an instruction; token by token."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vikhr_t5 import prompts
from vikhr_t5.api import Decoding, TextModel
from vikhr_t5.progress import human

FILL, CONTINUE, INSTRUCT = MODES = ("Fill the blanks (___)", "Continue", "Instruct")
_GROUP = {FILL: "R", CONTINUE: "S"}  # of UL2's denoisers, where the vocabulary has their tokens


@dataclass(frozen=True)
class Said:
    """An answer so far. tokens: (text of the piece, whether it is a sentinel or the like)."""

    text: str
    tokens: list[tuple[str, bool]]


class Playground:
    """A T5 that answers as the page wants it."""

    def __init__(self, model: TextModel):
        self.model = model
        parameters, pieces = model.config.param_count(), model.vocabulary.size
        limit = model.max_input_length
        reads = f", reads {limit:,} tokens" if limit else ""
        self.summary = f"T5, {human(parameters)} parameters, {pieces:,} pieces{reads}"

    def answer(
        self, text: str, mode: str, length: float, temperature: float, top_k: float, top_p: float, seed: float | None
    ) -> Iterator[Said]:
        """What is said, one more token each time.

        Args:
            mode: of `MODES`.
            length: of the answer, in tokens.
            temperature: 0 takes the likeliest token. top_k: 0 takes all.

        Raises:
            UserError: the text is longer than the model reads, or has more blanks than the vocabulary sentinels.
        """
        decoding = Decoding(
            temperature=temperature,
            top_k=int(top_k) or None if temperature else None,
            top_p=top_p if temperature and top_p < 1 else None,
            seed=int(seed or 0),
        )
        for answer in self.model.stream(text, decoding, max_length=int(length), **self._asked(mode)):
            filled = any(blank is not None for blank in answer.blanks or [])
            yield Said(answer.filled or "" if filled else answer.text, [self._piece(token) for token in answer.tokens])

    def tokens(self, text: str, mode: str) -> list[tuple[str, bool]]:
        """The pieces that the model reads, mode token and end included."""
        return [self._piece(token) for token in self.model.prompt(text, **self._asked(mode)).ids]

    def _asked(self, mode: str) -> dict[str, Any]:
        group = _GROUP.get(mode)
        return {"mode": group if group in prompts.modes(self.model.vocabulary) else None, "blanks": mode == FILL}

    def _piece(self, token: int) -> tuple[str, bool]:
        piece = self.model.vocabulary.piece(token)
        marked = piece.startswith("<") and piece.endswith(">")
        special = marked or piece.strip("▁") in self.model.vocabulary.mode_tokens
        return piece.replace("▁", " "), special
