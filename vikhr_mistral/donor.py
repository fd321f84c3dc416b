"""A BPE donor: a SentencePiece model trained with the base's settings, whose pieces extend the base."""

import io
from collections.abc import Iterable
from typing import Any

import sentencepiece

from vikhr_mistral.pieces import ModelProto
from vikhr_t5.data.vocabulary import read_lines
from vikhr_t5.errors import UserError

_LINE_BYTES = 32768  # as `read_lines` cuts them: longer ones would be skipped silently
# Settings of the base's trainer that decide which pieces there can be.
_AS_THE_BASE = (
    "character_coverage",
    "max_sentencepiece_length",
    "split_by_unicode_script",
    "split_by_whitespace",
    "split_by_number",
    "split_digits",
    "byte_fallback",
    "unk_id",
    "bos_id",
    "eos_id",
    "pad_id",
)


def train(
    texts: Iterable[str], base: Any, size: int = 50_000, max_lines: int = 10_000_000, num_threads: int = 16
) -> Any:
    """A SentencePiece `ModelProto`, BPE, of `size` pieces. The same texts and arguments give the same model.

    Args:
        texts: each may hold several lines.
        base: the model whose normalization and trainer settings are taken; runs of spaces give no pieces.
        size: with special pieces and bytes.
        max_lines: more lines are sampled; all that are used are held in memory.

    Raises:
        UserError: there is no text, or it is too little for `size`.
    """
    lines = read_lines(texts)
    first = next(lines, None)
    if first is None:
        raise UserError("no text to train a donor on: the corpus holds no line but blank ones")
    failure: list[UserError] = []

    def given() -> Iterable[str]:
        yield first
        try:
            yield from lines
        except UserError as error:  # SentencePiece would turn it into an error of its own
            failure.append(error)

    spec, output = base.trainer_spec, io.BytesIO()
    sentencepiece.set_random_generator_seed(0)  # of the sample
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(given()),
            model_writer=output,
            model_type="bpe",
            vocab_size=size,
            normalization_rule_name="identity",
            add_dummy_prefix=base.normalizer_spec.add_dummy_prefix,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=False,
            max_sentence_length=_LINE_BYTES,
            input_sentence_size=max_lines,
            shuffle_input_sentence=True,
            train_extremely_large_corpus=True,  # 64-bit counts
            num_threads=num_threads,
            minloglevel=2,
            **{name: getattr(spec, name) for name in _AS_THE_BASE},
        )
    except RuntimeError as error:
        if failure:  # what was read until then may not do for a vocabulary
            raise failure[0] from None
        reason = str(error).rpartition("] ")[2].strip()  # what precedes is a place in SentencePiece's source
        raise UserError(f"cannot train a donor of {size:,} pieces on this text: {reason}; see --donor_size") from error
    if failure:
        raise failure[0]
    return ModelProto.FromString(output.getvalue())
