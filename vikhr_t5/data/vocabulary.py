"""Vocabulary: SentencePiece ids, sentinels counted down from the top, mode tokens; and training one from text.

Ids, from 0: padding, EOS, unknown, the model's other pieces (mode tokens and bytes first when trained here), then the
sentinels, `<extra_id_0>` the highest, then rows of padding up to a multiple of 128 that no text ever becomes. This is
the layout of T5, and of `seqio.SentencePieceVocabulary` for the same two arguments. Models such as mT5's hold their
sentinels inside, in this same order: for them `extra_ids` is 0.

Wherever a vocabulary is taken, `AnyVocabulary`, it may also be of bytes (byte_vocabulary.py).
"""

import hashlib
import io
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from vikhr_t5.data.byte_vocabulary import PADDED_TO, ByteVocabulary
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import atomic_path, check_file
from vikhr_t5.remote import local_copy

DEFAULT_MODE_TOKENS = ("[NLU]", "[NLG]", "[S2S]", "<LM>", "<SC1>", "<SC2>", "<SC3>", "<SC4>", "<SC5>", "<SC6>")

_SPACE = "▁"
_LINE_CHARACTERS = 8192
_MODEL, _RECORD = "spiece.model", "vocabulary.json"
_ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # made at import, without stubs
_USER_DEFINED = _ModelProto.SentencePiece.USER_DEFINED


class Vocabulary:
    """A SentencePiece model with sentinels above it. The file is read at first use; copies and pickles are light.

    Args:
        sentencepiece_model_file: path of the `.model` file; a remote one (gs://…) is copied first (remote.py).
        extra_ids: number of sentinels.

    Raises (at first use):
        UserError: the file is missing, is no SentencePiece model, has other padding and EOS ids, or has sentinels
            inside while `extra_ids` asks for more.
    """

    pad_id = 0
    eos_id = 1

    def __init__(self, sentencepiece_model_file: str, extra_ids: int = 300):
        if extra_ids < 0:
            raise UserError(f"extra_ids is {extra_ids}; the number of sentinels cannot be negative")
        local = "or set VOCABULARY_FILE to a local copy"
        self.sentencepiece_model_file = local_copy(os.fspath(sentencepiece_model_file), local)
        self.extra_ids = extra_ids

    def __getstate__(self) -> dict[str, Any]:
        return {"sentencepiece_model_file": self.sentencepiece_model_file, "extra_ids": self.extra_ids}

    def __repr__(self) -> str:
        return f"Vocabulary({self.sentencepiece_model_file!r}, extra_ids={self.extra_ids})"

    @cached_property
    def model_bytes(self) -> bytes:
        """The model file, without sentinels: what goes into checkpoints and exports."""
        try:
            return Path(self.sentencepiece_model_file).read_bytes()
        except OSError as error:
            raise UserError(
                f"vocabulary {self.sentencepiece_model_file!r}: {error.strerror}; set VOCABULARY_FILE to a"
                " SentencePiece model"
            ) from error

    @cached_property
    def _model(self) -> Any:
        model, content = _ModelProto(), self.model_bytes
        try:
            model.ParseFromString(content)
        except DecodeError as error:
            raise self._refused("is not a SentencePiece model") from error
        spec = model.trainer_spec
        if not model.pieces or not model.HasField("trainer_spec"):
            raise self._refused("is not a SentencePiece model")
        found, wanted = (spec.pad_id, spec.eos_id), (self.pad_id, self.eos_id)
        if found != wanted:
            raise self._refused(f"has the ids {found} for padding and EOS, not {wanted}")
        if self.extra_ids and (inside := _sentinels_inside(model)):
            raise UserError(
                f"vocabulary {self.sentencepiece_model_file!r} has {inside} sentinels inside: set EXTRA_IDS to 0,"
                f" not {self.extra_ids}"
            )
        return model

    def _refused(self, reason: str) -> UserError:
        return UserError(
            f"vocabulary {self.sentencepiece_model_file!r} {reason}; give VOCABULARY_FILE a T5 vocabulary, or train one"
            " (vikhr_t5.data.vocabulary.train_vocabulary)"
        )

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        extended = _ModelProto()
        extended.CopyFrom(self._model)
        for i in reversed(range(self.extra_ids)):
            extended.pieces.add(piece=f"{_SPACE}<extra_id_{i}>", score=0.0, type=_USER_DEFINED)
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=extended.SerializeToString())
        except RuntimeError as error:
            raise self._refused(f"cannot be loaded ({error})") from error

    @property
    def source(self) -> str:
        """What `open_vocabulary` takes: the absolute path of the file."""
        return os.path.abspath(self.sentencepiece_model_file)

    @property
    def unk_id(self) -> int:
        """2 in most models."""
        return int(self._model.trainer_spec.unk_id)

    @property
    def size(self) -> int:
        """Real ids: the model's pieces and the sentinels."""
        return len(self._model.pieces) + self.extra_ids

    @property
    def padded_size(self) -> int:
        """Rows of the embedding: `size` up to a multiple of 128."""
        return -(-self.size // PADDED_TO) * PADDED_TO

    @cached_property
    def num_sentinels(self) -> int:
        """`extra_ids`, or as many as the model has inside."""
        return self.extra_ids or _sentinels_inside(self._model)

    @property
    def first_sentinel(self) -> int:
        """The id of `<extra_id_0>`, the highest real id; the others descend from it."""
        return self.size - 1

    @property
    def last_sentinel(self) -> int:
        """The id of the last sentinel, the lowest; `size` where there are none."""
        return self.size - self.num_sentinels

    def sentinel(self, index: int) -> int:
        """The id of `<extra_id_index>`. UserError beyond the last."""
        if not 0 <= index < self.num_sentinels:
            raise UserError(f"<extra_id_{index}>: {self!r} has {self.num_sentinels} sentinels, from 0; raise EXTRA_IDS")
        return self.first_sentinel - index

    @cached_property
    def mode_tokens(self) -> tuple[str, ...]:
        """Names of the model's user-defined symbols but for sentinels, in order of ids: "[NLU]" for "▁[NLU]", too."""
        return tuple(self._mode_ids)

    @cached_property
    def _mode_ids(self) -> dict[str, int]:
        pieces = enumerate(self._model.pieces[: self.last_sentinel])
        return {piece.piece.removeprefix(_SPACE): i for i, piece in pieces if piece.type == _USER_DEFINED}

    def mode_id(self, token: str) -> int:
        """The id of a mode token such as "[NLU]". UserError with the nearest names when the model has none such."""
        if token not in self.mode_tokens:
            raise UserError(
                f"mode token {token!r} is no user-defined symbol of {self.sentencepiece_model_file!r};"
                f" {nearest(token, self.mode_tokens)}"
            )
        return self._mode_ids[token]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS. Sentinels and mode tokens written in the text as words become their ids."""
        return list(self._processor.EncodeAsIds(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; padding and EOS are dropped, sentinels read `<extra_id_i>`. UserError on ids >= size."""
        kept = [int(i) for i in ids]
        if outside := [i for i in kept if not 0 <= i < self.size]:
            raise UserError(f"id {outside[0]} is outside the vocabulary of {self.size} ({self!r})")
        return str(self._processor.DecodeIds([i for i in kept if i not in (self.pad_id, self.eos_id)]))

    def piece(self, id: int) -> str:
        """The piece of one id, "▁" for a space: for showing tokens apart. UserError on ids >= size."""
        if not 0 <= id < self.size:
            raise UserError(f"id {id} is outside the vocabulary of {self.size} ({self!r})")
        piece = str(self._processor.IdToPiece(int(id)))
        return piece.removeprefix(_SPACE) if id >= self.last_sentinel or id in self._mode_ids.values() else piece

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the model file and the number of sentinels: equal for equal ids."""
        return hashlib.sha256(self.model_bytes + f"\0extra_ids={self.extra_ids}".encode()).hexdigest()


AnyVocabulary = Vocabulary | ByteVocabulary


def _sentinels_inside(model: Any) -> int:
    """How many of the model's last pieces are `<extra_id_0>` (the last), `<extra_id_1>`, …, with or without "▁"."""
    count = 0
    for piece in reversed(model.pieces):
        if piece.piece.removeprefix(_SPACE) != f"<extra_id_{count}>":
            break
        count += 1
    return count


def open_vocabulary(source: str, extra_ids: int | None = None, default: int = 300) -> AnyVocabulary:
    """The vocabulary that a command line or an environment variable names.

    Args:
        source: path of a SentencePiece model, or "bytes".
        extra_ids: number of sentinels; None: `default`, or 0 for bytes, as ByT5 has.
    """
    if source == ByteVocabulary.source:
        return ByteVocabulary(extra_ids or 0)
    return Vocabulary(source, default if extra_ids is None else extra_ids)


def named_vocabulary(source: str | None, extra_ids: int | None, of: str = "") -> AnyVocabulary | None:
    """The vocabulary that is named for a model of a format without one; None where none is. 100 sentinels, as t5x's.

    Args:
        of: what the two flags begin with, as in --old_vocabulary.

    Raises:
        UserError: sentinels of no vocabulary.
    """
    if source:
        return open_vocabulary(source, extra_ids, default=100)
    if extra_ids is not None:
        raise UserError(f"--{of}extra_ids counts the sentinels of --{of}vocabulary: give both, or leave it out")
    return None


def vocabulary_files(vocabulary: AnyVocabulary) -> dict[str, bytes]:
    """Name -> content of the files of a `vocabulary/` folder, for `load_vocabulary`."""
    record = {"extra_ids": vocabulary.extra_ids, "fingerprint": vocabulary.fingerprint()}
    if isinstance(vocabulary, ByteVocabulary):
        return {_RECORD: json.dumps({"kind": "bytes", **record}, indent=2).encode()}
    return {_MODEL: vocabulary.model_bytes, _RECORD: json.dumps({"kind": "sentencepiece", **record}, indent=2).encode()}


def load_vocabulary(folder: str | os.PathLike[str]) -> AnyVocabulary:
    """The vocabulary that `vocabulary_files` described in `folder`.

    Raises:
        UserError: a file is missing, unreadable, or not what was written.
    """
    record = vocabulary_record(folder)
    if record.get("kind") == "bytes":
        vocabulary: AnyVocabulary = ByteVocabulary(record["extra_ids"])
    else:  # folders of before bytes were known do not say the kind
        vocabulary = Vocabulary(os.fspath(Path(folder) / _MODEL), record["extra_ids"])
    if vocabulary.fingerprint() != record["fingerprint"]:
        raise UserError(
            f"vocabulary {os.fspath(folder)!r} is damaged: {_MODEL} is not the file that {_RECORD} was written for;"
            " copy the folder again"
        )
    return vocabulary


def vocabulary_record(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What vocabulary.json in `folder` says: "extra_ids", "fingerprint", "kind". UserError where it cannot be read."""
    path = Path(folder) / _RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["extra_ids"], int) or not isinstance(record["fingerprint"], str):
            raise ValueError("extra_ids or fingerprint has another type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is damaged ({error})"
        raise UserError(f"{path}: {reason}; give a run folder or a checkpoint that is whole") from error
    return record


def train_vocabulary(
    texts: Iterable[str] | Iterable[Path],
    output: str | os.PathLike[str],
    size: int,
    model_type: str = "unigram",
    mode_tokens: Sequence[str] = DEFAULT_MODE_TOKENS,
    character_coverage: float = 0.9999,
    byte_fallback: bool = True,
    split_digits: bool = True,
    max_lines: int | None = None,
    num_threads: int = 16,
    seed: int = 0,
) -> Vocabulary:
    """Trains a SentencePiece model for `Vocabulary`. The same text and arguments give the same bytes on any machine.

    Args:
        texts: texts as strings (each may hold several lines), or UTF-8 files as paths.
        output: the `.model` file to write, whole or not at all.
        size: pieces of the model, mode tokens and bytes counted, sentinels not.
        model_type: "unigram" (T5's) or "bpe".
        mode_tokens: words that are one piece with the space before them, as sentinels are: "▁[NLU]".
        character_coverage: share of the text's characters that get a piece; the rest becomes bytes.
        byte_fallback: have 256 byte pieces, so that no text becomes unknown.
        split_digits: a piece per digit of a number.
        max_lines: train on a random sample of as many lines; None for all (they are held in memory).
        num_threads: the result depends on it, as sums are split by it; so it is not the machine's number of cores.
        seed: of the sample.

    Raises:
        UserError: no text, a file that is missing or not UTF-8, a size that the text cannot give, or `output` is a
            folder.
    """
    if model_type not in ("unigram", "bpe"):
        raise UserError(f'model_type is {model_type!r}; use "unigram" or "bpe"')
    check_file(output)
    # Read in full first: SentencePiece would turn an error of the reader into one of its own.
    lines = list(read_lines(texts)) if max_lines is None else _sample(read_lines(texts), max_lines, random.Random(seed))
    if not lines:
        raise UserError("no text to train a vocabulary on: the texts or files hold no line but blank ones")
    model = io.BytesIO()
    try:
        # From and to memory: SentencePiece writes the names of its files into the model, which would change its bytes.
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=size,
            model_type=model_type,
            user_defined_symbols=[f"{_SPACE}{token}" for token in mode_tokens],
            character_coverage=character_coverage,
            byte_fallback=byte_fallback,
            split_digits=split_digits,
            max_sentence_length=4 * _LINE_CHARACTERS,  # in bytes of UTF-8; longer ones would be skipped silently
            num_threads=num_threads,
            pad_id=Vocabulary.pad_id,
            eos_id=Vocabulary.eos_id,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip()  # what precedes is a place in SentencePiece's source
        raise UserError(f"cannot train a vocabulary of {size} pieces on this text: {reason}") from error
    with atomic_path(output) as temporary:
        temporary.write_bytes(model.getvalue())
    return Vocabulary(os.fspath(output))


def read_lines(texts: Iterable[str] | Iterable[Path]) -> Iterator[str]:
    """The lines of texts and files that are not blank, long ones in parts, cut at a space where there is one."""
    for text in texts:
        for line in text.splitlines() if isinstance(text, str) else _file_lines(text):
            line, start = line.strip(), 0
            while len(line) - start > _LINE_CHARACTERS:
                space = line.rfind(" ", start + 1, start + _LINE_CHARACTERS)
                cut = space if space > 0 else start + _LINE_CHARACTERS
                yield line[start:cut]
                start = cut + (line[cut] == " ")
            if line:
                yield line[start:]


def _file_lines(path: Path) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield line.decode("utf-8")
                except UnicodeDecodeError as error:
                    reason = f"not UTF-8 ({error.reason} at byte {error.start})"
                    raise UserError(f"{path}, line {number}: {reason}; convert the file or drop the line") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a readable text file") from error


def _sample(lines: Iterable[str], count: int, rng: random.Random) -> list[str]:
    """`count` of the lines, each set of them equally likely (reservoir sampling, Vitter's algorithm R)."""
    kept: list[str] = []
    for seen, line in enumerate(lines):
        if seen < count:
            kept.append(line)
        elif (place := rng.randrange(seen + 1)) < count:
            kept[place] = line
    return kept
