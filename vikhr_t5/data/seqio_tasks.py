"""seqio and TensorFlow, imported without their noise, and the tasks that a user's modules register.

from vikhr_t5.data.seqio_tasks import find_provider, import_tasks, seqio, tf
"""

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterator

from vikhr_t5.data.manifest import NEEDS_SEQIO, Feature
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

__all__ = ["check_task_vocabulary", "feature_of", "find_provider", "import_tasks", "seqio", "tf"]


def import_tasks(module: str) -> None:
    """Import the modules, joined by commas, that register tasks; the current folder is searched last.

    Raises:
        UserError: there is no such module, or `tasks` is another package than vikhr-t5's.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in module.split(","):
        require_own(name)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise UserError(
                f"no Python module {name} (from {os.getcwd()}): it should register the seqio tasks; install the package"
                " that has it, or register them in a module of yours and set MIXTURE_OR_TASK_MODULE"
            ) from error


def find_provider(name: str, module: str) -> seqio.Task | seqio.Mixture:
    """A registered task or mixture. UserError with the nearest names."""
    mixtures, tasks = seqio.MixtureRegistry.names(), seqio.TaskRegistry.names()
    if name not in mixtures and name not in tasks:
        raise UserError(f"unknown task or mixture {name!r} in {module}; {nearest(name, [*mixtures, *tasks])}")
    return seqio.MixtureRegistry.get(name) if name in mixtures else seqio.TaskRegistry.get(name)


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
