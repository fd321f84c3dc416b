"""A SentencePiece model as Hugging Face's tokenizer.json: the same ids for the same text, with sentinels and modes.

`tokenizers` builds a tokenizer from five parts. What each does here to give the ids of `Vocabulary.encode`:

- normalizer: SentencePiece's character map (charsmap.py); spaces squeezed and stripped; a space put in front; "▁" for
  spaces; and the space before a sentinel or a mode token taken away, since their pieces are "▁<extra_id_0>", "▁[NLU]".
  One with no space before it ("(<extra_id_0>)") is text to SentencePiece: a mark inside hides it from the next part.
- added tokens: sentinels and mode tokens, found in the *normalized* text, as SentencePiece finds user-defined pieces.
  Found in the raw text they would cut it into parts that are each stripped and prefixed.
- pre-tokenizer: takes the mark out, which cuts the text there, and cuts before each "▁". Neither changes an id, since
  no piece crosses the cut; the second makes the cache work.
- model: Unigram with the model's scores, or BPE with merges ranked by the score of what they make.
- decoder: the reverse.

What differs: `</s>`, `<pad>` and `<unk>` written in a text become those ids, as in every Hugging Face tokenizer. In one
text of more than some 30,000 letters, SentencePiece's Unigram adds scores up in float32, so that two segmentations
whose scores differ by less than its step (0.004 there) are a toss-up to it; exact ties are decided alike. And in
vocabularies whose mode tokens are pieces without "▁" (`train_vocabulary` makes none), a text that is nothing but such a
token becomes that one id, where SentencePiece puts a lone "▁" before it: `tokenizers` normalizes the name of an added
token to know what to look for, so a text equal to the name is always found whole.
"""

import re
from collections.abc import Iterable
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from conversion import charsmap
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError

SPACE = "▁"
_proto: Any = sentencepiece_model_pb2  # its classes are made at import, without stubs
_NORMAL, _USER_DEFINED, _UNUSED = (
    getattr(_proto.ModelProto.SentencePiece, kind) for kind in ("NORMAL", "USER_DEFINED", "UNUSED")
)
_UNIGRAM, _BPE = _proto.TrainerSpec.UNIGRAM, _proto.TrainerSpec.BPE
# Of byte and control pieces: Unigram looks every piece up in the text, and a text "<0x41>" is not the byte 0x41.
_NEVER = -1e4
_ALL = 1 << 16  # leading spaces that a decoder strips
_SENTINEL = "<extra_id_"
_HIDDEN = "\ufdd2"  # never assigned by Unicode, as charsmap's two: no text has it


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of tokenizer.json.

    Raises:
        UserError: the SentencePiece model has something that tokenizer.json cannot say; the line names it.
    """
    model = _proto.ModelProto.FromString(vocabulary.model_bytes)
    _check(vocabulary, model)
    added = added_tokens(vocabulary)
    pad, eos, unk = (vocabulary.piece(i) for i in (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id))
    ids = {vocabulary.pad_id: pad, vocabulary.eos_id: eos, vocabulary.unk_id: unk}
    ids |= {id: name for name, id in added.items()}
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": eos, "type_id": 0}}
    pair = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(name, id, name in added) for id, name in sorted(ids.items())],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(vocabulary, model)},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _pre_tokenizers(vocabulary, model)},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text, end],
            "pair": [text, end, pair, end],
            "special_tokens": {eos: {"id": eos, "ids": [vocabulary.eos_id], "tokens": [eos]}},
        },
        "decoder": {"type": "Sequence", "decoders": _decoders(vocabulary, model)},
        "model": _model(vocabulary, model),
    }


def _check(vocabulary: Vocabulary, model: Any) -> None:
    kind = model.trainer_spec.model_type
    unsupported = {
        f"model type {_proto.TrainerSpec.ModelType.Name(kind)}": kind not in (_UNIGRAM, _BPE),
        "escape_whitespaces=false": not model.normalizer_spec.escape_whitespaces,
        "treat_whitespace_as_suffix": model.trainer_spec.treat_whitespace_as_suffix,
        "unused pieces": any(piece.type == _UNUSED for piece in model.pieces),
    }
    for name, present in unsupported.items():
        if present:
            raise UserError(
                f"vocabulary {vocabulary.sentencepiece_model_file!r}: {name} cannot be written in tokenizer.json;"
                " export needs a unigram or BPE model with SentencePiece's usual spaces"
            )


def added_tokens(vocabulary: Vocabulary) -> dict[str, int]:
    """Mode tokens and sentinels: name -> id."""
    modes = {name: vocabulary.mode_id(name) for name in vocabulary.mode_tokens}
    return modes | {f"<extra_id_{i}>": vocabulary.sentinel(i) for i in range(vocabulary.num_sentinels)}


def _added_token(name: str, id: int, in_normalized_text: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": in_normalized_text, "special": True}
    return {"id": id, "content": name, **flags}


def _normalizers(vocabulary: Vocabulary, model: Any) -> list[dict[str, Any]]:
    spec, added, spaced = model.normalizer_spec, added_tokens(vocabulary), _spaced(vocabulary, model)
    steps = charsmap.normalizers(model)
    if spec.remove_extra_whitespaces:
        steps.append(charsmap.replace(rf"\A +|[ {SPACE}]+\z| +(?= )", ""))
    if spec.add_dummy_prefix:
        # `tokenizers` normalizes the names of added tokens too, in order to find them: those stay as they are.
        steps.append(charsmap.replace(rf"\A(?!(?:{_any_of(added)})?\z)", SPACE))
    steps.append(charsmap.replace_string(" ", SPACE))
    pieces = [piece.piece for piece in model.pieces[: vocabulary.last_sentinel] if piece.type == _NORMAL]
    for prefix in _prefixes(spaced):
        if place := _hiding_place(prefix, pieces, model.trainer_spec.byte_fallback):
            before, after = re.escape(prefix[:place]), _any_of(n for n in spaced if n.startswith(prefix))
            steps.append(charsmap.replace(rf"(?<=[^{SPACE}]{before})(?={after.removeprefix(before)})", _HIDDEN))
    if spaced:
        steps.append(charsmap.replace(f"{SPACE}(?={_any_of(spaced)})", ""))
    return steps


def _spaced(vocabulary: Vocabulary, model: Any) -> set[str]:
    """The added tokens whose pieces begin with a "▁" that their names leave out."""
    bare = {piece.piece for piece in model.pieces if piece.type == _USER_DEFINED}
    return added_tokens(vocabulary).keys() - bare


def _prefixes(names: Iterable[str]) -> list[str]:
    """What the names begin with: of the sentinels what they share, of others the whole name."""
    return sorted({_SENTINEL if name.startswith(_SENTINEL) else name for name in names})


def _any_of(names: Iterable[str]) -> str:
    """A regular expression of any of the names; what the sentinels share is said once, or matching would be slow."""
    names = list(names)
    numbers = sorted(name.removeprefix(_SENTINEL) for name in names if name.startswith(_SENTINEL))
    others = sorted(re.escape(name) for name in names if not name.startswith(_SENTINEL))
    return "|".join([*others, *([f"{_SENTINEL}(?:{'|'.join(numbers)})"] if numbers else [])])


def _hiding_place(name: str, pieces: Iterable[str], byte_fallback: bool) -> int | None:
    """Where a name can be cut and give the same ids: no piece holds what stands on both sides of the cut, nor is it
    between two unknown letters, which are one unknown piece.

    None where there is no such place: then the name is found without a space before it, too.
    """
    known = set(pieces)
    for place in range(1, len(name)):
        left, right = name[place - 1], name[place]
        if (byte_fallback or known & {left, right}) and not any(left + right in piece for piece in known):
            return place
    return None


def _pre_tokenizers(vocabulary: Vocabulary, model: Any) -> list[dict[str, Any]]:
    split = {"type": "Split", "invert": False}
    steps = [{**split, "pattern": {"String": _HIDDEN}, "behavior": "Removed"}]
    if all(SPACE not in piece.piece[1:] for piece in model.pieces if piece.type == _NORMAL):
        steps.append({**split, "pattern": {"String": SPACE}, "behavior": "MergedWithNext"})
    return steps


def _decoders(vocabulary: Vocabulary, model: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        charsmap.replace_string(SPACE, " "),
        *(charsmap.replace_string(prefix, f" {prefix}") for prefix in _prefixes(_spaced(vocabulary, model))),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    spec = model.normalizer_spec
    if leading := _ALL if spec.remove_extra_whitespaces else int(spec.add_dummy_prefix):
        steps.append({"type": "Strip", "content": " ", "start": leading, "stop": 0})
    return steps


def _model(vocabulary: Vocabulary, model: Any) -> dict[str, Any]:
    byte_fallback = model.trainer_spec.byte_fallback
    pieces = model.pieces[: vocabulary.last_sentinel]
    names = [p.piece.removeprefix(SPACE) if p.type == _USER_DEFINED else p.piece for p in pieces]
    names += [f"<extra_id_{i}>" for i in reversed(range(vocabulary.num_sentinels))]
    if model.trainer_spec.model_type == _UNIGRAM:
        scores = [p.score if p.type == _NORMAL else _NEVER for p in pieces] + [_NEVER] * vocabulary.num_sentinels
        scored = [list(pair) for pair in zip(names, scores, strict=True)]
        return {"type": "Unigram", "unk_id": vocabulary.unk_id, "vocab": scored, "byte_fallback": byte_fallback}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary.piece(vocabulary.unk_id),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": {name: id for id, name in enumerate(names)},
        "merges": merges(model),
    }


def merges(model: Any) -> list[tuple[str, str]]:
    """All pairs that make a piece, the piece with the highest score first: SentencePiece merges any such pair.

    Of pairs whose pieces have one score, SentencePiece takes the first in the text. Ranks cannot say that; but where
    such pieces are runs of one character, as Mistral's of "▁", the first is the one with the longest left side.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    cuts = ((piece[:i], piece[i:]) for piece in scores for i in range(1, len(piece)))
    pairs = [(left, right) for left, right in cuts if left in scores and right in scores]
    return sorted(pairs, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0])))
