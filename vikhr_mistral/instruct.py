"""`vikhr-mistral instruct`: Saiga's tuning on chats, with the loss on the bot's turns alone.

    OUTPUT/model          the result: a folder of PEFT with the tokenizer and its chat template (`trainable: lora`), or
                          of transformers
    OUTPUT/metrics.jsonl, run.json, config.yaml, checkpoints/

Started again with the same configuration it goes on from the newest checkpoint.
"""

import dataclasses
import hashlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vikhr_mistral import chats, fingerprint
from vikhr_mistral.config import read_config, to_yaml
from vikhr_mistral.corpus import tokenizer_fingerprint
from vikhr_mistral.models import Attention, Dtype, LoraConfig, load_model, load_tokenizer, save
from vikhr_mistral.packing import IGNORED, ExampleRows
from vikhr_mistral.training import TrainConfig, train
from vikhr_t5.data.chats import HELD_OUT, SYSTEM_PROMPT
from vikhr_t5.files import write_text_atomic


@dataclass(frozen=True)
class SaigaLora(LoraConfig):
    """As `LoraConfig`, with saiga_mistral_7b's settings: the attention's projections alone."""

    alpha: int = 16
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    embeddings: Literal["full", "new", "none"] = "none"


@dataclass(frozen=True)
class InstructConfig:
    """A run's YAML.

    Attributes:
        model: folder of the model to begin with, with its tokenizer.
        chats: files, folders, saved datasets or hub names, with the fields of one of `vikhr_t5.data.chats.SCHEMAS`.
        epochs: passes over the chats; `train.max_steps`, if set, is meant in its place.
        sequence_length: tokens of a row; a longer chat is cut at its turns.
        system_prompt: of chats that have none, in training and in the chat template of the result; "" for none.
        held_out: share of the chats that is only evaluated, by a hash of the first question.
        skip_bad_chats: leave malformed rows out and count them; otherwise the first one is an error.
        pack: several chats in a row, which do not see each other; false: one.
        dtype: in which the base's weights are loaded; adapters are trained in float32.
        new_rows_from: first row that counts as new, for `lora.embeddings: new`.
    """

    model: str
    output_dir: str
    chats: list[str]
    train: TrainConfig
    epochs: int = 5
    sequence_length: int = 4096
    system_prompt: str = SYSTEM_PROMPT
    held_out: float = HELD_OUT
    skip_bad_chats: bool = False
    pack: bool = True
    trainable: Literal["lora", "full"] = "lora"
    lora: SaigaLora = field(default_factory=SaigaLora)
    new_rows_from: int = 32000
    dtype: Dtype = "bfloat16"
    attention: Attention = "sdpa"

    def __post_init__(self) -> None:
        if not self.chats:
            raise ValueError("chats is empty: name at least one file, folder or set")
        if self.epochs < 1 or self.sequence_length < 2 or not 0 <= self.held_out < 1:
            raise ValueError("epochs and sequence_length are at least 1 and 2, held_out is at least 0 and below 1")


def instruct(config_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> None:
    """Runs, or goes on with, the run that a YAML file describes; under `accelerate launch` or `torchrun`, too.

    Args:
        config_path: YAML of `InstructConfig`.
        overrides: "train.batch_size=64", as for `read_config`.

    Raises:
        UserError: bad settings or chats, or an output_dir of another run.
    """
    config = read_config(InstructConfig, Path(config_path), overrides)
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())  # begins the process group
    folder, length, seed = Path(config.output_dir), config.sequence_length, config.train.seed
    tokenizer = load_tokenizer(config.model)
    chats.set_chat_template(tokenizer, config.system_prompt)
    loaded = chats.load(tokenizer, config.chats, length, config.held_out, config.skip_bad_chats)
    rows_per_epoch = ExampleRows(loaded.train, length, seed, pack=config.pack).rows_per_epoch
    steps = config.train.max_steps or math.ceil(config.epochs * rows_per_epoch / config.train.batch_size)
    settings = dataclasses.replace(config.train, max_steps=steps)
    rows = ExampleRows(
        loaded.train, length, seed, tokenizer.eos_token_id, num_rows=steps * settings.batch_size, pack=config.pack
    )
    held_out = {}
    if loaded.validation:
        packed = ExampleRows(loaded.validation, length, seed, tokenizer.eos_token_id, pack=config.pack)
        held_out = {"chats": [packed[i] for i in range(len(packed))]}
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
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / "config.yaml", to_yaml(config))
        tokens = sum(len(example["input_ids"]) for example in loaded.train)
        learned = sum((example["labels"] != IGNORED).sum() for example in loaded.train)
        print(
            f"chats: {chats.describe(loaded.counts)}; {len(loaded.train):,} to train on,"
            f" {len(loaded.validation):,} held out\n{tokens:,} tokens, {learned / tokens:.1%} of them the bot's, in"
            f" {rows_per_epoch:,} rows; {steps:,} steps of {settings.batch_size}",
            file=sys.stderr,
        )
    finished = train(
        settings,
        model,
        rows,
        held_out,
        output_dir=folder,
        attention=config.attention,
        must_stay={
            "model": os.path.abspath(config.model),
            "base": fingerprint.fingerprint(config.model) if state.is_main_process else None,  # which alone compares
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "chats": _digest(loaded),
            "sequence_length": length,
            "trainable": config.trainable,
        },
    )
    if finished:
        save(model, tokenizer, config.model, folder / "model", state)


def _digest(loaded: chats.Chats) -> str:
    """Of all tokens, in order: the same chats, template and lengths give the same."""
    digest = hashlib.blake2b(digest_size=8)
    for example in (*loaded.train, *loaded.validation):
        for values in example.values():
            digest.update(values.tobytes())
    return digest.hexdigest()
