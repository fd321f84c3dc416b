"""The examples of seqio tasks, for `vikhr-t5 eval` and `vikhr-t5 infer`.

Importing this file imports neither seqio nor TensorFlow; `open_tasks` does.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vikhr_t5.data.pipeline import DatasetConfig
from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.errors import UserError

Example = Mapping[str, Any]  # features of seqio: "inputs", "targets" (ids), "inputs_pretokenized" (bytes), …


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


def pairs(examples: Sequence[Example], lengths: Mapping[str, int]) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of examples, at most as long as `lengths` says."""
    return [tuple(e[name][: lengths[name]].tolist() for name in ("inputs", "targets")) for e in examples]


def longest(examples: Sequence[Example], task: str) -> dict[str, int]:
    """{"inputs": S, "targets": T} that hold every example. UserError where there is none."""
    if not examples:
        raise UserError(f"task {task} has no examples in this split")
    return {name: max(1, *(len(example[name]) for example in examples)) for name in ("inputs", "targets")}


def output_folder(path: str) -> Path:
    folder = Path(path).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
