"""The model that a run trains: loaded, with a gradient where it is trained, and written when the run has ended."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vikhr_mistral import fingerprint
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import atomic_path

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "lm_head")
Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "flash_attention_2", "flash_attention_3", "eager"]
Trainable = Literal["full", "lora", "embeddings", "new_embeddings"]


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of the projections, and what else is trained beside them.

    Attributes:
        embeddings: of embed_tokens and lm_head: full, new (the rows from `PretrainConfig.new_rows_from` on), none.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: tuple[str, ...] = PROJECTIONS
    embeddings: Literal["full", "new", "none"] = "full"


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """A fast tokenizer from a model folder. UserError where there is none."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():  # transformers would look for it on the hub
        raise UserError(f"{folder}: no such folder; give one of a model with its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(folder), use_fast=True)
    except Exception as error:  # transformers has no common class for it
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: no tokenizer can be read there ({type(error).__name__}: {text})") from None


def load_model(
    folder: str,
    tokenizer_size: int,
    *,
    dtype: Dtype,
    attention: Attention = "sdpa",
    trainable: Trainable = "full",
    lora: LoraConfig | None = None,
    new_rows_from: int = 0,
    seed: int = 0,
) -> Any:
    """The model to train, or a PEFT model around it; what is trained requires a gradient.

    Args:
        folder: of a causal model of transformers.
        tokenizer_size: pieces of its tokenizer.
        dtype: in which the weights are loaded; where not all are trained, those that are become float32.
        attention: implementation.
        trainable, lora, new_rows_from: as in `pretrain.PretrainConfig`.
        seed: of the adapters' first values; all processes, and a run that begins again, must have the same.

    Raises:
        UserError: the folder is an adapter or no causal model, a file of it is not whole, its vocabulary is smaller
            than the tokenizer's, or a module that is to have an adapter is not there.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if (Path(folder) / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} is an adapter, and a model is trained: vikhr-mistral merge {folder} OUT, then give OUT"
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: the model cannot be loaded ({type(error).__name__}: {text})") from None
    if model.config.vocab_size < tokenizer_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer_size} pieces and the model {model.config.vocab_size} rows; "
            "run vikhr-mistral init with this tokenizer"
        )
    if trainable == "full":
        return model
    if trainable == "embeddings":
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    else:
        torch.manual_seed(seed)
        model = add_adapters(folder, model, trainable, lora or LoraConfig(), new_rows_from)
    for parameter in model.parameters():
        if parameter.requires_grad:  # bfloat16 would lose most of an optimizer's steps
            parameter.data = parameter.data.float()
    return model


def add_adapters(folder: str, model: Any, trainable: Trainable, lora: LoraConfig, new_rows_from: int) -> Any:
    """A PEFT model around a model; arguments as in `load_model`. UserError where a module or row is not there."""
    import peft

    new_rows = list(range(new_rows_from, model.config.vocab_size))
    if (trainable == "new_embeddings" or lora.embeddings == "new") and not new_rows:
        raise UserError(f"{folder}: no row from new_rows_from = {new_rows_from} on; it has {model.config.vocab_size}")
    if trainable == "new_embeddings":
        settings: Any = peft.TrainableTokensConfig(
            token_indices=new_rows, target_modules=list(EMBEDDINGS), task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(model, settings)
    known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for name in lora.target_modules:
        if name not in known:
            raise UserError(f"lora.target_modules: the model has no module {name!r}; {nearest(name, known)}")
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        modules_to_save=list(EMBEDDINGS) if lora.embeddings == "full" else None,
        trainable_token_indices=dict.fromkeys(EMBEDDINGS, new_rows) if lora.embeddings == "new" else None,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, settings)


def save(model: Any, tokenizer: Any, base: str, output: Path, state: Any) -> None:
    """A model folder, whole or absent: weights, tokenizer, and for adapters which base they belong to.

    Args:
        model: of `load_model`, trained; sharded or not.
        tokenizer: with its chat template, if it has one.
        base: the folder that the model was loaded from; its tokenizer.model comes along.
        output: the folder to write.
        state: accelerate's `PartialState`; all processes call this.
    """
    from torch.distributed.checkpoint import state_dict as dcp_state

    adapters = hasattr(model, "peft_config")
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapters)
    weights = dcp_state.get_model_state_dict(model, options=options)  # of all processes, on the first
    if state.is_main_process:
        with atomic_path(output) as folder:
            model.config.use_cache = True
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            if (Path(base) / "tokenizer.model").exists():
                shutil.copy(Path(base) / "tokenizer.model", folder)
            if adapters:
                fingerprint.write(folder, base)
        print(f"{output} is written", file=sys.stderr)
    state.wait_for_everyone()
