"""Rows of an embedding, or of an output layer, for a tokenizer that has changed.

Each row of the new matrix is one of:

- kept: the piece is in both tokenizers; its old row, bit for bit.
- made: a new piece; see METHODS. What the old tokenizer makes of a piece is its reading of the piece's text as it
  stands: with a space in front for "▁слово" and none for "слово".
- fallback: a new piece of whose text the old tokenizer makes nothing; the mean of all old rows.
- padding: above the last piece; the mean of all old rows.

METHODS, for made rows:

- mean: of the rows of the old pieces (CW2V, 2407.05841, finds simple means sound).
- weighted_mean: the same, each piece weighted by the bytes of text that it stands for.
- exponential: the i-th old piece weighted by exp(2i) in the embedding and by exp(−2i) in the output layer (AdaptiVocab,
  2503.19693, section 3.3). As an input a new piece stands where its last old piece stood, with what that one
  says about the next; as an output it stands where its first one did.
- normal: drawn from N(µ, 1e-9·Σ), µ and Σ the mean and covariance of all old rows, as transformers'
  `resize_token_embeddings(mean_resizing=True)` does (Hewitt, "Initializing New Word Embeddings for Pretrained Language
  Models", 2021); µ alone where Σ is not positive definite. For comparison: it knows nothing of the piece.
- focus: of rows of old pieces that are used alike, by vectors from a file (focus.py).

An untied output layer takes the same plan on its own rows (`for_output`). Letters: O old rows, V new rows, D width.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from vikhr_mistral import merging, pieces
from vikhr_t5.errors import UserError, nearest

METHODS = MEAN, WEIGHTED_MEAN, EXPONENTIAL, NORMAL, FOCUS = (
    "mean",
    "weighted_mean",
    "exponential",
    "normal",
    "focus",
)
KINDS = KEPT, MADE, FALLBACK, PADDING = "kept", "made", "fallback", "padding"
_EPSILON = 1e-9  # transformers'
_AT_ONCE = 2048  # rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each new row comes from.

    Attributes:
        kinds: [V] of KINDS.
        sources: [N] old ids; those of row r are `sources[starts[r]:starts[r + 1]]`, of kept and made rows alone.
        weights: [N] of each in the mean; they need not sum to 1.
        starts: [V + 1].
        old_size: pieces of the old tokenizer; old rows above it are padding.
    """

    kinds: np.ndarray
    sources: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    old_size: int

    def count(self, kind: str) -> int:
        return int((self.kinds == kind).sum())

    def kept_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """(old ids, new ids) of the pieces that both tokenizers have."""
        new = np.flatnonzero(self.kinds == KEPT)
        return self.sources[self.starts[new]], new


def plan(old: Any, new: Any, method: str = MEAN) -> Plan:
    """The plan for two SentencePiece `ModelProto`s; V is the size of `new`, padded to a multiple of 64.

    The weights are those of the mean, or of the weighted or exponential mean if that is the method.
    """
    ids = {(piece.type, piece.piece): id for id, piece in enumerate(old.pieces)}
    encode, unknown = pieces.encoder(old, dummy_prefix=False), old.trainer_spec.unk_id
    kinds, found = [], []
    for piece in new.pieces:
        if (kept := ids.get((piece.type, piece.piece))) is not None:
            kinds.append(KEPT)
            found.append([kept])
        else:
            sources = [id for id in encode(pieces.text_of(piece.piece)) if id != unknown]
            kinds.append(MADE if sources else FALLBACK)
            found.append(sources)
    padding = merging.padded_size(len(new.pieces)) - len(new.pieces)
    bytes_of = [
        1 if piece.type == pieces.BYTE else len(pieces.text_of(piece.piece).encode("utf-8")) for piece in old.pieces
    ]
    weights: list[list[float]]
    if method == WEIGHTED_MEAN:
        weights = [[bytes_of[id] for id in sources] for sources in found]
    elif method == EXPONENTIAL:
        weights = [[math.exp(2 * (place - len(sources))) for place in range(1, len(sources) + 1)] for sources in found]
    else:
        weights = [[1] * len(sources) for sources in found]
    return Plan(
        kinds=np.array([*kinds, *[PADDING] * padding]),
        sources=np.array([id for sources in found for id in sources], np.int64),
        weights=np.array([weight for row in weights for weight in row], np.float32),
        starts=np.cumsum([0, *map(len, found), *[0] * padding]),
        old_size=len(old.pieces),
    )


def for_output(plan: Plan, method: str) -> Plan:
    """The plan for an output layer of its own: of "exponential" with the weights of each row in reverse order."""
    if method != EXPONENTIAL:
        return plan
    counts = np.diff(plan.starts)
    places = np.repeat(plan.starts[:-1] + plan.starts[1:] - 1, counts) - np.arange(len(plan.weights))
    return dataclasses.replace(plan, weights=plan.weights[places])


def check_method(method: str) -> None:
    """UserError with the nearest names where the method is not one of METHODS."""
    if method not in METHODS:
        raise UserError(f"method {method!r} is not known; {nearest(method, METHODS)}")


def new_rows(plan: Plan, old: np.ndarray, method: str = MEAN, seed: int = 0) -> np.ndarray:
    """[O, D] -> [V, D] of the same dtype; sums are in float32.

    Args:
        old: O >= `plan.old_size`.
        method: "normal" draws made rows; all others take the plan's weights.
        seed: of "normal".
    """
    new = np.empty((len(plan.kinds), old.shape[1]), old.dtype)
    mean = old[: plan.old_size].mean(axis=0, dtype=np.float64)
    new[(plan.kinds == FALLBACK) | (plan.kinds == PADDING)] = mean
    old_ids, kept = plan.kept_ids()
    for first in range(0, len(kept), _AT_ONCE):
        new[kept[first : first + _AT_ONCE]] = old[old_ids[first : first + _AT_ONCE]]
    made = np.flatnonzero(plan.kinds == MADE)
    if method == NORMAL:
        new[made] = _drawn(old[: plan.old_size], mean, len(made), seed)
        return new
    for first in range(0, len(made), _AT_ONCE):
        rows = made[first : first + _AT_ONCE]
        counts = plan.starts[rows + 1] - plan.starts[rows]
        ends = np.cumsum(counts)
        places = np.repeat(plan.starts[rows] - (ends - counts), counts) + np.arange(ends[-1])
        weights = plan.weights[places]
        values = old[plan.sources[places]].astype(np.float32) * weights[:, None]
        new[rows] = np.add.reduceat(values, ends - counts) / np.add.reduceat(weights, ends - counts)[:, None]
    return new


def _drawn(old: np.ndarray, mean: np.ndarray, count: int, seed: int) -> np.ndarray:
    covariance = np.zeros((old.shape[1], old.shape[1]))
    for first in range(0, len(old), _AT_ONCE):
        centered = old[first : first + _AT_ONCE].astype(np.float32) - mean.astype(np.float32)
        covariance += centered.T @ centered
    try:
        root = np.linalg.cholesky(_EPSILON * covariance / len(old))
    except np.linalg.LinAlgError:
        return np.broadcast_to(mean, (count, len(mean)))
    return mean + np.random.default_rng(seed).standard_normal((count, len(mean))) @ root.T


def norms(plan: Plan, old: np.ndarray, new: np.ndarray) -> dict[str, float]:
    """Mean L2 norm of the old rows under "old", and of the new ones by kind."""
    found = {"old": _norm(old, np.arange(plan.old_size))}
    return found | {kind: _norm(new, np.flatnonzero(plan.kinds == kind)) for kind in KINDS if plan.count(kind)}


def _norm(matrix: np.ndarray, rows: np.ndarray) -> float:
    parts = (matrix[rows[first : first + _AT_ONCE]].astype(np.float32) for first in range(0, len(rows), _AT_ONCE))
    return float(np.mean(np.concatenate([np.linalg.norm(part, axis=1) for part in parts])))
