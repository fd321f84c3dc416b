"""`vikhr-t5 eval`: checkpoints on a seqio task: its metric functions on predictions, and the forced loss.

<output_dir>/inference_eval/metrics.jsonl            one line per task and checkpoint: seqio's metrics, loss, accuracy
<output_dir>/inference_eval/<task>-<step>.jsonl      inputs, target, prediction; UTF-8
<output_dir>/inference_eval/<task>/events…           the metrics for TensorBoard, under t5x's names
"""

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vikhr_t5 import inference, task_examples
from vikhr_t5.data.pipeline import DatasetConfig
from vikhr_t5.errors import UserError
from vikhr_t5.files import records, write_text_atomic
from vikhr_t5.inference import Decoding, Predictor
from vikhr_t5.train.checkpoint_files import read_progress
from vikhr_t5.train.checkpoints import RestoreCheckpointConfig, check_vocabulary
from vikhr_t5.train.metrics import MetricsLog
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.state import EncoderDecoderModel

GREEDY = Decoding()
ALL_STEPS = 2**40  # what was written for other steps stays

Metrics = dict[str, Any]


def evaluate(
    model: EncoderDecoderModel,
    dataset_cfg: DatasetConfig,
    restore_checkpoint_cfg: RestoreCheckpointConfig,
    partitioner: Partitioner,
    output_dir: str,
    num_examples: int | None = None,
    write_n_results: int | None = None,
    dtype: str = "float32",
    decoding: Decoding = GREEDY,
    config_text: str = "",
) -> dict[int, dict[str, Metrics]]:
    """Evaluate one checkpoint, or all of a run, on every task of `dataset_cfg`.

    Of all checkpoints, those are left out that the output folder has metrics of, by the same configuration: run again,
    it goes on with what is new. It then says which is the best by each metric.

    Args:
      dataset_cfg: `task_feature_lengths` None takes the longest example's; `pack` and `cache_dir` play no part.
      num_examples: the first so many of each task; None: all.
      write_n_results: predictions of each task that are written; None: all.
      dtype: see `inference.restored`.
      decoding: how predictions are found.
      config_text: the gin configuration; goes into the folder.

    Returns:
      step -> task -> metrics: "loss" and "accuracy" per target token, "examples", and those of the task.

    Raises:
      UserError: whatever the person who launched it can mend.
    """
    partitioner.check_batch_size(dataset_cfg.batch_size)
    paths = {_step(path): path for path in restore_checkpoint_cfg.each()}
    for path in paths.values():
        check_vocabulary(path, model.vocabulary)
    folder = task_examples.output_folder(output_dir) / "inference_eval"
    every = restore_checkpoint_cfg.mode == "all"
    done = _done(folder, config_text) if every else {}
    tasks = [
        _Task.open(task, dataset_cfg, num_examples) for task in task_examples.open_tasks(dataset_cfg, model.vocabulary)
    ]
    if every and not done:
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # else the next run takes its lines for this configuration's
    if config_text:
        write_text_atomic(folder.parent / "config.gin", config_text)
    folder.mkdir(exist_ok=True)
    results = {step: {t.name: done[step, t.name] for t in tasks if (step, t.name) in done} for step in paths}
    predictor = None
    with contextlib.closing(MetricsLog(folder, ALL_STEPS)) as log:
        for step, path in paths.items():
            left = [task for task in tasks if task.name not in results[step]]
            if not left:
                print(f"step {step} is there already", file=sys.stderr)
                continue
            if predictor is None:
                params, _ = inference.restored_params(model, partitioner, path, dtype)
                predictor = Predictor(
                    params, model.config, model.vocabulary, partitioner, dataset_cfg.batch_size, model.loss_chunk_size
                )
            else:
                predictor.params = None  # one checkpoint at a time is in memory; what was compiled stays
                predictor.params, _ = inference.restored_params(model, partitioner, path, dtype)
            for task in left:
                metrics, lines = task.evaluate(predictor, decoding, step, write_n_results)
                write_text_atomic(folder / f"{task.name}-{step:06d}.jsonl", lines)
                log.write("inference_eval", step, {"task": task.name, **metrics})
                print(f"{task.name}, step {step}: {_shown(metrics)}", flush=True)
                results[step][task.name] = metrics
    if every:
        for task in tasks:
            best = _best({step: found[task.name] for step, found in results.items()})
            print(f"{task.name}, best of {len(results)}: {best}", flush=True)
    return results


@dataclasses.dataclass
class _Task:
    """A seqio task and its examples, read once for all checkpoints."""

    seqio_task: Any
    config: DatasetConfig
    examples: list[task_examples.Example]
    lengths: dict[str, int]
    evaluator: Any

    @classmethod
    def open(cls, task: Any, config: DatasetConfig, num_examples: int | None) -> "_Task":
        examples = list(itertools.islice(task_examples.examples(task, config), num_examples))
        lengths = dict(config.task_feature_lengths or task_examples.longest(examples, task.name))
        return cls(task, config, examples, lengths, _seqio_evaluator(task, config, lengths, num_examples))

    @property
    def name(self) -> str:
        return self.seqio_task.name

    def evaluate(
        self, predictor: Predictor, decoding: Decoding, step: int, write_n_results: int | None
    ) -> tuple[Metrics, str]:
        """The metrics, and the JSON lines of predictions."""
        pairs = task_examples.pairs(self.examples, self.lengths)
        answers = predictor.generate([inputs for inputs, _ in pairs], decoding, self.lengths["targets"])
        predictions = [best.ids for best, *_ in answers]
        scores = predictor.score(pairs)
        tokens = max(1, sum(len(score.log_likelihoods) for score in scores))
        metrics = {
            "loss": -sum(score.log_likelihood for score in scores) / tokens,
            "accuracy": sum(score.correct for score in scores) / tokens,
            "examples": len(self.examples),
            **_seqio_metrics(self.evaluator, self.name, step, predictions, scores),
        }
        vocabulary = predictor.vocabulary
        lines = [
            {
                "inputs": task_examples.plain(example, vocabulary),
                "target": vocabulary.decode(example["targets"].tolist()),
                "prediction": vocabulary.decode(prediction),
            }
            for example, prediction in zip(self.examples[:write_n_results], predictions, strict=False)
        ]
        return metrics, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _step(checkpoint: Path) -> int:
    return int(read_progress(checkpoint)["step"])


def _done(folder: Path, config_text: str) -> dict[tuple[int, str], Metrics]:
    """(step, task) -> metrics that are written already, by this configuration."""
    lines, config = folder / "metrics.jsonl", folder.parent / "config.gin"
    if not lines.exists():
        return {}
    if not config.exists() or config.read_text(encoding="utf-8") != config_text:
        print(f"{folder} is of another configuration: all checkpoints are evaluated", file=sys.stderr)
        return {}
    about = ("kind", "step", "time", "task")
    return {
        (record["step"], record["task"]): {name: value for name, value in record.items() if name not in about}
        for record in records(lines)
    }


def _shown(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())


def _best(metrics: Mapping[int, Metrics]) -> str:
    """By each metric, in words: the lowest loss, and the highest of any other."""
    names = dict.fromkeys(name for found in metrics.values() for name in found if name != "examples")
    shown = []
    for name in names:
        values = {step: found[name] for step, found in metrics.items() if isinstance(found.get(name), float)}
        if values:
            step = min(values, key=values.__getitem__) if name == "loss" else max(values, key=values.__getitem__)
            shown.append(f"{'lowest' if name == 'loss' else 'highest'} {name} {values[step]:.4g} at step {step}")
    return ", ".join(shown)


def _seqio_evaluator(task: Any, config: DatasetConfig, lengths: Mapping[str, int], num_examples: int | None) -> Any:
    """seqio's Evaluator of a task: it postprocesses, and knows every kind of metric. None where the task has none."""
    if not task.metric_objs:
        return None
    import seqio

    known = (seqio.metrics.ModelOutputType.PREDICTION, seqio.metrics.ModelOutputType.SCORE)
    for metric in task.metric_objs:
        if metric.model_output_type not in known:
            kind = metric.model_output_type.name.lower()
            raise UserError(f"task {task.name} has a metric of {kind}; only predictions and scores are here: remove it")
    try:
        return seqio.Evaluator(
            task.name,
            feature_converter=seqio.EncDecFeatureConverter(pack=False),
            eval_split=config.split,
            seed=config.seed,
            sequence_length=lengths,
            num_examples=num_examples,
            shuffle=config.shuffle,
            async_compute_metrics=False,
        )
    except ValueError as error:
        raise UserError(str(error).split("\n")[0]) from error


def _seqio_metrics(
    evaluator: Any, task: str, step: int, predictions: list[list[int]], scores: list[inference.Score]
) -> Metrics:
    """The task's own metrics."""
    if evaluator is None:
        return {}
    length = max(map(len, predictions), default=0)  # seqio makes one array of them
    try:
        computed, _ = evaluator.evaluate(
            compute_metrics=True,
            step=step,
            predict_fn=lambda dataset: [(i, np.pad(ids, (0, length - len(ids)))) for i, ids in enumerate(predictions)],
            score_fn=lambda dataset: [(i, score.log_likelihood) for i, score in enumerate(scores)],
        )
    except ValueError as error:  # a metric function failed
        raise UserError(str(error).split("\n")[0]) from error
    values = computed.result()[task]
    return {name: getattr(value, "value", getattr(value, "textdata", value)) for name, value in values.items()}
