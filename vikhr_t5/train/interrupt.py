"""SIGTERM and SIGINT as a request: finish the step, save, exit 0. A second SIGINT (alone, any second one) aborts."""

import os
import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """`with StopRequest() as stop: ... if stop.due(step): save and leave`. Works in the main thread.

    Of several processes, each may get a signal, or one alone: JAX, which handles SIGTERM there, has all stop after
    the same step.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came
        self._several = jax.process_count() > 1
        self._signals = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)

    def due(self, step: int) -> bool:
        """Whether to stop now; to be asked after every step, by every process."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            self.name = self.name or "SIGTERM"
            return True
        return self.name is not None and not self._several

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in self._signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()  # the next one does what it always does
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
