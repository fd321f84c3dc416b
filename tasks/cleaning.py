"""Cleaning of documents, one small step each: text -> text, or None for a document to be left out.

The steps are plain Python and are tested as such; `clean` makes a seqio preprocessor of any number of them. Their
arguments are bound with functools.partial:

    clean(mend_encoding, nfc, strip_controls, functools.partial(enough_letters, letters=LATIN, min_share=0.7))

`mend_encoding` stands first: the others remove characters by which it recognises what has happened.
"""

import codecs
import functools
import heapq
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import seqio
import tensorflow as tf

from vikhr_t5.data.drops import drop
from vikhr_t5.data.sources import PieceSource

BATCH = 64  # documents handed to Python in one call

Step = Callable[[str], str | None]
Preprocessor = Callable[[tf.data.Dataset], tf.data.Dataset]


# ---- in seqio --------------------------------------------------------------------------------------------------------


def clean(*steps: Step, field: str = "text") -> Preprocessor:
    """A seqio preprocessor: the steps, in this order, on a feature; an example is left out where one returns None, and
    counted under the step's name (`vikhr_t5.data.drops`)."""

    def apply(document: bytes) -> str | None:
        text = document.decode(errors="replace")
        for step in steps:
            result = step(text)
            if result is None:
                drop(seqio.utils.function_name(step))
                return None
            text = result
        return text

    def texts(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cleaned = [apply(document) for document in documents]
        kept = np.array([text is not None for text in cleaned], bool)
        return np.array([(text or "").encode() for text in cleaned], object), kept

    def preprocess(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def batch(examples: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            cleaned, kept = tf.numpy_function(texts, [examples[field]], [tf.string, tf.bool])
            return _masked({**examples, field: tf.ensure_shape(cleaned, [None])}, kept)

        return dataset.batch(BATCH).map(batch).unbatch()

    preprocess.__name__ = "_".join(["clean", *(seqio.utils.function_name(step) for step in steps)])
    return preprocess


def leave_out(reason: Callable[..., str | None], *fields: str) -> Preprocessor:
    """A seqio preprocessor: without the examples for whose `fields`, as bytes, `reason` gives one, a short name under
    which they are counted (`vikhr_t5.data.drops`)."""

    def keep(*columns: np.ndarray) -> np.ndarray:
        reasons = [reason(*values) for values in zip(*columns, strict=True)]
        for name, count in Counter(filter(None, reasons)).items():
            drop(name, count)
        return np.array([found is None for found in reasons], bool)

    def preprocess(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def batch(examples: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            return _masked(examples, tf.numpy_function(keep, [examples[field] for field in fields], tf.bool))

        return dataset.batch(BATCH).map(batch).unbatch()

    preprocess.__name__ = seqio.utils.function_name(reason)
    return preprocess


def at_least(field: str, minimum: float, key: str | None = None) -> Preprocessor:
    """A seqio preprocessor that keeps the examples whose `field` is a number that is no less than `minimum`.

    With a `key` the field is an object in JSON, and the number is what it has under the key. An example without a
    number there is left out. They are counted as `at_least_FIELD`, or `at_least_KEY`.
    """

    def at_least(value: bytes) -> str | None:
        number = _number(value, key)
        return None if number is not None and number >= minimum else f"at_least_{key or field}"

    return leave_out(at_least, field)


def highest(count: int, source: PieceSource, field: str, key: str | None = None) -> Preprocessor:
    """A seqio preprocessor that keeps the examples with the `count` highest numbers, and those equal to the last.

    Args:
        count: of the whole set, whatever its shards and splits.
        source: of the set, with no other fields than `field`: it is read once in each process that caches.
        field, key: as in `at_least`. What goes is counted as `highest_FIELD`, or `highest_KEY`.
    """

    @functools.cache
    def least(shards: tuple[str, ...]) -> float:
        """Of the numbers that are kept. Asked with the shards, which tell one data folder from another."""
        numbers = (_number(example[field], key) for example in source.examples("train"))
        kept = heapq.nlargest(count, (number for number in numbers if number is not None))
        return kept[-1] if len(kept) == count else -math.inf

    def preprocess(dataset: tf.data.Dataset) -> tf.data.Dataset:
        minimum = functools.cache(lambda: least(tuple(source.list_shards("train"))))

        def highest(value: bytes) -> str | None:
            number = _number(value, key)
            return None if number is not None and number >= minimum() else f"highest_{key or field}"

        return leave_out(highest, field)(dataset)

    preprocess.__name__ = "highest"
    return preprocess


def _number(value: bytes, key: str | None) -> float | None:
    try:
        number = json.loads(value)
    except ValueError:
        return None
    if key is not None:
        number = number.get(key) if isinstance(number, dict) else None
    return number if isinstance(number, int | float) and math.isfinite(number) else None


def _masked(examples: dict[str, tf.Tensor], kept: tf.Tensor) -> dict[str, tf.Tensor]:
    kept = tf.ensure_shape(kept, [None])
    return {name: tf.boolean_mask(values, kept) for name, values in examples.items()}


# ---- characters ------------------------------------------------------------------------------------------------------


def nfc(text: str) -> str:
    """Unicode's composed form: й is one character, not и and a breve."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


_LINE_ENDS = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_INVISIBLE = re.compile(  # without the joiners U+200C and U+200D, which other scripts and emoji need
    "[\x00-\x08\x0e-\x1b\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufdd0-\ufdef"
    "\ufeff\ufff9-\ufffb\ufffe\uffff]"
)


def strip_controls(text: str) -> str:
    """Without control characters, soft hyphens, marks of direction and width zero; every end of a line is \\n."""
    return _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))


def squeeze(text: str) -> str:
    """No spaces at the ends of lines, one blank line at most, none at either end of the text."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()


# ---- broken encodings ------------------------------------------------------------------------------------------------


def _characters(encoding: str) -> str:
    """What the bytes 0 to 255 are in an encoding; a byte that it leaves open is a control character, as in browsers."""
    return "".join(bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in range(256))


# Russian letters in UTF-8 are the bytes D0 or D1 and one of 80 to BF. Read as another encoding they give such pairs:
# in windows-1251 "Привет" is "РџСЂРёРІРµС‚". Read twice as a western one they begin with C2 or C3, as é does.
_LEADS = {"cp1251": "\xd0\xd1", "cp866": "\xd0\xd1", "koi8-r": "\xd0\xd1"}
_LEADS |= dict.fromkeys(("cp1252", "latin-1"), "\xc2\xc3\xd0\xd1")
_READ_AS = {name: _characters(name) for name in _LEADS}
_ENCODE = {name: codecs.charmap_build(characters) for name, characters in _READ_AS.items()}
_PAIRS = {
    name: re.compile(f"[{lead.translate(_READ_AS[name])}][{re.escape(_READ_AS[name][0x80:0xC0])}]")
    for name, lead in _LEADS.items()
}
_ANY_PAIR = re.compile("|".join(pattern.pattern for pattern in _PAIRS.values()))
# Those that no language has: without "С «", "Сё", "Січень" and the like.
_GENUINE = re.compile("[РСпя][\xa0«»„“”‘’–—…§©®°±№ёЁіїєґІЇЄҐўЎјЈљњћђѓќџѕЅ·²÷]")
_WESTERN = re.compile("[À-ÖØ-öø-ÿ]")  # windows-1251 read as windows-1252: "Привет" is "Ïðèâåò"
_LETTERS = re.compile(r"[^\W\d_]+")


def mend_encoding(text: str, min_pairs: int = 4, max_broken: float = 0.01) -> str | None:
    """Lines in which UTF-8 or windows-1251 was read as another encoding are mended where that is certain.

    A line is mended when all of it, in the wrong encoding, is UTF-8, with at least `min_pairs` Russian letters (a few
    times over, if need be); or when at least 4 of 5 letters, and 8 of them, are accented, which no language does.

    Args:
        text: a document.
        min_pairs: Russian letters that a line must have to be mended.
        max_broken: the document is left out when a greater share of its characters is still broken after that:
            U+FFFD, or both halves of such a letter.
    """
    if _ANY_PAIR.search(text) or _WESTERN.search(text):
        text = "\n".join(_mend_line(line, min_pairs) for line in text.split("\n"))
    pairs = sum(not _GENUINE.match(pair) for pair in _ANY_PAIR.findall(text))
    broken = text.count("\ufffd") + (2 * pairs if pairs >= min_pairs else 0)
    return text if broken <= max_broken * len(text) else None


def _mend_line(line: str, min_pairs: int) -> str:
    for _ in range(3):
        mended = next(filter(None, (_as_utf8(line, name, min_pairs) for name in _PAIRS)), None)
        if mended is None:
            break
        line = mended
    letters, western = sum(map(len, _LETTERS.findall(line))), len(_WESTERN.findall(line))
    if western < 8 or western < 0.8 * letters:
        return line
    try:
        return line.encode("cp1252").decode("cp1251")
    except UnicodeError:
        return line


def _as_utf8(line: str, read_as: str, min_pairs: int) -> str | None:
    if len(_PAIRS[read_as].findall(line)) < min_pairs:
        return None
    try:
        return codecs.charmap_encode(line, "strict", _ENCODE[read_as])[0].decode()
    except UnicodeError:
        return None


# ---- lines -----------------------------------------------------------------------------------------------------------

BOILERPLATE = (  # of a whole line, in any case
    r"(читать|узнать|показать) (далее|дальше|полностью|ещ[её]|больше|подробнее)[ .…→»]*",
    r"(поделиться|комментировать|ответить|нравится|распечатать|версия для печати|наверх|реклама)[ :.…]*",
    r"(комментари[ийев]+|просмотр(ы|ов)?|рейтинг)[ :]*\(?\d*\)?",
    r"(войти|вход|регистрация|зарегистрироваться|авторизация|главная)( *[|/·] *(войти|вход|регистрация|главная))*",
    r"(подписывайтесь|подпишитесь) на (наш|нас|канал|рассылку|новости).{0,120}",
    r".{0,80}(©|\(c\)|copyright).{0,80}(все права защищены|all rights reserved).{0,40}",
    r"(все права защищены|all rights reserved)[ .]*",
    r"(©|copyright\b).{0,100}",
    r".{0,120}(используе[тм]|uses?) (файлы )?cookies?\b.{0,200}",
    r".{0,40}(фото|видео|источник|текст): *(https?://\S+|риа новости|тасс|reuters|getty images)[ .]*",
    r"\[?править( *\| *править код)?\]?",
)
WIKIPEDIA = (r"(примечания|ссылки|литература|источники|см\. также|категория:.*)",)


@functools.cache
def _line_pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"^[^\S\n]{{0,20}}(?:{'|'.join(f'(?:{p})' for p in patterns)})[^\S\n]*(?:\n|\Z)", re.I | re.M)


def drop_lines(text: str, patterns: Sequence[str] = BOILERPLATE) -> str:
    """Without the lines that one of the regular expressions matches from end to end, in any case."""
    return _line_pattern(tuple(patterns)).sub("", text)


_FENCE = re.compile(r"^[ \t]*(```|~~~)[^\n]*\n(.*?)(?:^[ \t]*\1[^\n]*(?:\n|\Z)|\Z)", re.M | re.S)
_MARKDOWN = tuple(
    (re.compile(pattern, re.M), replacement)
    for pattern, replacement in (
        (r"<!--(?s:.*?)-->|</?[a-zA-Z][^<>\n]{0,300}>", ""),  # HTML
        (r"!\[[^\]\n]{0,500}\]\([^)\n]{0,2000}\)", ""),  # images
        (r"\[([^\]\n]{0,500})\]\([^)\n]{0,2000}\)", r"\1"),  # links
        (r"\[([^\]\n]{1,500})\]\[[^\]\n]{0,500}\]", r"\1"),
        (r"^ {0,3}\[[^\]\n]{1,500}\]:[ \t]*\S+.*$", ""),  # where links lead
        (r"<(https?://[^>\s]+)>", r"\1"),
        (r"^ {0,3}(?:[-*_][ \t]*){3,}$", ""),  # rules
        (r"^ {0,3}=+[ \t]*$", ""),
        (r"^ {0,3}#{1,6}[ \t]+", ""),  # headings
        (r"^(?: {0,3}>[ \t]?)+", ""),  # quotes
        (r"(\*\*|__)(?=\S)([^\n]{0,500}?\S)\1", r"\2"),  # bold
        (r"(?<![\w*])\*(?=[^\s*])([^*\n]*?[^\s*])\*(?![\w*])", r"\1"),
        (r"(?<![\w_])_(?=[^\s_])([^_\n]*?[^\s_])_(?![\w_])", r"\1"),
        (r"(`+)([^`\n]+)\1", r"\2"),  # code in a line
        (r"\\([\\`*_{}\[\]()#+\-.!>~|])", r"\1"),  # escapes
    )
)


def markdown_to_text(text: str) -> str:
    """Without markdown's and HTML's marks, images and addresses of links; blocks of code stay as they are."""
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_unmark(text[end : fence.start()]), fence[2]]
        end = fence.end()
    return "".join([*parts, _unmark(text[end:])])


def _unmark(text: str) -> str:
    for pattern, replacement in _MARKDOWN:
        text = pattern.sub(replacement, text)
    return text


# ---- documents -------------------------------------------------------------------------------------------------------

CYRILLIC, LATIN = "Ѐ-ԯ", "A-Za-zÀ-ÖØ-öø-ɏ"  # ranges, as in a regular expression's [...]


def enough_letters(text: str, letters: str = CYRILLIC, min_share: float = 0.5) -> str | None:
    """None where fewer than `min_share` of the letters are among `letters`, and where there are none."""
    every = sum(map(len, _LETTERS.findall(text)))
    ours = sum(map(len, re.findall(f"[{letters}]+", text)))
    return text if every and ours >= min_share * every else None


def length_within(text: str, min_chars: int = 200, max_chars: int = 1_000_000) -> str | None:
    """None for a text that is shorter or longer, in characters."""
    return text if min_chars <= len(text) <= max_chars else None
