"""FOCUS: sparsemax against a projection by bisection, rows against the paper's formula."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_mistral

from vikhr_mistral import embeddings, focus, merging, pieces, tokenizer_files
from vikhr_mistral.initialise import EMBEDDING, HEAD, init
from vikhr_t5.errors import UserError


def projected(scores: np.ndarray) -> np.ndarray:
    """The point p ≥ 0, Σp = 1 nearest to `scores`: p = max(scores − τ, 0), τ by bisection."""
    low, high = scores.min() - 1, scores.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(scores - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(scores - low, 0)


def test_sparsemax_is_the_projection_on_the_simplex() -> None:
    scores = np.random.default_rng(0).uniform(-1, 1, (50, 300))
    scores[0] = 0.5  # all alike: uniform
    scores[1, 7] = 9.0  # one alone
    found = focus.sparsemax(scores)
    np.testing.assert_allclose(found, [projected(row) for row in scores], atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(found[0], 1 / 300, atol=1e-7)
    assert (found[1] > 0).tolist() == [place == 7 for place in range(300)]
    assert (found[2:] > 0).sum(1).max() < 50


@pytest.fixture(scope="module")
def mistral() -> Any:
    return pieces.open_model("mistral")


def _vectors(path: Path, names: list[str], width: int = 12) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(0).standard_normal((len(names), width)).round(4)
    rows = [" ".join([name, *map(str, row)]) for name, row in zip(names, drawn, strict=True)]
    path.write_text("\n".join([f"{len(names)} {width}", *rows]) + "\n", encoding="utf-8")
    return dict(zip(names, drawn, strict=True))


def test_rows_follow_the_paper(mistral: Any, tmp_path: Path) -> None:
    donor = pieces.ModelProto()
    donor.CopyFrom(mistral)
    del donor.pieces[259:]
    new_pieces = ["▁привет", "▁приветствие", "ствие"]
    for place, piece in enumerate([*new_pieces, "ветст", "▁привет"[:5], "вие"]):
        donor.pieces.add(piece=piece, score=-float(place))
    merged = merging.merge(mistral, donor)
    made = list(merged.added)
    (tmp_path / "tokenizer").mkdir()
    tokenizer_files.write(merged.model, tmp_path / "tokenizer")
    base = tiny_mistral.model(32000)
    base.save_pretrained(tmp_path / "base")
    tokenizer_files.write(mistral, tmp_path / "base")
    anchors = ["▁по", "▁при", "the", "▁the", "ст", "▁"]
    vectors = _vectors(tmp_path / "pieces.vec", [*anchors, *made[:-1], "нет в словаре"])
    init(
        tmp_path / "base",
        tmp_path / "tokenizer",
        tmp_path / "out",
        method="focus",
        auxiliary=str(tmp_path / "pieces.vec"),
    )

    from safetensors.numpy import load_file

    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    ids = {piece.piece: id for id, piece in enumerate(merged.model.pieces)}
    for name in (EMBEDDING, HEAD):
        for piece in made[:-1]:
            cosines = [
                vectors[piece] @ vectors[anchor] / np.linalg.norm(vectors[piece]) / np.linalg.norm(vectors[anchor])
                for anchor in anchors
            ]
            expected = projected(np.array(cosines)) @ old[name][[ids[anchor] for anchor in anchors]]
            np.testing.assert_allclose(new[name][ids[piece]], expected, atol=1e-6)
        plain = embeddings.new_rows(embeddings.plan(mistral, merged.model), old[name])
        np.testing.assert_array_equal(new[name][ids[made[-1]]], plain[ids[made[-1]]])  # it has no vector
        np.testing.assert_array_equal(new[name][:32000], old[name])


def test_bad_vectors(mistral: Any, tmp_path: Path) -> None:
    plan = embeddings.plan(mistral, mistral)
    _vectors(tmp_path / "other.vec", ["нет в словаре"])
    (tmp_path / "short.vec").write_text("2 3\nа 1 2 3\nб 1 2\n")
    (tmp_path / "words.vec").write_text("2 3\nа 1 2 x\n")
    (tmp_path / "empty.vec").write_text("")
    for name, message in (
        ("none.vec", "No such file"),
        ("other.vec", "has no vector of a piece that both tokenizers have"),
        ("short.vec", r"short\.vec, line 3: no vector of fastText's text format \(2 numbers instead of 3\)"),
        ("words.vec", r"words\.vec, line 2: no vector"),
        ("empty.vec", r"empty\.vec, line 1: no vector"),
    ):
        with pytest.raises(UserError, match=message):
            focus.focused(plan, mistral, tmp_path / name)
    for arguments in ({"method": "focus"}, {"auxiliary": "a.vec"}):
        with pytest.raises(UserError, match="method focus needs --auxiliary"):
            init(tmp_path, tmp_path, tmp_path / "out", **arguments)
