"""AdamW, plain and with nanoT5's RMS scaling; its two moments in 4, 2 or 1 bytes a number."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vikhr_t5.errors import UserError, nearest
from vikhr_t5.train.quantization import Quantized, block_size, dequantize, quantize
from vikhr_t5.train.rounding import round_tree
from vikhr_t5.train.tensors import Axes, Tree, map_tensors, rms

MOMENT_DTYPES = ("float32", "bfloat16", "8bit")
MIN_RMS = 1e-3  # nanoT5's floor


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter, 1711.05101) as `optax.adamw`; norm scales and relative biases do not decay.

    Args:
      rms_scaled: nanoT5's variant (github.com/PiotrNawrot/nanoT5): Adam's step is multiplied by max(1e-3, RMS(p)),
        as Adafactor does, so a T5 takes Adafactor's learning rates (about 2e-2). The decay is not multiplied.
      moment_dtype: how the moments rest between updates, which are computed in float32. "bfloat16": rounded at
        random (`rounding`), as a second moment that decays by 0.999 would stand still otherwise. "8bit": the kernels'
        in blocks (`quantization`), the rest in float32; so is the embedding, as its authors advise, since the
        gradients of its rows are as unlike as the frequencies of words.

    Raises:
      UserError: an unknown moment_dtype.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    rms_scaled: bool = False
    moment_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.moment_dtype not in MOMENT_DTYPES:
            raise UserError(f"AdamW.moment_dtype {self.moment_dtype!r} ({nearest(self.moment_dtype, MOMENT_DTYPES)})")

    def init(self, params: Tree) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params) for _ in range(2))
        return self._pack(optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu))

    def update(
        self, grads: Tree, state: optax.ScaleByAdamState, params: Tree, learning_rate: jax.Array
    ) -> tuple[Tree, optax.ScaleByAdamState]:
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        directions, unpacked = adam.update(grads, self._unpack(state, params))
        if self.rms_scaled:
            directions = map_tensors(lambda _, p, u: u * jnp.maximum(rms(p), MIN_RMS), params, directions)

        def tensor(path: tuple, p: jax.Array, u: jax.Array) -> jax.Array:
            decay = self.weight_decay if path[-1].key in ("kernel", "embedding") else 0.0
            return -learning_rate * (u + decay * p.astype(jnp.float32))

        return jax.tree_util.tree_map_with_path(tensor, params, directions), self._pack(unpacked)

    def state_axes(self, params: Tree, axes: Axes) -> optax.ScaleByAdamState:
        def moment(path: tuple, p: Any, names: tuple[str | None, ...]) -> Any:
            return Quantized(names, names) if self._in_8_bits(path, p) else names  # type: ignore[arg-type]

        moments = jax.tree_util.tree_map_with_path(moment, params, axes)
        return optax.ScaleByAdamState(count=(), mu=moments, nu=moments)

    def _in_8_bits(self, path: tuple, p: Any) -> bool:
        fits = path[-1].key == "kernel" and block_size(p.shape[-1]) is not None
        return self.moment_dtype == "8bit" and fits

    def _pack(self, state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        """float32 moments -> as they rest between updates."""
        if self.moment_dtype == "bfloat16":
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.count))
            return state._replace(mu=round_tree(state.mu, keys[0]), nu=round_tree(state.nu, keys[1]))

        def moments(tree: Tree, signed: bool) -> Tree:
            return jax.tree_util.tree_map_with_path(
                lambda path, moment: quantize(moment, signed) if self._in_8_bits(path, moment) else moment, tree
            )

        return state._replace(mu=moments(state.mu, True), nu=moments(state.nu, False))

    def _unpack(self, state: optax.ScaleByAdamState, params: Tree) -> optax.ScaleByAdamState:
        def moments(tree: Tree, signed: bool) -> Tree:
            def unpack(_: jax.Array, moment: Any) -> jax.Array:
                return dequantize(moment, signed) if isinstance(moment, Quantized) else moment.astype(jnp.float32)

            return jax.tree.map(unpack, params, tree)

        return state._replace(mu=moments(state.mu, True), nu=moments(state.nu, False))
