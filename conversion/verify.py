"""Is an exported model the model that was trained? Logits, loss, greedy tokens and token ids beside transformers'.

B batch, S source length, T target length, V vocabulary.
"""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conversion import huggingface
from conversion.stored import DTYPES, SampledLayers, StoredModel, arrays, load
from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.files import records
from vikhr_t5.model import decoding, network
from vikhr_t5.model.config import T5Config

LINES = (
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Москва — столица России; население города превышает 13 миллионов человек.",
    "Ёжик в тумане шёл к медвежонку, чтобы пить чай и считать звёзды.",
    "Выберите «Файл → Сохранить как…», чтобы сохранить документ под другим именем.",
    "В 1961 году Юрий Гагарин облетел Землю на корабле «Восток-1» за 108 минут.",
    "Мороз и солнце; день чудесный! Ещё ты дремлешь, друг прелестный — пора, красавица, проснись.",
    "Да.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
)
# In float32: of a logit, and beside it what rounding adds where logits are large. Where a model amplifies rounding more
# than that, the measure is how far transformers in float32 is from itself in float64.
ABSOLUTE, RELATIVE, ROUNDINGS = 1e-4, 1e-5, 4
SAMPLED_ABOVE = 500_000_000  # parameters: above, three layers of either stack stand for all
_LONGEST, _GENERATED = 192, 24  # tokens of a text, and at least as many generated ones


class Measured(NamedTuple):
    """What was compared."""

    largest_logit: float
    allowed: float  # difference of a logit
    logit_difference: float
    loss: float
    their_loss: float
    greedy_equal: int  # lines with the same greedy tokens, up to ties
    tokenized_equal: int  # lines with the same ids
    lines: int
    answers: list[tuple[str, str, str]]  # of each pair: input, ours, theirs

    def checks(self) -> dict[str, bool]:
        """Each comparison by name; all must be true (a comparison with NaN is not)."""
        return {
            "logits": self.logit_difference <= self.allowed,
            "loss": abs(self.loss - self.their_loss) <= self.allowed,
            "greedy tokens": self.greedy_equal == self.lines,
            "token ids": self.tokenized_equal == self.lines,
        }


def verify(
    model: StoredModel,
    folder: str | os.PathLike[str],
    lines: Sequence[str] | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    console: Console | None = None,
) -> bool:
    """Compares a model of ours with a Hugging Face folder, prints a table, and says whether all is equal.

    Deletes nothing. Of a model with more than SAMPLED_ABOVE parameters, the first, the middle and the last layer of
    either stack make a smaller model on both sides, and that is compared.

    Args:
        model: what was converted from the folder, or to it; has a vocabulary.
        folder: config.json, weights and a tokenizer.
        lines: texts to compare on, with a blank in the middle of each; eight sentences where None.
        pairs: (input, target) to compare on, too; what either side answers is printed (see `held_out`).
        console: where the table goes; standard output where None.

    Raises:
        UserError: transformers or torch is not installed, or a file of `folder` cannot be loaded.
    """
    console = console or Console()
    if model.config.param_count() <= SAMPLED_ABOVE:
        return _verify(model, folder, lines or LINES, pairs, console)
    layers = [sampled(depth) for depth in (model.config.num_encoder_layers, model.config.num_decoder_layers)]
    console.print(f"a large model: encoder layers {layers[0]} and decoder layers {layers[1]} are compared")
    with tempfile.TemporaryDirectory() as temporary:
        part = Path(temporary) / "sample"
        theirs = huggingface.HuggingFaceModel(folder, model.vocabulary)
        huggingface.write(SampledLayers(theirs, *layers), part, theirs.dtype, 10**10, "sample")
        return _verify(SampledLayers(model, *layers), part, lines or LINES, (), console)


def sampled(depth: int) -> list[int]:
    """The first, the middle and the last of `depth` layers."""
    return sorted({0, depth // 2, depth - 1})


def same_arrays(one: StoredModel, other: StoredModel) -> bool:
    """Are two models equal to the bit, up to the rounding of the one with fewer bits? Reads every array of both."""
    coarse = DTYPES["bfloat16" if "bfloat16" in (one.dtype, other.dtype) else "float32"]
    return all(
        np.array_equal(one.read(*array).astype(coarse), other.read(*array).astype(coarse))
        for array in arrays(one.config)
    )


def _verify(
    model: StoredModel,
    folder: str | os.PathLike[str],
    lines: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    console: Console,
) -> bool:
    measured = measure(model, folder, lines, pairs)
    checks = measured.checks()
    table = Table(title=f"{folder} beside the checkpoint, {measured.lines} texts, float32")
    for column in ("", "vikhr-t5", "transformers", "difference", "allowed", ""):
        table.add_column(column, justify="left" if not column else "right")
    allowed, loss_difference = f"{measured.allowed:.2e}", abs(measured.loss - measured.their_loss)
    cells = {
        "logits": (f"±{measured.largest_logit:.4g}", "", f"{measured.logit_difference:.2e}", allowed),
        "loss": (f"{measured.loss:.6f}", f"{measured.their_loss:.6f}", f"{loss_difference:.2e}", allowed),
        "greedy tokens": ("", "", f"{measured.greedy_equal} of {measured.lines} equal", "all"),
        "token ids": ("", "", f"{measured.tokenized_equal} of {measured.lines} equal", "all"),
    }
    for name, good in checks.items():
        table.add_row(name, *cells[name], "[green]ok[/]" if good else "[bold red]differs[/]")
    console.print(table)
    if measured.answers:
        answers = Table("held-out input", "vikhr-t5", "transformers", title="Greedy answers", show_lines=True)
        for answer in measured.answers:
            answers.add_row(*(Text(text) for text in answer))
        console.print(answers)
    return all(checks.values())


def held_out(source: str | os.PathLike[str], most: int = 8) -> list[tuple[str, str]]:
    """(input, target) of the examples that a run decoded at its last evaluation, from `samples.jsonl` in its folder.

    Texts with sentinels are left out: where one is glued to a word, text does not say how it was tokenized.
    """
    samples = list(records(Path(source) / "samples.jsonl"))
    last = [sample for sample in samples if sample["step"] == samples[-1]["step"]]
    return [(s["input"], s["target"]) for s in last if "<extra_id_" not in s["input"]][:most]


def measure(
    model: StoredModel, folder: str | os.PathLike[str], lines: Sequence[str], pairs: Sequence[tuple[str, str]] = ()
) -> Measured:
    """The comparison itself. Our weights are rounded to the folder's dtype first, and both sides compute in float32."""
    texts = [*lines, *(text for text, _ in pairs)]
    tokenizer, theirs = _load(folder)
    params = load(model, theirs.config.dtype_of_files)
    config = dataclasses.replace(model.config, dtype="float32", dropout_rate=0.0, remat_policy="everything")
    vocabulary = model.vocabulary
    assert vocabulary is not None
    encoded = [vocabulary.encode(text) for text in texts]
    tokenized = tokenizer(texts).input_ids
    asked = [(vocabulary.encode(text), vocabulary.encode(target)) for text, target in pairs]
    inputs, targets = _examples(encoded[: len(lines)], asked, vocabulary)
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(_logits(params, config, inputs, _shifted(targets), targets))
        generated = np.asarray(
            decoding.greedy(params, config, jnp.asarray(inputs), targets.shape[1], vocab_size=vocabulary.size)
        )
        chosen = np.asarray(_logits(params, config, inputs, _shifted(generated), generated))
    logits_there, generated_there = their_logits(theirs, inputs, targets), generate(theirs, inputs, targets.shape[1])
    real = targets > 0
    difference = np.abs(logits - logits_there)[real].max()
    largest = float(np.abs(logits[real]).max())
    allowed = ABSOLUTE + RELATIVE * largest
    if difference > allowed:
        exact = their_logits(theirs.double(), inputs, targets)
        allowed = max(allowed, ROUNDINGS * float(np.abs(logits_there - exact)[real].max()))
    equal = [_same(o, t, c, 2 * allowed) for o, t, c in zip(generated, generated_there, chosen, strict=True)]
    return Measured(
        largest_logit=largest,
        allowed=allowed,
        logit_difference=float(difference),
        loss=_loss(logits[real], targets[real]),
        their_loss=_loss(logits_there[real], targets[real]),
        greedy_equal=sum(equal),
        tokenized_equal=sum([*o, vocabulary.eos_id] == t for o, t in zip(encoded, tokenized, strict=True)),
        lines=len(texts),
        answers=[
            (text, vocabulary.decode(ours.tolist()), vocabulary.decode(their.tolist()))
            for (text, _), ours, their in zip(
                pairs, generated[len(lines) :], generated_there[len(lines) :], strict=True
            )
        ],
    )


def _examples(
    encoded: Sequence[list[int]], pairs: Sequence[tuple[list[int], list[int]]], vocabulary: AnyVocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """The middle third of each text as a blank to fill, then the pairs: int32 inputs [B, S] and targets [B, T]. All end
    in EOS."""
    blank = [vocabulary.sentinel(0)] if vocabulary.num_sentinels else []
    inputs, targets = [], []
    for ids in encoded:
        ids = ids[:_LONGEST]
        start, stop = len(ids) // 3, -(-2 * len(ids) // 3)
        inputs.append([*ids[:start], *blank, *ids[stop:], vocabulary.eos_id])
        targets.append([*blank, *ids[start:stop], vocabulary.eos_id])
    for asked, answer in pairs:
        inputs.append([*asked[:_LONGEST], vocabulary.eos_id])
        targets.append([*answer[:_LONGEST], vocabulary.eos_id])
    return _padded(inputs), _padded(targets, at_least=_GENERATED)


def _padded(rows: Sequence[Sequence[int]], at_least: int = 0) -> np.ndarray:
    out = np.zeros((len(rows), max(at_least, *map(len, rows))), np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


def _shifted(targets: np.ndarray) -> np.ndarray:
    """The decoder's inputs: 0, then the targets but the last."""
    return np.pad(targets[:, :-1], ((0, 0), (1, 0)))


@partial(jax.jit, static_argnames="config")
def _logits(params: Any, config: T5Config, inputs: Any, decoder_inputs: Any, targets: Any) -> Any:
    """[B, S], [B, T], [B, T] -> [B, T, V] float32, as in training."""
    return network.Transformer(config).apply({"params": params}, inputs, decoder_inputs, targets)


def _loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean cross-entropy of [N, V] and [N]."""
    top = logits.max(-1, keepdims=True)
    normalizer = np.log(np.exp(logits - top).sum(-1, dtype=np.float64)) + top[:, 0]
    return float((normalizer - logits[np.arange(len(targets)), targets]).mean())


def _same(ours: np.ndarray, theirs: np.ndarray, logits: np.ndarray, tie: float) -> bool:
    """The same tokens, or at the first other one two logits too close to tell (after it, all may differ)."""
    (places,) = np.nonzero(ours != theirs)
    if not len(places):
        return True
    first = places[0]
    return bool(logits[first, ours[first]] - logits[first, theirs[first]] <= tie)


def _load(folder: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The tokenizer and the model, in float32, from files alone."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"--verify needs {error.name}: pip install 'vikhr-t5[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # 5.x warns that it does not tie an untied head: it should not
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        config.dtype_of_files = str(config.dtype or torch.float32).removeprefix("torch.")
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {' '.join(str(error).split())[:300]}") from error
    return tokenizer, model.eval()


def their_logits(model: Any, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[B, S], [B, T] -> [B, T, V] in the model's type.

    transformers 5.x multiplies the decoder's output of every umT5 by D**-0.5, which 4.x does where the output layer is
    the embedding. Google's umT5 has its own, and so have ours: that is undone here.
    """
    import torch

    with torch.inference_mode():
        logits = model(
            input_ids=torch.tensor(inputs, dtype=torch.long),
            attention_mask=torch.tensor(inputs > 0),
            decoder_input_ids=torch.tensor(_shifted(targets), dtype=torch.long),
        ).logits
    own_head = model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    if model.config.model_type == "umt5" and model.config.tie_word_embeddings and own_head:
        logits = logits * model.config.d_model**0.5
    return logits.numpy()


def generate(model: Any, inputs: np.ndarray, length: int) -> np.ndarray:
    """Greedy tokens [B, T], 0 after the end."""
    import torch

    with torch.inference_mode():
        generated = model.generate(
            input_ids=torch.tensor(inputs, dtype=torch.long),
            attention_mask=torch.tensor(inputs > 0),
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
        )
    generated = generated[:, 1:].numpy()  # without the start token
    return np.pad(generated, ((0, 0), (0, length - generated.shape[1])))
