"""Several processes as one run: how they find each other, agree, and end together.

JAX does the work (`jax.distributed`). Here is what a run needs around it:

- `supervised`: each process is started by a small parent that outlives whatever kills it, and says in one line why it
  ended; XLA itself aborts a process, with pages of log, as soon as another one no longer answers.
- `connected`: an error on one host, of whatever kind, ends all, each with that error as its last line.
- `once`, `first`, `agreed`: decisions and files of process 0, for all.

Processes talk through the key-value store of JAX's coordination service, which process 0 holds; not through
collectives, which would fill the devices' time limits while process 0 caches a corpus. No JAX before `connected`.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from vikhr_t5.command_line import error_line
from vikhr_t5.errors import UserError

HEARTBEAT_SECONDS = 30  # a process that was silent for so long is dead; JAX then ends all others
POLL_SECONDS = 1.0
WAIT_SECONDS = 60.0  # then a word on what is waited for
AGAIN = "run the same command on all hosts to go on from the newest checkpoint"

_ENDED = "vikhr_t5/ended"  # [exit status, line] of the first host that fails
_LOST = re.compile(r"gloo|nccl|rccl|socket closed|connection (reset|refused|closed)|unavailable|deadline_exc", re.I)
_numbers = itertools.count()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """t5x's flags, under its names; what is not given JAX takes from Slurm, Kubernetes, Open MPI or Cloud TPU."""
    group = parser.add_argument_group("several processes, on one host or many (docs/many-hosts.md)")
    group.add_argument(
        "--multiprocess_gpu", action="store_true", help="one of several; Slurm, Kubernetes, … say which (any device)"
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0; the port must be free there")
    group.add_argument("--process_count", type=int, metavar="N", help="how many there are")
    group.add_argument("--process_index", type=int, metavar="I", help="which of them this is, 0 to N - 1")
    group.add_argument(
        "--initialization_timeout", type=int, default=300, metavar="S", help="seconds to wait for all (default 300)"
    )


def wanted(flags: argparse.Namespace) -> bool:
    """Whether the flags ask for several processes.

    Raises:
        UserError: they contradict each other, or Slurm or Open MPI started several processes and no flag says so.
    """
    given = (flags.coordinator_address, flags.process_count, flags.process_index)
    if flags.multiprocess_gpu or any(value is not None for value in given):
        count, index = flags.process_count, flags.process_index
        if count is not None and index is not None and not 0 <= index < count:
            raise UserError(f"--process_index={index} is not one of --process_count={count}: give 0 to {count - 1}")
        if flags.coordinator_address and not re.search(r":\d+$", flags.coordinator_address):
            raise UserError(f"--coordinator_address={flags.coordinator_address} has no port: write HOST:PORT")
        return True
    for launcher, variable in (("Slurm", "SLURM_STEP_NUM_TASKS"), ("Open MPI", "OMPI_COMM_WORLD_SIZE")):
        if int(os.environ.get(variable, 1)) > 1:
            raise UserError(
                f"{launcher} started {os.environ[variable]} processes, and each would train the same run alone: add"
                " --multiprocess_gpu to train together"
            )
    return False


# ---- the end of a process, in one line -------------------------------------------------------------------------------


def supervised(program: str) -> None:
    """Forks; returns in the child alone. The parent passes signals on, waits, explains how the child ended, exits.

    A killed parent takes the child with it. To be called before threads are started and before JAX is imported.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.setpgid(0, 0)  # Ctrl-C reaches the parent, which passes it on; so it comes once

        def end_with_parent() -> None:
            os.read(read, 1)
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()
        return
    os.close(read)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(child, number))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        print(f"{program}: {_killed(-status)}; {AGAIN}", file=sys.stderr, flush=True)
    os._exit(status if status >= 0 else 1)


def _killed(number: int) -> str:
    if number == signal.SIGABRT:
        return "another host did not start, ended or no longer answers, so this one was stopped (JAX says more above)"
    cause = ": by the system where memory ran out, or by a person" if number == signal.SIGKILL else ""
    return f"this process was killed ({signal.Signals(number).name}{cause})"


# ---- together --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(flags: argparse.Namespace, program: str) -> Iterator[None]:
    """All processes together, from `jax.distributed.initialize` to its end. An error on one of them ends all.

    The exit status is that of the host that failed first: 2 where it was a UserError.
    """
    import jax

    try:
        jax.distributed.initialize(
            flags.coordinator_address,
            flags.process_count,
            flags.process_index,
            initialization_timeout=flags.initialization_timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:  # RuntimeError: of JAX, of its Kubernetes and Open MPI detection
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the processes did not find each other ({reason}): give --coordinator_address, --process_count and"
            " --process_index, the same address and count to all, and start all of them"
        ) from error
    jax.devices()  # at once: the devices of all are counted while nobody is busy
    done = threading.Event()
    watch = threading.Thread(target=_end_with_others, args=(program, done), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        _end_all(program, error, flags.debug)
    done.set()
    watch.join()


def _end_with_others(program: str, done: threading.Event) -> None:
    """Runs in a thread: where another host has failed, this one ends with the same line."""
    while not done.wait(POLL_SECONDS):
        if ended := _get(_ENDED):
            _leave(program, ended)


def _end_all(program: str, error: BaseException, debug: bool) -> NoReturn:
    import jax

    line, status = error_line(error, debug)
    if not isinstance(error, UserError) and _LOST.search(str(error)):
        line = f"another host ended or no longer answers ({line.split(' (run with')[0][:200]}); {AGAIN}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or process 0 is no more
        _client().key_value_set(_ENDED, json.dumps([status, f"host {jax.process_index()}: {line}"]))
    ended = _get(_ENDED) or [status, f"host {jax.process_index()}: {line}"]
    if jax.process_index() == 0:
        time.sleep(3 * POLL_SECONDS)  # the others read it here
    _leave(program, ended)


def _leave(program: str, ended: list[Any]) -> NoReturn:
    """At once: JAX's own way out would wait for the others, and abort when they do not come."""
    print(f"{program}: {ended[1]}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(ended[0])


def _client() -> Any:
    """JAX's client of the coordination service; None in a run of one process."""
    from jax._src import distributed  # nothing public gives it

    return distributed.global_state.client


def _get(key: str) -> Any:
    import jax

    try:
        return json.loads(_client().key_value_try_get(key))
    except jax.errors.JaxRuntimeError:  # not there; or process 0 is no more, and JAX ends this process
        return None


# ---- what process 0 decides and makes --------------------------------------------------------------------------------


def once(make: Callable[[], Any], what: str) -> Any:
    """What `make` returns in process 0, where alone it is called; on all. Every process must come here, in turn.

    Args:
        make: its result is to be JSON.
        what: is being done, for those that wait long.
    """
    import jax

    if _client() is None:
        return make()
    key = f"vikhr_t5/once/{next(_numbers)}"
    if jax.process_index() == 0:
        value = make()
        _client().key_value_set(key, json.dumps(value))
        return value
    while True:  # for as long as it takes: where process 0 fails, this process ends
        try:
            return json.loads(_client().blocking_key_value_get(key, int(WAIT_SECONDS * 1000)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            print(f"host {jax.process_index()} waits for host 0: {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def first(what: str) -> Iterator[None]:
    """Process 0 runs the block (which may make files), then the others do (and find them)."""
    import jax

    if _client() is None or jax.process_index() == 0:
        yield
        once(lambda: None, what)
    else:
        once(lambda: None, what)
        yield


def agreed(value: str, what: str) -> None:
    """UserError on the processes that do not have process 0's value."""
    if value != once(lambda: value, f"comparing {what}"):
        raise UserError(f"{what} is not the same here as on host 0: give all hosts the same command and files")
