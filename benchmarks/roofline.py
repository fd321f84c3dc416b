"""What the machine allows: the floor of a training step of T5 v1.1 at the rates at which its own products run here.

    python benchmarks/roofline.py                       t5_1_1_small, batch 8, 512/114
    python benchmarks/roofline.py --size base --batch_size 4 --json
    python benchmarks/roofline.py --dtypes float32      where the processor has no products of bfloat16

Every product of a step (forward, the gradient of its input, the gradient of its kernel) is timed alone at its own
shape, those of attention for one row of the batch, in float32 and bfloat16, in JAX (as our step writes it) and in
torch; the best of the repeats counts. A library's floor is the sum over all products of FLOPs / rate: a step of nothing
but matmuls, to which norms, softmax, masks, the optimizer and memory can only add. The machine's floor takes the faster
library for each product.

`--steps FILE` (what `step_time.py --json` printed on the same machine) adds how near either side's steps come, and how
many times as fast as theirs a step at the machine's floor would be: no more than that can be won here.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

DTYPES = ("float32", "bfloat16")
LIBRARIES = ("jax", "torch")
VOCABULARY = 32128
CALLS = 4  # that are timed together, so that JAX's dispatch does not count


class Product(NamedTuple):
    """One kind of matmul [rows, inner] x [inner, columns], for each of `heads`, and how often a step has it."""

    part: str  # "encoder", "decoder" or "head"
    name: str
    heads: int  # of one row of the batch; 1: not of attention
    rows: int
    inner: int
    columns: int
    count: int  # in the forward pass; the backward pass has it twice, once for each side's gradient

    @property
    def flops(self) -> int:
        return 2 * self.heads * self.rows * self.inner * self.columns


def products(size: tuple[int, int, int, int, int], batch: int, inputs: int, targets: int) -> list[Product]:
    """The products of a forward pass. size: emb_dim, num_heads, head_dim, mlp_dim, layers of either stack."""
    d, heads, k, f, layers = size

    def dense(part: str, name: str, length: int, inner: int, columns: int, count: int) -> Product:
        return Product(part, name, 1, batch * length, inner, columns, count)

    def attention(part: str, name: str, queries: int, keys: int) -> list[Product]:
        return [
            Product(part, f"{name}: logits", heads, queries, k, keys, layers * batch),
            Product(part, f"{name}: weights x values", heads, queries, keys, k, layers * batch),
        ]

    def stack(part: str, length: int) -> list[Product]:
        return [
            dense(part, "query, key, value", length, d, heads * k, 3 * layers),
            *attention(part, "self-attention", length, length),
            dense(part, "out", length, heads * k, d, layers),
            dense(part, "wi_0, wi_1", length, d, f, 2 * layers),
            dense(part, "wo", length, f, d, layers),
        ]

    return [
        *stack("encoder", inputs),
        *stack("decoder", targets),
        dense("decoder", "cross query", targets, d, heads * k, layers),
        dense("decoder", "cross key, value", inputs, d, heads * k, 2 * layers),
        *attention("decoder", "cross-attention", targets, inputs),
        dense("decoder", "cross out", targets, heads * k, d, layers),
        dense("head", "logits", targets, d, VOCABULARY, 1),
    ]


def calls(library: str, dtype: str, product: Product) -> list[Callable[[], Any]]:
    """The three products: forward, gradient of the left side, gradient of the right side."""
    _, _, heads, rows, inner, columns, _ = product
    if library == "torch":
        import torch

        shapes = [(heads, rows, inner), (heads, inner, columns), (heads, rows, columns)]
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        x, w, g = (torch.randn(shape).squeeze(0).to(getattr(torch, dtype)) for shape in shapes)
        return [lambda: x @ w, lambda: g @ w.mT, lambda: x.mT @ g]

    import jax
    import jax.numpy as jnp

    from vikhr_t5.model.ops import OVER_KEYS, OVER_QUERIES, QUERY_KEYS
    from vikhr_t5.model.products import trained_einsum

    def random(*shape: int) -> Any:
        return jax.random.normal(jax.random.key(0), shape).astype(dtype)

    low = jnp.dtype(dtype)
    # As the step has them: rows of a batch apart, in attention heads apart; kernels' gradients and logits in float32.
    if heads == 1:
        x, w, g = random(2, rows // 2, inner), random(inner, columns), random(2, rows // 2, columns)
        result = jnp.float32 if product.part == "head" else low
        triples = [("...d,df->...f", x, w, result), ("...f,df->...d", g, w, low), ("...d,...f->df", x, g, jnp.float32)]
    elif product.name.endswith("logits"):
        q, k, g = random(rows, heads, inner), random(columns, heads, inner), random(heads, rows, columns)
        triples = [(QUERY_KEYS, q, k, jnp.float32), (OVER_KEYS, g, k, low), (OVER_QUERIES, g, q, low)]
    else:
        w, v, g = random(heads, rows, inner), random(inner, heads, columns), random(rows, heads, columns)
        triples = [(OVER_KEYS, w, v, jnp.float32), (QUERY_KEYS, g, v, jnp.float32), (OVER_QUERIES, w, g, low)]
    pairs = [(partial(trained_einsum, formula, dtype=result), a, b) for formula, a, b, result in triples]
    compiled = [(jax.jit(f).lower(*pair).compile(), pair) for f, *pair in pairs]
    return [lambda f=f, pair=pair: f(*pair) for f, pair in compiled]  # type: ignore[misc]


def best(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call: the fastest of `repeats` times `CALLS` of them, after some that warm up."""

    def seconds() -> float:
        start = time.perf_counter()
        results = [call() for _ in range(CALLS)]
        for result in results:
            getattr(result, "block_until_ready", lambda: None)()  # JAX returns before it has computed
        return (time.perf_counter() - start) / CALLS

    seconds()
    return min(seconds() for _ in range(repeats))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each product: its FLOPs in a step, and for each library and type the seconds of forward, d left, d right."""
    from step_time import SIZES

    kinds = products(SIZES[options.size], options.batch_size, options.inputs, options.targets)
    rows = [{**product._asdict(), "flops": product.flops, "seconds": {}} for product in kinds]
    for library in LIBRARIES:
        for dtype in options.dtypes:
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", library, dtype]
            environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            for row, seconds in zip(rows, json.loads(done.stdout), strict=True):
                row["seconds"][f"{library} {dtype}"] = seconds
            print(f"measured {library} {dtype}", file=sys.stderr)
    return rows


def floors(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of the products alone, by library and type (and "fastest", the faster library for each), by part."""

    def total(pick: Callable[[dict[str, list[float]]], list[float]], part: str | None) -> float:
        return sum(sum(pick(row["seconds"])) * row["count"] for row in rows if part in (None, row["part"]))

    result = {}
    for dtype in (dtype for dtype in DTYPES if f"jax {dtype}" in rows[0]["seconds"]):
        picks: dict[str, Callable] = {
            f"{library} {dtype}": (lambda seconds, name=f"{library} {dtype}": seconds[name]) for library in LIBRARIES
        }
        picks[f"fastest {dtype}"] = lambda seconds, dtype=dtype: [
            min(pair) for pair in zip(*(seconds[f"{library} {dtype}"] for library in LIBRARIES), strict=True)
        ]
        for name, pick in picks.items():
            result[name] = {part: total(pick, part) for part in ("encoder", "decoder", "head")}
            result[name]["step"] = total(pick, None)
    return result


def main() -> None:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "small", "base"), default="small")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=114)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=Path, help="what `step_time.py --json` printed: how near its steps come")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("LIBRARY", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        from step_time import SIZES

        kinds = products(SIZES[options.size], options.batch_size, options.inputs, options.targets)
        return print(json.dumps([[best(f, options.repeats) for f in calls(*options.worker, kind)] for kind in kinds]))

    rows = measure(options)
    floor = floors(rows)
    flops = sum(3 * row["flops"] * row["count"] for row in rows)
    runs = json.loads(options.steps.read_text())["runs"] if options.steps else []
    if options.json:
        return print(json.dumps({"products": rows, "floors": floor, "flops": flops}, indent=2))
    print(f"\nt5 v1.1 {options.size}, batch {options.batch_size}, {options.inputs}/{options.targets}:", end=" ")
    print(f"{flops / 1e9:.0f} GFLOP a step; GFLOP/s of each product: forward / d left / d right\n")
    names = list(rows[0]["seconds"])
    print(f"{'':38s}{'share':>6s}" + "".join(f"{name:>20s}" for name in names))
    for row in rows:
        rates = ("/".join(f"{row['flops'] / s / 1e9:.0f}" for s in row["seconds"][name]) for name in names)
        share = 3 * row["flops"] * row["count"] / flops
        print(f"{row['part'] + ', ' + row['name']:38s}{share:6.1%}" + "".join(f"{rate:>20s}" for rate in rates))
    print(f"\n{'floor, s':20s}" + "".join(f"{part:>10s}" for part in next(iter(floor.values()))) + "   mean GFLOP/s")
    for name, of in floor.items():
        print(f"{name:20s}" + "".join(f"{s:10.2f}" for s in of.values()) + f"{flops / of['step'] / 1e9:15.0f}")
    for run in runs:
        print(f"\ndropout {run['dropout_rate']}")
        for name, side in run["sides"].items():
            library, dtype = "jax" if name.startswith("ours") else "torch", name.split()[1]
            if dtype not in options.dtypes:
                continue
            own, machine = (floor[f"{kind} {dtype}"]["step"] for kind in (library, "fastest"))
            print(f"{name:20s}{side['wall']:6.2f} s, {own / side['wall']:.0%} of {library}'s floor;", end=" ")
            print(f"the machine's floor is {side['wall'] / machine:.2f} times as fast")


if __name__ == "__main__":
    main()
