"""Where a run starts from: its own checkpoint, another one, or fresh parameters."""

import os
import secrets
from pathlib import Path
from typing import Any

import jax

from vikhr_t5 import hosts
from vikhr_t5.errors import UserError
from vikhr_t5.train import checkpoints
from vikhr_t5.train.checkpoint_files import defect
from vikhr_t5.train.checkpoints import RestoreCheckpointConfig
from vikhr_t5.train.partitioning import placed
from vikhr_t5.train.state import EncoderDecoderModel, TrainState


def starting_state(
    model: EncoderDecoderModel,
    shardings: TrainState,
    newest: Path | None,
    initial: RestoreCheckpointConfig | None,
    random_seed: int | None,
) -> tuple[TrainState, dict[str, Any], str]:
    """(state on the mesh, progress: {"step", "first_step", "seed", "tokens", ...}, where it is from, in words).

    Where several hosts train together, process 0's choice of a checkpoint and of a seed holds for all.

    Args:
      newest: the newest whole checkpoint of this run.
    """
    like = placed(model.abstract_state(), shardings)
    # Where the state comes from; the first that exists:
    # 1. this run's own newest whole checkpoint: everything continues, to the bit;
    # 2. checkpoint_cfg.restore.path (INITIAL_CHECKPOINT_PATH): parameters, step and optimizer; the data begins;
    # 3. fresh parameters from the seed.
    if own := hosts.once(lambda: newest and os.fspath(newest), "finding the newest checkpoint"):
        path = _seen(Path(own))
        checkpoints.check_vocabulary(path, model.vocabulary)
        state, progress = checkpoints.restore(path, like)
        return state, progress, f"resumed from {path}"
    seed = hosts.once(lambda: secrets.randbits(31) if random_seed is None else random_seed, "drawing a seed")
    if initial is not None and initial.path is not None:
        start = initial
        path = _seen(Path(hosts.once(lambda: os.fspath(start.one()), "finding the initial checkpoint")))
        checkpoints.check_vocabulary(path, model.vocabulary)
        state, saved = checkpoints.restore(path, like, initial.reset_optimizer)
        if state.opt_state is None:
            opt_state = jax.jit(model.optimizer.init, out_shardings=shardings.opt_state)(state.params)
            state = state._replace(opt_state=opt_state)
        step, origin = saved["step"], f"started from {path}"
    else:
        key = jax.random.split(jax.random.key(seed))[0]  # the other half is dropout's
        # Half the optimization halves the compilation, which takes longer than the work; the values are the same.
        quick = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        state = jax.jit(model.init_state, out_shardings=shardings, compiler_options=quick)(key)
        step, origin = 0, f"fresh parameters, seed {seed}"
    return state, {"step": step, "first_step": step, "seed": seed, "tokens": 0}, origin


def _seen(path: Path) -> Path:
    """UserError on a host that does not see process 0's checkpoint."""
    if reason := defect(path):
        raise UserError(
            f"checkpoint {path} of process 0 is not whole here ({reason}): put it on a file system that all hosts share"
        )
    return path
