"""Raw text cached per second of one core: this project's cache beside seqio_cache_tasks, on the same task in one run.

    python benchmarks/cache_time.py                    100 MB: ours, seqio's; then ours in 1 and 2 processes
    python benchmarks/cache_time.py --clean            with the cleaning of tasks/corpora.py before the tokens
    python benchmarks/cache_time.py --sides ours exact minhash

The text is the demo's corpus, repeated, each document with a number of its own, in files of 25 MB; the vocabulary has
8,000 pieces. Ours is `vikhr-t5 cache`, seqio's is `seqio.scripts.cache_tasks_main` with Beam's FnApiRunner (its
DirectRunner needs a program from the network). Each is a process of its own on one core, from start to end, and is run
on hardly any text, too: that is the start-up, which is taken off. Rates are per second of processor time, all threads
and processes counted, so that other work on the machine matters little; the figure of two processes is by the clock and
needs a quiet machine. Both sides must have counted the same tokens.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vikhr_t5.data.store import TokenStore, task_directory  # noqa: E402
from vikhr_t5.data.vocabulary import train_vocabulary  # noqa: E402

CORPUS = ROOT / "tasks" / "demo_data" / "ru.txt"
FILE_BYTES, PIECES, TASK, VOCABULARY = 25 << 20, 8000, "cache_time", "ru.model"
MODULE = """
import functools, seqio
from tasks.cleaning import clean
from tasks.corpora import STEPS
from vikhr_t5.data.sources import TextSource
from tasks import settings

seqio.TaskRegistry.add(
    {task!r},
    source=TextSource({{"train": {files!r}}}),
    preprocessors=[
        *([clean(*STEPS)] if {cleaned} else []),
        functools.partial(seqio.preprocessors.rekey, key_map={{"targets": "text"}}),
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos,
    ],
    output_features={{"targets": settings.output_features()["targets"]}},
)
"""


def prepare(folder: Path, megabytes: float, cleaned: bool) -> int:
    """Text and the module of the task in `folder`; how many bytes of text."""
    folder.mkdir()
    documents = CORPUS.read_text(encoding="utf-8").split("\n\n")
    written, repeat, file = 0, 0, None
    while written < megabytes * 1e6:
        for number, document in enumerate(documents):
            if file is None or file.tell() >= FILE_BYTES:
                if file is not None:
                    file.close()
                file = open(folder / f"text-{written:012d}.txt", "wb")  # noqa: SIM115
            written += file.write(f"Страница {repeat}-{number}. {document}\n\n".encode())
            if written >= megabytes * 1e6:
                break
        repeat += 1
    assert file is not None
    file.close()
    text = MODULE.format(task=TASK, files=str(folder / "text-*.txt"), cleaned=cleaned)
    (folder / "cache_time_tasks.py").write_text(text, encoding="utf-8")
    return written


def measure(command: list[str], folder: Path, cores: int) -> dict[str, float]:
    """Run a command on so many cores: seconds by the clock and of processor time, and peak memory in GB."""
    environment = os.environ | {
        "VIKHR_T5_VOCABULARY": str(folder.parent / VOCABULARY),
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    start = time.perf_counter()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{(folder / 'log').read_text(errors='replace')[-3000:]}")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "memory_gb": usage.ru_maxrss / 1e6,
    }


def ours(folder: Path, dedup: str = "none", workers: int = 1) -> dict[str, float]:
    """`vikhr-t5 cache`, a core for each of its processes."""
    cache_dir = folder / f"ours-{dedup}-{workers}"
    command = [sys.executable, "-m", "vikhr_t5.cli", "cache", "--mixture", TASK, "--module", "cache_time_tasks"]
    command += ["--cache_dir", str(cache_dir), "--num_workers", str(workers), "--dedup", dedup]
    found = measure(command, folder, cores=workers)
    manifest = TokenStore(task_directory(cache_dir, TASK, "train")).manifest
    tokens = manifest.num_tokens["targets"] - manifest.num_examples  # without EOS, which seqio adds later
    return {**found, "tokens": tokens, "written_gb": sum(shard.num_bytes for shard in manifest.shards) / 1e9}


def seqios(folder: Path) -> dict[str, float]:
    """seqio_cache_tasks."""
    cache_dir = folder / "seqio"
    command = [sys.executable, "-m", "seqio.scripts.cache_tasks_main", "--module_import=cache_time_tasks"]
    command += [f"--tasks={TASK}", f"--output_cache_dir={cache_dir}", "--pipeline_options=--runner=FnApiRunner"]
    found = measure(command, folder, cores=1)
    stats = json.loads((cache_dir / TASK / "stats.train.json").read_text())
    written = sum(file.stat().st_size for file in (cache_dir / TASK).iterdir())
    return {**found, "tokens": stats["targets_tokens"], "written_gb": written / 1e9}


SIDES: dict[str, Callable[[Path], dict[str, float]]] = {
    "ours": ours,
    "seqio": seqios,
    "exact": functools.partial(ours, dedup="exact"),
    "minhash": functools.partial(ours, dedup="minhash"),
    "2 workers": functools.partial(ours, workers=2),
}


def compare(side: str, large: Path, small: Path, megabytes: float) -> dict[str, float]:
    """A side on much text, and on hardly any: the difference is what the text costs."""
    run = SIDES[side]
    found, start_up = run(large), run(small)
    cpu = found["cpu_seconds"] - start_up["cpu_seconds"]
    return {
        **found,
        "start_up_cpu_seconds": start_up["cpu_seconds"],
        "start_up_seconds": start_up["seconds"],
        "mb_per_cpu_second": megabytes / cpu,
        "mb_per_cpu_second_whole": megabytes / found["cpu_seconds"],
        "tokens_per_cpu_second": found["tokens"] / cpu,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="of text (default %(default)s)")
    parser.add_argument("--clean", action="store_true", help="clean the text before it is tokenized")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=("ours", "seqio", "2 workers"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        train_vocabulary([CORPUS], Path(name) / VOCABULARY, PIECES)
        small, large = Path(name) / "small", Path(name) / "large"
        prepare(small, 0.1, arguments.clean)
        size = prepare(large, arguments.megabytes, arguments.clean) / 1e6
        for side in arguments.sides:
            results[side] = compare(side, large, small, size)
            if not arguments.json:
                show(side, results[side])
    if arguments.json:
        print(json.dumps({"megabytes": size, "clean": arguments.clean, "results": results}))
        return
    if {"ours", "seqio"} <= set(results):
        assert results["ours"]["tokens"] == results["seqio"]["tokens"], "they count different tokens"
        for rate, words in (("mb_per_cpu_second", "without start-up"), ("mb_per_cpu_second_whole", "with it")):
            print(f"per core, {words}: {results['ours'][rate] / results['seqio'][rate]:.2f} times seqio's rate")
    if {"ours", "2 workers"} <= set(results):
        spent = [results[side]["seconds"] - results[side]["start_up_seconds"] for side in ("ours", "2 workers")]
        print(f"2 processes: {spent[0] / spent[1]:.2f} times as fast as one, by the clock, without start-up")


def show(side: str, found: dict[str, float]) -> None:
    """A line of the table."""
    rates = f"{found['mb_per_cpu_second']:5.2f} MB/s, {found['tokens_per_cpu_second'] / 1e3:5.0f}k tokens/s per core"
    whole = f"{found['mb_per_cpu_second_whole']:.2f} MB/s with {found['start_up_cpu_seconds']:.1f} s of start-up"
    memory = f"{found['memory_gb']:.2f} GB of memory, {found['written_gb']:.3f} GB written"
    print(f"{side:>10}: {rates} ({whole}); {found['seconds']:.0f} s by the clock, {memory}", flush=True)


if __name__ == "__main__":
    main()
