"""Metrics: from the device's sums to numbers, and from numbers to metrics.jsonl, TensorBoard and Weights & Biases.

A name that t5x also logs has t5x's name in TensorBoard; in metrics.jsonl the names are short.
"""

import contextlib
import dataclasses
import json
import math
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from vikhr_t5.devices import data_sheet_tflops
from vikhr_t5.errors import UserError
from vikhr_t5.files import keep_lines_up_to
from vikhr_t5.train.wandb_log import WandbLog

T5X_NAMES = {
    "loss": "loss_per_nonpadding_target_token",
    "useful_inputs": "non_padding_fraction/encoder",
    "useful_targets": "non_padding_fraction/decoder",
    "steps_per_second": "timing/steps_per_second",
    "target_tokens_per_second": "timing/target_tokens_per_second",
}
MOST_SOURCES = 20  # of a task, each with figures of its own in every line of the log


def summarize(
    sums: Mapping[str, np.ndarray], source_names: Sequence[str], every_source: bool = True
) -> dict[str, float]:
    """The step's or an evaluation's sums (on the host) -> per-token means; of each source that had tokens, too.

    A task of more than `MOST_SOURCES` sources (FLAN's sets, by the hundred) has a mean of all of them; each alone is
    left out unless `every_source`.
    """
    of_task: dict[str, list[int]] = {}
    for i, source in enumerate(source_names, start=1):
        of_task.setdefault(source.partition("/")[0], []).append(i)
    groups = {task: ids for task, ids in of_task.items() if len(ids) > MOST_SOURCES}
    groups |= {
        source: [i]
        for i, source in enumerate(source_names, start=1)
        if every_source or source.partition("/")[0] not in groups
    }
    weight = float(sums["weight"])
    means = {"loss": float(sums["loss"]), "accuracy": float(sums["correct"]), "z_loss": float(sums["z_loss"])}
    summary = {name: total / weight if weight else float("nan") for name, total in means.items()}
    for name, ids in groups.items():
        if weight := float(sums["source_weight"][ids].sum()):
            summary[f"loss/{name}"] = float(sums["source_loss"][ids].sum()) / weight
            summary[f"accuracy/{name}"] = float(sums["source_correct"][ids].sum()) / weight
    return summary


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step takes: rows, inputs and targets length; matmul FLOPs, padding included; FLOP/s of all devices."""

    batch_shape: tuple[int, int, int]
    flops_per_step: float
    flops_per_second: float


def summarize_training(
    sums: Mapping[str, np.ndarray], source_names: Sequence[str], seconds: float, cost: Cost
) -> dict[str, float]:
    """`summarize` without every source, and the speed of the steps in `sums`, which took `seconds` of wall time.

    tokens_per_second counts useful tokens of both sides; mfu is model FLOPs (no recomputation) against the peak.
    """
    steps = int(sums["steps"])
    good = max(steps - int(sums["bad_steps"]), 1)
    rows, inputs_length, targets_length = cost.batch_shape
    inputs, targets = int(sums["inputs"]), int(sums["targets"])
    return {
        **summarize(sums, source_names, every_source=False),
        "learning_rate": float(sums["learning_rate"]),
        "grad_norm": float(sums["grad_norm"]) / good,
        "skipped_steps": int(sums["bad_steps"]),
        "tokens_per_second": (inputs + targets) / seconds,
        "target_tokens_per_second": targets / seconds,
        "step_seconds": seconds / steps,
        "steps_per_second": steps / seconds,
        "mfu": cost.flops_per_step * steps / seconds / cost.flops_per_second,
        "useful_inputs": inputs / (good * rows * inputs_length),
        "useful_targets": targets / (good * rows * targets_length),
        "memory_gib": memory_gib(),
    }


def peak_flops(dtype: str) -> tuple[float, str]:
    """(FLOP/s of one device, where the figure is from): the table, or a matmul of `dtype` timed here."""
    kind = jax.devices()[0].device_kind
    if teraflops := data_sheet_tflops(kind):
        return teraflops * 1e12, f"{kind}: {teraflops} TFLOP/s bf16 by its data sheet"
    size = 1024
    x = jax.device_put(jnp.ones((size, size), dtype), jax.local_devices()[0])
    matmul = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    best = min(_seconds(matmul, x) for _ in range(6))
    # Fake devices share the cores, so one has its share of them.
    flops = 2 * size**3 / best / (jax.local_device_count() if jax.default_backend() == "cpu" else 1)
    return flops, f"{kind}: {flops / 1e12:.3g} TFLOP/s {dtype} measured on a {size} x {size} matmul"


def _seconds(function: Any, x: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(x))
    return time.perf_counter() - start


def memory_gib() -> float:
    """Peak memory so far: of the fullest local accelerator, or of this process where the device is the CPU."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return (max(peaks) or kilobytes * 1024) / 2**30


class MetricsLog:
    """metrics.jsonl and samples.jsonl of a run folder, and TensorBoard events as t5x lays them out; by option, W&B.

    A resumed run first drops the lines past the step that it resumes from, so each step stands once.

    Args:
      folder: the run folder. step: where the run stands.
      wandb_project: see `wandb_log`; None: nothing goes there.
      config_text: the gin configuration, for it.
    """

    def __init__(self, folder: Path, step: int, wandb_project: str | None = None, config_text: str = ""):
        self.folder = folder
        self.resumed_from = step
        self._writers: dict[str, Any] = {}
        self._writes = jax.process_index() == 0  # of several hosts, one
        for name in ("metrics.jsonl", "samples.jsonl") if self._writes else ():
            keep_lines_up_to(folder / name, step)
        self._wandb = None
        if wandb_project and self._writes:
            self._wandb = WandbLog(folder, wandb_project, {"gin": config_text})

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line; the numbers of "train", "eval" and "inference_eval" go to TensorBoard, too (an evaluation's folder
        is its `task`).

        Raises:
          UserError: the line cannot be written (a full disk).
        """
        if not self._writes:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        self._append("metrics.jsonl", {"kind": kind, "step": step, "time": round(time.time(), 3), **plain})
        task = values.get("task", "")
        folder = {"train": "train", "eval": f"training_eval/{task}", "inference_eval": task}.get(kind)
        if folder:
            numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
            prefix = "eval/" if kind == "inference_eval" else ""  # t5x's
            named = {prefix + T5X_NAMES.get(name, name): value for name, value in numbers.items()}
            self._tensorboard(folder, step, named)
            if self._wandb:
                self._wandb.write(step, {f"{folder}/{name}": value for name, value in named.items()})

    def write_samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Lines of samples.jsonl: {"step", "task", "input", "target", "prediction"}. The first is shown on stderr."""
        if not self._writes:
            return
        for sample in samples:
            self._append("samples.jsonl", {"step": step, **sample})
        for part in ("input", "target", "prediction") if samples else ():
            print(f"  {part + ':':11} {samples[0][part][:150]}", file=sys.stderr, flush=True)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        if self._wandb:
            self._wandb.close(failed=sys.exc_info()[0] is not None)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write metrics to {self.folder}: {error.strerror}; make room and run the same command again"
            ) from error

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with self._explained(), open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _tensorboard(self, folder: str, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter  # its EventFileWriter would load TensorFlow

        if folder not in self._writers:
            path = self.folder / folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writers[folder] = RecordWriter(open(path, "ab"))  # noqa: SIM115  closed in `close`
            version = event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")
            self._writers[folder].write(version.SerializeToString())
            # TensorBoard drops what an interrupted run logged past this step.
            status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            start = event_pb2.Event(wall_time=time.time(), step=self.resumed_from + 1, session_log=status)
            self._writers[folder].write(start.SerializeToString())
        summary = summary_pb2.Summary(
            value=[summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary)
        with self._explained():
            self._writers[folder].write(event.SerializeToString())
            self._writers[folder].flush()


def ends_finished(folder: Path) -> bool:
    """Whether the last line of a run folder's metrics.jsonl says that training is finished."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return bool(lines) and '"finished": true' in lines[-1]


def environment(mesh: Mapping[str, int]) -> dict[str, Any]:
    """Of the line at the start of a run; `startup_seconds` counts from the start of the process."""
    return {
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "mesh": dict(mesh),
        "startup_seconds": time.time() - psutil.Process().create_time(),
    }


def _plain(value: Any) -> Any:
    """Seven digits are enough for a metric, and JSON has no NaN."""
    return value if not isinstance(value, float) else float(f"{value:.7g}") if math.isfinite(value) else None
