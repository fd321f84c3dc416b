"""Loss on Russian right after the tokenizer was extended, by how the new rows were made.

    python benchmarks/mistral_init_loss.py --work_dir /tmp/init_loss --minutes 10

A small Mistral is trained on the embedded Russian and English pages for --minutes. It stands for a base that knows
Russian in small pieces: its tokenizer has 2,000, trained on four parts of English and one of Russian. (Mistral's own
32,000 would cost sixteen times the training on a CPU.) It is extended by pieces from the same Russian pages, rows are
made by each method, and the loss is taken on the held-out pages, without any training.
All methods see the same tokens; nats per character compare models with different tokenizers, too.

FOCUS gets vectors from the same pages: positive pointwise mutual information within five pieces, factored to 64 numbers
(Levy & Goldberg 2014), where the paper has fastText. "random" is N(0, 0.02), transformers' mean_resizing=False;
"normal" is its mean_resizing=True.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.sparse.linalg
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from vikhr_mistral import donor as donors
from vikhr_mistral import embeddings, initialise, pieces, tokenizer, tokenizer_files
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


@torch.inference_mode()
def loss(folder: Path, texts: list[str]) -> tuple[float, float]:
    """Nats per token and per character of texts, each cut into blocks of their own."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encode = pieces.encoder(pieces.open_model(folder))
    total, count = 0.0, 0
    for text in texts:
        ids = encode(text)
        for first in range(0, len(ids), BLOCK):
            block = torch.tensor([[1, *ids[first : first + BLOCK]]])
            logits = model(input_ids=block).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, block[0, 1:], reduction="sum").item()
            count += block.shape[1] - 1
    return total / count, total / sum(map(len, texts))


def write_vectors(path: Path, folder: Path, texts: list[str], window: int = 5, width: int = 64) -> None:
    """A vector for each piece of the texts, in fastText's text format."""
    model = pieces.open_model(folder)
    encode, size = pieces.encoder(model), len(model.pieces)
    counts = scipy.sparse.csr_matrix((size, size))
    for ids in map(np.array, map(encode, texts)):
        for distance in range(1, min(window + 1, len(ids))):
            pair = (ids[:-distance], ids[distance:])
            counts += scipy.sparse.coo_matrix((np.ones(len(pair[0])), pair), (size, size)).tocsr()
    counts = (counts + counts.T).tocoo()
    total = np.asarray(counts.sum(axis=0)).ravel()
    information = np.log(counts.data * total.sum() / (total[counts.row] * total[counts.col]))
    positive = scipy.sparse.csr_matrix((np.maximum(information, 0), (counts.row, counts.col)), (size, size))
    left, values, _ = scipy.sparse.linalg.svds(positive, width, rng=np.random.default_rng(0))
    vectors, used = left * np.sqrt(values), np.flatnonzero(total)
    lines = [" ".join([model.pieces[id].piece, *(f"{value:.6g}" for value in vectors[id])]) for id in used]
    path.write_text("\n".join([f"{len(used)} {width}", *lines]) + "\n", encoding="utf-8")


def randomize(source: Path, target: Path, old_size: int) -> None:
    """A copy of an extended model with rows of N(0, 0.02)."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors, generator = load_file(target / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in initialise.MATRICES:
        tensors[name][old_size:].normal_(0, 0.02, generator=generator)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def compare(work_dir: Path, minutes: float, donor_size: int) -> dict[str, tuple[float, float]]:
    """Method -> nats per token and per character of held-out Russian; of the base under "base"."""
    base, extended = work_dir / "base", work_dir / "tokenizer"
    if not base.exists():
        train_base(base, minutes)
    (work_dir / "ru.txt").write_text("\n\n".join(pages("ru", False)), encoding="utf-8")
    tokenizer.extend(str(base), extended, corpus=[str(work_dir / "ru.txt")], donor_size=donor_size)
    russian, english = pages("ru", True), pages("en", True)[:20]
    rows = {"base": loss(base, russian)}
    write_vectors(work_dir / "pieces.vec", extended, pages("ru", False))
    for method in embeddings.METHODS:
        auxiliary = str(work_dir / "pieces.vec") if method == embeddings.FOCUS else None
        initialise.init(base, extended, work_dir / method, method=method, auxiliary=auxiliary, verify=True)
        rows[method] = loss(work_dir / method, russian)
    randomize(work_dir / "mean", work_dir / "random", 2000)
    rows["random"] = loss(work_dir / "random", russian)
    print(f"held-out Russian: {len(russian)} pages, {sum(map(len, russian)):,} characters")
    for name, (per_token, per_character) in rows.items():
        print(f"{name:14} {per_token:.3f} nats/token {per_character:.3f} nats/character")
    before, after = loss(base, english)[1], loss(work_dir / "mean", english)[1]
    print(f"held-out English: {before:.4f} nats/character before, {after:.4f} after")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--donor_size", type=int, default=5_000)
    flags = parser.parse_args()
    flags.work_dir.mkdir(parents=True, exist_ok=True)
    compare(flags.work_dir, flags.minutes, flags.donor_size)


if __name__ == "__main__":
    main()
