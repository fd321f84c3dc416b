"""Where a run starts from: its own checkpoint, another one, or fresh parameters."""

import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

import jax

from vikhr_t5 import hosts
from vikhr_t5.errors import UserError
from vikhr_t5.train import checkpoints
from vikhr_t5.train.checkpoint_files import defect, read_progress
from vikhr_t5.train.checkpoints import RestoreCheckpointConfig
from vikhr_t5.train.partitioning import placed
from vikhr_t5.train.state import EncoderDecoderModel, TrainState


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
      path: the checkpoint; None: fresh parameters.
      reset_optimizer: whether the checkpoint's optimizer is left.
      progress: {"step", "first_step", "seed", "tokens", ...}; the step is the checkpoint's.
      origin: all this in words.
    """

    path: Path | None
    reset_optimizer: bool
    progress: dict[str, Any]
    origin: str


def find_start(
    model: EncoderDecoderModel,
    shardings: TrainState,
    newest: Path | None,
    initial: RestoreCheckpointConfig | None,
    random_seed: int | None,
) -> Start:
    """Decides, and refuses what cannot be read; no array is read yet.

    Where several hosts train together, process 0's choice of a checkpoint and of a seed holds for all.

    Args:
      newest: the newest whole checkpoint of this run.

    Raises:
      UserError: a checkpoint of another vocabulary or of another model, or one that is not whole on this host.
    """
    # The first that exists:
    # 1. this run's own newest whole checkpoint: everything continues, to the bit;
    # 2. checkpoint_cfg.restore.path (INITIAL_CHECKPOINT_PATH): parameters, step and optimizer; the data begins;
    # 3. fresh parameters from the seed.
    like = placed(model.abstract_state(), shardings)
    if own := hosts.once(lambda: newest and os.fspath(newest), "finding the newest checkpoint"):
        path = _readable(Path(own), model, like)
        return Start(path, False, read_progress(path), f"resumed from {path}")
    seed = hosts.once(lambda: secrets.randbits(31) if random_seed is None else random_seed, "drawing a seed")
    counters = {"step": 0, "first_step": 0, "seed": seed, "tokens": 0}
    if initial is None or initial.path is None:
        return Start(None, False, counters, f"fresh parameters, seed {seed}")
    found = hosts.once(lambda: os.fspath(initial.one()), "finding the initial checkpoint")
    path = _readable(Path(found), model, like, initial.reset_optimizer)
    step = read_progress(path)["step"]
    counters |= {"step": step, "first_step": step}
    return Start(path, initial.reset_optimizer, counters, f"started from {path}")


def starting_state(start: Start, model: EncoderDecoderModel, shardings: TrainState) -> TrainState:
    """The state that `start` stands for, on the mesh."""
    if start.path is None:
        key = jax.random.split(jax.random.key(start.progress["seed"]))[0]  # the other half is dropout's
        # Half the optimization halves the compilation, which takes longer than the work; the values are the same.
        quick = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        state: TrainState = jax.jit(model.init_state, out_shardings=shardings, compiler_options=quick)(key)
        return state
    state, _ = checkpoints.restore(start.path, placed(model.abstract_state(), shardings), start.reset_optimizer)
    if state.opt_state is None:
        opt_state = jax.jit(model.optimizer.init, out_shardings=shardings.opt_state)(state.params)
        state = state._replace(opt_state=opt_state)
    return state


def _readable(path: Path, model: EncoderDecoderModel, like: TrainState, reset_optimizer: bool = False) -> Path:
    """UserError on a host that does not see process 0's checkpoint, or where it is not this model's."""
    if reason := defect(path):
        raise UserError(
            f"checkpoint {path} of process 0 is not whole here ({reason}): put it on a file system that all hosts share"
        )
    checkpoints.check_vocabulary(path, model.vocabulary)
    checkpoints.check_arrays(path, like, reset_optimizer)
    return path
