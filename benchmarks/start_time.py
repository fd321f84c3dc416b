"""From the command to the end of the first step: `vikhr-t5 train`, beside a script with transformers' Trainer.

    python benchmarks/start_time.py                    t5_1_1_small, batch 8, 512/114
    python benchmarks/start_time.py --size tiny --repeats 5 --json
    python benchmarks/start_time.py --t5x PATH_TO_T5X  and t5x's step, see below

Ours starts twice: with an empty cache of XLA's programs (cold), and with what the first start left there (warm). Both
sides read data that is on disk: ours a token store, packed and denoised as it runs (the demo's Russian text); Trainer
an Arrow table of tokens that are ready. Both have fresh parameters, Adafactor, and no evaluation. In turns; medians.

With --t5x, its model, optimizer and step are built, compiled and run once (`t5x_step_time.py`), on one batch in memory:
no seqio, no checkpoints, so what its own launcher takes is more.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from step_time import SIZES, VOCABULARY, Theirs, tokens
from stores import vocabulary_and_documents, write_store

ROOT = Path(__file__).resolve().parents[1]
TASK, REPEATS = "text", 20


def first_step(command: list[str], has_stepped: Callable[[], bool], **environment: str) -> float:
    """Seconds from the start of `command` until `has_stepped`; then it may end by itself."""
    with open(os.devnull, "w") as nowhere, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=nowhere, stderr=errors)
        while not has_stepped():
            if process.poll() is not None and not has_stepped():
                errors.seek(0)
                raise SystemExit(f"{' '.join(command)} ended before its first step:\n{errors.read()[-2000:]}")
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.wait()
    return seconds


def ours(folder: Path, options: argparse.Namespace, warm: bool) -> float:
    run, programs = folder / "run", folder / "programs"
    for old in [run] if warm else [run, programs]:
        shutil.rmtree(old, ignore_errors=True)
    lengths = f"{{'inputs': {options.inputs}, 'targets': {options.targets}}}"
    bindings = {
        "VOCABULARY_FILE": repr(str(folder / "ru.model")),
        "MIXTURE_OR_TASK_NAME": repr(TASK),
        "TASK_FEATURE_LENGTHS": lengths,
        "CACHE_DIR": repr(str(folder)),
        "MODEL_DIR": repr(str(run)),
        "BATCH_SIZE": options.batch_size,
        "TRAIN_STEPS": 1,
        "loop.train.train_eval_dataset_cfg": None,
        "network.T5Config.vocab_size": VOCABULARY,
        "network.T5Config.dtype": "'float32'",
    }
    command = [sys.executable, "-m", "vikhr_t5.cli", "train", f"--gin_file=models/t5_1_1_{options.size}.gin"]
    command += ["--gin_file=runs/pretrain.gin", *(f"--gin.{name}={value}" for name, value in bindings.items())]
    metrics = run / "metrics.jsonl"  # its first line is written when the first step has run
    return first_step(
        command,
        lambda: metrics.exists() and metrics.stat().st_size > 0,
        JAX_COMPILATION_CACHE_DIR=str(programs),
        PYTHONPATH=str(ROOT),
    )


def other(folder: Path, options: argparse.Namespace, worker: str) -> float:
    marker = folder / "stepped"
    marker.unlink(missing_ok=True)
    # t5x keeps no compiled programs of its own accord.
    settings = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", worker, str(folder)]
    return first_step(command, marker.exists, **settings)


def with_trainer(folder: Path, options: argparse.Namespace) -> None:
    """What a script with transformers' Trainer does."""
    from datasets import load_from_disk
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    class Marks(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            (folder / "stepped").touch()

    settings = TrainingArguments(
        str(folder / "trainer"),
        per_device_train_batch_size=options.batch_size,
        max_steps=1,
        optim="adafactor",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    model = Theirs(options, "float32", 0.0).model
    data = load_from_disk(folder / "arrow")
    Trainer(model, settings, train_dataset=data, data_collator=default_data_collator, callbacks=[Marks()]).train()


def with_t5x(folder: Path, options: argparse.Namespace) -> None:
    from t5x_step_time import T5x

    T5x(options, "float32", 0.0).step()
    (folder / "stepped").touch()


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """The data of both sides, made before anything is timed."""
    from datasets import Dataset

    vocabulary, documents = vocabulary_and_documents(folder)
    write_store(folder, TASK, vocabulary, {"targets": documents}, REPEATS, "ul2")
    inputs, targets = tokens(options)
    Dataset.from_dict({"input_ids": inputs.tolist(), "labels": targets.tolist()}).save_to_disk(folder / "arrow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=114)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--t5x", metavar="PATH_TO_T5X")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.optimizer = "adafactor"
    workers = {"transformers' Trainer": with_trainer, "t5x": with_t5x}
    if options.worker:
        return workers[options.worker[0]](Path(options.worker[1]), options)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options)
        sides: dict[str, Callable[[], float]] = {
            "vikhr-t5, cold": lambda: ours(folder, options, warm=False),
            "vikhr-t5, warm": lambda: ours(folder, options, warm=True),
            "transformers' Trainer": lambda: other(folder, options, "transformers' Trainer"),
        }
        if options.t5x:
            sides["t5x"] = lambda: other(folder, options, "t5x")
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side, start in sides.items():
                seconds[side].append(start())
                print(f"{side}: {seconds[side][-1]:.1f} s", file=sys.stderr)
    if options.json:
        return print(json.dumps(seconds, indent=2))
    print(
        f"\nt5 v1.1 {options.size}, batch {options.batch_size}, {options.inputs}/{options.targets}, float32:", end=" "
    )
    print("seconds from the command to the end of the first step\n")
    for side, times in seconds.items():
        print(f"{side:24s}{median(times):6.1f}  ({min(times):.1f} to {max(times):.1f})")


if __name__ == "__main__":
    main()
