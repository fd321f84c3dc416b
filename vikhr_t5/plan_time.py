"""From a plan to speed, days and cost: model FLOPs, a peak, and the share of it that is reached."""

import dataclasses

import jax

from vikhr_t5.devices import PRICES_ARE, DeviceKind


@dataclasses.dataclass(frozen=True)
class Measured:
    """A published training speed: `mfu` of the data sheet's bfloat16 peak."""

    kind: str
    parameters: float  # models of at least so many
    dtype: str
    mfu: float
    source: str


MEASURED = (
    Measured("A100", 1e9, "bfloat16", 0.36, "T5 XL 512/128 in NVIDIA's Rosetta T5X, 21.0 sequences/s on an A100"),
    Measured("A100", 0, "bfloat16", 0.31, "T5 v1.1 base in nanoT5, compiled, 229 sequences/s on an A100"),
    Measured("H100", 1e9, "bfloat16", 0.27, "T5 XL 512/128 in NVIDIA's Rosetta T5X, fp8, 50.4 sequences/s on an H100"),
)
CPU = 0.75, "measured: T5 small, batch 8, on two cores; the peak is a matmul timed here"
ASSUMED = {"bfloat16": 0.30, "float32": 0.50}


def utilisation(kind: DeviceKind | None, dtype: str, parameters: int, given: float | None) -> tuple[float, str]:
    """(share of the peak in `dtype` that matmuls reach where nothing is computed twice, where it is from)."""
    if given is not None:
        return given, "--mfu"
    if kind is None and jax.default_backend() == "cpu":
        return CPU
    for one in MEASURED:
        if kind and kind.name.startswith(one.kind) and parameters >= one.parameters and dtype == one.dtype:
            return one.mfu, f"measured: {one.source}"
    return ASSUMED[dtype], "assumed, not measured"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What training takes. Positions are those of both sides, padding too; `dollars` is None where no price is known.

    `mfu` is model FLOPs against the peak, `executed` what is executed for one of them.
    """

    step_seconds: float
    positions_per_second: float
    sequences_per_second: float
    hours: float
    dollars: float | None
    price: float | None
    price_from: str
    peak_tflops: float
    mfu: float
    executed: float
    mfu_from: str


def schedule(
    kind: DeviceKind | None,
    peak_tflops: float,
    dtype: str,
    parameters: int,
    count: int,
    step_flops: float,
    executed_flops: float,
    rows: int,
    positions: int,
    steps: int,
    mfu: float | None,
    price: float | None,
) -> Schedule:
    """Time and cost of `steps` updates.

    Args:
        peak_tflops: of one device in `dtype`.
        step_flops: model FLOPs of an update; executed_flops: with recomputation; both of all devices.
        rows, positions: of a batch.
        mfu, price: the reader's own, or None.
    """
    share, source = utilisation(kind, dtype, parameters, mfu)
    seconds = executed_flops / (count * peak_tflops * 1e12 * share)
    hours = steps * seconds / 3600
    known = price if price is not None else kind.price if kind else None
    return Schedule(
        step_seconds=seconds,
        positions_per_second=positions / seconds,
        sequences_per_second=rows / seconds,
        hours=hours,
        dollars=None if known is None else known * count * hours,
        price=known,
        price_from="--price_per_hour" if price is not None else PRICES_ARE,
        peak_tflops=peak_tflops,
        mfu=step_flops / (count * peak_tflops * 1e12 * seconds),
        executed=executed_flops / step_flops,
        mfu_from=source,
    )
