"""The corpora's tasks on files of the published schema: local files, a saved dataset, the hub; and without them."""

import itertools
import json
import os
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import seqio
import zstandard

from vikhr_t5.data import denoisers
from vikhr_t5.data.cache import cache
from vikhr_t5.data.hashing import text_hash
from vikhr_t5.data.vocabulary import train_vocabulary
from vikhr_t5.errors import UserError

PAGES = (Path(__file__).parents[2] / "tasks/demo_data/ru.txt").read_text(encoding="utf-8").split("\n\n")
PLAIN = {
    "rulm_ul2": "IlyaGusev/rulm",
    "darulm_ul2": "dichspace/darulm",
    "ru_news_ul2": "IlyaGusev/ru_news",
    "ru_wikipedia_ul2": "wikimedia/wikipedia/20231101.ru",
}
SHORT = "Коротко."


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """tasks.corpora takes its vocabulary from the environment when it is imported; other tests leave theirs there."""
    vocabulary = train_vocabulary(PAGES[:200], tmp_path_factory.mktemp("vocabulary") / "ru.model", size=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIKHR_T5_VOCABULARY", vocabulary.sentencepiece_model_file)
        patch.setenv("VIKHR_T5_EXTRA_IDS", str(vocabulary.extra_ids))
        assert "tasks.corpora" not in sys.modules
        import tasks.corpora

        yield tasks.corpora


@pytest.fixture
def data_dir(corpora, tmp_path, monkeypatch) -> Path:
    """An empty VIKHR_T5_DATA_DIR; what the sources have found elsewhere is told apart by it."""
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(tmp_path))
    return tmp_path


def pages(count: int, held_out: int = 2) -> list[str]:
    """Pages long enough for the cleaning, `held_out` of them for validation."""
    long = [page for page in PAGES if len(page) > 300]
    validation = itertools.islice((page for page in long if text_hash(page.encode()) < 0.005), held_out)
    train = itertools.islice((page for page in long if text_hash(page.encode()) >= 0.005), count - held_out)
    return [*train, *validation]


def texts(task: str, split: str = "train") -> list[str]:
    """The documents of a task after the cleaning, as they are tokenized."""
    source = seqio.TaskRegistry.get(task).source.get_dataset(split, shuffle=False)
    for step in seqio.TaskRegistry.get(task).preprocessors:
        if step is seqio.preprocessors.tokenize:
            break
        source = step(source)
    return [row["targets"].decode() for row in source.as_numpy_iterator()]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(data) if path.suffix == ".zst" else data)


def plain_rows(task: str, documents: list[str]) -> list[dict]:
    """As published; the other fields stand for what the tasks do not read."""
    if task == "ru_wikipedia_ul2":
        url = "https://ru.wikipedia.org/wiki/"
        return [{"id": str(n), "url": url + str(n), "title": "Имя", "text": t} for n, t in enumerate(documents)]
    if task == "ru_news_ul2":
        return [{"url": "https://a.ru", "title": "Имя", "text": t, "timestamp": 1, "source": "x"} for t in documents]
    return [{"text": t, "meta": {"source": "habr"}} for t in documents]


def habr_rows(documents: list[str]) -> list[dict]:
    """Every second article has a score of 9, the others of 10."""
    return [
        {
            "id": n,
            "language": "ru",
            "url": f"https://habr.com/ru/post/{n}/",
            "title": "Имя",
            "text_markdown": f"# Раздел\n\n{text}\n\nИ **это** [тоже](https://a.ru).",
            "text_html": "<p></p>",
            "statistics": {"commentsCount": 1, "readingCount": 5, "score": 9 + n % 2, "votesCount": 3},
            "hubs": ["a"],
            "comments": [],
        }
        for n, text in enumerate(documents)
    ]


@pytest.mark.parametrize("task", PLAIN)
def test_documents_are_read_cleaned_and_split(data_dir, task):
    documents = pages(30)
    write_lines(data_dir / PLAIN[task] / "part_0.jsonl.zst", plain_rows(task, [*documents, SHORT, "English. " * 90]))
    assert texts(task) == documents[:-2]
    assert texts(task, "validation") == documents[-2:]


def test_habr_is_chosen_by_score_and_freed_of_markdown(data_dir):
    documents = pages(30)
    write_lines(data_dir / "IlyaGusev/habr/habr.jsonl.zst", habr_rows(documents))
    found = texts("habr_ul2") + texts("habr_ul2", "validation")
    assert sorted(found) == sorted(f"Раздел\n\n{text}\n\nИ это тоже." for text in documents[1::2])


def test_parquet_and_a_saved_dataset_give_what_json_lines_give(data_dir):
    rows = habr_rows(pages(24))
    write_lines(data_dir / "IlyaGusev/habr/habr.jsonl", rows)
    expected = texts("habr_ul2")
    assert len(expected) >= 10
    found = []
    for kind in ("parquet", "saved"):
        folder = data_dir / kind / "IlyaGusev/habr"
        folder.parent.mkdir(parents=True)
        if kind == "parquet":
            folder.mkdir()
            pq.write_table(pa.Table.from_pylist(rows), folder / "0000.parquet")
        else:
            datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder)
        os.environ["VIKHR_T5_DATA_DIR"] = str(data_dir / kind)  # undone by the fixture
        found.append(texts("habr_ul2"))
    assert found == [expected, expected]


def test_the_hub_is_asked_for_the_published_names(data_dir, monkeypatch):
    monkeypatch.delenv("VIKHR_T5_DATA_DIR")
    asked = []

    def load(path, config, split, revision):
        asked.append((path, config, split, revision))
        return datasets.Dataset.from_list(
            plain_rows("rulm_ul2", pages(5)) if "habr" not in path else habr_rows(pages(5))
        )

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
def test_without_the_hub_the_error_says_what_to_set(data_dir, monkeypatch, task):
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


def test_a_missing_folder_is_named(data_dir):
    with pytest.raises(UserError, match=r"no IlyaGusev/rulm in .*/IlyaGusev/rulm: put its"):
        texts("rulm_ul2")
    with pytest.raises(UserError, match=r".*/local has no text, JSON lines or Parquet: put your files there"):
        texts("local_ul2")


def test_a_local_folder_is_never_asked_of_the_hub(data_dir, monkeypatch):
    monkeypatch.delenv("VIKHR_T5_DATA_DIR")
    with pytest.raises(
        UserError, match=r"^set VIKHR_T5_DATA_DIR to the folder that has your texts in its folder local$"
    ):
        texts("local_ul2")


@pytest.mark.parametrize("kind", ["text", "lines", "parquet"])
def test_a_local_folder_may_hold_text_json_lines_or_parquet(data_dir, kind):
    documents, folder = pages(12), data_dir / "local" / "deep"
    folder.mkdir(parents=True)
    if kind == "text":
        (folder / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    elif kind == "lines":
        write_lines(folder / "a.jsonl.zst", [{"text": text} for text in documents])
    else:
        pq.write_table(pa.table({"text": documents}), folder / "a.parquet")
    assert texts("local_ul2") == documents[:-2]


def test_a_wrong_field_is_named(data_dir):
    write_lines(data_dir / "local/a.jsonl", [{"txt": "а"}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: .*no 'text' \(nearest: txt\)") as caught:
        cache("local_ul2", "tasks.corpora", data_dir / "cache")
    assert "\n" not in str(caught.value)


_watched: list[str] = []
_watching = False


def _audit(event: str, arguments: tuple) -> None:
    if _watching and (event in ("open", "os.listdir", "os.scandir", "glob.glob") or event.startswith("socket.")):
        _watched.append(f"{event} {arguments}")


def test_registering_touches_neither_network_nor_disk(corpora, data_dir, monkeypatch):
    global _watching
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(data_dir / "none"))
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


def test_a_corpus_is_iterated_by_seqio_and_cached(data_dir, capfd):
    documents = pages(30)
    write_lines(data_dir / "IlyaGusev/rulm/a.jsonl", plain_rows("rulm_ul2", [*documents, SHORT]))
    task = seqio.TaskRegistry.get("rulm_ul2")
    lengths = {"inputs": 200, "targets": 210}
    examples = list(task.get_dataset(lengths, "train", shuffle=False, seed=1).as_numpy_iterator())
    assert len(examples) > 5
    assert all(len(example[side]) <= lengths[side] for example in examples for side in lengths)
    manifests = cache("rulm_ul2", "tasks.corpora", data_dir / "cache")["rulm_ul2"]
    assert {split: manifest.num_examples for split, manifest in manifests.items()} == {"train": 28, "validation": 2}
    vocabulary = task.output_features["targets"].vocabulary
    tokens = sum(len(vocabulary.encode(text)) for text in documents[:-2])
    assert manifests["train"].num_tokens == {"targets": tokens}
    assert "tasks.cleaning" in manifests["train"].provenance.modules
