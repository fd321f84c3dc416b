"""The real train step, compiled ahead of time for devices that are not here; nothing is allocated.

XLA compiles for a kind of device where its compiler is installed: for NVIDIA GPUs with JAX's CUDA plugin (no card and
no driver needed), for TPUs with libtpu. Elsewhere it compiles for as many CPU devices: the sharding, the arguments and
the FLOPs are the same, the temporaries are XLA:CPU's (docs/plan.md says how far those are off).

A process of its own does it (`vikhr-t5 plan` starts itself), since the number of CPU devices is fixed when JAX starts.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import psutil
from jax.experimental import topologies

from vikhr_t5.data.rows import empty_batch
from vikhr_t5.devices import DeviceKind

NUM_SOURCES = 8  # of the batch's tokens, for sums of a few bytes: a plan opens no data
TPU_SLICES = {
    "v4": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4"},
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"},
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of one device, in bytes.

    Attributes:
        compiler: "XLA:GPU for H100-80GB", "XLA:CPU for 4 devices".
        exact: the compiler is that of the devices, so its temporaries are theirs.
        arguments, temporaries, peak: bytes; arguments stay (state, batch), results take their place, temporaries are
            the rest. `peak` is all of it.
        baseline: bytes that the compiling process took with everything loaded and no array allocated; where the
            devices are this machine's CPU, the training process shows that and `peak`.
    """

    compiler: str
    exact: bool
    arguments: int
    temporaries: int
    peak: int
    baseline: int
    on_cpu: bool

    @property
    def process(self) -> int | None:
        """Bytes that the training process will show; None where the devices have a memory of their own."""
        return self.baseline + self.peak if self.exact and self.on_cpu else None


def has_compiler(kind: DeviceKind, count: int) -> bool:
    """Whether XLA's compiler for these devices is installed here."""
    if kind.is_tpu:
        return importlib.util.find_spec("libtpu") is not None and count in TPU_SLICES.get(kind.name, {})
    if kind.name not in GPUS or not importlib.util.find_spec("jax_plugins"):
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))


def compile_step(arguments: Mapping[str, Any], compiler: str, kind: DeviceKind | None) -> Compiled:
    """Compile the step of `loop.train(**arguments)`.

    Args:
        compiler: "here": for the devices that are here; "cpu": for CPU devices in their place; "device": for as many
            of `kind` as JAX shows CPU devices.
    """
    if compiler == "here" or kind is None:
        return _compile(arguments, f"XLA:{jax.default_backend().upper()}, which runs here", exact=True)
    if compiler == "cpu":
        return _compile(arguments, f"XLA:CPU for {jax.device_count()} devices", exact=False)
    with pretended(topology(kind, jax.device_count())):
        return _compile(arguments, f"XLA:{'TPU' if kind.is_tpu else 'GPU'} for {kind.name}", exact=True)


@contextlib.contextmanager
def pretended(devices: Sequence[Any]) -> Iterator[None]:
    """Inside, JAX shows `devices`, by which the model, the mesh and the partitioner choose what they do."""
    backend = "gpu" if devices[0].platform == "cuda" else devices[0].platform
    shown = {"devices": list(devices), "local_devices": list(devices), "device_count": len(devices)}
    with contextlib.ExitStack() as patches:
        for name, value in {**shown, "default_backend": backend}.items():
            patches.enter_context(mock.patch.object(jax, name, return_value=value))
        yield


def stand_ins(kind: DeviceKind, count: int) -> list[Any]:
    """What code that chooses by the kind of its devices reads of them, for devices that nothing is compiled for."""
    memories = [SimpleNamespace(kind="device"), SimpleNamespace(kind="pinned_host")]
    platform = "tpu" if kind.is_tpu else "cuda"
    device = SimpleNamespace(
        platform=platform,
        device_kind=kind.prefixes[0],
        compute_capability=kind.capability,
        addressable_memories=lambda: memories,
    )
    return [device] * count


def _compile(arguments: Mapping[str, Any], compiler: str, exact: bool) -> Compiled:
    compiled = trace_step(arguments).lower().compile()
    bytes_of = compiled.memory_analysis()
    new_results = bytes_of.output_size_in_bytes - bytes_of.alias_size_in_bytes
    given, temporary = bytes_of.argument_size_in_bytes, bytes_of.temp_size_in_bytes
    return Compiled(
        compiler=compiler,
        exact=exact,
        arguments=given,
        temporaries=temporary,
        # Not `peak_memory_in_bytes`: XLA:CPU's has no temporaries in it where arguments are donated.
        peak=given + temporary + new_results,
        baseline=psutil.Process().memory_info().rss,
        on_cpu=jax.default_backend() == "cpu",
    )


def trace_step(arguments: Mapping[str, Any]) -> Any:
    """The jitted step of `loop.train(**arguments)`, traced for shapes."""
    model, partitioner, trainer = (arguments[name] for name in ("model", "partitioner", "trainer"))
    config = arguments["train_dataset_cfg"]
    partitioner.check_batch_size(config.batch_size, trainer.num_microbatches or 1)
    lengths = config.task_feature_lengths
    batch = empty_batch(config.batch_size, lengths["inputs"], lengths["targets"])
    return trainer.traced(model, partitioner, NUM_SOURCES, batch)


# What XLA's GPU compiler asks of a card; the makers' figures, as XLA has them in backends/gpu/target_config: streaming
# multiprocessors, FP32 units in one, shared memory of one and of a block at most, L2, bytes/s, GHz.
GPUS: dict[str, tuple[int, int, int, int, int, float, float]] = {
    "V100-16GB": (80, 64, 98304, 98304, 6291456, 0.898e12, 1.53),
    "V100-32GB": (80, 64, 98304, 98304, 6291456, 0.898e12, 1.53),
    "A100-40GB": (108, 64, 167936, 166912, 41943040, 1.555e12, 1.41),
    "A100-80GB": (108, 64, 167936, 166912, 41943040, 2.039e12, 1.41),
    "H100-80GB": (132, 128, 233472, 232448, 52428800, 3.352e12, 1.98),
    "H200-141GB": (132, 128, 233472, 232448, 52428800, 4.917e12, 1.98),
}


def topology(kind: DeviceKind, count: int) -> Sequence[Any]:
    """`count` devices of `kind` that are not here, to compile for."""
    if kind.is_tpu:
        return topologies.get_topology_desc(f"{kind.name}:{TPU_SLICES[kind.name][count]}", "tpu").devices
    return topologies.get_topology_desc("", "cuda", topology=f"1x1x{count}", target_config=_target(kind)).devices


def _target(kind: DeviceKind) -> str:
    """XLA's GpuTargetConfigProto, as text."""
    cores, units, shared, of_block, l2, bandwidth, clock = GPUS[kind.name]
    major, minor = kind.capability.split(".")
    extension = "feature_extension: ACCELERATED_FEATURES" if major == "9" else ""
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  name: "{kind.prefixes[0]}"  device_memory_size: {int(kind.memory_gib * 2**30)}  memory_bandwidth: {int(bandwidth)}
  core_count: {cores}  fpus_per_core: {units}  clock_rate_ghz: {clock}  l2_cache_size: {l2}
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {of_block}  shared_memory_per_core: {shared}
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  driver_version: "12.8.0"  runtime_version: "12.8.0"  compile_time_toolkit_version: "12.8.0"  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind.prefixes[0]}"
"""
