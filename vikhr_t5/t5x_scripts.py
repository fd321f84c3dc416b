"""t5x's three scripts, `train`, `evaluate` and `infer`, by its argument names: each makes the arguments of ours.

And the names that such files bind in them: loggers, data functions, seqio's Evaluator.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vikhr_t5 import eval as eval_script
from vikhr_t5 import infer as infer_script
from vikhr_t5.data import pipeline
from vikhr_t5.t5x_adapters import ONE_CHECKPOINT, EncoderDecoderModel, Restore, TerminateOnNanAction
from vikhr_t5.t5x_refusals import Refusal, accept, accept_stand_in, say, stands_for
from vikhr_t5.train import checkpoints, loop, partitioning, state, step

# ---- names that stand for what happens here anyway -------------------------------------------------------------------


def summarize_gin_config() -> None:
    """The configuration always goes into the run folder."""


def get_dataset() -> None:
    """Batches always come from the token store."""


def get_training_eval_datasets(deterministic: bool = False) -> None:
    """Evaluation batches are always the same, whatever `deterministic` says."""


def verify_matching_vocabs() -> None:
    """The vocabularies of task and model are always compared."""


def PyLoggingLogger() -> None:
    """Metrics are always printed."""


def TensorBoardLogger() -> None:
    """Metrics always go to TensorBoard, too."""


def JSONLogger(write_n_results: int | None = None) -> int | None:
    """Metrics and predictions always go to JSON lines. Returns how many predictions of a task are written."""
    return write_n_results


# ---- train, eval and infer -------------------------------------------------------------------------------------------


@stands_for(loop.train)
def train(
    *,
    model: state.EncoderDecoderModel,
    train_dataset_cfg: pipeline.DatasetConfig,
    train_eval_dataset_cfg: pipeline.DatasetConfig | None,
    infer_eval_dataset_cfg: pipeline.DatasetConfig | None,
    checkpoint_cfg: checkpoints.CheckpointConfig,
    partitioner: partitioning.Partitioner,
    trainer_cls: Callable[[], step.Trainer],
    model_dir: str,
    total_steps: int,
    eval_steps: int | None,
    eval_period: int | None,
    random_seed: int | None,
    summarize_config_fn: Any = None,
    relative_steps: int | None = None,
    stats_period: int | None = None,
    use_hardware_rng: bool = False,
    inference_evaluator_cls: Any = None,
    get_dataset_fn: Any = None,
    concurrent_metrics: bool = True,
    actions: Mapping[str, Sequence[Any]] | None = None,
    train_eval_get_dataset_fn: Any = None,
    run_eval_before_training: bool = False,
    train_state_initializer_cls: Any = None,
    use_orbax: bool = True,
    verify_matching_vocabs_fn: Any = None,
    gc_period: int = 0,
) -> dict[str, Any]:
    """t5x's `train`: the arguments of ours.

    `use_hardware_rng`, `concurrent_metrics`, `use_orbax` and `gc_period` are ways of t5x to be faster, or to store.
    """
    name = "train"
    accept_stand_in(f"{name}.summarize_config_fn", summarize_config_fn, "summarize_gin_config")
    accept_stand_in(f"{name}.get_dataset_fn", get_dataset_fn, "get_dataset")
    accept_stand_in(f"{name}.train_eval_get_dataset_fn", train_eval_get_dataset_fn, "get_training_eval_datasets")
    accept_stand_in(f"{name}.verify_matching_vocabs_fn", verify_matching_vocabs_fn, "verify_matching_vocabs")
    accept_stand_in(f"{name}.inference_evaluator_cls", inference_evaluator_cls, "Evaluator")
    accept(f"{name}.train_state_initializer_cls", train_state_initializer_cls, [None], "remove it")
    before = "evaluate a checkpoint with `vikhr-t5 eval`"
    accept(f"{name}.run_eval_before_training", run_eval_before_training, [False], before)
    for action in (action for group in (actions or {}).values() for action in group):
        if not isinstance(action, TerminateOnNanAction):
            raise Refusal(f"{name}.actions", actions, "only TerminateOnNanAction, which is always on")
    for config in (train_dataset_cfg, train_eval_dataset_cfg):
        if config is not None and config.task_feature_lengths is None:
            raise Refusal(
                "DatasetConfig.task_feature_lengths", None, "training needs lengths: set TASK_FEATURE_LENGTHS"
            )
    restore = checkpoint_cfg.restore
    _check_one(restore)
    if isinstance(restore, Restore) and restore.dtype not in (None, "float32"):
        raise Refusal("RestoreCheckpointConfig.dtype", restore.dtype, "parameters are trained in float32")
    infer_eval_examples: int | None = 0
    if infer_eval_dataset_cfg is not None:
        infer_eval_examples = (inference_evaluator_cls or Evaluator)().num_examples
        if not _same_examples(infer_eval_dataset_cfg, train_eval_dataset_cfg):
            infer_eval_examples = 0
            say(
                "infer_eval_dataset_cfg: generated text is measured on the examples of train_eval_dataset_cfg, and"
                " these are others: not during training. Afterwards: vikhr-t5 eval --gin_file=runs/eval.gin"
            )
    return {
        "model": model,
        "train_dataset_cfg": train_dataset_cfg,
        "train_eval_dataset_cfg": train_eval_dataset_cfg,
        "checkpoint_cfg": checkpoint_cfg,
        "partitioner": partitioner,
        "trainer": trainer_cls(),
        "model_dir": model_dir,
        "total_steps": total_steps,
        "relative_steps": relative_steps,
        "eval_steps": eval_steps,
        "eval_period": eval_period,
        "infer_eval_examples": infer_eval_examples,
        "stats_period": stats_period or eval_period or 100,
        "random_seed": random_seed,
    }


def _same_examples(one: pipeline.DatasetConfig, other: pipeline.DatasetConfig | None) -> bool:
    return other is not None and (one.mixture_or_task_name, one.split) == (other.mixture_or_task_name, other.split)


@dataclasses.dataclass(frozen=True)
class _EvaluatorSettings:
    num_examples: int | None
    write_n_results: int | None


def Evaluator(
    logger_cls: Sequence[Callable[..., Any]] = (),
    num_examples: int | None = None,
    use_memory_cache: bool = True,
    async_compute_metrics: bool = True,
    target_field_name: str = "targets",
) -> _EvaluatorSettings:
    """seqio's `Evaluator`, as far as gin configures it. Every logger's output is always written."""
    accept("Evaluator.target_field_name", target_field_name, ["targets"], "targets are 'targets'")
    limits = [logger() for logger in logger_cls if logger.__name__ == "JSONLogger"]
    return _EvaluatorSettings(num_examples, limits[0] if limits else None)


def _check_one(restore: checkpoints.RestoreCheckpointConfig | None) -> None:
    if restore is not None and restore.mode == "all":
        raise Refusal("RestoreCheckpointConfig.mode", restore.mode, ONE_CHECKPOINT)


def _restored(restore_checkpoint_cfg: checkpoints.RestoreCheckpointConfig | None) -> dict[str, Any]:
    if restore_checkpoint_cfg is None:
        raise Refusal("RestoreCheckpointConfig.path", None, "set CHECKPOINT_PATH")
    dtype = getattr(restore_checkpoint_cfg, "dtype", None) or "float32"
    return {"restore_checkpoint_cfg": restore_checkpoint_cfg, "dtype": dtype}


def _check_decoding(model: state.EncoderDecoderModel) -> None:
    if isinstance(model, EncoderDecoderModel):
        model.predict_batch_with_aux()


@stands_for(eval_script.evaluate)
def evaluate(
    *,
    model: state.EncoderDecoderModel,
    dataset_cfg: pipeline.DatasetConfig,
    restore_checkpoint_cfg: checkpoints.RestoreCheckpointConfig | None,
    output_dir: str,
    partitioner: partitioning.Partitioner | None = None,
    inference_evaluator_cls: Any = None,
    training_evaluator_cls: Any = None,
    summarize_config_fn: Any = None,
    train_state_initializer_cls: Any = None,
    train_eval_get_dataset_fn: Any = None,
    fallback_init_rng: int | None = None,
    use_orbax: bool = True,
) -> dict[str, Any]:
    """t5x's `evaluate`: the arguments of ours. The teacher-forced loss is always computed."""
    name = "evaluate"
    accept_stand_in(f"{name}.summarize_config_fn", summarize_config_fn, "summarize_gin_config")
    accept_stand_in(f"{name}.train_eval_get_dataset_fn", train_eval_get_dataset_fn, "get_training_eval_datasets")
    accept_stand_in(f"{name}.inference_evaluator_cls", inference_evaluator_cls, "Evaluator")
    accept_stand_in(f"{name}.training_evaluator_cls", training_evaluator_cls, "Trainer")
    accept(f"{name}.train_state_initializer_cls", train_state_initializer_cls, [None], "remove it")
    accept(f"{name}.fallback_init_rng", fallback_init_rng, [None], "a checkpoint must be whole; remove it")
    _check_decoding(model)
    settings = (inference_evaluator_cls or Evaluator)()
    return {
        "model": model,
        "dataset_cfg": dataset_cfg,
        **_restored(restore_checkpoint_cfg),
        "partitioner": partitioner or partitioning.Partitioner(),
        "output_dir": output_dir,
        "num_examples": settings.num_examples,
        "write_n_results": settings.write_n_results,
    }


@stands_for(infer_script.infer)
def infer(
    *,
    mode: str,
    model: state.EncoderDecoderModel,
    dataset_cfg: pipeline.DatasetConfig,
    restore_checkpoint_cfg: checkpoints.RestoreCheckpointConfig | None,
    partitioner: partitioning.Partitioner,
    output_dir: str,
    checkpoint_period: int,
    shard_id: int = 0,
    num_shards: int = 1,
    merge_chunked_results: bool = True,
    write_fn: Any = None,
    checkpoint_ds_iter: bool = True,
    train_state_initializer_cls: Any = None,
    fallback_init_rng: int | None = None,
    merge_fn: Any = None,
    summarize_config_fn: Any = None,
    verify_matching_vocabs_fn: Any = None,
    output_vocab_feature_name: str = "targets",
    file_extension: str = "jsonl",
    keep_aux_as_numpy: bool = False,
    use_orbax: bool = True,
) -> dict[str, Any]:
    """t5x's `infer`: the arguments of ours. `checkpoint_period` and what belongs to it say how t5x goes on after an
    interruption; ours starts anew."""
    name = "infer"
    accept_stand_in(f"{name}.summarize_config_fn", summarize_config_fn, "summarize_gin_config")
    accept_stand_in(f"{name}.verify_matching_vocabs_fn", verify_matching_vocabs_fn, "verify_matching_vocabs")
    accept(f"{name}.merge_chunked_results", merge_chunked_results, [True], "there is one file of results")
    accept(f"{name}.write_fn", write_fn, [None], "remove it: lines are {inputs, prediction} in UTF-8")
    accept(f"{name}.merge_fn", merge_fn, [None], "remove it")
    accept(f"{name}.train_state_initializer_cls", train_state_initializer_cls, [None], "remove it")
    accept(f"{name}.fallback_init_rng", fallback_init_rng, [None], "a checkpoint must be whole; remove it")
    accept(f"{name}.output_vocab_feature_name", output_vocab_feature_name, ["targets"], "targets are 'targets'")
    accept(f"{name}.file_extension", file_extension, ["jsonl"], "results are JSON lines")
    accept(f"{name}.keep_aux_as_numpy", keep_aux_as_numpy, [False], "remove it")
    _check_one(restore_checkpoint_cfg)
    if mode == "predict":
        _check_decoding(model)
    return {
        "mode": mode,
        "model": model,
        "dataset_cfg": dataset_cfg,
        **_restored(restore_checkpoint_cfg),
        "partitioner": partitioner,
        "output_dir": output_dir,
        "shard_id": shard_id,
        "num_shards": num_shards,
    }
