"""The texts of a seqio task as they are before tokenization. seqio runs in a process of its own (seqio_process.py)."""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

from vikhr_t5.data import seqio_process
from vikhr_t5.errors import UserError

BATCH = 256  # examples taken out of TensorFlow in one call


class TaskExample(NamedTuple):
    """One example before tokenization.

    Attributes:
        task: its name.
        texts: the task's output features.
        others: further features of text, such as the name of a set.
    """

    task: str
    texts: dict[str, str]
    others: dict[str, str]


def read_task(mixture_or_task: str, module: str, split: str = "train") -> Iterator[TaskExample]:
    """The examples of a task, or of each task of a mixture in turn (rates do not matter), in the order of the source.

    They are what the preprocessors before `seqio.preprocessors.tokenize` make. No vocabulary is needed; where a task
    counts tokens before that, it counts bytes.

    Raises:
        UserError: unknown module, task, mixture or split; an output feature that is no text then; bad data.
    """
    arguments = {"mixture_or_task": mixture_or_task, "module": module, "split": split}
    for line in seqio_process.lines("vikhr_t5.data.task_texts", arguments):
        yield TaskExample(*json.loads(line))


def _examples(mixture_or_task: str, module: str, split: str) -> Iterator[TaskExample]:
    os.environ["VIKHR_T5_VOCABULARY"] = "bytes"
    from vikhr_t5.data.seqio_tasks import apply_step, explained, find_provider, import_tasks, seqio, tf

    import_tasks(module)
    provider = find_provider(mixture_or_task, module)
    if split not in provider.splits:
        raise UserError(f"{mixture_or_task} has no split {split!r}; it has: {', '.join(sorted(provider.splits))}")
    for task in seqio.get_subtasks(provider):
        if split not in task.splits:
            continue
        dataset = task.source.get_dataset(split=split, shuffle=False)
        with seqio.utils.map_seed_manager(0):
            for step in task.preprocessors:
                bare = step.func if isinstance(step, functools.partial) else step
                if bare in (seqio.preprocessors.tokenize, seqio.preprocessors.tokenize_and_append_eos):
                    break
                if not isinstance(step, seqio.CacheDatasetPlaceholder) and not hasattr(step, "post_cache_transform"):
                    dataset = apply_step(task, step, dataset)
        spec = dataset.element_spec
        names = [name for name in spec if spec[name].dtype == tf.string and spec[name].shape.rank == 0]
        outputs = [name for name in task.output_features if name in spec]
        if bad := [name for name in outputs if name not in names] or (not outputs and list(task.output_features)):
            raise UserError(f"task {task.name}: {bad[0]!r} is no text before seqio.preprocessors.tokenize")
        with explained():
            for batch in dataset.batch(BATCH).prefetch(2).as_numpy_iterator():
                columns = [[value.decode("utf-8") for value in batch[name].tolist()] for name in names]
                for values in zip(*columns, strict=True):
                    example = dict(zip(names, values, strict=True))
                    yield TaskExample(task.name, {name: example.pop(name) for name in outputs}, example)


def _print(**arguments: str) -> None:
    records = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # a task may print
        for example in _examples(**arguments):
            print(json.dumps(example, ensure_ascii=False), file=records)


def main() -> int:
    """`python -m vikhr_t5.data.task_texts JSON`, as `read_task` runs it."""
    return seqio_process.main(_print)


if __name__ == "__main__":
    sys.exit(main())
