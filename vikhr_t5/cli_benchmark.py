"""The command `vikhr-t5 benchmark`."""

import argparse
import sys
from pathlib import Path

from vikhr_t5.command_line import add_command
from vikhr_t5.errors import UserError, nearest


def add_commands(commands: argparse._SubParsersAction) -> None:
    """benchmark, with its flags."""
    benchmark = add_command(
        commands,
        "benchmark",
        _benchmark,
        "measure models on ru_mmlu, xwinograd_ru, xnli_ru, translation and perplexity",
        "vikhr-t5 benchmark runs/demo/hf vikhr=models/vikhr-7b --tasks ru_mmlu,xwinograd_ru,xnli_ru --output scores",
        "Through lm-eval; the prompts are those of the originals. Tasks: ru_mmlu, xwinograd_ru, xnli_ru,\n"
        "translate_ru_en, translate_en_ru, perplexity_ru, perplexity_en; but for ru_mmlu each also as NAME_seq2seq,\n"
        "which gives an encoder-decoder its text in the encoder. See docs/benchmarks.md.",
    )
    benchmark.add_argument("models", nargs="+", metavar="[NAME=]MODEL_DIR", help="Hugging Face models, or run folders")
    benchmark.add_argument("--tasks", metavar="A,B", help="default: ru_mmlu,xwinograd_ru,xnli_ru")
    benchmark.add_argument("--data_dir", metavar="D", help="the sets' folder: D/xnli_ru.jsonl, … (default: the hub)")
    benchmark.add_argument(
        "--num_fewshot", type=int, metavar="N", help="examples in a prompt (default: ru_mmlu 5, else 0)"
    )
    benchmark.add_argument("--limit", type=int, metavar="N", help="items of each task or subject: to try it out")
    benchmark.add_argument("--output", metavar="DIR", help="write the table here, and take up what is measured already")
    benchmark.add_argument("--batch_size", type=int, default=8, metavar="N", help="requests at once (default 8)")
    benchmark.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as it is stored")
    benchmark.add_argument(
        "--max_length", type=int, metavar="N", help="tokens that a model reads (default: as it says)"
    )


def _benchmark(flags: argparse.Namespace) -> None:
    from vikhr_t5 import benchmark_results, benchmark_table
    from vikhr_t5.cli_data import listed

    names = list(dict.fromkeys(listed(flags.tasks) if flags.tasks is not None else benchmark_results.DEFAULT))
    for name in names:
        if name not in benchmark_results.BENCHMARKS:
            raise UserError(f"unknown task {name!r} ({nearest(name, benchmark_results.BENCHMARKS)})")
    if not names:
        raise UserError("--tasks names none")
    for flag, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1), ("max_length", 1)):
        value = getattr(flags, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: {least} or more")
    output = Path(flags.output).expanduser() if flags.output else None
    if output:
        benchmark_table.check_output(output)
    try:
        from vikhr_t5 import benchmark, benchmark_models
    except ImportError as error:
        raise UserError(
            f"benchmark needs the extra [benchmark]: pip install 'vikhr-t5[benchmark]' ({error})"
        ) from error
    models = [benchmark_models.find_model(source) for source in flags.models]
    called = [model.name for model in models]
    if twice := [name for name in called if called.count(name) > 1]:
        raise UserError(f"two models are called {twice[0]!r}: NAME=MODEL_DIR gives them names")
    results = benchmark.benchmark(
        models,
        names,
        data_dir=flags.data_dir,
        num_fewshot=flags.num_fewshot,
        limit=flags.limit,
        output=output,
        batch_size=flags.batch_size,
        dtype=flags.dtype,
        max_length=flags.max_length,
    )
    table = benchmark_table.table(results, limit=flags.limit)
    print(benchmark_table.markdown(table))
    if output:
        benchmark_table.write(table, output, command=["vikhr-t5", *sys.argv[1:]])
        print(f"written: {output}/table.md, table.html, table.png, results.json")
