"""Work that needs seqio and TensorFlow, in a process of its own: the one that trains, or shows data, loads neither."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from vikhr_t5.errors import UserError


def run(module: str, arguments: dict[str, Any]) -> str:
    """Run `python -m module JSON`; what it prints. Its stderr is this process's.

    Args:
        module: its main program is `main` below.
        arguments: values of JSON.
    Raises:
        UserError: the module's. RuntimeError: it ended otherwise.
    """
    done = subprocess.run(_command(module, arguments), env=_environment(), stdout=subprocess.PIPE, text=True)
    _check(module, done.returncode, done.stdout)
    return done.stdout


def lines(module: str, arguments: dict[str, Any]) -> Iterator[str]:
    """As `run`, line by line while it runs. Closing the iterator ends the process."""
    with subprocess.Popen(
        _command(module, arguments), env=_environment(), stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stdout
        try:
            held = ""  # the last line may be the message of an error
            for line in process.stdout:
                if held:
                    yield held
                held = line
            _check(module, process.wait(), held)
            if held:
                yield held
        finally:
            process.kill()


def main(action: Callable[..., object]) -> int:
    """The main program of a module that `run` or `lines` starts. `action` takes the arguments and prints what it gives;
    a UserError goes to stdout and gives 2."""
    try:
        action(**json.loads(sys.argv[1]))
    except UserError as error:
        print(error)
        return 2
    return 0


def _command(module: str, arguments: dict[str, Any]) -> list[str]:
    return [sys.executable, "-P", "-m", module, json.dumps(arguments)]


def _environment() -> dict[str, str]:
    """It must find the same packages as this process: same sys.path, and nothing put in front of it (-P)."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def _check(module: str, status: int, output: str) -> None:
    if status == 2:
        raise UserError(output.strip().rpartition("\n")[2])  # a task may have printed before it
    if status != 0:
        raise RuntimeError(f"{module} ended with exit status {status}; its output is above")
