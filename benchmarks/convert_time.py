"""Time and memory of converting a model, beside a plain copy of the same bytes on the same disk in the same run.

    python benchmarks/convert_time.py --vocabulary spiece.model               VikhrT5-3b, float32: 12 GB, four times
    python benchmarks/convert_time.py --vocabulary spiece.model --dtype bfloat16 --layers 4

Random weights are written as the trainer writes them. Each conversion is `vikhr-t5 convert --no-verify` as a process of
its own, whose start counts; a copy of what it reads, synced as the conversions sync, is timed before and after each,
since disks of shared machines change their speed. Before all of them, the files to read leave the page cache.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vikhr_t5.data.vocabulary import Vocabulary, vocabulary_files  # noqa: E402
from vikhr_t5.model.config import T5Config  # noqa: E402


def write_checkpoint(folder: Path, config: T5Config, dtype: str, vocabulary: Vocabulary) -> None:
    """What `Checkpoints.save` writes, from one random buffer that all parameters share."""
    import ml_dtypes
    import orbax.checkpoint as ocp
    from flax.traverse_util import unflatten_dict

    from conversion.stored import shapes
    from vikhr_t5.train.checkpoint_files import seal
    from vikhr_t5.train.checkpoints import handler, to_save

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes(config).items()}
    buffer = np.random.default_rng(0).standard_normal(max(sizes.values()), np.float32).astype(kind)
    flat = {tuple(name.split("/")): buffer[: sizes[name]].reshape(shape) for name, shape in shapes(config).items()}
    ocp.Checkpointer(handler()).save(folder / "params", args=to_save(unflatten_dict(flat)))
    (folder / "progress.json").write_text(json.dumps({"step": 1, "first_step": 0, "seed": 0, "tokens": 0}))
    (folder / "model_config.json").write_text(config.to_json())
    (folder / "vocabulary").mkdir()
    for name, content in vocabulary_files(vocabulary).items():
        (folder / "vocabulary" / name).write_bytes(content)
    seal(folder)


def forget(folder: Path) -> None:
    """Out of the page cache, once written."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDWR)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def converted(source_format: str, destination_format: str, source: Path, destination: Path) -> dict[str, float]:
    """Seconds, and peak memory of the process."""
    forget(source)
    start = time.perf_counter()
    command = [sys.executable, "-m", "vikhr_t5.cli", "convert", "--from", source_format, "--to", destination_format]
    process = os.posix_spawn(
        sys.executable,
        [*command, "--no-verify", str(source), str(destination)],
        {**os.environ, "PYTHONPATH": str(ROOT)},
    )
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{source_format} -> {destination_format} failed")
    return {"seconds": time.perf_counter() - start, "peak_gb": usage.ru_maxrss * 1024 / 1e9, "cpu": usage.ru_utime}


def copied(source: Path) -> float:
    """Seconds that a plain copy takes."""
    forget(source)
    destination = source.with_name("copy")
    start = time.perf_counter()
    shutil.copytree(source, destination)
    for path in destination.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(destination)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", required=True, help="a SentencePiece model; the embedding has 58,112 rows")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, default=24, help="of either stack")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    config = T5Config(
        58112, "bfloat16", 2048, 32, options.layers, options.layers, 64, 5120, ("gelu", "linear"), dropout_rate=0.0
    )
    vocabulary = Vocabulary(options.vocabulary, 300)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        work = Path(temporary)
        print(f"writing {config.param_count() / 1e9:.2f}B parameters, {options.dtype} ...", file=sys.stderr)
        # A process of its own: what a child starts with counts as its peak.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint, args=(work / "1", config, options.dtype, vocabulary)
        )
        writer.start()
        writer.join()
        rows: dict[str, Any] = {}
        for source_format, destination_format, source, destination in (
            ("vikhr", "hf", work / "1", work / "hf"),
            ("hf", "vikhr", work / "hf", work / "2"),
        ):
            before = copied(source)
            row = converted(source_format, destination_format, source, destination)
            rows[f"{source_format} -> {destination_format}"] = {**row, "copies": [before, copied(source)]}
            shutil.rmtree(source)
        size = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    print(f"\n{config.param_count() / 1e9:.2f}B parameters, {options.dtype}, {size / 1e9:.1f} GB\n")
    print("                 seconds   GB/s   copies: before, after   times their mean   peak GB   processor s")
    for name, row in rows.items():
        before, after = row["copies"]
        rate = f"{row['seconds']:7.1f} {size / 1e9 / row['seconds']:6.2f} {before:16.1f} {after:6.1f}"
        ratio = row["seconds"] / (before + after) * 2
        print(f"{name:16s} {rate} {ratio:18.2f} {row['peak_gb']:9.2f} {row['cpu']:13.1f}")


if __name__ == "__main__":
    main()
