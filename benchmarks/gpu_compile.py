"""What XLA makes of a training step for a GPU that is not here: memory, and registers of the attention kernels.

    pip install 'jax[cuda13]'                                   the compiler; no card and no driver are needed
    python benchmarks/gpu_compile.py --model xl --batch_size 64
    python benchmarks/gpu_compile.py --model base --batch_size 128 --card A100-80GB
    python benchmarks/gpu_compile.py --batch_size 8 --inputs 1024 --attention_alone

The step is that of gpu_step.py, whose other options hold here too; for a recipe's memory see `vikhr-t5 plan`. Memory is
what XLA's buffer assignment adds up to: arguments, results that do not reuse them, and temporary buffers. Kernels are
assembled by `ptxas`, which must be on the PATH (it comes with CUDA), and which states registers and spills.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from vikhr_t5.devices import DeviceKind, parse_devices  # noqa: E402
from vikhr_t5.errors import UserError  # noqa: E402


def absent(kind: DeviceKind, dump: str) -> Any:
    """One card to compile for; XLA's PTX is left in `dump`."""
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text=false --xla_gpu_autotune_level=0"
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    from vikhr_t5 import plan_compile

    if not plan_compile.has_compiler(kind, 1):
        print(f"XLA's CUDA compiler for {kind.name} is not installed here: pip install 'jax[cuda13]'", file=sys.stderr)
        sys.exit(2)
    return plan_compile.topology(kind, 1)[0]


def compile_on(device: Any, function: Any, arguments: Any) -> Any:
    """The compiled jitted function of arrays like `arguments`."""
    import jax

    here = jax.sharding.SingleDeviceSharding(device)
    shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    return function.lower(*shaped).compile()


def compile_step(options: argparse.Namespace, device: Any) -> Any:
    import jax
    from gpu_step import Ours

    from vikhr_t5.plan_compile import pretended

    options.side, options.variant = "vikhr-t5", options.remat_policy
    with pretended([device]):
        ours = Ours(options)
        sums, key = jax.eval_shape(lambda: (ours.zero_sums(), jax.random.key(0)))
        return compile_on(device, ours.step, (ours.model.abstract_state(), sums, ours.batch, key))


def compile_attention(options: argparse.Namespace, device: Any, attention: str) -> Any:
    """Self-attention of one layer's encoder, forward and backward."""
    import jax
    from gpu_step import t5_config

    from vikhr_t5.model.attention import attention_between
    from vikhr_t5.plan_compile import pretended

    options.side, options.variant, options.attention = "", "", attention
    config = t5_config(options)

    def total(query: Any, key: Any, value: Any, table: Any, segments: Any) -> Any:
        attend = attention_between(config, segments, segments)
        return attend(query, key, value, attend.bias(table)).astype("float32").sum()

    rows = (options.batch_size, options.inputs)
    like = jax.ShapeDtypeStruct((*rows, config.num_heads, config.head_dim), config.dtype)
    table, segments = ((config.num_heads, 32), "float32"), (rows, "int32")
    arguments = (like, like, like, jax.ShapeDtypeStruct(*table), jax.ShapeDtypeStruct(*segments))
    with pretended([device]):
        return compile_on(device, jax.jit(jax.grad(total, (0, 1, 2, 3))), arguments)


def kernels(dump: str, capability: str) -> list[str]:
    """name, registers and spilled bytes of each of our kernels."""
    found = set()
    for path in Path(dump).glob("*.ptx"):
        if name := re.search(r"\.entry _(\w+)_kernel\b", text := path.read_text(encoding="utf-8")):
            architecture = f"sm_{capability.replace('.', '')}" + "a" * (capability == "9.0")
            command = ["ptxas", f"-arch={architecture}", "-v", str(path), "-o", os.devnull]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
            assert registers, said
            assert spilled, said
            tensor = "wgmma" if "wgmma.mma_async" in text else "mma" if "mma.sync" in text else "no tensor cores"
            found.add(f"{name[1]:8s} {registers[1]} registers, {spilled[1]} bytes spilled, {tensor}")
    return sorted(found)


def main() -> None:
    from gpu_step import MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="xl")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--card", default="H100-80GB", help="as `vikhr-t5 plan --devices` has them, Ampere or later")
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--param_dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--optimizer", choices=("adafactor", "adamw"), default="adafactor")
    parser.add_argument("--dropout_rate", type=float, default=0.0)
    parser.add_argument("--attention", choices=("plain", "fused"), default="fused")
    parser.add_argument("--remat_policy", default="matmuls")
    parser.add_argument("--attention_alone", action="store_true", help="one attention, plain and fused")
    options = parser.parse_args()
    try:
        kind, _ = parse_devices(options.card)
    except UserError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as dump:
        device = absent(kind, dump)
        if options.attention_alone:
            print(
                f"one attention of {options.model}, {options.batch_size} x {options.inputs}, temporary memory;",
                kind.name,
            )
            for attention in ("plain", "fused"):
                needs = compile_attention(options, device, attention).memory_analysis()
                print(f"{attention}: {needs.temp_size_in_bytes / 2**20:.0f} MiB")
            return
        needs = compile_step(options, device).memory_analysis()
        state, temporary = needs.argument_size_in_bytes, needs.temp_size_in_bytes
        more = needs.output_size_in_bytes - needs.alias_size_in_bytes
        print(f"{options.model}, batch {options.batch_size}, {options.remat_policy}, {options.attention}; {kind.name}")
        print(f"{(state + temporary + more) / 2**30:.1f} of {kind.memory_gib} GiB:", end=" ")
        print(
            f"{state / 2**30:.1f} state and batch, {temporary / 2**30:.1f} temporary, {more / 2**30:.1f} other results"
        )
        print(*kernels(dump, kind.capability), sep="\n")


if __name__ == "__main__":
    main()
