"""The command `vikhr-t5 infer`, in its two forms: t5x's, over a seqio task, and over a file or standard input."""

import argparse
from pathlib import Path
from typing import Any

from vikhr_t5.cli_gin import gin_command, run_on_checkpoint
from vikhr_t5.errors import UserError
from vikhr_t5.fingerprint import fingerprint


def add_commands(commands: argparse._SubParsersAction) -> None:
    """infer, with its flags."""
    infer = gin_command(
        commands,
        "infer",
        _infer,
        "write a model's answers: to the lines of a file, or to a seqio task",
        "vikhr-t5 infer --checkpoint runs/demo/hf --input questions.txt --output answers.jsonl --beam 4\n"
        "  echo 'Съешь ещё этих мягких ___ булок.' | vikhr-t5 infer --checkpoint runs/demo/ul2 --input - --mode R\n"
        "  vikhr-t5 infer --gin_file=models/demo.gin --gin_file=runs/infer.gin "
        "--gin.CHECKPOINT_PATH=runs/demo/instruct --gin.INFER_OUTPUT_DIR=runs/demo/answers "
        "--gin.MIXTURE_OR_TASK_NAME=\"'demo_instructions'\" "
        "--gin.MIXTURE_OR_TASK_MODULE=\"'tasks.demo'\" --gin.TASK_FEATURE_LENGTHS=\"{'inputs':256,'targets':160}\"",
        required=False,
    )
    infer.add_argument("--shard_id", type=int, metavar="N", help="the same as --gin.infer.shard_id")
    files = infer.add_argument_group("over a file", "--checkpoint instead of --gin_file; see docs/inference.md")
    names: list[str] = []

    def add(flag: str, **options: Any) -> None:
        names.append(files.add_argument(flag, **options).dest)

    add("--checkpoint", metavar="D", help="a run, a checkpoint, ours or t5x's, or a Hugging Face folder")
    add("--input", metavar="F", help="a .txt file, a line each; .jsonl with the field inputs; or - for standard input")
    add("--output", metavar="F", help="the JSON lines to write (default: -, standard output)")
    add("--mode", metavar="M", help="a mode token to put first: R, S or X, or its name in the vocabulary")
    add("--beam", type=int, metavar="N", help="beam search with N beams (default: greedy)")
    add("--length_penalty", type=float, metavar="P", help="of beams: above 0 favours long answers (default 1.0)")
    add("--temperature", type=float, metavar="T", help="draw tokens, at this temperature")
    add("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top_p", type=float, metavar="P", help="draw from the likeliest tokens that have probability P together")
    add("--num_samples", type=int, metavar="N", help="answers to each input: drawn, or the best of the beams")
    add("--seed", type=int, metavar="N", help="of what is drawn (default 0)")
    add("--max_length", type=int, metavar="N", help="tokens of an answer (default 128)")
    add("--max_input_length", type=int, metavar="N", help="tokens of an input (default: as trained, where it is known)")
    add("--truncate", action="store_true", help="cut longer inputs at their end; else they are refused")
    add("--no_blanks", action="store_true", help="take ___ as it stands, not as a blank to fill")
    add("--score", action="store_true", help="the log-probability of each of the field targets, instead of answers")
    add("--no_eos", action="store_true", help="of scores: leave the end of a target out, as lm-eval does")
    add("--token_log_probabilities", action="store_true", help="write those of each token, too")
    add("--batch_size", type=int, metavar="N", help="rows that go through the model at one time (default 8)")
    add("--dtype", choices=["float32", "bfloat16"], help="to compute in (default float32)")
    add("--vocabulary", metavar="F", help="where the checkpoint has none, as t5x's: a .model file, or 'bytes'")
    add("--extra_ids", type=int, metavar="N", help="its sentinels (default 100; bytes: 0)")
    infer.set_defaults(of_files=names)


_DRAWING = ("beam", "temperature", "top_k", "top_p", "num_samples", "seed", "length_penalty", "max_length")


def _infer(flags: argparse.Namespace) -> None:
    values = {name: getattr(flags, name) for name in flags.of_files}
    given = [name for name, value in values.items() if value is not None and value is not False]  # 0 == False
    if flags.gin_file:
        if given:
            raise UserError(f"--{given[0]} is not for --gin_file, which says all by bindings: leave one of both out")
        from vikhr_t5 import infer as infer_script

        if flags.shard_id is not None:
            flags.bindings.append(f"infer.shard_id={flags.shard_id}")
        run_on_checkpoint(flags, infer_script.infer)
    elif flags.bindings or flags.shard_id is not None:
        raise UserError("--gin.… and --shard_id are for --gin_file: give that, or leave them out")
    elif not flags.checkpoint or not flags.input:
        raise UserError("infer needs --checkpoint and --input, or --gin_file (see vikhr-t5 infer --help)")
    else:
        _infer_files(flags, given)


def _infer_files(flags: argparse.Namespace, given: list[str]) -> None:
    if flags.score and (idle := [name for name in _DRAWING if name in given]):
        raise UserError(f"--{idle[0]} says how to answer, and --score does not: leave one of both out")
    if flags.no_eos and not flags.score:
        raise UserError("--no_eos is for --score: leave it out")
    if flags.length_penalty is not None and not (flags.beam or 1) > 1:
        raise UserError("--length_penalty is for beam search: give --beam, or leave it out")
    for name in ("batch_size", "max_length", "max_input_length"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    from vikhr_t5 import api, infer_files

    said = {"num_beams": flags.beam, **{name: getattr(flags, name) for name in _DRAWING[1:-1]}}
    decoding = api.Decoding(**{name: value for name, value in said.items() if value is not None})
    request = infer_files.Request(
        decoding,
        flags.max_length or api.MAX_LENGTH,
        flags.mode,
        not flags.no_blanks,
        flags.truncate,
        flags.score,
        not flags.no_eos,
        flags.token_log_probabilities,
    )
    output = flags.output or infer_files.STANDARD
    if output != infer_files.STANDARD and Path(output).exists():
        raise UserError(f"{output} is there already: remove it, or choose another --output")
    rows = infer_files.rows_of(flags.input)
    batch_size, dtype = flags.batch_size or 8, flags.dtype or "float32"
    _, checkpoint = api.find(flags.checkpoint)
    files = fingerprint(checkpoint)
    model = api.load(
        checkpoint,
        vocabulary=flags.vocabulary,
        extra_ids=flags.extra_ids,
        dtype=dtype,
        batch_size=batch_size,
        max_input_length=flags.max_input_length,
    )
    settings = {
        "checkpoint": str(checkpoint),
        "checkpoint_files": files,
        "vocabulary": model.vocabulary.fingerprint(),
        "max_input_length": model.max_input_length,
        "dtype": dtype,
    }
    infer_files.run(model, rows, output, request, settings, batch_size)
    if output != infer_files.STANDARD:
        print(f"written: {output}")
