"""A T5 of a few thousand parameters on random packed batches: the trainer without TensorFlow, Grain or a cache.

As a script, `python tests/tiny_run.py RUN_DIR '{"total_steps": 20, ...}'` trains in a process of its own (which can be
killed): the JSON holds arguments of `run`.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from vikhr_t5.data.pipeline import DatasetConfig
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.model.network import T5Config, Transformer
from vikhr_t5.train import loop, optimizers
from vikhr_t5.train.checkpoints import CheckpointConfig, RestoreCheckpointConfig, SaveCheckpointConfig
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.state import EncoderDecoderModel
from vikhr_t5.train.step import Trainer

CONFIG = T5Config(
    emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_encoder_layers=2, num_decoder_layers=1,
    mlp_activations=("gelu", "linear"), dropout_rate=0.1,
)  # fmt: skip
LENGTHS = {"inputs": 24, "targets": 12}
SOURCES = ("copy", "reverse")


class TinyVocabulary:
    """100 ids with the surface of `Vocabulary` that the trainer uses."""

    size, padded_size, extra_ids, eos_id, model_bytes = 100, 128, 10, 1, b"no model"
    fingerprint = Vocabulary.fingerprint

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(i) for i in ids if i > 1)


@dataclasses.dataclass
class TinyDataset:
    """Batch s is a pure function of (seed, s), as in the pipeline. `slow`: seconds that a batch takes."""

    config: DatasetConfig
    slow: float = 0.0
    source_names = SOURCES
    fingerprint = "tiny data"

    def __post_init__(self) -> None:
        self.batch_size = self.config.batch_size
        self.lengths = (self.config.task_feature_lengths["inputs"], self.config.task_feature_lengths["targets"])
        self.seen: list[int] = []
        self.metrics: dict[str, Any] = {}  # no task has metric functions

    def pack(self) -> None:
        """Nothing here is to be found out."""

    def batches(self, start_step=0, rows=slice(None), num_steps=None) -> Iterator[dict[str, np.ndarray]]:
        for step in range(start_step, start_step + num_steps):
            time.sleep(self.slow)
            self.seen.append(step)
            batch = make_batch(self.batch_size, self.lengths, (self.config.seed or 0, step))
            yield {name: values[rows] for name, values in batch.items()}

    def eval_batches(self, num_steps=None, rows=slice(None)) -> Iterator[dict[str, np.ndarray]]:
        for step in range(num_steps or 2):
            batch = make_batch(self.batch_size, self.lengths, (10**6, step))
            yield {name: values[rows] for name, values in batch.items()}


def make_batch(rows: int, lengths: tuple[int, int], seed: Any, segments: int = 3) -> dict[str, np.ndarray]:
    """Packed rows in the batch contract: source 1 copies its inputs, source 2 reverses them."""
    rng = np.random.default_rng(seed)
    sides = {"encoder": lengths[0], "decoder": lengths[1]}
    names = {"encoder": ("input_tokens", "segment_ids", "positions")}
    names["decoder"] = ("target_tokens", "input_tokens", "loss_weights", "segment_ids", "positions", "source_ids")
    batch = {f"{side}_{n}": np.zeros((rows, sides[side]), np.int32) for side in sides for n in names[side]}
    for row in range(rows):
        start, inputs_start = 0, 0
        for segment in range(1, segments + 1):
            length = int(rng.integers(1, lengths[1] // segments))
            source = int(rng.integers(1, 3))
            tokens = rng.integers(3, 90, length)
            target = np.append(tokens if source == 1 else tokens[::-1], 1)
            here = slice(start, start + length + 1)
            there = slice(inputs_start, inputs_start + length + 1)
            batch["encoder_input_tokens"][row, there] = np.append(tokens, 1)
            batch["encoder_segment_ids"][row, there] = segment
            batch["encoder_positions"][row, there] = np.arange(length + 1)
            batch["decoder_target_tokens"][row, here] = target
            batch["decoder_input_tokens"][row, here] = np.append(0, target[:-1])
            batch["decoder_loss_weights"][row, here] = 1
            batch["decoder_segment_ids"][row, here] = segment
            batch["decoder_positions"][row, here] = np.arange(length + 1)
            batch["decoder_source_ids"][row, here] = source
            start, inputs_start = here.stop, there.stop
    return batch


def dataset_config(batch_size: int = 8, **fields: Any) -> DatasetConfig:
    return DatasetConfig("tiny", LENGTHS, "train", batch_size, **fields)


def tiny_model(config: T5Config = CONFIG, optimizer: Any = None, **fields: Any) -> EncoderDecoderModel:
    vocabulary: Any = TinyVocabulary()
    optimizer = optimizer or optimizers.Adafactor()
    return EncoderDecoderModel(Transformer(config), vocabulary, vocabulary, optimizer, **fields)


def run(
    model_dir: str | Path,
    total_steps: int = 6,
    *,
    period: int = 2,
    keep: int | None = 3,
    initial: str | None = None,
    reset_optimizer: bool = False,
    best_metric: str | None = None,
    best_mode: str = "min",
    slow: float = 0.0,
    model: EncoderDecoderModel | None = None,
    trainer: Trainer | None = None,
    mesh: tuple[int, int, int] = (-1, 1, 1),
    optimizer_memory: str = "device",
    batch_size: int = 8,
    dataset: Any = None,
    evaluate: bool = True,
    **arguments: Any,
) -> int:
    """`loop.train` with tiny defaults."""
    open_tiny = mock.patch.object(loop, "open_dataset", lambda config, _: dataset or TinyDataset(config, slow))
    with open_tiny:
        return loop.train(
            model=model or tiny_model(),
            train_dataset_cfg=dataset_config(batch_size),
            train_eval_dataset_cfg=dataset_config(batch_size, shuffle=False) if evaluate else None,
            checkpoint_cfg=CheckpointConfig(
                SaveCheckpointConfig(period=period, keep=keep, best_metric=best_metric, best_mode=best_mode),
                RestoreCheckpointConfig(initial, reset_optimizer) if initial else None,
            ),
            partitioner=Partitioner(*mesh, optimizer_memory=optimizer_memory),
            trainer=trainer or Trainer(optimizers.create_learning_rate_scheduler("constant", 0.05)),
            model_dir=str(model_dir),
            total_steps=total_steps,
            **{"eval_steps": 2, "eval_period": 4, "stats_period": 2, "num_samples": 2, "random_seed": 0, **arguments},
        )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        run(sys.argv[1], **json.loads(sys.argv[2]))
