"""What XLA makes of a training step for a GPU that is not here: memory, and registers of the attention kernels.

    pip install 'jax[cuda13]'                                   the compiler; no card and no driver are needed
    python benchmarks/gpu_compile.py --model xl --batch_size 64
    python benchmarks/gpu_compile.py --model base --batch_size 128 --card a100 --attention plain

The step is that of gpu_step.py, whose other options hold here too. Memory is what XLA's buffer assignment adds up to:
arguments, results that do not reuse them, and temporary buffers; libraries' workspaces come on top. Kernels are
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

sys.path.insert(0, str(Path(__file__).resolve().parent))

CARDS = {  # capability, multiprocessors, shared memory a multiprocessor and a block, L2, memory and its bytes/s, GHz
    "h100": ("9", "0", 132, 233472, 232448, 52428800, 84942979072, 3352320000000, 1.98, "NVIDIA H100 80GB HBM3"),
    "a100": ("8", "0", 108, 167936, 166912, 41943040, 85050064896, 2039000000000, 1.41, "NVIDIA A100-SXM4-80GB"),
    "rtx4090": ("8", "9", 128, 102400, 101376, 75497472, 25386352640, 1008000000000, 2.52, "NVIDIA GeForce RTX 4090"),
}


def target(card: str) -> str:
    """XLA's description of a card (GpuTargetConfigProto, text)."""
    major, minor, cores, shared, shared_block, l2, memory, bandwidth, clock, name = CARDS[card]
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major == "9" else ""
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: {cores}
      shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_block}
      fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
      cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
      name: "{name}"
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
    """


def compile_step(options: argparse.Namespace, dump: str) -> Any:
    """The compiled step; XLA's PTX is left in `dump`."""
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text=false --xla_gpu_autotune_level=0"
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    import jax
    from gpu_step import Ours
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target(options.card))
    except Exception as error:
        print(f"XLA's CUDA compiler is not installed here ({error}): pip install 'jax[cuda13]'", file=sys.stderr)
        sys.exit(2)
    jax.default_backend = lambda: "gpu"  # by which ops.py chooses between a CPU's and an accelerator's form
    here = jax.sharding.SingleDeviceSharding(topology.devices[0])
    options.side, options.variant = "vikhr-t5", options.remat_policy
    ours = Ours(options)
    arguments = (ours.model.abstract_state(), jax.eval_shape(ours.zero_sums), ours.batch, jax.random.key(0))
    shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    return ours.step.lower(*shaped).compile()


def kernels(dump: str, capability: str) -> list[str]:
    """name, registers and spilled bytes of each of our kernels."""
    found = set()
    for path in Path(dump).glob("*.ptx"):
        if name := re.search(r"\.entry _(\w+)_kernel\b", text := path.read_text(encoding="utf-8")):
            command = ["ptxas", f"-arch={capability}", "-v", str(path), "-o", os.devnull]
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
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--param_dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--optimizer", choices=("adafactor", "adamw"), default="adafactor")
    parser.add_argument("--dropout_rate", type=float, default=0.0)
    parser.add_argument("--attention", choices=("plain", "fused"), default="fused")
    parser.add_argument("--remat_policy", default="matmuls")
    options = parser.parse_args()
    major, minor, *_, memory, _, _, name = CARDS[options.card]
    with tempfile.TemporaryDirectory() as dump:
        needs = compile_step(options, dump).memory_analysis()
        state, temporary = needs.argument_size_in_bytes, needs.temp_size_in_bytes
        more = needs.output_size_in_bytes - needs.alias_size_in_bytes
        print(
            f"t5 v1.1 {options.model}, batch {options.batch_size}, {options.remat_policy}, {options.attention}; {name}"
        )
        print(f"{(state + temporary + more) / 2**30:.1f} of {memory / 2**30:.1f} GiB:", end=" ")
        print(
            f"{state / 2**30:.1f} state and batch, {temporary / 2**30:.1f} temporary, {more / 2**30:.1f} other results"
        )
        print(*kernels(dump, f"sm_{major}{minor}{'a' if major == '9' else ''}"), sep="\n")


if __name__ == "__main__":
    main()
