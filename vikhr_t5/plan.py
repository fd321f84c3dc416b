"""`vikhr-t5 plan`: whether a run fits given devices, with which settings, how fast, how long, and for how much.

The settings that change no result (mesh, microbatches, what the backward pass computes again) are searched with the
figures of `plan_memory`; XLA compiles the run as it is given and the best settings (`plan_compile`), and the verdict is
by the compiler's figure. Optimizer and type of parameters change the training, so others are shown beside the given
ones, and chosen only where these do not fit.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from vikhr_t5.devices import DeviceKind
from vikhr_t5.errors import UserError
from vikhr_t5.plan_compile import Compiled
from vikhr_t5.plan_memory import (
    Activations,
    Memory,
    StateBytes,
    activations,
    layer_bytes,
    memory,
    state_bytes,
    with_fields,
)
from vikhr_t5.train.adamw import AdamW
from vikhr_t5.train.optimizers import Adafactor
from vikhr_t5.train.partitioning import MESH_AXES, Partitioner
from vikhr_t5.train.state import EncoderDecoderModel

REMAT_POLICIES = ("everything", "attention", "layer_inputs")  # from the fastest to the smallest
FULL_MICROBATCH = 2048  # positions of both sides on a device below which a card's matmuls are not full
COMPILED_TRIES = 3  # settings that are compiled until one fits


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a plan may choose."""

    num_fsdp: int
    num_tensor: int
    num_microbatches: int
    remat_policy: str
    dtype: str
    param_dtype: str
    optimizer: Any
    num_data: int = -1

    def flags(self, given: "Settings") -> list[str]:
        """gin flags that turn a run with the `given` settings into this one."""
        names = {
            "num_data": "partitioning.Partitioner.num_data",
            "num_fsdp": "partitioning.Partitioner.num_fsdp",
            "num_tensor": "partitioning.Partitioner.num_tensor",
            "num_microbatches": "step.Trainer.num_microbatches",
            "remat_policy": "network.T5Config.remat_policy",
            "dtype": "network.T5Config.dtype",
            "param_dtype": "state.EncoderDecoderModel.param_dtype",
        }
        flags = [
            f"--gin.{name}={getattr(self, field)!r}"
            for field, name in names.items()
            if getattr(self, field) != getattr(given, field)
        ]
        if self.optimizer != given.optimizer:
            flags.append(f"--gin.OPTIMIZER=@optimizers.{type(self.optimizer).__name__}()")
            if isinstance(self.optimizer, AdamW):
                flags.append(f"--gin.optimizers.AdamW.moment_dtype={self.optimizer.moment_dtype!r}")
        return flags


def settings_of(arguments: Mapping[str, Any]) -> Settings:
    """Those of a run `loop.train(**arguments)`."""
    model, partitioner = arguments["model"], arguments["partitioner"]
    return Settings(
        num_fsdp=partitioner.num_fsdp,
        num_tensor=partitioner.num_tensor,
        num_microbatches=arguments["trainer"].num_microbatches or 1,
        remat_policy=model.config.remat_policy,
        dtype=model.config.dtype,
        param_dtype=model.param_dtype,
        optimizer=model.optimizer,
        num_data=partitioner.num_data,
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """One way to run, on one device.

    Attributes:
        memory: part by part, by `plan_memory`.
        flops: matmul FLOPs that one device executes in a step, recomputation too.
        compiled: what XLA says of it; None where it was not asked.
        needs: bytes that the verdict is by: the compiler's figure where it is that of the devices, else the larger.
    """

    settings: Settings
    mesh: Mapping[str, int]
    memory: Memory
    flops: float
    compiled: Compiled | None = None

    @property
    def needs(self) -> int:
        if self.compiled is None:
            return self.memory.total
        if self.compiled.exact:
            return self.compiled.process or self.compiled.peak
        return max(self.compiled.peak, self.memory.total)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best settings with one optimizer and type of parameters; `fits` is False if these are only the smallest: by
    `plan_memory`, or, where by it some do fit, by the compiler."""

    optimizer: Any
    param_dtype: str
    fit: Fit
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """given: the run as the gin files have it, None where they do not suit the devices, as `refused` says.
    best: what to run, or None. choices: by optimizer and type of parameters, the given ones first."""

    given: Fit | None
    refused: str
    best: Fit | None
    choices: Sequence[Choice]


class Planner:
    """Settings of the run `loop.train(**arguments)` on `count` devices.

    Args:
        usable: bytes of one device that a step may take.
        compile_flags: gin flags of settings -> what XLA says.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        kind: DeviceKind | None,
        count: int,
        usable: float,
        compile_flags: Callable[[Sequence[str]], Compiled] | None,
    ):
        self.model: EncoderDecoderModel = arguments["model"]
        self.partitioner: Partitioner = arguments["partitioner"]
        self.config = arguments["train_dataset_cfg"]
        self.kind, self.count, self.usable, self.compile_flags = kind, count, usable, compile_flags
        self.lengths = self.config.task_feature_lengths["inputs"], self.config.task_feature_lengths["targets"]
        self.given = settings_of(arguments)
        self._activations: dict[tuple, Activations] = {}
        self._layers: dict[str, float] = {}
        self._states: dict[tuple, StateBytes] = {}

    def plan(self) -> Plan:
        given, refused = None, ""
        try:
            given = self.evaluate(self.given)
        except UserError as error:
            refused = str(error)
        dtype = self.given.dtype if self.kind is None or self.kind.has_bfloat16 else "float32"
        choices = [self._choose(dtype, optimizer, param_dtype) for optimizer, param_dtype in self._variants()]
        kept = None
        if given is not None and self.given.dtype == dtype:
            given = self._with_compiler(given)
            kept = given if given.needs <= self.usable else None
        for number, choice in enumerate(choices):
            # The first has the given optimizer and type of parameters: for no other is a run changed that fits.
            if kept and (number > 0 or not choice.fits or self._cost(choice.fit) >= self._cost(kept)):
                return Plan(given, refused, kept, choices)
            tried = self._compiled_fits(dtype, choice) if choice.fits else []
            if tried and tried[-1].needs <= self.usable:
                best = kept if kept and self._cost(kept) <= self._cost(tried[-1]) else tried[-1]
                return Plan(given, refused, best, choices)
            if tried:
                choices[number] = dataclasses.replace(choice, fit=min(tried, key=lambda fit: fit.needs), fits=False)
        return Plan(given, refused, None, choices)

    def _compiled_fits(self, dtype: str, choice: Choice) -> list[Fit]:
        """What was compiled, the best first, until one fits: the last. Where the compiler asks for more than
        `plan_memory`, so will it of other settings."""
        fits, more = list(self._fitting(dtype, choice.optimizer, choice.param_dtype)), 1.0
        tried: list[Fit] = []
        for _ in range(COMPILED_TRIES):
            fit = next((fit for fit in fits if fit.memory.total * more <= self.usable), None)
            if fit is None:
                break
            tried.append(self._with_compiler(fit))
            if tried[-1].needs <= self.usable:
                break
            more = max(more * 1.01, tried[-1].needs / fit.memory.total)
        return tried

    def _with_compiler(self, fit: Fit) -> Fit:
        if self.compile_flags is None:
            return fit
        return dataclasses.replace(fit, compiled=self.compile_flags(fit.settings.flags(self.given)))

    def _variants(self) -> Iterator[tuple[Any, str]]:
        """(optimizer, type of parameters): the given ones, then others from the one that changes least."""
        own = self.given.optimizer
        seen = []
        others = (Adafactor(), AdamW(), AdamW(moment_dtype="bfloat16"), AdamW(moment_dtype="8bit"))
        for param_dtype in (self.given.param_dtype, "float32", "bfloat16"):
            for optimizer in (own, *(o for o in others if type(o) is not type(own) or isinstance(own, AdamW))):
                if isinstance(own, AdamW) and isinstance(optimizer, AdamW):
                    optimizer = dataclasses.replace(own, moment_dtype=optimizer.moment_dtype)
                if (optimizer, param_dtype) not in seen:
                    seen.append((optimizer, param_dtype))
                    yield optimizer, param_dtype

    def _choose(self, dtype: str, optimizer: Any, param_dtype: str) -> Choice:
        fit = next(self._fitting(dtype, optimizer, param_dtype), None)
        if fit is not None:
            return Choice(optimizer, param_dtype, fit, True)
        every = list(self._every(dtype, optimizer, param_dtype))
        if not every:
            raise UserError(
                f"batch size {self.config.batch_size} does not divide over any mesh of {self.count} devices: set"
                f" BATCH_SIZE to a multiple of {self.count}"
            )
        return Choice(optimizer, param_dtype, min(every, key=lambda one: one.memory.total), False)

    def _fitting(self, dtype: str, optimizer: Any, param_dtype: str) -> Iterator[Fit]:
        """What fits by `plan_memory`, the best first."""
        fits = [fit for fit in self._every(dtype, optimizer, param_dtype) if fit.memory.total <= self.usable]
        return iter(sorted(fits, key=self._cost))

    def _cost(self, fit: Fit) -> tuple:
        """Less is better: full matmuls, then no work twice, then little communication, then few microbatches."""
        data, fsdp, tensor = (fit.mesh[axis] for axis in MESH_AXES)
        rows = self.config.batch_size // (data * fsdp * fit.settings.num_microbatches)
        small = rows * sum(self.lengths) < FULL_MICROBATCH * tensor
        return small, round(fit.flops / 1e9), tensor, fsdp > 1, fit.settings.num_microbatches, fsdp

    def _every(self, dtype: str, optimizer: Any, param_dtype: str) -> Iterator[Fit]:
        sizes = [n for n in range(1, self.count + 1) if self.count % n == 0]
        for fsdp, tensor in itertools.product(sizes, sizes):
            rows, rest = divmod(self.config.batch_size * tensor, self.count)
            if self.count % (fsdp * tensor) or rest:
                continue
            for microbatches, policy in itertools.product(range(1, rows + 1), REMAT_POLICIES):
                if rows % microbatches == 0:
                    settings = Settings(fsdp, tensor, microbatches, policy, dtype, param_dtype, optimizer)
                    try:
                        yield self.evaluate(settings)
                    except UserError:  # a dimension that this mesh does not divide
                        break

    def evaluate(self, s: Settings) -> Fit:
        """Settings by `plan_memory`. UserError where they do not suit the devices or the batch."""
        data, rest = divmod(self.count, s.num_fsdp * s.num_tensor)
        if rest or s.num_data not in (-1, data):
            raise UserError(
                f"Partitioner's num_data x num_fsdp x num_tensor = {s.num_data} x {s.num_fsdp} x {s.num_tensor}"
                f" does not use {self.count} device(s) exactly"
            )
        mesh = dict(zip(MESH_AXES, (data, s.num_fsdp, s.num_tensor), strict=True))
        partitioner = dataclasses.replace(self.partitioner, num_data=-1, num_fsdp=s.num_fsdp, num_tensor=s.num_tensor)
        vars(partitioner)["mesh"] = AbstractMesh(tuple(mesh.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
        partitioner.check_batch_size(self.config.batch_size, s.num_microbatches)
        config = dataclasses.replace(self.model.config, dtype=s.dtype, remat_policy=s.remat_policy)
        model = with_fields(self.model, config=config, optimizer=s.optimizer, param_dtype=s.param_dtype)

        of_state = s.num_fsdp, s.num_tensor, s.optimizer, s.param_dtype
        if of_state not in self._states:
            self._states[of_state] = state_bytes(model, partitioner)
        of_activations = s.dtype, s.remat_policy
        if s.dtype not in self._layers:
            self._layers[s.dtype] = layer_bytes(model, *self.lengths)
        if of_activations not in self._activations:
            self._activations[of_activations] = activations(model, *self.lengths)
        active = self._activations[of_activations]
        rows = self.config.batch_size // (mesh["data"] * mesh["fsdp"] * s.num_microbatches)
        per_layer, state = self._layers[s.dtype], self._states[of_state]
        held = memory(model, mesh, rows, self.lengths[1], s.num_microbatches, active, per_layer, state)
        return Fit(s, mesh, held, active.flops * self.config.batch_size / self.count)
