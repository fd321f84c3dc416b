"""A SentencePiece model as Hugging Face's tokenizer.json: the same ids for the same text, with sentinels and modes.

`tokenizers` builds a tokenizer from five parts. What each does here to give the ids of `Vocabulary.encode`:

- normalizer: SentencePiece's character map (charsmap.py); spaces squeezed and stripped; a space put in front; "▁" for
  spaces; and the space before a sentinel taken away, since the sentinel's piece is "▁<extra_id_0>".
- added tokens: sentinels and mode tokens, found in the *normalized* text, as SentencePiece finds user-defined pieces.
  Found in the raw text they would cut it into parts that are each stripped and prefixed.
- pre-tokenizer: a cut before each "▁". It changes no id, since no piece crosses it, and makes the cache work.
- model: Unigram with the model's scores, or BPE with merges ranked by the score of what they make.
- decoder: the reverse.

Three things differ, the first two as in every Hugging Face tokenizer: `</s>`, `<pad>` and `<unk>` written in a text
become those ids; a sentinel is found without a space before it, too ("(<extra_id_0>)"); and a text that is nothing but
a mode token whose piece has no "▁" becomes that one id, where SentencePiece puts a lone "▁" before it.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
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


def write(vocabulary: Vocabulary, folder: Path) -> None:
    """Writes spiece.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`.

    Raises:
        UserError: the SentencePiece model has something that tokenizer.json cannot say; the line names it.
    """
    tokenizer = tokenizer_json(vocabulary)
    pad, eos, unk = (vocabulary.piece(i) for i in (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id))
    sentinels = [f"<extra_id_{i}>" for i in range(vocabulary.extra_ids)]
    named = {"pad_token": pad, "eos_token": eos, "unk_token": unk}
    others = [*sentinels, *(name for name in _added(vocabulary) if name not in sentinels)]
    config = {
        # Not T5Tokenizer: that class rebuilds its parts from the list of pieces and drops the normalizer and the bytes.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": others,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in tokenizer["added_tokens"]
        },
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "spiece.model").write_bytes(vocabulary.model_bytes)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {**named, "additional_special_tokens": others})


def write_json(path: Path, value: Any) -> None:
    """Indented UTF-8, as Hugging Face's libraries write their files."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of tokenizer.json. Raises UserError as `write` does."""
    model = _proto.ModelProto.FromString(vocabulary.model_bytes)
    _check(vocabulary, model)
    added = _added(vocabulary)
    pad, eos, unk = (vocabulary.piece(i) for i in (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id))
    ids = {vocabulary.pad_id: pad, vocabulary.eos_id: eos, vocabulary.unk_id: unk}
    ids |= {id: name for name, id in added.items()}
    words = all(SPACE not in piece.piece[1:] for piece in model.pieces if piece.type == _NORMAL)
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": eos, "type_id": 0}}
    pair = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(name, id, name in added) for id, name in sorted(ids.items())],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(vocabulary, model)},
        "pre_tokenizer": (
            {"type": "Split", "pattern": {"String": SPACE}, "behavior": "MergedWithNext", "invert": False}
            if words
            else None
        ),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text, end],
            "pair": [text, end, pair, end],
            "special_tokens": {eos: {"id": eos, "ids": [vocabulary.eos_id], "tokens": [eos]}},
        },
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
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


def _added(vocabulary: Vocabulary) -> dict[str, int]:
    """Mode tokens and sentinels: name -> id. A piece "▁[NLU]" is the token "[NLU]" with the space before it."""
    modes = {piece.removeprefix(SPACE): vocabulary.mode_id(piece) for piece in vocabulary.mode_tokens}
    return modes | {f"<extra_id_{i}>": vocabulary.sentinel(i) for i in range(vocabulary.extra_ids)}


def _added_token(name: str, id: int, in_normalized_text: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": in_normalized_text, "special": True}
    return {"id": id, "content": name, **flags}


def _normalizers(vocabulary: Vocabulary, model: Any) -> list[dict[str, Any]]:
    spec, added = model.normalizer_spec, _added(vocabulary)
    steps = charsmap.normalizers(model)
    if spec.remove_extra_whitespaces:
        steps.append(charsmap.replace(rf"\A +|[ {SPACE}]+\z| +(?= )", ""))
    if spec.add_dummy_prefix:
        # `tokenizers` normalizes the names of added tokens too, in order to find them: those stay as they are.
        steps.append(charsmap.replace(rf"\A(?!(?:{_any_of(added)})?\z)", SPACE))
    steps.append(charsmap.replace_string(" ", SPACE))
    bare = {piece for piece in vocabulary.mode_tokens if not piece.startswith(SPACE)}
    if spaced := added.keys() - bare:
        steps.append(charsmap.replace(f"{SPACE}(?={_any_of(spaced)})", ""))
    return steps


def _any_of(names: Iterable[str]) -> str:
    """A regular expression of any of the names; what the sentinels share is said once, or matching would be slow."""
    prefix = "<extra_id_"
    numbers = sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    others = sorted(re.escape(name) for name in names if not name.startswith(prefix))
    return "|".join([*others, *([f"{prefix}(?:{'|'.join(numbers)})"] if numbers else [])])


def _decoders(model: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        charsmap.replace_string(SPACE, " "),
        charsmap.replace_string("<extra_id_", " <extra_id_"),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    spec = model.normalizer_spec
    if leading := _ALL if spec.remove_extra_whitespaces else int(spec.add_dummy_prefix):
        steps.append({"type": "Strip", "content": " ", "start": leading, "stop": 0})
    return steps


def _model(vocabulary: Vocabulary, model: Any) -> dict[str, Any]:
    byte_fallback = model.trainer_spec.byte_fallback
    names = [p.piece.removeprefix(SPACE) if p.type == _USER_DEFINED else p.piece for p in model.pieces]
    names += [f"<extra_id_{i}>" for i in reversed(range(vocabulary.extra_ids))]
    if model.trainer_spec.model_type == _UNIGRAM:
        scores = [p.score if p.type == _NORMAL else _NEVER for p in model.pieces] + [_NEVER] * vocabulary.extra_ids
        pieces = [list(pair) for pair in zip(names, scores, strict=True)]
        return {"type": "Unigram", "unk_id": vocabulary.unk_id, "vocab": pieces, "byte_fallback": byte_fallback}
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
        "merges": _merges(model),
    }


def _merges(model: Any) -> list[tuple[str, str]]:
    """All pairs that make a piece, the piece with the highest score first: SentencePiece merges any such pair."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    order = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
    cuts = ((piece[:i], piece[i:]) for piece in order for i in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in scores and right in scores]
