"""Instructions out of raw rows: what they show and ask, that nothing leaks, that it is the same in every run."""

import json
import re
import sys

import published
import pyarrow as pa
import pytest
import seqio
from hypothesis import given
from hypothesis import strategies as st

from vikhr_t5.data import drops
from vikhr_t5.data.cache import cache
from vikhr_t5.data.pipeline import DatasetConfig, open_dataset
from vikhr_t5.data.sources import JsonLinesSource, held_out
from vikhr_t5.errors import UserError

KINDS = ("zs_opt", "zs_noopt", "fs_opt", "fs_noopt")
FIELDS = ("question", "options", "answer", "subject")
SUMS = [f"Сколько будет {n} + {n + 1}?" for n in range(300)]


def row(number: int, question: str) -> dict[str, object]:
    options = [f"ответ {number + shift}" for shift in range(4)]
    subject = "счёт" if number % 3 else "ум"
    return {"question": question, "options": options, "answer": options[number % 4], "subject": subject}


_SCHEMA = pa.schema([(field, pa.list_(pa.string()) if field == "options" else pa.string()) for field in FIELDS])
QUIZ = published.Published("me/quiz", _SCHEMA, row)


@pytest.fixture(scope="module")
def templates():
    return sys.modules["tasks.templates"]


@pytest.fixture
def add_tasks(templates, vocabulary, monkeypatch):
    """`templates.add_tasks`; what it registers is taken out of seqio's registries afterwards."""
    monkeypatch.setenv("VIKHR_T5_VOCABULARY", vocabulary.sentencepiece_model_file)
    before = {registry: set(registry.names()) for registry in (seqio.TaskRegistry, seqio.MixtureRegistry)}
    yield templates.add_tasks
    for registry, names in before.items():
        for name in set(registry.names()) - names:
            registry.remove(name)


@pytest.fixture
def quiz(templates, add_tasks, data):
    """The source of the tasks of a quiz of 300 rows."""
    published.write(data / "me/quiz", QUIZ.table(SUMS), "parquet")
    source = templates.settings.source("me/quiz", FIELDS, held_out("question", 0.1))
    add_tasks("quiz", source, templates.QUESTION, task_name="subject")
    return source


def examples(task: str, split: str) -> list[dict[str, str]]:
    found = seqio.TaskRegistry.get(task).get_dataset(None, split, shuffle=False).as_numpy_iterator()
    texts = {"inputs": "inputs_pretokenized", "targets": "targets_pretokenized", "name": "task_name"}
    return [{name: example[feature].decode() for name, feature in texts.items()} for example in found]


def questions(text: str) -> list[str]:
    return re.findall(r"Сколько будет \d+ \+ \d+\?", text)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_asks_its_question_last_and_is_answered_by_an_option(quiz, kind):
    rows = {question: row(number, question) for number, question in enumerate(SUMS)}
    found = examples(f"quiz_{kind}", "train") + examples(f"quiz_{kind}", "validation")
    assert sorted(questions(example["inputs"])[-1] for example in found) == sorted(SUMS)
    assert len({re.sub(r"\d+", "", example["inputs"].split("Сколько")[0]) for example in found}) > 3, "wordings differ"
    for example in found:
        asked = rows[questions(example["inputs"])[-1]]
        number = SUMS.index(asked["question"])
        assert example["targets"] == f"ответ {number + number % 4}"
        assert example["name"] == asked["subject"]
        last = example["inputs"].rpartition(asked["question"])[2]
        listed = re.findall(r"^\S+ (ответ \d+)$", last, re.M)
        assert listed == (asked["options"] if kind.endswith("_opt") else [])
        shots = questions(example["inputs"])[:-1]
        assert (1 <= len(shots) <= 5) if kind.startswith("fs") else not shots
        assert asked["question"] not in shots
        for shot in shots:  # each with its own answer
            answer = f"ответ {SUMS.index(shot) + SUMS.index(shot) % 4}"
            after = example["inputs"].partition(shot)[2]
            assert answer in re.split(r"Сколько будет \d+", after)[0]


@pytest.mark.parametrize("kind", ["fs_opt", "fs_noopt"])
def test_exemplars_are_never_from_validation(quiz, kind):
    held = {example["question"].decode() for example in quiz.examples("validation")}
    assert len(held) > 10
    shown = set()
    for split in ("train", "validation"):
        for example in examples(f"quiz_{kind}", split):
            shown |= set(questions(example["inputs"])[:-1])
    assert len(shown) > 100
    assert not shown & held


def test_it_is_the_same_in_every_run_and_in_any_order_of_the_rows(quiz, data):
    """As written down once: nothing depends on the process, on Python's hash seed or on the order of the rows."""
    first = examples("quiz_fs_opt", "train")
    asked = [f"Сколько будет {n} + {n + 1}?" for n in (224, 232, 62, 127, 87, 1)]
    assert questions(first[0]["inputs"]) == asked
    listed = "ВАРИАНТЫ:\nA. ответ 1\nB. ответ 2\nC. ответ 3\nD. ответ 4\n"
    assert examples("quiz_zs_opt", "train")[0]["inputs"] == f"Вопрос: Сколько будет 1 + 2?\n{listed}Ответ:"
    published.write(data / "me/quiz", QUIZ.table(SUMS).take(pa.array(range(299, -1, -1))), "parquet")
    again = examples("quiz_fs_opt", "train")
    assert sorted(map(str, again)) == sorted(map(str, first))


def test_the_mixture_is_cached_at_equal_rates_with_its_names(quiz, data, vocabulary):
    cache("quiz", "tasks.flan", data / "cache")
    config = DatasetConfig("quiz", {"inputs": 512, "targets": 64}, "train", 4, cache_dir=str(data / "cache"))
    dataset = open_dataset(config, vocabulary)
    assert set(dataset.example_rates.values()) == {0.25}
    assert set(dataset.source_names) == {f"quiz_{kind}/{name}" for kind in KINDS for name in ("ум", "счёт")}


def test_long_exemplars_are_left_out_and_an_example_without_any_too(templates, add_tasks, data):
    long = [f"{question} {'слово ' * (400 if n % 2 else 4)}" for n, question in enumerate(SUMS[:60])]
    published.write(data / "me/long", QUIZ.table(long), "jsonl")
    source = templates.settings.source("me/long", FIELDS, held_out("question", 0.1))
    add_tasks("long", source, templates.QUESTION, max_inputs=450)
    before = drops.counts()
    dataset = seqio.TaskRegistry.get("long_fs_noopt").get_dataset(None, "train", shuffle=False)
    found = list(dataset.as_numpy_iterator())
    assert found
    assert all(len(example["inputs"]) <= 450 for example in found)
    dropped = (drops.counts() - before)["no_room_for_exemplars"]
    assert dropped > 5
    assert dropped + len(found) == sum(1 for _ in source.examples("train"))


def test_rows_without_options_have_no_example_with_options(templates, add_tasks, data):
    table = pa.Table.from_pylist([{"question": q, "options": [], "answer": "да"} for q in SUMS[:40]])
    published.write(data / "me/open", table, "jsonl")
    source = templates.settings.source("me/open", FIELDS[:3], held_out("question", 0.1))
    add_tasks("open", source, templates.QUESTION)
    before = drops.counts()
    for kind in KINDS:
        dataset = seqio.TaskRegistry.get(f"open_{kind}").get_dataset(None, "train", shuffle=False)
        assert bool(list(dataset)) == kind.endswith("noopt")
    rows = sum(1 for _ in source.examples("train"))
    assert (drops.counts() - before) == {"no_options": 2 * rows}


def test_other_fields_and_templates(templates, add_tasks, data):
    table = pa.Table.from_pylist([{"text": f"Слово {n}", "mood": "хорошо"} for n in range(40)])
    published.write(data / "me/moods", table, "jsonl")
    source = templates.settings.source("me/moods", ["text", "mood"], lambda split, row: split == "train")
    add_tasks("moods", source, [templates.Template("Каково настроение: {text}", "{mood}")], answer="mood")
    assert {task.name for task in seqio.MixtureRegistry.get("moods").tasks} == {"moods_zs_noopt", "moods_fs_noopt"}
    dataset = seqio.TaskRegistry.get("moods_zs_noopt").get_dataset(None, "train", shuffle=False)
    first = next(dataset.as_numpy_iterator())
    assert first["inputs_pretokenized"].decode() == "Каково настроение: Слово 0"
    assert first["targets_pretokenized"].decode() == "хорошо"


def test_numbers_of_options_are_never_taken_for_their_texts(templates, add_tasks, data):
    table = pa.Table.from_pylist([{"question": q, "options": ["2", "0", "1"], "answer": "2"} for q in SUMS[:20]])
    published.write(data / "me/numbers", table, "parquet")
    source = templates.settings.source("me/numbers", FIELDS[:3], lambda split, row: split == "train")
    for numbered, expected in ((True, "1"), (False, "2")):
        add_tasks(f"numbers_{numbered}", source, templates.QUESTION, numbered=numbered)
        task = seqio.TaskRegistry.get(f"numbers_{numbered}_zs_opt")
        found = task.get_dataset(None, "train", shuffle=False).as_numpy_iterator()
        assert {example["targets_pretokenized"].decode() for example in found} == {expected}


def test_braces_in_a_row_are_text(templates):
    source = JsonLinesSource({"train": "none", "validation": "none"}, FIELDS[:3])
    ask = templates.Ask(
        "t", source, [templates.Template("{question}\n{options}")], "options", "answer", False, True, 0, 99, None
    )
    made = ask._example(ask._row(["{answer} {0}", '["{question}", "б"]', "{question}"]), [], len)
    assert made is not None
    assert made[0].startswith("{answer} {0}\n")
    assert made[1] == "{question}"


@given(question=st.text(max_size=50), options=st.lists(st.text(max_size=20), min_size=1, max_size=40), data=st.data())
def test_any_row_is_asked(templates, question, options, data):
    source = JsonLinesSource({"train": "none", "validation": "none"}, FIELDS[:3])
    ask = templates.Ask("t", source, templates.QUESTION, "options", "answer", False, True, 0, 99, None)
    answer = data.draw(st.sampled_from(options))
    inputs, targets = ask._example(ask._row([question, json.dumps(options), answer]), [], len)
    assert question in inputs
    assert targets == answer
    assert all(option in inputs for option in options)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{qestion}\n{options}", r"asks for 'qestion'; nearest: question"),
        ("{question}", r"has no line \{options\} for the field 'options'"),
        ("{question} {options}", r"has no line \{options\}"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(templates, template, says):
    source = templates.settings.source("me/quiz", FIELDS, held_out("question", 0.1))
    with pytest.raises(UserError, match=says):
        templates.add_tasks("refused", source, [templates.Template(template)])
    assert "refused_zs_opt" not in seqio.TaskRegistry.names()


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"question": "?", "options": ["а", "б"], "answer": "в"}, "the answer 'в' is none of the options"),
        ({"question": "?", "options": ["а", "б"], "answer": "1"}, "the answer '1' is none of .*; numbered=True"),
        ({"question": "?", "options": "а, б", "answer": "а"}, "options are a list; this is none: 'а, б'"),
    ],
)
def test_a_row_that_is_no_quiz_is_shown_in_one_line(templates, add_tasks, data, made, says):
    published.write(data / "me/bad", pa.Table.from_pylist([made]), "jsonl")
    source = templates.settings.source("me/bad", FIELDS[:3], lambda split, row: split == "train")
    add_tasks("bad", source, templates.QUESTION)
    with pytest.raises(UserError, match=says) as raised:
        cache("bad_zs_opt", "tasks.flan", data / "cache", splits=["train"])
    assert "\n" not in str(raised.value)
