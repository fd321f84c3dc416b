"""Weights & Biases, by option: what goes to TensorBoard goes there, too, under the same names.

The run's id is kept in `<run folder>/wandb_id`, so that a run that goes on goes on there. What the service or the
network does never stops training: the first failure is said in one line, and nothing more is sent.
"""

import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vikhr_t5.files import write_text_atomic

ID = "wandb_id"


class WandbLog:
    """One run there. WANDB_API_KEY or `wandb login`, WANDB_ENTITY and WANDB_MODE=offline are theirs.

    Args:
      folder: the run folder; its name is the run's.
      project: where the run is.
      config: shown beside it.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]):
        self._run: Any = None
        self._try(lambda: self._start(folder, project, config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step; steps may come again, after a resume from an earlier checkpoint."""
        if self._run is not None:
            self._try(lambda: self._run.log({"step": step, **values}))

    def close(self, failed: bool = False) -> None:
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _start(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        file = folder / ID
        if not file.exists():
            write_text_atomic(file, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=project,
            id=file.read_text().strip(),
            name=folder.name,
            dir=os.fspath(folder),
            config=dict(config),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # theirs are many, and none is worth a training run
            self._run = None
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            print(f"Weights & Biases: {reason}; training goes on without it", file=sys.stderr, flush=True)
