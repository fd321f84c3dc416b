"""What `demo.sh` begins with: a small Mistral with random weights and Mistral's own tokenizer, and the embedded corpus
as text, held-out text and chats."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vikhr_mistral import pieces, tokenizer_files
from vikhr_t5.data.hashing import text_hash
from vikhr_t5.data.records import read_rows, read_texts
from vikhr_t5.files import atomic_path

MODEL: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HELD_OUT = 0.03  # of the documents
LONGEST_CHAT = 400  # characters


def write_base(folder: Path) -> None:
    """A model folder as one downloads it."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    with atomic_path(folder) as temporary:
        MistralForCausalLM(MistralConfig(**MODEL)).save_pretrained(temporary)
        tokenizer_files.write(pieces.open_model("mistral"), temporary)


def write_data(source: Path, folder: Path) -> None:
    """russian.txt, english.txt and what is held out of them; chats.jsonl."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for name, file in (("russian", "ru.txt"), ("english", "en.txt")):
            documents = [text for _, text in read_texts(str(source / file))]
            held_out = [text for text in documents if text_hash(text.encode()) < HELD_OUT]
            rest = [text for text in documents if text_hash(text.encode()) >= HELD_OUT]
            (temporary / f"{name}.txt").write_text("\n\n".join(rest) + "\n", encoding="utf-8")
            (temporary / f"held_out_{name}.txt").write_text("\n\n".join(held_out) + "\n", encoding="utf-8")
        lines = (json.dumps(chat, ensure_ascii=False) for chat in _chats(source / "parallel.jsonl"))
        (temporary / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _chats(file: Path) -> Iterator[dict[str, object]]:
    for _, row in read_rows(str(file)):
        if len(row["en"]) + len(row["ru"]) <= LONGEST_CHAT:
            asked = {"role": "user", "content": f"Как это сказать по-русски?\n{row['en']}"}
            yield {"messages": [asked, {"role": "bot", "content": row["ru"]}]}


if __name__ == "__main__":
    corpus, runs = map(Path, sys.argv[1:])
    write_data(corpus, runs / "data")
    write_base(runs / "base")
