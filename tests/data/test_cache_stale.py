"""A cache that is no longer what its task would give: noticed by the one that caches and by the one that trains."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import seqio
from cached_tasks import digests, store_of

from vikhr_t5.data.cache import cache
from vikhr_t5.data.manifest import TaskMetrics
from vikhr_t5.data.module_files import preprocessing_digest, source_digests
from vikhr_t5.data.seqio_tasks import import_tasks
from vikhr_t5.data.store import CacheStale, ensure_cached, open_cached
from vikhr_t5.errors import UserError

PUBLISHED = """
from tasks import settings
from vikhr_t5.data.sources import held_out
published = settings.source("someone/set", ["text"], held_out("text", 0.1))
add(NAME + "_published", source=published, preprocessors=[to_targets, tokenize, placeholder, Later()])
"""


@pytest.fixture
def corpora(tmp_path: Path, data: Path) -> Callable[[str, int], Path]:
    """Writes someone/set under a data folder of that name: so many of the pages, as JSON lines."""

    def write(name: str, pages: int, file: str = "part.jsonl") -> Path:
        folder = tmp_path / name / "someone" / "set"
        folder.mkdir(parents=True, exist_ok=True)
        texts = (data / "pages.txt").read_text("utf-8").split("\n\n")[:pages]
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / file).write_text(lines, encoding="utf-8")
        return tmp_path / name

    return write


def again(name: str) -> None:
    """As in a new process: the module's tasks are registered when it is imported the next time."""
    for task in [task for task in seqio.TaskRegistry.names() if task.startswith(name)]:
        seqio.TaskRegistry.remove(task)
    sys.modules.pop(name, None)
    importlib.invalidate_caches()


def test_another_data_folder(module, corpora, monkeypatch, capfd):
    name = module(PUBLISHED)
    task = f"{name}_published"
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(corpora("one", 50)))
    one = cache(task, name, "cache")[task]["train"]
    assert len(open_cached("cache", task, "train").stores[task]) == one.num_examples
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(corpora("two", 90)))
    with pytest.raises(CacheStale, match=r"VIKHR_T5_DATA_DIR was \S*/one and is \S*/two"):
        open_cached("cache", task, "train")
    two = cache(task, name, "cache")[task]["train"]
    assert two.num_examples > one.num_examples
    assert "is cached again: its files have changed: " in capfd.readouterr().err
    monkeypatch.delenv("VIKHR_T5_DATA_DIR")  # a training node that has the cache alone
    assert len(open_cached("cache", task, "train").stores[task]) == two.num_examples


def test_a_file_more_or_less(module, corpora, monkeypatch, capfd):
    name = module(PUBLISHED)
    task = f"{name}_published"
    folder = corpora("one", 50)
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(folder))
    before = cache(task, name, "cache")[task]["train"].num_examples
    corpora("one", 20, "another.jsonl")
    with pytest.raises(CacheStale, match=r"another\.jsonl is new"):
        open_cached("cache", task, "train")
    assert cache(task, name, "cache")[task]["train"].num_examples > before
    (folder / "someone" / "set" / "another.jsonl").unlink()
    with pytest.raises(CacheStale, match=r"another\.jsonl is gone"):
        open_cached("cache", task, "train")
    assert cache(task, name, "cache")[task]["train"].num_examples == before
    assert capfd.readouterr().err.count("is cached again") == 4  # two splits, twice


def test_a_dataset_saved_again(module, tmp_path, monkeypatch):
    name = module(PUBLISHED)
    task, saved = f"{name}_published", tmp_path / "one" / "someone" / "set"
    datasets.Dataset.from_dict({"text": [f"документ {i}" for i in range(30)]}).save_to_disk(saved)
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(tmp_path / "one"))
    cache(task, name, "cache")
    assert open_cached("cache", task, "train")
    for file in saved.iterdir():
        file.unlink()
    datasets.Dataset.from_dict({"text": [f"документ {i}" for i in range(30)]}).save_to_disk(saved, num_shards=2)
    with pytest.raises(CacheStale, match=r"data-00000-of-00002\.arrow is new"):
        open_cached("cache", task, "train")


def test_a_changed_preprocessor(module, small_vocabulary, tmp_path, capfd):
    """In the module of the task, and in one that it imports by name."""
    (tmp_path / "my_steps.py").write_text("first_word = lambda text: text.split(' ')[0]")
    text = """
import my_steps, numpy as np
shorten = lambda text: np.array(my_steps.first_word(text.decode()).encode())
def shortened(dataset): return dataset.map(lambda e: {"targets": tf.ensure_shape(
    tf.numpy_function(shorten, [e["targets"]], tf.string), [])})
add(NAME + "_x", source=text, preprocessors=[to_targets, shortened, tokenize, placeholder, Later()])
"""
    name = module(text)
    task = f"{name}_x"
    before = cache(task, name, "cache")[task]["train"]
    assert set(before.provenance.modules) == {name, "my_steps"}
    for file, old, new in (("my_steps", "[0]", "[-1]"), (name, " shortened, tokenize", " tokenize")):
        tokens, path = digests(task), tmp_path / f"{file}.py"
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        with pytest.raises(CacheStale, match=rf"{file}\.py has changed"):
            open_cached("cache", task, "train")
        again(name)
        sys.modules.pop("my_steps", None)
        cache(task, name, "cache")
        assert f"{task}/train is cached again" in capfd.readouterr().err
        assert digests(task) != tokens
        assert open_cached("cache", task, "train")


def test_metric_functions_are_noted_again_and_no_token_is_made_again(module, tmp_path):
    text = """
from vikhr_t5 import text_metrics
def own(targets, predictions): return {"own": 0.0}
parts = dict(source=pairs, preprocessors=[to_both, tokenize, placeholder, append_eos])
add(NAME + "_m", **parts, metric_fns=[text_metrics.chrf, own, text_metrics.rouge])
add(NAME + "_p", **parts, postprocess_fn=lambda answer, **_: answer, metric_fns=[text_metrics.chrf])
seqio.MixtureRegistry.add(NAME + "_both", [NAME + "_m", NAME + "_p"], default_rate=1.0)
"""
    name = module(text)
    both, measured, processed = (f"{name}_{end}" for end in ("both", "m", "p"))
    cache(both, name, "cache")
    found = {measured: TaskMetrics(("chrf", "rouge"), ("own",)), processed: TaskMetrics((), ("chrf",))}
    assert open_cached("cache", both, "train").metrics == found
    assert open_cached("cache", measured, "train").metrics == {measured: found[measured]}
    written = os.stat(store_of(measured).directory / "manifest.json").st_mtime_ns
    path = tmp_path / f"{name}.py"
    path.write_text(path.read_text(encoding="utf-8").replace("chrf, own, text_metrics.rouge", "bleu"))
    with pytest.raises(CacheStale, match=r"the cached definition of .*_m is stale: .*\.py has changed"):
        open_cached("cache", measured, "train")
    seqio.MixtureRegistry.remove(both)
    again(name)
    cache(both, name, "cache")
    assert open_cached("cache", both, "train").metrics == {**found, measured: TaskMetrics(("bleu",))}
    assert os.stat(store_of(measured).directory / "manifest.json").st_mtime_ns == written


def test_what_of_a_module_changes_no_token(tmp_path):
    """Metric functions of a task, named anew, taken away, or added as formatters lay a call out; nothing else."""
    without = 'import seqio\n\nadd(\n    "имя",\n    source=a,\n)\nadd("b", source=b)\n'
    with_metrics = (
        "import seqio\nfrom vikhr_t5 import text_metrics\n\n"
        'add(\n    "имя",\n    source=a,\n    metric_fns=[\n        text_metrics.bleu,\n    ],\n)\n'
        'add("b", source=b, metric_fns=[text_metrics.chrf])\n'
    )

    def digest(text: str) -> str:
        (tmp_path / "tasks.py").write_text(text, encoding="utf-8")
        return preprocessing_digest(tmp_path / "tasks.py")

    assert digest(with_metrics) == digest(without)
    assert digest(with_metrics.replace("bleu", "rouge")) == digest(without)
    for old, new in (("source=a", "source=b"), ("имя", "другое"), ("import seqio", "import seqio as s")):
        assert digest(with_metrics.replace(old, new)) not in (digest(without), digest(with_metrics))
    assert digest("import vikhr_t5.text_metrics\r\nx = 1") == digest("x = 1")
    assert digest("from vikhr_t5 import text_metrics, packages\nx = 1") != digest("x = 1")
    assert digest("no Python:") != digest("no Python")


def test_another_vocabulary(module, capfd):
    name = module()
    task = f"{name}_text"
    before = cache(task, name, "cache")[task]["train"].features["targets"].extra_ids
    again(name)
    module(extra_ids=before + 1)
    cache(task, name, "cache")
    assert store_of(task).manifest.features["targets"].extra_ids == before + 1
    assert "is cached again: its features or their vocabulary have changed" in capfd.readouterr().err


def test_another_module_that_registers_the_name(module, tmp_path, capfd):
    name = module()
    task = f"{name}_text"
    cache(task, name, "cache")
    again(name)
    (tmp_path / "another_module.py").write_text((tmp_path / f"{name}.py").read_text(encoding="utf-8"))
    cache(task, "another_module", "cache")
    assert f"is cached again: {name} registered it, and now another_module" in capfd.readouterr().err
    sys.modules.pop("another_module")


def test_what_changes_nothing(module, tmp_path, capfd):
    """A second module of the command, and one that the tasks do not import."""
    name = module()
    task = f"{name}_text"
    cache(task, name, "cache")
    written = os.stat(store_of(task).directory / "manifest.json").st_mtime_ns
    (tmp_path / "beside.py").write_text("import seqio")
    cache(task, f"{name},beside", "cache")
    assert os.stat(store_of(task).directory / "manifest.json").st_mtime_ns == written
    assert "cached again" not in capfd.readouterr().err


def test_fewer_malformed_lines_allowed(module, data, monkeypatch):
    (data / "pages.txt").write_bytes((data / "pages.txt").read_bytes() + b"\n\xff\n")
    name = module()
    task = f"{name}_text"
    import_tasks(name)
    source = seqio.TaskRegistry.get(task).source
    source.max_bad_lines = 1
    assert cache(task, name, "cache", splits=["train"])[task]["train"].skipped_lines == 1
    source.max_bad_lines = 0
    with pytest.raises(UserError, match="not UTF-8"):
        cache(task, name, "cache", splits=["train"])


def test_the_trainer_says_so_and_rebuilds(module, corpora, small_vocabulary, monkeypatch, capfd):
    name = module(PUBLISHED)
    task = f"{name}_published"
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(corpora("one", 50)))
    before = cache(task, name, "cache", dedup_method="exact")[task]["train"].num_examples
    corpora("one", 20, "another.jsonl")
    store = ensure_cached("cache", task, "train", name, small_vocabulary).stores[task]
    assert store.manifest.dropped["duplicate"] > 0
    assert len(store) == before  # the file more holds the same documents
    error = capfd.readouterr().err
    assert "is stale: " in error
    assert "another.jsonl is new" in error
    assert ": caching it now" in error


def test_which_modules_count(tmp_path, monkeypatch):
    package = tmp_path / "corpus_of_ours"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "news.py").write_text(
        "import json, numpy\nfrom . import steps\nfrom .words import LIST\nimport vikhr_t5.cli"
    )
    (package / "steps.py").write_text("def lazily():\n    from corpus_of_ours import late")
    for other in ("words", "late", "unused"):
        (package / f"{other}.py").write_text("LIST = ()")
    monkeypatch.syspath_prepend(tmp_path)
    found = {"corpus_of_ours", *(f"corpus_of_ours.{name}" for name in ("late", "news", "steps", "words"))}
    assert set(source_digests("corpus_of_ours.news")) == found
    assert "corpus_of_ours.news" not in sys.modules
    assert {"tasks", "tasks.demo", "tasks.settings"} <= set(source_digests("tasks.demo"))
    assert "tasks.flan" not in source_digests("tasks.demo")


def test_malformed_lines_of_a_published_set(module, corpora, monkeypatch):
    """None, so many by the environment, or as the task says; counted in the manifest."""
    folder = corpora("one", 50)
    with open(folder / "someone" / "set" / "part.jsonl", "ab") as handle:
        handle.write(b'{"text": null}\n{"text"\n')
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(folder))
    text = PUBLISHED.replace("_published", "_published{0}").replace("0.1))", "0.1){1})")
    for limit, argument, skipped in (("1", "", None), ("2", "", 2), ("0", ", max_bad_lines=3", 2)):
        monkeypatch.setenv("VIKHR_T5_MAX_BAD_LINES", limit)
        name = module(text.format(f"_{limit}", argument))
        again(name)
        task = f"{name}_published_{limit}"
        if skipped is None:
            with pytest.raises(UserError, match=r"part\.jsonl, line 52: .*2 are malformed, and max_bad_lines is 1"):
                cache(task, name, "cache")
        else:
            manifests = cache(task, name, "cache")[task]
            assert manifests["train"].skipped_lines == skipped
            assert sum(manifest.num_examples for manifest in manifests.values()) == 50
    monkeypatch.setenv("VIKHR_T5_MAX_BAD_LINES", "many")
    again(name)
    with pytest.raises(UserError, match="VIKHR_T5_MAX_BAD_LINES='many' is no number of lines"):
        cache(task, module(PUBLISHED), "cache")
