"""Caching: the same tokens as seqio's own pipeline, the same files however the work is shared, and every refusal."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import seqio
from cached_tasks import TASKS, digests, store_of

from vikhr_t5.data import cache as cache_module
from vikhr_t5.data import cache_shards
from vikhr_t5.data.byte_vocabulary import ByteVocabulary
from vikhr_t5.data.cache import cache, import_tasks
from vikhr_t5.data.store import ensure_cached, open_cached, task_directory
from vikhr_t5.errors import UserError

ROOT = Path(__file__).parents[2]


# ---- the same as seqio -----------------------------------------------------------------------------------------------


def test_tokens_are_those_of_seqio(module):
    name = module(
        TASKS
        + """
add(NAME + "_long", source=pairs, preprocessors=[to_both, tokenize, placeholder, append_eos_after_trim])
add(NAME + "_plain", source=pairs, preprocessors=[to_both, tokenize, append_eos])
two_tokens = lambda dataset: dataset.map(lambda pair: {name: tf.constant([5, 1]) for name in features})
add(NAME + "_fixed", source=pairs, preprocessors=[two_tokens])
seqio.MixtureRegistry.add(NAME, [NAME + "_pairs", NAME + "_long", NAME + "_plain", NAME + "_fixed"], default_rate=1)
"""
    )
    cache(name, name, "cache")
    cache(f"{name}_text", name, "cache")
    for task in (f"{name}_pairs", f"{name}_long", f"{name}_plain", f"{name}_fixed"):
        store = store_of(task)
        expected = list(seqio.TaskRegistry.get(task).get_dataset(None, "train", shuffle=False).as_numpy_iterator())
        assert len(store) == len(expected) == 300
        for index, example in enumerate(expected):
            for feature, tokens in store.example(index).items():
                assert tokens.tolist() == example[feature].tolist()
                assert tokens[-1] == 1
        assert store.manifest.transform is None
        assert store.manifest.frozen == []
        assert store.manifest.eos_after_trim == task.endswith("long")


def test_bytes_are_those_of_seqio(module, tmp_path):
    tasks = """
features = {{name: seqio.Feature(seqio.ByteVocabulary({extra_ids}), add_eos=True) for name in ("inputs", "targets")}}
add = functools.partial(seqio.TaskRegistry.add, output_features=features)
add(NAME + "_bytes", source=pairs, preprocessors=[to_both, tokenize, placeholder, append_eos])
add(NAME + "_text", source=text, preprocessors=[to_targets, tokenize, placeholder, Later()])
"""
    name = module(tasks.format(extra_ids=5))
    manifest = cache(f"{name}_bytes", name, "cache", vocabulary_file="bytes", extra_ids=5)[f"{name}_bytes"]["train"]
    assert manifest.features["inputs"].vocabulary == ByteVocabulary(5).fingerprint()
    store, task = store_of(f"{name}_bytes"), seqio.TaskRegistry.get(f"{name}_bytes")
    expected = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    assert len(store) == len(expected) == 300
    for index, example in enumerate(expected):
        for feature, tokens in store.example(index).items():
            assert tokens.tolist() == example[feature].tolist()
            assert tokens.dtype == np.int32
    cache(f"{name}_text", name, "cache")
    assert store_of(f"{name}_text").example(0)["targets"][-1] != 1
    with pytest.raises(UserError, match=r"another vocabulary \(264 ids, 5 sentinels\) than the run \(259 ids, 0"):
        cache(f"{name}_bytes", name, "cache", vocabulary_file="bytes")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_comes_after_the_cache_is_recorded(module, small_vocabulary, data, split):
    name = module()
    manifests = cache(f"{name}_text", name, "cache")[f"{name}_text"]
    manifest, store = manifests[split], store_of(f"{name}_text", split)
    assert manifest == store.manifest
    assert manifest.transform == {"name": "later"}
    assert set(manifest.features) == {"targets"}
    feature = manifest.features["targets"]
    assert (feature.vocabulary, feature.vocabulary_size) == (small_vocabulary.fingerprint(), small_vocabulary.size)
    # Raw tokens, without EOS: our own vocabulary, which no TensorFlow ever saw, gives the same.
    texts = [e["text"].decode() for e in seqio.TaskRegistry.get(f"{name}_text").source.examples(split)]
    assert [store.example(i)["targets"].tolist() for i in range(len(store))] == list(
        map(small_vocabulary.encode, texts)
    )
    assert 0 < manifests["validation"].num_examples < manifests["train"].num_examples
    assert sum(manifest.num_examples for manifest in manifests.values()) == 120


# ---- how the work is shared ------------------------------------------------------------------------------------------


def test_files_do_not_depend_on_the_number_of_processes(module, monkeypatch, capfd):
    name = module(piece_bytes=40_000)
    task = f"{name}_text"
    cache(task, name, "cache", splits=["train"], num_workers=1)
    shards = store_of(task).manifest.shards
    assert len(shards) > 3
    files = [(task_directory("cache", task, "train") / shard.file).read_bytes() for shard in shards]
    monkeypatch.setattr(cache_module, "SMALL_BYTES", 0)
    cache(task, name, "cache_2", splits=["train"], num_workers=2)
    folder = task_directory("cache_2", task, "train")
    assert [(folder / shard.file).read_bytes() for shard in shards] == files
    assert digests(task, "cache_2") == digests(task)
    assert "tokens/s" in capfd.readouterr().err


def test_goes_on_where_it_was_stopped(module, monkeypatch):
    name = module(piece_bytes=40_000)
    task = f"{name}_text"
    cache(task, name, "whole", splits=["train"])
    write_shard, written, stop_at = cache_shards._write_shard, [], 2

    def write_and_stop(job, *rest):
        if len(written) == stop_at:
            raise KeyboardInterrupt
        written.append(job.index)
        write_shard(job, *rest)

    monkeypatch.setattr(cache_shards, "_write_shard", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        cache(task, name, "cache", splits=["train"])
    with pytest.raises(UserError, match="is not cached"):
        open_cached("cache", task, "train")
    (next(Path("cache/tasks", task).glob(".train-*.partial")) / ".shard.arrow.0.tmp").touch()  # as kill -9 leaves it
    stop_at = 100
    cache(task, name, "cache", splits=["train"])
    assert written == list(range(len(written)))
    assert digests(task) == digests(task, "whole")
    assert [path.name for path in Path("cache/tasks", task).iterdir()] == ["train"]
    names = sorted(path.name for path in Path("cache/tasks", task, "train").iterdir())
    assert names == ["manifest.json", *sorted(shard.file for shard in store_of(task).manifest.shards)]
    stop_at = len(written)
    cache(task, name, "cache", splits=["train"])


def test_changed_data_are_cached_again(module, data):
    name = module()
    task = f"{name}_text"
    before = cache(task, name, "cache")[task]["train"].num_examples
    with open(data / "pages.txt", "a", encoding="utf-8") as handle:
        handle.write("\n\nещё одна страница\n\nи ещё\n")
    assert cache(task, name, "cache")[task]["train"].num_examples == before + 2
    assert open_cached("cache", task, "train")


def test_names_of_tasks_are_kept(module):
    """The feature `task_name`, through both roads: texts that are tokenized here, and lists of ids."""
    name = module("""
def name(pair): return {**pair, "task_name": tf.strings.join(["flan/", tf.strings.substr(pair["inputs"], 0, 2)])}
named = lambda dataset: dataset.map(name)
add(NAME + "_texts", source=pairs, preprocessors=[to_both, named, tokenize, append_eos])
add(NAME + "_ids", source=pairs, preprocessors=[to_both, named, tokenize, placeholder, append_eos_after_trim])
add(NAME + "_none", source=pairs, preprocessors=[to_both, tokenize, append_eos])
add(NAME + "_bad", source=pairs, preprocessors=[to_both, lambda d: d.map(lambda e: {**e, "task_name": 1}), tokenize])
""")
    for kind in ("texts", "ids", "none"):
        cache(f"{name}_{kind}", name, "cache")
    texts, ids, none = (store_of(f"{name}_{kind}") for kind in ("texts", "ids", "none"))
    initials = [e["ru"][:2].decode() for e in seqio.TaskRegistry.get(f"{name}_texts").source.examples("train")]
    for store in (texts, ids):
        places, names = store.names
        assert names == tuple(sorted({f"flan/{initial}" for initial in initials}))
        assert [names[place] for place in places] == [f"flan/{initial}" for initial in initials]
        assert places.dtype == np.int32
        assert store.lengths("inputs").tolist() == none.lengths("inputs").tolist()
    assert none.names is None
    assert digests(f"{name}_texts") != digests(f"{name}_none")
    with pytest.raises(UserError, match="task_name is int32 of rank 0, no string"):
        cache(f"{name}_bad", name, "cache")


def test_what_is_left_out_is_counted(module, data, capfd):
    name = module(
        """
from tasks.cleaning import clean, length_within, nfc, at_least
short = functools.partial(length_within, min_chars=1500, max_chars=10_000)
def no_help(text): return None if "справк" in text.lower() else text
add(NAME + "_x", source=text, preprocessors=[clean(nfc, no_help, short), to_targets, tokenize, placeholder, Later()])
lengths = lambda dataset: dataset.map(lambda e: {**e, "n": tf.strings.as_string(tf.strings.length(e["ru"]))})
add(NAME + "_y", source=pairs, preprocessors=[lengths, at_least("n", 50), to_both, tokenize, append_eos])
""",
        piece_bytes=40_000,
    )
    texts = (data / "pages.txt").read_text("utf-8").split("\n\n")
    without = [text for text in texts if "справк" not in text.lower()]
    kept = [text for text in without if 1500 <= len(text) <= 10_000]
    manifests = cache(f"{name}_x", name, "cache")[f"{name}_x"].values()
    assert sum(m.num_read for m in manifests) == len(texts) == 120
    assert sum(m.num_examples for m in manifests) == len(kept) > 0
    dropped = sum((Counter(m.dropped) for m in manifests), Counter())
    assert dropped == {"no_help": len(texts) - len(without), "length_within": len(without) - len(kept)}
    train = store_of(f"{name}_x").manifest
    assert len(train.shards) > 3
    totals = json.loads((store_of(f"{name}_x").directory / "manifest.json").read_text("utf-8"))["totals"]
    assert (totals["read"], totals["examples"], totals["dropped"]) == (
        train.num_read,
        len(store_of(f"{name}_x")),
        train.dropped,
    )
    line = f"{train.num_read} read; {train.num_examples} examples; "
    said = capfd.readouterr().err
    assert line in said
    assert f"dropped: {train.dropped['length_within']} length_within, {train.dropped['no_help']} no_help" in said
    manifest = cache(f"{name}_y", name, "cache")[f"{name}_y"]["train"]
    assert manifest.dropped == {"at_least_n": 300 - manifest.num_examples}


def test_rates_may_depend_on_sizes(module):
    rate = "functools.partial(seqio.mixing_rate_num_examples, maximum=200)"
    name = module(TASKS + f"seqio.MixtureRegistry.add(NAME, [(NAME + '_text', {rate}), (NAME + '_pairs', {rate})])")
    cache(name, name, "cache")
    mixture = open_cached("cache", name, "train")
    assert mixture.rates == {f"{name}_text": len(mixture.stores[f"{name}_text"]), f"{name}_pairs": 200}
    # seqio's mixtures pass over tasks that lack a split; each task can be opened alone.
    assert list(open_cached("cache", name, "validation").stores) == [f"{name}_text"]
    assert open_cached("cache", f"{name}_pairs", "train").rates == {f"{name}_pairs": 1.0}


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preprocessors", "words"),
    [
        ("[to_targets, tokenize, placeholder, Later(), append_eos]", "append_eos follows a preprocessor"),
        ("[to_targets, tokenize, placeholder, lambda dataset, sequence_length: dataset]", "needs sequence_length"),
        ("[to_targets, tokenize]", "give no 'inputs'; known: targets"),
        (
            "[functools.partial(rekey, key_map={'inputs': 'text', 'targets': 'text'})]",
            "inputs is string of rank 0, no list of ids",
        ),
    ],
)
def test_tasks_that_cannot_be_cached(module, preprocessors, words):
    name = module(f'add(NAME + "_x", source=text, preprocessors={preprocessors})')
    with pytest.raises(UserError, match=words):
        cache(f"{name}_x", name, "cache")


def test_unknown_names(module, monkeypatch):
    name = module()
    with pytest.raises(UserError, match=f"unknown task or mixture '{name}_txt' in {name}; nearest: .*{name}_text"):
        cache(f"{name}_txt", name, "cache")
    with pytest.raises(UserError, match="no Python module no_such_tasks"):
        cache("x", "no_such_tasks", "cache")
    with pytest.raises(UserError, match="has no split test; it has: train, validation"):
        cache(f"{name}_text", name, "cache", splits=["test"])


def test_another_vocabulary_than_the_runs(module, small_vocabulary):
    name = module(extra_ids=100)
    model = small_vocabulary.sentencepiece_model_file
    with pytest.raises(UserError, match=r"another vocabulary \(1600 ids, 100 sentinels\) than the run \(1800 ids, 300"):
        cache(f"{name}_text", name, "cache", vocabulary_file=model)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda data: (data / "pages.txt").write_text("\n\n \n"), "is empty"),
        (lambda data: (data / "pages.txt").write_text(""), "is empty: its files hold no text"),
        (
            lambda data: (data / "pages.txt").write_bytes("раз\n\nдва".encode() + b"\n\xff\n"),
            r"pages\.txt, line 4: not UTF-8",
        ),
        (lambda data: (data / "pages.txt").unlink(), r"no file matches .*\*\.txt"),
    ],
)
def test_bad_data(module, data, break_it, words):
    name = module()
    break_it(data)
    with pytest.raises(UserError, match=words) as caught:
        cache(f"{name}_text", name, "cache")
    assert "\n" not in str(caught.value)
    assert not task_directory("cache", f"{name}_text", "train").exists()


def test_bad_lines_count_over_all_shards(module, data):
    pages = (data / "pages.txt").read_bytes().split(b"\n\n")
    for place in (10, 100):
        pages[place] += b"\n\xff"
    (data / "pages.txt").write_bytes(b"\n\n".join(pages))
    add = """
add(NAME + "_{0}", source=TextSource({{"train": DATA + "/*.txt"}}, max_bad_lines={0}),
    preprocessors=[to_targets, tokenize, placeholder, Later()])
"""
    name = module(add.format(1) + add.format(2), piece_bytes=40_000)
    assert cache(f"{name}_2", name, "cache")[f"{name}_2"]["train"].skipped_lines == 2
    with pytest.raises(UserError, match="2 malformed lines, and max_bad_lines is 1"):
        cache(f"{name}_1", name, "cache")


def test_another_package_called_tasks(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("")
    (tmp_path / "tasks" / "demo.py").write_text("raise AssertionError('imported')")
    monkeypatch.delitem(sys.modules, "tasks", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}/tasks.*under that name"):
        import_tasks("tasks.demo")


# ---- from a process without TensorFlow -------------------------------------------------------------------------------


def test_ensure_cached_caches_in_a_subprocess(module, data, small_vocabulary, tmp_path):
    name = module()
    task, model = f"{name}_text", small_vocabulary.sentencepiece_model_file
    script = f"""
import sys
from vikhr_t5.data.store import ensure_cached
from vikhr_t5.data.vocabulary import Vocabulary
mixture = ensure_cached("cache", {task!r}, "train", {name!r}, Vocabulary({model!r}))
assert not set(sys.modules) & {{"tensorflow", "seqio"}}
print(len(mixture.stores[{task!r}]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(store_of(task))
    assert "is not cached yet: caching it now" in done.stderr
    assert "tokens/s" in done.stderr
    assert "port.cc" not in done.stderr
    (data / "pages.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"^\S*pages\.txt, line 1: not UTF-8 [^\n]*$"):
        ensure_cached("cache", task, "train", name, small_vocabulary)
