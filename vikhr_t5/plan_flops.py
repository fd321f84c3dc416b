"""Matmul FLOPs of a traced program, recomputation too: what the devices execute."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from vikhr_t5.model.products import ONEDNN_MATMUL


def matmul_flops(jaxpr: Any) -> float:
    """Matmul FLOPs of a traced program on all devices together, each pass of its loops counted.

    XLA's own cost analysis counts the body of a loop once, whatever its length. Of a Pallas kernel this would, too.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        if name == "ffi_call" and parameters["target_name"] == ONEDNN_MATMUL:
            total += 2.0 * equation.invars[0].aval.shape[-1] * math.prod(equation.outvars[0].aval.shape)
            continue
        times = parameters.get("length", 1) if name == "scan" else 1
        inner = [matmul_flops(getattr(sub, "jaxpr", sub)) for sub in _inner(parameters)]
        total += times * (max(inner, default=0.0) if name == "cond" else sum(inner))
    return total


def _inner(parameters: Mapping[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(one, "jaxpr", one), "eqns"):
                yield one
