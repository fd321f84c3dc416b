"""Evaluation during training: teacher-forced loss and accuracy per source, metrics of generated text, and a few decoded
examples as text.

B batch, S source length, T target length.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from vikhr_t5.data.pipeline import Dataset
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.model import decoding
from vikhr_t5.train.checkpoints import SaveCheckpointConfig
from vikhr_t5.train.generation import GenerativeEvaluator
from vikhr_t5.train.losses import loss_normalizer
from vikhr_t5.train.metrics import summarize
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.state import Batch, EncoderDecoderModel, Sums
from vikhr_t5.train.step import zero_sums


class Evaluator:
    """Runs the same batches through the model whenever it is asked.

    Args:
      dataset: in a fixed order (`shuffle=False`).
      num_batches: batches of an evaluation; the whole dataset where it has fewer. None: the whole dataset.
      num_samples: examples decoded greedily, from as many sources as there are.
      param_shardings: of the parameters.
      infer_eval_examples: of each task with metric functions, decoded for these; None: all, 0: none.
    """

    def __init__(
        self,
        model: EncoderDecoderModel,
        partitioner: Partitioner,
        dataset: Dataset,
        num_batches: int | None,
        num_samples: int,
        param_shardings: Any,
        infer_eval_examples: int | None = 0,
    ):
        self.model, self.partitioner, self.dataset = model, partitioner, dataset
        self.num_batches, self.num_samples = num_batches, num_samples
        self.name = dataset.config.mixture_or_task_name
        partitioner.check_batch_size(dataset.batch_size)
        self.generative = None
        if infer_eval_examples != 0:
            self.generative = GenerativeEvaluator(model, partitioner, dataset, infer_eval_examples)

        def add(params: Any, sums: Sums, batch: Batch) -> Sums:
            weights = loss_normalizer(None, batch).weights
            _, batch_sums = model.loss_sums(params, batch, weights, len(dataset.source_names))
            return {**sums, **{name: sums[name] + value for name, value in batch_sums.items()}}

        replicated = partitioner.replicated
        self._add = partitioner.jit(
            add,
            in_shardings=(param_shardings, replicated, partitioner.batch),
            out_shardings=replicated,
            donate_argnums=1,
        )

    def metrics(self, params: Any) -> dict[str, float]:
        """Per target token: loss, accuracy, z_loss; and of each source: loss/<source>, accuracy/<source>. And those of
        `GenerativeEvaluator`."""
        sums = jax.device_put(zero_sums(len(self.dataset.source_names)), self.partitioner.replicated)
        rows = self.partitioner.process_rows(self.dataset.batch_size)
        for batch in self.dataset.eval_batches(self.num_batches, rows):
            sums = self._add(params, sums, self.partitioner.put_batch(batch, self.dataset.batch_size))
            jax.block_until_ready(sums)  # several fake CPU devices deadlock when the host runs far ahead
        generated = self.generative.metrics(params) if self.generative else {}
        return {**summarize(jax.device_get(sums), self.dataset.source_names), **generated}

    def check_best(self, save: SaveCheckpointConfig) -> None:
        """UserError where `save.best_metric` is none that `metrics` may give."""
        sources = self.dataset.source_names
        sums = jax.device_get(zero_sums(len(sources)))
        known = summarize({**sums, "source_weight": np.ones(len(sources) + 1)}, sources)
        names = [*known, *(self.generative.names if self.generative else ())]
        if save.best_metric and save.best_metric not in names:
            generated = "" if self.generative else "; metrics of generated text need loop.train.infer_eval_examples"
            raise UserError(
                f"SaveCheckpointConfig.best_metric {save.best_metric!r} is no metric of this evaluation"
                f" ({nearest(save.best_metric, names)}){generated}"
            )

    def samples(self, params: Any) -> list[dict[str, str]]:
        """The first examples of the dataset, one of each source before a second of any: as text, with predictions."""
        chosen = self._choose() if self.num_samples else []
        if not chosen:
            return []
        inputs_length = max(len(example["inputs"]) for _, example in chosen)
        targets_length = max(len(example["targets"]) for _, example in chosen)
        tokens = np.zeros((self.num_samples, -(-inputs_length // 64) * 64), np.int32)  # few shapes, few compilations
        for row, (_, example) in zip(tokens, chosen, strict=False):
            row[: len(example["inputs"])] = example["inputs"]
        vocabulary = self.model.vocabulary
        predictions = decoding.greedy(
            params,
            self.model.config,
            jax.device_put(tokens, self.partitioner.replicated),
            -(-targets_length // 64) * 64,
            eos_id=vocabulary.eos_id,
            vocab_size=vocabulary.size,
        )
        return [
            {
                "task": source,
                "input": vocabulary.decode(example["inputs"].tolist()),
                "target": vocabulary.decode(example["targets"].tolist()),
                "prediction": vocabulary.decode(np.asarray(prediction).tolist()),
            }
            for (source, example), prediction in zip(chosen, process_allgather(predictions, tiled=True), strict=False)
        ]

    def _choose(self) -> list[tuple[str, dict[str, np.ndarray]]]:
        by_source: dict[str, list[dict[str, np.ndarray]]] = {}
        for batch in self.dataset.eval_batches(self.num_batches):
            for source, example in unpack(batch):
                by_source.setdefault(self.dataset.source_names[source - 1], []).append(example)
            if len(by_source) == len(self.dataset.source_names):
                break
        ranked = [(rank, source, e) for source, found in by_source.items() for rank, e in enumerate(found)]
        ranked.sort(key=lambda entry: entry[0])  # stable: the sources keep their order
        return [(source, example) for _, source, example in ranked[: self.num_samples]]


def unpack(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The examples in a batch's rows: (source id, {"inputs", "targets"} without padding)."""
    rows = batch["encoder_input_tokens"].shape[0]
    encoder_segments = batch.get("encoder_segment_ids", batch["encoder_input_tokens"] > 0)
    decoder_segments = batch.get("decoder_segment_ids", batch["decoder_target_tokens"] > 0)
    for row in range(rows):
        for segment in range(1, int(decoder_segments[row].max(initial=0)) + 1):
            targets = decoder_segments[row] == segment
            inputs = encoder_segments[row] == segment
            if targets.any() and inputs.any():
                source = int(batch["decoder_source_ids"][row][targets][0])
                yield (
                    source,
                    {
                        "inputs": batch["encoder_input_tokens"][row][inputs],
                        "targets": batch["decoder_target_tokens"][row][targets],
                    },
                )
