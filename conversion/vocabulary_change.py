"""`vikhr-t5 vocab swap|extend`: a stored model, written with another vocabulary; and the report of it."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sentencepiece import sentencepiece_model_pb2

from conversion import convert
from conversion.vocabulary_swap import EMBEDDING, KINDS, SwappedModel, meanings
from vikhr_t5.data.vocabulary import AnyVocabulary, Vocabulary
from vikhr_t5.errors import UserError

_proto: Any = sentencepiece_model_pb2  # its classes are made at import, without stubs


def change(
    source: str | os.PathLike[str],
    source_format: str,
    destination: str | os.PathLike[str],
    destination_format: str,
    vocabulary: AnyVocabulary,
    extend: bool = False,
    old_vocabulary: AnyVocabulary | None = None,
    texts: Iterable[str] = (),
    dtype: str | None = None,
    console: Console | None = None,
) -> None:
    """Writes `source` with another vocabulary to `destination`, and prints what became of its rows.

    Args:
        vocabulary: the new one; where `extend`, what is added to the old one, and as many sentinels as the result has.
        old_vocabulary: that of a t5x checkpoint, which carries none.
        texts: what to count tokens per word on.
        source, source_format, destination, destination_format, dtype: as in `convert`.

    Raises:
        UserError: as `convert.open_model` and `convert.write_model`; the two vocabularies cannot be merged.
    """
    model = convert.open_model(source, source_format, old_vocabulary)
    old = model.vocabulary
    if old is None:
        raise UserError(f"{source} carries no vocabulary: name the one it was trained with by --old_vocabulary")
    with tempfile.TemporaryDirectory() as folder:
        if extend:
            file = Path(folder) / "spiece.model"
            file.write_bytes(merged(old, vocabulary))
            vocabulary = Vocabulary(str(file), vocabulary.num_sentinels)
        swapped = SwappedModel(model, vocabulary)
        convert.write_model(swapped, destination, destination_format, dtype)
        (console or Console()).print(report(swapped, old, vocabulary, texts))


def report(swapped: SwappedModel, old: AnyVocabulary, new: AnyVocabulary, texts: Iterable[str] = ()) -> Table:
    """What became of the rows, as a table; with texts, also how many tokens they take before and after."""
    plan = swapped.plan
    table = Table(title=f"{old.size:,} ids → {new.size:,} in {new.padded_size:,} rows", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for kind in KINDS:
        table.add_row(f"rows {kind}", "", f"{plan.count(kind):,}")
    table.add_row("old pieces in a mean", "", f"{plan.pieces_averaged:.2f}")
    for name, norms in swapped.norms.items():
        matrix = "embedding" if name == EMBEDDING else "output layer"
        for kind in KINDS:
            if kind in norms:
                table.add_row(f"{matrix}: norm of rows {kind}", f"{norms['old']:.4g}", f"{norms[kind]:.4g}")
    if texts := list(texts):
        before, after = measure(old, texts), measure(new, texts)
        table.add_row("tokens per word", f"{before[0]:.2f}", f"{after[0]:.2f}")
        table.add_row("unknown tokens", f"{before[1]:.1%}", f"{after[1]:.1%}")
    return table


def measure(vocabulary: AnyVocabulary, texts: Iterable[str]) -> tuple[float, float]:
    """Tokens per word of the texts, and the share of tokens that are unknown."""
    words = tokens = unknown = 0
    for text in texts:
        ids = vocabulary.encode(text)
        words, tokens, unknown = words + len(text.split()), tokens + len(ids), unknown + ids.count(vocabulary.unk_id)
    return tokens / max(words, 1), unknown / max(tokens, 1)


def merged(old: AnyVocabulary, new: AnyVocabulary) -> bytes:
    """A SentencePiece model that holds the old one's pieces under their ids, then the new one's others.

    Unigram scores stand as they are: logarithms of probabilities, each in the text that its model was trained on. Of
    BPE, the new merges come after all old ones. The old model's normalization holds. Sentinels are left out: give them
    by `extra_ids`.

    Raises:
        UserError: one of the two is of bytes, or their kinds differ.
    """
    if not isinstance(old, Vocabulary) or not isinstance(new, Vocabulary):
        raise UserError("bytes cannot be extended, nor extend a vocabulary: use `vikhr-t5 vocab swap`")
    model, other = (_proto.ModelProto.FromString(vocabulary.model_bytes) for vocabulary in (old, new))
    kinds = [_proto.TrainerSpec.ModelType.Name(each.trainer_spec.model_type) for each in (model, other)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"a {kinds[1]} model cannot extend a {kinds[0]} model: train the new one with --model_type="
            f"{kinds[0].lower()}, or use `vikhr-t5 vocab swap`"
        )
    del model.pieces[old.last_sentinel :]
    known, strings = set(meanings(old)), {piece.piece for piece in model.pieces}
    lowest = min(piece.score for piece in model.pieces)
    for piece, meaning in zip(other.pieces, meanings(new), strict=False):
        if meaning not in known and meaning[0] not in ("sentinel", "named") and piece.piece not in strings:
            added = model.pieces.add()
            added.CopyFrom(piece)
            if kinds[0] == "BPE" and piece.type == _proto.ModelProto.SentencePiece.NORMAL:
                added.score = lowest - 1 + piece.score
    model.trainer_spec.vocab_size = len(model.pieces)
    model.trainer_spec.byte_fallback |= other.trainer_spec.byte_fallback
    model.ClearField("self_test_data")
    return model.SerializeToString()
