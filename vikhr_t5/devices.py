"""What devices can do, by their makers' data sheets."""

# Dense bf16 matmul peaks of one device (fp16 for V100 and T4, which lack bf16), TFLOP/s, from the makers' data sheets.
# Matched as a prefix of the device's name, first hit wins. MFU is against this figure whatever the compute type.
PEAK_TFLOPS = (
    ("NVIDIA B200", 2250),
    ("NVIDIA H200", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100", 989),
    ("NVIDIA GH200", 989),
    ("NVIDIA A100", 312),
    ("NVIDIA A10G", 70),
    ("NVIDIA A10", 125),
    ("NVIDIA L40S", 362),
    ("NVIDIA L4", 121),
    ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 3090", 71),
    ("Tesla V100", 125),
    ("Tesla T4", 65),
    ("TPU v6", 918),
    ("TPU v5p", 459),
    ("TPU v5", 197),
    ("TPU v4", 275),
)


def data_sheet_tflops(kind: str) -> int | None:
    """Peak of one device, TFLOP/s; None where the table lacks it (a CPU).

    Args:
        kind: as jax's `device_kind` and torch's `get_device_name` give it: "NVIDIA H100 80GB HBM3".
    """
    return next((teraflops for prefix, teraflops in PEAK_TFLOPS if kind.startswith(prefix)), None)
