"""What of a text is translated, what must come through untouched, and whether a translation can be trusted.

A text is cut into units, sentences mostly, and what stands between them: line breaks, indents, bullets, the letters of
answer options, blocks of code. Only units go to the model. Inside a unit placeholders, tags, URLs and code are masked;
a model that loses a mask is given what stands between them, piece by piece. So layout, options and placeholders are
the source's by construction, and `defect` checks what a construction cannot promise.
"""

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from string import ascii_uppercase
from typing import NamedTuple

SCRIPTS = {  # ISO 15924 -> the first word of the names that Unicode gives its letters
    "Arab": "ARABIC",
    "Armn": "ARMENIAN",
    "Beng": "BENGALI",
    "Cyrl": "CYRILLIC",
    "Deva": "DEVANAGARI",
    "Ethi": "ETHIOPIC",
    "Geor": "GEORGIAN",
    "Grek": "GREEK",
    "Hang": "HANGUL",
    "Hans": "CJK",
    "Hant": "CJK",
    "Hebr": "HEBREW",
    "Latn": "LATIN",
    "Taml": "TAMIL",
    "Thai": "THAI",
}
# Reasons to reject a translation, in the order of the checks.
REASONS = {
    "empty": "nothing but spaces",
    "cut": "the model had not finished at its limit of tokens",
    "placeholders": "a placeholder, tag, URL or piece of code is lost, changed or new",
    "lines": "another number of lines",
    "options": "the letters of the options differ, or the answer is no longer one of them",
    "numbers": "other digits",
    "script": "too few letters of the target's script",
    "copy": "not translated",
    "length": "much shorter or longer than the source",
    "repetition": "the model repeats itself",
}
MIN_SCRIPT = 0.5  # share of letters
MAX_RATIO = 3.0  # of lengths, either way; texts whose lengths differ by less than FREE characters are not judged
FREE = 25
FEW_LETTERS = 12  # a name may stay as it is


class Unit(NamedTuple):
    """A part of a text that is to be translated: a sentence, or a part of one that is too long. No spaces around it."""

    text: str


Part = Unit | str  # what is no unit comes through as it is


class Masked(NamedTuple):
    """A unit for the model. Its protected parts are capital letters: XXXA, XXXB, …

    Of what people have tried, letters with a letter as number come through best; <0> and 1_1 are mangled.
    """

    text: str
    masks: list[str]
    parts: list[str]


_PROTECTED = re.compile(
    r"""
    ```.*?```                                   # code
    | `[^`\n]+`
    | \{\{.*?\}\} | \$?\{[^{}\n]*\}             # {{ template }}, ${x}, {x}
    | %\(\w+\)[sdifg] | %[sdifg]\b              # %(name)s, %d
    | </?[A-Za-z][^<>\n]*>                      # <extra_id_0>, tags
    | \[\[.*?\]\] | \[[A-Z0-9_]+\]              # [[x]], [MASK]
    | (?:https?://|www\.)[^\s<>"»]*[^\s<>"».,;:!?)\]}'’]
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    """,
    re.VERBOSE | re.DOTALL,
)
_FENCE = re.compile(r"^[^\S\n]*```.*?^[^\S\n]*```[^\S\n]*$", re.DOTALL | re.MULTILINE)
# Begins a line and is no text: an indent, bullets, and the letter or number of an option or a list.
_LEAD = re.compile(r"\s*(?:[-*+•>#]+\s+)*(?:(?:\(?[A-Za-z]\)|[A-Z][.:]|\(?\d{1,3}[.)])(?:\s+|$))?")
# The letter of an option inside a line: "(a) yes (b) no". One alone may be a reference.
_OPTION = re.compile(r"(?<!\S)(?:\([A-Za-z]\)|[A-Za-z]\))(?=\s)")
# Words that end in a full stop and no sentence; nor does a single capital letter.
_NO_END = re.compile(r"(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|cf|No|Fig|U\.S|U\.K|a\.m|p\.m|Inc|Ltd|Co|[A-Z])\.")
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*(?P<space>\s+)(?=[\"'“‘«(\[]?[^\W_a-zа-яё])")
_CLAUSE_ENDS = (r"(?<=[;:])\s+", r"(?<=,)\s+", r"\s+")
_DIGITS = re.compile(r"\d+")
_WORD = re.compile(r"[^\W\d_]+")
_LOOP = re.compile(r"(.{2,60}?)\1{4,}", re.DOTALL)


def split_text(text: str, fits: Callable[[str], bool] = lambda unit: True) -> list[Part]:
    """The parts of a text: joined, they are the text.

    Args:
        text: several lines, of any kind.
        fits: whether the model takes a unit whole; one that it does not is cut further, at a clause or a space.
    """
    parts: list[Part] = []
    end = 0
    for fence in _FENCE.finditer(text):
        parts += _split_lines(text[end : fence.start()], fits)
        parts.append(fence[0])
        end = fence.end()
    return [*parts, *_split_lines(text[end:], fits)]


def _split_lines(text: str, fits: Callable[[str], bool]) -> Iterator[Part]:
    for line in text.splitlines(keepends=True):
        for piece in _pieces(line):
            lead = _LEAD.match(piece)
            assert lead  # it matches the empty text
            yield lead[0]
            yield from _split_sentences(piece[lead.end() :], fits)


def _split_sentences(text: str, fits: Callable[[str], bool]) -> Iterator[Part]:
    start = 0
    protected = [match.span() for match in _PROTECTED.finditer(text)]
    for match in _SENTENCE_END.finditer(text):
        word = text[start : match.start()].rpartition(" ")[2].lstrip("(\"'")
        if _NO_END.fullmatch(word) or any(a < match.start("space") < b for a, b in protected):
            continue
        yield from _fitting(text[start : match.start("space")], fits)
        yield match["space"]
        start = match.end()
    yield from _fitting(text[start:], fits)


def _fitting(text: str, fits: Callable[[str], bool]) -> Iterator[Part]:
    """Units of a sentence that the model takes whole, and the spaces between and after them."""
    sentence = text.strip()
    if not needs_translation(sentence):
        yield text
        return
    start = text.index(sentence)
    yield text[:start]
    if fits(mask(sentence).text):
        yield Unit(sentence)
    elif (cut := _middle(sentence)) is None:  # one word: a model cannot translate a part of it
        yield sentence
    else:
        yield from _fitting(sentence[:cut], fits)
        yield from _fitting(sentence[cut:], fits)
    yield text[start + len(sentence) :]


def _middle(sentence: str) -> int | None:
    """Where to cut a sentence: between clauses, or else at a space, the nearest to its middle."""
    protected = [match.span() for match in _PROTECTED.finditer(sentence)]
    for ends in _CLAUSE_ENDS:
        places = [match.end() for match in re.finditer(ends, sentence)]
        places = [place for place in places if not any(start < place < end for start, end in protected)]
        if places:
            return min(places, key=lambda place: abs(2 * place - len(sentence)))
    return None


def needs_translation(text: str) -> bool:
    """Whether a text has a word outside of what is protected; a letter alone is none (the option "B")."""
    return any(len(word) > 1 for word in _WORD.findall(_PROTECTED.sub(" ", text)))


def mask(unit: str) -> Masked:
    """A mask in place of each protected part. The name of the masks is one that the unit does not have."""
    parts = _PROTECTED.findall(unit)
    name = next(name for name in ("X" * length for length in range(3, len(unit) + 4)) if name not in unit)
    width = next(width for width in itertools.count(1) if len(parts) <= len(ascii_uppercase) ** width)
    letters = ("".join(letters) for letters in itertools.product(ascii_uppercase, repeat=width))
    masks = [f"{name}{letter}" for letter in itertools.islice(letters, len(parts))]
    remaining = iter(masks)
    return Masked(_PROTECTED.sub(lambda _: next(remaining), unit), masks, parts)


def unmask(translation: str, masked: Masked) -> str | None:
    """A translation with its protected parts; None where it has not each mask just once."""
    if not masked.parts:
        return translation
    originals = dict(zip(masked.masks, masked.parts, strict=True))
    pattern = re.compile("|".join(masked.masks))
    if sorted(pattern.findall(translation)) != sorted(masked.masks):
        return None
    return pattern.sub(lambda match: originals[match[0]], translation)


def split_at_protected(unit: str) -> list[Part]:
    """What stands between the protected parts of a unit, as units: for a model that loses masks."""
    parts: list[Part] = []
    end = 0
    for match in _PROTECTED.finditer(unit):
        parts += [*_fitting(unit[end : match.start()], lambda _: True), match[0]]
        end = match.end()
    return [*parts, *_fitting(unit[end:], lambda _: True)]


def defects(source: str, translation: str, script: str) -> Iterator[str]:
    """Why a translation is not to be trusted: of REASONS all that apply but "cut", in their order.

    Args:
        script: the target's, a key of SCRIPTS.
    """
    if source.strip() and not translation.strip():
        yield "empty"
        return
    if Counter(_PROTECTED.findall(source)) != Counter(_PROTECTED.findall(translation)):
        yield "placeholders"
    if len(source.splitlines()) != len(translation.splitlines()):
        yield "lines"
    if _OPTION.findall(source) != _OPTION.findall(translation) or len(options(source)) != len(options(translation)):
        yield "options"
    source, translation = (_PROTECTED.sub(" ", _FENCE.sub("", text)) for text in (source, translation))
    if not _same_numbers(source, translation):
        yield "numbers"
    letters = [letter for letter in translation if letter.isalpha()]
    judged = sum(map(str.isalpha, source)) >= FEW_LETTERS and len(letters) >= FEW_LETTERS
    if judged and sum(_script(letter) == SCRIPTS[script] for letter in letters) < MIN_SCRIPT * len(letters):
        yield "script"
    words = _WORD.findall(source)
    if source.split() == translation.split() and any(len(word) > 2 and word.islower() for word in words):
        yield "copy"
    lengths = sorted((len(source), len(translation)))
    if lengths[1] - lengths[0] > FREE and lengths[1] > MAX_RATIO * lengths[0]:
        yield "length"
    if _repeats(translation) and not _repeats(source):
        yield "repetition"


def lost_option(inputs: str, targets: str, new_inputs: str, new_targets: str) -> bool:
    """Whether the targets were one of the options of the inputs, and their translation is not that option's."""
    choices = [_plain(option) for option in options(inputs)]
    if _plain(targets) not in choices:
        return False
    translated = [_plain(option) for option in options(new_inputs)]
    return _plain(new_targets) != translated[choices.index(_plain(targets))]


def options(text: str) -> list[str]:
    """What stands after the letters or bullets of options and lists, to the end of the line or the next letter."""
    found = []
    for line in text.splitlines():
        for piece in _pieces(line):
            lead = _LEAD.match(piece)
            if lead and lead[0].strip():
                found.append(piece[lead.end() :].strip())
    return found


def _pieces(line: str) -> list[str]:
    """A line, cut before each letter of an option where there are several."""
    starts = [match.start() for match in _OPTION.finditer(line)]
    starts = [0, *(start for start in starts if start)] if len(starts) > 1 else [0]
    return [line[start:stop] for start, stop in zip(starts, [*starts[1:], len(line)], strict=True)]


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()


def _same_numbers(source: str, translation: str) -> bool:
    """The same digits; 1,000 may become 1 000 or 1000, and 3.5 become 3,5."""
    ours, theirs = _DIGITS.findall(source), _DIGITS.findall(translation)
    return Counter(ours) == Counter(theirs) or "".join(ours) == "".join(theirs)


@functools.cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


def _repeats(text: str) -> bool:
    """The same phrase five times in a row, or a long text of few different phrases."""
    if any(_WORD.search(match[1]) for match in _LOOP.finditer(text)):
        return True
    words = text.split()
    phrases = list(zip(words, words[1:], words[2:], strict=False))
    return len(phrases) >= 30 and len(set(phrases)) < 0.4 * len(phrases)
