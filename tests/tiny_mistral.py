"""A Mistral of a few thousand weights with a tokenizer of its own, for tests: folders that transformers reads."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from vikhr_mistral import chats, pieces, tokenizer_files

DEMO = Path(__file__).resolve().parents[1] / "tasks" / "demo_data"


def lines(language: str, count: int, start: int = 0) -> list[str]:
    """Lines of the embedded corpus, "ru" or "en"."""
    with open(DEMO / f"{language}.txt", encoding="utf-8") as file:
        kept = [line.strip() for line in file if line.strip()]
    return kept[start : start + count]


def tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <s> and </s>: every text round-trips."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def extended(base: PreTrainedTokenizerFast, texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """`base` with pieces that `texts` give, after its own: later merges, higher ids."""
    old = json.loads(base.backend_tokenizer.to_str())
    new = json.loads(tokenizer(texts, size).backend_tokenizer.to_str())["model"]
    vocab, merges = old["model"]["vocab"], old["model"]["merges"]
    known = {tuple(pair) for pair in merges}
    for left, right in new["merges"]:
        if (left, right) not in known and left in vocab and right in vocab:
            merges.append([left, right])
            vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer.from_str(json.dumps(old))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def model(vocab_size: int, seed: int = 0, **settings: Any) -> MistralForCausalLM:
    """Random weights; `settings` are of MistralConfig."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": None}
    config = MistralConfig(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, **{**sizes, **settings})
    return MistralForCausalLM(config).eval()


def folder(path: Path, size: int = 400, **settings: Any) -> Path:
    """A model folder with its tokenizer."""
    made = tokenizer(lines("en", 300) + lines("ru", 300), size)
    made.save_pretrained(path)
    model(len(made), **settings).save_pretrained(path)
    return path


def chat_folder(path: Path, vocab_size: int = 32_000, **settings: Any) -> Path:
    """A model of one layer with random weights, Mistral's own tokenizer, and a chat template that begins with a cat."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {**sizes, "num_key_value_heads": 1, "max_position_embeddings": 256}
    MistralForCausalLM(MistralConfig(vocab_size=vocab_size, **shape, **settings)).save_pretrained(path)
    tokenizer_files.write(pieces.open_model("mistral"), path)
    made = AutoTokenizer.from_pretrained(path)
    chats.set_chat_template(made, "Ты — кот.")
    made.save_pretrained(path)
    return path
