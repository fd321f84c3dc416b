"""`vikhr-mistral`: the road from Mistral-7B to a Russian chat model, a command for each stretch. Each parses its flags,
calls one function of the package, and imports it only then."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vikhr_t5 import __version__
from vikhr_t5.command_line import Parser, add_command, exit_status, refuse_unknown
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.packages import require

NEEDED = ("torch", "transformers", "peft", "accelerate", "yaml")  # of the extra [mistral]


def build_parser() -> argparse.ArgumentParser:
    """All commands, with their flags."""
    parser = Parser(
        prog="vikhr-mistral",
        description="Adapt Mistral-7B to Russian: vocabulary, continued pre-training, chats.",
        epilog="example:\n  vikhr-mistral tokenizer --corpus habr.parquet --output runs/tokenizer",
    )
    parser.add_argument("--version", action="version", version=f"vikhr-mistral {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    _tokenizer_command(commands)
    _init_command(commands)
    _run_command(
        commands,
        "pretrain",
        _pretrain,
        "go on with pre-training, close to the base if asked for",
        "vikhr-mistral pretrain --config vikhr_7b_pretrain_1xH100 --set model=runs/start --set output_dir=runs/vikhr",
    )
    _run_command(
        commands,
        "instruct",
        _instruct,
        "tune a model on chats, with the loss on the bot's turns",
        "vikhr-mistral instruct --config vikhr_7b_instruct --set model=runs/vikhr/model --set output_dir=runs/instruct",
    )
    _merge_command(commands)
    _chat_command(commands)
    return parser


def _tokenizer_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "tokenizer",
        _tokenizer,
        "add the pieces of a script to a SentencePiece vocabulary",
        "vikhr-mistral tokenizer --corpus habr.parquet --field text_markdown --size 40000 --output runs/tokenizer",
    )
    parser.add_argument("--output", required=True, metavar="D", help="the folder to write: tokenizer and its report")
    parser.add_argument("--base", default="mistral", metavar="M", help="a .model file or a model's folder (mistral)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--corpus", action="append", metavar="S", help="file, folder, glob or hub name; repeat for more"
    )
    source.add_argument("--task", metavar="NAME", help="a seqio task or mixture")
    source.add_argument("--donor", metavar="F", help="a SentencePiece BPE model, in place of training one")
    parser.add_argument("--module", default="tasks", metavar="M", help="what registers the task (default tasks)")
    parser.add_argument("--field", default="text", help="of the corpus' rows (default text)")
    parser.add_argument("--donor_size", type=int, default=50_000, metavar="N", help="pieces of the donor (50000)")
    parser.add_argument("--strategy", default="tail", metavar="S", help="tail (default), joint, append, replacement")
    parser.add_argument("--script", default="cyrillic", metavar="S", help="of the pieces to take (default cyrillic)")
    parser.add_argument("--size", type=int, metavar="N", help="pieces in the end (default: all that the donor has)")
    parser.add_argument("--texts", action="append", default=[], metavar="S", help="to measure on (default: held out)")
    parser.add_argument(
        "--base_texts", action="append", default=[], metavar="S", help="whose tokens must stay the same"
    )
    parser.add_argument("--num_threads", type=int, default=16, metavar="N", help="of the training (default 16)")


def _init_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "init",
        _init,
        "give a model the rows of an extended vocabulary",
        "vikhr-mistral init --base Mistral-7B-v0.1 --tokenizer runs/tokenizer --output runs/start --verify",
    )
    parser.add_argument("--base", required=True, metavar="D", help="the base model's folder")
    parser.add_argument("--tokenizer", required=True, metavar="D", help="what vikhr-mistral tokenizer wrote")
    parser.add_argument("--output", required=True, metavar="D", help="the model folder to write")
    parser.add_argument(
        "--method", default="mean", metavar="M", help="mean (default), weighted_mean, exponential, normal, focus"
    )
    parser.add_argument("--auxiliary", metavar="F", help="of focus: vectors of the new tokenizer's pieces")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of normal")
    parser.add_argument("--base_tokenizer", metavar="M", help="where the base's folder has no tokenizer.model")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of a file (default 5GB)")
    parser.add_argument("--verify", action="store_true", help="text of old pieces must get identical logits")


def _run_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    example: str,
) -> None:
    recipes = ", ".join(recipe for recipe in _recipes() if name in recipe)
    parser = add_command(
        commands,
        name,
        run,
        summary,
        example,
        f"Recipes: {recipes}.\n--set NAME=VALUE, repeated, changes a setting of the file: --set train.max_steps=500.\n"
        f"On several GPUs: accelerate launch --config_file 8xH100.yaml -m vikhr_mistral.cli {name} --config …",
    )
    parser.add_argument("--config", required=True, metavar="F", help="a YAML file, or the name of a recipe")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="overrides")


def _merge_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "merge",
        _merge,
        "merge an adapter into its base's weights",
        "vikhr-mistral merge runs/instruct/model runs/vikhr-7b-instruct",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder with adapter_config.json")
    parser.add_argument("output", metavar="OUTPUT", help="the model folder to write")
    parser.add_argument("--base", metavar="D", help="the base model's folder (default: the one that the adapter names)")


def _chat_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "chat",
        _chat,
        "talk to a model in the terminal, or on a pipe",
        "vikhr-mistral chat runs/vikhr-7b-instruct",
        "A line is a question. /reset forgets the conversation, /exit ends it; Ctrl-C stops an answer.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, of a model or an adapter, or a name on the hub")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt (default: the chat template's)")
    parser.add_argument("--temperature", type=float, default=0.2, metavar="X", help="0: no chance (default 0.2)")
    parser.add_argument("--top_p", type=float, default=0.9, metavar="X", help="probability to draw from (default 0.9)")
    parser.add_argument("--top_k", type=int, default=40, metavar="N", help="tokens to draw from (default 40)")
    parser.add_argument("--repetition_penalty", type=float, default=1.1, metavar="X", help="1: none (default 1.1)")
    parser.add_argument("--max_new_tokens", type=int, default=1024, metavar="N", help="of an answer (default 1024)")
    parser.add_argument("--seed", type=int, metavar="N", help="the same one gives the same answers")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")


def _tokenizer(flags: argparse.Namespace) -> None:
    from vikhr_mistral import tokenizer

    tokenizer.extend(
        flags.base,
        flags.output,
        corpus=flags.corpus or (),
        donor=flags.donor,
        task=flags.task,
        donor_size=flags.donor_size,
        strategy=flags.strategy,
        script=flags.script,
        size=flags.size,
        field=flags.field,
        texts=flags.texts,
        base_texts=flags.base_texts,
        module=flags.module,
        num_threads=flags.num_threads,
    )


def _init(flags: argparse.Namespace) -> None:
    from vikhr_mistral import initialise

    initialise.init(
        flags.base,
        flags.tokenizer,
        flags.output,
        method=flags.method,
        seed=flags.seed,
        auxiliary=flags.auxiliary,
        base_tokenizer=flags.base_tokenizer,
        verify=flags.verify,
        max_shard_size=flags.max_shard_size,
    )


def _quiet() -> None:
    """No bars of transformers, which show seconds of loading and break our lines; no notices to its developers."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _pretrain(flags: argparse.Namespace) -> None:
    from vikhr_mistral import pretrain

    _quiet()
    pretrain.pretrain(config_file(flags.config), flags.overrides)


def _instruct(flags: argparse.Namespace) -> None:
    from vikhr_mistral import instruct

    _quiet()
    instruct.instruct(config_file(flags.config), flags.overrides)


def _merge(flags: argparse.Namespace) -> None:
    from vikhr_mistral import merge

    merge.merge(flags.adapter, flags.output, flags.base)
    print(f"written: {flags.output}")


def _chat(flags: argparse.Namespace) -> None:
    from vikhr_mistral import chat

    _quiet()
    sampling = chat.Sampling(
        temperature=flags.temperature,
        top_p=flags.top_p,
        top_k=flags.top_k,
        repetition_penalty=flags.repetition_penalty,
        max_new_tokens=flags.max_new_tokens,
    )
    chat.chat(flags.model, sampling, system=flags.system, device=flags.device, seed=flags.seed)


def _recipes() -> dict[str, Path]:
    """The recipes of the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


def config_file(name: str) -> Path:
    """A file of the user, or a recipe of the package. UserError with the nearest recipes where it is neither."""
    recipes = _recipes()
    if Path(name).is_file():
        return Path(name)
    if name not in recipes:
        raise UserError(f"{name}: no such file, and no such recipe; {nearest(name, recipes)}")
    return recipes[name]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of a command line. UserError: an unknown command or flag, or a flag without its value."""
    flags, unknown = build_parser().parse_known_args(argv)
    refuse_unknown(flags, unknown)
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    sys.path.append(os.getcwd())  # last: modules of tasks in the user's folder are found, ours stay first

    def command() -> int | None:
        flags = parse(arguments)
        require("mistral", *NEEDED)
        return flags.run(flags)

    return exit_status("vikhr-mistral", command, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
