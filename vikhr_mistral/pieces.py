"""SentencePiece models: opening them, what Mistral's must be like for ours to extend it, which of its pieces are of a
script, and which are reachable.

A piece is reachable when encoding its own text gives it. No other test is needed: where a piece comes out of a longer
text, only merges inside it happened, in the order in which they happen when it stands alone. So a piece that is not
reachable comes out of no text, nor is it a step on the way to a longer one.
"""

import functools
import importlib.resources
import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from vikhr_t5.errors import UserError, nearest

SPACE = "▁"
MISTRAL = "mistral"
FILE = "tokenizer.model"
ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # made at import, without stubs
TrainerSpec: Any = sentencepiece_model_pb2.TrainerSpec  # type: ignore[attr-defined]
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    getattr(ModelProto.SentencePiece, kind) for kind in ("NORMAL", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE")
)


def open_model(source: str | os.PathLike[str]) -> Any:
    """The SentencePiece `ModelProto` of a .model file, of a folder with tokenizer.model, or of "mistral": the 32,000
    pieces of Mistral-7B-v0.1, as the package mistral-common has them.

    Raises:
        UserError: there is no such file, or it is no SentencePiece model.
    """
    if os.fspath(source) == MISTRAL:
        path = _of_mistral_common()
    else:
        path = Path(source).expanduser()
        path = path / FILE if path.is_dir() else path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a SentencePiece model, or a folder with {FILE}") from error
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise UserError(f"{path} is not a SentencePiece model, or not whole: copy it again") from error
    if not model.pieces or not model.HasField("trainer_spec"):
        raise UserError(f"{path} is not a SentencePiece model: give Mistral's {FILE}, or one like it")
    return model


def _of_mistral_common() -> Path:
    try:
        return Path(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"))
    except ModuleNotFoundError as error:
        raise UserError(
            "Mistral's tokenizer comes with mistral-common: pip install 'vikhr-t5[mistral]', or give a tokenizer.model"
        ) from error


def check_base(model: Any, name: str) -> None:
    """Refuses a base that cannot be extended without a change to how it reads its old text.

    Raises:
        UserError: it is not BPE with byte fallback and unchanged text, as Mistral's and Llama's are.
    """
    kind, spec = model.trainer_spec, model.normalizer_spec
    if kind.model_type != TrainerSpec.BPE:
        found = TrainerSpec.ModelType.Name(kind.model_type)
        raise UserError(f"{name} is a {found} model: only BPE can be extended by merges; give Mistral's {FILE}")
    wrong = {
        "has no byte fallback": not kind.byte_fallback,
        "changes characters (its normalization is not identity)": bool(spec.precompiled_charsmap),
        "takes spaces away (remove_extra_whitespaces)": spec.remove_extra_whitespaces,
        "does not write spaces as ▁": not spec.escape_whitespaces or kind.treat_whitespace_as_suffix,
        "has user-defined or unused pieces": any(piece.type in (USER_DEFINED, UNUSED) for piece in model.pieces),
        "has a piece with ▁ after a letter": any(SPACE in piece[1:] and piece.strip(SPACE) for piece in normal(model)),
    }
    if reasons := [reason for reason, present in wrong.items() if present]:
        raise UserError(f"{name} {reasons[0]}, unlike Mistral's: give the {FILE} of Mistral-7B-v0.1, or one like it")


def check_donor(model: Any, name: str) -> None:
    """Refuses a donor that is not BPE. UserError gives the reason."""
    if model.trainer_spec.model_type == TrainerSpec.UNIGRAM:
        raise UserError(
            f"donor {name} is a unigram model (SentencePiece's default): its pieces are not made of one another, so"
            " more than half of them would never come out of a BPE model; train it with --model_type=bpe"
        )
    if model.trainer_spec.model_type != TrainerSpec.BPE:
        found = TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
        raise UserError(f"donor {name} is a {found} model: train it with --model_type=bpe")


def normal(model: Any) -> dict[str, float]:
    """Piece -> score of the pieces that merges make, single characters too, in order of ids."""
    return {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}


def encoder(model: Any, dummy_prefix: bool | None = None) -> Callable[[str], list[int]]:
    """Text -> ids, without special tokens. dummy_prefix: a space before the text or none, in place of the model's."""
    if dummy_prefix is not None:
        copied = ModelProto()
        copied.CopyFrom(model)
        copied.normalizer_spec.add_dummy_prefix = dummy_prefix
        model = copied
    encode: Callable[[str], list[int]] = processor(model).EncodeAsIds
    return encode


def processor(model: Any) -> sentencepiece.SentencePieceProcessor:
    """The model, ready to encode and decode."""
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def text_of(piece: str) -> str:
    """What a piece stands for: "▁да" -> " да"."""
    return piece.replace(SPACE, " ")


def reachable(model: Any, pieces: Iterable[str]) -> list[bool]:
    """Of each piece of the model, whether its own text encodes to it."""
    encode = encoder(model, dummy_prefix=False)
    ids = {piece.piece: id for id, piece in enumerate(model.pieces)}
    return [encode(text_of(piece)) == [ids[piece]] for piece in pieces]


def check_script(script: str) -> None:
    """UserError with the nearest names where no letter of Unicode is of that script."""
    if script.upper() not in _scripts():
        raise UserError(f"script {script!r} is not known to Unicode; {nearest(script, map(str.lower, _scripts()))}")


def in_script(piece: str, script: str) -> bool:
    """Is a piece made of letters of one script alone, with ▁ before them or not?

    The script of a letter is the first word of its name in Unicode: "cyrillic" has ё, and Ukrainian's ї, too.
    """
    letters = piece.removeprefix(SPACE)
    return bool(letters) and all(_script_of(letter) == script.upper() for letter in letters)


@functools.cache
def _script_of(character: str) -> str:
    """Of letters and the marks that a script has for itself; "" of anything else."""
    return unicodedata.name(character, "").partition(" ")[0] if unicodedata.category(character)[0] in "LM" else ""


@functools.cache
def _scripts() -> frozenset[str]:
    return frozenset(_script_of(chr(code)) for code in range(0x41, 0x20000)) - {""}
