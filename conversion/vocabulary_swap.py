"""Another vocabulary under a model that has one: FLAN-T5 learns Russian with pieces of its own.

Only the two matrices that have a row per id change: the embedding, and the output layer of an untied model, each from
its own old rows. For each id of the new vocabulary:

- kept: what both vocabularies have keeps its row: padding, EOS, unknown, the same piece, sentinel i, a mode token of
  the same name, a byte.
- averaged: another piece takes the mean of the old rows of what the old vocabulary makes of its text (spaces where the
  piece has "▁", and no space put in front of a piece from the middle of a word); a byte that the old one lacks, of its
  ASCII letter; a sentinel beyond the old ones, of all old sentinels.
- fallback: where nothing is left to average (unknown to the old vocabulary, but for a space; a mode token that it
  lacks), the mean of all old rows.

Rows that only pad the matrix to a multiple of 128 take the mean of the old padding rows, which training has made
improbable, or of all old rows where there was no padding. Sources: CW2V (2407.05841) finds simple means sound.

D model, V vocabulary (O old).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from conversion.stored import DTYPES, StoredModel, WithoutOptimizer
from vikhr_t5.data.vocabulary import AnyVocabulary, ByteVocabulary
from vikhr_t5.errors import UserError

EMBEDDING, HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"
KINDS = KEPT, AVERAGED, FALLBACK, PADDING = "kept", "averaged", "fallback", "padding"

_SPACE = "▁"
_AT_ONCE = 2**11  # rows averaged in one go
_proto: Any = sentencepiece_model_pb2  # its classes are made at import, without stubs
_Piece = _proto.ModelProto.SentencePiece
Meaning = tuple[str, str | int]  # ("text", "▁слово"), ("byte", 208), ("sentinel", 0), ("mode", "[NLU]"), ("named", …)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which old rows make each new row.

    Attributes:
        kinds: [V] of KINDS.
        sources: int [N] old ids, those of row r from `starts[r]` to `starts[r + 1]`; of a fallback all real ids are
            meant and none are listed, of padding the old padding.
        starts: int [V + 1].
        old_size, old_rows: real ids of the old vocabulary, and rows of its matrices.
        pieces_averaged: how many old pieces are in the mean that a piece of text takes, on average.
    """

    kinds: np.ndarray
    sources: np.ndarray
    starts: np.ndarray
    old_size: int
    old_rows: int
    pieces_averaged: float

    def count(self, kind: str) -> int:
        return int((self.kinds == kind).sum())


def plan(old: AnyVocabulary, new: AnyVocabulary, old_rows: int) -> Plan:
    """How rows of `old`, of a matrix of `old_rows`, become rows of `new`, padded to `new.padded_size`.

    Raises:
        UserError: the matrix has fewer rows than the old vocabulary has ids.
    """
    if old_rows < old.size:
        raise UserError(
            f"the embedding has {old_rows} rows and {old!r} has {old.size} ids: name the vocabulary that the model was"
            " trained with"
        )
    rows_of, kinds, sources, lengths = _lookup(old), [], [], []
    for meaning in meanings(new):
        kind, found = rows_of(meaning)
        kinds.append(kind)
        sources.append(found)
        if kind == AVERAGED and meaning[0] == "text":
            lengths.append(len(found))
    padding = new.padded_size - new.size
    counts = [len(found) for found in sources] + [0] * padding
    return Plan(
        kinds=np.array([*kinds, *[PADDING] * padding]),
        sources=np.array([id for found in sources for id in found], np.int64),
        starts=np.cumsum([0, *counts]),
        old_size=old.size,
        old_rows=old_rows,
        pieces_averaged=float(np.mean(lengths)) if lengths else 0.0,
    )


def _lookup(old: AnyVocabulary) -> Callable[[Meaning], tuple[str, list[int]]]:
    """A function that says of a meaning whether its row is kept, averaged or a fallback, and from which old ids."""
    ids = {meaning: id for id, meaning in enumerate(meanings(old))}
    if isinstance(old, ByteVocabulary):  # bytes that double as sentinels
        ids |= {("sentinel", i): old.sentinel(i) for i in range(old.num_sentinels)}
    sentinels = [id for (kind, _), id in ids.items() if kind == "sentinel"]
    blank = {ids.get(("text", _SPACE))}
    encode = _encoder(old)

    def rows_of(meaning: Meaning) -> tuple[str, list[int]]:
        if meaning in ids:
            return KEPT, [ids[meaning]]
        kind, value = meaning
        found: list[int] = []
        if kind == "text" or (kind == "byte" and int(value) < 0x80):
            text = str(value).replace(_SPACE, " ") if kind == "text" else chr(int(value))
            found = [id for id in encode(text) if id != old.unk_id]
            if text.strip(" ") and set(found) <= blank:
                found = []
        elif kind == "sentinel":
            found = sentinels
        return (AVERAGED, found) if found else (FALLBACK, [])

    return rows_of


class SwappedModel(WithoutOptimizer):
    """A `StoredModel`: another one with another vocabulary. Its optimizer's state is not carried over.

    `norms` holds, once a matrix was read, the mean L2 norm of its rows: of the old ones under "old", of the new ones by
    kind.

    Raises:
        UserError: the model carries no vocabulary, or one of more ids than its matrices have rows.
    """

    def __init__(self, model: StoredModel, vocabulary: AnyVocabulary):
        if model.vocabulary is None:
            raise UserError("the source carries no vocabulary: name the one it was trained with by --old_vocabulary")
        self._model = model
        self.plan = plan(model.vocabulary, vocabulary, model.config.known_vocab_size())
        self.config = dataclasses.replace(model.config, vocab_size=vocabulary.padded_size)
        self.vocabulary: AnyVocabulary | None = vocabulary
        self.step, self.dtype = model.step, model.dtype
        self.norms: dict[str, dict[str, float]] = {}

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        value = self._model.read(name, layer)
        if name == EMBEDDING:
            return self._swapped(name, value)
        if name == HEAD:
            return self._swapped(name, value.T).T
        return value

    def _swapped(self, name: str, old: np.ndarray) -> np.ndarray:
        """[O, D] -> [V, D]."""
        plan, dtype = self.plan, DTYPES[self.dtype]
        new = np.empty((len(plan.kinds), old.shape[1]), dtype)
        mean = _mean(old[: plan.old_size])
        new[plan.kinds == FALLBACK] = mean
        new[plan.kinds == PADDING] = _mean(old[plan.old_size :]) if plan.old_rows > plan.old_size else mean
        kept = np.flatnonzero(plan.kinds == KEPT)
        new[kept] = old[plan.sources[plan.starts[kept]]]
        averaged = np.flatnonzero(plan.kinds == AVERAGED)
        for first in range(0, len(averaged), _AT_ONCE):
            rows = averaged[first : first + _AT_ONCE]
            counts = plan.starts[rows + 1] - plan.starts[rows]
            places = np.repeat(plan.starts[rows], counts) + _counters(counts)
            sums = np.add.reduceat(old[plan.sources[places]].astype(np.float32), np.cumsum(counts) - counts)
            new[rows] = sums / counts[:, None].astype(np.float32)
        self.norms[name] = {"old": _norm(old[: plan.old_size])}
        self.norms[name] |= {kind: _norm(new[plan.kinds == kind]) for kind in KINDS if plan.count(kind)}
        return new


def _counters(counts: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _mean(rows: np.ndarray) -> np.ndarray:
    return rows.mean(axis=0, dtype=np.float64)


def _norm(rows: np.ndarray) -> float:
    return float(np.mean([np.linalg.norm(row.astype(np.float32)) for row in rows]))


def meanings(vocabulary: AnyVocabulary) -> Iterator[Meaning]:
    """What each real id stands for, in the order of ids: the same in two vocabularies where they mean the same."""
    named = {vocabulary.pad_id: "padding", vocabulary.eos_id: "EOS", vocabulary.unk_id: "unknown"}
    if isinstance(vocabulary, ByteVocabulary):
        pieces = [None] * (vocabulary.size - vocabulary.extra_ids)
    else:
        pieces = list(_proto.ModelProto.FromString(vocabulary.model_bytes).pieces[: vocabulary.last_sentinel])
    for id, piece in enumerate(pieces):
        if id in named:
            yield "named", named[id]
        elif piece is None and id >= vocabulary.last_sentinel:  # bytes that no text has
            yield "sentinel", vocabulary.first_sentinel - id
        elif piece is None:
            yield "byte", id - (len(pieces) - 0x100)
        elif piece.type == _Piece.BYTE:
            yield "byte", int(piece.piece[1:-1], 16)
        elif piece.type == _Piece.USER_DEFINED:
            yield "mode", piece.piece.removeprefix(_SPACE)
        else:
            yield ("named" if piece.type == _Piece.CONTROL else "text"), piece.piece
    for id in range(len(pieces), vocabulary.size):
        yield "sentinel", vocabulary.first_sentinel - id


def _encoder(vocabulary: AnyVocabulary) -> Callable[[str], Sequence[int]]:
    """Ids of a text as it stands: no space is put in front, and none is taken away."""
    if isinstance(vocabulary, ByteVocabulary):
        return vocabulary.encode
    model = _proto.ModelProto.FromString(vocabulary.model_bytes)
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    model.ClearField("self_test_data")  # of the model as it was
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString()).EncodeAsIds
