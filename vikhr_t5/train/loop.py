"""Training from the first line to the last: data, state, steps, metrics, evaluation, checkpoints."""

import collections
import contextlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from vikhr_t5 import hosts
from vikhr_t5.data.pipeline import DatasetConfig, open_dataset
from vikhr_t5.data.rows import empty_batch
from vikhr_t5.errors import UserError
from vikhr_t5.files import atomic_path
from vikhr_t5.packages import require
from vikhr_t5.progress import Progress, human
from vikhr_t5.train import checkpoints, metrics
from vikhr_t5.train.checkpoints import CheckpointConfig, Checkpoints
from vikhr_t5.train.compiling import compiled, use_compilation_cache
from vikhr_t5.train.evaluate import Evaluator
from vikhr_t5.train.interrupt import StopRequest
from vikhr_t5.train.partitioning import Partitioner
from vikhr_t5.train.profiler import Profiler
from vikhr_t5.train.starting import find_start, starting_state
from vikhr_t5.train.state import EncoderDecoderModel
from vikhr_t5.train.step import Trainer, zero_sums

COUNTED = 2**31 - 1  # tokens of one side, between two lines of metrics at most: see `zero_sums`
STEPS_AHEAD = 2  # the host runs this far ahead of the device, so the next batch is there before a step ends


class NonFiniteLoss(UserError):
    """The loss, a gradient or the learning rate became infinite or NaN, and the run was configured to stop."""


def train(
    model: EncoderDecoderModel,
    train_dataset_cfg: DatasetConfig,
    checkpoint_cfg: CheckpointConfig,
    partitioner: Partitioner,
    trainer: Trainer,
    model_dir: str,
    total_steps: int,
    train_eval_dataset_cfg: DatasetConfig | None = None,
    eval_steps: int | None = 20,
    eval_period: int | None = 1000,
    stats_period: int | None = 100,
    num_samples: int = 4,
    infer_eval_examples: int | None = 0,
    random_seed: int | None = None,
    relative_steps: int | None = None,
    wandb_project: str | None = None,
    profile_steps: int = 0,
    config_text: str = "",
) -> int:
    """Train up to `total_steps` updates, or until SIGTERM or SIGINT. Run again, it goes on where it stopped.

    Args:
      model_dir: the run folder.
      total_steps: absolute, as in t5x: a run that starts from a checkpoint at step n does total_steps - n.
      eval_steps: batches of an evaluation; None: all of the evaluation dataset.
      eval_period: steps between evaluations, and the last step is always evaluated; 0 or None: there is none.
      stats_period: steps between lines of metrics; each evaluation and each checkpoint has one before it, too, and
        0 or None leaves it at these. So many steps that the int32 counts of tokens could overflow are never between.
      num_samples: evaluation examples that are decoded to text at each evaluation.
      infer_eval_examples: the first so many evaluation examples of each task that has metric functions are decoded
        greedily at each evaluation, and these computed; None: all, 0: none.
      random_seed: of the fresh parameters and of dropout; None draws one.
      relative_steps: instead of `total_steps`: updates after the checkpoint that the run starts from.
      wandb_project: of Weights & Biases, where metrics go, too; None: nowhere else.
      profile_steps: steps to trace into `profile` in the run folder, from the third on.
      config_text: the gin configuration; goes into the run folder and into every checkpoint.

    Returns:
      The step reached.

    Raises:
      UserError: whatever the person who launched the run can mend. NonFiniteLoss is one.
    """
    if wandb_project:
        require("wandb", "wandb")
    for name, period in (("eval_period", eval_period), ("stats_period", stats_period)):
        if period is not None and period < 0:
            raise UserError(f"train.{name} cannot be {period}: steps, or 0 for never")
    use_compilation_cache()
    folder = Path(model_dir).expanduser().absolute()
    partitioner.check_batch_size(train_dataset_cfg.batch_size, trainer.num_microbatches or 1)
    shardings = partitioner.state_shardings(model)
    with hosts.first("opening the data, and caching what is not cached"):
        dataset = open_dataset(train_dataset_cfg, model.vocabulary)
        eval_dataset = None
        if train_eval_dataset_cfg is not None and eval_period:
            eval_dataset = open_dataset(train_eval_dataset_cfg, model.vocabulary)
    hosts.agreed(dataset.fingerprint, "the data (the token store, or the configuration)")
    evaluator = None
    if eval_dataset is not None:
        evaluator = Evaluator(
            model, partitioner, eval_dataset, eval_steps, num_samples, shardings.params, infer_eval_examples
        )
        evaluator.check_best(checkpoint_cfg.save)
    if checkpoint_cfg.save.best_metric and (not evaluator or checkpoint_cfg.save.period % (eval_period or 1)):
        raise UserError(
            f"SaveCheckpointConfig.best_metric needs an evaluation at each checkpoint: make its period"
            f" ({checkpoint_cfg.save.period}) a multiple of EVAL_PERIOD ({eval_period})"
        )
    saver = Checkpoints(folder / "checkpoints", checkpoint_cfg.save)
    start = find_start(model, shardings, saver.newest(), checkpoint_cfg.restore, random_seed)
    progress, origin = start.progress, start.origin
    first, step = progress["first_step"], progress["step"]
    total_steps = total_steps if relative_steps is None else first + relative_steps
    if progress.get("dataset", dataset.fingerprint) != dataset.fingerprint:
        _say("the data or its configuration is not the checkpoint's: batches continue, by number, in the new data")
    progress["dataset"] = dataset.fingerprint
    if step == first >= total_steps:
        raise UserError(
            f"{origin}, step {step}; training ends at {total_steps}, counted from step 0: set"
            f" TRAIN_STEPS={step + total_steps}, or TRAIN_STEPS_RELATIVE={total_steps}"
        )
    _say(f"{folder}: {origin}, step {step} of {total_steps}")
    if step >= total_steps:
        if not metrics.ends_finished(folder):  # killed after its last checkpoint, or TRAIN_STEPS is less than it was
            with contextlib.closing(metrics.MetricsLog(folder, step)) as log:
                log.write("end", step, {"finished": True})
        return step
    profiler = Profiler(folder / "profile", profile_steps, total_steps - step)

    num_sources = len(dataset.source_names)
    rows, (inputs_length, targets_length) = dataset.batch_size, dataset.lengths

    def compiled_step() -> Any:
        batch = empty_batch(rows, inputs_length, targets_length)
        return compiled(trainer.traced(model, partitioner, num_sources, batch).lower())

    # Meanwhile examples are packed, parameters are read or drawn, and the first batch is made.
    compiling = ThreadPoolExecutor(1, "compiling").submit(compiled_step)
    with hosts.first("packing the examples"):
        for opened in filter(None, (dataset, eval_dataset)):
            opened.pack()
    state = starting_state(start, model, shardings)

    files = checkpoints.described(model, config_text)
    for name, content in files.items() if jax.process_index() == 0 else ():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    peak, peak_source = metrics.peak_flops(model.config.dtype)
    cost = metrics.Cost(
        batch_shape=(rows, inputs_length, targets_length),
        flops_per_step=model.config.flops_per_step(rows, inputs_length, targets_length),
        flops_per_second=peak * jax.device_count(),
    )

    replicated = partitioner.replicated
    zeros = jax.jit(lambda: zero_sums(num_sources), out_shardings=replicated)
    dropout_key = jax.jit(lambda: jax.random.split(jax.random.key(progress["seed"]))[1], out_shardings=replicated)()
    batches = dataset.batches(step - first, partitioner.process_rows(rows), total_steps - step)

    def next_batch() -> dict[str, jax.Array]:
        return partitioner.put_batch(next(batches), rows)

    batch, sums = next_batch(), zeros()
    run_step = compiling.result()

    log = metrics.MetricsLog(folder, step, wandb_project, config_text)
    about = dict(origin=origin, total_steps=total_steps, parameters=model.config.param_count(), peak=peak_source)
    countable = COUNTED // (rows * max(inputs_length, targets_length))  # steps
    stats_period = min(stats_period or countable, countable)
    began, started = step, time.perf_counter()
    in_flight: collections.deque[jax.Array] = collections.deque()
    with (
        contextlib.closing(batches),
        contextlib.closing(log),
        contextlib.closing(profiler),
        StopRequest() as stop,
        Progress("training", total_steps, "steps", done=step, shown=jax.process_index() == 0) as bar,
    ):
        while True:
            # Only what is written out moves between host and device.
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, sums, done = run_step(state, sums, batch, dropout_key)  # returns at once
                step += 1
                if step < total_steps:
                    batch = next_batch()  # goes to the device while the step runs
            profiler.dispatched(done)
            in_flight.append(done)
            if len(in_flight) > STEPS_AHEAD:
                jax.block_until_ready(in_flight.popleft())
            if step == began + 1:
                jax.block_until_ready(done)
                log.write("start", began, {**about, **metrics.environment(partitioner.mesh.shape)})
            bar.advance()

            last = stop.due(step) or step == total_steps
            evaluate = evaluator is not None and (step % (eval_period or 1) == 0 or step == total_steps)
            save = last or step % checkpoint_cfg.save.period == 0
            if not (evaluate or save or step % stats_period == 0):
                continue

            # The host waits for the device here, and nowhere else.
            summed = jax.device_get(sums)
            seconds = time.perf_counter() - started
            if summed["bad_steps"] and trainer.on_non_finite == "stop":
                saver.wait()
                raise NonFiniteLoss(_non_finite(int(summed["first_bad_step"]), saver))
            sums = zeros()
            progress |= {"step": step, "tokens": progress["tokens"] + int(summed["inputs"]) + int(summed["targets"])}
            line = metrics.summarize_training(summed, dataset.source_names, seconds, cost)
            log.write("train", step, line)
            bar.advance(0, f"loss {line['loss']:.3f}, {human(line['tokens_per_second'])} tokens/s")

            evaluation = None
            if evaluate and evaluator is not None:
                evaluation = evaluator.metrics(state.params)
                log.write("eval", step, {"task": evaluator.name, **evaluation})
                log.write_samples(step, evaluator.samples(state.params))
            if save:
                saver.save(step, state, files | {"progress.json": json.dumps(progress).encode()}, evaluation)
            if last:
                break
            started = time.perf_counter()
        saver.wait()
        log.write("end", step, {"finished": step == total_steps})
    if step < total_steps:
        _say(f"{stop.name}: saved step {step} of {total_steps}; run the same command to go on")
    return step


def _non_finite(step: int, saver: Checkpoints) -> str:
    good = saver.newest()
    kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
    return (
        f"the loss, a gradient or the learning rate is not finite at step {step}; {kept}: lower the learning rate, set"
        " Trainer.max_grad_norm, or skip such updates with Trainer.on_non_finite = 'skip'"
    )


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
