"""Peak memory of T5's loss, forward and backward, whole and in chunks of the target length.

    python benchmarks/loss_memory.py                  32 rows of 512 targets, vocabulary 58,368, hidden 768, float32
    python benchmarks/loss_memory.py --rows 8 --chunks none 128 32 --compile_only

Each line is a process of its own. "compiler": XLA's temporary memory, beside inputs and gradients. "process": what the
run adds to the peak of the process over what it holds before, inputs and gradients in place; on a CPU alone.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def measure(options: argparse.Namespace, chunk: int | None) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from vikhr_t5.train.losses import token_losses

    rows, length, d, v = options.rows, options.targets, options.hidden_size, options.vocabulary
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, length, d), options.dtype)
    kernel = jax.random.normal(keys[1], (d, v)) / d**0.5
    targets = jax.random.randint(keys[2], (rows, length), 0, v)

    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return token_losses(hidden, kernel, 1.0, targets, z_loss=1e-4, chunk_size=chunk).loss.mean()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, kernel).compile()
    found = {"compiler": compiled.memory_analysis().temp_size_in_bytes / 2**30}
    if options.compile_only:
        return found
    gradients = [jnp.ones_like(hidden), jnp.ones_like(kernel)]  # the room that the results will take
    jax.block_until_ready(gradients)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del gradients
    start = time.perf_counter()
    value, gradients = jax.block_until_ready(compiled(hidden, kernel))
    found["seconds"] = time.perf_counter() - start
    found["process"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    norms = [float(jnp.linalg.norm(g.astype(jnp.float32).ravel())) for g in gradients]
    return found | {"loss": float(value), "hidden_gradient": norms[0], "kernel_gradient": norms[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--targets", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=58368)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--chunks", nargs="+", default=["none", "128", "64", "32"], help="target positions; none: all")
    parser.add_argument("--compile_only", action="store_true", help="the compiler's figure alone, in seconds")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, None if options.one == "none" else int(options.one))))
        return
    logits = options.rows * options.targets * options.vocabulary * 4 / 2**30
    print(f"[rows, targets, vocabulary] in float32 is {logits:.2f} GiB")
    names = ["compiler"] if options.compile_only else ["compiler", "process", "seconds", "loss"]
    units = {"compiler": ", GiB", "process": ", GiB"}
    print("| chunk | " + " | ".join(name + units.get(name, "") for name in names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for chunk in options.chunks:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", chunk]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # freed arrays leave the process at once
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"chunk {chunk}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout)
        print(f"| {chunk} | " + " | ".join(f"{found[name]:.4g}" for name in names) + " |", flush=True)


if __name__ == "__main__":
    main()
