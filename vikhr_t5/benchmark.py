"""Models on benchmarks, through lm-eval: `vikhr-t5 benchmark`.

The tasks are lm-eval's own (xwinograd_ru, xnli_ru) and those of tasks/benchmarks. Their rows come through
`benchmark_data`, which checks each; prompts and scores are lm-eval's. Standard errors are computed here.
"""

import hashlib
import json
import logging
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars; read when tqdm is imported

import datasets
import lm_eval
import numpy as np
import torch
import transformers
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from vikhr_t5 import __version__, benchmark_models
from vikhr_t5.benchmark_data import EMBEDDED, BenchmarkData
from vikhr_t5.benchmark_models import Model, ModelFolder
from vikhr_t5.benchmark_results import BENCHMARKS, Result, needs_encoder
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import write_text_atomic
from vikhr_t5.packages import require_own

SEED = 1234  # lm-eval's own
_LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
Estimate = tuple[float, float | None]  # value and standard error; None: of a single item
Samples = Mapping[str, Sequence[Mapping[str, Any]]]
_OF_GROUPS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata")
_STOCK = ("xwinograd", "xnli")  # its folders that are read: all of them would take many seconds


@dataclass(frozen=True)
class Loaded:
    """A benchmark, ready to run.

    Attributes:
        tasks: lm-eval's, by name: 57 of ru_mmlu, one of the others.
        source: where the rows come from.
        fingerprint: of prompts and rows.
    """

    name: str
    tasks: dict[str, Task]
    num_fewshot: int
    source: str
    fingerprint: str


def benchmark(
    models: Sequence[ModelFolder],
    names: Sequence[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    output: Path | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    max_length: int | None = None,
) -> list[Result]:
    """Every model on every benchmark that is for it.

    Args:
        models: with different names.
        names: of BENCHMARKS. A `_seq2seq` formulation is left out for a causal model.
        data_dir: where the rows are; None: the hub, and of translation and perplexity the embedded texts.
        num_fewshot: examples in a prompt, where a benchmark has any; None: as published.
        limit: items of each task (of each subject); None: all.
        output: a folder for a file of each result, from where an equal evaluation is taken.
        batch_size, dtype, max_length: as in `benchmark_models.opened`.

    Raises:
        UserError: an unknown benchmark; data or a model that cannot be read; nothing to run.
    """
    _quiet()
    loaded = {name: load(name, data_dir, num_fewshot) for name in names}
    settings = {"limit": limit, "dtype": dtype, "max_length": max_length, "seed": SEED, "lm_eval": lm_eval.__version__}
    results: list[Result] = []
    for model in models:
        fitting = [one for one in loaded.values() if model.seq2seq or not needs_encoder(one.name)]
        wanted = {one.name: _fingerprint(model.fingerprint, one.fingerprint, settings) for one in fitting}
        found = {name: result for name in wanted if (result := _kept(output, model.name, name, wanted[name]))}
        missing = [one for one in fitting if one.name not in found]
        if missing:
            with benchmark_models.opened(model, dtype, batch_size, max_length) as opened:
                about = {**settings, **benchmark_models.description(opened), "batch_size": batch_size}
                for one in missing:
                    found[one.name] = _evaluate(opened, one, limit, wanted[one.name], about)
                    _keep(output, found[one.name])
        results += [found[one.name] for one in fitting]
    if not results:
        raise UserError(f"nothing to run: {', '.join(names)} are for encoder-decoders, and every model is a causal one")
    return results


def _quiet() -> None:
    """What is wrong is raised; the rest of these libraries' messages would bury the progress."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


# ---- tasks -----------------------------------------------------------------------------------------------------------


def load(name: str, data_dir: str | os.PathLike[str] | None = None, num_fewshot: int | None = None) -> Loaded:
    """A benchmark with its rows. UserError as in `benchmark`."""
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r} ({nearest(name, BENCHMARKS)})")
    require_own("tasks")
    import tasks

    about = BENCHMARKS[name]
    shots = 0 if about.num_fewshot is None else about.num_fewshot if num_fewshot is None else num_fewshot
    ours = Path(tasks.__file__).parent / "benchmarks"
    manager = TaskManager(include_path=[ours, *(_LM_EVAL_TASKS / stock for stock in _STOCK)], include_defaults=False)
    data = BenchmarkData(about.data, data_dir)
    embedded = about.data in EMBEDDED and not (data_dir and data.exists())
    changed: dict[str, Any] = {"num_fewshot": shots}
    if not embedded:
        changed["custom_dataset"] = lambda **about_task: data.dataset(shots, about_task.get("subject"))
    configs = _configs(load_yaml(manager.task_index[name].yaml_path))
    found = {config["task"]: ConfigurableTask(config={**config, **changed}) for config in configs}
    source = "embedded: LibreOffice help, held out (tasks/demo_data)" if embedded else data.source
    return Loaded(name, found, shots, source, _fingerprint(*map(_content, found.values())))


def _configs(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of the task, or of each task of a group and its groups: what is said of a group holds for its tasks. (lm-eval's
    own `TaskManager` cannot put other rows under tasks that stand inside a group.)"""
    if not isinstance(config["task"], list):
        yield config
        return
    of_all = {key: value for key, value in config.items() if key not in _OF_GROUPS}
    for part in config["task"]:
        yield from _configs({**of_all, **part})


def _content(task: Task) -> list[Any]:
    """What prompts and scores of a task depend on, the same in every process.

    lm-eval writes functions of a configuration as their source; what it copies into `fewshot_config` it does not.
    """
    left_out = ("custom_dataset", "metadata", "fewshot_config")
    config = {key: value for key, value in task.dump_config().items() if key not in left_out}
    rows = hashlib.sha256()
    for split in sorted(task.dataset):
        for row in task.dataset[split]:
            rows.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
    return [config, task.fewshot_cfg.sampler, str(task.VERSION), rows.hexdigest()]


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---- scores ----------------------------------------------------------------------------------------------------------


def _evaluate(model: Model, one: Loaded, limit: int | None, fingerprint: str, about: dict[str, Any]) -> Result:
    start = time.monotonic()
    model.forget()
    samples = run(model, one, limit)
    value, stderr, parts = score(one, samples)
    settings = {
        **about,
        "data": one.source,
        "task_version": str(next(iter(one.tasks.values())).VERSION),
        "vikhr_t5": __version__,
        "seconds": round(time.monotonic() - start, 1),
    }
    items = sum(map(len, samples.values()))
    counted = (one.num_fewshot, model.prompts, model.cut, model.max_length)
    return Result(model.name, one.name, value, stderr, items, *counted, fingerprint, parts, settings)


def run(model: LM, one: Loaded, limit: int | None = None) -> Samples:
    """lm-eval's samples of each task: prompts, answers, metrics of every item.

    Args:
        model: any of lm-eval's.
        limit: items of each task.
    """
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - lm-eval uses no other
    torch.manual_seed(SEED)
    for task in one.tasks.values():
        task.set_fewshot_seed(SEED)
    # Its standard errors would be bootstrapped by a pool of processes, for metrics that have simple ones.
    found = lm_eval.evaluate(model, {"tasks": one.tasks}, limit=limit, bootstrap_iters=0, log_samples=True)
    return found["samples"]


def score(one: Loaded, samples: Samples) -> tuple[float, float | None, dict[str, Estimate]]:
    """Value, standard error, and of ru_mmlu those of its categories.

    ru_mmlu is the mean over four categories of the means over their subjects, as in its authors' stats.py; the errors
    of subjects are independent.
    """
    metric = BENCHMARKS[one.name].metric
    if metric != "acc":
        (items,) = samples.values()
        return *(_chrf(items) if metric == "chrf" else _bits_per_byte(items)), {}
    scored = {name: _mean([item["acc"] for item in samples[name]]) for name in one.tasks}
    if len(scored) == 1:
        return *next(iter(scored.values())), {}
    categories: dict[str, list[Estimate]] = defaultdict(list)
    for name, task in one.tasks.items():
        categories[task.get_config("metadata")["category"]].append(scored[name])
    means = {category: _mean_of(subjects) for category, subjects in categories.items()}
    return *_mean_of(means.values()), means


def _mean(values: Sequence[float]) -> Estimate:
    stderr = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return float(np.mean(values)), stderr


def _mean_of(parts: Iterable[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates."""
    values, errors = zip(*parts, strict=True)
    known = [error for error in errors if error is not None]
    stderr = math.sqrt(sum(error**2 for error in known)) / len(values) if len(known) == len(values) else None
    return float(np.mean(values)), stderr


def _bits_per_byte(items: Sequence[Mapping[str, Any]]) -> Estimate:
    """Of all bytes together; the error is that of a ratio of means (linearised)."""
    likelihoods, lengths = np.array([item["bits_per_byte"] for item in items], float).T
    bits = -likelihoods / math.log(2)
    ratio = bits.sum() / lengths.sum()
    _, stderr = _mean((bits - ratio * lengths) / lengths.mean())
    return float(ratio), stderr


def _chrf(items: Sequence[Mapping[str, Any]]) -> Estimate:
    """Of the corpus, by sacrebleu; the error is that of the mean over sentences of theirs."""
    from sacrebleu.metrics import CHRF

    found = [item["filtered_resps"][0] for item in items]
    references = [item["target"] for item in items]
    metric = CHRF()
    of_each = [metric.sentence_score(one, [reference]).score for one, reference in zip(found, references, strict=True)]
    return metric.corpus_score(found, [references]).score, _mean(of_each)[1]


# ---- results on disk -------------------------------------------------------------------------------------------------


def _file(output: Path, model: str, name: str) -> Path:
    return output / "results" / model / f"{name}.json"


def _kept(output: Path | None, model: str, name: str, fingerprint: str) -> Result | None:
    """The result of an equal evaluation, where there is one."""
    if output is None:
        return None
    try:
        record = json.loads(_file(output, model, name).read_text(encoding="utf-8"))
        parts = {part: (value, stderr) for part, (value, stderr) in record["parts"].items()}
        result = Result(**{**record, "parts": parts})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return result if result.fingerprint == fingerprint else None


def _keep(output: Path | None, result: Result) -> None:
    if output is not None:
        text = json.dumps(result.record(), indent=2, ensure_ascii=False) + "\n"
        write_text_atomic(_file(output, result.model, result.benchmark), text)
