"""A run: transformers' Trainer over packed rows, with anchored losses, whole checkpoints and our metrics.

The Trainer brings the loop, accelerate's FSDP2, gradient accumulation, mixed precision, compilation and the
optimizers. Ours: the loss (`loss_forward`), checkpoints that are whole or absent and that another number of processes
can go on from (torch.distributed.checkpoint), and metrics.jsonl.

A batch and a step's place in the data depend on the step's number alone, so a resumed run repeats nothing and skips
nothing, on another number of processes, too.

Run folder: metrics.jsonl, run.json (what must stay the same when it goes on), checkpoints/checkpoint-N.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from vikhr_mistral.anchoring import AnchorConfig, TokenLosses
from vikhr_mistral.loss_forward import causal_model, loss_forward
from vikhr_mistral.metrics import MetricsFile, flops_per_token, memory_gib, peak_flops
from vikhr_mistral.packing import IGNORED, Collator
from vikhr_mistral.reference import Reference
from vikhr_t5.errors import UserError
from vikhr_t5.files import atomic_path, write_text_atomic
from vikhr_t5.progress import Progress

CHECKPOINTS = "checkpoints"
STATE = "state"  # of a checkpoint: trained weights and optimizer, as torch.distributed.checkpoint writes them


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; the settings under `train:` of a run's YAML.

    Attributes:
        max_steps: optimizer steps of the run; 0: the command knows (`instruct`: its epochs).
        batch_size: rows of one optimizer step, over all processes and accumulated passes.
        per_device_batch_size: rows of one pass on one device; the accumulation follows.
        learning_rate: the peak; reached again after `warmup_steps` from 0 (re-warming, arXiv:2308.04014).
        min_learning_rate: where the schedule ends, as a share of the peak.
        schedule: after the warm-up: cosine, linear, constant, or wsd (constant, then linear over the last
            `decay_steps`).
        optimizer: adamw is torch's fused one; the 8-bit and paged ones need bitsandbytes.
        precision: of the products; weights that are trained, and their optimizer, stay as they were loaded.
        compile: torch.compile of each layer.
        fsdp: shard weights, gradients and optimizer over the processes (FSDP2).
        loss_chunk: tokens whose logits exist at a time.
        save_every: steps; 0: only where the run ends or is stopped by SIGTERM.
    """

    max_steps: int = 0
    batch_size: int = 32
    per_device_batch_size: int = 1
    learning_rate: float = 1e-4
    min_learning_rate: float = 0.1
    warmup_steps: int = 100
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_steps: int = 0
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    gradient_checkpointing: bool = True
    compile: bool = False
    fsdp: bool = False
    cpu_offload: bool = False
    loss_chunk: int = 1024
    data_workers: int = 2
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if self.max_steps < 0:
            raise ValueError(f"max_steps is {self.max_steps}")
        for name in ("batch_size", "per_device_batch_size", "loss_chunk", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and at least 1 is needed")
        if self.schedule == "wsd" and self.max_steps and not 0 < self.decay_steps <= self.max_steps - self.warmup_steps:
            raise ValueError(
                f"schedule wsd needs decay_steps between 1 and max_steps - warmup_steps, not {self.decay_steps}"
            )
        if self.cpu_offload and not self.fsdp:
            raise ValueError("cpu_offload is a part of fsdp: set fsdp, too")

    def learning_rate_at(self, step: int) -> float:
        """Of step 0, 1, …, as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        begins = self.max_steps - self.decay_steps if self.schedule == "wsd" else self.warmup_steps
        done = min(max(step - begins, 0) / max(self.max_steps - begins, 1), 1.0)
        if self.schedule == "constant":
            done = 0.0
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return 1 - (1 - self.min_learning_rate) * done

    def accumulation(self, world_size: int) -> int:
        """Passes of each process in one step. UserError where batch_size does not divide."""
        steps, rest = divmod(self.batch_size, self.per_device_batch_size * world_size)
        if rest or not steps:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of per_device_batch_size {self.per_device_batch_size} "
                f"times {world_size} process(es)"
            )
        return steps

    def arguments(self, output_dir: Path, evaluates: bool) -> TrainingArguments:
        """As transformers wants it; starts the process group where the launcher asks for several processes."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        sharded = self.fsdp and world_size > 1
        sharding = {"cpu_offload": self.cpu_offload, "activation_checkpointing": self.gradient_checkpointing}
        fused = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
        if self.optimizer != "adamw":
            _need_bitsandbytes(self.optimizer)
        return TrainingArguments(
            output_dir=str(output_dir / CHECKPOINTS),
            max_steps=self.max_steps,
            per_device_train_batch_size=self.per_device_batch_size,
            per_device_eval_batch_size=self.per_device_batch_size,
            gradient_accumulation_steps=self.accumulation(world_size),
            learning_rate=self.learning_rate,
            optim=fused[self.optimizer],
            weight_decay=self.weight_decay,
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
            max_grad_norm=self.max_grad_norm,
            bf16=self.precision == "bfloat16",
            fp16=self.precision == "float16",
            activation_checkpointing=self.gradient_checkpointing and not sharded,
            activation_checkpointing_kwargs={"use_reentrant": False},
            fsdp=sharded or None,  # type: ignore[arg-type]
            fsdp_config=sharding if sharded else None,
            dataloader_num_workers=self.data_workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            seed=self.seed,
            logging_steps=self.log_every,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if evaluates and self.eval_every else "no",
            eval_steps=self.eval_every or None,
            save_strategy="steps" if self.save_every else "no",
            save_steps=self.save_every or 1,
            save_total_limit=self.keep_checkpoints,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        )


def _need_bitsandbytes(setting: str) -> None:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"optimizer {setting} needs the package bitsandbytes: pip install bitsandbytes, or take adamw")


def train(
    config: TrainConfig,
    model: torch.nn.Module,
    train_rows: Any,
    eval_rows: Mapping[str, Sequence[Any]] | None = None,
    *,
    output_dir: str | os.PathLike[str],
    attention: str = "sdpa",
    anchor: AnchorConfig | None = None,
    reference: Reference | None = None,
    shared_size: int | None = None,
    source_names: Sequence[str] = (),
    must_stay: Mapping[str, Any] | None = None,
) -> bool:
    """Trains `model` in place, from the run folder's newest checkpoint if it has one.

    Args:
        model: a causal model of transformers, or a PEFT model around one; what requires a gradient is trained.
        train_rows: rows of `packing`, at least max_steps · batch_size of them.
        eval_rows: rows by name; the cross-entropy of each is logged every `eval_every` steps and at both ends.
        output_dir: the run folder.
        attention: the model's attn_implementation; "flash…" gets rows laid end to end.
        anchor, reference, shared_size: see `anchoring` and `reference`.
        source_names: names of the rows' source_ids, for metrics; none if there is one source.
        must_stay: written at the start; a resumed run whose values differ is refused (base model, data).

    Returns:
        True where the run has ended; False where SIGTERM stopped it: the same command goes on.

    Raises:
        UserError: settings that do not fit together, or a folder of another run.
    """
    folder, anchor = Path(output_dir), anchor or AnchorConfig()
    folder.mkdir(parents=True, exist_ok=True)
    if len(train_rows) < config.max_steps * config.batch_size:
        raise UserError(
            f"the run needs {config.max_steps * config.batch_size} rows (max_steps × batch_size), and there are "
            f"{len(train_rows)}; lower max_steps"
        )
    arguments = config.arguments(folder, bool(eval_rows))
    # Where a run begins: 1. its own newest checkpoint; 2. the model as it was given.
    checkpoints = folder / CHECKPOINTS
    checkpoint = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    step = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    fixed = {"seed": config.seed, "batch_size": config.batch_size, **(must_stay or {})}
    if arguments.process_index == 0:
        _check_same_run(folder / "run.json", fixed, resumed=bool(checkpoint))
    if step >= config.max_steps:  # it ended, and only what follows training is missing
        arguments.max_steps = step
    if config.compile:  # block by block, as torchtitan does: one compilation serves all, and sharding may follow
        for layer in causal_model(model).model.layers:
            layer.compile()
    head = reference.head if reference else None
    with loss_forward(model, anchor, head, shared_size, config.loss_chunk):
        trainer = AnchoredTrainer(
            model=model,
            args=arguments,
            data_collator=Collator(attention),
            train_dataset=train_rows,
            eval_dataset=dict(eval_rows) if eval_rows else None,
            callbacks=[],
        )
        trainer.begin(folder, step, config, anchor, reference if anchor.active else None, source_names)
        with trainer.stopped_by_sigterm():
            trainer.train(resume_from_checkpoint=checkpoint)
        finished = trainer.end()
    if not finished and arguments.process_index == 0:
        print(f"stopped; the same command goes on from {checkpoints}", file=sys.stderr)
    return finished


def _check_same_run(path: Path, fixed: Mapping[str, Any], resumed: bool) -> None:
    if resumed and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in json.loads(json.dumps(fixed)).items():
            if before.get(name) != value:
                raise UserError(
                    f"{path.parent} was begun with {name} = {before.get(name)!r}, and now it is {value!r}; "
                    "go on with the old value, or take another output_dir"
                )
    write_text_atomic(path, json.dumps(fixed, indent=1, ensure_ascii=False))


class AnchoredTrainer(Trainer):
    """transformers' Trainer with our loss, checkpoints and metrics; made by `train`."""

    model: Any
    train_dataset: Any
    eval_dataset: Any
    lr_scheduler: Any

    def begin(
        self,
        folder: Path,
        step: int,
        config: TrainConfig,
        anchor: AnchorConfig,
        reference: Reference | None,
        source_names: Sequence[str],
    ) -> None:
        """What `__init__` has no place for."""
        self.folder, self.config, self.anchor, self.reference = folder, config, anchor, reference
        self.source_names, self.adapters = source_names, self.model
        self.metrics_file = MetricsFile(folder, step, writes=self.is_world_process_zero())
        length = len(self.train_dataset[0]["input_ids"])
        self.flops, self.peak = flops_per_token(self.model, length), peak_flops(self.args.device)
        self.tokens_per_step = length * config.batch_size
        # [sources, (loss, cross-entropy, distance, weight, tokens)] since the last line of metrics.
        self.sums = torch.zeros(max(len(source_names), 1), 5, dtype=torch.float64, device=self.args.device)
        self.logged_at, self.paused, self.logged_step, self.stop = time.monotonic(), 0.0, step, False
        self.pop_callback(PrinterCallback)
        self.add_callback(_Callback(self))
        self.bar = Progress("training", config.max_steps, "steps", done=step)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        kind = torch.cuda.get_device_name() if self.args.device.type == "cuda" else "cpu"
        values = {"parameters": sum(p.numel() for p in self.model.parameters()), "trained_parameters": trained}
        values |= {"total_steps": config.max_steps}
        self.metrics_file.write("start", step, {"devices": self.args.world_size, "device_kind": kind, **values})
        if step == 0 and self.eval_dataset:
            self.args.eval_on_start = True

    @contextlib.contextmanager
    def stopped_by_sigterm(self) -> Iterator[None]:
        """SIGTERM ends the run after its step, with a checkpoint."""

        def stop(number: int, frame: Any) -> None:
            self.stop = True

        before = signal.signal(signal.SIGTERM, stop)
        try:
            with self.bar if self.is_world_process_zero() else contextlib.nullcontext():
                yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def end(self) -> bool:
        """The last lines; True where all steps are done."""
        finished = self.state.global_step >= self.config.max_steps
        if finished and self.eval_dataset and not self.config.eval_every:  # else the Trainer did, at its last step
            self.evaluate()
        self.metrics_file.write("end", self.state.global_step, {"finished": finished})
        return finished

    def create_accelerator_and_postprocess(self) -> None:
        """accelerate (1.15) shards on accelerators only: several CPU processes would silently get DDP, and a run there
        would prove nothing of the other. Its own FSDP2 code does run on gloo."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Our schedule; transformers' begin and end at other places from one to the next."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self._torch_optimizer, self.config.learning_rate_at)
        return self.lr_scheduler

    # ---- loss --------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The sum over this pass's tokens, divided by the step's tokens, so that neither accumulation nor the number
        of processes changes it (FSDP and DDP average over processes: hence the factor)."""
        t = self.anchor.t_at(self.state.global_step, self.config.max_steps)
        base_hidden = None
        if self.reference is not None and t > 0:
            base_hidden = self.reference.hidden(model, self.adapters, inputs)
        losses, index = model(**inputs, t=t, base_hidden=base_hidden)
        self._count(losses, inputs["source_ids"].flatten()[index])
        return losses.loss.sum() / num_items_in_batch * self.args.world_size

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        tokens = sum((batch["targets"] != IGNORED).sum() for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(tokens, dtype=torch.float64, device=device), "sum").clamp(min=1)

    @torch.no_grad()
    def _count(self, losses: TokenLosses, source_ids: torch.Tensor) -> None:
        values = [losses.loss, losses.cross_entropy, losses.distance, losses.weight, torch.ones_like(losses.loss)]
        self.sums.index_add_(0, source_ids.clamp(max=len(self.sums) - 1), torch.stack(values, 1).to(self.sums.dtype))

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of metrics.jsonl; the Trainer calls it every `log_every` steps."""
        if "grad_norm" not in logs:
            return
        step = self.state.global_step
        sums = self.accelerator.reduce(self.sums, "sum").cpu()
        self.sums.zero_()
        seconds = max(time.monotonic() - self.logged_at - self.paused, 1e-9) / max(step - self.logged_step, 1)
        self.logged_at, self.paused, self.logged_step = time.monotonic(), 0.0, step
        values = _means(sums, self.source_names, self.reference is not None)
        values |= {"learning_rate": logs["learning_rate"], "grad_norm": logs["grad_norm"], "step_seconds": seconds}
        values |= {"tokens_per_second": self.tokens_per_step / seconds, "memory_gib": memory_gib(self.args.device)}
        if self.reference is not None:
            values["t"] = self.anchor.t_at(step - 1, self.config.max_steps)
        if self.peak:
            values["mfu"] = self.flops * values["tokens_per_second"] / (self.peak * self.args.world_size)
        self.metrics_file.write("train", step, values)
        if self.is_world_process_zero():
            self.bar.advance(step - self.bar.done, note=f"loss {values['loss']:.3f}")

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The cross-entropy of each held-out corpus: nothing of the base, no dropout."""
        began, model = time.monotonic(), self.model_wrapped
        training, results = model.training, {}
        model.eval()
        for name, rows in self.eval_dataset.items():
            sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            for batch in self._shard(rows):
                losses, _ = model(**self._prepare_inputs(batch))
                sums += torch.stack([losses.cross_entropy.sum(dtype=torch.float64), sums.new_tensor(len(losses.loss))])
            # A pass more than there are rows, so that all processes make equally many, counts nothing.
            total, tokens = self.accelerator.reduce(sums, "sum").tolist()
            results[f"eval_{name}_loss"] = total / max(tokens, 1)
            self.metrics_file.write("eval", self.state.global_step, {"task": name, "loss": total / max(tokens, 1)})
        model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        self.paused += time.monotonic() - began
        return results

    def _shard(self, rows: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """This process's batches of held-out rows; where there are too few, one without targets."""
        size, world, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        for start in range(0, len(rows), size * world):
            own = range(start + rank * size, min(start + (rank + 1) * size, len(rows)))
            if own:
                yield self.data_collator([rows[i] for i in own])
            else:
                empty = self.data_collator([rows[0]])
                yield {**empty, "targets": torch.full_like(empty["targets"], IGNORED)}

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / ".checkpoint")  # beside its place, until it is whole

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began, name = time.monotonic(), f"checkpoint-{self.state.global_step}"
        staging, runs = Path(self._get_output_dir(trial)), self.folder / CHECKPOINTS
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with atomic_path(runs / name) as whole:
                (staging / name).rename(whole)
            rotate_checkpoints(output_dir=str(runs), save_total_limit=self.args.save_total_limit, use_mtime=False)
        self.accelerator.wait_for_everyone()
        self.paused += time.monotonic() - began

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights are a part of the state below; a folder for transformers is written once, when the run has ended."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake
            dcp.save(self._state(), checkpoint_id=os.path.join(output_dir, STATE), no_dist=self.args.world_size == 1)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights come with the optimizer's state, when both are in their places on the devices."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = self._state()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, checkpoint_id=os.path.join(checkpoint, STATE), no_dist=self.args.world_size == 1)
        dcp_state.set_model_state_dict(
            self.model_wrapped, state["model"], options=dcp_state.StateDictOptions(strict=False)
        )
        dcp_state.set_optimizer_state_dict(self.model_wrapped, self._torch_optimizer, state["optimizer"])
        schedule = torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    @property
    def _torch_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _state(self) -> dict[str, Any]:
        """What is trained, and the optimizer's moments; sharded over the processes as they are."""
        options = dcp_state.StateDictOptions(ignore_frozen_params=True)
        return {
            "model": dcp_state.get_model_state_dict(self.model_wrapped, options=options),
            "optimizer": dcp_state.get_optimizer_state_dict(self.model_wrapped, self._torch_optimizer),
        }


class _Callback(TrainerCallback):
    """Ends the run after this step where any process got SIGTERM; starts the clock."""

    def __init__(self, trainer: AnchoredTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **others: Any) -> None:
        self.trainer.logged_at = time.monotonic()
        if args.fsdp and not isinstance(self.trainer.model_wrapped, FSDPModule):
            raise RuntimeError("accelerate has not sharded the model although fsdp is set")

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **others: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps  # the last line is of the last step
        stop = torch.tensor(float(self.trainer.stop), device=args.device)
        if args.world_size > 1:
            stop = self.trainer.accelerator.reduce(stop, "sum")
        if stop:
            print("SIGTERM: saving, then stopping", file=sys.stderr, flush=True)
            control.should_save = control.should_training_stop = True


def _means(sums: torch.Tensor, source_names: Sequence[str], anchored: bool) -> dict[str, float]:
    """Per-token means of all, and of each source that had tokens: `loss` is the cross-entropy, so runs compare."""
    values: dict[str, float] = {}
    for name, row in [("", sums.sum(0)), *((f"/{name}", row) for name, row in zip(source_names, sums, strict=False))]:
        loss, cross_entropy, distance, weight, tokens = row.tolist()
        if tokens:
            values[f"loss{name}"] = cross_entropy / tokens
            if anchored:
                values[f"objective{name}"] = loss / tokens
                values[f"kl{name}"] = distance / tokens
                values[f"anchor_weight{name}"] = weight / tokens
    return values
