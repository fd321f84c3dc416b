"""The product of two arrays, in which a step spends most of its time.

`einsum` is XLA's. `trained_einsum` is for what is differentiated: on one CPU it hands large products to oneDNN, as
torch does. jaxlib carries that library and XLA's runtime can call it, but XLA's compiler does so for no product of
bfloat16. oneDNN reads and writes axes in any order and rounds its sums itself; XLA's products take a transpose before
and a pass for the rounding after.

XLA cannot write a program that calls oneDNN to the cache of compiled programs, so whatever is not trained, and any
small model, stays with XLA's products.

oneDNN: https://github.com/uxlfoundation/oneDNN. XLA's call of it: https://github.com/openxla/xla,
`xla/backends/cpu/runtime/onednn`.
"""

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

ONEDNN_MATMUL = "__onednn$matmul"  # XLA's call: [..., M, K] times [..., K, N] -> [..., M, N]
LARGE = 2**25  # FLOPs from which oneDNN is called, on one core a fifth of a millisecond


def on_one_cpu() -> bool:
    """Whether programs run on one CPU device."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def einsum(formula: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    """`jnp.einsum(formula, a, b)`, summed in float32, in `dtype`."""
    if jax.default_backend() != "cpu":
        return jnp.einsum(formula, a, b, preferred_element_type=dtype)  # accelerators sum in float32 all the same
    # XLA has fast products on a CPU only for results in float32. Where the result is transposed later, it would swap
    # the sides of one of bfloat16, which then fails to run: hence the barrier.
    product = jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(product).astype(dtype)


def trained_einsum(formula: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    """The same, as fast as this machine does it, in a program that is compiled at every start.

    formula: one axis is summed over, one is left of `a` and one of `b`, any others are in all three arrays. "..." are
    the rows of an array [..., features].
    """
    if on_one_cpu() and a.dtype == b.dtype:
        left, right, result = re.split(",|->", formula.replace("...", "n"))
        x, y = (array.reshape(-1, array.shape[-1]) if "n" in of else array for of, array in ((left, a), (right, b)))
        sizes = dict(zip(left + right, x.shape + y.shape, strict=True))
        if 2 * math.prod(sizes.values()) >= LARGE and _onednn_multiplies(a.dtype):
            product = _onednn(x, y, (left, right, result), dtype)
            return product.reshape(*a.shape[:-1], -1) if "n" in result else product
    return einsum(formula, a, b, dtype)


def _onednn(x: Array, y: Array, axes: tuple[str, str, str], dtype: DTypeLike) -> Array:
    """x with axes[0] times y with axes[1] -> axes[2], each seen as a batch of matrices."""
    left, right, result = axes
    batch = "".join(axis for axis in result if axis in left and axis in right)
    shared = ((left, result), (right, result), (left, right))
    (row,), (column,), (summed,) = (set(a) & set(b) - set(batch) for a, b in shared)
    matrices = (batch + row + summed, batch + summed + column, batch + row + column)
    # A layout names a matrix' axes in the order in which they lie in memory, so that no view of an array moves it.
    layouts = [tuple(matrix.index(axis) for axis in lying) for matrix, lying in zip(matrices, axes, strict=True)]
    view_x, view_y = (
        jnp.transpose(array, [lying.index(axis) for axis in matrix])
        for array, lying, matrix in ((x, left, matrices[0]), (y, right, matrices[1]))
    )
    product = jax.ffi.ffi_call(
        ONEDNN_MATMUL,
        jax.ShapeDtypeStruct((*view_x.shape[:-1], view_y.shape[-1]), dtype),
        vmap_method="sequential",
        input_layouts=layouts[:2],
        output_layouts=layouts[2],
        custom_call_api_version=2,
        legacy_backend_config='{"onednn_matmul_config": {}}',
    )(view_x, view_y)
    return jnp.transpose(product, layouts[2])


@functools.cache
def _onednn_multiplies(dtype: np.dtype) -> bool:
    """Whether this jaxlib has oneDNN, and this processor its instructions for the type."""
    if dtype == jnp.bfloat16:
        flags = Path("/proc/cpuinfo")
        if not flags.exists() or not re.search("avx512_bf16|amx_bf16", flags.read_text()):
            return False
    elif dtype != jnp.float32:
        return False
    square = jax.ShapeDtypeStruct((2, 2), dtype)
    try:
        jax.jit(lambda x: _onednn(x, x, ("mk", "kn", "mn"), dtype)).lower(square).compile()
    except jax.errors.JaxRuntimeError:  # no implementation of the call
        return False
    return True
