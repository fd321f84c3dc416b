"""Pieces of a donor put into a base SentencePiece model: four strategies.

BPE merges the pair that makes the piece of the highest score, whatever the two are; a base's scores are 0, −1, −2, …

- tail: new pieces score below all old ones (the base's minimum − 1, − 2, …), in the donor's order. What the base would
  merge it still merges first, so text without the new letters keeps its tokens, and the donor's longer pieces are
  built on top. Pieces that this order makes unreachable (pieces.py) are left out: their rows would never be trained.
- joint: as "tail", but the base's own pieces of the script move below, too, in among the new ones by the donor's order.
  Text without the script's letters still keeps its tokens; text in the script is cut as the donor would, into fewer
  tokens, and not as the base did.
- append: new pieces score 0, above all old ones: what Chinese-LLaMA's script does (Cui et al., 2304.08177). Every tie
  is then decided by place, so that a fifth of the pieces is not reachable and `tokenizers`, which knows no ties,
  segments otherwise. Here for comparison.
- replacement: the donor's pieces in place of the base's (Tikhomirov & Chernyshev, 2312.02598); special tokens, bytes
  and runs of spaces stay. English is tokenized anew, too.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from vikhr_mistral import pieces
from vikhr_mistral.pieces import NORMAL, SPACE, ModelProto
from vikhr_t5.errors import UserError, nearest

STRATEGIES = TAIL, JOINT, APPEND, REPLACEMENT = "tail", "joint", "append", "replacement"
MULTIPLE = 64  # of rows: what matrix units want


@dataclasses.dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        model: a SentencePiece `ModelProto`.
        added: pieces that the base lacks, in order of ids.
        candidates: the donor's pieces of the script that the base lacks.
        unreachable: of the candidates; left out of `added` by "tail" and "joint", and in it otherwise.
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
        script: all but "replacement" take pieces of this script alone; see `pieces.in_script`.
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
        model = _with(frame, taken, _scores(strategy, known, scores, taken, script))
        possible = pieces.reachable(model, taken)
        missing = {piece for piece, is_reachable in zip(taken, possible, strict=True) if not is_reachable}
        unreachable |= missing
        if strategy in (APPEND, REPLACEMENT) or not missing:
            break
        wanted = [piece for piece in wanted if piece not in missing]
    added = tuple(piece for piece in taken if piece not in known)
    return Merged(model, added, candidates, tuple(sorted(unreachable)))


def _too_few(strategy: str, script: str, found: int, room: int, size: int | None) -> UserError:
    what = "in all" if strategy == REPLACEMENT else f"in {script} letters that the base lacks"
    asked = f"--size {size:,} asks for {room:,}: train a larger donor, or change the size" if size else "none to add"
    return UserError(f"too few pieces: of the donor's, {found:,} {what} can be used, and {asked}")


def _scores(
    strategy: str, known: dict[str, float], donor: dict[str, float], taken: Sequence[str], script: str
) -> dict[str, float]:
    """The scores of the new pieces, and of those old ones that get another."""
    if strategy == REPLACEMENT:
        return donor
    if strategy == APPEND:
        return dict.fromkeys(taken, 0.0)
    order = list(taken)
    if strategy == JOINT:
        old = [piece for piece in known if pieces.in_script(piece, script)]
        # What the donor lacks comes last, as the base has it.
        order = sorted([*old, *taken], key=lambda piece: (-donor.get(piece, -math.inf), -known.get(piece, 0.0)))
    # Runs of spaces do not count: their score is −1e9 in Mistral's model, and no new piece competes with them.
    lowest = min(score for piece, score in known.items() if piece.strip(SPACE))
    return {piece: lowest - 1 - place for place, piece in enumerate(order)}


def _copy(base: Any, kept: Sequence[Any]) -> Any:
    kept = [ModelProto.SentencePiece.FromString(piece.SerializeToString()) for piece in kept]
    model = ModelProto()
    model.CopyFrom(base)
    model.ClearField("self_test_data")  # of the model as it was
    del model.pieces[:]
    model.pieces.extend(kept)
    return model


def _with(frame: Any, added: Sequence[str], scores: dict[str, float]) -> Any:
    model = _copy(frame, frame.pieces)
    for piece in model.pieces:
        if piece.type == NORMAL:
            piece.score = scores.get(piece.piece, piece.score)
    for name in added:
        model.pieces.add(piece=name, score=scores[name])
    model.trainer_spec.vocab_size = len(model.pieces)
    return model
