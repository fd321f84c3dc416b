"""Shards written on this machine: in this process, or in several."""

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from vikhr_t5.data.seqio_tasks import import_tasks, tf
from vikhr_t5.errors import UserError
from vikhr_t5.progress import Progress, human


class Job(Protocol):
    """A file to be written; `note` is there when it is finished. Picklable."""

    @property
    def note(self) -> Path:
        """The last thing that `run` writes."""

    def run(self, report: Any) -> None:
        """Do it; `report` is called with numbers of tokens, as they are written."""


def run(jobs: Sequence[Job], module: str, num_workers: int) -> None:
    """Do the jobs in `num_workers` processes, which import the tasks of `module`; in this one if that is 1.

    Raises:
        UserError: a job's, or a process was killed.
    """
    spawn, start = multiprocessing.get_context("spawn"), time.monotonic()
    tokens = spawn.Value("q", 0)
    with Progress("caching", len(jobs), "shards") as bar:

        def show(finished: int) -> None:
            rate = tokens.value / max(time.monotonic() - start, 1e-9)
            bar.advance(finished, note=f"{human(tokens.value)} tokens, {human(rate)} tokens/s")

        def count(more: int) -> None:
            tokens.value += more
            show(0)

        if num_workers == 1 or len(jobs) == 1:
            for job in jobs:
                job.run(count)
                show(1)
            return
        with ProcessPoolExecutor(min(num_workers, len(jobs)), spawn, _start_worker, (module, tokens)) as pool:
            waiting = {pool.submit(_work, job) for job in jobs}
            try:
                while waiting:
                    done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    show(len(done))
            except BrokenProcessPool:
                raise UserError(
                    f"a process that cached {jobs[0].note.parent} was killed, perhaps for want of memory: "
                    f"run it again with fewer than {num_workers} workers; finished shards are kept"
                ) from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


_tokens: Any = None  # in a worker: the tokens written by all, shared with the parent


def _start_worker(module: str, tokens: Any) -> None:
    global _tokens
    _tokens = tokens
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    import_tasks(module)


def _end_with_parent() -> None:
    """A pool's workers would wait for work for ever if the parent were killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: Job) -> None:
    job.run(_count)


def _count(more: int) -> None:
    with _tokens.get_lock():
        _tokens.value += more
