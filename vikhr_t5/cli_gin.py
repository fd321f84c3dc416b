"""What the commands share that gin files configure: t5x's flags, and the way from them to a function's arguments."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vikhr_t5.command_line import add_command
from vikhr_t5.errors import UserError
from vikhr_t5.packages import require_own


def gin_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    example: str,
    required: bool = True,
) -> argparse.ArgumentParser:
    """A command that gin files configure. The flags are t5x's; `required`: that there are such files."""
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
    more = "a gin file; repeat for more"
    parser.add_argument("--gin_file", action="append", required=required, metavar="F", help=more)
    parser.add_argument("--gin_search_paths", action="append", default=[], metavar="A,B", help="folders of gin files")
    parser.add_argument("--tfds_data_dir", metavar="D", help="where TensorFlow Datasets are, for caching tasks")
    for ours_anyway in ("--alsologtostderr", "--logtostderr"):  # what absl's users write
        parser.add_argument(ours_anyway, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--seqio_additional_cache_dirs", help=argparse.SUPPRESS)
    return parser


def launched(
    flags: argparse.Namespace, function: Callable[..., Any], dispensable: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The arguments of `function`, as the gin files and flags have them.

    dispensable: macros that may be left out although the files require them, with the gin values to take then.
    """
    from vikhr_t5 import launch

    if flags.seqio_additional_cache_dirs:
        raise UserError(
            "--seqio_additional_cache_dirs: seqio's caches are not read, tasks are cached as token stores once; say"
            " where with --gin.CACHE_DIR (with t5x's run files --gin.DatasetConfig.cache_dir)"
        )
    if flags.tfds_data_dir:
        os.environ["TFDS_DATA_DIR"] = os.path.expanduser(flags.tfds_data_dir)
    search_paths = [path for group in flags.gin_search_paths for path in group.split(",") if path]
    launch.load(flags.gin_file, flags.bindings, search_paths, dispensable or {})
    arguments = launch.arguments(function, supplied=["config_text"])
    if idle := launch.idle():
        print(f"bound, and used by nothing here: {', '.join(idle)}", file=sys.stderr)
    return {**arguments, "config_text": launch.config_text()}


def readable_checkpoint(restore: Any, folder: str, model: Any) -> Any:
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


def run_on_checkpoint(flags: argparse.Namespace, function: Callable[..., Any]) -> None:
    """`evaluate` or `infer`, on a checkpoint of any format."""
    arguments = launched(flags, function)
    restore = arguments["restore_checkpoint_cfg"]
    arguments["restore_checkpoint_cfg"] = readable_checkpoint(restore, arguments["output_dir"], arguments["model"])
    function(**arguments)
