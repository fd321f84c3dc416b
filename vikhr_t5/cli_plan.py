"""The command `vikhr-t5 plan`: does a run fit these devices, how, how fast, and for how much."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vikhr_t5.cli_gin import gin_command, launched
from vikhr_t5.errors import UserError

if TYPE_CHECKING:
    from vikhr_t5.plan_compile import Compiled

# What a run needs and a plan does not: macros that may be left out.
DISPENSABLE = {
    "MODEL_DIR": "'runs/plan'",
    "INITIAL_CHECKPOINT_PATH": "'runs/plan/start'",
    "MIXTURE_OR_TASK_NAME": "'not_given'",
}


def add_commands(commands: argparse._SubParsersAction) -> None:
    """plan, with its flags."""
    plan = gin_command(
        commands,
        "plan",
        _plan,
        "say whether a run fits given devices, with which settings, how fast and at what cost",
        "vikhr-t5 plan --gin_file=recipes/vikhr_t5_3b_ul2.gin --vocab_size 58368 --devices 4xV100-32GB",
    )
    plan.add_argument(
        "--devices", default="here", metavar="D", help="4xV100-32GB, 1xH100-80GB, v4-8, … (default: here)"
    )
    plan.add_argument("--vocab_size", type=int, metavar="N", help="rows of the embedding, before there is a vocabulary")
    plan.add_argument("--mfu", type=float, metavar="X", help="share of the peak that is reached (default: a table's)")
    plan.add_argument("--price_per_hour", type=float, metavar="P", help="dollars for one device (default: a table's)")
    plan.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let XLA compile what is planned (default: yes; without, the plan's own figures)",
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--chart", metavar="F", help="write memory by part as a picture: .png or .svg")
    plan.add_argument("--compile_step", metavar="COMPILER", help=argparse.SUPPRESS)  # the process that compiles


def _plan(flags: argparse.Namespace) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # nothing is to be allocated
    if flags.devices != "here":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if flags.mfu is not None and not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu {flags.mfu}: a share of the peak, in (0, 1]")
    if flags.price_per_hour is not None and flags.price_per_hour < 0:
        raise UserError(f"--price_per_hour {flags.price_per_hour}: dollars, at least 0")
    if flags.chart and Path(flags.chart).suffix not in (".png", ".svg"):
        raise UserError(f"--chart {flags.chart}: write a .png or a .svg")

    import jax

    from vikhr_t5 import launch, plan_chart, plan_report
    from vikhr_t5.devices import device_kind, parse_devices
    from vikhr_t5.plan import Planner
    from vikhr_t5.plan_compile import compile_step, has_compiler, pretended, stand_ins
    from vikhr_t5.train import loop

    target = None if flags.devices == "here" else parse_devices(flags.devices)
    with _vocabulary(flags.vocab_size) as bindings:
        given = argparse.Namespace(**{**vars(flags), "bindings": [*flags.bindings, *bindings]})
        arguments = _launched(given, loop.train)
        if flags.compile_step:
            print(json.dumps(dataclasses.asdict(compile_step(arguments, flags.compile_step, target and target[0]))))
            return

        kind, count = target or (device_kind(jax.devices()[0].device_kind), jax.device_count())
        elsewhere = kind if target else None

        def compile_flags(settings: Sequence[str]) -> "Compiled":
            if elsewhere is None:
                return _compiled(given, settings, "here", count)
            refused = ""
            if has_compiler(elsewhere, count):
                try:
                    return _compiled(given, settings, "device", count)
                except RuntimeError as error:
                    refused = f", as {error}"
            compiled = _compiled(given, settings, "cpu", count)
            return dataclasses.replace(compiled, compiler=compiled.compiler + refused)

        with pretended(stand_ins(elsewhere, count) if elsewhere else jax.devices()):
            usable = plan_report.usable(kind)
            plan = Planner(arguments, kind, count, usable.bytes, compile_flags if flags.compile else None).plan()
            missing = [*launch.filled_in(), *(["VOCABULARY_FILE"] if bindings else [])]
            command = plan_report.Command(flags.gin_file, flags.gin_search_paths, flags.bindings, missing)
            report = plan_report.report(plan, arguments, kind, count, usable, command, flags.mfu, flags.price_per_hour)
    if flags.chart:
        plan_chart.chart(report, Path(flags.chart))
    print(json.dumps(report.as_json(), indent=2) if flags.json else report.as_text())


def _launched(flags: argparse.Namespace, function: Any) -> dict[str, Any]:
    try:
        return launched(flags, function, DISPENSABLE)
    except UserError as error:
        if "VOCABULARY_FILE" in str(error) and "required" in str(error):
            raise UserError(f"{error} (or, before there is one, --vocab_size 58368)") from None
        raise


@contextlib.contextmanager
def _vocabulary(rows: int | None) -> Iterator[list[str]]:
    """gin bindings that give the embedding `rows` rows without a vocabulary: a stand-in of three pieces."""
    if rows is None:
        yield []
        return
    if rows < 1024:
        raise UserError(f"--vocab_size {rows}: rows of the embedding, at least 1024 (VikhrT5: 58368)")
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 0, 1, 2
    for piece in ("<pad>", "</s>", "<unk>"):
        model.pieces.add(piece=piece)
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(model.SerializeToString())
        file.flush()
        yield [f"VOCABULARY_FILE={file.name!r}", f"network.T5Config.vocab_size={rows}"]


def _compiled(flags: argparse.Namespace, settings: Sequence[str], compiler: str, count: int) -> "Compiled":
    """What XLA says of the run with more gin flags, from a process that shows `count` devices."""
    from vikhr_t5.plan_compile import Compiled

    command = [sys.executable, "-m", "vikhr_t5.cli", "plan", f"--compile_step={compiler}", f"--devices={flags.devices}"]
    command += [f"--gin_file={file}" for file in flags.gin_file]
    command += [f"--gin_search_paths={paths}" for paths in flags.gin_search_paths]
    command += [*(f"--gin.{binding}" for binding in flags.bindings), *settings, "--debug"]
    environment = dict(os.environ)
    if compiler != "here":
        xla_flags = f"--xla_force_host_platform_device_count={count} --xla_gpu_autotune_level=0"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {xla_flags}"
        nvidia = importlib.util.find_spec("nvidia")  # its wheels bring the assembler that XLA's GPU compiler calls
        assemblers = [f"{place}/cuda_nvcc/bin" for place in (nvidia and nvidia.submodule_search_locations) or ()]
        environment["PATH"] = os.pathsep.join([*assemblers, environment.get("PATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1].removeprefix("vikhr-t5: ")
        raise (UserError if done.returncode == 2 else RuntimeError)(last)
    return Compiled(**json.loads(done.stdout.splitlines()[-1]))
