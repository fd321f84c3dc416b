"""A small base model for mistral_init_loss.py, trained here: it knows Russian in small pieces, as Mistral does.

    python benchmarks/mistral_tiny_base.py --output tiny --minutes 13

A Mistral of 4 layers on the embedded Russian and English pages. Its tokenizer has 2,000 pieces, trained on four parts
of English and one of Russian. (Mistral's own 32,000 would cost sixteen times the training on a CPU.)
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import MistralConfig, MistralForCausalLM

from vikhr_mistral import donor as donors
from vikhr_mistral import pieces, tokenizer_files
from vikhr_t5.data.hashing import text_hash
from vikhr_t5.data.records import read_texts

DATA = Path(__file__).resolve().parents[1] / "tasks" / "demo_data"
HELD_OUT, BLOCK, BATCH = 0.05, 128, 8


def pages(language: str, held_out: bool) -> list[str]:
    """The embedded pages of one side of the split."""
    texts = (text for _, text in read_texts(str(DATA / f"{language}.txt")))
    return [text for text in texts if (text_hash(text.encode()) < HELD_OUT) == held_out]


def batches(ids: np.ndarray, seed: int) -> Iterator[torch.Tensor]:
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(ids) - BLOCK, BATCH)
        yield torch.from_numpy(np.stack([ids[start : start + BLOCK] for start in starts]))


def train_base(folder: Path, minutes: float) -> None:
    """Half Russian, half English, one pass after another until the time is over."""
    english, russian = pages("en", False), pages("ru", False)
    model_proto = donors.train([*english, *russian[::4]], pieces.open_model("mistral"), 2000)
    encode = pieces.encoder(model_proto)
    languages = [np.array([id for page in pages(lang, False) for id in [1, *encode(page)]]) for lang in ("ru", "en")]
    print("tokens:", {"ru": len(languages[0]), "en": len(languages[1])})
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=2000, **sizes, num_key_value_heads=2, max_position_embeddings=1024)
    model = MistralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    sources, started, step = [batches(ids, seed) for seed, ids in enumerate(languages)], time.monotonic(), 0
    while (passed := (time.monotonic() - started) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 20) * (1 - passed)
        block = torch.cat([next(source)[: BATCH // 2] for source in sources])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=block, labels=block).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {step * BATCH * BLOCK / 1e6:.2f}M tokens, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer_files.write(model_proto, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    flags = parser.parse_args()
    train_base(flags.output, flags.minutes)


if __name__ == "__main__":
    main()
