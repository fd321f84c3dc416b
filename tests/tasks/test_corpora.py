"""The corpora's tasks on files of the published schema: local files, a saved dataset, the hub; and without them."""

import sys

import datasets
import published
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import seqio
from published import CORPORA, HABR, PAGES

from vikhr_t5.data import denoisers
from vikhr_t5.data.cache import cache
from vikhr_t5.errors import UserError

PLAIN = [task for task in CORPORA if task != "habr_ul2"]
SHORT = "Коротко."


def pages(count: int) -> list[str]:
    """Pages long enough for the cleaning, the last two of them for validation."""
    return published.texts([page for page in PAGES if len(page) > 300].__getitem__, count, 0.005)


def texts(task: str, split: str = "train") -> list[str]:
    """The documents of a task after the cleaning, as they are tokenized."""
    source = seqio.TaskRegistry.get(task).source.get_dataset(split, shuffle=False)
    for step in seqio.TaskRegistry.get(task).preprocessors:
        if step is seqio.preprocessors.tokenize:
            break
        source = step(source)
    return [row["targets"].decode() for row in source.as_numpy_iterator()]


@pytest.mark.parametrize("task", PLAIN)
def test_documents_are_read_cleaned_and_split(data, task):
    documents = pages(30)
    published.write(
        data / CORPORA[task].folder, CORPORA[task].table([*documents, SHORT, "English. " * 90]), "jsonl.zst"
    )
    assert texts(task) == documents[:-2]
    assert texts(task, "validation") == documents[-2:]


def test_habr_is_freed_of_markdown(data):
    documents = pages(30)
    published.write(data / HABR.folder, HABR.table(documents), "jsonl.zst")
    found = texts("habr_ul2") + texts("habr_ul2", "validation")
    assert sorted(found) == sorted(f"Раздел\n\n{text}\n\nИ это тоже." for text in documents)


def test_parquet_and_a_saved_dataset_give_what_json_lines_give(data, monkeypatch):
    found = []
    for form in ("jsonl", "parquet", "saved"):
        published.write(data / form / HABR.folder, HABR.table(pages(24)), form)
        monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(data / form))
        found.append(texts("habr_ul2"))
    assert len(found[0]) >= 10
    assert found[1:] == found[:1] * 2


def test_the_hub_is_asked_for_the_published_names(data, monkeypatch):
    monkeypatch.delenv("VIKHR_T5_DATA_DIR")
    asked = []

    def load(path, config, split, revision):
        asked.append((path, config, split, revision))
        [corpus] = [corpus for corpus in CORPORA.values() if corpus.folder.startswith(path)]
        return datasets.Dataset(corpus.table(pages(5)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    for task in ("habr_ul2", "ru_wikipedia_ul2", "darulm_ul2"):
        source = seqio.TaskRegistry.get(task).source
        monkeypatch.setattr(source, "_found", {})
        assert texts(task)
    converted = "refs/convert/parquet"
    assert set(asked) == {
        ("IlyaGusev/habr", None, "train", converted),
        ("wikimedia/wikipedia", "20231101.ru", "train", None),
        ("dichspace/darulm", None, "train", converted),
    }


@pytest.mark.parametrize("task", ["habr_ul2", "ru_wikipedia_ul2"])
def test_without_the_hub_the_error_says_what_to_set(data, monkeypatch, task):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.delenv("VIKHR_T5_DATA_DIR")
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = seqio.TaskRegistry.get(task).source
    monkeypatch.setattr(source, "_found", {})
    with pytest.raises(UserError, match=r"Couldn't reach the Hub.*DIR/(IlyaG|wikim).*VIKHR_T5_DATA_DIR=DIR$") as caught:
        texts(task)
    assert source.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(data):
    with pytest.raises(UserError, match=r"no IlyaGusev/rulm in .*/IlyaGusev/rulm: put its"):
        texts("rulm_ul2")
    with pytest.raises(UserError, match=r".*/local has no text, JSON lines or Parquet: put your files there"):
        texts("local_ul2")


def test_a_local_folder_is_never_asked_of_the_hub(data, monkeypatch):
    monkeypatch.delenv("VIKHR_T5_DATA_DIR")
    with pytest.raises(
        UserError, match=r"^set VIKHR_T5_DATA_DIR to the folder that has your texts in its folder local$"
    ):
        texts("local_ul2")


@pytest.mark.parametrize("kind", ["text", "lines", "parquet"])
def test_a_local_folder_may_hold_text_json_lines_or_parquet(data, kind):
    documents, folder = pages(12), data / "local" / "deep"
    folder.mkdir(parents=True)
    if kind == "text":
        (folder / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    elif kind == "lines":
        published.write(folder, pa.table({"text": documents}), "jsonl.zst")
    else:
        pq.write_table(pa.table({"text": documents}), folder / "a.parquet")
    assert texts("local_ul2") == documents[:-2]


def test_a_wrong_field_is_named(data):
    published.write(data / "local", pa.table({"txt": ["а"]}), "jsonl")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: .*no 'text' \(nearest: txt\)") as caught:
        cache("local_ul2", "tasks.corpora", data / "cache")
    assert "\n" not in str(caught.value)


_watched: list[str] = []
_watching = False


def _audit(event: str, arguments: tuple) -> None:
    if _watching and (event in ("open", "os.listdir", "os.scandir", "glob.glob") or event.startswith("socket.")):
        _watched.append(f"{event} {arguments}")


def test_registering_touches_neither_network_nor_disk(corpora, data, monkeypatch):
    global _watching
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(data / "none"))
    monkeypatch.setenv("VIKHR_T5_VOCABULARY", "not/there/yet.model")
    sys.addaudithook(_audit)
    _watching = True
    try:
        for make in (corpora.settings.source, corpora._Converted, corpora._Local):
            name = f"registered_{make.__name__}"
            corpora.add_corpus(name, make("somebody/something", ["text"], None, None))
            seqio.TaskRegistry.remove(name)
    finally:
        _watching = False
    assert _watched == []


def test_they_end_in_the_denoising_of_ul2(corpora):
    for name in ("habr_ul2", "local_ul2", *PLAIN):
        assert type(seqio.TaskRegistry.get(name)) is seqio.Task
        transform = seqio.TaskRegistry.get(name).preprocessors[-1].post_cache_transform()
        assert transform == denoisers.to_json(denoisers.mixture("ul2"))


def test_a_corpus_is_iterated_by_seqio_and_cached(data, capfd):
    documents = pages(30)
    published.write(data / "IlyaGusev/rulm", CORPORA["rulm_ul2"].table([*documents, SHORT]), "jsonl")
    task = seqio.TaskRegistry.get("rulm_ul2")
    lengths = {"inputs": 200, "targets": 210}
    examples = list(task.get_dataset(lengths, "train", shuffle=False, seed=1).as_numpy_iterator())
    assert len(examples) > 5
    assert all(len(example[side]) <= lengths[side] for example in examples for side in lengths)
    manifests = cache("rulm_ul2", "tasks.corpora", data / "cache")["rulm_ul2"]
    assert {split: manifest.num_examples for split, manifest in manifests.items()} == {"train": 28, "validation": 2}
    vocabulary = task.output_features["targets"].vocabulary
    tokens = sum(len(vocabulary.encode(text)) for text in documents[:-2])
    assert manifests["train"].num_tokens == {"targets": tokens}
    assert "tasks.cleaning" in manifests["train"].provenance.modules
