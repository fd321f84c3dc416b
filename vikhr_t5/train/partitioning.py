"""Which device holds what: a mesh of data x fsdp x tensor, and rules from logical axes to mesh axes.

The batch is split over data and fsdp together. fsdp also splits every parameter along its model dimension (and gathers
it where it is used); tensor splits heads, feed-forward and vocabulary. XLA's partitioner (GSPMD, 2105.04663) derives
the communication from these shardings alone, so the step is written as for one device. Between its layers activations
are split by rows and, over tensor, by length; see `network`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vikhr_t5.errors import UserError, nearest
from vikhr_t5.train.state import EncoderDecoderModel, TrainState

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

MESH_AXES = ("data", "fsdp", "tensor")
STANDARD_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("length", "tensor"),  # of what goes from layer to layer
    ("embed", "fsdp"),
    ("joined_kv", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("heads", None),  # the relative biases: too small to be worth a split
    ("relpos_buckets", None),
)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh over all devices of all hosts.

    Args:
      num_data, num_fsdp, num_tensor: sizes of the mesh axes; num_data -1 takes the devices that the others leave.
      logical_axis_rules: (logical axis, mesh axis, several of them, or None for "not split"); every logical axis
        of the model's parameters must be named.
      optimizer_memory: where the optimizer's state rests between updates: "device", or "pinned_host", the host's
        memory, from where each step fetches it.

    Raises (at first use):
      UserError: the mesh does not fit the devices, a rule names an unknown mesh axis, or the devices have no access
        to host memory.
    """

    num_data: int = -1
    num_fsdp: int = 1
    num_tensor: int = 1
    logical_axis_rules: Rules = STANDARD_RULES
    optimizer_memory: str = "device"

    def __post_init__(self) -> None:
        if self.optimizer_memory not in ("device", "pinned_host"):
            known = nearest(self.optimizer_memory, ["device", "pinned_host"])
            raise UserError(f"Partitioner.optimizer_memory {self.optimizer_memory!r} ({known})")

    @cached_property
    def mesh(self) -> Mesh:
        devices = jax.device_count()
        fixed = self.num_fsdp * self.num_tensor
        data = devices // max(fixed, 1) if self.num_data == -1 else self.num_data
        if data * fixed != devices or min(data, self.num_fsdp, self.num_tensor) < 1:
            raise UserError(
                f"a mesh of data x fsdp x tensor = {self.num_data} x {self.num_fsdp} x {self.num_tensor} does not use"
                f" the {devices} device(s) here exactly: set Partitioner.num_fsdp and num_tensor to divide {devices}"
            )
        shape, auto = (data, self.num_fsdp, self.num_tensor), (AxisType.Auto,) * 3
        return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=jax.devices())

    @property
    def row_shards(self) -> int:
        """In how many parts the rows of a batch are divided."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def replicated(self) -> NamedSharding:
        """The same value on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """Rows split over data and fsdp; what follows the first axis is whole."""
        return NamedSharding(self.mesh, PartitionSpec(self._mesh_axes("batch", "the batch")))

    def shardings(self, axes: Any, shapes: Any) -> Any:
        """A tree of shardings.

        Args:
          axes: a tree with a tuple of logical axis names for each array of `shapes`.
          shapes: arrays or `jax.ShapeDtypeStruct`s.

        Raises:
          UserError: no rule for a logical axis, or a dimension that its mesh axes do not divide; names the parameter.
        """

        def sharding(path: tuple, shaped: Any, names: tuple[str | None, ...]) -> NamedSharding:
            parameter = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
            spec = [self._mesh_axes(name, parameter) for name in names]
            for name, size, over in zip(names, shaped.shape, spec, strict=True):
                parts = math.prod(self.mesh.shape[axis] for axis in over)
                if size % parts:
                    raise UserError(
                        f"{parameter} {list(shaped.shape)}: its axis {name!r} of {size} does not divide over the"
                        f" mesh's {' x '.join(over)} = {parts}: change the mesh or Partitioner.logical_axis_rules"
                    )
            return NamedSharding(self.mesh, PartitionSpec(*(over or None for over in spec)))

        return jax.tree_util.tree_map_with_path(sharding, shapes, axes)

    def state_shardings(self, model: EncoderDecoderModel) -> TrainState:
        """Where every array of `model.abstract_state()` rests between two steps. Raises as `shardings`."""
        shapes = model.abstract_state()
        shardings: TrainState = self.shardings(model.state_axes(), shapes)
        if self.optimizer_memory == "device":
            return shardings
        if self.optimizer_memory not in {memory.kind for memory in jax.local_devices()[0].addressable_memories()}:
            raise UserError(
                f"Partitioner.optimizer_memory 'pinned_host': {jax.default_backend()} devices cannot reach the host's"
                " memory here: use 'device'"
            )

        def rests(shape: Any, sharding: NamedSharding) -> NamedSharding:  # counters are not worth a transfer
            return sharding.with_memory_kind(self.optimizer_memory) if shape.ndim else sharding

        return shardings._replace(opt_state=jax.tree.map(rests, shapes.opt_state, shardings.opt_state))

    def jit(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """`jax.jit` of a function of the model; activations inside of it follow the mesh and the rules."""

        @functools.wraps(function)
        def on_mesh(*values: Any) -> Any:
            rules = nn.logical_axis_rules(self.logical_axis_rules)
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh), rules:
                return function(*values)

        return jax.jit(on_mesh, **arguments)

    def check_batch_size(self, batch_size: int, num_microbatches: int = 1) -> None:
        """UserError, with the numbers, where a batch does not divide over the mesh and its microbatches."""
        data, fsdp = self.mesh.shape["data"], self.mesh.shape["fsdp"]
        unit = self.row_shards * num_microbatches
        if batch_size % unit:
            raise UserError(
                f"batch size {batch_size} does not divide over data x fsdp x microbatches ="
                f" {data} x {fsdp} x {num_microbatches} = {unit}: use a multiple of {unit}"
            )

    def process_rows(self, batch_size: int) -> list[int]:
        """The rows of a batch that this process's devices hold; where tensor spans hosts, several hold the same."""
        held = self.batch.addressable_devices_indices_map((batch_size,)).values()
        return sorted({row for index in held if index for row in range(batch_size)[index[0]]})

    def put_batch(self, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """Host arrays -> the global batch of `batch_size` rows on the devices.

        A process gives either its own rows (`process_rows`) or all of them (then its devices take theirs).
        """
        with jax.transfer_guard_host_to_device("allow"):  # of several processes JAX takes this for an accident
            return {
                name: jax.make_array_from_process_local_data(self.batch, rows, (batch_size, *rows.shape[1:]))
                for name, rows in batch.items()
            }

    def _mesh_axes(self, logical: str | None, parameter: str) -> tuple[str, ...]:
        rules = dict(self.logical_axis_rules)
        if logical not in rules:
            known = nearest(str(logical), rules)
            raise UserError(f"no sharding rule for the logical axis {logical!r} of {parameter} ({known})")
        over = rules[logical]
        axes = () if over is None else (over,) if isinstance(over, str) else tuple(over)
        for axis in axes:
            if axis not in MESH_AXES:
                raise UserError(f"the rule for {logical!r} names the mesh axis {axis!r} ({nearest(axis, MESH_AXES)})")
        return axes


def placed(shapes: Any, shardings: Any) -> Any:
    """A tree of arrays or their shapes as the shapes of arrays that lie as `shardings`, a tree alike, says."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def on_device(tree: Any) -> Any:
    """Inside of a compiled function: the arrays of `tree` that rest in the host's memory, fetched from there."""

    def fetched(x: jax.Array) -> jax.Array:
        on_host = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if on_host else x

    return jax.tree.map(fetched, tree)
