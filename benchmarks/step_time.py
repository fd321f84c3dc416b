"""Time and memory of one training step of T5 v1.1, beside PyTorch transformers on the same machine in the same run.

    python benchmarks/step_time.py                            t5_1_1_small, batch 8, 512/114, float32 and bfloat16
    python benchmarks/step_time.py --size base --batch_size 4
    python benchmarks/step_time.py --compiled --optimizer adamw --json > steps.json

A step is forward, backward and optimizer on the same tokens, like for like: without dropout, as in pre-training, and
with 0.1, as in fine-tuning; Adafactor with the same rule, or AdamW (torch's fused one); huge pages for malloc.
transformers runs with sdpa attention, in bfloat16 under autocast, and with --compiled under torch.compile too.

The sides take turns, so that other work on the machine meets all alike. A turn is a process of its own, which times
some steps after one that warms up. Medians are reported of wall time, and of processor time, which says more where the
machine is shared; a ratio's spread is over the turns. `taskset -c 0` before the command compares one core.
`roofline.py --steps` says how near these steps come to what the machine allows; `--parts` where ours spends its time.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCABULARY, GATED = 32128, ("gelu", "linear")
SIZES = {  # emb_dim, num_heads, head_dim, mlp_dim, layers of either stack
    "tiny": (64, 4, 16, 128, 2),
    "small": (512, 6, 64, 1024, 8),
    "base": (768, 12, 64, 2048, 12),
}
LEARNING_RATE = 1e-3


def tokens(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(2, VOCABULARY - 100, (options.batch_size, length)).astype(np.int32)  # noqa: E731
    return draw(options.inputs), draw(options.targets)


class Ours:
    """vikhr-t5: a compiled step on donated state."""

    def __init__(self, options: argparse.Namespace, dtype: str, dropout_rate: float):
        import jax

        from vikhr_t5.model import network
        from vikhr_t5.train.compiling import compiled, use_compilation_cache
        from vikhr_t5.train.losses import token_losses
        from vikhr_t5.train.optimizers import Adafactor, AdamW

        use_compilation_cache()
        d, heads, k, f, layers = SIZES[options.size]
        sizes = (VOCABULARY, dtype, d, heads, layers, layers, k, f, GATED, dropout_rate)
        self.config = config = network.T5Config(*sizes, remat_policy="matmuls")
        self.jax, self.network, self.token_losses = jax, network, token_losses
        self.optimizer = AdamW() if options.optimizer == "adamw" else Adafactor()
        module = network.Transformer(config)
        inputs, targets = map(jax.numpy.asarray, tokens(options))
        decoder_inputs = jax.numpy.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        self.batch = (inputs, decoder_inputs, targets)

        def loss(params: Any, key: Any) -> Any:
            hidden = module.apply(
                {"params": params}, *self.batch, enable_dropout=True, rngs={"dropout": key}, method="decoder_hidden"
            )
            return token_losses(hidden, *network.head(params, config), targets).loss.mean()

        def step(params: Any, state: Any, key: Any) -> Any:
            key, next_key = jax.random.split(key)
            value, gradients = jax.value_and_grad(loss)(params, key)
            updates, state = self.optimizer.update(gradients, state, params, LEARNING_RATE)
            return value, jax.tree.map(jax.numpy.add, params, updates), state, next_key

        self.params = jax.jit(lambda: network.init(config, jax.random.key(0)))()
        self.state = jax.jit(self.optimizer.init)(self.params)
        self.key = jax.random.key(1)
        self.compiled = compiled(jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, self.key))

    def step(self) -> float:
        done = self.compiled(self.params, self.state, self.key)
        value, self.params, self.state, self.key = self.jax.block_until_ready(done)
        return float(value)

    def parts(self, repeats: int) -> dict[str, float]:
        """Seconds of forward and backward of each part alone, and of the optimizer: medians."""
        jax, network, config = self.jax, self.network, self.config
        inputs, decoder_inputs, targets = self.batch
        encoded = network.encode(self.params, config, inputs)
        hidden = network.decode(self.params, config, encoded, inputs, decoder_inputs, targets)
        total = lambda x: x.astype("float32").sum()  # noqa: E731

        def decoder(params: Any, encoded: Any) -> Any:
            return total(network.decode(params, config, encoded, inputs, decoder_inputs, targets))

        def head(params: Any, hidden: Any) -> Any:
            return self.token_losses(hidden, *network.head(params, config), targets).loss.mean()

        def update(gradients: Any, state: Any, params: Any) -> Any:
            updates, _ = self.optimizer.update(gradients, state, params, LEARNING_RATE)
            return jax.tree.map(jax.numpy.add, params, updates)

        calls = {
            "encoder": (jax.grad(lambda params: total(network.encode(params, config, inputs))), (self.params,)),
            "decoder": (jax.grad(decoder, (0, 1)), (self.params, encoded)),
            "head": (jax.grad(head, (0, 1)), (self.params, hidden)),
            "optimizer": (update, (self.params, self.state, self.params)),
        }
        compiled = {name: jax.jit(call).lower(*arguments).compile() for name, (call, arguments) in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats + 1):
            for name, (_, arguments) in calls.items():
                start = time.perf_counter()
                jax.block_until_ready(compiled[name](*arguments))
                seconds[name].append(time.perf_counter() - start)
        return {name: median(times[1:]) for name, times in seconds.items()}


class Theirs:
    """transformers, with its own Adafactor, which has the same rule, or torch's fused AdamW."""

    def __init__(self, options: argparse.Namespace, dtype: str, dropout_rate: float, compiled: bool = False):
        import torch
        from transformers import T5Config, T5ForConditionalGeneration
        from transformers.optimization import Adafactor

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        d, heads, k, f, layers = SIZES[options.size]
        config = T5Config(
            vocab_size=VOCABULARY, d_model=d, num_heads=heads, d_kv=k, d_ff=f, num_layers=layers,
            feed_forward_proj="gated-gelu", dropout_rate=dropout_rate, tie_word_embeddings=False,
            decoder_start_token_id=0, use_cache=False,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        model = T5ForConditionalGeneration(config).train()
        head = model.lm_head.weight.detach().clone()  # transformers 5 ties it whatever the configuration says
        model.lm_head.weight = torch.nn.Parameter(head)
        if options.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        else:
            self.optimizer = Adafactor(model.parameters(), lr=LEARNING_RATE, relative_step=False)
        inputs, targets = (torch.tensor(array, dtype=torch.long) for array in tokens(options))
        self.batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": targets}
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        self.model = torch.compile(model) if compiled else model

    def step(self) -> float:
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        return loss.item()


def work(options: argparse.Namespace, sides: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """One turn of one side, in this process."""
    side, dtype, dropout_rate = options.worker[0], options.worker[1], float(options.worker[2])
    if side == "parts":
        return Ours(options, dtype, dropout_rate).parts(repeats=5)
    runner = sides[side](options, dtype, dropout_rate)
    steps = []
    for _ in range(options.steps + 1):
        wall, processor = time.perf_counter(), time.process_time()
        loss = runner.step()
        steps.append({"wall": time.perf_counter() - wall, "processor": time.process_time() - processor, "loss": loss})
    return {"steps": steps[1:], "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def turn(side: str, dtype: str, dropout_rate: float) -> dict[str, Any]:
    """The same, in a process of its own."""
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = [sys.executable, *sys.argv, "--worker", side, dtype, str(dropout_rate)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{side}, {dtype}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace, dropout_rate: float, sides: Iterable[str]) -> dict[str, Any]:
    """All sides in turns: {"ours float32": figures, "theirs float32": ..., ...}."""
    turns: dict[str, list[dict[str, Any]]] = {f"{side} {dtype}": [] for dtype in options.dtypes for side in sides}
    for number in range(options.turns):
        for name, done in turns.items():
            done.append(turn(*name.split(), dropout_rate))
            shown = ", ".join(f"{step['wall']:.2f}" for step in done[-1]["steps"])
            print(f"dropout {dropout_rate}, turn {number}, {name}: {shown} s", file=sys.stderr)

    def figures(done: list[dict[str, Any]]) -> dict[str, Any]:
        steps = [step for one in done for step in one["steps"]]
        walls = sorted(step["wall"] for step in steps)
        return {
            "wall": median(walls),
            "from": walls[0],
            "to": walls[-1],
            "processor": median(step["processor"] for step in steps),
            "turns": [median(step["wall"] for step in one["steps"]) for one in done],
            "tokens_per_second": options.batch_size * (options.inputs + options.targets) / median(walls),
            "peak_gib": max(one["peak_gib"] for one in done),
            "loss": steps[0]["loss"],
        }

    return {name: figures(done) for name, done in turns.items()}


def ratios(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times as fast we are: in either type, and our fastest configuration beside their fastest."""
    fastest = {
        ours: min((name for name in result if name.startswith("ours") == ours), key=lambda name: result[name]["wall"])
        for ours in (True, False)
    }
    pairs = {name: (f"ours {name.split()[1]}", name) for name in result if not name.startswith("ours")}
    if (fastest[True], fastest[False]) not in pairs.values():
        pairs["fastest"] = (fastest[True], fastest[False])
    answer = {}
    for label, (ours, theirs) in pairs.items():
        of_turns = [b / a for a, b in zip(result[ours]["turns"], result[theirs]["turns"], strict=True)]
        answer[label] = {
            "ours": ours,
            "theirs": theirs,
            "wall": result[theirs]["wall"] / result[ours]["wall"],
            "from": min(of_turns),
            "to": max(of_turns),
            "processor": result[theirs]["processor"] / result[ours]["processor"],
            "memory": result[ours]["peak_gib"] / result[theirs]["peak_gib"],
        }
    return answer


def show(result: dict[str, Any]) -> None:
    print(f"{'':22s}{'median s':>9s}{'from':>7s}{'to':>7s}{'processor s':>13s}{'tokens/s':>10s}{'peak GiB':>10s}")
    for name, of in result["sides"].items():
        figures = f"{of['wall']:9.2f}{of['from']:7.2f}{of['to']:7.2f}{of['processor']:13.2f}"
        print(f"{name:22s}{figures}{of['tokens_per_second']:10.0f}{of['peak_gib']:10.2f}")
    for of in result["ratios"].values():
        print(
            f"  {of['ours']} is {of['wall']:.2f} times as fast as {of['theirs']} (turns {of['from']:.2f} to"
            f" {of['to']:.2f}; processor {of['processor']:.2f}), with {of['memory']:.0%} of its memory"
        )


def arguments(description: str) -> argparse.ArgumentParser:
    """What every comparison of steps takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--dropout_rates", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=114)
    parser.add_argument("--turns", type=int, default=3, help="of each side")
    parser.add_argument("--steps", type=int, default=3, help="timed in a turn")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "DTYPE", "DROPOUT"), help=argparse.SUPPRESS)
    return parser


def run(options: argparse.Namespace, sides: Mapping[str, Callable[..., Any]], parts: bool = False) -> None:
    """The comparison, or one turn of it. sides: name -> (options, dtype, dropout rate) -> an object with `step()`."""
    if options.worker:
        return print(json.dumps(work(options, sides)))
    runs = []
    for dropout_rate in options.dropout_rates:
        compared = compare(options, dropout_rate, sides)
        runs.append({"dropout_rate": dropout_rate, "sides": compared, "ratios": ratios(compared)})
    seconds = {dtype: turn("parts", dtype, 0.0) for dtype in options.dtypes} if parts else {}
    if options.json:
        about = {name: str(value) for name, value in vars(options).items() if name not in ("worker", "json")}
        return print(json.dumps({**about, "runs": runs, "parts": seconds}, indent=2))
    for one in runs:
        shape = f"batch {options.batch_size}, {options.inputs}/{options.targets}, {options.optimizer}"
        print(f"\nt5 v1.1 {options.size}, {shape}, dropout {one['dropout_rate']}\n")
        show(one)
    for dtype, of in seconds.items():
        print(f"\nparts of ours, {dtype}, s: " + ", ".join(f"{name} {s:.2f}" for name, s in of.items()))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--optimizer", choices=("adafactor", "adamw"), default="adafactor", help="of both")
    parser.add_argument("--compiled", action="store_true", help="transformers under torch.compile too")
    parser.add_argument("--parts", action="store_true", help="also time the parts of our step, without dropout")
    options = parser.parse_args()
    sides: dict[str, Callable[..., Any]] = {"ours": Ours, "theirs": Theirs}
    if options.compiled:
        sides["compiled"] = partial(Theirs, compiled=True)
    run(options, sides, options.parts)


if __name__ == "__main__":
    main()
