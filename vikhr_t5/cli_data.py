"""The commands of `vikhr-t5` that make, show, check and translate data."""

import argparse
import os
from collections.abc import Iterator

from vikhr_t5.command_line import add_command
from vikhr_t5.errors import UserError
from vikhr_t5.files import check_file


def add_commands(commands: argparse._SubParsersAction) -> None:
    """cache, preview, decontaminate, translate, with their flags."""
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
    source_flags(translate, "JSON lines or Parquet, folders of them, or a hub's dataset")
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


def _data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mixture", required=True, metavar="NAME", help="a seqio task or mixture")
    parser.add_argument("--module", default="tasks.demo", metavar="M", help="what registers it (default tasks.demo)")
    parser.add_argument("--cache_dir", default="cache", metavar="D", help="where token stores lie (default ./cache)")
    vocabulary = os.environ.get("VIKHR_T5_VOCABULARY")
    parser.add_argument("--vocabulary", default=vocabulary, metavar="F", help="or bytes; default: $VIKHR_T5_VOCABULARY")
    parser.add_argument("--extra_ids", type=int, metavar="N", help="sentinels (default 300; of bytes 0, as in ByT5)")


def source_flags(parser: argparse.ArgumentParser, files: str) -> None:
    """Files, or a task in place of them; `check_source` wants one of the two."""
    parser.add_argument("--input", metavar="F,G", help=files)
    parser.add_argument("--mixture", metavar="NAME", help="a seqio task or mixture, in place of files")
    parser.add_argument("--module", default="tasks.demo", metavar="M", help="what registers it")
    parser.add_argument("--split", default="train", help="of it (default train)")


def check_source(flags: argparse.Namespace) -> None:
    """UserError unless exactly one of the two sources of `source_flags` is given."""
    if bool(flags.input) == bool(flags.mixture):
        command = flags.parser.prog.removeprefix("vikhr-t5 ")
        raise UserError(f"{command}: give --input FILES, or --mixture TASK, and not both")


def listed(flag: str) -> list[str]:
    """The values of a flag that are joined by commas."""
    return [value for value in flag.split(",") if value]


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

    if flags.html:
        check_file(flags.html)
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


def _translate(flags: argparse.Namespace) -> None:
    from vikhr_t5 import translate
    from vikhr_t5.data import records, task_texts

    check_source(flags)
    if len(fields := flags.fields.split(",")) != 2:
        raise UserError(f"--fields {flags.fields}: two names, of a row's inputs and of its targets")
    source = {"input": flags.input} if flags.input else {"mixture": flags.mixture, "split": flags.split}

    def rows() -> Iterator[translate.Row]:
        if flags.input:
            yield from records.read_rows(listed(flags.input))
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
        ignore=listed(flags.ignore),
    )
    print(f"{report}\nwritten: {flags.output}")
