"""Pieces of a donor put into a base SentencePiece model: three strategies.

BPE merges the pair that makes the piece of the highest score, whatever the two are; a base's scores are 0, −1, −2, …

- tail: new pieces score below all old ones (the base's minimum − 1, − 2, …), in the donor's order. What the base would
  merge it still merges first, so text without the new letters keeps its tokens, and the donor's longer pieces are
  built on top. Pieces that this order makes unreachable (pieces.py) are left out: their rows would never be trained.
- append: new pieces score 0, above all old ones: what Chinese-LLaMA's script does (Cui et al., 2304.08177). Every tie
  is then decided by place, so that a fifth of the pieces is not reachable and `tokenizers`, which knows no ties,
  segments otherwise. Here for comparison.
- replacement: the donor's pieces in place of the base's (Tikhomirov & Chernyshev, 2312.02598); special tokens, bytes
  and runs of spaces stay. English is tokenized anew, too.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vikhr_mistral import pieces
from vikhr_mistral.pieces import NORMAL, SPACE, ModelProto
from vikhr_t5.errors import UserError, nearest

STRATEGIES = TAIL, APPEND, REPLACEMENT = "tail", "append", "replacement"
MULTIPLE = 64  # of rows: what matrix units want


@dataclasses.dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        model: a SentencePiece `ModelProto`.
        added: pieces that the base lacks, in order of ids.
        candidates: the donor's pieces of the script that the base lacks.
        unreachable: of the candidates; left out of `added` by the strategy "tail", and in it otherwise.
    """

    model: Any
    added: tuple[str, ...]
    candidates: int
    unreachable: tuple[str, ...]


def padded_size(size: int) -> int:
    """Rows of the matrices: `size` up to a multiple of 64. The rows above `size` belong to no piece."""
    return -(-size // MULTIPLE) * MULTIPLE


def merge(base: Any, donor: Any, strategy: str = TAIL, script: str = "cyrillic", size: int | None = None) -> Merged:
    """The base with the donor's pieces; its normalization, byte fallback and special tokens stay.

    Args:
        base, donor: SentencePiece `ModelProto`s, checked (`pieces.check_base`, `check_donor`).
        strategy: one of STRATEGIES.
        script: "tail" and "append" take pieces of this script alone; see `pieces.in_script`.
        size: pieces of the result; None: as many as there are.

    Raises:
        UserError: an unknown strategy or script; the donor has no piece to add, or too few for `size`.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"strategy {strategy!r} is not known; {nearest(strategy, STRATEGIES)}")
    pieces.check_script(script)
    known = pieces.normal(base)
    scores = pieces.normal(donor)
    if strategy == REPLACEMENT:
        frame = _copy(base, [piece for piece in base.pieces if piece.type != NORMAL or not piece.piece.strip(SPACE)])
        wanted = [piece for piece in scores if piece.strip(SPACE)]
    else:
        frame = _copy(base, base.pieces)
        wanted = [piece for piece in scores if piece not in known and pieces.in_script(piece, script)]
    # SentencePiece merges a letter that is no piece, `tokenizers` reads its bytes: so letters come first (a donor has
    # them last), and pieces with a letter that neither model has are of no use.
    letters = {piece for piece in [*pieces.normal(frame), *wanted] if len(piece) == 1}
    wanted = [piece for piece in wanted if letters.issuperset(piece)]
    wanted.sort(key=lambda piece: (len(piece) > 1, -scores[piece]))
    room = len(wanted) if size is None else size - len(frame.pieces)
    candidates, unreachable = len(wanted), set[str]()
    while True:  # without those that are not reachable the next ones have room, and may be not reachable themselves
        taken = wanted[: max(room, 0)]
        if not taken or (size is not None and len(taken) < room):
            raise _too_few(strategy, script, len(wanted), room, size)
        new_scores = {TAIL: _tail_scores(known, taken), APPEND: [0.0] * len(taken)}
        model = _with(frame, taken, new_scores.get(strategy) or [scores[piece] for piece in taken])
        possible = pieces.reachable(model, taken)
        missing = {piece for piece, is_reachable in zip(taken, possible, strict=True) if not is_reachable}
        unreachable |= missing
        if strategy != TAIL or not missing:
            break
        wanted = [piece for piece in wanted if piece not in missing]
    added = tuple(piece for piece in taken if piece not in known)
    return Merged(model, added, candidates, tuple(sorted(unreachable)))


def _too_few(strategy: str, script: str, found: int, room: int, size: int | None) -> UserError:
    what = "in all" if strategy == REPLACEMENT else f"in {script} letters that the base lacks"
    asked = f"--size {size:,} asks for {room:,}: train a larger donor, or change the size" if size else "none to add"
    return UserError(f"too few pieces: of the donor's, {found:,} {what} can be used, and {asked}")


def _tail_scores(known: dict[str, float], taken: Sequence[str]) -> list[float]:
    """Below the base's lowest. Runs of spaces do not count: theirs is −1e9, and no new piece competes with them."""
    lowest = min(score for piece, score in known.items() if piece.strip(SPACE))
    return [lowest - 1 - place for place in range(len(taken))]


def _copy(base: Any, kept: Sequence[Any]) -> Any:
    kept = [ModelProto.SentencePiece.FromString(piece.SerializeToString()) for piece in kept]
    model = ModelProto()
    model.CopyFrom(base)
    model.ClearField("self_test_data")  # of the model as it was
    del model.pieces[:]
    model.pieces.extend(kept)
    return model


def _with(frame: Any, added: Sequence[str], scores: Sequence[float]) -> Any:
    model = _copy(frame, frame.pieces)
    for piece, score in zip(added, scores, strict=True):
        model.pieces.add(piece=piece, score=score)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model
