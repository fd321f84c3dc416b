"""Time and memory of one training step of T5 v1.1, beside PyTorch transformers on the same machine in the same run.

    python benchmarks/step_time.py                     t5_1_1_small, float32, batch 8, 512/114, dropout 0.1
    python benchmarks/step_time.py --dropout_rate 0    as in pre-training
    python benchmarks/step_time.py --size base --batch_size 4 --dtype bfloat16 --json

A step is forward, backward and Adafactor on the same tokens, with the dropout of fine-tuning, which is the default of
both. Each side is a process of its own with huge pages for malloc. They take turns, so that other work on the machine
meets both alike; a turn is three steps, of which the first is not timed: memory that a side freed may have left the
machine meanwhile. Medians are reported: of wall time, and of processor time, which says more where the machine is
shared. transformers runs with sdpa attention, and under autocast for bfloat16. A third process times the parts of our
step and the rate of a large matmul, which gives the floor: FLOPs of the matmuls divided by that rate.
`taskset -c 0` before the command compares one core.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
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
STEPS_PER_TURN = 3  # the first warms up
MATMUL = (4096, 2048, 4096)


def tokens(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(2, VOCABULARY - 100, (options.batch_size, length)).astype(np.int32)  # noqa: E731
    return draw(options.inputs), draw(options.targets)


class Ours:
    """vikhr-t5: a compiled step on donated state."""

    def __init__(self, options: argparse.Namespace):
        import jax

        from vikhr_t5.model import network
        from vikhr_t5.train.losses import token_losses
        from vikhr_t5.train.optimizers import Adafactor

        d, heads, k, f, layers = SIZES[options.size]
        sizes = (VOCABULARY, options.dtype, d, heads, layers, layers, k, f, GATED, options.dropout_rate)
        self.config = config = network.T5Config(*sizes, remat_policy="minimal")
        self.jax, self.network, self.token_losses = jax, network, token_losses
        self.optimizer = Adafactor()
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
        self.compiled = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, self.key).compile()

    def step(self) -> float:
        done = self.compiled(self.params, self.state, self.key)
        value, self.params, self.state, self.key = self.jax.block_until_ready(done)
        return float(value)

    def parts(self, options: argparse.Namespace, repeats: int) -> dict[str, dict[str, float]]:
        """Forward and backward of each part, the optimizer, and the matmul rate: medians of seconds, FLOPs."""
        jax, network, config = self.jax, self.network, self.config
        inputs, decoder_inputs, targets = self.batch
        encoded = network.encode(self.params, config, inputs)
        hidden = network.decode(self.params, config, encoded, inputs, decoder_inputs, targets)
        total = lambda x: x.astype("float32").sum()  # noqa: E731

        def decoder(params: Any, encoded: Any) -> Any:
            return total(network.decode(params, config, encoded, inputs, decoder_inputs, targets))

        def head(params: Any, hidden: Any) -> Any:
            return self.token_losses(hidden, *network.head(params, config), targets).loss.mean()

        a, b = (jax.random.normal(jax.random.key(0), shape) for shape in (MATMUL[:2], MATMUL[1:]))
        calls: dict[str, tuple[Callable, tuple]] = {
            "encoder": (jax.grad(lambda params: total(network.encode(params, config, inputs))), (self.params,)),
            "decoder": (jax.grad(decoder, (0, 1)), (self.params, encoded)),
            "head": (jax.grad(head, (0, 1)), (self.params, hidden)),
            "optimizer": (
                lambda g, s, p: jax.tree.map(jax.numpy.add, p, self.optimizer.update(g, s, p, LEARNING_RATE)[0]),
                (self.params, self.state, self.params),
            ),
            "matmul": (lambda a, b: a @ b, (a, b)),
        }
        compiled = {name: jax.jit(call).lower(*arguments).compile() for name, (call, arguments) in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats + 1):
            for name, (_, arguments) in calls.items():
                start = time.perf_counter()
                jax.block_until_ready(compiled[name](*arguments))
                seconds[name].append(time.perf_counter() - start)
        forward = config.forward_flops(options.inputs, options.targets)
        flops = {name: 3 * options.batch_size * count for name, count in forward.items()}
        flops["matmul"] = 2 * MATMUL[0] * MATMUL[1] * MATMUL[2]
        return {name: {"seconds": median(times[1:]), "flops": flops.get(name, 0)} for name, times in seconds.items()}


class Theirs:
    """transformers: eager PyTorch, its own Adafactor with the same rule."""

    def __init__(self, options: argparse.Namespace):
        import torch
        from transformers import T5Config, T5ForConditionalGeneration
        from transformers.optimization import Adafactor

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        d, heads, k, f, layers = SIZES[options.size]
        config = T5Config(
            vocab_size=VOCABULARY, d_model=d, num_heads=heads, d_kv=k, d_ff=f, num_layers=layers,
            feed_forward_proj="gated-gelu", dropout_rate=options.dropout_rate, tie_word_embeddings=False,
            decoder_start_token_id=0,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.model = T5ForConditionalGeneration(config).train()
        head = self.model.lm_head.weight.detach().clone()  # transformers 5 ties it whatever the configuration says
        self.model.lm_head.weight = torch.nn.Parameter(head)
        self.optimizer = Adafactor(self.model.parameters(), lr=LEARNING_RATE, relative_step=False)
        inputs, targets = (torch.tensor(array, dtype=torch.long) for array in tokens(options))
        self.batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": targets}
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")

    def step(self) -> float:
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        return loss.item()


def work(side: str, options: argparse.Namespace) -> None:
    """A worker: one step for each line read; a JSON line for each answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    say = lambda answer: print(json.dumps(answer), file=answers, flush=True)  # noqa: E731
    if side == "parts":
        return say(Ours(options).parts(options, repeats=5))
    runner = Ours(options) if side == "ours" else Theirs(options)
    say({"ready": True})
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        loss = runner.step()
        say({"wall": time.perf_counter() - wall, "processor": time.process_time() - processor, "loss": loss})
    say({"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})


def start(side: str, arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = [sys.executable, __file__, *arguments, "--worker", side]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def answer(worker: subprocess.Popen[str]) -> Any:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended with exit code {worker.wait()}")
    return json.loads(line)


def compare(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Both sides in turns."""
    workers = {side: start(side, arguments) for side in ("ours", "theirs")}
    for worker in workers.values():
        answer(worker)
    steps: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    for turn in range(options.turns):
        for side, worker in workers.items():
            assert worker.stdin is not None
            for _ in range(STEPS_PER_TURN):
                worker.stdin.write("step\n")
                worker.stdin.flush()
                steps[side].append(answer(worker))
            shown = ", ".join(f"{step['wall']:.2f}" for step in steps[side][-STEPS_PER_TURN:])
            print(f"turn {turn} {side}: {shown} s", file=sys.stderr)
    result = {}
    for side, worker in workers.items():
        assert worker.stdin is not None
        worker.stdin.close()
        timed = [step for number, step in enumerate(steps[side]) if number % STEPS_PER_TURN]
        result[side] = {
            **{kind: median(step[kind] for step in timed) for kind in ("wall", "processor")},
            "fastest": min(step["wall"] for step in timed),
            "first_loss": steps[side][0]["loss"],
            **answer(worker),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=114)
    parser.add_argument("--dropout_rate", type=float, default=0.1, help="of both; the parts are timed without")
    parser.add_argument("--turns", type=int, default=4, help="of each side")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--worker", choices=("ours", "theirs", "parts"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options)

    result = compare(options, sys.argv[1:])
    parts = answer(start("parts", sys.argv[1:]))
    rate = parts["matmul"]["flops"] / parts.pop("matmul")["seconds"]
    result["ratio"] = {kind: result["theirs"][kind] / result["ours"][kind] for kind in ("wall", "processor", "fastest")}
    result["parts"], result["matmul_gflops_per_second"] = parts, rate / 1e9
    if options.json:
        return print(json.dumps(result, indent=2))

    print(
        f"\nt5 v1.1 {options.size}, {options.dtype}, batch {options.batch_size}, {options.inputs}/{options.targets},"
        f" dropout {options.dropout_rate}\n"
    )
    print("            median s   fastest s   processor s   peak GiB   first loss")
    for side, name in (("ours", "vikhr-t5"), ("theirs", "transformers")):
        r = result[side]
        figures = f"{r['wall']:8.2f} {r['fastest']:11.2f} {r['processor']:13.2f} {r['peak_gib']:10.2f}"
        print(f"{name:12s}{figures} {r['first_loss']:12.3f}")
    ratio = result["ratio"]
    print(f"{'ratio':12s}{ratio['wall']:8.2f} {ratio['fastest']:11.2f} {ratio['processor']:13.2f}\n")
    print(
        f"a float32 matmul of {' x '.join(map(str, MATMUL))} runs at {rate / 1e9:.0f} GFLOP/s here; our parts alone:\n"
    )
    print("            seconds    GFLOP   floor s   of the floor's rate")
    for name, part in parts.items():
        floor = part["flops"] / rate
        shown = f"{part['flops'] / 1e9:8.0f} {floor:9.2f} {floor / part['seconds']:18.0%}" if floor else ""
        print(f"{name:12s}{part['seconds']:7.2f} {shown}")
    whole = sum(part["flops"] for part in parts.values())
    print(f"{'whole step':12s}{result['ours']['wall']:7.2f} {whole / 1e9:8.0f} {whole / rate:9.2f}", end=" ")
    print(f"{whole / rate / result['ours']['wall']:18.0%}")


if __name__ == "__main__":
    main()
