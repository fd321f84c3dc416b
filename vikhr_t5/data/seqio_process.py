"""Work that needs seqio and TensorFlow, in a process of its own: the one that trains, or shows data, loads neither."""

import json
import os
import subprocess
import sys
from typing import Any

from vikhr_t5.errors import UserError


def run(module: str, arguments: dict[str, Any]) -> str:
    """Run `python -m module JSON`; what it prints. Its stderr is this process's.

    Args:
        module: its main program takes `arguments` as JSON, and ends with 2 after printing a UserError.
        arguments: values of JSON.
    Raises:
        UserError: the module's. RuntimeError: it ended otherwise.
    """
    # It must find the same packages as this process: same sys.path, and nothing put in front of it (-P).
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-P", "-m", module, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode == 2:
        raise UserError(done.stdout.strip().rpartition("\n")[2])  # a task may have printed before it
    if done.returncode != 0:
        raise RuntimeError(f"{module} ended with exit status {done.returncode}; its output is above")
    return done.stdout
