"""Saving and restoring VikhrT5-240m, beside torch.save and safetensors for the same bytes; and what a save costs a run.

    python benchmarks/checkpoint_time.py files        the three in turn, medians of three
    python benchmarks/checkpoint_time.py loop         steps of the real loop, with and without a save under way
    python benchmarks/checkpoint_time.py files loop --results checkpoint.json

files   Seconds until the trainer may go on ("held"), until all is on disk, synced, under its name ("done"), and to have
        it in memory again ("restored"; the files are in the system's cache, for all three). Ours is what a run writes:
        parameters and Adafactor's state, sizes in a manifest; torch and safetensors write the same arrays to one file,
        which is synced; they hold the trainer all the time.
loop    Batches are small (2 rows of 64/48), so that steps are short and a save is felt. Seconds from step to step, from
        the log. What a save costs is how much longer the steps from one save to the next took than as many plain ones.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from stores import vocabulary_and_documents, write_store  # noqa: E402

ROWS, LENGTHS = 2, {"inputs": 64, "targets": 48}
PERIOD, STEPS = 8, 21  # a save after steps 8 and 16


def model_240m(vocabulary: Any) -> Any:
    """T5 v1.1 base with 57,984 rows of embeddings, as gin/models/vikhr_t5_240m.gin."""
    from vikhr_t5.model.network import T5Config, Transformer
    from vikhr_t5.train import optimizers
    from vikhr_t5.train.state import EncoderDecoderModel

    config = T5Config(
        vocab_size=57984, emb_dim=768, num_heads=12, num_encoder_layers=12, num_decoder_layers=12, head_dim=64,
        mlp_dim=2048, mlp_activations=("gelu", "linear"), dropout_rate=0.0,
    )  # fmt: skip
    return EncoderDecoderModel(Transformer(config), vocabulary, vocabulary, optimizers.Adafactor())


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_files(folder: Path, rounds: int = 3) -> dict[str, Any]:
    import jax
    import numpy as np
    import safetensors.torch
    import torch

    from vikhr_t5.train import checkpoints
    from vikhr_t5.train.checkpoints import Checkpoints, SaveCheckpointConfig

    vocabulary, _ = vocabulary_and_documents(folder)
    model = model_240m(vocabulary)
    state = jax.block_until_ready(jax.jit(model.init_state)(jax.random.key(0)))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    tensors = {jax.tree_util.keystr(path): torch.from_numpy(np.array(leaf)) for path, leaf in leaves}
    saver = Checkpoints(folder / "ours", SaveCheckpointConfig(keep=1))
    files = {**checkpoints.described(model, ""), "progress.json": b""}

    def synced(file: Path, write: Callable[[Path], None]) -> float:
        def action() -> None:
            write(file)
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())

        return seconds(action)

    times: dict[str, dict[str, list[float]]] = {}

    def note(side: str, **figures: float) -> None:
        for name, value in figures.items():
            times.setdefault(side, {}).setdefault(name, []).append(value)

    for number in range(1, rounds + 1):
        files["progress.json"] = json.dumps({"step": number}).encode()
        start = time.perf_counter()
        saver.save(number, state, files)
        held = time.perf_counter() - start
        saver.wait()
        done = time.perf_counter() - start
        path = folder / "ours" / str(number)
        restored = seconds(lambda path=path: jax.block_until_ready(checkpoints.restore(path, like)[0]))
        note("vikhr-t5", held=held, done=done, restored=restored)

        file = folder / "file.pt"
        done = synced(file, lambda file: torch.save(tensors, file))
        load = lambda file=file: torch.load(file, weights_only=True)  # noqa: E731
        note("torch.save", held=done, done=done, restored=seconds(load))
        file.unlink()

        file = folder / "file.safetensors"
        done = synced(file, lambda file: safetensors.torch.save_file(tensors, file))
        load = lambda file=file: {k: v.clone() for k, v in safetensors.torch.load_file(file).items()}  # noqa: E731
        note("safetensors", held=done, done=done, restored=seconds(load))  # cloned: it maps the file, others read it
        file.unlink()
    found = {side: {name: median(values) for name, values in figures.items()} for side, figures in times.items()}
    return {"gigabytes": sum(leaf.nbytes for _, leaf in leaves) / 1e9, **found}


def measure_loop(folder: Path) -> dict[str, Any]:
    from vikhr_t5.data.pipeline import DatasetConfig
    from vikhr_t5.train import loop, optimizers
    from vikhr_t5.train.checkpoints import CheckpointConfig, SaveCheckpointConfig
    from vikhr_t5.train.partitioning import Partitioner
    from vikhr_t5.train.step import Trainer

    vocabulary, documents = vocabulary_and_documents(folder)
    write_store(folder, "text", vocabulary, {"targets": documents}, 1, "ul2")
    loop.train(
        model=model_240m(vocabulary),
        train_dataset_cfg=DatasetConfig("text", LENGTHS, "train", ROWS, cache_dir=str(folder)),
        checkpoint_cfg=CheckpointConfig(SaveCheckpointConfig(period=PERIOD)),
        partitioner=Partitioner(),
        trainer=Trainer(optimizers.create_learning_rate_scheduler("constant", 0.001)),
        model_dir=str(folder / "run"),
        total_steps=STEPS,
        stats_period=1,
        random_seed=0,
    )
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    at = {line["step"]: line["time"] for line in lines if line["kind"] == "train"}
    took = {step: at[step] - at[step - 1] for step in range(2, STEPS + 1)}  # step n, and what was done after n - 1
    plain = median(took[step] for step in range(3, PERIOD + 1))
    saves = [range(first + 1, min(first + PERIOD, STEPS) + 1) for first in range(PERIOD, STEPS, PERIOD)]
    costs = [sum(took[step] - plain for step in steps) for steps in saves]
    return {
        "plain_step": plain,
        "longest_step": max(took[step] for steps in saves for step in steps),
        "cost_of_a_save": costs,
        "cost_in_steps": [cost / plain for cost in costs],
        "seconds_from_step_to_step": {str(step): round(value, 3) for step, value in took.items()},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("files", "loop"))
    parser.add_argument("--results", type=Path, metavar="F", help="a JSON file to write")
    parser.add_argument("--folder", metavar="D", help="a disk with 5 GB of room (default: of temporary files)")
    arguments = parser.parse_args()
    results = {}
    for part in arguments.parts:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            results[part] = {"files": measure_files, "loop": measure_loop}[part](Path(folder))
        print(f"{part}: {json.dumps(results[part], indent=1)}", flush=True)
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
