"""Useful tokens a second that one core makes ready to train on: this pipeline beside seqio's own, packed, in one run.

    python benchmarks/input_pipeline.py                     512/240 and the other lengths worth comparing
    python benchmarks/input_pipeline.py --lengths 1024/480 --json

Both sides start from the same tokens of real Russian text (the demo's corpus, repeated) and end with packed batches in
NumPy; a token is useful if it is not padding, in inputs or targets. Ours: token store → `pipeline.Dataset.batches`.
seqio's: tokenized documents in memory (no records to parse) → `Denoise`, which calls the same NumPy code → seqio's
trim-and-pack (`EncDecFeatureConverter(pack=True)`) → batches. Each side is a process of its own on one core. Rates are
per second of processor time, all threads counted, so that other work on the machine does not matter.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vikhr_t5.data import denoisers  # noqa: E402
from vikhr_t5.data.manifest import Feature, Manifest, Provenance  # noqa: E402
from vikhr_t5.data.pipeline import DatasetConfig, open_dataset  # noqa: E402
from vikhr_t5.data.rows import Batch  # noqa: E402
from vikhr_t5.data.store import ShardWriter, TokenStore, mixture_file, task_directory  # noqa: E402
from vikhr_t5.data.vocabulary import Vocabulary, train_vocabulary  # noqa: E402

CORPUS = ROOT / "tasks" / "demo_data" / "ru.txt"
LENGTHS = ("512/240", "512/256", "512/512", "1024/480", "1024/512")
TASK, PIECES, REPEATS = "text", 8000, 20


def prepare(folder: Path, mixture: str) -> None:
    """A vocabulary and a token store, without seqio: what both sides read."""
    documents = CORPUS.read_text(encoding="utf-8").split("\n\n")
    vocabulary = train_vocabulary(documents, folder / "ru.model", PIECES)
    encoded = [np.array(vocabulary.encode(text), np.int32) for text in documents] * REPEATS
    split = task_directory(folder, TASK, "train")
    split.mkdir(parents=True)
    with ShardWriter(split / "shard-00000-of-00001.arrow", ("targets",)) as writer:
        writer.write({"targets": (np.concatenate(encoded), np.array([len(tokens) for tokens in encoded]))})
    feature = Feature(True, vocabulary.fingerprint(), vocabulary.size, vocabulary.extra_ids)
    provenance = Provenance("none", {})
    transform = denoisers.to_json(denoisers.mixture(mixture))
    manifest = Manifest(TASK, "train", {"targets": feature}, [writer.shard(0)], transform, [], provenance, {})
    (split / "manifest.json").write_text(manifest.to_json())
    record = {"rates": {TASK: 1.0}, "splits": {TASK: ["train"]}, "provenance": dataclasses.asdict(provenance)}
    mixture_file(folder, TASK).parent.mkdir()
    mixture_file(folder, TASK).write_text(json.dumps(record))


def ours(folder: Path, mixture: str, inputs: int, targets: int, batch_size: int) -> Iterator[Batch]:
    """Batches from the token store."""
    lengths = {"inputs": inputs, "targets": targets}
    config = DatasetConfig(TASK, lengths, "train", batch_size, cache_dir=str(folder), denoisers=mixture)
    return open_dataset(config, Vocabulary(str(folder / "ru.model"))).batches()


def seqios(folder: Path, mixture: str, inputs: int, targets: int, batch_size: int) -> Iterator[Batch]:
    """Batches of seqio's own packing, from the same documents."""
    import seqio
    import tensorflow as tf

    from tasks.preprocessors import Denoise

    store = TokenStore(task_directory(folder, TASK, "train"))
    tokens = store.tokens("targets", 0, store.num_tokens("targets"))
    documents = tf.RaggedTensor.from_row_lengths(tokens, store.lengths("targets"))
    vocabulary = seqio.SentencePieceVocabulary(str(folder / "ru.model"), 300)
    seqio.TaskRegistry.add(
        "benchmark",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({"targets": documents}).map(
                lambda example: {"targets": example["targets"]}
            ),
            splits=["train"],
        ),
        preprocessors=[Denoise(mixture)],
        output_features={name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")},
    )
    dataset = seqio.get_dataset(
        "benchmark",
        task_feature_lengths={"inputs": inputs, "targets": targets},
        dataset_split="train",
        shuffle=True,
        num_epochs=None,
        feature_converter=seqio.EncDecFeatureConverter(pack=True),
        seed=1,
    )
    return dataset.batch(batch_size, drop_remainder=True).prefetch(2).as_numpy_iterator()


def measure(batches: Iterator[Batch], seconds: float) -> dict[str, float]:
    """Useful tokens, shares and rates over `seconds` of processor time, after a first batch that warms up."""
    next(batches)
    useful, places, counted = np.zeros(2), np.zeros(2), 0
    cpu, wall = time.process_time(), time.perf_counter()
    while (spent := time.process_time() - cpu) < seconds:
        batch = next(batches)
        sides = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
        useful += [np.count_nonzero(side) for side in sides]
        places += [side.size for side in sides]
        counted += 1
    elapsed = time.perf_counter() - wall
    inputs, targets = (useful / places).tolist()
    return {
        "tokens_per_cpu_second": useful.sum() / spent,
        "tokens_per_second": useful.sum() / elapsed,
        "useful_inputs": inputs,
        "useful_targets": targets,
        "batches": counted,
    }


def run(side: str, folder: Path, arguments: argparse.Namespace, lengths: str) -> dict[str, float]:
    """One side in a process of its own, on one core."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--lengths", lengths]
    command += ["--mixture", arguments.mixture, "--seconds", str(arguments.seconds)]
    command += ["--batch_size", str(arguments.batch_size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixture", default="ul2", help="denoisers (default %(default)s)")
    parser.add_argument("--lengths", nargs="*", default=LENGTHS, help="inputs/targets (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="of processor time for each figure")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--side", choices=("ours", "seqio"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        inputs, targets = map(int, arguments.lengths[0].split("/"))
        make = ours if arguments.side == "ours" else seqios
        batches = make(arguments.folder, arguments.mixture, inputs, targets, arguments.batch_size)
        print(json.dumps(measure(batches, arguments.seconds)), flush=True)
        os._exit(0)  # neither library's threads need to end in order
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments.mixture)
        results = []
        for lengths in arguments.lengths:
            found = {side: run(side, Path(folder), arguments, lengths) for side in ("ours", "seqio")}
            ratio = found["ours"]["tokens_per_cpu_second"] / found["seqio"]["tokens_per_cpu_second"]
            results.append({"lengths": lengths, **found, "ratio": ratio})
            if not arguments.json:
                for side, figures in found.items():
                    core, clock = figures["tokens_per_cpu_second"] / 1e6, figures["tokens_per_second"] / 1e6
                    fill = f"useful inputs {figures['useful_inputs']:.1%}, targets {figures['useful_targets']:.1%}"
                    print(f"{lengths:>9} {side:>5}: {core:6.2f}M tokens/s per core ({clock:.2f}M by the clock), {fill}")
                print(f"{lengths:>9} ratio: {ratio:.1f}", flush=True)
    if arguments.json:
        print(json.dumps({"mixture": arguments.mixture, "batch_size": arguments.batch_size, "results": results}))


if __name__ == "__main__":
    main()
