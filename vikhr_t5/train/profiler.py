"""A trace of a few steps of a run, for XProf, TensorBoard or Perfetto."""

from pathlib import Path

import jax
from jax import Array

from vikhr_t5.errors import UserError

WARM_UP = 2  # steps before the trace: the first ones allocate, and wait for data that later is there in time


class Profiler:
    """Traces `steps` steps of a run, the third and those after it, into `folder`; with 0 steps it does nothing.

    Raises:
        UserError: the run has fewer steps to do.
    """

    def __init__(self, folder: Path, steps: int, steps_to_do: int):
        if steps and steps_to_do < WARM_UP + steps:
            raise UserError(
                f"a profile of {steps} steps begins after {WARM_UP}, and this run has {steps_to_do} to do: raise"
                " TRAIN_STEPS, or give --profile fewer steps"
            )
        self._folder, self._steps, self._seen, self._tracing = folder, steps, 0, False

    def dispatched(self, done: Array) -> None:
        """To be called when a step was given to the device. done: ready when the step has run."""
        self._seen += 1
        if self._steps and self._seen == WARM_UP:
            jax.block_until_ready(done)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python functions would bury the device's work
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
            self._tracing = True
        elif self._tracing and self._seen == WARM_UP + self._steps:
            jax.block_until_ready(done)
            self.close()

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
