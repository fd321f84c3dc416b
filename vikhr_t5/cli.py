"""`vikhr-t5`: every command. Each parses its flags, calls one function of the package, and imports it only then."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vikhr_t5 import __version__
from vikhr_t5.command_line import Parser, add_command, exit_status, refuse_unknown
from vikhr_t5.errors import UserError
from vikhr_t5.packages import require_own


def build_parser() -> argparse.ArgumentParser:
    """All commands, with their flags."""
    parser = Parser(
        prog="vikhr-t5",
        description="Train T5 models: from text to a Hugging Face model.",
        epilog="example:\n  vikhr-t5 train --gin_file=recipes/demo.gin --dry_run --gin.MODEL_DIR=runs/demo …",
    )
    parser.add_argument("--version", action="version", version=f"vikhr-t5 {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    train = _gin_command(
        commands,
        "train",
        _train,
        "train a model from gin files",
        "vikhr-t5 train --gin_file=recipes/demo.gin --gin.MODEL_DIR=runs/demo --gin.VOCABULARY_FILE=runs/spiece.model",
    )
    train.add_argument("--dry_run", action="store_true", help="resolve all, print model, data, mesh, memory, and stop")
    _gin_command(
        commands,
        "eval",
        _eval,
        "evaluate a checkpoint on a seqio task",
        "vikhr-t5 eval --gin_file=models/demo.gin --gin_file=runs/eval.gin --gin.CHECKPOINT_PATH=runs/demo/instruct "
        "--gin.EVAL_OUTPUT_DIR=runs/demo/eval --gin.MIXTURE_OR_TASK_NAME=\"'demo_instructions'\" "
        "--gin.MIXTURE_OR_TASK_MODULE=\"'tasks.demo'\"",
    )
    infer = _gin_command(
        commands,
        "infer",
        _infer,
        "write a model's predictions for a seqio task",
        "vikhr-t5 infer --gin_file=models/demo.gin --gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=runs/demo/instruct "
        "--gin.INFER_OUTPUT_DIR=runs/demo/answers --gin.MIXTURE_OR_TASK_NAME=\"'demo_instructions'\" "
        "--gin.MIXTURE_OR_TASK_MODULE=\"'tasks.demo'\" --gin.TASK_FEATURE_LENGTHS=\"{'inputs':256,'targets':160}\"",
    )
    infer.add_argument("--shard_id", type=int, metavar="N", help="the same as --gin.infer.shard_id")

    cache = add_command(
        commands,
        "cache",
        _cache,
        "turn a task or mixture into a token store",
        "vikhr-t5 cache --mixture demo_ul2 --module tasks.demo --vocabulary runs/spiece.model --cache_dir runs/cache",
    )
    _data_flags(cache)
    cache.add_argument("--splits", metavar="A,B", help="default: all")
    cache.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes (default: one per core)")
    cache.add_argument(
        "--dedup",
        choices=["exact", "minhash", "none"],
        help="drop duplicate documents of a task (default: as it is cached already, else none)",
    )
    cache.add_argument("--max_bad_lines", type=int, metavar="N", help="of published sets: skip so many (default: 0)")
    cache.add_argument("--beam_runner", metavar="R", help="through Apache Beam: FlinkRunner, SparkRunner, …")
    cache.add_argument("--beam_options", default="", metavar="O", help="its pipeline options, in one argument")

    preview = add_command(
        commands,
        "preview",
        _preview,
        "show examples as text, tokens, denoised, packed",
        "vikhr-t5 preview --mixture demo_ul2 -n 2 --vocabulary runs/spiece.model --cache_dir runs/cache",
    )
    _data_flags(preview)
    preview.add_argument("-n", type=int, default=3, metavar="N", help="examples (default 3)")
    preview.add_argument("--split", default="train", help="default: train")
    preview.add_argument("--inputs", type=int, default=512, metavar="S", help="inputs length (default 512)")
    preview.add_argument("--targets", type=int, default=240, metavar="T", help="targets length (default 240)")
    preview.add_argument("--denoisers", metavar="NAME", help="another mixture of denoisers: ul2, ul2r, fred, …")
    preview.add_argument("--html", metavar="F", help="write a page instead: one file, for a browser or a phone")

    decontaminate = add_command(
        commands,
        "decontaminate",
        _decontaminate,
        "report training examples that hold what a model is evaluated on",
        "vikhr-t5 decontaminate --mixture vikhr_flan --module tasks.flan --against xwinograd_ru,xnli_ru,ru_mmlu "
        "--data_dir evaluation --output contamination.html",
    )
    decontaminate.add_argument("--mixture", required=True, metavar="NAME", help="a seqio task or mixture")
    decontaminate.add_argument("--module", default="tasks.demo", metavar="M", help="what registers it")
    decontaminate.add_argument("--against", required=True, metavar="A,B", help="xwinograd_ru, xnli_ru, ru_mmlu")
    decontaminate.add_argument("--data_dir", metavar="D", help="the sets' folder: D/NAME.jsonl, … (default: the hub)")
    decontaminate.add_argument("--output", metavar="F", help="the report: .json or .html")
    decontaminate.add_argument("--split", default="train", help="default: train")
    decontaminate.add_argument("--ngram", type=int, default=13, metavar="N", help="words (default 13, as in GPT-3)")
    decontaminate.add_argument(
        "--min_share",
        type=float,
        default=0.0,
        metavar="X",
        help="of an item's n-grams (PaLM: --ngram 8 --min_share 0.7)",
    )

    convert = add_command(
        commands,
        "convert",
        _convert,
        "convert a model between vikhr-t5, t5x and Hugging Face",
        "vikhr-t5 convert --from vikhr --to hf runs/demo/instruct runs/demo/hf",
    )
    convert.add_argument("source", metavar="SRC", help="a run folder, a checkpoint's folder or a model's folder")
    convert.add_argument("destination", metavar="DST", help="the folder to write")
    convert.add_argument("--from", dest="from_format", choices=["hf", "t5x", "vikhr"], required=True)
    convert.add_argument("--to", dest="to_format", choices=["hf", "t5x", "vikhr"], required=True)
    convert.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the parameters (default: as in SRC)")
    convert.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of a file of hf (default 5GB)")
    convert.add_argument("--license", metavar="L", help="of the model, for its card: apache-2.0, mit, …")
    convert.add_argument("--scanned", action="store_true", help="t5x: the layout of examples/scalable_t5")
    convert.add_argument("--vocabulary", metavar="F", help="where SRC has none, as t5x's: a .model file, or 'bytes'")
    convert.add_argument("--extra_ids", type=int, metavar="N", help="its sentinels (default 100; bytes: 0)")
    convert.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare with transformers, or array by array (default: yes; of a large model, some layers)",
    )

    translate = add_command(
        commands,
        "translate",
        _translate,
        "translate a set of instructions with a Hugging Face model",
        "vikhr-t5 translate --input flan.jsonl --output flan_ru.jsonl --model facebook/nllb-200-distilled-600M "
        "--source_lang eng_Latn --target_lang rus_Cyrl",
        "Languages as the model names them: NLLB eng_Latn and rus_Cyrl, MADLAD ru, Marian (opus-mt) rus or none.\n"
        "Stopped or killed, it goes on where it was. Rejected rows: OUTPUT.rejected. See docs/translation.md.",
    )
    translate.add_argument("--input", metavar="F,G", help="JSON lines or Parquet, folders of them, or a hub's dataset")
    translate.add_argument("--mixture", metavar="NAME", help="a seqio task or mixture, in place of files")
    translate.add_argument("--module", default="tasks.demo", metavar="M", help="what registers it")
    translate.add_argument("--split", default="train", help="of it (default train)")
    translate.add_argument("--fields", default="inputs,targets", metavar="A,B", help="names of the two texts of a row")
    translate.add_argument("--output", required=True, metavar="F", help="the JSON lines to write")
    translate.add_argument("--model", required=True, metavar="M", help="a local folder, or a name on the hub")
    translate.add_argument("--source_lang", metavar="L", help="NLLB: eng_Latn")
    translate.add_argument("--target_lang", metavar="L", help="rus_Cyrl, ru, rus")
    translate.add_argument("--script", metavar="S", help="of the target (default: as in rus_Cyrl, or Cyrl)")
    translate.add_argument(
        "--ignore", default="", metavar="A,B", help="reasons that reject nothing: numbers, script, …"
    )
    translate.add_argument("--num_beams", type=int, default=1, metavar="N", help="default 1: greedy")
    translate.add_argument("--batch_tokens", type=int, default=4096, metavar="N", help="of a batch (default 4096)")
    translate.add_argument(
        "--max_tokens", type=int, default=200, metavar="N", help="of a sentence; a longer one is divided"
    )
    translate.add_argument("--device", metavar="D", help="default: cuda where there is one")
    translate.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU")

    report = add_command(
        commands,
        "report",
        _report,
        "a run folder as one HTML page",
        "vikhr-t5 report runs/demo/ul2 runs/demo/instruct --output runs/demo/report.html",
    )
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run folders, in the order of their stages")
    report.add_argument("--output", metavar="F", help="default: report.html in the last run folder")

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
    vocab_train.add_argument("--input", metavar="F,G", help="text, JSON lines, Parquet; files or folders of them")
    vocab_train.add_argument("--fields", default="text", metavar="A,B", help="of JSON lines and Parquet (default text)")
    vocab_train.add_argument("--mixture", metavar="NAME", help="a seqio task or mixture, in place of files")
    vocab_train.add_argument("--module", default="tasks.demo", metavar="M", help="what registers it")
    vocab_train.add_argument("--split", default="train", help="of it (default train)")
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
    return parser


def _gin_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    """A command that gin files configure. The flags are t5x's."""
    parser = add_command(
        commands,
        name,
        run,
        summary,
        example,
        "--gin.NAME=VALUE, repeated, sets a macro (TRAIN_STEPS) or a binding (step.Trainer.num_microbatches),\n"
        "over the files. Values are Python's, as in t5x: --gin.MIXTURE_OR_TASK_NAME=\"'demo_ul2'\".\n"
        "Only a path may stand without the inner quotes: --gin.MODEL_DIR=runs/demo, --gin.MODEL_DIR=/data/run.",
    )
    parser.add_argument("--gin_file", action="append", required=True, metavar="F", help="a gin file; repeat for more")
    parser.add_argument("--gin_search_paths", action="append", default=[], metavar="A,B", help="folders of gin files")
    parser.add_argument("--tfds_data_dir", metavar="D", help="where TensorFlow Datasets are, for caching tasks")
    for ours_anyway in ("--alsologtostderr", "--logtostderr"):  # what absl's users write
        parser.add_argument(ours_anyway, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--seqio_additional_cache_dirs", help=argparse.SUPPRESS)
    return parser


def _data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mixture", required=True, metavar="NAME", help="a seqio task or mixture")
    parser.add_argument("--module", default="tasks.demo", metavar="M", help="what registers it (default tasks.demo)")
    parser.add_argument("--cache_dir", default="cache", metavar="D", help="where token stores lie (default ./cache)")
    vocabulary = os.environ.get("VIKHR_T5_VOCABULARY")
    parser.add_argument("--vocabulary", default=vocabulary, metavar="F", help="or bytes; default: $VIKHR_T5_VOCABULARY")
    parser.add_argument("--extra_ids", type=int, metavar="N", help="sentinels (default 300; of bytes 0, as in ByT5)")


def _launch(flags: argparse.Namespace, function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of `function`, as the gin files and flags have them."""
    from vikhr_t5 import launch

    if flags.seqio_additional_cache_dirs:
        raise UserError(
            "--seqio_additional_cache_dirs: seqio's caches are not read, tasks are cached as token stores once; say"
            " where with --gin.CACHE_DIR (with t5x's run files --gin.DatasetConfig.cache_dir)"
        )
    if flags.tfds_data_dir:
        os.environ["TFDS_DATA_DIR"] = os.path.expanduser(flags.tfds_data_dir)
    launch.load(flags.gin_file, flags.bindings, [p for group in flags.gin_search_paths for p in group.split(",") if p])
    arguments = launch.arguments(function, supplied=["config_text"])
    if idle := launch.idle():
        print(f"bound, and used by nothing here: {', '.join(idle)}", file=sys.stderr)
    return {**arguments, "config_text": launch.config_text()}


def _readable(restore: Any, folder: str, model: Any) -> Any:
    """A `RestoreCheckpointConfig` of our own format: a checkpoint of t5x or Hugging Face is converted into `folder`.

    A run that has a whole checkpoint goes on from that, even if the one that it began with is no longer there.
    """
    from vikhr_t5.train.checkpoint_files import defect, steps

    if not restore or not restore.path or any(defect(own) is None for own in steps(Path(folder) / "checkpoints")):
        return restore
    require_own("conversion")
    from conversion import convert
    from vikhr_t5.remote import local_copy

    source = local_copy(restore.path, "or give a local copy")
    return dataclasses.replace(restore, path=convert.initial_checkpoint(source, folder, model.config, model.vocabulary))


def _train(flags: argparse.Namespace) -> None:
    from vikhr_t5.train import loop

    arguments = _launch(flags, loop.train)
    if flags.dry_run:
        from vikhr_t5 import dry_run

        dry_run.show(arguments)
        return
    checkpoint_cfg = arguments["checkpoint_cfg"]
    restore = _readable(checkpoint_cfg.restore, arguments["model_dir"], arguments["model"])
    arguments["checkpoint_cfg"] = dataclasses.replace(checkpoint_cfg, restore=restore)
    loop.train(**arguments)


def _eval(flags: argparse.Namespace) -> None:
    from vikhr_t5 import eval as eval_script

    _run_on_checkpoint(flags, eval_script.evaluate)


def _infer(flags: argparse.Namespace) -> None:
    from vikhr_t5 import infer as infer_script

    if flags.shard_id is not None:
        flags.bindings.append(f"infer.shard_id={flags.shard_id}")
    _run_on_checkpoint(flags, infer_script.infer)


def _run_on_checkpoint(flags: argparse.Namespace, function: Callable[..., Any]) -> None:
    arguments = _launch(flags, function)
    restore = arguments["restore_checkpoint_cfg"]
    arguments["restore_checkpoint_cfg"] = _readable(restore, arguments["output_dir"], arguments["model"])
    function(**arguments)


def _cache(flags: argparse.Namespace) -> None:
    vocabulary_file = _given_vocabulary(flags)
    from vikhr_t5.data import cache  # TensorFlow: five seconds

    cache.cache(
        flags.mixture,
        module=flags.module,
        cache_dir=flags.cache_dir,
        splits=flags.splits.split(",") if flags.splits else None,
        num_workers=flags.num_workers,
        vocabulary_file=vocabulary_file,
        extra_ids=flags.extra_ids,
        dedup_method=flags.dedup,
        max_bad_lines=flags.max_bad_lines,
        beam_runner=flags.beam_runner,
        beam_options=flags.beam_options,
    )


def _preview(flags: argparse.Namespace) -> None:
    from rich.console import Console

    from vikhr_t5.data import pipeline, preview, preview_html, preview_terminal, vocabulary

    config = pipeline.DatasetConfig(
        mixture_or_task_name=flags.mixture,
        task_feature_lengths={"inputs": flags.inputs, "targets": flags.targets},
        split=flags.split,
        batch_size=1,
        seed=0,
        module=flags.module,
        cache_dir=flags.cache_dir,
        denoisers=flags.denoisers,
    )
    seen = preview.gather(config, vocabulary.open_vocabulary(_given_vocabulary(flags), flags.extra_ids), flags.n)
    if flags.html:
        preview_html.write(seen, flags.html)
        print(f"written: {flags.html}")
    else:
        preview_terminal.show(seen, Console())


def _decontaminate(flags: argparse.Namespace) -> None:
    from vikhr_t5.data import decontamination

    if flags.output:
        decontamination.check_output(flags.output)
    report = decontamination.check(
        flags.mixture,
        flags.module,
        against=flags.against.split(","),
        data_dir=flags.data_dir,
        split=flags.split,
        ngram=flags.ngram,
        min_share=flags.min_share,
    )
    print("\n".join(report.lines()))
    if flags.output:
        decontamination.write(report, flags.output)


def _given_vocabulary(flags: argparse.Namespace) -> str:
    if not flags.vocabulary:
        raise UserError("no vocabulary: give --vocabulary=spiece.model (or bytes), or set VIKHR_T5_VOCABULARY")
    return flags.vocabulary


def _convert(flags: argparse.Namespace) -> int:
    require_own("conversion")
    from conversion import convert

    vocabulary = None
    if flags.vocabulary:
        from vikhr_t5.data.vocabulary import open_vocabulary

        vocabulary = open_vocabulary(flags.vocabulary, flags.extra_ids, default=100)
    model = convert.open_model(flags.source, flags.from_format, vocabulary)
    convert.write_model(
        model,
        flags.destination,
        flags.to_format,
        flags.dtype,
        flags.max_shard_size,
        scanned=flags.scanned,
        license=flags.license,
    )
    print(f"written: {flags.destination}")
    if flags.verify is False:
        return 0
    formats = flags.from_format, flags.to_format
    with_transformers = bool(flags.verify or find_spec("transformers"))
    if "hf" in formats and not with_transformers:
        print("transformers is not installed (pip install 'vikhr-t5[hf]'): arrays are compared, nothing is computed")
    same = convert.verify(model, flags.source, formats[0], flags.destination, formats[1], with_transformers)
    return 0 if same else 1


def _translate(flags: argparse.Namespace) -> None:
    from vikhr_t5 import translate
    from vikhr_t5.data import records, task_texts

    if bool(flags.input) == bool(flags.mixture):
        raise UserError("translate: give --input FILES, or --mixture TASK, and not both")
    if len(fields := flags.fields.split(",")) != 2:
        raise UserError(f"--fields {flags.fields}: two names, of a row's inputs and of its targets")
    source = {"input": flags.input} if flags.input else {"mixture": flags.mixture, "split": flags.split}

    def rows() -> Iterator[translate.Row]:
        if flags.input:
            yield from records.read_rows([name for name in flags.input.split(",") if name])
            return
        for place, one in enumerate(task_texts.read_task(flags.mixture, flags.module, flags.split)):
            yield f"{one.task}[{place}]", {**one.others, "task": one.task, **one.texts}

    from vikhr_t5.translation_models import TranslationModel

    translator = TranslationModel(
        flags.model,
        flags.source_lang,
        flags.target_lang,
        batch_tokens=flags.batch_tokens,
        max_tokens=flags.max_tokens,
        num_beams=flags.num_beams,
        device=flags.device,
        dtype=flags.dtype,
    )
    report = translate.translate(
        rows,
        flags.output,
        translator,
        {**source, **translator.settings},
        fields=(fields[0], fields[1]),
        script=flags.script or (flags.target_lang or "").partition("_")[2] or "Cyrl",
        ignore=[reason for reason in flags.ignore.split(",") if reason],
    )
    print(f"{report}\nwritten: {flags.output}")


def _report(flags: argparse.Namespace) -> None:
    from vikhr_t5 import report

    output = flags.output or Path(flags.run_dirs[-1]) / "report.html"
    report.report(flags.run_dirs, output)
    print(f"written: {output}")


def _vocab_train(flags: argparse.Namespace) -> None:
    from vikhr_t5.data import vocabulary

    if bool(flags.input) == bool(flags.mixture):
        raise UserError("vocab train: give --input FILES, or --mixture TASK, and not both")
    if flags.mixture:
        from vikhr_t5.data import task_texts

        examples = task_texts.read_task(flags.mixture, flags.module, flags.split)
        texts: Iterable[str] = (text for example in examples for text in example.texts.values())
    else:
        texts = _texts(flags.input, flags.fields)
    modes = vocabulary.DEFAULT_MODE_TOKENS if flags.mode_tokens is None else flags.mode_tokens.split(",")
    trained = vocabulary.train_vocabulary(
        texts,
        flags.output,
        flags.size,
        model_type=flags.model_type,
        mode_tokens=[token for token in modes if token],
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

    sources = [name for name in files.split(",") if name]
    for field in fields.split(","):
        yield from records.read_lines(sources, field)


def _vocab_chart(flags: argparse.Namespace) -> None:
    from rich.console import Console

    from vikhr_t5.data import fertility, vocabulary

    named = [part.rpartition("=")[::2] for part in flags.tokenizers.split(",") if part]
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

    old = None
    if flags.old_vocabulary:
        old = vocabulary.open_vocabulary(flags.old_vocabulary, flags.old_extra_ids, default=100)
    vocabulary_change.change(
        flags.source,
        flags.from_format,
        flags.destination,
        flags.to_format,
        vocabulary.open_vocabulary(flags.vocabulary, flags.extra_ids),
        extend=extend,
        old_vocabulary=old,
        texts=vocabulary.read_lines([Path(flags.text)]) if flags.text else (),
        dtype=flags.dtype,
    )
    print(f"written: {flags.destination}")


def _vocab_extend(flags: argparse.Namespace) -> None:
    _vocab_swap(flags, extend=True)


def _use_huge_pages() -> None:
    """Start this process again with glibc's malloc on transparent huge pages.

    XLA's CPU backend allocates and frees its buffers with malloc at every step. With 4 KiB pages a step of T5 small
    takes a million page faults, about a fifth of its time; with huge pages, ten thousand (docs/experiments.md).
    glibc reads the setting at process start only, hence the exec. It keeps the process id, and happens at most once.
    """
    tunables, guard = os.environ.get("GLIBC_TUNABLES", ""), "VIKHR_T5_RESTARTED"
    accelerator = any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("JAX_PLATFORMS") != "cpu"
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables or guard in os.environ or accelerator:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
    os.environ[guard] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of a command line; `--gin.NAME=VALUE` of a gin command go to `bindings`, in their order.

    Raises:
        UserError: an unknown command or flag, or a flag without its value.
    """
    # t5x's other spelling: --gin_bindings="NAME = VALUE".
    joined = re.sub(r"(^|\0)--gin_bindings[=\0]\s*([\w./]+)\s*=\s*", r"\1--gin.\2=", "\0".join(argv))
    flags, rest = build_parser().parse_known_args(joined.split("\0") if argv else [])
    takes_gin = flags.run in (_train, _eval, _infer)
    flags.bindings = [a.removeprefix("--gin.") for a in rest if a.startswith("--gin.")] if takes_gin else []
    unknown = [a for a in rest if not (flags.bindings and a.startswith("--gin."))]
    refuse_unknown(flags, unknown)
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    sys.path.append(os.getcwd())  # last: modules of tasks beside the user's gin files are found, ours stay first

    def command() -> int | None:
        flags = parse(arguments)
        if argv is None and flags.run in (_train, _eval, _infer, _convert):
            _use_huge_pages()
        return flags.run(flags)

    return exit_status("vikhr-t5", command, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
