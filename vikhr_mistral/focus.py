"""FOCUS (Dobler & de Melo, EMNLP 2023, 2305.14481): a new row is a sum of the old rows of pieces that are used alike.

How alike two pieces are is said by auxiliary vectors of the new tokenizer's pieces, which fastText learns from text in
the target language cut into them. For a new piece, with c its cosine similarities to the pieces that both tokenizers
have (section 2.1 of the paper):

    w = sparsemax(c)    (Martins & Astudillo, 1602.02068: the nearest point of the simplex; most weights are 0)
    row = Σ w_o · old row of o

Two things are ours: an output layer takes the same weights on its own rows, and a piece without a vector takes the mean
of its old pieces where the paper draws from a normal distribution. The authors' package (deepfocus) trains the vectors
itself, and needs fastText's compiler, numba and five more packages for it; here they come from a file.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from vikhr_mistral.embeddings import MADE, Plan
from vikhr_t5.errors import UserError

_AT_ONCE = 256  # new pieces


def focused(plan: Plan, new: Any, auxiliary: str | os.PathLike[str]) -> Plan:
    """The plan with the sources and weights of made rows by similarity.

    Args:
        new: the `ModelProto` that the plan was made for.
        auxiliary: vectors of its pieces, as `read_vectors` takes them.

    Raises:
        UserError: the file cannot be read, or has no vector of a piece that both tokenizers have.
    """
    vectors = read_vectors(auxiliary)
    old_ids, kept = plan.kept_ids()
    names = [piece.piece for piece in new.pieces]
    known = np.array([names[id] in vectors for id in kept])
    if not known.any():
        raise UserError(
            f"{os.fspath(auxiliary)} has no vector of a piece that both tokenizers have: train it on text cut into the"
            " new tokenizer's pieces (docs/mistral-tokenizer.md)"
        )
    old_ids, kept = old_ids[known], kept[known]
    anchors = _unit(np.stack([vectors[names[id]] for id in kept]))
    targets = np.array([id for id in np.flatnonzero(plan.kinds == MADE) if names[id] in vectors], np.int64)
    sources = [plan.sources[first:stop] for first, stop in zip(plan.starts[:-1], plan.starts[1:], strict=True)]
    weights = [plan.weights[first:stop] for first, stop in zip(plan.starts[:-1], plan.starts[1:], strict=True)]
    for first in range(0, len(targets), _AT_ONCE):
        part = targets[first : first + _AT_ONCE]
        shares = sparsemax(_unit(np.stack([vectors[names[id]] for id in part])) @ anchors.T)
        for id, share in zip(part, shares, strict=True):
            chosen = np.flatnonzero(share)
            sources[id], weights[id] = old_ids[chosen], share[chosen]
    starts = np.cumsum([0, *map(len, sources)])
    return dataclasses.replace(plan, sources=np.concatenate(sources), weights=np.concatenate(weights), starts=starts)


def sparsemax(scores: np.ndarray) -> np.ndarray:
    """[N, C] -> [N, C]: of each row the nearest point of the simplex. Algorithm 1 of the paper."""
    ordered = -np.sort(-scores, axis=1)
    total = np.cumsum(ordered, axis=1, dtype=np.float64)
    count = np.arange(1, scores.shape[1] + 1)
    support = (1 + count * ordered > total).sum(axis=1)
    threshold = (total[np.arange(len(scores)), support - 1] - 1) / support
    result: np.ndarray = np.maximum(scores - threshold[:, None], 0).astype(np.float32)
    return result


def _unit(vectors: np.ndarray) -> np.ndarray:
    result: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return result


def read_vectors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Word -> float32 [D], of fastText's and word2vec's text format: a line "N D", then a word and D numbers a line.

    Raises:
        UserError: the file is missing or not of that format; names the line.
    """
    vectors: dict[str, np.ndarray] = {}
    number = 1
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            _, width = map(int, file.readline().split())
            for number, line in enumerate(file, start=2):  # noqa: B007  # for the error
                word, *values = line.rstrip("\n ").rsplit(" ", width)
                if len(values) != width:
                    raise ValueError(f"{len(values)} numbers instead of {width}")
                vectors[word] = np.array(values, np.float32)
    except OSError as error:
        raise UserError(f"{Path(path)}: {error.strerror}; give a file of vectors (--auxiliary)") from error
    except ValueError as error:
        raise UserError(f"{Path(path)}, line {number}: no vector of fastText's text format ({error})") from error
    return vectors
