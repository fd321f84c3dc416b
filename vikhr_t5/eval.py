"""`vikhr-t5 eval`: a checkpoint on a seqio task: its metric functions on predictions, and the forced loss.

<output_dir>/inference_eval/metrics.jsonl            one line per task: seqio's metrics, loss, accuracy
<output_dir>/inference_eval/<task>-<step>.jsonl      inputs, target, prediction; UTF-8
<output_dir>/inference_eval/<task>/events…           the metrics for TensorBoard, under t5x's names
"""

import contextlib
import json
from typing import Any

import numpy as np

from vikhr_t5 import inference, task_examples
from vikhr_t5.data.pipeline import DatasetConfig
from vikhr_t5.errors import UserError
from vikhr_t5.files import write_text_atomic
from vikhr_t5.inference import Decoding
from vikhr_t5.train.checkpoints import RestoreCheckpointConfig
from vikhr_t5.train.metrics import MetricsLog
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.state import EncoderDecoderModel

GREEDY = Decoding()
ALL_STEPS = 2**40  # what was written for other steps stays


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
) -> dict[str, dict[str, Any]]:
    """Evaluate one checkpoint on every task of `dataset_cfg`.

    Args:
      dataset_cfg: `task_feature_lengths` None takes the longest example's; `pack` and `cache_dir` play no part.
      num_examples: the first so many of each task; None: all.
      write_n_results: predictions of each task that are written; None: all.
      dtype: see `inference.restored`.
      decoding: how predictions are found.
      config_text: the gin configuration; goes into the folder.

    Returns:
      task -> metrics: "loss" and "accuracy" per target token, "examples", and those of the task.

    Raises:
      UserError: whatever the person who launched it can mend.
    """
    batch_size = dataset_cfg.batch_size
    predictor, checkpoint_step = inference.restored(model, partitioner, restore_checkpoint_cfg, batch_size, dtype)
    folder = task_examples.output_folder(output_dir) / "inference_eval"
    results: dict[str, dict[str, Any]] = {}
    tasks = task_examples.open_tasks(dataset_cfg, model.vocabulary)
    if config_text:
        write_text_atomic(folder.parent / "config.gin", config_text)
    folder.mkdir(exist_ok=True)
    with contextlib.closing(MetricsLog(folder, ALL_STEPS)) as log:
        for task in tasks:
            examples: list[task_examples.Example] = []
            for example in task_examples.examples(task, dataset_cfg):
                if len(examples) == num_examples:
                    break
                examples.append(example)
            lengths = dict(dataset_cfg.task_feature_lengths or task_examples.longest(examples, task.name))
            pairs = task_examples.pairs(examples, lengths)
            answers = predictor.generate([inputs for inputs, _ in pairs], decoding, lengths["targets"])
            predictions = [best.ids for best, *_ in answers]
            scores = predictor.score(pairs)
            tokens = max(1, sum(len(score.log_likelihoods) for score in scores))
            metrics = {
                "loss": -sum(score.log_likelihood for score in scores) / tokens,
                "accuracy": sum(score.correct for score in scores) / tokens,
                "examples": len(examples),
                **_seqio_metrics(task, dataset_cfg, lengths, num_examples, checkpoint_step, predictions, scores),
            }
            lines = [
                {
                    "inputs": task_examples.plain(example, model.vocabulary),
                    "target": model.vocabulary.decode(example["targets"].tolist()),
                    "prediction": model.vocabulary.decode(prediction),
                }
                for example, prediction in zip(examples[:write_n_results], predictions, strict=False)
            ]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text_atomic(folder / f"{task.name}-{checkpoint_step:06d}.jsonl", text)
            log.write("inference_eval", checkpoint_step, {"task": task.name, **metrics})
            shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
            print(f"{task.name}, step {checkpoint_step}: {shown}", flush=True)
            results[task.name] = metrics
    return results


def _seqio_metrics(
    task: Any,
    config: DatasetConfig,
    lengths: dict[str, int],
    num_examples: int | None,
    step: int,
    predictions: list[list[int]],
    scores: list[inference.Score],
) -> dict[str, Any]:
    """The task's own metrics, computed by seqio's Evaluator: it postprocesses, and knows every kind of metric."""
    import seqio

    if not task.metric_objs:
        return {}
    length = max(map(len, predictions), default=0)  # seqio makes one array of them
    known = (seqio.metrics.ModelOutputType.PREDICTION, seqio.metrics.ModelOutputType.SCORE)
    for metric in task.metric_objs:
        if metric.model_output_type not in known:
            kind = metric.model_output_type.name.lower()
            raise UserError(f"task {task.name} has a metric of {kind}; only predictions and scores are here: remove it")
    try:
        evaluator = seqio.Evaluator(
            task.name,
            feature_converter=seqio.EncDecFeatureConverter(pack=False),
            eval_split=config.split,
            seed=config.seed,
            sequence_length=lengths,
            num_examples=num_examples,
            shuffle=config.shuffle,
            async_compute_metrics=False,
        )
        computed, _ = evaluator.evaluate(
            compute_metrics=True,
            step=step,
            predict_fn=lambda dataset: [(i, np.pad(ids, (0, length - len(ids)))) for i, ids in enumerate(predictions)],
            score_fn=lambda dataset: [(i, score.log_likelihood) for i, score in enumerate(scores)],
        )
    except ValueError as error:  # a metric function failed
        raise UserError(str(error).split("\n")[0]) from error
    values = computed.result()[task.name]
    return {name: getattr(value, "value", getattr(value, "textdata", value)) for name, value in values.items()}
