"""Tokens per second, MFU and memory of a Mistral training step, beside trl's SFTTrainer on the same settings.

    python benchmarks/mistral_step.py                                            a small model, wherever it runs
    python benchmarks/mistral_step.py --size 7b --trainable lora --length 4096   a GPU of 80 GB
    python benchmarks/mistral_step.py --size 7b --trainable full --optimizer paged_adamw_8bit --length 4096

Both sides train random weights of one shape on the same random rows: full rows without padding, so every position
has a target but one; the same batch, accumulation, gradient checkpointing, precision, optimizer and LoRA. Each is a
process of its own, and they take turns. The median over the steps after two that warm up, each from the end of the step
before to its own; `--anchor` adds slerp to our side.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZES = {  # vocabulary, hidden, intermediate, layers, heads, kv heads
    "small": (8000, 256, 896, 4, 4, 2),
    "1b": (40000, 2048, 7168, 16, 16, 8),
    "7b": (40000, 4096, 14336, 32, 32, 8),
}
WARM_UP = 2


def make_model(options: argparse.Namespace, device: str | None = None) -> Any:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    vocabulary, hidden, intermediate, layers, heads, kv_heads = SIZES[options.size]
    config = MistralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        sliding_window=None,
        attn_implementation=options.attention,
        dtype=getattr(torch, options.dtype),
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    with torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")):
        model = MistralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def rows(options: argparse.Namespace) -> list[Any]:
    import numpy as np

    count = options.batch_size * (options.steps + WARM_UP)
    return list(np.random.default_rng(0).integers(3, SIZES[options.size][0], (count, options.length)))


def ours(options: argparse.Namespace, folder: Path) -> list[float]:
    import numpy as np

    from vikhr_mistral.anchoring import AnchorConfig
    from vikhr_mistral.models import LoraConfig, add_adapters
    from vikhr_mistral.reference import Reference
    from vikhr_mistral.training import TrainConfig, train

    model = make_model(options)
    if options.trainable == "lora":
        model = add_adapters("model", model, "lora", LoraConfig(dropout=0.0, embeddings="none"), 0)

    class Rows(list):
        def __getitem__(self, i: int) -> dict[str, Any]:
            ids = super().__getitem__(i)
            zeros = np.zeros_like(ids)
            row = {"input_ids": ids, "position_ids": np.arange(len(ids)), "targets": np.append(ids[1:], -100)}
            return {**row, "source_ids": zeros, "anchored": zeros}

    config = TrainConfig(
        max_steps=options.steps + WARM_UP,
        batch_size=options.batch_size,
        per_device_batch_size=options.per_device_batch_size,
        precision=options.precision,
        optimizer=options.optimizer,
        compile=options.compile,
        data_workers=0,
        log_every=1,
        save_every=0,
    )
    anchor = AnchorConfig("slerp", 0.3) if options.anchor else AnchorConfig()
    reference = Reference() if options.anchor else None
    train(
        config,
        model,
        Rows(rows(options)),
        output_dir=folder,
        attention=options.attention,
        anchor=anchor,
        reference=reference,
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step_seconds"] for line in lines if line["kind"] == "train"]


def theirs(options: argparse.Namespace, folder: Path) -> list[float]:
    import peft
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.anchoring import fast, train_tokenizer
    from vikhr_mistral.models import PROJECTIONS

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.before = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - self.before)
            self.before = time.monotonic()

    names = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=options.steps + WARM_UP,
        per_device_train_batch_size=options.per_device_batch_size,
        gradient_accumulation_steps=options.batch_size // options.per_device_batch_size,
        max_length=options.length,
        bf16=options.precision == "bfloat16",
        gradient_checkpointing=True,
        optim=names[options.optimizer],
        torch_compile=options.compile,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        model=make_model(options),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": [row.tolist() for row in rows(options)]}),
        processing_class=fast(train_tokenizer(["text"], 300)),
        peft_config=lora if options.trainable == "lora" else None,
        callbacks=[Clock()],
    )
    trainer.train()
    return seconds


def one_side(options: argparse.Namespace) -> None:
    import torch

    from vikhr_mistral.metrics import flops_per_token, memory_gib, peak_flops
    from vikhr_mistral.models import LoraConfig, add_adapters

    side = {"ours": ours, "trl": theirs}[options.side]
    with tempfile.TemporaryDirectory() as folder:
        seconds = median(side(options, Path(folder))[WARM_UP:])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"seconds": seconds, "tokens_per_second": options.batch_size * options.length / seconds}
    result["memory_gib"] = memory_gib(device)
    if peak := peak_flops(device):
        model = make_model(options, "meta")
        if options.trainable == "lora":
            model = add_adapters("model", model, "lora", LoraConfig(embeddings="none"), 0)
        result["mfu"] = flops_per_token(model, options.length) * result["tokens_per_second"] / peak
    print("RESULT " + json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--trainable", choices=("full", "lora"), default="full")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--per_device_batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--dtype", default=None, help="of the weights; bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--precision", default=None, help="of the products; as dtype by default")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--anchor", action="store_true", help="slerp on our side; LoRA, whose base is at hand")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.anchor and options.trainable != "lora":
        parser.error("--anchor needs --trainable lora")
    if options.side:
        return one_side(options)
    import torch

    options.dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    options.precision = options.precision or options.dtype
    given = [*sys.argv[1:], "--dtype", options.dtype, "--precision", options.precision]
    results: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    for _ in range(options.turns):
        for side, found in results.items():
            done = subprocess.run(
                [sys.executable, __file__, *given, "--side", side], capture_output=True, text=True, check=False
            )
            line = next((text for text in done.stdout.splitlines() if text.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
            found.append(json.loads(line.removeprefix("RESULT ")))
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, load {os.getloadavg()[0]:.1f}"
    shape = f"{options.size}, {options.trainable}, {options.batch_size} rows of {options.length}"
    print(f"{shape}, {options.precision}; {kind}")
    print("| side | s per step | tokens/s | MFU | peak memory, GiB |\n|---|---|---|---|---|")
    for side, found in results.items():
        best = {name: median(one[name] for one in found) for name in found[0]}
        mfu = f"{best['mfu']:.1%}" if "mfu" in best else "unknown peak"
        print(
            f"| {side} | {best['seconds']:.3f} | {best['tokens_per_second']:.0f} | {mfu} | {best['memory_gib']:.2f} |"
        )


if __name__ == "__main__":
    main()
