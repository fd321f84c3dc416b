"""SIGTERM and SIGINT as a request: finish the step, save, exit 0. A second signal aborts at once."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """`with StopRequest() as stop: ... if stop.name: save and leave`. Works in the main thread."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()  # the next one does what it always does

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
