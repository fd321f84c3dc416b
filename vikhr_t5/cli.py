"""`vikhr-t5`: every command. Each parses its flags, calls one function of the package, and imports it only then.

Here: what trains and runs a model, converts it and reports; `cli_data` has the commands of data, `cli_vocab` those of
vocabularies, `cli_plan`, `cli_benchmark` and `cli_playground` one each.
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vikhr_t5 import __version__, cli_benchmark, cli_data, cli_infer, cli_plan, cli_playground, cli_vocab, hosts
from vikhr_t5.cli_gin import gin_command, launched, readable_checkpoint, run_on_checkpoint
from vikhr_t5.command_line import Parser, add_command, exit_status, refuse_unknown
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

    train = gin_command(
        commands,
        "train",
        _train,
        "train a model from gin files",
        "vikhr-t5 train --gin_file=recipes/demo.gin --gin.MODEL_DIR=runs/demo --gin.VOCABULARY_FILE=runs/spiece.model",
    )
    hosts.add_flags(train)
    train.add_argument("--dry_run", action="store_true", help="resolve all, print model, data, mesh, memory, and stop")
    train.add_argument(
        "--profile", type=int, nargs="?", const=5, default=0, metavar="STEPS",
        help="trace 5 steps, or STEPS, into MODEL_DIR/profile, for XProf or Perfetto",
    )  # fmt: skip
    gin_command(
        commands,
        "eval",
        _eval,
        "evaluate a checkpoint on a seqio task",
        "vikhr-t5 eval --gin_file=models/demo.gin --gin_file=runs/eval.gin --gin.CHECKPOINT_PATH=runs/demo/instruct "
        "--gin.EVAL_OUTPUT_DIR=runs/demo/eval --gin.MIXTURE_OR_TASK_NAME=\"'demo_instructions'\" "
        "--gin.MIXTURE_OR_TASK_MODULE=\"'tasks.demo'\"",
    )
    cli_infer.add_commands(commands)
    cli_plan.add_commands(commands)

    cli_data.add_commands(commands)
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

    report = add_command(
        commands,
        "report",
        _report,
        "run folders as one HTML page: the stages of a model, or runs to compare",
        "vikhr-t5 report runs/demo/ul2 runs/demo/instruct --output runs/demo/report.html",
    )
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run folders, in the order of their stages")
    report.add_argument("--compare", action="store_true", help="they are runs beside one another, not stages")
    report.add_argument("--price_per_hour", type=float, metavar="USD", help="of one device: what the run costs")
    report.add_argument("--output", metavar="F", help="default: report.html in the last run folder")

    cli_vocab.add_commands(commands)
    cli_benchmark.add_commands(commands)
    cli_playground.add_commands(commands)
    return parser


def _train(flags: argparse.Namespace) -> None:
    if flags.dry_run or not hosts.wanted(flags):
        _train_here(flags)
        return
    hosts.supervised("vikhr-t5")
    with hosts.connected(flags, "vikhr-t5"):
        _train_here(flags)


def _train_here(flags: argparse.Namespace) -> None:
    """In this process, which may be one of several."""
    from vikhr_t5.train import loop

    arguments = launched(flags, loop.train)
    if flags.dry_run:
        from vikhr_t5 import dry_run

        dry_run.show(arguments)
        return
    checkpoint_cfg = arguments["checkpoint_cfg"]
    if restore := checkpoint_cfg.restore:

        def readable() -> str | None:
            return readable_checkpoint(restore, arguments["model_dir"], arguments["model"]).path

        restore = dataclasses.replace(restore, path=hosts.once(readable, "reading the initial checkpoint"))
        arguments["checkpoint_cfg"] = dataclasses.replace(checkpoint_cfg, restore=restore)
    if flags.profile:
        arguments["profile_steps"] = flags.profile
    loop.train(**arguments)


def _eval(flags: argparse.Namespace) -> None:
    from vikhr_t5 import eval as eval_script

    run_on_checkpoint(flags, eval_script.evaluate)


def _convert(flags: argparse.Namespace) -> int:
    require_own("conversion")
    from conversion import convert
    from vikhr_t5.data.vocabulary import named_vocabulary

    vocabulary = named_vocabulary(flags.vocabulary, flags.extra_ids)
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


def _report(flags: argparse.Namespace) -> None:
    from vikhr_t5 import report

    output = flags.output or Path(flags.run_dirs[-1]) / "report.html"
    report.report(flags.run_dirs, output, flags.compare, flags.price_per_hour)
    print(f"written: {output}")


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
    takes_gin = hasattr(flags, "gin_file")
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
        if argv is None and flags.command in ("train", "eval", "infer", "convert"):
            _use_huge_pages()
        return flags.run(flags)

    return exit_status("vikhr-t5", command, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
