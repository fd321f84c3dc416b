"""What becomes of the first documents of a task's source, preprocessor by preprocessor, up to the tokens of the cache.

This needs seqio, so `vikhr_t5.data.preview` runs it in a process of its own. Each document goes through the
preprocessors alone: what a step makes of it, or that it leaves it out, is seen without guessing which is which.
"""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from vikhr_t5.data import drops, seqio_process
from vikhr_t5.data.seqio_tasks import apply_step, explained, find_provider, import_tasks, seqio, tf

SEARCHED = 100  # documents of the source that are looked at
SHOWN = 3  # examples that one document has become, say the turns of a chat


def follow(
    mixture_or_task: str,
    module: str,
    split: str,
    vocabulary_file: str,
    extra_ids: int,
    kept: int = 1,
    left_out: int = 1,
) -> dict[str, list[Any]]:
    """Documents of each task, in the order of its source.

    Args:
        vocabulary_file, extra_ids: for `tasks.settings`.
        kept, left_out: documents wanted of either kind; fewer where the first `SEARCHED` have no more.

    Returns:
        task -> documents, each {"stages": [[step, examples, number of examples], …], "dropped": the reason, or null};
        an example is {feature: text, or list of ids}, without seqio's copies of the text.
    Raises:
        UserError: unknown module, task or mixture; bad data.
    """
    os.environ.update({"VIKHR_T5_VOCABULARY": vocabulary_file, "VIKHR_T5_EXTRA_IDS": str(extra_ids)})
    import_tasks(module)
    tasks = [task for task in seqio.get_subtasks(find_provider(mixture_or_task, module)) if split in task.splits]
    with explained():
        return {task.name: list(_documents(task, split, kept, left_out)) for task in tasks}


def _documents(task: seqio.Task, split: str, kept: int, left_out: int) -> Iterator[dict[str, Any]]:
    source = task.source.get_dataset(split=split, shuffle=False)
    current: list[Any] = []  # the document that the datasets below are about
    one = tf.data.Dataset.from_generator(lambda: iter(current), output_signature=source.element_spec)
    steps = [("source", one), *_steps(task, one)]
    wanted = {False: kept, True: left_out}
    for document in source.take(SEARCHED):
        current[:] = [document]
        is_dropped = next(iter(steps[-1][1]), None) is None
        if wanted[is_dropped]:
            wanted[is_dropped] -= 1
            yield _followed(steps)
        if not any(wanted.values()):
            return


def _steps(task: seqio.Task, dataset: tf.data.Dataset) -> Iterator[tuple[str, tf.data.Dataset]]:
    """The preprocessors up to the cache: name, and the dataset after it."""
    with seqio.utils.map_seed_manager(0):
        for step in task.preprocessors:
            if hasattr(step, "post_cache_transform"):
                return
            if not isinstance(step, seqio.CacheDatasetPlaceholder):
                dataset = apply_step(task, step, dataset)
                yield seqio.utils.function_name(step), dataset


def _followed(steps: list[tuple[str, tf.data.Dataset]]) -> dict[str, Any]:
    stages = []
    for name, dataset in steps:
        before = drops.counts()
        examples = list(dataset.as_numpy_iterator())
        shown = [
            {feature: _plain(value) for feature, value in example.items() if not feature.endswith("_pretokenized")}
            for example in examples[:SHOWN]
        ]
        stages.append([name, shown, len(examples)])
        if not examples:
            return {"stages": stages, "dropped": next(iter(drops.counts() - before), name)}
    return {"stages": stages, "dropped": None}


def _plain(value: Any) -> str | list[int]:
    """A text, or ids; anything else as its text."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    array = np.asarray(value)
    return array.tolist() if array.ndim == 1 and np.issubdtype(array.dtype, np.integer) else str(value)


def main() -> int:
    """`python -m vikhr_t5.data.preview_raw JSON`, as `preview` runs it."""
    return seqio_process.main(lambda **arguments: print(json.dumps(follow(**arguments))))


if __name__ == "__main__":
    sys.exit(main())
