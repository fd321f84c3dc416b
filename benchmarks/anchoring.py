"""What anchoring to the base costs in Russian and saves in English, on a small Mistral: a table and a picture.

    python benchmarks/anchoring.py                                    ten minutes on one core
    python benchmarks/anchoring.py --picture docs/images/anchoring.png

A Mistral of 1M weights with random values first learns the embedded English text. Its vocabulary (byte-level BPE of
English) is then extended with pieces of Russian, whose rows are the means of their old pieces, and it goes on with
Russian text: without anchoring, with `linear` and with `slerp`, each over all tokens against the frozen extended model
(`over: extended`); and with a tenth of English replay, without anchoring and with the KL over the shared pieces on
that replay (`over: shared`). Same data, seed and steps. Held-out loss of both languages, before and after.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DEMO = ROOT / "tasks" / "demo_data"
RUNS = [  # (name, anchor, share of English replay)
    ("none", {}, 0.0),
    *((f"linear t={t}", {"loss": "linear", "t": t}, 0.0) for t in (0.1, 0.3)),
    *((f"slerp t={t}", {"loss": "slerp", "t": t}, 0.0) for t in (0.1, 0.3)),
    ("replay", {}, 0.1),
    ("replay, linear t=0.5, shared", {"loss": "linear", "t": 0.5, "over": "shared"}, 0.1),
]


def write_corpora(folder: Path) -> None:
    """Documents of 8 lines; every 20th is held out."""
    for language in ("en", "ru"):
        lines = [line.strip() for line in (DEMO / f"{language}.txt").read_text("utf-8").splitlines() if line.strip()]
        documents = ["\n".join(lines[i : i + 8]) for i in range(0, len(lines), 8)]
        for name, kept in (("", [d for i, d in enumerate(documents) if i % 20]), ("-held-out", documents[::20])):
            (folder / f"{language}{name}.txt").write_text("\n\n".join(kept), encoding="utf-8")


def train_tokenizer(texts: list[str], size: int) -> dict:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return json.loads(backend.to_str())


def fast(description: dict):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def extend(old: dict, new: dict) -> dict:
    """`old` with the pieces of `new` that are made of pieces it has: later merges, higher ids."""
    made = json.loads(json.dumps(old))
    vocab, merges = made["model"]["vocab"], made["model"]["merges"]
    for left, right in new["model"]["merges"]:
        if left + right not in vocab and left in vocab and right in vocab:
            merges.append([left, right])
            vocab[left + right] = len(vocab)
    return made


def extend_model(folder: Path, old: dict, new: dict, output: Path) -> None:
    """Rows of new pieces are the means of the rows of their old pieces, in both matrices."""
    from transformers import AutoModelForCausalLM

    model, before, after = AutoModelForCausalLM.from_pretrained(folder), fast(old), fast(new)
    embeddings, head = (matrix.weight.data.clone() for matrix in (model.get_input_embeddings(), model.lm_head))
    model.resize_token_embeddings(len(after), mean_resizing=False)
    for i in range(len(before), len(after)):
        pieces = [token.id for token in before.backend_tokenizer.model.tokenize(after.convert_ids_to_tokens(i))]
        model.get_input_embeddings().weight.data[i] = embeddings[pieces].mean(0)
        model.lm_head.weight.data[i] = head[pieces].mean(0)
    model.save_pretrained(output)
    after.save_pretrained(output)


def run(folder: Path, name: str, model: Path, corpora: dict[str, float], steps: int, anchor: dict) -> dict[str, float]:
    """Trains by `vikhr-mistral pretrain`'s function; held-out loss by language, of the first and the last line."""
    from vikhr_mistral.pretrain import pretrain

    output = folder / name.replace(" ", "_").replace(",", "").replace("=", "")
    values = {
        "model": str(model),
        "output_dir": str(output),
        "tokens_dir": str(folder / "tokens"),
        "corpora": {one: {"files": str(folder / f"{one}.txt"), "share": share} for one, share in corpora.items()},
        "held_out": {one: {"files": str(folder / f"{one}-held-out.txt"), "rows": 64} for one in ("en", "ru")},
        "sequence_length": 128,
        "anchor": {**anchor, **({"base_tokenizer": str(folder / "english")} if anchor.get("over") else {})},
        "train": {
            "max_steps": steps, "batch_size": 16, "per_device_batch_size": 16, "learning_rate": 3e-3,
            "warmup_steps": 20, "precision": "float32", "gradient_checkpointing": False, "data_workers": 0,
            "save_every": 0,
        },
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    pretrain(folder / "config.yaml")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    held_out = {one: [line["loss"] for line in lines if line.get("task") == one] for one in ("en", "ru")}
    seconds = [line["step_seconds"] for line in lines if line["kind"] == "train"]
    ends = {f"{one}_before": losses[0] for one, losses in held_out.items()}
    return {**ends, **{one: losses[-1] for one, losses in held_out.items()}, "step_seconds": median(seconds)}


def experiment(folder: Path, steps: tuple[int, int]) -> list[dict]:
    from transformers import MistralConfig, MistralForCausalLM

    write_corpora(folder)
    texts = {one: (folder / f"{one}.txt").read_text("utf-8").split("\n\n") for one in ("en", "ru")}
    english = train_tokenizer(texts["en"], 1500)
    both = extend(english, train_tokenizer(texts["ru"], 1500))
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(fast(english)), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, sliding_window=None,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder / "random")
    fast(english).save_pretrained(folder / "random")
    run(folder, "english run", folder / "random", {"en": 1.0}, steps[0], {})
    (folder / "english").symlink_to(folder / "english_run" / "model")
    extend_model(folder / "english", english, both, folder / "extended")
    results = []
    for name, anchor, replay in RUNS:
        corpora = {"ru": 1 - replay, **({"en": replay} if replay else {})}
        results.append({"name": name, **run(folder, name, folder / "extended", corpora, steps[1], anchor)})
        print(json.dumps(results[-1]), flush=True)
    return results


def table(results: list[dict]) -> str:
    first = results[0]
    lines = [
        "| run | English perplexity | times the start's | Russian loss | against none | s/step |",
        "|---|---|---|---|---|---|",
        f"| before Russian | {math.exp(first['en_before']):.1f} | 1.00 | {first['ru_before']:.3f} | | |",
    ]
    for row in results:
        times, cost = math.exp(row["en"] - first["en_before"]), row["ru"] - first["ru"]
        lines.append(
            f"| {row['name']} | {math.exp(row['en']):.1f} | {times:.2f} | {row['ru']:.3f} | {cost:+.3f} "
            f"| {row['step_seconds']:.2f} |"
        )
    return "\n".join(lines)


def picture(results: list[dict], path: Path) -> None:
    """Left: the weight of the base's distribution in slerp's target. Right: the runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from vikhr_mistral.anchoring import slerp_weight

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    b = torch.linspace(1e-6, 1 - 1e-6, 400, dtype=torch.float64)
    for t in (0.2, 0.4, 0.6, 0.8):
        (line,) = left.plot(b, slerp_weight(t, b.log()), label=f"slerp t={t}")
        left.axhline(t, color=line.get_color(), linestyle=":", linewidth=1)
    left.set(xlabel="b_y: what the base gives to the token that follows", ylabel="weight of the base, w", ylim=(0, 1))
    left.set_title("slerp's weight (dotted: linear's)", fontsize=10)
    left.legend(fontsize=8, loc="center right")
    start = math.exp(results[0]["en_before"])
    for family, marker in (("none", "s"), ("linear", "o"), ("slerp", "^"), ("replay", "D")):
        rows = [row for row in results if row["name"].startswith(family)]
        xs, ys = [row["ru"] for row in rows], [math.exp(row["en"]) for row in rows]
        right.plot(xs, ys, marker=marker, linestyle="-" if family in ("linear", "slerp") else "", label=family)
        for row, x, y in zip(rows, xs, ys, strict=True):
            note = row["name"].removeprefix(family).strip(", ")
            right.annotate(note, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
    right.axhline(start, color="gray", linestyle=":", linewidth=1, label="before Russian")
    right.set(xlabel="Russian held-out loss, nats per token", ylabel="English perplexity", yscale="log")
    right.set_title("what it costs and what it saves", fontsize=10)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=(400, 100), help="of English, of Russian")
    parser.add_argument("--results", type=Path, help="JSON to write, or to read if it is there: no training then")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.results and options.results.exists():
        results = json.loads(options.results.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            results = experiment(Path(folder), tuple(options.steps))
        if options.results:
            options.results.write_text(json.dumps(results, indent=1))
    print(table(results))
    print(f"threads {torch.get_num_threads()}, load {os.getloadavg()[0]:.1f}")
    if options.picture:
        picture(results, options.picture)


if __name__ == "__main__":
    main()
