"""The commands of `vikhr-t5 vocab`: train a vocabulary, compare tokenizers, put another vocabulary under a model."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from vikhr_t5.cli_data import check_source, listed, source_flags
from vikhr_t5.command_line import add_command
from vikhr_t5.errors import UserError
from vikhr_t5.packages import require_own


def add_commands(commands: argparse._SubParsersAction) -> None:
    """vocab train, chart, swap, extend, with their flags."""
    vocab = commands.add_parser("vocab", help="vocabularies", description="Vocabularies.")
    actions = vocab.add_subparsers(title="actions", metavar="ACTION", required=True)
    vocab_train = add_command(
        actions,
        "train",
        _vocab_train,
        "train a SentencePiece vocabulary from text",
        "vikhr-t5 vocab train --input a.txt,b.txt --output spiece.model --size 8000",
        "From files (--input), or from the texts of a seqio task (--mixture NAME --module M). VikhrT5's 58k has\n"
        "--size 58068: with 300 sentinels 58,368 = 456 x 128 rows. See docs/vocabularies.md.",
    )
    source_flags(vocab_train, "text, JSON lines, Parquet; files or folders of them")
    vocab_train.add_argument("--fields", default="text", metavar="A,B", help="of JSON lines and Parquet (default text)")
    vocab_train.add_argument("--output", required=True, metavar="F", help="the .model file to write")
    vocab_train.add_argument("--size", type=int, required=True, metavar="N", help="pieces; sentinels come on top")
    vocab_train.add_argument("--model_type", choices=["unigram", "bpe"], default="unigram")
    vocab_train.add_argument("--character_coverage", type=float, default=0.9999, metavar="X", help="default 0.9999")
    vocab_train.add_argument("--byte_fallback", action=argparse.BooleanOptionalAction, default=True)
    vocab_train.add_argument("--split_digits", action=argparse.BooleanOptionalAction, default=True)
    vocab_train.add_argument("--mode_tokens", metavar="A,B", help="default: those of ul2 and fred; '' for none")
    vocab_train.add_argument("--max_lines", type=int, metavar="N", help="train on a random sample of the lines")
    vocab_train.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    chart = add_command(
        actions,
        "chart",
        _vocab_chart,
        "how finely tokenizers cut a text, as table and picture",
        "vikhr-t5 vocab chart --tokenizers Mistral=tokenizer.model.v1,ours=spiece.model --texts ru.txt --output a.png",
        "A tokenizer is a SentencePiece model, a tokenizer.json, a tekken.json, OpenAI's NAME.tiktoken, or a folder\n"
        "with one of them. See docs/vocabularies.md.",
    )
    chart.add_argument("--tokenizers", required=True, metavar="NAME=F,…", help="names and their files or folders")
    chart.add_argument("--texts", required=True, metavar="F,G", help="text, JSON lines, Parquet to measure on")
    chart.add_argument("--fields", default="text", metavar="A,B", help="of JSON lines and Parquet (default text)")
    chart.add_argument("--output", metavar="F", help=".png, .svg or .html; without it, the table alone")
    swap = add_command(
        actions,
        "swap",
        _vocab_swap,
        "put another vocabulary under a model",
        "vikhr-t5 vocab swap --from hf flan-t5-xl runs/start --vocabulary spiece.model",
        "New rows are means of the old rows of a piece's text. The result is a checkpoint to start a run from\n"
        "(INITIAL_CHECKPOINT_PATH). See docs/conversion.md.",
    )
    extend = add_command(
        actions,
        "extend",
        _vocab_extend,
        "add the pieces of another vocabulary to a model's",
        "vikhr-t5 vocab extend --from hf flan-t5-xl runs/start --vocabulary spiece.model",
        "As swap, but the old pieces stay, under their ids.",
    )
    for change in (swap, extend):
        change.add_argument("source", metavar="SRC", help="a run folder, a checkpoint's folder or a model's folder")
        change.add_argument("destination", metavar="DST", help="the folder to write")
        change.add_argument("--from", dest="from_format", choices=["hf", "t5x", "vikhr"], required=True)
        change.add_argument("--to", dest="to_format", choices=["hf", "vikhr"], default="vikhr")
        change.add_argument("--vocabulary", required=True, metavar="F", help="the new one: a .model file, or bytes")
        change.add_argument(
            "--extra_ids", type=int, metavar="N", help="sentinels of the result (default 300; bytes: 0)"
        )
        change.add_argument("--old_vocabulary", metavar="F", help="of a t5x checkpoint: a .model file, or bytes")
        change.add_argument("--old_extra_ids", type=int, metavar="N", help="its sentinels (default 100; bytes: 0)")
        change.add_argument("--text", metavar="F", help="a UTF-8 file to count tokens per word on")
        change.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the parameters (default: as in SRC)")


def _vocab_train(flags: argparse.Namespace) -> None:
    from vikhr_t5.data import vocabulary

    check_source(flags)
    if flags.mixture:
        from vikhr_t5.data import task_texts

        examples = task_texts.read_task(flags.mixture, flags.module, flags.split)
        texts: Iterable[str] = (text for example in examples for text in example.texts.values())
    else:
        texts = _texts(flags.input, flags.fields)
    modes = vocabulary.DEFAULT_MODE_TOKENS if flags.mode_tokens is None else listed(flags.mode_tokens)
    trained = vocabulary.train_vocabulary(
        texts,
        flags.output,
        flags.size,
        model_type=flags.model_type,
        mode_tokens=modes,
        character_coverage=flags.character_coverage,
        byte_fallback=flags.byte_fallback,
        split_digits=flags.split_digits,
        max_lines=flags.max_lines,
        seed=flags.seed,
    )
    pieces = trained.size - trained.extra_ids
    print(f"written: {flags.output}, {pieces} pieces; with {trained.extra_ids} sentinels {trained.padded_size} rows")


def _texts(files: str, fields: str) -> Iterator[str]:
    """The texts of files and folders, both joined by commas."""
    from vikhr_t5.data import records

    for field in fields.split(","):
        yield from records.read_lines(listed(files), field)


def _vocab_chart(flags: argparse.Namespace) -> None:
    from rich.console import Console

    from vikhr_t5.data import fertility, vocabulary

    named = [part.rpartition("=")[::2] for part in listed(flags.tokenizers)]
    tokenizers = [fertility.open_tokenizer(source, name or None) for name, source in named]
    if not (names := [tokenizer.name for tokenizer in tokenizers]):
        raise UserError("no tokenizer: --tokenizers NAME=FILE, several joined by commas")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two tokenizers are called {twice[0]!r}: --tokenizers NAME=FILE gives them names")
    lines = list(vocabulary.read_lines(_texts(flags.texts, flags.fields)))
    measured = [fertility.measure(tokenizer, lines) for tokenizer in tokenizers]
    Console().print(fertility.table(measured))
    if flags.output:
        fertility.write_chart(measured, flags.output)
        print(f"written: {flags.output}")


def _vocab_swap(flags: argparse.Namespace, extend: bool = False) -> None:
    require_own("conversion")
    from conversion import vocabulary_change
    from vikhr_t5.data import vocabulary

    vocabulary_change.change(
        flags.source,
        flags.from_format,
        flags.destination,
        flags.to_format,
        vocabulary.open_vocabulary(flags.vocabulary, flags.extra_ids),
        extend=extend,
        old_vocabulary=vocabulary.named_vocabulary(flags.old_vocabulary, flags.old_extra_ids, "old_"),
        texts=vocabulary.read_lines([Path(flags.text)]) if flags.text else (),
        dtype=flags.dtype,
    )
    print(f"written: {flags.destination}")


def _vocab_extend(flags: argparse.Namespace) -> None:
    _vocab_swap(flags, extend=True)
