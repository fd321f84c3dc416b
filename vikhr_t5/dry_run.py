"""`vikhr-t5 train --dry_run`: everything resolved, nothing computed; model, data, mesh and memory in one table."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from vikhr_t5.data.pipeline import DatasetConfig, open_dataset
from vikhr_t5.data.store import CacheMissing, CacheStale, open_cached
from vikhr_t5.errors import UserError
from vikhr_t5.plan_memory import state_bytes
from vikhr_t5.progress import human
from vikhr_t5.train.checkpoint_files import find_checkpoint, read_progress
from vikhr_t5.train.checkpoints import RestoreCheckpointConfig
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.state import EncoderDecoderModel

Rows = list[tuple[str, str]]


def show(arguments: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `train(**arguments)` would do on the devices that are here.

    Raises:
        UserError: what `train` would refuse before its first step: mesh, batch size, lengths, vocabulary.
    """
    model, partitioner = arguments["model"], arguments["partitioner"]
    config, microbatches = arguments["train_dataset_cfg"], arguments["trainer"].num_microbatches or 1
    partitioner.check_batch_size(config.batch_size, microbatches)
    evaluation = arguments.get("train_eval_dataset_cfg") if arguments.get("eval_period", True) else None
    sections: dict[str, Rows] = {
        "model": _model(model),
        "data": _data(model, config),
        "evaluation": _data(model, evaluation) if evaluation else [("none", "")],
        "run": _run(arguments),
        "mesh": _mesh(partitioner, config.batch_size, microbatches),
        "memory of each device": _memory(model, partitioner),
    }
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, rows in sections.items():
        table.add_row(f"[bold]{title}[/]", "")
        for name, value in rows:
            table.add_row(f"  {name}", value)
    (console or Console()).print(table)


def _model(model: EncoderDecoderModel) -> Rows:
    c, v = model.config, model.vocabulary
    ends = f"{'/'.join(c.mlp_activations)}, {'tied' if c.logits_via_embedding else 'untied'}"
    return [
        ("parameters", f"{human(c.param_count())} ({c.param_count():,})"),
        ("layers", f"{c.num_encoder_layers} encoder, {c.num_decoder_layers} decoder"),
        ("width", f"{c.emb_dim}, {c.num_heads} heads x {c.head_dim}, feed-forward {c.mlp_dim} ({ends})"),
        ("compute", f"{c.dtype}, remat {c.remat_policy}, dropout {c.dropout_rate:g}"),
        (
            "vocabulary",
            f"{v.size:,} ids ({v.num_sentinels} sentinels) in {c.vocab_size:,} rows: {v.source}",
        ),
        ("optimizer", optimizer_text(model.optimizer)),
    ]


def optimizer_text(optimizer: Any) -> str:
    """Its name, and what differs from its defaults."""
    changed = [f for f in dataclasses.fields(optimizer) if getattr(optimizer, f.name) != f.default]
    shown = ", ".join(f"{f.name} {getattr(optimizer, f.name)}" for f in changed if f.name != "transformation")
    return type(optimizer).__name__ + (f": {shown}" if shown else "")


def _data(model: EncoderDecoderModel, config: DatasetConfig) -> Rows:
    lengths = config.task_feature_lengths
    rows = [
        ("mixture", f"{config.mixture_or_task_name}/{config.split}"),
        ("lengths", ", ".join(f"{name} {length}" for name, length in lengths.items())),
    ]
    try:
        open_cached(config.cache_dir, config.mixture_or_task_name, config.split, model.vocabulary.fingerprint())
    except (CacheMissing, CacheStale) as reason:
        return [*rows, ("cache", f"{reason}" + ("; `train` caches it first" if config.module else ""))]
    dataset = open_dataset(config, model.vocabulary)
    rows.append(
        ("useful tokens", " and ".join(f"{fill:.1%} of {n}" for fill, n in zip(dataset.fill, lengths, strict=True)))
    )
    for task, rate in dataset.row_rates.items():
        rows.append((task, f"{rate:.1%} of rows; {dataset.num_rows[task]:,} rows in an epoch"))
    return rows


def _run(arguments: Mapping[str, Any]) -> Rows:
    model, config = arguments["model"], arguments["train_dataset_cfg"]
    origin, step, first = _origin(arguments["model_dir"], arguments["checkpoint_cfg"].restore)
    relative = arguments.get("relative_steps")
    end = arguments["total_steps"] if relative is None else first + relative
    steps = max(end - step, 0)
    inputs, targets = config.task_feature_lengths["inputs"], config.task_feature_lengths["targets"]
    flops = model.config.flops_per_step(config.batch_size, inputs, targets)
    positions = config.batch_size * (inputs + targets)
    return [
        ("folder", arguments["model_dir"]),
        ("starts from", origin),
        ("steps", f"{steps:,}, from {step:,} to {end:,}"),
        ("tokens", f"{config.batch_size} rows = {human(positions)} a step, {human(steps * positions)} in all"),
        ("FLOPs", f"{human(flops)} a step, {human(steps * flops)} in all (matmuls, without recomputation)"),
    ]


def _origin(model_dir: str, restore: RestoreCheckpointConfig | None) -> tuple[str, int, int]:
    """In words, its step, and the run's first step.

    The loop's precedence: this run's own checkpoint, the initial one, fresh parameters.
    """
    for path, first in ((model_dir, "first_step"), (restore.path if restore else None, "step")):
        with contextlib.suppress(UserError):
            if path:
                found = find_checkpoint(path)
                progress = read_progress(found)
                return str(found), progress["step"], progress[first]
    if restore is None or not restore.path:
        return "fresh parameters", 0, 0
    state = "converted first" if Path(restore.path).exists() else "which is not there yet"
    return f"{restore.path}, {state}: its step is taken for 0", 0, 0


def _mesh(partitioner: Partitioner, batch_size: int, microbatches: int) -> Rows:
    mesh, device = partitioner.mesh, jax.devices()[0]
    rows = batch_size // partitioner.row_shards // microbatches
    return [
        ("devices", f"{jax.device_count()} {device.device_kind}"),
        ("axes", ", ".join(f"{name} {size}" for name, size in mesh.shape.items())),
        ("rows on each", f"{rows}" + (f" in each of {microbatches} microbatches" if microbatches > 1 else "")),
    ]


def memory(model: EncoderDecoderModel, partitioner: Partitioner) -> dict[str, int]:
    """Bytes of "parameters", "gradients" and "optimizer" on one device, from their shapes and shardings."""
    held = state_bytes(model, partitioner)
    return {name: getattr(held, name) for name in ("parameters", "gradients", "optimizer")}


def _memory(model: EncoderDecoderModel, partitioner: Partitioner) -> Rows:
    parts = memory(model, partitioner)
    rows = [(name, f"{human(size)}B") for name, size in {**parts, "together": sum(parts.values())}.items()]
    return [*rows, ("on top", "activations and logits of one microbatch: `vikhr-t5 plan` says how much")]
