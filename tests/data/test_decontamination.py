"""Contamination: planted, and just missed, in evaluation sets of the published schema; from the command line, too."""

import html
import json
import random
import re
import textwrap
from pathlib import Path

import datasets
import published
import pytest
from published import MMLU, PAGES, XNLI, XWINOGRAD

from vikhr_t5 import cli
from vikhr_t5.data import decontamination
from vikhr_t5.data.decontamination import Index, Item, Report, SetCounts, read_items, scan, words
from vikhr_t5.data.task_texts import TaskExample
from vikhr_t5.errors import UserError

SETS = {"xwinograd_ru": XWINOGRAD, "xnli_ru": XNLI, "ru_mmlu": MMLU}
SENTENCES = [
    sentence
    for page in PAGES
    for sentence in re.split(r"(?<=[.!?])\s+", page.replace("\n", " "))
    if 18 <= len(words(sentence)) <= 30 and "_" not in sentence
]


def unlike(sentences: list[str]) -> list[str]:
    """Those that share no five words in a row with one before them."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for sentence in sentences:
        found = words(sentence)
        grams = {tuple(found[start : start + 5]) for start in range(len(found) - 4)}
        if not grams & seen:
            kept.append(sentence)
        seen |= grams
    return kept


UNLIKE = unlike(SENTENCES)
LONG, REST = UNLIKE[:100], UNLIKE[100:300]  # an item's text is one of the first; what is trained on, of the others


def item(text: str, *more: str) -> Item:
    return Item("xnli_ru", "x[0]", (text, *more))


def matches(text: str, *items: Item, ngram: int = 13, min_share: float = 0.0) -> dict[int, float]:
    return {match.item: match.share for match in Index(items, ngram, min_share).find(text)}


def overlap_by_hand(text: str, other: str, n: int) -> float:
    """Share of the n-grams of `text` that `other` has, written without a look at the index."""

    def grams(text: str) -> set[str]:
        found = re.sub(r"[\W_]+", " ", text.lower().replace("ё", "е")).split()
        return {" ".join(found[i : i + n]) for i in range(len(found) - n + 1)}

    return len(grams(text) & grams(other)) / len(grams(text))


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not():
    text = "Раз два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать тринадцать четырнадцать"
    first = " ".join(text.split()[:13])
    assert matches(f"Начало. {first} конец", item(text)) == {0: 0.5}
    assert matches(f"{text}!", item(text)) == {0: 1.0}
    near_miss = first.replace("семь", "семья")
    assert matches(f"Начало. {near_miss} конец", item(text)) == {}
    assert matches(" ".join(text.split()[:12]), item(text)) == {}
    assert matches(" ".join(reversed(text.split())), item(text)) == {}


def test_case_punctuation_and_yo_do_not_matter():
    text = "Ещё раз, два, три — четыре; «пять» шесть (семь) восемь: девять десять одиннадцать двенадцать тринадцать!"
    other = "ЕЩЕ РАЗ ДВА ТРИ ЧЕТЫРЕ ПЯТЬ\nШЕСТЬ СЕМЬ ВОСЕМЬ ДЕВЯТЬ ДЕСЯТЬ ОДИННАДЦАТЬ ДВЕНАДЦАТЬ тринадцать"
    assert matches(other, item(text)) == {0: 1.0}


def test_a_shorter_text_counts_whole_from_eight_words_on():
    eight = "раз два три четыре пять шесть семь восемь"
    assert matches(f"и {eight} и", item(eight)) == {0: 1.0}
    assert matches(f"и {eight} и".replace("пять", "6"), item(eight)) == {}
    seven = eight.removesuffix(" восемь")
    index = Index([item(seven), item(eight), item(seven, "да", eight)])
    assert index.too_short == [0]
    assert {match.item for match in index.find(f"и {eight} и")} == {1, 2}


def test_ngrams_do_not_run_from_one_text_of_an_item_into_the_next():
    one, two = " ".join(map(str, range(100, 110))), " ".join(map(str, range(110, 120)))
    assert matches(f"{one} {two}"[12:-12], item(one, two)) == {}
    assert matches(f"{one} {two}", item(one, two)) == {0: 1.0}


def test_palms_rule_wants_a_share_of_the_ngrams():
    for text in LONG[:20]:
        found = text.split()
        for cut in (6, 3, 1, 0):
            other = f"Так: {' '.join(found[: len(found) - cut])} всё."
            share = overlap_by_hand(text, other, 8)
            assert matches(other, item(text), ngram=8, min_share=0.7) == ({0: share} if share >= 0.7 else {})


def test_shares_are_those_counted_by_hand_on_random_cuts():
    rng = random.Random(0)
    index = Index([item(text) for text in LONG])
    for number, text in enumerate(LONG):
        found = text.split()
        start, stop = sorted(rng.sample(range(len(found) + 1), 2))
        other = f"{LONG[(number + 1) % 100].split()[0]} {' '.join(found[start:stop])} {' '.join(found[:3])}"
        share = {match.item: match.share for match in index.find(other)}.get(number, 0.0)
        assert share == pytest.approx(overlap_by_hand(text, other, 13))


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("name", SETS)
def test_each_set_is_read_in_its_published_schema(tmp_path, name, form):
    published.write(tmp_path / SETS[name].folder, SETS[name].table(gaps(name)), form)
    for file in tmp_path.rglob("train-*.parquet"):  # the rows that are not evaluated on
        file.rename(file.with_name("test-00000-of-00001.parquet"))
        published.write(file.parent, SETS[name].table(["И этого никто."]), "parquet")
        file.rename(file.with_name("mmlu_ru-dev.parquet"))
        published.write(file.parent, SETS[name].table(["Этого никто не спросит."]), "parquet")
    if form == "saved":
        folder = tmp_path / SETS[name].folder
        rows = datasets.load_from_disk(str(folder))["train"]
        evaluated = datasets.DatasetDict({"test": rows, "train": rows.select([0])})
        evaluated.save_to_disk(tmp_path / name)
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        folder.rmdir()
    items = list(read_items(name, tmp_path))
    assert [one.set_name for one in items] == [name] * 24
    expected = {
        "xwinograd_ru": [(text.replace("_", ("кубок", "чемодан")[n % 2]),) for n, text in enumerate(gaps(name))],
        "xnli_ru": [(text, "Это так.") for text in LONG[:24]],
        "ru_mmlu": [(text, "один", "два", "три", "четыре") for text in LONG[:24]],
    }[name]
    assert [one.texts for one in items] == expected


def gaps(name: str) -> list[str]:
    """24 texts, for xwinograd with a gap."""
    return [re.sub(r"\b(\w+)([.!?])$", r"_\2", text) if name == "xwinograd_ru" else text for text in LONG[:24]]


@pytest.mark.parametrize("name", SETS)
def test_the_hub_is_asked_for_the_published_splits(name, monkeypatch):
    asked = []

    def load_dataset(dataset, config, split, revision):
        asked.append((dataset, config, split, revision))
        return datasets.Dataset(SETS[name].table(gaps(name)[:2]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision: ["anatomy", "virology"])
    count = len(list(read_items(name)))
    converted = "refs/convert/parquet"
    expected = {
        "xwinograd_ru": [("Muennighoff/xwinograd", "ru", "test", None)],
        "xnli_ru": [("facebook/xnli", "ru", "validation", None), ("facebook/xnli", "ru", "test", None)],
        "ru_mmlu": [("NLPCoreTeam/mmlu_ru", subject, "test", converted) for subject in ("anatomy", "virology")],
    }[name]
    assert asked == expected
    assert count == 2 * len(expected)


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^facebook/xnli cannot be .*reach the Hub\).*give a data folder") as raised:
        list(read_items("xnli_ru"))
    assert "\n" not in str(raised.value)


def examples_with(planted: dict[int, str]) -> list[TaskExample]:
    """200 examples of two tasks, of sentences that no item has; some hold what is planted."""
    return [
        TaskExample(
            "chats" if number % 2 else "flan",
            {"inputs": f"{text} {planted.get(number, '')}", "targets": "Да."},
            {} if number % 2 else {"task_name": f"set{number % 3}"},
        )
        for number, text in enumerate(REST)
    ]


def test_a_scan_counts_by_task_set_and_name_and_puts_the_worst_first():
    half = " ".join(LONG[1].split()[:14])
    planted = {10: LONG[0], 11: LONG[0], 20: half, 31: " ".join(LONG[2].split()[:12]), 42: f"{LONG[0]} {half}"}
    tasks, findings = scan(examples_with(planted), Index([item(text) for text in LONG[:3]]))
    assert [(finding.text, finding.examples) for finding in findings] == [(LONG[0][:300], 3), (LONG[1][:300], 2)]
    assert findings[0].share == 1
    assert findings[1].share == pytest.approx(overlap_by_hand(LONG[1], half, 13))
    assert findings[0].task == "flan"
    assert set(words(findings[0].ngram)) <= set(words(LONG[0]))
    assert len(findings[0].ngram.split()) == 13
    assert " ".join(findings[0].ngram.split()[:3]) in " ".join(words(findings[0].example))
    flan, chats = tasks["flan"], tasks["chats"]
    assert (flan.examples, flan.contaminated, chats.examples, chats.contaminated) == (100, 3, 100, 1)
    assert flan.by_name == {"set1": 1, "set2": 1, "set0": 1}
    assert flan.by_set == {"xnli_ru": 3}


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with an instruction task of local lines; a second one that leaves out what is contaminated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(tmp_path))
    (tmp_path / "my_instructions.py").write_text(
        textwrap.dedent(
            """
            import seqio
            from tasks import flan
            from tasks.decontamination import not_evaluated_on

            flan.add_task("mine", "me/mine")
            flan.add_task("mine_clean", "me/mine", steps=[not_evaluated_on(["xnli_ru", "ru_mmlu"], "evaluation")])
            seqio.MixtureRegistry.add("both", ["mine", "mine_clean"], default_rate=1.0)
            """
        )
    )
    return "my_instructions"


def test_from_the_command_line(my_module, tmp_path, capfd):
    """Planted: one item of three in full, twice, a near miss of another; the task that leaves such out has none."""
    planted = {10: LONG[0], 12: " ".join(LONG[1].split()[:12]), 14: LONG[50], 16: LONG[0].replace(" ", "\n")}
    lines = [json.dumps(example.texts, ensure_ascii=False) + "\n" for example in examples_with(planted)]
    (tmp_path / "me/mine").mkdir(parents=True)
    (tmp_path / "me/mine/rows.jsonl").write_text("".join(lines))
    for name, texts in (("xnli_ru", LONG[:3]), ("ru_mmlu", [*LONG[50:52], "Что верно?"])):
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in SETS[name].table(texts).to_pylist()]
        (tmp_path / "evaluation").mkdir(exist_ok=True)
        (tmp_path / f"evaluation/{name}.jsonl").write_text("".join(rows))
    flags = ["--module", my_module, "--against", "xnli_ru,ru_mmlu", "--data_dir", "evaluation"]
    assert cli.main(["decontaminate", "--mixture", "both", *flags, "--output", "report.json"]) == 0
    printed = capfd.readouterr().out
    assert "xnli_ru: 1 of 3 items contaminated (33.3%), 0 too short to tell" in printed
    assert "ru_mmlu: 1 of 3 items contaminated (50.0%), 1 too short to tell" in printed
    examples = json.loads((tmp_path / "report.json").read_text())["tasks"]["mine"]["examples"]
    assert f"mine: 3 of {examples} examples contaminate something" in printed
    assert f"mine_clean: 0 of {examples - 3} examples contaminate something" in printed


def test_the_report_as_json_and_as_a_page(tmp_path):
    items = [item(text) for text in (LONG[0], LONG[1], "Коротко <b>.")]
    index = Index(items)
    tasks, findings = scan(examples_with({10: LONG[0], 14: LONG[0], 16: f"<i>{LONG[0]}"}), index)
    sets = {"xnli_ru": SetCounts(3, 1, len(findings))}
    report = Report("flan", "train", 13, 0.0, sets, tasks, findings)
    for name in ("report.json", "report.html"):
        decontamination.write(report, tmp_path / name)
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["sets"]["xnli_ru"] == {"items": 3, "too_short": 1, "contaminated": 1, "share": 0.5}
    assert record["tasks"]["flan"]["by_set"] == {"xnli_ru": 3}
    [finding] = record["findings"]
    assert (finding["share"], finding["examples"], finding["text"]) == (1.0, 3, LONG[0])
    assert "13-grams" in record["method"]
    page = (tmp_path / "report.html").read_text()
    assert "{{" not in page
    marked = re.findall("<mark>(.*?)</mark>", page)
    assert len(marked) == 2  # in the item, and in the example
    assert all(words(html.unescape(text)) == finding["ngram"].split() for text in marked)
    assert "50.00%" in page


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--against", "xnli"], "unknown evaluation set 'xnli'; nearest: xnli_ru"),
        (["--against", "xnli_ru", "--data_dir", "none"], "no evaluation set xnli_ru in none: put xnli_ru.jsonl"),
        (["--against", "xnli_ru", "--output", "a.pdf"], "a.pdf: its name must end in .json or .html"),
        (["--against", "xnli_ru", "--data_dir", ".", "--ngram", "1"], "--ngram 1"),
        (
            ["--against", "ru_mmlu", "--data_dir", "."],
            "ru_mmlu.jsonl:1: ru_mmlu needs 'question_ru'; nearest: question",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capfd, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "xnli_ru.jsonl").write_text('{"premise": "а", "hypothesis": "б", "label": 0}\n')
    (tmp_path / "ru_mmlu.jsonl").write_text('{"question": "а", "choices_ru": ["б"]}\n')
    assert cli.main(["decontaminate", "--mixture", "mine", *flags]) == 2
    error = capfd.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_every_set_that_the_help_names_is_known():
    assert set(decontamination.SETS) == set(SETS)
