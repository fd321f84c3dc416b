"""Models for lm-eval: what a folder holds, and lm-eval's Hugging Face backend, with our progress, counting its cuts."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from vikhr_t5.errors import UserError
from vikhr_t5.fingerprint import fingerprint
from vikhr_t5.packages import require_own
from vikhr_t5.progress import Progress

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelFolder:
    """A model to evaluate.

    Attributes:
        name: of its column.
        path: a Hugging Face model's folder, or a checkpoint of vikhr-t5: of a run, its newest.
        is_run: it is the latter, and is converted for the time of the evaluation.
        seq2seq: an encoder-decoder.
        fingerprint: of configuration, tokenizer and weights; weights by name, size and time of their last change.
    """

    name: str
    path: Path
    is_run: bool
    seq2seq: bool
    fingerprint: str


def find_model(source: str) -> ModelFolder:
    """The model of `[NAME=]DIR`. Without a name its column is called as the folder.

    Raises:
        UserError: it is no folder of a model; says of what else, and what to do.
    """
    name, _, folder = source.rpartition("=") if not Path(source).exists() else ("", "", source)
    path = Path(folder).expanduser()
    name = name or path.resolve().name
    if not path.is_dir():
        raise UserError(f"model {folder}: no such folder; of a model on the hub: hf download {folder} --local-dir DIR")
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds adapters: vikhr-mistral merge makes a whole model of them")
    if (path / "config.json").is_file():
        return ModelFolder(name, path, False, _is_seq2seq(path), fingerprint(path))
    require_own("conversion")
    from conversion import convert

    try:
        kind, checkpoint = convert.find(path)
    except UserError as error:
        raise UserError(
            f"{folder} is no model: no config.json of Hugging Face, and no run of vikhr-t5 ({error})"
        ) from None
    if kind == "t5x":
        raise UserError(
            f"{folder} is a checkpoint of t5x: vikhr-t5 convert --from t5x --to hf {folder} DST --vocabulary F"
        )
    return ModelFolder(name, checkpoint, True, True, fingerprint(checkpoint))


def _is_seq2seq(folder: Path) -> bool:
    from transformers.models.auto import modeling_auto as known

    try:
        kind = transformers.AutoConfig.from_pretrained(str(folder)).model_type
    except Exception as error:  # transformers has no common class for it
        raise UserError(f"{folder}/config.json cannot be read: {_line(error)}") from error
    if kind in known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return True
    if kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    raise UserError(
        f"{folder} is a {kind}: neither an encoder-decoder nor a causal language model, no text can be scored"
    )


@contextlib.contextmanager
def opened(model: ModelFolder, dtype: str | None, batch_size: int, max_length: int | None) -> Iterator["Model"]:
    """The model, loaded. A run is converted into a temporary folder, which does not outlive the block.

    Args:
        dtype: of DTYPES; None: as it is stored.
        batch_size: requests that are computed together.
        max_length: tokens of a prompt at most; None: what the model's or its tokenizer's configuration says, else 2048.
    """
    with contextlib.ExitStack() as stack:
        folder = model.path
        if model.is_run:
            from conversion import convert

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vikhr-t5-benchmark-"))) / model.name
            convert.write_model(convert.open_model(model.path, "vikhr"), folder, "hf")
        yield Model(model.name, folder, dtype, batch_size, max_length)


class _Count(CacheHook):
    """lm-eval tells its cache of every answer: that is its progress."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._progress.advance(1)


class Model(HFLM):
    """lm-eval's `hf` backend on a local folder.

    It cuts what is too long from the left, and says nothing of an encoder's input. Here that is counted.

    Attributes:
        prompts, cut: contexts of the requests so far, and those of them that lost their beginning.

    Raises:
        UserError: the folder cannot be loaded, or its tokenizer has more pieces than the model has rows.
    """

    add_bos_token: bool | None  # lm-eval's: None: what the tokenizer adds

    def __init__(self, name: str, folder: Path, dtype: str | None, batch_size: int, max_length: int | None):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            super().__init__(
                pretrained=os.fspath(folder),
                dtype=dtype or "auto",
                device=device,
                batch_size=batch_size,
                max_length=max_length,
            )
        except Exception as error:  # of transformers, tokenizers, safetensors
            raise UserError(f"{folder} cannot be loaded: {_line(error)}") from error
        rows = self.model.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > rows:
            raise UserError(f"{folder}: its tokenizer has {len(self.tokenizer):,} pieces and the model {rows:,} rows")
        self.name = name
        self.forget()

    def _create_model(self, *arguments: Any, **settings: Any) -> None:
        """lm-eval calls `tie_weights` on what was loaded, and transformers 5 then ties the head of every T5, also of a
        v1.1, whose head is its own: its scores would be noise. `from_pretrained` has tied what is tied."""
        super()._create_model(*arguments, **settings)
        self._model.tie_weights = lambda *_, **__: None

    def forget(self) -> None:
        """Count from zero."""
        self._contexts: set[str] = set()
        self._cut: set[str] = set()

    @property
    def prompts(self) -> int:
        return len(self._contexts)

    @property
    def cut(self) -> int:
        return len(self._cut)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        with self._progress(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of the text's tokens alone: what a tokenizer adds, BOS or EOS, is no part of it."""
        found: list[float] = []
        default, self.add_bos_token = self.add_bos_token, False
        try:
            with self._progress(requests):
                for start in range(0, len(requests), self.batch_size):  # in one call it would answer only at its end
                    found += super().loglikelihood_rolling(requests[start : start + self.batch_size], disable_tqdm=True)
        finally:
            self.add_bos_token = default
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        for context, settings in (request.args for request in requests):
            room = self.max_length - (0 if self.backend == "seq2seq" else settings["max_gen_toks"])
            if room <= 0:
                raise UserError(
                    f"{self.name} reads {self.max_length} tokens, and an answer takes {settings['max_gen_toks']}: give"
                    " a greater --max_length"
                )
            self._see(context, len(self.tok_encode(context)) > room)
        with self._progress(requests):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = True, **kwargs: Any) -> Any:
        for texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"{self.name} reads {self.max_length} tokens, and a text to score has {len(continuation)}: give a"
                    " greater --max_length"
                )
            if texts is not None:  # else a window of a long text, which lm-eval makes to fit
                length = len(context) if self.backend == "seq2seq" else len(context) + len(continuation) - 1
                self._see(texts[0], length > self.max_length)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **kwargs)

    def _see(self, context: str, too_long: bool) -> None:
        self._contexts.add(context)
        if too_long:
            self._cut.add(context)

    @contextlib.contextmanager
    def _progress(self, requests: Sequence[Instance]) -> Iterator[None]:
        with Progress(f"{self.name}, {requests[0].task_name}", len(requests), "requests") as progress:
            self.set_cache_hook(_Count(progress))
            yield


def parameters(model: Model) -> int:
    """Their number."""
    return sum(parameter.numel() for parameter in model.model.parameters())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def description(model: Model) -> dict[str, Any]:
    """For the record of results."""
    return {
        "parameters": parameters(model),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "max_length": model.max_length,
    }
