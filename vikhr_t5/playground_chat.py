"""What the playground asks of a chat model of `vikhr_mistral`: the next turn, as it comes."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

from vikhr_t5.packages import require
from vikhr_t5.progress import human


class _Stopped(Exception):
    """Nobody reads on."""


class Chat:
    """A causal model with a chat template. UserError as in `vikhr_mistral.chat.load`."""

    def __init__(self, folder: str, device: str | None):
        require("mistral", "torch", "transformers", "peft")
        from vikhr_mistral import chat

        self._chat = chat
        self._model, self._tokenizer = chat.load(folder, device)
        chat.Conversation(self._model, self._tokenizer, chat.Sampling())  # refuses a model without a template
        self.limit: int = self._model.config.max_position_embeddings  # tokens of a question and its answer
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self.summary = (
            f"{self._model.config.model_type}, {human(parameters)} parameters, {len(self._tokenizer):,} pieces"
        )

    def answer(
        self,
        turns: list[dict[str, str]],
        question: str,
        length: float,
        temperature: float,
        top_k: float,
        top_p: float,
    ) -> Iterator[str]:
        """The answer to `question` after `turns` ({"role", "content"}), longer each time.

        Raises:
            UserError: the question alone is longer than the model reads.
        """
        sampling = self._chat.Sampling(temperature, top_p, int(top_k), max_new_tokens=int(length))
        conversation = self._chat.Conversation(self._model, self._tokenizer, sampling)
        conversation.turns = list(turns)
        pieces: queue.Queue[Any] = queue.Queue()
        stop = threading.Event()

        def write(text: str) -> None:
            if stop.is_set():
                raise _Stopped
            pieces.put(text)

        def ask() -> None:
            try:
                conversation.ask(question, write)
                pieces.put(None)
            except BaseException as error:  # given to the reader, who raises it
                pieces.put(error)

        threading.Thread(target=ask, daemon=True).start()
        said = ""
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                said += piece
                yield said
        finally:
            stop.set()

    def tokens(self, text: str) -> list[tuple[str, bool]]:
        """The pieces of a text: (piece, is special)."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [(piece.replace("▁", " "), False) for piece in self._tokenizer.convert_ids_to_tokens(ids)]
