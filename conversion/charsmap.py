"""SentencePiece's character map as normalizers of Hugging Face's `tokenizers`, equal on combining marks too.

SentencePiece replaces the longest source sequence of its map at each place ("и" + U+0306 becomes "й"; U+00BD becomes
"1⁄2"). `tokenizers` has a normalizer for the same binary map, but it looks at grapheme clusters: in "½" + U+0301 it
drops the mark, and in "ё" + U+0301 written with three code points it composes nothing. Two facts about the maps that
SentencePiece ships (nfkc, nmt_nfkc and their case folds) give the same text by other means: a longer source becomes
the NFC form of what its code points become one by one, and beyond its first code point it consists of marks, which
NFC reorders and composes only where nothing stands between. So:

1. SOFT is written before each mark that SentencePiece would take together with what precedes it, HARD before others;
2. the map is applied: every cluster is now one code point;
3. SOFT is removed, the text is composed (NFC), and HARD is removed.

Conjoining Hangul, the other kind of longer source, has no marks and is composed by NFC alone.
"""

import base64
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import sentencepiece

from vikhr_t5.errors import UserError

# Two of the code points that Unicode promises never to assign: no text has them.
_HARD, _SOFT = "\ufdd0", "\ufdd1"


def normalizers(model: Any) -> list[dict[str, Any]]:
    """The steps of tokenizer.json's normalizer that do what the model's character map does (none without a map).

    Args:
        model: a SentencePiece `ModelProto`.

    Raises:
        UserError: the map has rules of the model's own making that these steps cannot express.
    """
    charsmap = model.normalizer_spec.precompiled_charsmap
    if not charsmap:
        return []
    rules = dict(sentencepiece.SentencePieceNormalizer(model_proto=model).Decompile())
    longer = [source for source in rules if len(source) > 1]
    for source in longer:
        composed = unicodedata.normalize("NFC", "".join(rules.get(c, c) for c in source))
        # With marks: the case folds' decomposed "İ" and iota subscripts. Beyond the BMP: scripts too new for NFC.
        if composed != rules[source] and not _only_marks(source[1:]) and ord(max(source)) < 0x10000:
            raise UserError(
                f"the vocabulary's normalization rule {source!r} -> {rules[source]!r} cannot be written in"
                " tokenizer.json; train the vocabulary with SentencePiece's nmt_nfkc, nfkc or identity rules"
            )
    precompiled = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    if not longer:
        return [precompiled]
    return [
        replace(_inside_a_source(longer), _SOFT),
        replace(rf"(?=[\p{{M}}\x{{200c}}\x{{200d}}\n])(?<=[^{_class(_SOFT)}])", _HARD),
        precompiled,
        replace_string(_SOFT, ""),
        {"type": "NFC"},
        replace_string(_HARD, ""),
    ]


def replace(pattern: str, content: str) -> dict[str, Any]:
    """A step that replaces each match of a regular expression (Oniguruma's syntax) by `content`."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def replace_string(string: str, content: str) -> dict[str, Any]:
    """A step that replaces each occurrence of a string."""
    return {"type": "Replace", "pattern": {"String": string}, "content": content}


def _inside_a_source(sources: Iterable[str]) -> str:
    """An empty match before each mark that some source has after what stands there before it."""
    after: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # marks between, mark -> bases
    for source in sources:
        if _only_marks(source[1:]):
            after[source[1:-1]][source[-1]].add(source[0])
    cases = []
    for between, bases_of in after.items():
        marks_of: dict[frozenset[str], set[str]] = defaultdict(set)
        for mark, bases in bases_of.items():
            marks_of[frozenset(bases)].add(mark)
        middle = "".join(map(_class, between))
        cases += [f"(?<={_class(*bases)}{middle}){_class(*marks)}" for bases, marks in marks_of.items()]
    return rf"(?=\p{{M}})(?={'|'.join(sorted(cases))})"


def _only_marks(text: str) -> bool:
    return all(unicodedata.category(c).startswith("M") for c in text)


def _class(*characters: str) -> str:
    r"""("a", "b", "c", "x") -> "[\x{61}-\x{63}\x{78}]"; one character -> "\x{61}"."""
    codes = sorted(map(ord, characters))
    if len(codes) == 1:
        return f"\\x{{{codes[0]:x}}}"
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(f"\\x{{{a:x}}}" + (f"-\\x{{{b:x}}}" if b > a else "") for a, b in ranges) + "]"
