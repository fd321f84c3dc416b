"""metrics.jsonl of a run, in the format of the T5 side, so that `vikhr-t5 report RUN_DIR` draws it; speed and MFU."""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vikhr_mistral.loss_forward import causal_model
from vikhr_t5.devices import data_sheet_tflops
from vikhr_t5.files import keep_lines_up_to


class MetricsFile:
    """Lines {"kind": "start" | "train" | "eval" | "end", "step", "time", …}; the lines past `step` are dropped first.

    Args:
        folder: the run folder. step: where the run stands. writes: False on all processes but one.
    """

    def __init__(self, folder: Path, step: int, writes: bool = True):
        self.path, self.writes = folder / "metrics.jsonl", writes
        if writes:
            keep_lines_up_to(self.path, step)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        record = {"kind": kind, "step": step, "time": round(time.time(), 3)}
        record |= {name: _plain(value) for name, value in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    """Nine digits (a resumed run is compared to 1e-6), and JSON has no NaN."""
    return value if not isinstance(value, float) else float(f"{value:.9g}") if math.isfinite(value) else None


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of one device by its data sheet; None where it is unknown, as for a CPU: then there is no MFU."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    teraflops = data_sheet_tflops(kind)
    return teraflops * 1e12 if teraflops else None


def flops_per_token(model: Any, length: int) -> float:
    """Model FLOPs of one token in one step, forward and backward; recomputation and a reference's pass do not count.

    2 per weight of a product forward, 2 for the gradient of what goes in, 2 for that of a weight that is trained;
    attention 12 · layers · hidden · length, as in PaLM (arXiv:2204.02311, appendix B), over the whole row.

    Args:
        model: transformers or PEFT, not sharded.
        length: of a row.
    """
    causal = causal_model(model)
    embedding = {id(parameter) for parameter in causal.get_input_embeddings().parameters()}
    matrices = [parameter for parameter in causal.parameters() if parameter.ndim == 2]
    if causal.get_output_embeddings().weight is not causal.get_input_embeddings().weight:
        matrices = [parameter for parameter in matrices if id(parameter) not in embedding]
    products = sum(parameter.numel() * (6 if parameter.requires_grad else 4) for parameter in matrices)
    config = causal.config
    attention = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return products + 12 * config.num_hidden_layers * attention * length


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 2**20
