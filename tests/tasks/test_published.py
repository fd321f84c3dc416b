"""Every public set, in the schema in which it is published, through task, cache and batch; and from the hub's side."""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import published
import pytest
import seqio
from published import SETS, TEMPLATE_TYPES
from reassemble import reassemble

from vikhr_t5.data.cache import cache
from vikhr_t5.data.denoisers import Codes, mixture
from vikhr_t5.data.pipeline import Dataset, DatasetConfig, open_dataset
from vikhr_t5.data.store import TokenStore, mixture_file, task_directory
from vikhr_t5.data.vocabulary import Vocabulary

MODULE = "tasks.mixtures,tasks.saiga"
TASKS = {
    **{task: task for task in SETS},
    **{f"flan2021_submix_ru_{kind}": "flan2021_submix_ru" for kind in TEMPLATE_TYPES},
}
FORMS = dict(zip(SETS, itertools.cycle(["jsonl.zst", "parquet", "saved", "jsonl"]), strict=False))
PAGES = [page for page in published.PAGES if len(page) > 300]


def make_texts(task: str) -> list[str]:
    """24 and more, the last of them held out."""
    if task in published.CORPORA:
        key = "text_markdown" if task == "habr_ul2" else "text"

        def hashed(text: str) -> str:
            return published.CORPORA[task].row(0, text)[key]

        return published.texts(PAGES.__getitem__, 26, 0.005, hashed=hashed)
    if task in published.SAIGA:
        return published.texts(lambda n: f"Сколько будет {n} + {n}?", 26, 0.02)
    asked = functools.partial("{}: сколько будет {} + {}?".format, task)
    return published.texts(lambda n: asked(n, n), 52, 0.01, held_out=4)


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return {task: make_texts(task) for task in SETS}


@pytest.fixture(scope="module")
def cached(texts: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token stores of all sets; each was read in one of the forms that it may have on disk."""
    folder = tmp_path_factory.mktemp("published")
    for task, form in FORMS.items():
        published.write(folder / SETS[task].folder, SETS[task].table(texts[task]), form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIKHR_T5_DATA_DIR", str(folder))
        for name in ("vikhr_flan_ul2", "vikhr_saiga", "darulm_ul2", "flan_alexwortega", "flan2021_submix_ru"):
            cache(name, MODULE, folder / "cache")
    return folder / "cache"


def made_of(task: str, texts: list[str]) -> list[tuple[str, ...]]:
    """What a task should make of a set's texts: documents, or (inputs, targets)."""
    rows = [SETS[TASKS[task]].row(number, text) for number, text in enumerate(texts)]
    if task == "habr_ul2":
        return [(f"Раздел\n\n{text}\n\nИ это тоже.",) for text in texts]
    if task in published.CORPORA:
        return [(text,) for text in texts]
    if task.startswith("flan2021_submix_ru_"):
        rows = [row for row in rows if task.endswith(f"_ru_{row['template_type']}")]
    if task in published.FLAN or TASKS[task] in published.FLAN:
        return [(row["inputs"], row.get("targets") or row["target"]) for row in rows if row.get("language") != "ukr"]
    return [example for row in rows for example in chat_of(row)]


def chat_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    prompt = "Ты — Сайга, русскоязычный автоматический ассистент. Ты разговариваешь с людьми и помогаешь им."
    system = f"<s>system\n{prompt}</s>\n"
    if "messages" in row:
        asked, answer, more, last = row["messages"]["content"]
        first = f"{system}<s>user\n{asked}</s>\n<s>bot"
        return [(first, answer), (f"{first}\n{answer}</s>\n<s>user\n{more}</s>\n<s>bot", last)]
    asked = row["instruction"] + (f"\nДано: {row['input']}" if row.get("input") else "")
    return [(f"{system}<s>user\n{asked}</s>\n<s>bot", row.get("full_output") or row["output"])]


def in_tokens(vocabulary: Vocabulary, made: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    eos = () if len(made) == 1 else (1,)  # a document's comes with its windows
    return tuple((*vocabulary.encode(text), *eos) for text in made)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_cached_is_what_was_published(cached, texts, vocabulary, task):
    assert len(texts[TASKS[task]]) > 20
    found = []
    for split in ("train", "validation"):
        store = TokenStore(task_directory(cached, task, split))
        assert len(store)
        found += [tuple(tuple(tokens.tolist()) for tokens in store.example(i).values()) for i in range(len(store))]
    expected = [in_tokens(vocabulary, made) for made in made_of(task, texts[TASKS[task]])]
    assert sorted(found) == sorted(expected)


def batch_of(cached: Path, vocabulary: Vocabulary, task: str) -> tuple[Dataset, dict[str, np.ndarray]]:
    config = DatasetConfig(task, {"inputs": 512, "targets": 240}, "train", batch_size=2, cache_dir=str(cached))
    dataset = open_dataset(config, vocabulary)
    batches = dataset.batches(num_steps=1)
    batch = next(batches)
    batches.close()
    return dataset, batch


def segments(batch: dict[str, np.ndarray]) -> list[tuple[list[int], list[int], int]]:
    """(inputs, targets, source id) of each example of a batch, from its features alone."""
    found = []
    for row in range(len(batch["decoder_segment_ids"])):
        for segment in range(1, int(batch["decoder_segment_ids"][row].max()) + 1):
            inside = batch["decoder_segment_ids"][row] == segment
            inputs = batch["encoder_input_tokens"][row][batch["encoder_segment_ids"][row] == segment]
            [source] = set(batch["decoder_source_ids"][row][inside].tolist())
            found.append((inputs.tolist(), batch["decoder_target_tokens"][row][inside].tolist(), source))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_holds_what_is_cached(cached, vocabulary, task):
    _, batch = batch_of(cached, vocabulary, task)
    store = TokenStore(task_directory(cached, task, "train"))
    found = segments(batch)
    assert found
    if task not in published.CORPORA:
        stored = [store.example(i) for i in range(len(store))]
        pairs = {(tuple(e["inputs"][:512]), tuple(e["targets"][:240])) for e in stored}
        assert all((tuple(inputs), tuple(targets)) in pairs for inputs, targets, _ in found)
        return
    text = store.tokens("targets", 0, store.num_tokens("targets")).tolist()
    ring = " ".join(map(str, text + text))
    codes = Codes.of(vocabulary, mixture("ul2"))
    for inputs, targets, _ in found:
        window = reassemble(inputs, targets, codes)[0]
        assert f" {' '.join(map(str, window))} " in f" {ring} "


def test_the_set_that_a_row_is_from_is_the_source_of_its_target_tokens(cached, texts, vocabulary):
    named = {"flan2021_submix_ru_fs_opt": ["task_name"], "flan_aya_cot": ["sub_dataset_name", "dataset_name"]}
    for task, fields in named.items():
        table = SETS[TASKS[task]].table(texts[TASKS[task]]).to_pylist()
        name_of = {row["inputs"]: next(row[field] for field in fields if row[field] != "-") for row in table}
        expected = {in_tokens(vocabulary, (text,))[0]: name for text, name in name_of.items()}
        dataset, batch = batch_of(cached, vocabulary, task)
        found = segments(batch)
        assert {dataset.source_names[source - 1] for _, _, source in found} == set(dataset.source_names)
        assert len(dataset.source_names) > 1
        for inputs, _, source in found:
            assert inputs[-1] == 1
            assert dataset.source_names[source - 1] == f"{task}/{expected[tuple(inputs[:-1])]}"
    assert batch_of(cached, vocabulary, "flan_translated_300k")[0].source_names == ("flan_translated_300k",)


@pytest.mark.parametrize("task", SETS)
def test_the_hub_gives_what_local_files_give(texts, task, tmp_path, monkeypatch):
    """`load_dataset` reads a repository that lies in the current folder under its name on the hub."""
    table = SETS[task].table(texts[task])
    published.write_repository(tmp_path / "hub", SETS[task].folder, table)
    published.write(tmp_path / "data" / SETS[task].folder, table, FORMS[task])
    monkeypatch.chdir(tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    source = seqio.TaskRegistry.get(task).source
    found = {}
    for place in (None, str(tmp_path / "data")):
        monkeypatch.setattr(source, "_found", {})
        monkeypatch.setenv("VIKHR_T5_DATA_DIR", place) if place else monkeypatch.delenv(
            "VIKHR_T5_DATA_DIR", raising=False
        )
        found[place] = [list(source.examples(split)) for split in ("train", "validation")]
    train, validation = found[None]
    assert len(train) > 20
    assert validation
    assert [sorted(map(plain, split)) for split in found.popitem()[1]] == [
        sorted(map(plain, s)) for s in (train, validation)
    ]


def plain(example: dict[str, bytes]) -> list[str]:
    """Records arrive as JSON, whose numbers and order may differ by the way they were stored."""
    return [value.decode() for value in example.values()]


# ---- mixtures --------------------------------------------------------------------------------------------------------

EXAMPLES = 100_000


@pytest.fixture(scope="module")
def at_published_sizes(cached: Path) -> Iterator[Path]:
    """The mixtures' definitions with the rates that they have where every set is as large as its cap; and a mixture
    with a text long enough for its denoisers' shares (those of a few pages come as they come)."""
    seqio.MixtureRegistry.add("half_denoised", [("flan_translated_300k", 1.0), ("demo_ul2", 1.0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIKHR_T5_DATA_DIR", str(cached.parent))
        cache("half_denoised", "tasks.mixtures,tasks.demo", cached)
    for name in ("vikhr_flan", "vikhr_flan_ul2"):
        mixture = seqio.MixtureRegistry.get(name)
        for task in mixture.tasks:
            task.num_input_examples = lambda split: 10**6
        rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
        record = json.loads(mixture_file(cached, "vikhr_flan_ul2").read_text())
        splits = {task: record["splits"][task] for task in rates}
        mixture_file(cached, name).write_text(json.dumps({**record, "name": name, "rates": rates, "splits": splits}))
    yield cached
    seqio.MixtureRegistry.remove("half_denoised")


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("vikhr_flan", (64, 24)),
        ("half_denoised", (144, 72)),
        pytest.param("vikhr_flan_ul2", (144, 72), marks=pytest.mark.slow),
    ],
)
def test_the_batches_have_the_rates_of_the_mixture(at_published_sizes, vocabulary, name, lengths):
    """Within 1% of each task's nominal share of the examples, on 100,000 of them; and of each denoiser's share of the
    input tokens of its task."""
    lengths = dict(zip(("inputs", "targets"), lengths, strict=True))
    config = DatasetConfig(name, lengths, "train", batch_size=512, cache_dir=str(at_published_sizes))
    dataset = open_dataset(config, vocabulary)
    examples = np.zeros(len(dataset.source_names) + 1, np.int64)
    tokens = np.zeros_like(examples)
    batches = dataset.batches()
    while examples.sum() < EXAMPLES:
        batch = next(batches)
        first = (batch["decoder_positions"] == 0) & (batch["decoder_loss_weights"] == 1)
        examples += np.bincount(batch["decoder_source_ids"][first], minlength=len(examples))
        rows, places = np.nonzero(first)
        source_of = np.zeros((512, batch["decoder_segment_ids"].max() + 1), np.int32)
        source_of[rows, batch["decoder_segment_ids"][rows, places]] = batch["decoder_source_ids"][rows, places]
        sources = np.take_along_axis(source_of, batch["encoder_segment_ids"], axis=1)
        tokens += np.bincount(sources.ravel(), minlength=len(tokens))
    batches.close()
    by_task: Counter[str] = Counter()
    for source, count in zip(dataset.source_names, examples[1:], strict=True):
        by_task[source.partition("/")[0]] += int(count)
    measured = {task: count / by_task.total() for task, count in by_task.items()}
    assert measured == pytest.approx(dataset.example_rates, rel=0.01)
    assert min(measured.values()) > 0.005  # nothing is too rare to be measured
    if name == "half_denoised":
        of_text = [i for i, source in enumerate(dataset.source_names, 1) if source.startswith("demo_ul2/")]
        shares = tokens[of_text] / tokens[of_text].sum()
        assert shares == pytest.approx([denoiser.weight for denoiser in mixture("ul2")], rel=0.01)
