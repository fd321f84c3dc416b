"""The token store against plain lists and pyarrow; what is missing, stale or cut short; no TensorFlow."""

import dataclasses
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vikhr_t5.data import store as store_module
from vikhr_t5.data.manifest import Feature, Manifest, Provenance
from vikhr_t5.data.module_files import file_digest, module_file
from vikhr_t5.data.store import CacheMissing, CacheStale, ShardWriter, TokenStore, ensure_cached, open_cached
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError

FEATURE = Feature(add_eos=True, vocabulary="f" * 64, vocabulary_size=100, extra_ids=10)
NOTHING = Provenance("no_such_module", {})

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=7)
shards_of_writes = st.lists(st.lists(st.lists(tokens, min_size=1, max_size=4), max_size=4), min_size=1, max_size=3)


def write_store(folder: Path, shards: list[list[list[list[int]]]], provenance: Provenance = NOTHING) -> TokenStore:
    """Shards of writes of examples; the feature `targets` holds every example, `inputs` every example reversed."""
    records = []
    for number, writes in enumerate(shards):
        with ShardWriter(folder / f"shard-{number}.arrow", ("inputs", "targets")) as writer:
            for examples in writes:
                lengths = np.array([len(example) for example in examples])
                flat = [token for example in examples for token in example]
                back = [token for example in examples for token in reversed(example)]
                writer.write({"targets": (np.array(flat), lengths), "inputs": (np.array(back), lengths)})
        records.append(writer.shard(skipped_lines=number))
    features = {"inputs": FEATURE, "targets": FEATURE}
    manifest = Manifest("task", "train", features, records, {"transform": "x"}, ["frozen"], provenance, {"numpy": "2"})
    (folder / "manifest.json").write_text(manifest.to_json())
    assert Manifest.from_json(manifest.to_json()) == manifest
    return TokenStore(folder)


@settings(max_examples=40, deadline=None)
@given(shards=shards_of_writes, batch_tokens=st.integers(1, 30), data=st.data())
def test_reads_what_was_written(tmp_path_factory, shards, batch_tokens, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "BATCH_TOKENS", batch_tokens)
        store = write_store(tmp_path_factory.mktemp("store"), shards)
    examples = [example for writes in shards for write in writes for example in write]
    flat = [token for example in examples for token in example]
    assert len(store) == len(examples)
    assert store.num_tokens("targets") == store.num_tokens("inputs") == len(flat)
    assert store.lengths("targets").tolist() == [len(example) for example in examples]
    assert store.lengths("targets").dtype == np.int32
    for index, example in enumerate(examples):
        assert store.example(index)["targets"].tolist() == example
        assert store.example(index)["inputs"].tolist() == example[::-1]
    with pytest.raises(IndexError):
        store.example(len(examples))
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert store.tokens("targets", start, stop).tolist() == flat[start:stop]
    assert store.tokens("targets", start, stop).dtype == np.int32
    with pytest.raises(IndexError):
        store.tokens("targets", start, len(flat) + 1)


def test_a_slice_is_a_view_of_the_file(tmp_path):
    store = write_store(tmp_path, [[[list(range(1000))] * 50]])
    whole = store.tokens("targets", 0, 50_000)
    part = store.tokens("targets", 777, 40_000)
    assert np.shares_memory(whole, part)
    assert not part.flags.owndata
    assert not part.flags.writeable


def test_files_are_plain_arrow(tmp_path):
    write_store(tmp_path, [[[[5, 6], []], [[7]]]])
    table = pa.ipc.open_file(tmp_path / "shard-0.arrow").read_all()
    assert table.column("targets").to_pylist() == [[5, 6], [], [7]]
    assert table.schema.field("targets").type == pa.large_list(pa.int32())


def test_is_pickled_by_name(tmp_path):
    store = write_store(tmp_path, [[[list(range(10_000))]]])
    store.tokens("targets", 0, 10)
    text = pickle.dumps(store)
    assert len(text) < 1000
    assert pickle.loads(text).tokens("targets", 9_990, 10_000).tolist() == list(range(9_990, 10_000))


def test_fingerprint_is_of_the_content(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    a = write_store(folders[0], [[[[1, 2], [3]]]])
    same = write_store(folders[1], [[[[1, 2], [3]]]], Provenance("another", {}))
    cut_otherwise = write_store(folders[2], [[[[1], [2, 3]]]])
    assert a.fingerprint == same.fingerprint != cut_otherwise.fingerprint


def test_a_store_of_an_earlier_version_opens(tmp_path):
    """One without names of tasks, counts and deduplication."""
    store = write_store(tmp_path, [[[[1, 2], [3]]]])
    path = tmp_path / "manifest.json"
    record = json.loads(path.read_text())
    record.pop("dedup")
    record["provenance"].pop("folders")
    record["totals"] = {"examples": 2}
    for shard in record["shards"]:
        assert shard.pop("num_read") == 0
        assert shard.pop("dropped") == {}
    path.write_text(json.dumps(record))
    assert TokenStore(tmp_path).manifest == store.manifest
    assert TokenStore(tmp_path).names is None


def test_names_are_part_of_the_content(tmp_path):
    one = np.ones(3, np.int32), np.ones(3, np.int64)
    digests = []
    for number, names in enumerate((["b", "a", "b"], ["a", "b", "b"])):
        with ShardWriter(tmp_path / f"{number}.arrow", ("targets",), named=True) as writer:
            writer.write({"targets": one}, names)
        digests.append(writer.shard(0).digest)
        assert pa.ipc.open_file(tmp_path / f"{number}.arrow").read_all().column("task_name").to_pylist() == names
    assert digests[0] != digests[1]
    with (
        pytest.raises(ValueError, match="different numbers"),
        ShardWriter(tmp_path / "s", ("targets",), named=True) as writer,
    ):
        writer.write({"targets": one}, ["a"])


def test_a_failed_shard_leaves_nothing(tmp_path):
    one = np.ones(1, np.int32), np.ones(1, np.int64)

    def fail_after_a_write() -> None:
        with ShardWriter(tmp_path / "shard.arrow", ("targets",)) as writer:
            writer.write({"targets": one})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_a_write()
    assert list(tmp_path.iterdir()) == []


def test_lengths_must_add_up(tmp_path):
    with pytest.raises(ValueError, match="3 tokens"), ShardWriter(tmp_path / "s.arrow", ("targets",)) as writer:
        writer.write({"targets": (np.arange(3), np.array([2]))})


# ---- by name ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(write_task, text_task, tmp_path) -> Path:
    write_task("first", text_task)
    write_task("second", text_task)
    write_task("second", text_task, split="validation")
    write_task.mixture("both", {"first": 1.0, "second": 3.0})
    return tmp_path / "cache"


def test_opens_tasks_and_mixtures(cached, small_vocabulary, text_task):
    both = open_cached(cached, "both", "train", small_vocabulary.fingerprint())
    assert both.rates == {"first": 1.0, "second": 3.0}
    assert [len(store) for store in both.stores.values()] == [len(text_task["targets"])] * 2
    assert open_cached(cached, "second", "validation").rates == {"second": 1.0}


@pytest.mark.parametrize(
    ("name", "split", "kind", "words"),
    [
        ("secnd", "train", CacheMissing, ["secnd is not cached", "second", "vikhr-t5 cache --mixture secnd"]),
        ("second", "test", UserError, ["no split 'test'", "train, validation"]),
        ("first", "validation", UserError, ["no split 'validation'", "it has: train"]),
    ],
)
def test_says_what_is_missing(cached, name, split, kind, words):
    with pytest.raises(kind) as caught:
        open_cached(cached, name, split)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_another_vocabulary_is_stale(cached, small_vocabulary):
    other = Vocabulary(small_vocabulary.sentencepiece_model_file, extra_ids=100)
    with pytest.raises(CacheStale, match="vocabulary"):
        open_cached(cached, "first", "train", other.fingerprint())


def test_a_shard_cut_short_is_stale(cached):
    shard = next((cached / "tasks" / "first" / "train").glob("shard-00001*"))
    with open(shard, "r+b") as handle:
        handle.truncate(1000)
    with pytest.raises(CacheStale, match=f"{shard.name} has 1000 bytes"):
        open_cached(cached, "first", "train")
    shard.unlink()
    with pytest.raises(CacheStale, match="has 0 bytes"):
        open_cached(cached, "first", "train")


def test_an_unreadable_manifest_is_stale(cached):
    manifest = cached / "tasks" / "first" / "train" / "manifest.json"
    manifest.write_text(manifest.read_text()[:200])
    with pytest.raises(CacheStale, match="cannot be read"):
        open_cached(cached, "first", "train")


@pytest.fixture
def sources(cached, tmp_path) -> Callable[[], Path]:
    """A data file and a module that the store `first` is said to be made from; called, it writes that down."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("text")

    def record(module: str = "no_such_module", modules: dict[str, str] | None = None) -> Path:
        stat = (data / "a.txt").stat()
        files = [(str(data / "a.txt"), stat.st_size, stat.st_mtime_ns)]
        made_from = dataclasses.asdict(Provenance(module, modules or {}, files, [str(data / "*.txt")]))
        path = cached / "tasks" / "first" / "train" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": made_from}))
        open_cached(cached, "first", "train")
        return data

    return record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: (data / "a.txt").write_text("longer text"), "a.txt has changed: 4 bytes then, 11 now"),
        (lambda data: os.utime(data / "a.txt", ns=(1, 1)), "a.txt was written again"),
        (lambda data: (data / "b.txt").write_text("more"), r"b.txt is new \(.*\*\.txt\)"),
    ],
)
def test_changed_data_are_stale(cached, sources, change, words):
    data = sources()
    change(data)
    with pytest.raises(CacheStale, match=words):
        open_cached(cached, "first", "train")


def test_a_cache_travels_without_its_data(cached, sources):
    data = sources()
    (data / "a.txt").unlink()
    data.rmdir()
    assert len(open_cached(cached, "first", "train").stores["first"])


def test_a_changed_module_is_stale_and_is_not_imported(cached, sources, tmp_path, monkeypatch):
    package = tmp_path / "code" / "corpus_of_mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "news.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "code")
    assert module_file("corpus_of_mine.news") == package / "news.py"
    assert module_file("corpus_of_mine.none") is None
    assert module_file("corpus_of_mine.news.none") is None
    sources("corpus_of_mine.news", {"corpus_of_mine.news": file_digest(package / "news.py")})
    (package / "news.py").write_text("# another")
    with pytest.raises(CacheStale, match=r"news\.py has changed"):
        open_cached(cached, "first", "train")
    assert "corpus_of_mine" not in sys.modules


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "tasks_of_mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert module_file("tasks_of_mine") == tmp_path / "tasks_of_mine.py"


def test_ensure_cached_opens_what_is_there(cached, small_vocabulary):
    assert set(ensure_cached(cached, "both", "train", None, small_vocabulary).stores) == {"first", "second"}
    with pytest.raises(CacheMissing):
        ensure_cached(cached, "third", "train", None, small_vocabulary)


def test_without_seqio_says_how_to_get_it(cached, small_vocabulary, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"third/train is not cached yet; .*vikhr-t5\[seqio\]"):
        ensure_cached(cached, "third", "train", "tasks.demo", small_vocabulary)
