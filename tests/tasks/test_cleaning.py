"""Cleaning: each step on what it is for, and on what it must leave alone; in seqio the same texts come out."""

import functools
import json
from pathlib import Path

import pytest
import seqio
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tasks import cleaning
from tasks.cleaning import (
    at_least,
    clean,
    drop_lines,
    enough_letters,
    highest,
    length_within,
    markdown_to_text,
    mend_encoding,
    nfc,
    squeeze,
    strip_controls,
)
from vikhr_t5.data import drops
from vikhr_t5.data.sources import JsonLinesSource

GENUINE = "Привет, мир! Это обычный текст — «кавычки», ёж и №5. Её щёки, Пётр Сёмин: 20 °C · ©"
PAGES = (Path(cleaning.__file__).parent / "demo_data" / "ru.txt").read_text(encoding="utf-8").split("\n\n")
STEPS = (mend_encoding, nfc, strip_controls, markdown_to_text, drop_lines, squeeze, enough_letters, length_within)


def read_as(text: str, encoding: str, times: int = 1) -> str:
    """UTF-8 that a browser takes for another encoding."""
    for _ in range(times):
        text = "".join(bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in text.encode())
    return text


def test_composed_letters_are_one_character():
    assert nfc("и\u0306 е\u0308") == "й ё"
    assert nfc("½ ² ﬁ") == "½ ² ﬁ"  # compatibility characters stay


def test_control_characters_go_and_lines_end_alike():
    assert strip_controls("а\x00б\x1b\x7f\u200b\ufeffв\u00adг\u202e") == "абвг"
    assert strip_controls("1\r\n2\r3\u20284\x0c5\x856") == "1\n2\n3\n4\n5\n6"
    assert strip_controls("a\tb 👩\u200d💻 «ё»\u00a0—") == "a\tb 👩\u200d💻 «ё»\u00a0—"


def test_squeezing_leaves_one_blank_line():
    assert squeeze("\n\n а \t\n\n \n\n  б\nв  ") == "а\n\n  б\nв"


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("encoding", ["cp1251", "cp1252", "latin-1", "cp866", "koi8-r"])
def test_utf8_read_as_another_encoding_is_mended(encoding, times):
    broken = read_as(GENUINE, encoding, times)
    assert broken != GENUINE
    assert mend_encoding(broken) == GENUINE
    assert mend_encoding(f"{GENUINE}\n{broken}\nline") == f"{GENUINE}\n{GENUINE}\nline"


def test_windows_1251_read_as_western_is_mended():
    assert mend_encoding("Ïðèâåò, ìèð! Êàê äåëà?") == "Привет, мир! Как дела?"
    assert mend_encoding("Déjà vu à côté, où être né?") == "Déjà vu à côté, où être né?"


def test_what_cannot_be_mended_is_left_out():
    assert mend_encoding(read_as(GENUINE, "cp1251").replace("\u00a0", " ").replace("‚", "?")) is None
    assert mend_encoding("Пр\ufffdвет") is None
    assert mend_encoding(f"{GENUINE * 10}\ufffd") == f"{GENUINE * 10}\ufffd"  # one in a long text
    assert mend_encoding(f"{GENUINE * 10}\ufffd", max_broken=0) is None


@pytest.mark.parametrize(
    "text", [GENUINE, "Её", "Ё-ё, ПЁС, пёс, яё", "Њ и Љ — сербские", "", "naïve café", "Ñandú",
             "С\u00a0ним, В\u00a0нём " * 20, "Сік, Січень, Рік " * 20, "СРЈ"],
)  # fmt: skip
def test_genuine_text_is_not_mended(text):
    assert mend_encoding(text) == text


def test_the_embedded_pages_pass_unchanged():
    assert len(PAGES) == 1438
    for page in PAGES:
        assert mend_encoding(page) == nfc(page) == page
        assert drop_lines(page) == page


@pytest.mark.parametrize(
    "line",
    ["Читать далее…", "  ПОДЕЛИТЬСЯ:", "Комментарии (12)", "Войти | Регистрация", "© 2020 ООО «Ромашка»",
     "Подписывайтесь на наш канал в Telegram", "2001–2020 © Газета. Все права защищены.", "Источник: ТАСС",
     "Этот сайт использует файлы cookie, чтобы было удобнее.", "[править | править код]"],
)  # fmt: skip
def test_boilerplate_lines_go(line):
    assert drop_lines(f"Раз.\n{line}\nДва.") == "Раз.\nДва."
    assert drop_lines(line) == ""


def test_sentences_like_boilerplate_stay():
    text = "Читать далее было нечего, и он уснул.\nРеклама двигает торговлю.\nФото: портрет отца, 1950 год, из архива."
    assert drop_lines(text) == text


def test_boilerplate_is_configurable():
    assert drop_lines("а\nСм. также\nб\nЧитать далее", patterns=cleaning.WIKIPEDIA) == "а\nб\nЧитать далее"


def test_markdown_becomes_text():
    markdown = """## Заголовок

Абзац с **жирным**, *косым* и `кодом`, [ссылкой](https://a.ru/x) и ![картинкой](b.png).
<b>HTML</b> <!-- нет --> 2 * 3 * 4, snake_case_name, a\\_b

> цитата

---
```python
x = "**не трогать**"  # [и это](тоже)
```
* пункт
"""
    expected = """Заголовок

Абзац с жирным, косым и кодом, ссылкой и .
HTML  2 * 3 * 4, snake_case_name, a_b

цитата


x = "**не трогать**"  # [и это](тоже)
* пункт
"""
    assert markdown_to_text(markdown) == expected


def test_the_share_of_letters_decides():
    assert enough_letters("привет, world") == "привет, world"
    assert enough_letters("да, hello world 123") is None
    assert enough_letters("12345 ???") is None
    assert enough_letters("да, hello world", min_share=0.1) == "да, hello world"
    assert enough_letters("да, hello world", letters=cleaning.LATIN) == "да, hello world"


def test_length_has_both_bounds():
    assert [length_within("а" * n, 2, 3) for n in (1, 2, 3, 4)] == [None, "аа", "ааа", None]


def test_long_lines_take_no_longer_than_their_length():
    for line in (" " * 100_000 + "а", "[" * 30_000, "**а " * 20_000, "# " * 30_000, "<a " * 30_000, "_ *" * 30_000):
        for step in STEPS:
            cleaned = step(line)
            assert cleaned is None or len(cleaned) <= len(line)


@given(text=st.text(max_size=200))
def test_any_text_is_taken(text):
    for step in STEPS:
        result = step(text)
        assert result is None or isinstance(result.encode(errors="surrogatepass"), bytes)
    assert strip_controls(strip_controls(text)) == strip_controls(text)
    assert squeeze(squeeze(text)) == squeeze(text)


def rows(dataset: tf.data.Dataset) -> list[dict]:
    return list(dataset.as_numpy_iterator())


def test_in_seqio_the_same_texts_come_out_and_the_other_features_stay_with_them():
    texts = [f"привет {n}" if n % 3 else f"hello {n}" for n in range(200)]
    dataset = tf.data.Dataset.from_tensor_slices({"text": texts, "n": range(200)})
    step = clean(str.upper, functools.partial(enough_letters, min_share=0.9))
    found = [(row["n"], row["text"].decode()) for row in rows(step(dataset))]
    assert found == [(n, f"ПРИВЕТ {n}") for n in range(200) if n % 3]
    assert step.__name__ == "clean_upper_enough_letters"
    assert rows(clean(lambda _: None)(dataset)) == []


def test_invalid_utf8_counts_as_broken():
    dataset = tf.data.Dataset.from_tensors({"text": b"\xff\xfe" + "привет".encode()})
    assert rows(clean(mend_encoding)(dataset)) == []


def test_examples_are_chosen_by_a_number():
    values = ["3", "10", "10.5", "null", "-1", '"12"', "nan", "many"]
    dataset = tf.data.Dataset.from_tensor_slices({"score": values, "text": values})
    assert [row["text"] for row in rows(at_least("score", 10)(dataset))] == [b"10", b"10.5"]
    objects = ['{"score": 12, "votes": 1}', '{"votes": 99}', '{"score": null}', "[12]", '{"score": 9}']
    dataset = tf.data.Dataset.from_tensor_slices({"statistics": objects})
    assert [row["statistics"].decode() for row in rows(at_least("statistics", 10, key="score")(dataset))] == objects[:1]


def test_the_highest_of_a_whole_set_are_chosen(tmp_path):
    """Whatever the shard: the threshold is of all files and of both splits."""
    scores = [5, 1, 9, 7, 7, 2, None, 8]
    for part in (0, 1):
        lines = [json.dumps({"statistics": {"score": score}}) for score in scores[part::2]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    source = JsonLinesSource({"train": str(tmp_path / "*.jsonl")}, ["statistics"])
    for count, kept in ((3, [7, 7, 8, 9]), (1, [9]), (100, [1, 2, 5, 7, 7, 8, 9])):
        step, found = highest(count, source, "statistics", key="score"), []
        before = drops.counts()
        for shard in (0, 1):
            dataset = source.get_dataset("train", shuffle=False, shard_info=seqio.ShardInfo(shard, 2))
            found += [json.loads(row["statistics"])["score"] for row in rows(step(dataset))]
        assert sorted(found) == kept
        assert (drops.counts() - before)["highest_score"] == len(scores) - len(kept)
