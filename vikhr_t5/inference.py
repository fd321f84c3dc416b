"""What `vikhr-t5 eval` and `vikhr-t5 infer` share: a task's examples from seqio, predictions and scores of a model.

B batch, S source length, T target length. Importing this file imports neither seqio nor TensorFlow; `open_tasks` does.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vikhr_t5.data.pipeline import DatasetConfig
from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.model import decoding, network
from vikhr_t5.train import checkpoints
from vikhr_t5.train.checkpoint_files import find_checkpoint
from vikhr_t5.train.checkpoints import RestoreCheckpointConfig
from vikhr_t5.train.losses import token_losses
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.state import Batch, EncoderDecoderModel

Example = Mapping[str, Any]  # features of seqio: "inputs", "targets" (ids), "inputs_pretokenized" (bytes), …


class Score(NamedTuple):
    """Of one example's targets. log_likelihood: a sum over tokens."""

    log_likelihood: float
    tokens: int
    correct: int  # tokens that the model finds likeliest


# ---- examples --------------------------------------------------------------------------------------------------------


def open_tasks(config: DatasetConfig, vocabulary: AnyVocabulary) -> list[Any]:
    """The seqio tasks of `config` that have its split, their module imported, their vocabularies checked.

    Raises:
        UserError: seqio is not installed, or the name, the split or the vocabulary is not there.
    """
    jax.devices()  # first: TensorFlow is then kept from the accelerators by an environment variable, JAX is not
    os.environ |= {"VIKHR_T5_VOCABULARY": vocabulary.source, "VIKHR_T5_EXTRA_IDS": str(vocabulary.extra_ids)}
    import absl.logging

    from vikhr_t5.data import cache  # before seqio: it imports TensorFlow quietly

    absl.logging.set_verbosity(absl.logging.ERROR)
    if config.module:
        cache.import_tasks(config.module)
    provider = cache.find_provider(config.mixture_or_task_name, config.module or "the modules imported")
    tasks = [task for task in cache.seqio.get_subtasks(provider) if config.split in task.splits]
    if not tasks:
        raise UserError(
            f"{config.mixture_or_task_name} has no split {config.split!r} (it has: {', '.join(provider.splits)}):"
            f" --gin.DatasetConfig.split=\"'{list(provider.splits)[-1]}'\""
        )
    for task in tasks:
        cache.check_task_vocabulary(task, vocabulary)
        if not {"inputs", "targets"} <= set(task.output_features):
            raise UserError(f"task {task.name} has no inputs and targets, but {', '.join(task.output_features)}")
    return tasks


def examples(task: Any, config: DatasetConfig) -> Iterator[Example]:
    """The task's examples in order, tokenized, cut to `config.task_feature_lengths` where those are given.

    Raises:
        UserError: a preprocessor needs lengths and there are none, or fails.
    """
    lengths = None if config.task_feature_lengths is None else dict(config.task_feature_lengths)
    try:
        dataset = task.get_dataset(
            sequence_length=lengths,
            split=config.split,
            use_cached=False,
            shuffle=config.shuffle,
            seed=config.seed,
            num_epochs=1,
        )
        yield from dataset.as_numpy_iterator()
    except (TypeError, KeyError, UserError) as error:
        if lengths is None:
            raise UserError(f"task {task.name} needs lengths: set TASK_FEATURE_LENGTHS ({error})") from error
        raise


def plain(example: Example, vocabulary: AnyVocabulary) -> dict[str, Any]:
    """The texts of an example as JSON has them: what seqio keeps as `…_pretokenized`, else its inputs decoded."""
    texts = {name: _json(value) for name, value in example.items() if name.endswith("_pretokenized")}
    return texts or {"inputs": vocabulary.decode(example["inputs"].tolist())}


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, np.ndarray):
        return [_json(item) for item in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


# ---- a model that answers --------------------------------------------------------------------------------------------


class Predictor:
    """A checkpoint's parameters on the mesh.

    Args:
        batch_size: rows that go through the model at one time.
        dtype: "bfloat16" rounds the parameters to it, as t5x's `RestoreCheckpointConfig.dtype`.

    Raises:
        UserError: there is no whole checkpoint, or it is of another model or vocabulary.
    """

    def __init__(
        self,
        model: EncoderDecoderModel,
        partitioner: Partitioner,
        restore: RestoreCheckpointConfig,
        batch_size: int,
        dtype: str = "float32",
    ):
        if restore.path is None:
            raise UserError("no checkpoint to read: set CHECKPOINT_PATH")
        partitioner.check_batch_size(batch_size)
        self.model, self.partitioner, self.batch_size = model, partitioner, batch_size
        self.path = find_checkpoint(restore.path)
        checkpoints.check_vocabulary(self.path, model.vocabulary)
        shapes = model.abstract_state()
        shardings = partitioner.shardings(model.state_axes(), shapes)
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        state, progress = checkpoints.restore(self.path, like, reset_optimizer=True)
        self.step = int(progress["step"])
        self.params = state.params
        if dtype != "float32":
            self.params = jax.tree.map(lambda p: p.astype(dtype).astype(p.dtype), self.params)
        self._score = jax.jit(self._score_batch)

    def predict(self, examples: Sequence[Example], lengths: Mapping[str, int]) -> list[list[int]]:
        """Ids of each example's greedy answer, at most `lengths["targets"]` of them, EOS included where it came."""
        config, vocabulary = self.model.config, self.model.vocabulary
        answers: list[list[int]] = []
        for rows in self._batches(examples):
            tokens = self._put({"inputs": self._rows(rows, "inputs", lengths["inputs"])})["inputs"]
            out = decoding.greedy(
                self.params,
                config,
                tokens,
                lengths["targets"],
                eos_id=vocabulary.eos_id,
                vocab_size=vocabulary.size,
            )
            for row in np.asarray(out)[: len(rows)].tolist():
                answers.append(row[: row.index(0)] if 0 in row else row)
        return answers

    def score(self, examples: Sequence[Example], lengths: Mapping[str, int]) -> list[Score]:
        """The log-likelihood of each example's targets given its inputs, teacher-forced."""
        scores: list[Score] = []
        for rows in self._batches(examples):
            targets = self._rows(rows, "targets", lengths["targets"])
            shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
            batch = self._put(
                {
                    "encoder_input_tokens": self._rows(rows, "inputs", lengths["inputs"]),
                    "decoder_input_tokens": shifted,
                    "decoder_target_tokens": targets,
                }
            )
            sums = np.asarray(self._score(self.params, batch))[: len(rows)]
            scores += [Score(float(row[0]), int(row[1]), int(row[2])) for row in sums]
        return scores

    def _score_batch(self, params: Any, batch: Batch) -> jax.Array:
        """[B, 3]: the sums of `Score`."""
        targets = batch["decoder_target_tokens"]
        hidden: Any = self.model.module.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            targets,
            method="decoder_hidden",
        )
        kernel, scale = network.head(params, self.model.config)
        losses = token_losses(hidden, kernel, scale, targets, chunk_size=self.model.loss_chunk_size)
        counted = (targets > 0).astype(jnp.float32)
        return jnp.stack([(x * counted).sum(-1) for x in (-losses.loss, counted, losses.correct)], axis=-1)

    def _batches(self, examples: Sequence[Example]) -> Iterable[Sequence[Example]]:
        return (examples[i : i + self.batch_size] for i in range(0, len(examples), self.batch_size))

    def _rows(self, rows: Sequence[Example], feature: str, length: int) -> np.ndarray:
        """int32 [batch_size, length]; what is missing is padding."""
        tokens = np.zeros((self.batch_size, length), np.int32)
        for row, example in zip(tokens, rows, strict=False):
            ids = example[feature][:length]
            row[: len(ids)] = ids
        return tokens

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return self.partitioner.put_batch(batch, self.batch_size)


def longest(examples: Sequence[Example], task: str) -> dict[str, int]:
    """{"inputs": S, "targets": T} that hold every example. UserError where there is none."""
    if not examples:
        raise UserError(f"task {task} has no examples in this split")
    return {name: max(1, *(len(example[name]) for example in examples)) for name in ("inputs", "targets")}


def output_folder(path: str) -> Path:
    folder = Path(path).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
