"""t5x's classes and functions, by its argument names and with its defaults, made of ours; t5x_scripts.py has the rest.

Nothing is ignored silently. An argument is translated; or its value is what happens here anyway, and is accepted; or
it would change the result or the cost, and a `Refusal` names it and says what to use instead. `stands_for` says which
object of ours an adapter makes; docs/from-t5x.md has the table for people.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from vikhr_t5.data import pipeline, vocabulary
from vikhr_t5.model import network
from vikhr_t5.remote import local_copy
from vikhr_t5.t5x_refusals import Refusal, accept, say, stands_for
from vikhr_t5.train import checkpoints, optimizers, partitioning, state, step
from vikhr_t5.train.optax_optimizer import OptaxOptimizer
from vikhr_t5.train.schedules import Schedule

NEVER = 10**12  # steps
ONE_CHECKPOINT = "give one checkpoint, with mode = 'specific'"


# ---- vocabularies ----------------------------------------------------------------------------------------------------


@stands_for(vocabulary.Vocabulary)
def SentencePieceVocabulary(
    sentencepiece_model_file: str,
    extra_ids: int = 0,
    normalizer_spec_overrides: Any = None,
    reverse_extra_ids: bool = True,
    use_fast_tokenizer: bool = False,
) -> vocabulary.Vocabulary:
    """seqio's. `use_fast_tokenizer` is another implementation of the same ids."""
    name = "SentencePieceVocabulary"
    accept(f"{name}.normalizer_spec_overrides", normalizer_spec_overrides, [None], "put it into the model file")
    accept(f"{name}.reverse_extra_ids", reverse_extra_ids, [True], "sentinels count down from the highest id")
    flag = f"--gin.seqio.{name}.sentencepiece_model_file=\"'/path/to/sentencepiece.model'\""
    return vocabulary.Vocabulary(local_copy(sentencepiece_model_file, f"or give a local copy: {flag}"), extra_ids)


@stands_for(vocabulary.ByteVocabulary)
def ByteVocabulary(extra_ids: int = 0) -> vocabulary.ByteVocabulary:
    """seqio's."""
    return vocabulary.ByteVocabulary(extra_ids)


# ---- model and optimizer ---------------------------------------------------------------------------------------------


@stands_for(network.T5Config)
def ScalableT5Config(
    vocab_size: int | None = None,
    dtype: str = "float32",
    emb_dim: int = 512,
    num_heads: int = 8,
    num_encoder_layers: int = 6,
    num_decoder_layers: int = 6,
    head_dim: int = 64,
    mlp_dim: int = 2048,
    mlp_activations: Sequence[str] = ("relu",),
    dropout_rate: float = 0.1,
    logits_via_embedding: bool = False,
    remat_policy: str = "none",
    scan_layers: bool = True,
    param_scan_axis: int = 1,
) -> network.T5Config:
    """`T5Config` of examples/scalable_t5: each layer has its own relative-position bias.

    Layers are always scanned here; `scan_layers` and `param_scan_axis` say how t5x lays out its own checkpoints.
    """
    return network.T5Config(
        vocab_size=vocab_size,
        dtype=dtype,
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=num_encoder_layers,
        num_decoder_layers=num_decoder_layers,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        mlp_activations=mlp_activations,
        dropout_rate=dropout_rate,
        logits_via_embedding=logits_via_embedding,
        remat_policy=remat_policy,
        relative_bias_per_layer=True,
    )


class EncoderDecoderModel(state.EncoderDecoderModel):
    """`state.EncoderDecoderModel` with t5x's arguments. Decoding is greedy: t5x's beam search of one beam."""

    stands_for = state.EncoderDecoderModel

    def __init__(
        self,
        module: network.Transformer,
        input_vocabulary: vocabulary.AnyVocabulary,
        output_vocabulary: vocabulary.AnyVocabulary,
        optimizer_def: optimizers.OptimizerDef,
        decode_fn: Any = None,
        feature_converter_cls: Any = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_normalizing_factor: float | str | None = None,
        default_decoder_params: Any = None,
    ):
        name = "EncoderDecoderModel"
        accept(f"{name}.decode_fn", decode_fn, [None], "decoding is greedy; remove it")
        accept(f"{name}.feature_converter_cls", feature_converter_cls, [None], "rows are made by data/pipeline.py")
        accept(f"{name}.default_decoder_params", default_decoder_params, [None], "decoding is greedy; remove it")
        if module.config.relative_bias_per_layer and isinstance(optimizer_def, optimizers.Adafactor):
            # scalable_t5: t5x factors its scanned kernels by the names of their axes, whatever their size.
            optimizer_def = dataclasses.replace(optimizer_def, factor_layer_kernels=True)
        super().__init__(
            module, input_vocabulary, output_vocabulary, optimizer_def, z_loss, label_smoothing, loss_normalizing_factor
        )

    def predict_batch_with_aux(
        self,
        decoder_params: Mapping[str, Any] | None = None,
        return_all_decodes: bool = False,
        num_decodes: int = 1,
        prompt_with_targets: bool = False,
    ) -> None:
        """Checks how the gin files want predictions; raises what we cannot give."""
        name = "EncoderDecoderModel.predict_batch_with_aux"
        greedy = (
            "t5x's beam search scores lengths in its own way; use inference.Decoding in a run file of ours, or decode"
            f" greedily: add --gin.{name}.num_decodes=1"
        )
        accept("predict_batch_with_aux.num_decodes", num_decodes, [1], greedy)
        accept(
            "predict_batch_with_aux.decoder_params",
            decoder_params,
            [None, {}],
            "remove it, or use inference.Decoding in a run file of ours",
        )
        accept("predict_batch_with_aux.return_all_decodes", return_all_decodes, [False], "there is one: remove it")
        accept("predict_batch_with_aux.prompt_with_targets", prompt_with_targets, [False], "remove it")


def standard_logical_factor_rules() -> str:
    """Adafactor always factors as t5x's standard rules do."""
    return "standard"


@stands_for(optimizers.Adafactor)
def Adafactor(
    learning_rate: float | None = None,
    factored: bool = True,
    multiply_by_parameter_scale: bool = True,
    beta1: float | None = None,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    clipping_threshold: float | None = 1.0,
    weight_decay_rate: float | None = None,
    min_dim_size_to_factor: int = 128,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    dtype_momentum: str = "float32",
    factor_map: Any = None,
    logical_factor_rules: Any = None,
    weight_decay_rate_lr_exponent: float | None = None,
    global_norm_clip_threshold: float | None = None,
    max_parameter_scale: float | None = None,
    skip_nan_updates: bool = False,
) -> optimizers.Adafactor:
    """t5x's own Adafactor."""
    name = "Adafactor"
    accept(f"{name}.learning_rate", learning_rate, [None], "the rate is Trainer.learning_rate_fn")
    accept(f"{name}.dtype_momentum", dtype_momentum, ["float32", None], "momentum is float32")
    accept(f"{name}.factor_map", factor_map, [None], "tensors are factored as standard_logical_factor_rules says")
    accept(f"{name}.logical_factor_rules", logical_factor_rules, ["standard", None], "only the standard rules")
    skip = "set on_non_finite = 'skip' of vikhr_t5.train.step.Trainer, in a run file of ours"
    accept(f"{name}.skip_nan_updates", skip_nan_updates, [False, None], skip)
    accept(f"{name}.multiply_by_parameter_scale", multiply_by_parameter_scale, [True, False], "give True or False")
    return optimizers.Adafactor(
        decay_rate=decay_rate,
        step_offset=step_offset,
        clipping_threshold=clipping_threshold,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        factored=factored,
        min_dim_size_to_factor=min_dim_size_to_factor,
        epsilon1=epsilon1,
        epsilon2=epsilon2,
        beta1=beta1,
        weight_decay_rate=weight_decay_rate,
        weight_decay_rate_lr_exponent=weight_decay_rate_lr_exponent,
        global_norm_clip_threshold=global_norm_clip_threshold,
        max_parameter_scale=max_parameter_scale,
    )


def chain(transformations: Sequence[optax.GradientTransformation]) -> OptaxOptimizer:
    """`t5x.optimizers.chain`."""
    return OptaxOptimizer(optax.chain(*transformations))


def _wrapped(make: Callable[..., optax.GradientTransformation]) -> Callable[..., OptaxOptimizer]:
    """`t5x.optimizers.adamw` and the like: optax's, with optax's arguments."""

    def optimizer(*args: Any, **kwargs: Any) -> OptaxOptimizer:
        return OptaxOptimizer(make(*args, **kwargs))

    optimizer.__name__ = optimizer.__qualname__ = make.__name__
    optimizer.__signature__ = inspect.signature(make)  # type: ignore[attr-defined]  # what gin may bind
    return optimizer


adam, adamw, lion, rmsprop, sgd = map(_wrapped, (optax.adam, optax.adamw, optax.lion, optax.rmsprop, optax.sgd))


# ---- trainer and mesh ------------------------------------------------------------------------------------------------


@stands_for(step.Trainer)
def Trainer(
    learning_rate_fn: Schedule, num_microbatches: int | None = None, weight_metrics_computer: Any = None
) -> step.Trainer:
    """t5x's `Trainer`, as far as gin configures it."""
    accept("Trainer.weight_metrics_computer", weight_metrics_computer, [None], "there are no metrics of weights")
    return step.Trainer(learning_rate_fn, num_microbatches or None)


class TerminateOnNanAction:
    """The loop always stops at a loss that is not finite, whatever the task and metric."""

    def __init__(self, task: str, metric: str = "loss"):
        self.task, self.metric = task, metric


@dataclasses.dataclass(frozen=True)
class _StandardRules:
    """Over which axes parameters are split: 1, the model axis; 2, the data axis, too."""

    parameter_dims: int


def standard_logical_axis_rules(
    activation_partitioning_dims: int = 1, parameter_partitioning_dims: int = 1, additional_rules: Any = None
) -> _StandardRules:
    name = "standard_logical_axis_rules"
    accept(f"{name}.activation_partitioning_dims", activation_partitioning_dims, [1], "activations are split by rows")
    accept(f"{name}.parameter_partitioning_dims", parameter_partitioning_dims, [1, 2], "give 1 or 2")
    rules = "use logical_axis_rules of vikhr_t5.train.partitioning.Partitioner"
    accept(f"{name}.additional_rules", additional_rules, [None, (), []], rules)
    return _StandardRules(parameter_partitioning_dims)


@stands_for(partitioning.Partitioner)
def PjitPartitioner(
    num_partitions: int | None = None,
    model_parallel_submesh: Sequence[int] | None = None,
    params_on_devices: bool = True,
    backend: str | None = None,
    ici_mesh_shape: Any = None,
    dcn_mesh_shape: Any = None,
    logical_axis_rules: Any = None,
) -> partitioning.Partitioner:
    """t5x's mesh of data x model. Its model axis, however it is laid over TPUs, is our `tensor`; parameters that it
    splits over the data axis, too (parameter_partitioning_dims = 2), are split over our `fsdp` instead of `data`."""
    name = "PjitPartitioner"
    mesh = "use num_fsdp and num_tensor of vikhr_t5.train.partitioning.Partitioner"
    accept(f"{name}.params_on_devices", params_on_devices, [True], "parameters stay on the devices")
    accept(f"{name}.backend", backend, [None], "set JAX_PLATFORMS instead")
    accept(f"{name}.ici_mesh_shape", ici_mesh_shape, [None], mesh)
    accept(f"{name}.dcn_mesh_shape", dcn_mesh_shape, [None], mesh)
    if logical_axis_rules is not None and not isinstance(logical_axis_rules, _StandardRules):
        raise Refusal(f"{name}.logical_axis_rules", logical_axis_rules, mesh)
    submesh, model = model_parallel_submesh, num_partitions or 0
    if submesh is not None:
        accept(f"{name}.num_partitions", num_partitions, [None, 1], "model_parallel_submesh is given, too: keep one")
        model = math.prod(submesh)
    devices = jax.device_count()
    if model < 1 or devices % model:
        binding, value = ("num_partitions", num_partitions) if submesh is None else ("model_parallel_submesh", submesh)
        fitting = " or ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        flags = f"--gin.{name}.num_partitions={fitting}"
        flags += "" if submesh is None else f" --gin.{name}.model_parallel_submesh=None"
        raise Refusal(f"{name}.{binding}", value, f"{model} does not divide the {devices} device(s) here; add {flags}")
    if logical_axis_rules is not None and logical_axis_rules.parameter_dims == 2:
        return partitioning.Partitioner(num_data=1, num_fsdp=devices // model, num_tensor=model)
    return partitioning.Partitioner(num_tensor=model)


# ---- data and checkpoints --------------------------------------------------------------------------------------------


@stands_for(pipeline.DatasetConfig)
def DatasetConfig(
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int] | None,
    split: str,
    batch_size: int,
    shuffle: bool,
    seed: int | None,
    use_cached: bool = False,
    pack: bool = False,
    use_custom_packing_ops: bool = False,
    module: str | None = None,
    use_memory_cache: bool = True,
    trim_output_features: bool = True,
    runtime_preprocessors: Any = None,
    num_prefetch_threads: int | None = None,
    num_workers: int | None = 0,
    cache_dir: str = "cache",
) -> pipeline.DatasetConfig:
    """t5x's, and `cache_dir`, which is ours: where token stores are. A seed of None is 0: order is always fixed.

    `use_cached`, `use_custom_packing_ops`, `use_memory_cache` and `num_prefetch_threads` are ways of t5x to be faster.
    """
    name = "DatasetConfig"
    accept(f"{name}.trim_output_features", trim_output_features, [True], "features are always trimmed")
    accept(f"{name}.runtime_preprocessors", runtime_preprocessors, [None, (), []], "AirIO is not supported")
    return pipeline.DatasetConfig(
        mixture_or_task_name=mixture_or_task_name,
        task_feature_lengths=task_feature_lengths,  # type: ignore[arg-type]  # None: `train` refuses it
        split=split,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        use_cached=use_cached,
        pack=pack,
        module=module,
        cache_dir=cache_dir,
        num_workers=num_workers or 0,
    )


@stands_for(checkpoints.SaveCheckpointConfig)
def SaveCheckpointConfig(
    dtype: str = "float32",
    period: int | None = None,
    checkpoint_steps: Sequence[int] | None = None,
    keep: int | None = None,
    keep_dataset_checkpoints: int | None = None,
    save_dataset: bool = False,
    checkpointer_cls: Any = None,
    state_transformation_fns: Sequence[Any] = (),
    checkpoint_manager_cls: Any = None,
) -> checkpoints.SaveCheckpointConfig:
    """t5x's. The place in the data is a step number, and every checkpoint has it, whatever `save_dataset` says."""
    name = "SaveCheckpointConfig"
    accept(f"{name}.checkpoint_steps", checkpoint_steps, [None, (), []], f"use {name}.period")
    accept(f"{name}.checkpointer_cls", checkpointer_cls, [None], "remove it")
    accept(f"{name}.checkpoint_manager_cls", checkpoint_manager_cls, [None], "remove it")
    accept(f"{name}.state_transformation_fns", state_transformation_fns, [None, (), []], "convert after training")
    return checkpoints.SaveCheckpointConfig(period=period or NEVER, keep=keep, dtype=dtype or "float32")


@dataclasses.dataclass(frozen=True)
class Restore(checkpoints.RestoreCheckpointConfig):
    dtype: str | None = None


@stands_for(checkpoints.RestoreCheckpointConfig)
def RestoreCheckpointConfig(
    path: str | Sequence[str] | None,
    mode: str = "latest",
    assignment_map: Any = None,
    strict: bool = True,
    fallback_to_scratch: bool = False,
    dtype: str | None = None,
    restore_dataset: bool = False,
    checkpointer_cls: Any = None,
    state_transformation_fns: Sequence[Any] = (),
    checkpoint_manager_cls: Any = None,
) -> Restore | None:
    """t5x's; None where there is no path: fresh parameters. 'specific' and 'latest' both find what a path means; 'all'
    is for `evaluate`."""
    name = "RestoreCheckpointConfig"
    convert = "change the checkpoint first, with `vikhr-t5 convert`"
    accept(f"{name}.mode", mode, ["specific", "latest", *(["all"] if path else [])], ONE_CHECKPOINT)
    accept(f"{name}.assignment_map", assignment_map, [None, (), []], convert)
    accept(f"{name}.strict", strict, [True], convert)
    accept(f"{name}.fallback_to_scratch", fallback_to_scratch, [False], convert)
    accept(f"{name}.restore_dataset", restore_dataset, [False], "a run goes on in its own MODEL_DIR; remove it")
    accept(f"{name}.checkpointer_cls", checkpointer_cls, [None], "remove it")
    accept(f"{name}.checkpoint_manager_cls", checkpoint_manager_cls, [None], "remove it")
    accept(f"{name}.state_transformation_fns", state_transformation_fns, [None, (), []], convert)
    paths = [path] if isinstance(path, str) else list(path or [])
    if len(paths) > 1:
        raise Refusal(f"{name}.path", path, "give one checkpoint")
    if not paths or not paths[0]:
        return None
    flag = f"or give a local copy: --gin.{name}.path=\"'/path/to/checkpoint'\""
    return Restore(local_copy(paths[0], flag), mode="all" if mode == "all" else "latest", dtype=dtype)


@stands_for(checkpoints.CheckpointConfig)
def CheckpointConfig(
    save: checkpoints.SaveCheckpointConfig | None = None, restore: Restore | None = None
) -> checkpoints.CheckpointConfig:
    """t5x's."""
    if save is None:
        say("CheckpointConfig.save is None: only the last step is saved")
        save = checkpoints.SaveCheckpointConfig(period=NEVER)
    return checkpoints.CheckpointConfig(save, restore)
