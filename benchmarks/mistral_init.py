"""Memory and time of `vikhr-mistral init` on a model of Mistral-7B's shape with random bfloat16 weights.

    python benchmarks/mistral_init.py --tokenizer runs/tokenizer --work_dir /tmp/seven

Writes 29 GB under --work_dir (the base and the result) and deletes them. Peak memory is that of the process alone
(ru_maxrss), with and without --verify.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from conversion import safetensors
from vikhr_mistral import pieces, tokenizer_files

WIDTH, MLP, KEYS, ROWS = 4096, 14336, 1024, 32000
LAYER = {
    "input_layernorm.weight": (WIDTH,),
    "mlp.down_proj.weight": (WIDTH, MLP),
    "mlp.gate_proj.weight": (MLP, WIDTH),
    "mlp.up_proj.weight": (MLP, WIDTH),
    "post_attention_layernorm.weight": (WIDTH,),
    "self_attn.k_proj.weight": (KEYS, WIDTH),
    "self_attn.o_proj.weight": (WIDTH, WIDTH),
    "self_attn.q_proj.weight": (WIDTH, WIDTH),
    "self_attn.v_proj.weight": (KEYS, WIDTH),
}
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RUN = "import sys, json; from vikhr_mistral.initialise import init; init(**json.loads(sys.argv[1]))"


def write_base(folder: Path, num_layers: int) -> None:
    """A base with random weights of a size between 1/128 and 1/64."""
    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (ROWS, WIDTH), "model.embed_tokens.weight": (ROWS, WIDTH)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(num_layers) for name, shape in LAYER.items()}
    shapes["model.norm.weight"] = (WIDTH,)
    rng = np.random.default_rng(0)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            bits = rng.integers(0, 2**16, shape, np.uint16)
            bits &= 0x807F
            bits |= 0x3C00
            yield name, bits.view(ml_dtypes.bfloat16)

    safetensors.write_sharded(folder, shapes, arrays(), np.dtype(ml_dtypes.bfloat16), 5 * 10**9)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": num_layers}))
    tokenizer_files.write(pieces.open_model("mistral"), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="what `vikhr-mistral tokenizer` wrote")
    parser.add_argument("--work_dir", type=Path, required=True, help="a new folder on a disk with 30 GB free")
    parser.add_argument("--num_layers", type=int, default=32)
    parser.add_argument("--method", default="mean")
    flags = parser.parse_args()
    base, output = flags.work_dir / "base", flags.work_dir / "extended"
    try:
        started = time.monotonic()
        write_base(base, flags.num_layers)
        size = sum(file.stat().st_size for file in base.iterdir())
        print(f"base: {size / 1e9:.2f} GB, written in {time.monotonic() - started:.0f} s")
        for verify in (False, True):
            arguments = {"base_dir": str(base), "tokenizer_dir": flags.tokenizer, "output_dir": str(output)}
            arguments |= {"verify": verify, "method": flags.method}
            started = time.monotonic()
            subprocess.run([sys.executable, "-c", RUN, json.dumps(arguments)], check=True)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # of the largest child so far
            seconds, load = time.monotonic() - started, os.getloadavg()[0]
            print(f"init, verify={verify}: {seconds:.0f} s, peak {peak:.2f} GB, load {load:.1f}", flush=True)
            shutil.rmtree(output)
    finally:
        shutil.rmtree(flags.work_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
