"""A plan as text and as JSON."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from math import ceil, log2
from typing import Any, NamedTuple

import jax
import psutil

from vikhr_t5.devices import DeviceKind
from vikhr_t5.dry_run import optimizer_text
from vikhr_t5.errors import UserError
from vikhr_t5.plan import Choice, Fit, Plan, Settings, settings_of
from vikhr_t5.plan_time import Schedule, schedule
from vikhr_t5.progress import human
from vikhr_t5.train.metrics import peak_flops

GIB = 2**30
POOL = 0.95  # share of a card that XLA's allocator is given; the rest: CUDA context, libraries' workspaces, NCCL
MARGIN = 1.0  # GiB: fragmentation of that pool
NO_BFLOAT16 = (
    "{name} has no bfloat16: planned in float32. float16 is faster there, but T5's feed-forward output passes its"
    " largest number, 65504 (huggingface/transformers issues 5651 and 14189), so this trainer has no float16."
)


class Usable(NamedTuple):
    """Bytes of one device that a step may take, and how that comes about."""

    bytes: float
    why: str


def usable(kind: DeviceKind | None) -> Usable:
    """None: the devices that are here, of no kind in the table; a CPU's memory is this machine's.

    Raises:
        UserError: an accelerator that does not say how much memory it has.
    """
    if kind is None and jax.default_backend() != "cpu":
        device = jax.devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit is None:
            raise UserError(
                f"{device.device_kind} is not in the table of devices, and does not say how much memory it has:"
                f" plan for devices like it, as --devices {jax.device_count()}xA100-80GB"
            )
        return Usable(limit - MARGIN * GIB, f"{limit / GIB:.1f} GiB that XLA takes, less {MARGIN:g} of margin")
    if kind is None:
        total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
        return Usable(free, f"{total / GIB:.1f} GiB of memory, {free / GIB:.1f} free now")
    if kind.is_tpu:
        return Usable((kind.memory_gib - MARGIN) * GIB, f"{kind.memory_gib:.1f} GiB less {MARGIN:g} of margin")
    return Usable(
        (kind.memory_gib * POOL - MARGIN) * GIB,
        f"{kind.memory_gib:.1f} GiB: {1 - POOL:.0%} left to CUDA and its libraries, {MARGIN:g} GiB of margin",
    )


class Command(NamedTuple):
    """The gin flags that were given, and the macros that a run needs and a plan did without."""

    files: Sequence[str]
    search_paths: Sequence[str]
    bindings: Sequence[str]
    missing: Sequence[str] = ()

    def train(self, flags: Sequence[str], kind: DeviceKind | None) -> str:
        """The command that trains with more gin flags."""
        given = [f"--gin_file={file}" for file in self.files]
        given += [f"--gin_search_paths={paths}" for paths in self.search_paths]
        given += [*(f"--gin.{binding}" for binding in self.bindings), *flags]
        # XLA takes three quarters of a card unless told otherwise.
        environment = f"XLA_PYTHON_CLIENT_MEM_FRACTION={POOL} " if kind and not kind.is_tpu else ""
        return environment + "vikhr-t5 train " + " ".join(_quoted(flag) for flag in given)


@dataclasses.dataclass(frozen=True)
class Report:
    """A plan with everything that is said of it."""

    plan: Plan
    arguments: Mapping[str, Any]
    kind: DeviceKind | None
    count: int
    usable: Usable
    command: Command
    given: Settings
    steps: int
    steps_are: str
    schedule: Schedule | None

    @property
    def devices(self) -> str:
        if self.kind is None:
            return f"{self.count} {jax.devices()[0].device_kind} device(s) here"
        return f"{self.count} x {'TPU ' if self.kind.is_tpu else ''}{self.kind.name}"

    def as_json(self) -> dict[str, Any]:
        """Bytes of one device, seconds, dollars; what is not known is null."""
        config = self.arguments["train_dataset_cfg"]
        best = self.plan.best
        return {
            "devices": self.devices,
            "parameters": self.arguments["model"].config.param_count(),
            "batch_size": config.batch_size,
            "lengths": dict(config.task_feature_lengths),
            "usable_bytes": int(self.usable.bytes),
            "fits": best is not None,
            "as_given": self._fit_json(self.plan.given) if self.plan.given else {"refused": self.plan.refused},
            "best": self._fit_json(best) if best else None,
            "command": self._command() if best else None,
            "command_needs": list(self.command.missing),
            "alternatives": [
                {
                    "optimizer": optimizer_text(choice.optimizer),
                    "param_dtype": choice.param_dtype,
                    "fits": choice.fits,
                    **self._fit_json(choice.fit),
                }
                for choice in self.plan.choices
            ],
            "steps": self.steps,
            "schedule": dataclasses.asdict(self.schedule) if self.schedule else None,
        }

    def _fit_json(self, fit: Fit) -> dict[str, Any]:
        settings = {f.name: getattr(fit.settings, f.name) for f in dataclasses.fields(Settings)}
        return {
            "settings": {**settings, "optimizer": optimizer_text(fit.settings.optimizer)},
            "mesh": dict(fit.mesh),
            "memory_bytes": {**dataclasses.asdict(fit.memory), "total": fit.memory.total},
            "compiled": dataclasses.asdict(fit.compiled) if fit.compiled else None,
            "needs_bytes": fit.needs,
        }

    def _command(self) -> str:
        best = self.plan.best
        return self.command.train(best.settings.flags(self.given), self.kind) if best else ""

    def as_text(self) -> str:
        model, config = self.arguments["model"], self.arguments["train_dataset_cfg"]
        lengths = " + ".join(str(length) for length in config.task_feature_lengths.values())
        lines = [
            f"{human(model.config.param_count())} parameters, {config.batch_size} rows of {lengths} positions",
            f"{self.devices}; one can give a step {self.usable.bytes / GIB:.1f} GiB ({self.usable.why})",
        ]
        if self.kind and not self.kind.has_bfloat16 and self.given.dtype != "float32":
            lines.append(NO_BFLOAT16.format(name=self.kind.name))
        lines += ["", f"as given       {self._given_line()}"]
        best = self.plan.best
        if best is None:
            lines += ["best           nothing that was tried fits", *self._shortfall()]
        elif best is self.plan.given:
            lines.append("best           as given")
        else:
            lines.append(f"best           {self._fit_line(best)}")
        if shown := best or self.plan.given:
            lines += ["", *_memory_lines(shown)]
        lines += ["", *self._choices()]
        if self.schedule and best:
            lines += ["", *self._schedule_lines(self.schedule)]
            missing = f" (and {', '.join(self.command.missing)})" if self.command.missing else ""
            lines += ["", f"Train it with{missing}", f"  {self._command()}"]
        return "\n".join(lines)

    def _given_line(self) -> str:
        if self.plan.given is None:
            return f"not possible here: {self.plan.refused}"
        return self._fit_line(self.plan.given)

    def _fit_line(self, fit: Fit) -> str:
        short = fit.needs - self.usable.bytes
        verdict = "fits" if short <= 0 else f"does not fit, {short / GIB:.1f} GiB too much"
        return f"{verdict}: {fit.needs / GIB:.1f} GiB; {_settings_text(fit)}"

    def _shortfall(self) -> list[str]:
        fit = min((choice.fit for choice in self.plan.choices), key=lambda fit: fit.needs)
        held, more = fit.memory, fit.needs / fit.memory.total  # the compiler may ask for more of each part
        split = (held.parameters + held.gradients + held.optimizer) * more
        room = self.usable.bytes - (held.activations + held.logits) * more
        enough = 2 ** ceil(log2(self.count * split / room)) if room > 0 else 0
        wanted = f"{enough} such devices with fsdp" if enough else "shorter rows, or larger devices,"
        short, how = (fit.needs - self.usable.bytes) / GIB, fit.settings
        return [
            f"               smallest: {fit.needs / GIB:.1f} GiB, {short:.1f} too much, with"
            f" {optimizer_text(how.optimizer)}, {how.param_dtype} parameters; {_settings_text(fit)}",
            f"               {wanted} would do",
        ]

    def _choices(self) -> list[str]:
        head = f"{'optimizer':42}{'parameters':12}{'GiB':>7}  settings"
        rows = [f"{optimizer_text(c.optimizer):42.41}{c.param_dtype:12}{_choice_text(c)}" for c in self.plan.choices]
        return [
            "optimizers and types of parameters, each with the settings that fit best (plan's own figures)",
            head,
            *rows,
        ]

    def _schedule_lines(self, s: Schedule) -> list[str]:
        cost = "no price is known: give --price_per_hour"
        if s.dollars is not None and s.price is not None:
            cost = f"${s.dollars:,.0f}: {self.count} x ${s.price:.2f} an hour ({s.price_from})"
        config = self.arguments["train_dataset_cfg"]
        positions = config.batch_size * sum(config.task_feature_lengths.values())
        time = f"{s.hours / 24:.1f} days" if s.hours >= 48 else f"{s.hours:.1f} hours"
        return [
            f"speed          {human(s.positions_per_second)} tokens/s, {s.sequences_per_second:.1f} rows/s,"
            f" {s.step_seconds:.2f} s a step: MFU {s.mfu:.0%} of {s.peak_tflops:g} TFLOP/s a device",
            f"               matmuls at {s.mfu * s.executed:.0%} of the peak ({s.mfu_from}); {s.executed:.2f} are"
            " executed for each one of the model's",
            f"time           {time} for {self.steps:,} steps{self.steps_are}, {human(self.steps * positions)} tokens",
            f"cost           {cost}",
        ]


def report(
    plan: Plan,
    arguments: Mapping[str, Any],
    kind: DeviceKind | None,
    count: int,
    room: Usable,
    command: Command,
    mfu: float | None,
    price: float | None,
) -> Report:
    """The plan with speed, time and cost of its best settings."""
    model, config = arguments["model"], arguments["train_dataset_cfg"]
    restore = arguments["checkpoint_cfg"].restore
    relative = arguments.get("relative_steps")
    steps = relative or arguments["total_steps"]
    counted = restore is not None and restore.path and not relative
    times = None
    if plan.best is not None:
        dtype, lengths = plan.best.settings.dtype, config.task_feature_lengths
        peak = kind.tflops(dtype) if kind else peak_flops(dtype)[0] / 1e12
        flops = model.config.flops_per_step(config.batch_size, lengths["inputs"], lengths["targets"])
        times = schedule(
            kind=kind,
            peak_tflops=peak,
            dtype=dtype,
            parameters=model.config.param_count(),
            count=count,
            step_flops=flops,
            executed_flops=max(plan.best.flops * count, flops),
            rows=config.batch_size,
            positions=config.batch_size * sum(lengths.values()),
            steps=steps,
            mfu=mfu,
            price=price,
        )
    text = " (if the initial checkpoint is at step 0; TRAIN_STEPS_RELATIVE=N counts from it)"
    return Report(
        plan, arguments, kind, count, room, command, settings_of(arguments), steps, text if counted else "", times
    )


def _quoted(flag: str) -> str:
    """For a shell, as people write it: a gin string keeps its own quotes inside of double ones."""
    name, equals, value = flag.partition("=")
    if "'" in value and not set(value) & set('"$`\\!'):
        return f'{name}{equals}"{value}"'
    return shlex.quote(flag)


def _settings_text(fit: Fit) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in fit.mesh.items() if size > 1) or "one device"
    s = fit.settings
    return f"{mesh}, {s.num_microbatches} microbatches, remat {s.remat_policy}, {s.dtype}"


def _choice_text(choice: Choice) -> str:
    refused = f"does not fit{', says the compiler' if choice.fit.compiled else ''}; at least "
    verdict = "" if choice.fits else refused
    return f"{choice.fit.needs / GIB:7.1f}  {verdict}{_settings_text(choice.fit)}"


def _memory_lines(fit: Fit) -> list[str]:
    lines = ["memory of one device, GiB"]
    for part in dataclasses.fields(fit.memory):
        lines.append(f"  {part.name:20}{getattr(fit.memory, part.name) / GIB:7.2f}")
    lines.append(f"  {'by the plan':20}{fit.memory.total / GIB:7.2f}")
    if fit.compiled:
        c = fit.compiled
        lines.append(
            f"  {'by the compiler':20}{c.peak / GIB:7.2f}  {c.arguments / GIB:.2f} held + {c.temporaries / GIB:.2f}"
            f" temporary ({c.compiler}{'' if c.exact else ': its temporaries are not those of the devices'})"
        )
        if c.process is not None:
            lines.append(
                f"  {'of the process':20}{c.process / GIB:7.2f}  with {c.baseline / GIB:.2f} of Python and XLA"
            )
    return lines
