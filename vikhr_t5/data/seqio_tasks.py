"""seqio and TensorFlow, imported without their noise, and the tasks that a user's modules register.

from vikhr_t5.data.seqio_tasks import find_provider, import_tasks, seqio, tf
"""

import contextlib
import functools
import importlib
import math
import numbers
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from vikhr_t5 import text_metrics
from vikhr_t5.data.manifest import NEEDS_SEQIO, Feature, TaskMetrics
from vikhr_t5.data.module_files import module_file
from vikhr_t5.data.vocabulary import AnyVocabulary, ByteVocabulary, Vocabulary
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.packages import require_own


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Data need no GPU: TensorFlow must neither take one nor warn, in C++, that there is none."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # set, not by default: JAX has set it to 1 for its subprocesses
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


with _quiet():
    try:
        import seqio
        import tensorflow as tf
    except ImportError as error:
        raise UserError(f"{NEEDS_SEQIO} ({error})") from error

__all__ = [
    "apply_step",
    "check_rate",
    "check_task_vocabulary",
    "feature_of",
    "find_provider",
    "import_tasks",
    "metrics_of",
    "seqio",
    "tf",
]


def import_tasks(module: str) -> None:
    """Import the modules, joined by commas, that register tasks; the current folder is searched last.

    Raises:
        UserError: there is no such module, it fails (names its file and line), or `tasks` is another package than
            vikhr-t5's.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in module.split(","):
        require_own(name)
        try:
            importlib.import_module(name)
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
                raise UserError(
                    f"no Python module {name} (from {os.getcwd()}): it should register the seqio tasks; install the"
                    " package that has it, or register them in a module of yours and set MIXTURE_OR_TASK_MODULE"
                ) from error
            raise UserError(f"{_place(error, name)}: {_reason(error)}") from error


def _place(error: Exception, module: str) -> str:
    """The last line of the module that was being run, or that could not be read, when importing it failed."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    file = str(module_file(module))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}, line {lines[-1]}" if lines else module


def _reason(error: Exception) -> str:
    """What a module's failure means; seqio's own words are short of what to do."""
    said = (str(error).strip() or type(error).__name__).split("\n")[0]
    if found := re.fullmatch("Attempting to register duplicate provider: (.*)", said):
        return f"a task or mixture {found[1]} is registered already: give this one another name"
    if found := re.fullmatch("Provider name not registered: (.*)", said):
        hint = nearest(found[1], [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()])
        return f"no task or mixture {found[1]} is registered before this one; {hint}"
    if said == "need a rate for each task":
        return 'a mixture needs a rate for each task: [("task", 1.0), …], or default_rate'
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else said}"


def find_provider(name: str, module: str) -> seqio.Task | seqio.Mixture:
    """A registered task or mixture.

    Raises:
        UserError: there is none of this name (gives the nearest), a mixture contains itself, or a rate is no positive
            number.
    """
    mixtures, tasks = seqio.MixtureRegistry.names(), seqio.TaskRegistry.names()
    if name not in mixtures and name not in tasks:
        raise UserError(f"unknown task or mixture {name!r} in {module}; {nearest(name, [*mixtures, *tasks])}")
    if name in tasks:
        return seqio.TaskRegistry.get(name)
    mixture = seqio.MixtureRegistry.get(name)
    _check_mixture(mixture, ())
    return mixture


def _check_mixture(mixture: seqio.Mixture, inside: tuple[str, ...]) -> None:
    path = (*inside, mixture.name)
    if mixture.name in inside:
        raise UserError(f"mixture {mixture.name} contains itself: {' > '.join(path)}")
    for member, rate in mixture.rate_per_task_name.items():
        if not callable(rate):
            check_rate(mixture.name, member, rate)
    for other in mixture._sub_mixtures:  # seqio has no public way to ask
        _check_mixture(other, path)


def check_rate(mixture: str, member: str, rate: Any) -> float:
    """The rate. UserError where it is no positive number."""
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 < float(rate) < math.inf:
        raise UserError(f"mixture {mixture}: the rate of {member} is {rate!r}; give a positive number, or leave it out")
    return float(rate)


def apply_step(task: seqio.Task, step: Callable[..., tf.data.Dataset], dataset: tf.data.Dataset) -> tf.data.Dataset:
    """One preprocessor of a task on a dataset. UserError where it asks for a feature that the examples lack."""
    adapted = seqio.utils.add_kwargs_to_transform(step, sequence_length=None, output_features=task.output_features)
    try:
        return adapted(dataset)
    except KeyError as error:
        # TensorFlow gives the key on the last line of an account of the calls.
        missing = str(error.args[0]).strip().split("\n")[-1].removeprefix("KeyError: ").strip("'\"")
        if missing in dataset.element_spec:
            raise
        raise UserError(
            f"task {task.name}: {seqio.utils.function_name(step)} asks for {missing!r}, which the examples lack"
            f" ({nearest(missing, dataset.element_spec)})"
        ) from error


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """A UserError that was raised in Python code which TensorFlow called is one again."""
    try:
        yield
    except tf.errors.OpError as error:
        if found := re.search(r"\bUserError: (.*)", error.message):
            raise UserError(found[1]) from None
        raise


def check_task_vocabulary(task: seqio.Task, vocabulary: AnyVocabulary) -> None:
    """UserError where a feature of the task has another vocabulary than the run."""
    for name, feature in task.output_features.items():
        found = feature_of(task.name, name, feature)
        if found.vocabulary != vocabulary.fingerprint():
            raise UserError(
                f"task {task.name}: its {name} use another vocabulary ({found.vocabulary_size} ids, "
                f"{found.extra_ids} sentinels) than the run ({vocabulary.size} ids, {vocabulary.extra_ids} "
                f"sentinels, {vocabulary.source}); register it with tasks.settings.vocabulary()"
            )


def metrics_of(task: seqio.Task) -> TaskMetrics:
    """The names of a task's metric functions.

    Raises:
        UserError: one does not take what seqio gives.
    """
    try:
        functions, every = task.metric_fns, task.metric_objs
    except ValueError as error:
        raise UserError(f"task {task.name}: {error}") from error
    ours = [f for f in functions if f in text_metrics.METRICS.values() and task.postprocessor is None]
    others = [f.__name__ for f in functions if f not in ours and hasattr(f, "__name__")]
    others += ["a metric object"] * (len(every) - len(ours) - len(others))
    return TaskMetrics(tuple(f.__name__ for f in ours), tuple(others))


def feature_of(task: str, name: str, feature: seqio.Feature) -> Feature:
    """A task's output feature as a manifest has it. UserError for a vocabulary that is neither SentencePiece's nor
    bytes."""
    vocabulary = feature.vocabulary
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        ours = _vocabulary(vocabulary.sentencepiece_model_file, vocabulary.extra_ids)
    elif isinstance(vocabulary, seqio.ByteVocabulary):
        ours = ByteVocabulary(vocabulary.extra_ids)
    else:
        kind = type(vocabulary).__name__
        raise UserError(f"task {task}: {name} has a {kind}; use SentencePieceVocabulary or ByteVocabulary")
    return Feature(feature.add_eos, ours.fingerprint(), ours.size, ours.extra_ids)


@functools.cache
def _vocabulary(file: str, extra_ids: int) -> AnyVocabulary:
    return Vocabulary(file, extra_ids)
