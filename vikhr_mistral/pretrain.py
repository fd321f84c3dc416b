"""`vikhr-mistral pretrain`: continued pre-training on several corpora, close to the base if asked for.

    OUTPUT/model          the result: a folder of transformers, or of PEFT (`trainable: lora`, and new rows only)
    OUTPUT/metrics.jsonl, run.json, config.yaml, checkpoints/, tokens/

Started again with the same configuration it goes on from the newest checkpoint.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vikhr_mistral import fingerprint
from vikhr_mistral.anchoring import AnchorConfig
from vikhr_mistral.config import read_config, to_yaml
from vikhr_mistral.corpus import TokenizedCorpus, tokenize, tokenizer_fingerprint
from vikhr_mistral.models import Attention, Dtype, LoraConfig, Trainable, load_model, load_tokenizer, save
from vikhr_mistral.packing import DocumentRows, MixedRows
from vikhr_mistral.reference import Reference, load_copy
from vikhr_mistral.training import TrainConfig, train
from vikhr_t5.errors import UserError
from vikhr_t5.files import write_text_atomic


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus.

    Attributes:
        files: file, glob, folder, saved dataset or hub name, or a list of them.
        field: of a row; .txt files have `text`.
        share: of the run's rows, hence of its tokens; exact in every 1000 rows.
    """

    files: str | list[str]
    field: str = "text"
    share: float = 1.0


@dataclass(frozen=True)
class HeldOutConfig:
    """Documents that are only evaluated: at most `rows` rows of them."""

    files: str | list[str]
    field: str = "text"
    rows: int = 64


@dataclass(frozen=True)
class PretrainConfig:
    """A run's YAML.

    Attributes:
        model: folder of the model to begin with (of `vikhr-mistral init`), with its tokenizer.
        corpora: by name; shares say how much of the text each is (Russian, and English replay).
        trainable: full; lora; embeddings (embed_tokens and lm_head alone); new_embeddings (their new rows alone).
        new_rows_from: first row that counts as new, for `new`: the size of the base's vocabulary.
        dtype: in which weights are loaded and kept; float32 for masters under bfloat16 products. What is trained beside
            frozen weights is float32 in any case.
        tokens_dir: where tokenized corpora are kept; by default in `output_dir`.
    """

    model: str
    output_dir: str
    corpora: dict[str, CorpusConfig]
    train: TrainConfig
    held_out: dict[str, HeldOutConfig] = field(default_factory=dict)
    sequence_length: int = 4096
    trainable: Trainable = "full"
    lora: LoraConfig = field(default_factory=LoraConfig)
    new_rows_from: int = 32000
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    dtype: Dtype = "float32"
    attention: Attention = "sdpa"
    tokens_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.train.max_steps:
            raise ValueError("train.max_steps is missing: how long to train")
        if not self.corpora:
            raise ValueError("corpora is empty: name at least one, with its files")
        if self.dtype != "float32" and self.train.precision != self.dtype:
            raise ValueError(f"dtype {self.dtype} needs train.precision {self.dtype}, not {self.train.precision}")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length is {self.sequence_length}, and at least 2 is needed")


def pretrain(config_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> None:
    """Runs, or goes on with, the run that a YAML file describes; under `accelerate launch` or `torchrun`, too.

    Args:
        config_path: YAML of `PretrainConfig`.
        overrides: "train.max_steps=100", as for `read_config`.

    Raises:
        UserError: bad settings or input, or an output_dir of another run.
    """
    config = read_config(PretrainConfig, Path(config_path), overrides)
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())  # begins the process group
    folder = Path(config.output_dir)
    tokenizer = load_tokenizer(config.model)
    base_tokenizer = load_tokenizer(config.anchor.base_tokenizer) if config.anchor.base_tokenizer else None
    with state.main_process_first():  # the others find what it has written
        folder.mkdir(parents=True, exist_ok=True)
        corpora = [
            _tokenized(config, name, corpus, tokenizer, base_tokenizer) for name, corpus in config.corpora.items()
        ]
        held_out = {
            name: _tokenized(config, f"held-out-{name}", corpus, tokenizer) for name, corpus in config.held_out.items()
        }
    length, steps, seed = config.sequence_length, config.train.max_steps, config.train.seed
    rows = MixedRows(
        [DocumentRows(corpus, length, seed, source_id) for source_id, corpus in enumerate(corpora)],
        [corpus.share for corpus in config.corpora.values()],
        steps * config.train.batch_size,
    )
    model = load_model(
        config.model,
        len(tokenizer),
        dtype=config.dtype,
        attention=config.attention,
        trainable=config.trainable,
        lora=config.lora,
        new_rows_from=config.new_rows_from,
        seed=seed,
    )
    reference = None
    if config.anchor.active:
        adapters_off = hasattr(model, "disable_adapter") and config.anchor.reference is None
        copy = None
        if not adapters_off:
            dtype = getattr(torch, "bfloat16" if config.train.precision == "bfloat16" else config.dtype)
            copy = load_copy(
                config.anchor.reference or config.model, config.anchor, dtype, config.attention, state.device
            )
        reference = Reference(copy)
    if state.is_main_process:
        _describe(config, corpora, model)
    finished = train(
        config.train,
        model,
        rows,
        {name: _eval_rows(corpus, length, config.held_out[name].rows, seed) for name, corpus in held_out.items()},
        output_dir=folder,
        attention=config.attention,
        anchor=config.anchor,
        reference=reference,
        shared_size=len(base_tokenizer) if base_tokenizer is not None else None,
        source_names=list(config.corpora) if len(corpora) > 1 else (),
        must_stay={
            "model": os.path.abspath(config.model),
            "reference": config.anchor.active and os.path.abspath(config.anchor.reference or config.model),
            "reference_fingerprint": _fingerprint(config, state.is_main_process),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "corpora": {
                name: [corpus.directory.name, config.corpora[name].share]
                for name, corpus in zip(config.corpora, corpora, strict=True)
            },
            "sequence_length": length,
            "trainable": config.trainable,
        },
    )
    if finished:
        save(model, tokenizer, config.model, folder / "model", state)


def _fingerprint(config: PretrainConfig, is_main_process: bool) -> str | None:
    """Of the reference's weights, all of which are read for it: by the process alone that compares it."""
    if not config.anchor.active or not is_main_process:
        return None
    return fingerprint.fingerprint(config.anchor.reference or config.model)


def _tokenized(
    config: PretrainConfig, name: str, corpus: CorpusConfig | HeldOutConfig, tokenizer: Any, base_tokenizer: Any = None
) -> TokenizedCorpus:
    folder = config.tokens_dir or str(Path(config.output_dir) / "tokens")
    return tokenize(corpus.files, tokenizer, folder, corpus.field, base_tokenizer, name)


def _eval_rows(corpus: TokenizedCorpus, length: int, most: int, seed: int) -> list[Any]:
    """At most one pass over the documents."""
    rows = DocumentRows(corpus, length, seed)
    count = min(most, int(rows.rows_per_epoch))
    if not count:
        raise UserError(
            f"{corpus.directory.name}: held-out text of {len(corpus.tokens)} tokens does not fill a row of {length}"
        )
    return [rows[i] for i in range(count)]


def _describe(config: PretrainConfig, corpora: Sequence[TokenizedCorpus], model: Any) -> None:
    """config.yaml of the run folder, and a line for each corpus."""
    write_text_atomic(Path(config.output_dir) / "config.yaml", to_yaml(config))
    shares = [corpus.share for corpus in config.corpora.values()]
    total = config.train.max_steps * config.train.batch_size * config.sequence_length
    for (name, settings), corpus in zip(config.corpora.items(), corpora, strict=True):
        share = settings.share / sum(shares)
        alike = f", {corpus.alike.mean():.1%} of documents tokenized alike" if corpus.alike is not None else ""
        epochs = total * share / len(corpus.tokens)
        print(
            f"{name}: {len(corpus.tokens):,} tokens, {share:.1%} of the run, {epochs:.2f} epochs{alike}",
            file=sys.stderr,
        )
    trained, everything = (
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in model.parameters()),
    )
    print(f"training {trained:,} of {everything:,} parameters ({config.trainable})", file=sys.stderr)
