"""How time and memory grow: with layers, with the batch, with the corpus, with the number of steps.

    python benchmarks/growth.py steps start memory plot --results growth.json --picture docs/images/growth.png

steps   seconds of a compiled training step of a small T5, by layers of each stack and by batch size; the sizes take
        turns, the median counts. A line through them, with R².
start   seconds from a fresh process's `open_dataset` to its first batch, for stores of 10 MB to 1 GB of tokens, of
        text (windows, denoised) and of supervised examples (packed): the first time, and then the median of three.
memory  resident memory (and its anonymous part, without the pages of the store's files) over 5,000 steps of the whole
        loop on a real token store, with a checkpoint and an evaluation every 500 steps. A line through the last 3,000:
        the first saves and evaluations still find memory of their own.
plot    the picture. Each part adds its figures to the file of results, from a process of its own: memory that one has
        freed would hide what another takes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from stores import vocabulary_and_documents, write_store  # noqa: E402

from vikhr_t5.data.pipeline import DatasetConfig, open_dataset  # noqa: E402
from vikhr_t5.data.vocabulary import Vocabulary  # noqa: E402

LAYERS, LAYERS_BATCH = (1, 2, 4, 8, 16), 4
BATCHES, BATCHES_LAYERS = (4, 8, 16, 32, 64), 2
STEP_LENGTHS = {"inputs": 256, "targets": 64}
MEGABYTES = (10, 100, 1000)
MEMORY_STEPS, SAMPLE_PERIOD, WARM_UP = 5000, 50, 2000


def line_through(x: list[float], y: list[float]) -> dict[str, float]:
    """Least squares: slope, intercept, R²."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.array(y) - (slope * np.array(x) + intercept)
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "r2": float(1 - residual.var() / np.var(y)) if np.var(y) else 1.0,
    }


def model_and_trainer(vocabulary: Any, layers: int, emb_dim: int) -> tuple[Any, Any]:
    from vikhr_t5.model.network import T5Config, Transformer
    from vikhr_t5.train import optimizers
    from vikhr_t5.train.state import EncoderDecoderModel
    from vikhr_t5.train.step import Trainer

    config = T5Config(
        emb_dim=emb_dim, num_heads=4, head_dim=emb_dim // 4, mlp_dim=2 * emb_dim, num_encoder_layers=layers,
        num_decoder_layers=layers, mlp_activations=("gelu", "linear"), dropout_rate=0.1,
    )  # fmt: skip
    model = EncoderDecoderModel(Transformer(config), vocabulary, vocabulary, optimizers.Adafactor())
    return model, Trainer(optimizers.create_learning_rate_scheduler("constant", 0.01))


class Step:
    """A compiled step that is called again and again."""

    def __init__(self, vocabulary: Any, layers: int, batch_size: int):
        import jax

        from vikhr_t5.train.partitioning import Partitioner
        from vikhr_t5.train.step import zero_sums

        model, trainer = model_and_trainer(vocabulary, layers, 256)
        partitioner = Partitioner()
        rng = np.random.default_rng(0)
        draw = lambda length: rng.integers(3, 1000, (batch_size, length)).astype(np.int32)  # noqa: E731
        targets = draw(STEP_LENGTHS["targets"])
        batch = {"encoder_input_tokens": draw(STEP_LENGTHS["inputs"]), "decoder_target_tokens": targets}
        batch |= {"decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1]}
        batch |= {"decoder_loss_weights": np.ones_like(targets), "decoder_source_ids": np.ones_like(targets)}
        self.batch, self.key = partitioner.put_batch(batch, batch_size), jax.random.key(0)
        self.state, self.sums = jax.jit(model.init_state)(jax.random.key(1)), zero_sums(1)
        self.run = partitioner.jit(trainer.step_function(model, 1), donate_argnums=(0, 1))
        self.block = jax.block_until_ready
        self.seconds()

    def seconds(self) -> float:
        start = time.perf_counter()
        self.state, self.sums, done = self.run(self.state, self.sums, self.batch, self.key)
        self.block(done)
        return time.perf_counter() - start


def measure_steps(rounds: int = 9) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, _ = vocabulary_and_documents(Path(folder))
        found = {}
        for name, sizes, step in (
            ("layers", LAYERS, lambda size: Step(vocabulary, size, LAYERS_BATCH)),
            ("batch", BATCHES, lambda size: Step(vocabulary, BATCHES_LAYERS, size)),
        ):
            steps = {size: step(size) for size in sizes}
            times: dict[int, list[float]] = {size: [] for size in sizes}
            for _ in range(rounds):
                for size in sizes:
                    steps[size].seconds()  # the first after another size's is slower
                    times[size].append(steps[size].seconds())
            medians = [median(times[size]) for size in sizes]
            found[name] = {"size": list(sizes), "seconds": medians, **line_through(list(sizes), medians)}
        return found


def open_once(folder: Path, task: str) -> dict[str, float]:
    """In this process: seconds to a first batch."""
    vocabulary = Vocabulary(str(folder / "ru.model"))
    config = DatasetConfig(task, {"inputs": 512, "targets": 240}, "train", 128, cache_dir=str(folder))
    start = time.perf_counter()
    next(open_dataset(config, vocabulary).batches())
    return {"seconds": time.perf_counter() - start}


def measure_start() -> dict[str, Any]:
    found: dict[str, Any] = {"megabytes": list(MEGABYTES)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary, documents = vocabulary_and_documents(folder)
        examples = {"inputs": [ids[:200] for ids in documents], "targets": [ids[200:280] for ids in documents]}
        for kind, columns, mixture in (("text", {"targets": documents}, "ul2"), ("supervised", examples, None)):
            once = 4 * sum(len(ids) for column in columns.values() for ids in column)
            found[kind], found[f"{kind}, first"] = [], []
            for megabytes in MEGABYTES:
                task = f"{kind}_{megabytes}"
                write_store(folder, task, vocabulary, columns, max(1, round(megabytes * 1e6 / once)), mixture)
                command = [sys.executable, __file__, "--open", str(folder), task]
                runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(4)]
                first, *later = (json.loads(run.stdout)["seconds"] for run in runs)
                found[f"{kind}, first"].append(first)
                found[kind].append(median(later))
    return found


def measure_memory(steps: int) -> dict[str, Any]:
    import psutil

    from vikhr_t5.train import loop
    from vikhr_t5.train.checkpoints import CheckpointConfig, SaveCheckpointConfig
    from vikhr_t5.train.partitioning import Partitioner

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary, documents = vocabulary_and_documents(folder)
        write_store(folder, "text", vocabulary, {"targets": documents}, 20, "ul2")
        model, trainer = model_and_trainer(vocabulary, 1, 32)
        config = DatasetConfig("text", {"inputs": 64, "targets": 48}, "train", 8, cache_dir=name)
        log, samples, ended = folder / "run" / "metrics.jsonl", [], threading.Event()

        def watch() -> None:
            seen = 0
            while not ended.wait(0.05):
                count = log.read_text().count('"kind": "train"') if log.exists() else 0
                if count > seen:
                    seen, memory = count, psutil.Process().memory_info()
                    samples.append((seen * SAMPLE_PERIOD, memory.rss / 2**20, (memory.rss - memory.shared) / 2**20))

        thread = threading.Thread(target=watch)
        thread.start()
        began = time.perf_counter()
        loop.train(
            model=model,
            train_dataset_cfg=config,
            train_eval_dataset_cfg=config,
            checkpoint_cfg=CheckpointConfig(SaveCheckpointConfig(period=500)),
            partitioner=Partitioner(),
            trainer=trainer,
            model_dir=str(folder / "run"),
            total_steps=steps,
            eval_steps=4,
            eval_period=500,
            stats_period=SAMPLE_PERIOD,
            random_seed=0,
        )
        ended.set()
        thread.join()
    step, rss, anonymous = map(list, zip(*samples, strict=True))
    late = [i for i, at in enumerate(step) if at > min(WARM_UP, steps // 2)]
    fits = {
        name: line_through([step[i] / 1000 for i in late], [values[i] for i in late])
        for name, values in (("rss", rss), ("anonymous", anonymous))
    }
    seconds = time.perf_counter() - began
    return {"step": step, "rss_mib": rss, "anonymous_mib": anonymous, "mib_per_1000_steps": fits, "seconds": seconds}


def plot(results: dict[str, Any], picture: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.6), constrained_layout=True)
    for axis, name, label in ((axes[0], "layers", "layers of each stack"), (axes[1], "batch", "rows in a batch")):
        if "steps" in results:
            found = results["steps"][name]
            x = np.array([0, found["size"][-1]])
            axis.plot(x, found["slope"] * x + found["intercept"], color="0.7", zorder=0)
            axis.plot(found["size"], found["seconds"], "o", color="tab:blue")
            axis.set(title=f"step time: R² = {found['r2']:.4f}", xlabel=label, ylabel="seconds", ylim=(0, None))
    if "start" in results:
        found = results["start"]
        for color, kind in (("tab:blue", "text"), ("tab:orange", "supervised")):
            axes[2].plot(found["megabytes"], found[kind], "o-", color=color, label=kind)
            axes[2].plot(found["megabytes"], found[f"{kind}, first"], "o:", color=color, label=f"{kind}, first time")
        axes[2].set(title="data start-up, to the first batch", xlabel="MB of tokens", ylabel="seconds", xscale="log")
        axes[2].set_ylim(0, None)
        axes[2].legend()
    if "memory" in results:
        found = results["memory"]
        axes[3].plot(found["step"], found["rss_mib"], label="resident")
        axes[3].plot(found["step"], found["anonymous_mib"], label="of it anonymous")
        slope = found["mib_per_1000_steps"]["anonymous"]["slope"]
        axes[3].set(title=f"memory: {slope:+.2f} MiB per 1,000 steps", xlabel="step", ylabel="MiB", ylim=(0, None))
        axes[3].legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="steps, start, memory, plot")
    parser.add_argument("--results", type=Path, default=Path("growth.json"), metavar="F")
    parser.add_argument("--picture", type=Path, default=Path("growth.png"), metavar="F")
    parser.add_argument("--steps", type=int, default=MEMORY_STEPS, help="of the memory part (default %(default)s)")
    parser.add_argument("--open", nargs=2, metavar=("FOLDER", "TASK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(open_once(Path(arguments.open[0]), arguments.open[1])))
        return
    if unknown := set(arguments.parts) - {"steps", "start", "memory", "plot"}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}")
    measure: dict[str, tuple] = {
        "steps": (measure_steps,),
        "start": (measure_start,),
        "memory": (measure_memory, arguments.steps),
    }
    for part in arguments.parts:
        results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
        if part == "plot":
            plot(results, arguments.picture)
            continue
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            results[part] = process.submit(*measure[part]).result()
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
        shown = {k: v for k, v in results[part].items() if k not in ("step", "rss_mib", "anonymous_mib")}
        print(f"{part}: {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main()
