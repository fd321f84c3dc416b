"""A conversation with a model, in a terminal or on a pipe: a line is a question, the answer is written as it comes."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from vikhr_mistral import fingerprint, merge
from vikhr_t5.errors import UserError

HELP = "/reset forgets the conversation, /exit ends it; Ctrl-C stops an answer"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p, top_k: only the likeliest tokens that together have this probability; only so many of them.
        repetition_penalty: 1 for none; greater makes tokens that were there less likely (arXiv:1909.05858).
        max_new_tokens: of one answer.
    """

    temperature: float = 0.2
    top_p: float = 0.9
    top_k: int = 40
    repetition_penalty: float = 1.1
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        for name, right in (
            ("temperature", self.temperature >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("top_k", self.top_k >= 0),
            ("repetition_penalty", self.repetition_penalty > 0),
            ("max_new_tokens", self.max_new_tokens > 0),
        ):
            if not right:
                raise UserError(f"--{name} {getattr(self, name)} is out of range")

    def arguments(self) -> dict[str, Any]:
        """As `generate` takes them."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {
            "do_sample": self.temperature > 0,
            **(drawn if self.temperature > 0 else {}),
            "repetition_penalty": self.repetition_penalty,
            "max_new_tokens": self.max_new_tokens,
        }


class _Writer(TextStreamer):
    """Hands text on as soon as its words are whole."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


class Conversation:
    """The turns so far, and the model that continues them.

    Args:
        model, tokenizer: of transformers; the tokenizer has a chat template.
        sampling: how tokens are drawn.
        system: the first turn; without it the template's own.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling, system: str | None = None):
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path} has no chat template: vikhr-mistral instruct tunes a model for chats"
            )
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []
        # Rows that only fill the matrix up have no piece to write.
        self._suppressed = list(range(len(tokenizer), model.get_input_embeddings().weight.shape[0])) or None

    def reset(self) -> None:
        """Forget all turns but the system's."""
        self.turns = []

    def ask(self, question: str, write: Callable[[str], None]) -> str:
        """The answer, which `write` gets in pieces. The oldest turns are forgotten where all do not fit.

        Raises:
            UserError: the question alone is longer than the model reads.
        """
        asked = {"role": "user", "content": question}
        inputs = self._prompt([*self.turns, asked]).to(self.model.device)
        said: list[str] = []

        def keep(text: str) -> None:
            said.append(text)
            write(text)

        try:
            self.model.generate(
                **inputs,
                **self.sampling.arguments(),
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.eos_token_id,
                suppress_tokens=self._suppressed,
                streamer=_Writer(self.tokenizer, keep),
            )
        finally:  # what was said before an interruption is part of the conversation
            answer = "".join(said).strip()
            self.turns += [asked, {"role": "assistant", "content": answer}]
        return answer

    def _prompt(self, turns: list[dict[str, str]]) -> Any:
        """Input ids [1, T] that leave room for an answer."""
        room = self.model.config.max_position_embeddings - self.sampling.max_new_tokens
        while True:
            inputs = self.tokenizer.apply_chat_template(
                [*self.system, *turns], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            length = inputs["input_ids"].shape[1]
            if length <= room:
                return inputs
            if len(turns) == 1:
                raise UserError(
                    f"the question has {length} tokens, and with max_new_tokens {self.sampling.max_new_tokens} the"
                    f" model reads {max(room, 0)}: shorten it, or lower --max_new_tokens"
                )
            turns = turns[2:] or turns[-1:]


def load(folder: str, device: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or of a name on the hub; an adapter comes with its base.

    Raises:
        UserError: nothing is there, a file is not whole, the adapter is of another base, or the tokenizer has more
            pieces than the model rows.
    """
    import safetensors

    path = Path(folder)
    if not path.exists() and folder.count("/") != 1:
        raise UserError(f"{folder}: no such folder; give one that instruct or merge wrote")
    if (path / merge.CONFIG).is_file():
        base = merge.read_adapter(path).config.get("base_model_name_or_path") or ""
        if Path(base).is_dir():
            fingerprint.check(path, base)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except (OSError, ValueError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} cannot be opened ({type(error).__name__}: {' '.join(str(error).split())})") from None
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} pieces, and the model {rows} rows for them")
    return model.to(where).eval(), tokenizer


def chat(
    folder: str,
    sampling: Sampling,
    system: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    source: TextIO | None = None,
    sink: TextIO | None = None,
) -> None:
    """Answers the lines of `source` (stdin) on `sink` (stdout) until they end.

    Args:
        folder: as in `load`.
        sampling, system: as in `Conversation`.
        device: "cpu", "cuda", "cuda:1", …
        seed: of the draws; the same one gives the same answers.
    """
    source, sink = source or sys.stdin, sink or sys.stdout
    if seed is not None:
        set_seed(seed)
    model, tokenizer = load(folder, device)
    conversation = Conversation(model, tokenizer, sampling, system)
    terminal = source.isatty()
    if terminal:
        import readline  # noqa: F401 (gives `input` history and editing)

        print(HELP, file=sink)

    def write(text: str) -> None:
        sink.write(text)
        sink.flush()

    while (line := _line(source, terminal)) is not None:
        if line == "/reset":
            conversation.reset()
        elif line == "/exit":
            return
        elif line:
            try:
                conversation.ask(line, write)
            except KeyboardInterrupt:
                if not terminal:
                    raise
            write("\n")


def _line(source: TextIO, terminal: bool) -> str | None:
    """The next line, stripped; None at the end."""
    try:
        line = input("> ") if terminal and source is sys.stdin else source.readline()
    except (EOFError, KeyboardInterrupt):
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not UTF-8 ({error.reason} at byte {error.start})") from None
    return line.strip() if line or terminal else None
