"""Useful tokens a second that one core makes ready to train on: this pipeline beside seqio's own, packed, in one run;
and beside Hugging Face's collator.

    python benchmarks/input_pipeline.py                     512/240 and the other lengths worth comparing
    python benchmarks/input_pipeline.py --lengths 1024/480 --json
    python benchmarks/input_pipeline.py --supervised --lengths 512/240

All sides start from the same tokens of real Russian text (the demo's corpus, repeated) and end with batches in NumPy;
a token is useful if it is not padding, in inputs or targets. Ours: token store → `pipeline.Dataset.batches`, packed.
seqio's: tokenized documents in memory (no records to parse) → `Denoise`, which calls the same NumPy code → seqio's
trim-and-pack (`EncDecFeatureConverter(pack=True)`) → batches.

`--supervised`: examples of inputs and targets instead of denoised text, and a third side: a `datasets` table in Arrow →
torch's `DataLoader`, shuffled → transformers' `DataCollatorForSeq2Seq`, which pads to the longest of the batch and does
not pack. Of span corruption transformers has no collator to import (one is inside a Flax example, no denoisers of UL2).

Each side is a process of its own on one core. Rates are per second of processor time, all threads counted, so that
other work on the machine does not matter.
"""

import argparse
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
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from stores import vocabulary_and_documents, write_store  # noqa: E402

from vikhr_t5.data.pipeline import DatasetConfig, open_dataset  # noqa: E402
from vikhr_t5.data.rows import Batch  # noqa: E402
from vikhr_t5.data.store import TokenStore, task_directory  # noqa: E402
from vikhr_t5.data.vocabulary import Vocabulary  # noqa: E402

LENGTHS = ("512/240", "512/256", "512/512", "1024/480", "1024/512")
TASK, REPEATS = "text", 20


def prepare(folder: Path, mixture: str | None) -> None:
    """A vocabulary and a token store, without seqio: what all sides read. No mixture: supervised examples."""
    vocabulary, documents = vocabulary_and_documents(folder)
    columns = {"targets": documents}
    if mixture is None:
        rng = np.random.default_rng(0)
        sizes = rng.lognormal([4.6, 3.6], 0.7, (len(documents), 2)).astype(int).clip(4, (400, 200))
        cuts = [(ids[:size], ids[size : size + targets]) for ids, (size, targets) in zip(documents, sizes, strict=True)]
        cuts = [(inputs, targets) for inputs, targets in cuts if len(targets)]
        columns = {"inputs": [inputs for inputs, _ in cuts], "targets": [targets for _, targets in cuts]}
    write_store(folder, TASK, vocabulary, columns, REPEATS, mixture)


def ours(folder: Path, mixture: str | None, inputs: int, targets: int, batch_size: int) -> Iterator[Batch]:
    """Batches from the token store."""
    lengths = {"inputs": inputs, "targets": targets}
    config = DatasetConfig(TASK, lengths, "train", batch_size, cache_dir=str(folder), denoisers=mixture)
    return open_dataset(config, Vocabulary(str(folder / "ru.model"))).batches()


def stored(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Feature -> (tokens of all examples, their lengths)."""
    store = TokenStore(task_directory(folder, TASK, "train"))
    return {
        name: (store.tokens(name, 0, store.num_tokens(name)), store.lengths(name)) for name in store.manifest.features
    }


def seqios(folder: Path, mixture: str | None, inputs: int, targets: int, batch_size: int) -> Iterator[Batch]:
    """Batches of seqio's own packing, from the same documents."""
    import seqio
    import tensorflow as tf

    from tasks.preprocessors import Denoise

    columns = {name: tf.RaggedTensor.from_row_lengths(*column) for name, column in stored(folder).items()}
    vocabulary = seqio.SentencePieceVocabulary(str(folder / "ru.model"), 300)
    seqio.TaskRegistry.add(
        "benchmark",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(columns).map(dict),
            splits=["train"],
        ),
        preprocessors=[Denoise(mixture)] if mixture else [],
        output_features={name: seqio.Feature(vocabulary, add_eos=bool(mixture)) for name in ("inputs", "targets")},
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


def huggingfaces(folder: Path, mixture: str | None, inputs: int, targets: int, batch_size: int) -> Iterator[Batch]:
    """Batches of transformers' collator for sequence to sequence, from the same examples, trimmed."""
    import datasets
    import torch
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

    names = {"inputs": ("input_ids", inputs), "targets": ("labels", targets)}
    columns = {
        new: [ids[:length].tolist() for ids in np.split(*cut(column))]
        for (name, column) in stored(folder).items()
        for new, length in [names[name]]
    }
    padding = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0})), pad_token="<pad>")
    loader = torch.utils.data.DataLoader(
        datasets.Dataset.from_dict(columns),
        batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=DataCollatorForSeq2Seq(padding, label_pad_token_id=0, return_tensors="np"),
    )
    while True:
        for batch in loader:
            yield {"encoder_input_tokens": batch["input_ids"], "decoder_target_tokens": batch["labels"]}


def cut(column: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, where `np.split` parts them)."""
    return column[0], np.cumsum(column[1])[:-1]


SIDES = {"ours": ours, "seqio": seqios, "huggingface": huggingfaces}


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
    command += ["--supervised"] if arguments.supervised else ["--mixture", arguments.mixture]
    command += ["--seconds", str(arguments.seconds)]
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
    parser.add_argument("--supervised", action="store_true", help="examples of inputs and targets, without denoisers")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    mixture = None if arguments.supervised else arguments.mixture
    if arguments.side:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        inputs, targets = map(int, arguments.lengths[0].split("/"))
        batches = SIDES[arguments.side](arguments.folder, mixture, inputs, targets, arguments.batch_size)
        print(json.dumps(measure(batches, arguments.seconds)), flush=True)
        os._exit(0)  # neither library's threads need to end in order
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), mixture)
        results = []
        for lengths in arguments.lengths:
            sides = SIDES if arguments.supervised else ("ours", "seqio")
            found = {side: run(side, Path(folder), arguments, lengths) for side in sides}
            rates = {side: figures["tokens_per_cpu_second"] for side, figures in found.items()}
            ratios = {side: rates["ours"] / rate for side, rate in rates.items() if side != "ours"}
            results.append({"lengths": lengths, **found, "ratio": ratios})
            if not arguments.json:
                for side, figures in found.items():
                    core, clock = figures["tokens_per_cpu_second"] / 1e6, figures["tokens_per_second"] / 1e6
                    fill = f"useful inputs {figures['useful_inputs']:.1%}, targets {figures['useful_targets']:.1%}"
                    print(
                        f"{lengths:>9} {side:>11}: {core:6.2f}M tokens/s per core ({clock:.2f}M by the clock), {fill}"
                    )
                shown = ", ".join(f"{ratio:.1f} x {side}" for side, ratio in ratios.items())
                print(f"{lengths:>9} ours is {shown}", flush=True)
    if arguments.json:
        print(json.dumps({"mixture": mixture, "batch_size": arguments.batch_size, "results": results}))


if __name__ == "__main__":
    main()
