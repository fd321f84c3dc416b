"""Greedy generation of T5 v1.1 with a cache, beside PyTorch transformers on the same machine in the same run.

    python benchmarks/generate_time.py                      small, float32, batch 8, 64 input tokens, 64 new ones
    python benchmarks/generate_time.py --dtype bfloat16
    python benchmarks/generate_time.py --inputs 512 --json

Random weights on both sides, and no end of a text before the last token: the time does not depend on what is said. Each
side is a process of its own with huge pages for malloc; they take turns, so that other work on the machine meets both
alike. A turn is two calls, of which the first is not timed. transformers runs with its default cache, sdpa attention,
in inference mode, with its weights in the type that is computed in. The floor is what reading each weight of decoder
and output layer once per token takes at the rate at which this machine copies memory.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCABULARY = 32128
SIZES = {  # emb_dim, num_heads, head_dim, mlp_dim, layers of either stack
    "tiny": (64, 4, 16, 128, 2),
    "small": (512, 6, 64, 1024, 8),
    "base": (768, 12, 64, 2048, 12),
}


def tokens(options: argparse.Namespace) -> np.ndarray:
    return np.random.default_rng(0).integers(2, VOCABULARY - 100, (options.batch_size, options.inputs))


class Ours:
    """vikhr-t5: one compiled loop."""

    def __init__(self, options: argparse.Namespace):
        import jax

        from vikhr_t5.model import network
        from vikhr_t5.model.decoding import generate

        d, heads, k, f, layers = SIZES[options.size]
        config = network.T5Config(
            vocab_size=VOCABULARY, dtype=options.dtype, emb_dim=d, num_heads=heads, head_dim=k, mlp_dim=f,
            num_encoder_layers=layers, num_decoder_layers=layers, mlp_activations=("gelu", "linear"), dropout_rate=0.0,
        )  # fmt: skip
        params = jax.jit(lambda: network.init(config, jax.random.key(0)))()
        if options.dtype == "bfloat16":  # as api.load keeps them
            params = jax.tree.map(lambda p: p.astype(options.dtype) if p.ndim > 1 else p, params)
        inputs = jax.numpy.asarray(tokens(options), "int32")
        self.call = lambda: np.asarray(generate(params, config, inputs, options.tokens, eos_id=-1).tokens)[:, 0]


class Theirs:
    """transformers: `generate`."""

    def __init__(self, options: argparse.Namespace):
        import torch
        from transformers import T5Config, T5ForConditionalGeneration

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        d, heads, k, f, layers = SIZES[options.size]
        config = T5Config(
            vocab_size=VOCABULARY, d_model=d, num_heads=heads, d_kv=k, d_ff=f, num_layers=layers,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        model = T5ForConditionalGeneration(config).eval()
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # 5.x ties it
        model = model.to(getattr(torch, options.dtype))
        model.generation_config.eos_token_id = None
        inputs = torch.tensor(tokens(options))
        mask = torch.ones_like(inputs)

        def call() -> np.ndarray:
            with torch.inference_mode():
                found = model.generate(
                    input_ids=inputs,
                    attention_mask=mask,
                    max_new_tokens=options.tokens,
                    do_sample=False,
                    use_cache=True,
                )
            return found[:, 1:].numpy()

        self.call = call


def work(side: str, options: argparse.Namespace) -> None:
    """A worker: a turn for each line read; a JSON line for each answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    say = lambda answer: print(json.dumps(answer), file=answers, flush=True)  # noqa: E731
    runner = Ours(options) if side == "ours" else Theirs(options)
    say({"shape": list(runner.call().shape)})
    for _ in sys.stdin:
        runner.call()
        start = time.perf_counter()
        runner.call()
        say({"seconds": time.perf_counter() - start})


def floor(options: argparse.Namespace) -> float:
    """Seconds to read the decoder's weights and the output layer `options.tokens` times."""
    d, heads, k, f, layers = SIZES[options.size]
    weights = layers * (6 * d * heads * k + 3 * d * f) + d * VOCABULARY  # keys and values of the encoder's are cached
    size = weights * (2 if options.dtype == "bfloat16" else 4)
    source, target = np.ones(2**27, np.uint8), np.empty(2**27, np.uint8)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return options.tokens * size / (2 * source.nbytes / min(times))  # a copy reads and writes


def compare(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    workers = {
        side: subprocess.Popen(
            [sys.executable, __file__, *arguments, "--worker", side],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for side in ("ours", "theirs")
    }  # fmt: skip
    seconds: dict[str, list[float]] = {side: [] for side in workers}
    for worker in workers.values():
        assert worker.stdout is not None
        shape = json.loads(worker.stdout.readline())["shape"]
        assert shape == [options.batch_size, options.tokens], shape
    for _ in range(options.turns):
        for side, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
            seconds[side].append(json.loads(worker.stdout.readline())["seconds"])
    for worker in workers.values():
        worker.communicate()
    count = options.batch_size * options.tokens
    found = {
        side: {"seconds": median(times), "tokens_per_second": count / median(times)} for side, times in seconds.items()
    }
    ratio = found["theirs"]["seconds"] / found["ours"]["seconds"]
    return {**found, "ratio": ratio, "all_seconds": seconds, "floor_seconds": floor(options)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=64, help="tokens of an input")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a row")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options)
    found = compare(options, sys.argv[1:])
    if options.json:
        print(json.dumps(found))
        return None
    shape = f"batch {options.batch_size}, {options.inputs} -> {options.tokens} tokens"
    print(f"T5 v1.1 {options.size}, {options.dtype}, {shape}, {len(os.sched_getaffinity(0))} cores")
    for side, name in (("ours", "vikhr-t5"), ("theirs", "transformers")):
        print(f"  {name:13} {found[side]['seconds']:.3f} s   {found[side]['tokens_per_second']:.0f} tokens/s")
    print(f"  ratio {found['ratio']:.2f}; reading the weights alone takes {found['floor_seconds']:.2f} s")
    return None


if __name__ == "__main__":
    main()
