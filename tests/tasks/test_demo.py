"""The demo's tasks: licences, splits that share nothing, instructions that hold what they ask for, plain seqio."""

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
import seqio
from hypothesis import given
from hypothesis import strategies as st

from tasks import settings
from vikhr_t5.data import denoisers
from vikhr_t5.data.cache import cache
from vikhr_t5.errors import UserError

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tasks" / "demo_data"
TASKS = ("demo_ul2", "demo_span_corruption")
INSTRUCTIONS = ("demo_translate_ru_en", "demo_translate_en_ru", "demo_complete", "demo_restore")


@pytest.fixture(scope="session")
def made(demo) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(task, split) -> instructions as text."""
    functions = {f"demo_{make.__name__}": make for make in demo.INSTRUCTIONS}
    source = seqio.TaskRegistry.get(INSTRUCTIONS[0]).source
    pairs = {
        split: [(pair["ru"].decode(), pair["en"].decode()) for pair in source.examples(split)]
        for split in ("train", "validation")
    }
    return {
        (task, split): [one for one in itertools.starmap(functions[task], pairs[split]) if one is not None]
        for task, split in itertools.product(INSTRUCTIONS, pairs)
    }


def words(text: str) -> Counter[str]:
    return Counter(text.split())


def test_the_texts_come_with_their_licence():
    notice = (DATA / "NOTICE").read_text()
    assert "© LibreOffice contributors and/or their affiliates" in notice
    assert "download.documentfoundation.org/libreoffice/src" in notice
    assert (DATA / "LICENSE").read_text().startswith("Mozilla Public License Version 2.0")
    for file, count in re.findall(r"(\w+\.\w+) +([\d,]+) (?:Russian|English|aligned)", notice):
        text = (DATA / file).read_text(encoding="utf-8")
        found = text.count("\n") if file.endswith("jsonl") else len(text.split("\n\n"))
        assert found == int(count.replace(",", "")), file


def test_they_are_plain_seqio(demo):
    for name in (*TASKS, *INSTRUCTIONS):
        assert type(seqio.TaskRegistry.get(name)) is seqio.Task
    mixture = seqio.MixtureRegistry.get("demo_instructions")
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == dict.fromkeys(INSTRUCTIONS, 1.0)


def test_held_out_pages_and_sentences_are_in_no_training_split(demo, made):
    pages = {
        split: [page["text"].decode() for page in seqio.TaskRegistry.get("demo_ul2").source.examples(split)]
        for split in ("train", "validation")
    }
    assert sum(map(len, pages.values())) == 1438
    assert 0.03 < len(pages["validation"]) / 1438 < 0.07
    paragraphs = {split: {line for page in pages[split] for line in page.split("\n")} for split in pages}
    assert not paragraphs["train"] & paragraphs["validation"]
    translate, back = INSTRUCTIONS[:2]
    for task, side in ((translate, 1), (back, 1), (translate, 0), (back, 0)):
        train, validation = ({one[side] for one in made[task, split]} for split in ("train", "validation"))
        assert not train & validation
        assert 0.03 < len(validation) / 15_185 < 0.07
    held_out_russian = {russian for _, russian in made[back, "validation"]}
    assert not held_out_russian & paragraphs["train"]
    for task in INSTRUCTIONS:
        trained_on = {text for one in made[task, "train"] for text in one}
        assert not held_out_russian & trained_on


def test_translations_hold_the_pair(made):
    there, back = made["demo_translate_ru_en", "train"], made["demo_translate_en_ru", "train"]
    for (asks_ru, english), (asks_en, russian) in zip(there, back, strict=True):
        assert asks_ru == f"Переведи на английский: {russian}"
        assert asks_en == f"Переведи на русский: {english}"


def test_completions_continue_the_sentence(made):
    russian = {" ".join(text.split()) for _, text in made["demo_translate_en_ru", "train"]}
    for asks, answer in made["demo_complete", "train"]:
        given_words = asks.removeprefix("Продолжи текст: ").split()
        share = len(given_words) / (len(given_words) + len(answer.split()))
        assert " ".join([*given_words, answer]) in russian
        assert 0.3 < share < 0.8


def test_restorations_lose_something_of_the_sentence_and_nothing_else(made):
    kinds = Counter()
    for asks, answer in made["demo_restore", "train"]:
        kind, text = asks.split(": ", maxsplit=1)
        kinds[kind] += 1
        if kind == "Восстанови пропущенные слова":
            lost = sum(a == "…" != b for a, b in zip(text.split(), answer.split(), strict=True))
            assert lost == max(1, len(answer.split()) // 5) or "…" in answer.split()
            assert not words(text) - words(answer) - Counter({"…": lost})
        elif kind == "Восстанови пропущенные буквы":
            assert len(text) == len(answer)
            assert all(a == b or (a == "_" and b.isalpha()) for a, b in zip(text, answer, strict=True))
        else:
            assert kind == "Расставь слова по порядку"
            assert words(text) == words(answer)
    assert len(kinds) == 3
    assert min(kinds.values()) > 0.15 * sum(kinds.values())


def test_restorations_are_the_same_in_every_run(demo):
    """As written down once: they depend neither on the process nor on Python's hash seed."""
    sentence = "Открывает диалоговое окно, в котором можно выбрать цвет фона."
    gap = "Открывает диалоговое окно, в … можно выбрать цвет фона."
    assert demo.restore(sentence, "") == (f"Восстанови пропущенные слова: {gap}", sentence)
    begun = "Открывает диалоговое окно, в котором можно"
    assert demo.complete(sentence, "") == (f"Продолжи текст: {begun}", "выбрать цвет фона.")


@given(text=st.lists(st.text(min_size=1), max_size=20).map(" ".join))
def test_any_text_is_taken(demo, text):
    for made in (demo.complete(text, ""), demo.restore(text, "")):
        assert made is None or words(made[1]) <= words(text)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_seqio_iterates_the_instructions(demo, made, name):
    task = seqio.TaskRegistry.get(name)
    examples = task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator()
    found = [(e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode(), e) for e in examples]
    assert [(inputs, targets) for inputs, targets, _ in found] == made[name, "validation"]
    vocabulary = task.output_features["targets"].vocabulary
    for inputs, targets, example in found[:20]:
        assert example["inputs"].tolist() == [*vocabulary.encode(inputs), 1]
        assert example["targets"].tolist() == [*vocabulary.encode(targets), 1]


@pytest.mark.parametrize("name", TASKS)
def test_seqio_iterates_the_denoising(demo, name):
    lengths = {"inputs": 200, "targets": 210}
    dataset = seqio.TaskRegistry.get(name).get_dataset(lengths, "validation", shuffle=False, seed=1)
    examples = list(dataset.take(30).as_numpy_iterator())
    assert len(examples) == 30
    first_sentinel = seqio.TaskRegistry.get(name).output_features["targets"].vocabulary.vocab_size - 1
    for example in examples:
        assert all(len(example[side]) <= lengths[side] for side in lengths)
        assert example["inputs"][-1] == example["targets"][-1] == 1
    assert any(first_sentinel in example["inputs"] for example in examples)


def test_the_cache_holds_every_page(demo, tmp_path, capfd):
    manifests = cache("demo_ul2", "tasks.demo", tmp_path)["demo_ul2"]
    assert sum(manifest.num_examples for manifest in manifests.values()) == 1438
    assert manifests["train"].transform == denoisers.to_json(denoisers.mixture("ul2"))
    assert set(manifests["train"].provenance.modules) >= {"tasks.demo", "tasks.preprocessors", "tasks.settings"}
    assert "tokens" in capfd.readouterr().err
    assert cache("demo_ul2", "tasks.demo", tmp_path)["demo_ul2"] == manifests
    again = capfd.readouterr().err.splitlines()
    assert [" is there: " in line for line in again] == [True, True]  # nothing was left to do


def test_settings_come_from_the_environment(demo, monkeypatch, tmp_path):
    monkeypatch.setenv("VIKHR_T5_VOCABULARY", "not/there/yet.model")
    monkeypatch.setenv("VIKHR_T5_EXTRA_IDS", "17")
    assert settings.vocabulary() == seqio.SentencePieceVocabulary("not/there/yet.model", extra_ids=17)
    monkeypatch.setenv("VIKHR_T5_EXTRA_IDS", "many")
    with pytest.raises(UserError, match=r"VIKHR_T5_EXTRA_IDS='many'.*EXTRA_IDS"):
        settings.vocabulary()
    monkeypatch.delenv("VIKHR_T5_VOCABULARY")
    with pytest.raises(UserError, match=r"VIKHR_T5_VOCABULARY.*in gin: VOCABULARY_FILE"):
        settings.vocabulary()
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(tmp_path))
    assert settings.data_dir() == tmp_path
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"VIKHR_T5_DATA_DIR=.*none' is no folder"):
        settings.data_dir()
