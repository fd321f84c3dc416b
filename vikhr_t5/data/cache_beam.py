"""Shards written by a cluster: the same jobs as `cache_workers` does in processes, through Apache Beam.

A job writes its files itself, beside their place and then renamed, so a bundle that Beam runs twice does no harm, and a
run that was stopped goes on where it was. What the driver and the workers share is the file system: the cache and the
data must be there under the same paths, and the same vikhr-t5 and task modules be installed (docs/scaling.md).
"""

import logging
import os
import shlex
from collections.abc import Sequence
from typing import Any

from vikhr_t5.data.cache_workers import Job
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import write_text_atomic

logging.disable(logging.WARNING)  # Beam warns of parts of Google Cloud that are not installed
try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
except ImportError as error:
    raise UserError(f"--beam_runner needs Apache Beam: pip install 'vikhr-t5[beam]' ({error})") from error
finally:
    logging.disable(logging.NOTSET)


def run(jobs: Sequence[Job], module: str, runner: str, options: str) -> None:
    """Do the jobs in a pipeline, one element each, and wait for it.

    Args:
        jobs: to be done.
        module: the Python module that registers the tasks; workers import it.
        runner: Beam's name of one, e.g. FnApiRunner, DataflowRunner, FlinkRunner, SparkRunner.
        options: further pipeline options, as on a command line.
    Raises:
        UserError: a job's; no such runner.
    """
    _check_runner(runner)
    failures = [job.note.with_suffix(".error") for job in jobs]
    for failure in failures:
        failure.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name.startswith("VIKHR_T5_")}
    flags = [f"--runner={runner}", *shlex.split(options)]
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        _ = (
            pipeline
            | "shards" >> beam.Create(list(jobs))
            | "spread" >> beam.Reshuffle()
            | "write" >> beam.ParDo(_Write(module, environment))
        )
    for failure in failures:
        if failure.exists():
            raise UserError(failure.read_text(encoding="utf-8"))
    if missing := [job.note for job in jobs if not job.note.exists()]:
        raise UserError(
            f"{len(missing)} of {len(jobs)} shards are not there, {missing[0]} among them: the workers must write to"
            " the same file system as this process, under the same path"
        )


class _Write(beam.DoFn):
    """Does a job. Its UserError goes into a file beside the note: Beam would try four times, and then wrap it."""

    def __init__(self, module: str, environment: dict[str, str]):
        self.module, self.environment = module, environment

    def setup(self) -> None:
        os.environ.update(self.environment)
        from vikhr_t5.data.seqio_tasks import import_tasks  # TensorFlow, in the worker

        import_tasks(self.module)

    def process(self, job: Any) -> None:  # a Job; Beam takes annotations for its own type hints
        if job.note.exists():  # Beam runs a bundle again where it has lost its result
            return
        tokens = beam.metrics.Metrics.counter("vikhr_t5", "tokens")
        try:
            job.run(tokens.inc)
        except UserError as error:
            write_text_atomic(job.note.with_suffix(".error"), str(error))


def _check_runner(name: str) -> None:
    known = [*StandardOptions.KNOWN_RUNNER_NAMES]
    if "." not in name and name not in known:
        raise UserError(f"no Beam runner {name}: {nearest(name, known)}")
