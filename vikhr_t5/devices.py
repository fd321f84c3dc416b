"""What devices can do: peaks by their makers' data sheets, memory as the driver shows it, price by the hour."""

import dataclasses
import re

from vikhr_t5.errors import UserError, nearest

PRICES_OF = "May 2026"
PRICES_ARE = f"rented by the hour, {PRICES_OF}, an assumption: --price_per_hour overrides"


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """One kind of accelerator. A GPU card, or of a TPU what JAX counts as a device (v2, v3: a core; later: a chip).

    Attributes:
        name: as people write it, "H100-80GB"; of TPUs the prefix of a slice's name, "v4".
        prefixes: how jax's `device_kind` and torch's `get_device_name` begin, in whole words.
        bfloat16_tflops: dense matmul peak. Of cards that lack bfloat16 (V100, T4) it is float16's, which T5 cannot
            use; MFU is against this figure whatever the compute type.
        float32_tflops: what XLA makes of float32 matmuls at its default precision: TF32 from Ampere on, one bfloat16
            pass on TPUs.
        memory_gib: all of it, as the driver shows it.
        price: dollars an hour; None where nobody rents it out.
        capability: NVIDIA's compute capability.
        cores_in_name: v4-8 are 8 cores, 4 chips, 4 devices of JAX: here 2.
    """

    name: str
    prefixes: tuple[str, ...]
    bfloat16_tflops: float
    float32_tflops: float
    memory_gib: float
    price: float | None
    capability: str = ""
    has_bfloat16: bool = True
    cores_in_name: int = 1

    @property
    def is_tpu(self) -> bool:
        return not self.capability

    def tflops(self, dtype: str) -> float:
        """Matmul peak of one device computing in `dtype`."""
        return self.bfloat16_tflops if dtype == "bfloat16" and self.has_bfloat16 else self.float32_tflops


V100_32GB = tuple(f"Tesla V100-{board}-32GB" for board in ("SXM2", "SXM3", "PCIE", "DGXS"))

# A prefix that begins another one stands after it: the first hit wins. Peaks: the data sheets of NVIDIA and Google
# Cloud, dense. Memory: nvidia-smi's total; of TPUs the limit that XLA states when it runs out.
# Prices: the middle of specialised clouds' on-demand lists (PRICES_OF); V100, T4 and TPUs: Lambda's and Google's lists.
KINDS = (
    DeviceKind("B200-192GB", ("NVIDIA B200",), 2250, 1125, 178.4, 5.50, "10.0"),
    DeviceKind("H200-141GB", ("NVIDIA H200",), 989, 495, 139.8, 4.00, "9.0"),
    DeviceKind("H100-PCIe-80GB", ("NVIDIA H100 PCIe",), 756, 378, 79.1, 2.50, "9.0"),
    DeviceKind("H100-80GB", ("NVIDIA H100",), 989, 495, 79.1, 3.00, "9.0"),
    DeviceKind("GH200-96GB", ("NVIDIA GH200",), 989, 495, 94.5, 2.00, "9.0"),
    DeviceKind("A100-40GB", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312, 156, 39.4, 1.20, "8.0"),
    DeviceKind("A100-80GB", ("NVIDIA A100",), 312, 156, 79.2, 1.40, "8.0"),
    DeviceKind("A10G-24GB", ("NVIDIA A10G",), 70, 35, 22.2, 1.00, "8.6"),
    DeviceKind("A10-24GB", ("NVIDIA A10",), 125, 62.5, 22.2, 0.75, "8.6"),
    DeviceKind("L40S-48GB", ("NVIDIA L40S",), 362, 183, 44.5, 1.00, "8.9"),
    DeviceKind("L4-24GB", ("NVIDIA L4",), 121, 60, 22.2, 0.70, "8.9"),
    DeviceKind("RTX4090-24GB", ("NVIDIA GeForce RTX 4090",), 165, 82.6, 23.6, 0.50, "8.9"),
    DeviceKind("RTX3090-24GB", ("NVIDIA GeForce RTX 3090",), 71, 35.6, 23.6, 0.30, "8.6"),
    DeviceKind("V100-32GB", V100_32GB, 125, 15.7, 31.7, 0.80, "7.0", False),
    DeviceKind("V100-16GB", ("Tesla V100",), 125, 15.7, 15.8, 0.55, "7.0", False),
    DeviceKind("T4-16GB", ("Tesla T4",), 65, 8.1, 14.6, 0.35, "7.5", False),
    DeviceKind("v6e", ("TPU v6 lite", "TPU v6e"), 918, 918, 31.25, 2.70),
    DeviceKind("v5e", ("TPU v5 lite", "TPU v5e"), 197, 197, 15.75, 1.20),
    DeviceKind("v5p", ("TPU v5p", "TPU v5"), 459, 459, 95.7, 4.20, cores_in_name=2),
    DeviceKind("v4", ("TPU v4",), 275, 275, 30.75, 3.22, cores_in_name=2),
    DeviceKind("v3", ("TPU v3",), 61.5, 61.5, 15.5, 1.00),
    DeviceKind("v2", ("TPU v2",), 22.5, 22.5, 7.5, 0.56),
)


def device_kind(name: str) -> DeviceKind | None:
    """The kind whose prefix `name` has, a `device_kind` of jax or a `get_device_name` of torch; None: not in the table
    (a CPU, another card, or a MIG slice of one, "NVIDIA A100-SXM4-40GB MIG 1g.5gb": a part of its peak and memory)."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((kind for kind in KINDS for prefix in kind.prefixes if re.match(rf"{prefix}\b", name)), None)


def data_sheet_tflops(name: str) -> float | None:
    """bfloat16 peak of one device, TFLOP/s; None where the table lacks it (a CPU).

    Args:
        name: as jax's `device_kind` and torch's `get_device_name` give it: "NVIDIA H100 80GB HBM3".
    """
    kind = device_kind(name)
    return kind.bfloat16_tflops if kind else None


def parse_devices(text: str) -> tuple[DeviceKind, int]:
    """ "4xV100-32GB", "H100-80GB" (one of them), or a TPU slice by its name, "v4-8" -> (kind, devices of JAX).

    Raises:
        UserError: no such kind (with the nearest names), a number that is none, or half a chip.
    """
    names = {kind.name.lower(): kind for kind in KINDS}
    if match := re.fullmatch(r"(?:(\d+)x)?(.+)", text.strip().lower()):
        count, name = int(match[1] or 1), match[2]
        if name in names and not names[name].is_tpu and count:
            return names[name], count
    if match := re.fullmatch(r"(v\d\w*)-(\d+)", text.strip().lower().replace("litepod", "e")):
        kind, cores = names.get(match[1]), int(match[2])
        if kind and kind.is_tpu and cores and not cores % kind.cores_in_name:
            return kind, cores // kind.cores_in_name
    shown = {f"{kind.name}-8" if kind.is_tpu else f"{text.partition('x')[0]}x{kind.name}": kind for kind in KINDS}
    shown = shown if re.match(r"\d+x", text) else {name.split("x", 1)[-1]: kind for name, kind in shown.items()}
    hint = nearest(text, [*shown, "here"])
    raise UserError(f"--devices {text}: no such devices ({hint}); write 4xV100-32GB, a TPU slice as v4-8, or here")
