"""Memory and time of `vikhr-mistral merge`: Saiga's adapter on random bfloat16 weights of Mistral-7B's shape.

    python benchmarks/mistral_merge.py --work_dir /tmp/seven

Writes 29 GB under --work_dir (the base and the result) and deletes them. Peak memory is that of the process alone
(ru_maxrss). A sample of the merged weights is computed again in float64.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from mistral_init import KEYS, WIDTH, write_base
from safetensors.numpy import save_file

from conversion.weights import open_weights
from vikhr_mistral import fingerprint

RANK, ALPHA = 16, 16
RUN = "import sys; from vikhr_mistral.merge import merge; merge(*sys.argv[1:])"
OUT = {"q_proj": WIDTH, "k_proj": KEYS, "v_proj": KEYS, "o_proj": WIDTH}


def write_adapter(folder: Path, base: Path, num_layers: int) -> dict[str, np.ndarray]:
    """peft's files, as `instruct` leaves them."""
    folder.mkdir()
    draw = np.random.default_rng(1)
    tensors = {}
    for layer in range(num_layers):
        for module, width in OUT.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = draw.normal(0, 0.02, (RANK, WIDTH)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = draw.normal(0, 0.02, (width, RANK)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": ALPHA, "r": RANK, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    fingerprint.write(folder, base)
    return tensors


def largest_error(base: Path, merged: Path, adapter: dict[str, np.ndarray], num_layers: int) -> float:
    """Of the last layer, relative to what bfloat16 can tell apart; at most 1/2 if each sum is rounded once."""
    before, after = open_weights(base), open_weights(merged)
    worst = 0.0
    for module in OUT:
        name = f"model.layers.{num_layers - 1}.self_attn.{module}"
        a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        exact = before[f"{name}.weight"].read().astype(np.float64) + ALPHA / RANK * (b @ a)
        spacing = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-126))) - 7)
        worst = max(worst, float(np.max(np.abs(after[f"{name}.weight"].read().astype(np.float64) - exact) / spacing)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    flags = parser.parse_args()
    flags.work_dir.mkdir(parents=True)
    try:
        base, adapter, merged = (flags.work_dir / name for name in ("base", "adapter", "merged"))
        write_base(base, flags.layers)
        tensors = write_adapter(adapter, base, flags.layers)
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", RUN, str(adapter), str(merged)], check=True)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(
            f"{size / 1e9:.1f} GB: {seconds:.0f} s, peak {peak:.2f} GiB,"
            f" largest error {largest_error(base, merged, tensors, flags.layers):.3f} of a bfloat16 step"
        )
    finally:
        shutil.rmtree(flags.work_dir)


if __name__ == "__main__":
    main()
