"""Units of a text, masks, and what tells a failed translation."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vikhr_t5.translation_text import (
    REASONS,
    Unit,
    defects,
    lost_option,
    mask,
    options,
    split_at_protected,
    split_text,
    unmask,
)

PREMISE = """Premise: {{premise}} Mr. Smith came at 5 p.m. to {place}, i.e. home. See https://a.b/c?d=1,e.

  (A) yes, it is so
  (B) no!
- maybe. Who knows?
1. First thing
```python
x = "not text"
```
Q: Which of these? a) one thing b) another <extra_id_0> c) `none`\tEND"""


def units(text: str) -> list[str]:
    return [part.text for part in split_text(text) if isinstance(part, Unit)]


def joined(parts: list) -> str:
    return "".join(part.text if isinstance(part, Unit) else part for part in parts)


def test_units_of_a_prompt() -> None:
    assert units(PREMISE) == [
        "Premise: {{premise}} Mr. Smith came at 5 p.m. to {place}, i.e. home.",
        "See https://a.b/c?d=1,e.",
        "yes, it is so",
        "no!",
        "maybe.",
        "Who knows?",
        "First thing",
        "Which of these?",
        "one thing",
        "another <extra_id_0>",
        "`none`\tEND",
    ]


@pytest.mark.parametrize(
    "text", ["", "\n\n", "B", "(C)", "12 + 5 = 17", "{x}", "https://example.org/a", "  \t", "```\nx\n```"]
)
def test_what_needs_no_translation(text: str) -> None:
    assert units(text) == []
    assert joined(split_text(text)) == text


TEXTS = st.text(
    st.one_of(
        st.sampled_from(list("ab Zя.!?,;:\n\r\t(){}<>[]`%$\"'-*1)A\u2028")), st.characters(exclude_categories=["Cs"])
    )
)


@given(TEXTS, st.integers(1, 40))
def test_parts_joined_are_the_text(text: str, longest: int) -> None:
    parts = split_text(text, lambda unit: len(unit) <= longest)
    assert joined(parts) == text
    for part in parts:
        if isinstance(part, Unit):
            assert part.text == part.text.strip()
            assert len(mask(part.text).text) <= longest
            masked = mask(part.text)
            assert unmask(masked.text, masked) == part.text
            assert joined(split_at_protected(part.text)) == part.text
            assert not any(isinstance(p, Unit) and mask(p.text).parts for p in split_at_protected(part.text))


def test_a_long_sentence_is_cut_at_clauses_and_never_inside_a_placeholder() -> None:
    text = "one two, three four five {x y z} six seven; eight"
    parts = split_text(text, lambda unit: len(unit) <= 24)  # "XXXA" for what is protected
    assert [part.text for part in parts if isinstance(part, Unit)] == [
        "one two,",
        "three four five",
        "{x y z} six seven;",
        "eight",
    ]
    assert joined(parts) == text


def test_masks() -> None:
    masked = mask("XXX is {a} and X{b}s")
    assert (masked.text, masked.parts) == ("XXX is XXXXA and XXXXXBs", ["{a}", "{b}"])
    assert unmask("XXXXB и XXXXA", masked) == "{b} и {a}"
    assert unmask(masked.text, masked) == "XXX is {a} and X{b}s"
    for failed in ("XXXXA", "XXXXA XXXXB XXXXB", "XXXXA XXXXC", "xxxxa XXXXB", "XXXXA ХХХХВ", ""):
        assert unmask(failed, masked) is None
    many = " ".join(f"{{v{i}}}" for i in range(70))
    assert unmask(mask(many).text, mask(many)) == many


def test_split_at_protected() -> None:
    assert [p for p in split_at_protected("Dear {name}, see www.a.org.") if p] == [
        Unit("Dear"),
        " ",
        "{name}",
        Unit(", see"),
        " ",
        "www.a.org",
        ".",
    ]


GOOD = [
    ("In 1999 it cost 1,000.5 {unit}.", "В 1999 году это стоило 1 000,5 {unit}."),
    ("It cost 1,000 here", "Здесь это стоило 1000"),
    ("Is it so?\n(a) yes (b) no", "Это так?\n(a) да (b) нет"),
    ("B", "B"),
    ("IBM", "IBM"),
    ("yes", "да"),
    ("A ratio of a short text", "Отношение"),
    ("no no no no no no no", "нет нет нет нет нет нет нет"),
    ("______ is a city", "______ это город"),
    ("```\nx = 1\n```", "```\nx = 1\n```"),
]


@pytest.mark.parametrize(("source", "translation"), GOOD)
def test_good_translations(source: str, translation: str) -> None:
    assert list(defects(source, translation, "Cyrl")) == []


BAD = [
    ("empty", "A text", " \n"),
    ("placeholders", "Dear {name}", "Дорогой {имя}"),
    ("placeholders", "See http://a.org/b today", "См. http://a.org/c сегодня"),
    ("placeholders", "Fill <extra_id_0> and <extra_id_1>", "Впишите <extra_id_0> и <extra_id_0>"),
    ("lines", "one line\nanother", "одна строка другая"),
    ("options", "Choose: (a) yes (b) no", "Выберите: (а) да (б) нет"),
    ("options", "- yes\n- no", "да\n- нет"),
    ("numbers", "It has 15 pages", "В ней 16 страниц"),
    ("numbers", "It has 15 pages", "В ней пятнадцать страниц"),
    ("script", "This is not a translation at all", "Dies ist gar keine Übersetzung"),
    ("copy", "yes", "yes"),
    ("copy", "nothing was translated here", "nothing was  translated here"),
    ("length", "A rather long sentence about nothing in particular, to be cut.", "Предложение"),
    (
        "length",
        "A short sentence",
        "Длинное предложение ни о чём, которое всё никак не закончится, как ни жди его конца",
    ),
    ("repetition", "A sentence with a loop of a model in it", "Это это это это это это"),
    (
        "repetition",
        " ".join("abcdefghijklmnopqrstuvwxyz"[i % 26] * (i % 7 + 1) for i in range(60)),
        " ".join(("а б в г д", "а б в г е", "а в г б д")[i % 3 if i % 5 else 0] for i in range(30)),
    ),
]


@pytest.mark.parametrize(("reason", "source", "translation"), BAD)
def test_failed_translations(reason: str, source: str, translation: str) -> None:
    assert reason in defects(source, translation, "Cyrl")


def test_every_reason_has_a_case() -> None:
    assert {reason for reason, *_ in BAD} == REASONS.keys() - {"cut"}


def test_the_script_is_the_targets() -> None:
    assert "script" in defects("Un texte assez long pour juger", "Довольно длинный русский текст", "Latn")
    assert "script" not in defects("Un texte assez long pour juger", "A text long enough to judge", "Latn")


def test_options_and_the_answer_among_them() -> None:
    inputs, translated = "Is it so?\n(A) Yes\n(B) No, never.", "Так ли это?\n(A) Да\n(B) Нет, никогда."
    assert options(inputs) == ["Yes", "No, never."]
    assert options("Which: a) one b) two three") == ["one", "two three"]
    assert not lost_option(inputs, "yes", translated, "Да.")
    assert lost_option(inputs, "Yes", translated, "Верно")
    assert not lost_option(inputs, "Perhaps", translated, "Возможно")


def test_human_translations_pass_and_copies_do_not() -> None:
    """The embedded parallel corpus: translators of LibreOffice's help wrote it."""
    path = Path(__file__).resolve().parents[1] / "tasks" / "demo_data" / "parallel.jsonl"
    with path.open(encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in itertools.islice(lines, 0, None, 5)]
    good = sum(not any(defects(pair["en"], pair["ru"], "Cyrl")) for pair in pairs)
    copied = [pair["en"] for pair in pairs if sum(map(str.isalpha, pair["en"])) > 20]
    caught = sum(any(defects(text, text, "Cyrl")) for text in copied)
    assert good > 0.98 * len(pairs)
    assert caught > 0.98 * len(copied)
