"""Generative evaluation: the metric functions of tasks, on greedy answers to their first held-out examples.

Only functions of `vikhr_t5.text_metrics` are here, by name; those that need a task itself, `vikhr-t5 eval` computes.

B batch, S source length, T target length.
"""

import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from vikhr_t5.data.pipeline import Dataset
from vikhr_t5.data.rows import Segment
from vikhr_t5.errors import UserError
from vikhr_t5.model import decoding
from vikhr_t5.text_metrics import METRICS
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.state import EncoderDecoderModel

ROWS_PER_DEVICE = 16  # that are decoded together: a decoder's cache is large, however small training's microbatches


class GenerativeEvaluator:
    """Answers the same examples whenever it is asked; targets are those of the token store, cut to the lengths.

    Args:
      dataset: its tasks' metric functions are computed, its lengths hold.
      num_examples: of each task; None: all.

    A function whose package is not installed is left out; a line says so.
    """

    def __init__(
        self, model: EncoderDecoderModel, partitioner: Partitioner, dataset: Dataset, num_examples: int | None
    ):
        self.model, self.partitioner, self.lengths = model, partitioner, dataset.lengths
        values, reasons = _values({name for found in dataset.metrics.values() for name in found.text})
        functions = {task: [n for n in found.text if n in values] for task, found in dataset.metrics.items()}
        self.functions = {task: names for task, names in functions.items() if names}
        self.examples = {task: dataset.tasks[task].first(num_examples) for task in self.functions}
        self.names = [f"{value}/{task}" for task, names in self.functions.items() for n in names for value in values[n]]
        self.names += dict.fromkeys(value for found in values.values() for value in found)
        if others := [f"{name} of {task}" for task, found in dataset.metrics.items() for name in found.other]:
            more = f" and {len(others) - 4} more" if len(others) > 4 else ""
            reasons.append(f"`vikhr-t5 eval` computes {', '.join(others[:4])}{more}, which training cannot")
        for reason in reasons if jax.process_index() == 0 else ():
            print(f"evaluation: {reason}", file=sys.stderr)

    def metrics(self, params: Any) -> dict[str, float]:
        """Of each task "<value>/<task>", and "<value>": the mean over the tasks that have it."""
        decode = self.model.vocabulary.decode
        answers = iter(self._answers(params, [e for found in self.examples.values() for e in found]))
        found: dict[str, float] = {}
        by_value: dict[str, list[float]] = {}
        for task, examples in self.examples.items():
            targets = [decode(example.targets.tolist()) for example in examples]
            predictions = [decode(next(answers).tolist()) for _ in examples]
            for name in self.functions[task]:
                for value, number in METRICS[name](targets, predictions).items():
                    found[f"{value}/{task}"] = number
                    by_value.setdefault(value, []).append(number)
        return {**{value: statistics.fmean(numbers) for value, numbers in by_value.items()}, **found}

    def _answers(self, params: Any, examples: Sequence[Segment]) -> list[np.ndarray]:
        """int32 [T] of each."""
        rows = ROWS_PER_DEVICE * self.partitioner.row_shards
        vocabulary = self.model.vocabulary
        answers: list[np.ndarray] = []
        for start in range(0, len(examples), rows):
            tokens = np.zeros((rows, self.lengths[0]), np.int32)  # one shape, one compilation
            for row, example in zip(tokens, examples[start : start + rows], strict=False):
                row[: len(example.inputs)] = example.inputs
            predictions = decoding.greedy(
                params,
                self.model.config,
                self.partitioner.put_batch({"inputs": tokens}, rows)["inputs"],
                self.lengths[1],
                eos_id=vocabulary.eos_id,
                vocab_size=vocabulary.size,
            )
            answers += list(process_allgather(predictions, tiled=True))
        return answers[: len(examples)]


def _values(functions: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The names of what each function gives; and why some are left out, in words."""
    values: dict[str, list[str]] = {}
    reasons: list[str] = []
    for name in sorted(functions):
        try:
            values[name] = list(METRICS[name](["a"], ["a"]))
        except UserError as error:
            reasons.append(f"{name} is left out: {error}")
    return values, reasons
