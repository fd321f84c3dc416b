"""A training step of T5 v1.1 on one GPU, beside PyTorch transformers on the same card: sequences/s, MFU and memory.

    python benchmarks/gpu_step.py --model xl           bfloat16, 512/128: our targets are 45% MFU on an H100 for xl,
    python benchmarks/gpu_step.py --model base         40% for base, and 1.5 times transformers' sequences/s
    python benchmarks/gpu_step.py --model tiny         a few seconds, on a CPU too: whether the command itself works

A step is forward, backward and the optimizer on random tokens: bfloat16 products, float32 parameters (--param_dtype),
no dropout (--dropout_rate). Ours is the step that `vikhr-t5 train` runs. Either side is measured in several variants,
each with the largest of --batch_sizes that its memory takes, in a process of its own; the best of a side is compared.
A variant of ours is a remat policy; transformers runs with sdpa attention, compiled or eager, with or without gradient
checkpointing. Seconds are of several steps on end with one synchronisation, the median of --repeats such runs, after
steps that warm up. MFU counts what the model needs (`T5Config.flops_per_step`: no recomputation), against the data
sheet's dense bfloat16 peak. Each side starts from its own initial values, and so from another loss.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCABULARY, GATED = 32128, ("gelu", "linear")
MODELS = {  # emb_dim, num_heads, mlp_dim, layers of either stack; the head dim is 64
    "tiny": (64, 2, 128, 2),
    "small": (512, 6, 1024, 8),
    "base": (768, 12, 2048, 12),
    "large": (1024, 16, 2816, 24),
    "xl": (2048, 32, 5120, 24),
}
BATCH_SIZES = {"tiny": [4], "small": [512, 256, 128], "base": [256, 128, 64], "large": [128, 64, 32]}
BATCH_SIZES["xl"] = [96, 64, 48, 32, 16, 8]
VARIANTS = {
    "vikhr-t5": ("everything", "matmuls", "attention", "layer_inputs"),
    "transformers": ("compiled", "compiled, checkpointed", "eager", "eager, checkpointed"),
}
LEARNING_RATE = 1e-3
WARM_UP = 3


def t5_config(options: argparse.Namespace) -> Any:
    from vikhr_t5.model.config import T5Config

    d, heads, f, layers = MODELS[options.model]
    remat = options.variant if options.side == "vikhr-t5" else "everything"
    sizes = (VOCABULARY, options.dtype, d, heads, layers, layers, 64, f, GATED, options.dropout_rate)
    return T5Config(*sizes, remat_policy=remat, attention=options.attention)


def random_batch(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = (options.inputs, options.targets)
    inputs, targets = (rng.integers(2, VOCABULARY - 100, (options.batch_size, n), dtype=np.int32) for n in lengths)
    return inputs, targets


class Ours:
    """vikhr-t5's own step, compiled, on donated state."""

    def __init__(self, options: argparse.Namespace):
        import jax

        from vikhr_t5.data.byte_vocabulary import ByteVocabulary
        from vikhr_t5.model import network
        from vikhr_t5.train import optimizers
        from vikhr_t5.train.state import EncoderDecoderModel
        from vikhr_t5.train.step import Trainer, zero_sums

        optimizer = {"adafactor": optimizers.Adafactor, "adamw": optimizers.AdamW}[options.optimizer]()
        ids = ByteVocabulary()  # only its sizes are asked for, and they are overridden
        network_module = network.Transformer(t5_config(options))
        self.model = EncoderDecoderModel(network_module, ids, ids, optimizer, param_dtype=options.param_dtype)
        self.device = jax.devices()[0]
        inputs, targets = random_batch(options)
        ones = np.ones_like(targets)
        self.batch = {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": ones,
            "decoder_source_ids": ones,
        }
        step = Trainer(lambda _: jax.numpy.float32(LEARNING_RATE)).step_function(self.model, 1)
        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.zero_sums = lambda: zero_sums(1)

    def start(self) -> None:
        import jax

        self.batch = jax.device_put(self.batch)
        self.state = jax.jit(self.model.init_state)(jax.random.key(0))
        self.sums, self.key = self.zero_sums(), jax.random.key(1)

    def run(self, steps: int) -> float:
        """The mean loss of all steps so far."""
        for _ in range(steps):
            self.state, self.sums, _ = self.step(self.state, self.sums, self.batch, self.key)
        return float(self.sums["loss"] / self.sums["weight"])

    def peak_gib(self) -> float:
        statistics = self.device.memory_stats()
        return statistics["peak_bytes_in_use"] / 2**30 if statistics else process_peak_gib()


class Theirs:
    """transformers' T5ForConditionalGeneration."""

    def __init__(self, options: argparse.Namespace):
        import torch
        from transformers import T5Config, T5ForConditionalGeneration

        self.torch, self.options = torch, options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        d, heads, f, layers = MODELS[options.model]
        config = T5Config(
            vocab_size=VOCABULARY, d_model=d, num_heads=heads, d_kv=64, d_ff=f, num_layers=layers,
            feed_forward_proj="gated-gelu", dropout_rate=options.dropout_rate, tie_word_embeddings=False,
            decoder_start_token_id=0, use_cache=False,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        with torch.device(self.device):
            model = T5ForConditionalGeneration(config)
        head = model.lm_head.weight.detach().clone()  # transformers 5 ties it whatever the configuration says
        model.lm_head.weight = torch.nn.Parameter(head)
        model = model.to(getattr(torch, options.param_dtype)).train()
        if options.variant.endswith("checkpointed"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = (
            torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
            if options.optimizer == "adamw"
            else torch.optim.Adafactor(model.parameters(), lr=LEARNING_RATE)
        )
        self.model = torch.compile(model) if options.variant.startswith("compiled") else model

    def start(self) -> None:
        inputs, targets = (self.torch.tensor(a, device=self.device).long() for a in random_batch(self.options))
        self.batch = {"input_ids": inputs, "attention_mask": self.torch.ones_like(inputs), "labels": targets}
        self.total, self.steps = 0.0, 0
        low = self.options.dtype == "bfloat16" != self.options.param_dtype
        self.autocast = self.torch.autocast(self.device, self.torch.bfloat16, enabled=low)

    def run(self, steps: int) -> float:
        """The mean loss of all steps so far."""
        for _ in range(steps):
            with self.autocast:
                loss = self.model(**self.batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.total += loss.detach()
            self.steps += 1
        return float(self.total) / self.steps

    def peak_gib(self) -> float:
        return self.torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else process_peak_gib()


def process_peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def work(options: argparse.Namespace) -> dict[str, Any]:
    """One side in one variant with one batch size; "out_of_memory" where that is too large."""
    try:
        began = time.perf_counter()
        runner = Ours(options) if options.side == "vikhr-t5" else Theirs(options)
        runner.start()
        loss = runner.run(WARM_UP)
        ready, seconds = time.perf_counter() - began, []
        for _ in range(options.repeats):
            start = time.perf_counter()
            runner.run(options.steps)
            seconds.append((time.perf_counter() - start) / options.steps)
        return {"seconds": seconds, "peak_gib": runner.peak_gib(), "loss": loss, "start_seconds": ready}
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) or type(error).__name__ == "OutOfMemoryError":
            return {"out_of_memory": True}
        raise


def card(side: str) -> str:
    """The name of the card that a side sees, or "": asked in a process of its own, which would else keep memory."""
    programs = {
        "vikhr-t5": "import jax; d = jax.devices()[0]; print(d.device_kind if d.platform == 'gpu' else '')",
        "transformers": "import torch; c = torch.cuda; print(c.get_device_name() if c.is_available() else '')",
    }
    done = subprocess.run([sys.executable, "-c", programs[side]], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} does not start here:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


def measure(options: argparse.Namespace, side: str, variant: str) -> dict[str, Any]:
    """A variant with the largest batch that fits; {"failed": why} where none does."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    for batch_size in options.batch_sizes or BATCH_SIZES[options.model]:
        worker = ["--worker", side, variant, str(batch_size)]
        command = [sys.executable, __file__, *sys.argv[1:], *worker]
        print(f"{side}, {variant}, batch {batch_size} …", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(done.stderr[-2000:], file=sys.stderr)
            return {"variant": variant, "failed": f"exit code {done.returncode} at batch {batch_size}"}
        result = json.loads(lines[0].removeprefix("RESULT "))
        if "out_of_memory" not in result:
            return {"variant": variant, "batch_size": batch_size, **result}
    return {"variant": variant, "failed": f"out of memory at batch {batch_size}"}


def rates(options: argparse.Namespace, result: dict[str, Any], peak_tflops: float | None) -> dict[str, Any]:
    """Adds sequences/s, tokens/s (of inputs and targets) and MFU to what a worker measured."""
    if "failed" in result:
        return result
    seconds, batch_size = median(result["seconds"]), result["batch_size"]
    flops = t5_config(options).flops_per_step(batch_size, options.inputs, options.targets)
    return {
        **result,
        "sequences_per_second": batch_size / seconds,
        "tokens_per_second": batch_size * (options.inputs + options.targets) / seconds,
        "mfu": flops / seconds / (peak_tflops * 1e12) if peak_tflops else None,
    }


def report(result: dict[str, Any]) -> None:
    print(f"\n{result['setting']}; {result['card'] or 'a CPU'}\n")
    print("| side | variant | batch | s per step (spread) | sequences/s | tokens/s | MFU | peak GiB | first losses |")
    print("|---|---|---|---|---|---|---|---|---|")
    for side, found in result["sides"].items():
        for r in found:
            if "failed" in r:
                print(f"| {side} | {r['variant']} | {r['failed']} |")
                continue
            mfu = f"{r['mfu']:.1%}" if r["mfu"] else "unknown peak"
            spread = f"{median(r['seconds']):.4f} ({min(r['seconds']):.4f}-{max(r['seconds']):.4f})"
            rate = f"{r['sequences_per_second']:.1f} | {r['tokens_per_second']:.0f} | {mfu}"
            figures = f"{r['batch_size']} | {spread} | {rate} | {r['peak_gib']:.1f} | {r['loss']:.3f}"
            print(f"| {side} | {r['variant']} | {figures} |")
    if result["ratio"]:
        print(f"\nours / transformers, the best of each: {result['ratio']:.2f} times the sequences/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="xl")
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=128)
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="tried in this order until one fits")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--param_dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--optimizer", choices=("adafactor", "adamw"), default="adafactor")
    parser.add_argument("--dropout_rate", type=float, default=0.0)
    parser.add_argument("--attention", choices=("auto", "plain", "fused"), default="auto", help="of ours")
    parser.add_argument("--sides", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--variants", nargs="+", help=f"some of {VARIANTS}")
    parser.add_argument("--steps", type=int, default=5, help="between two synchronisations")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.side, options.variant = "", "everything"
    if options.worker:
        options.side, options.variant, options.batch_size = *options.worker[:2], int(options.worker[2])
        return print("RESULT " + json.dumps(work(options)))

    from vikhr_t5.devices import data_sheet_tflops

    cards = {side: card(side) for side in options.sides}
    if options.model != "tiny" and (blind := [side for side, name in cards.items() if not name]):
        needs = {"vikhr-t5": "pip install 'vikhr-t5[cuda]'", "transformers": "a CUDA build of torch"}
        print(f"no GPU is visible to {blind[0]}: this needs one, and {needs[blind[0]]}; --model tiny runs on a CPU",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    name = cards[options.sides[0]]
    peak = data_sheet_tflops(name)
    setting = f"t5 v1.1 {options.model}, {options.inputs}/{options.targets}, {options.dtype}, parameters"
    setting += f" {options.param_dtype}, {options.optimizer}, dropout {options.dropout_rate}"
    result: dict[str, Any] = {"setting": setting, "card": name, "peak_tflops": peak, "sides": {}, "ratio": None}
    for side in options.sides:
        variants = [v for v in VARIANTS[side] if not options.variants or v in options.variants]
        result["sides"][side] = [rates(options, measure(options, side, v), peak) for v in variants]
    rate = lambda found: max((r.get("sequences_per_second", 0) for r in found), default=0)  # noqa: E731
    best = {side: rate(found) for side, found in result["sides"].items()}
    if len(best) == 2 and all(best.values()):
        result["ratio"] = best["vikhr-t5"] / best["transformers"]
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        report(result)
    if not all(best.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
