"""Checkpoints: saved in the background by Orbax, kept by rules, restored onto any mesh; see `checkpoint_files`."""

import contextlib
import dataclasses
import functools
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from vikhr_t5.data.vocabulary import AnyVocabulary, vocabulary_files, vocabulary_record
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import system_error
from vikhr_t5.train.checkpoint_files import defect, find_checkpoint, find_checkpoints, read_progress, seal, steps
from vikhr_t5.train.state import EncoderDecoderModel, TrainState

_CHUNK_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
    """When to save and what to keep.

    Args:
      period: steps between checkpoints; the last step is always saved.
      keep: newest checkpoints kept; None: all.
      dtype: of the stored parameters; "bfloat16" halves them, and a resume is then no longer exact.
      best_metric: name of an evaluation metric ("loss", "accuracy", "loss/<source>"); the checkpoint with the best
        value so far is kept besides the newest.
      best_mode: "min" or "max".
    """

    period: int = 1000
    keep: int | None = 3
    dtype: str = "float32"
    best_metric: str | None = None
    best_mode: str = "min"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("period", self.period, self.period >= 1),
            ("keep", self.keep, self.keep is None or self.keep >= 1),
            ("dtype", self.dtype, self.dtype in ("float32", "bfloat16")),
            ("best_mode", self.best_mode, self.best_mode in ("min", "max")),
        ):
            if not allowed:
                raise UserError(f"SaveCheckpointConfig.{name} cannot be {value!r}")


@dataclasses.dataclass(frozen=True)
class RestoreCheckpointConfig:
    """Where a new run starts from, or what is evaluated.

    Args:
      path: a run folder (its newest whole checkpoint) or one checkpoint's folder; None: fresh parameters.
      reset_optimizer: take the parameters and the step, and start the optimizer anew.
      mode: "latest", or "all" checkpoints of the folder, which `vikhr-t5 eval` evaluates one by one (t5x's word).
    """

    path: str | None = None
    reset_optimizer: bool = False
    mode: str = "latest"

    def __post_init__(self) -> None:
        if self.mode not in (known := ("latest", "all")):
            raise UserError(f"RestoreCheckpointConfig.mode {self.mode!r} is unknown ({nearest(self.mode, known)})")

    def one(self) -> Path:
        """The one checkpoint of the path.

        Raises:
          UserError: all are asked for, or there is no whole one.
        """
        if self.mode == "all":
            raise UserError("RestoreCheckpointConfig.mode 'all' is for `vikhr-t5 eval`; here one is read: 'latest'")
        return find_checkpoint(self._given())

    def each(self) -> list[Path]:
        """The checkpoints that `mode` says, the oldest first. UserError where there is none."""
        return find_checkpoints(self._given()) if self.mode == "all" else [self.one()]

    def _given(self) -> str:
        if self.path is None:
            raise UserError("no checkpoint to read: set CHECKPOINT_PATH")
        return self.path


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What t5x's `CheckpointConfig` is: `restore` None starts fresh."""

    save: SaveCheckpointConfig = SaveCheckpointConfig()
    restore: RestoreCheckpointConfig | None = None


class Checkpoints:
    """The checkpoints of one run: saves in the background, keeps what the configuration says.

    Construction removes what an interrupted save left, and renames a checkpoint that was cut short to
    `<step>.damaged`, saying so.
    """

    def __init__(self, directory: str | os.PathLike[str], config: SaveCheckpointConfig):
        import orbax.checkpoint as ocp  # half a second: only where checkpoints are used

        self.directory = Path(directory).absolute()
        self.config = config
        self._ocp = ocp
        self._files: Mapping[str, bytes] = {}
        self._saving: int | None = None
        if jax.process_index() == 0:
            self._set_damaged_aside()
        _silence_orbax()
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(config.keep)]
        metric = config.best_metric
        worst = float("inf") if config.best_mode == "min" else -float("inf")

        def value(metrics: Mapping[str, float]) -> float:  # of a checkpoint, too, that was saved by another metric
            return metrics.get(metric or "", worst)

        if metric:
            best = ocp.checkpoint_managers.BestN(
                get_metric_fn=value,
                reverse=config.best_mode == "min",
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            best_fn=value if metric else None,  # makes Orbax store the metrics
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._complete),
        )
        handlers = {item: handler() for item in ("params", "opt_state")}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def save(
        self, step: int, state: TrainState, files: Mapping[str, bytes], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Start saving; returns when the state may change again (it is then copied or held).

        Args:
          files: path inside the checkpoint -> content; `progress.json`, and what `described` gives.
          metrics: of an evaluation at this very step.

        Raises:
          UserError: this or the previous save failed (a full disk); says which checkpoint is the last good one.
        """
        self.wait()
        params = state.params
        if self.config.dtype != "float32":
            params = jax.tree.map(lambda p: p.astype(self.config.dtype), params)
        best = self.config.best_metric
        if best and metrics and best not in metrics:
            raise UserError(f"SaveCheckpointConfig.best_metric {best!r} is no metric ({nearest(best, metrics)})")
        kept = {best: metrics[best]} if best and metrics else None
        self._files, self._saving = files, step
        arrays = sum(x.nbytes for x in jax.tree.leaves((params, state.opt_state)))  # compression saves little
        needed = arrays + sum(map(len, files.values())) + 2**20  # and Orbax's own small files
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            self._refuse(f"{needed / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free")
        with self._explained():
            self._manager.save(
                step,
                args=self._ocp.args.Composite(params=to_save(params), opt_state=to_save(state.opt_state)),
                metrics=kept,
                force=True,
            )

    def wait(self) -> None:
        """Until what is being saved is on disk under its name. Raises as `save`."""
        with self._explained():
            self._manager.wait_until_finished()
        self._saving = None

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return next((path for path in steps(self.directory) if defect(path) is None), None)

    def _complete(self) -> None:
        """Called by Orbax's thread when its own files are written, before the rename: ours, then the manifest."""
        (folder,) = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        for name, content in self._files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        seal(folder)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns a failure to write into one line, frees the room, and names the last good checkpoint."""
        try:
            yield
        except Exception as error:
            code = system_error(error)
            if code is None:
                raise
            self._remove_unfinished()
            self._refuse(os.strerror(code), error)

    def _remove_unfinished(self) -> None:
        """What is left of a save that failed. TensorStore may still be writing other arrays into it: so, until gone."""
        deadline = time.monotonic() + 10
        while leftovers := list(self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")):
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)

    def _refuse(self, reason: str, cause: Exception | None = None) -> NoReturn:
        newest = self.newest()
        good = f"the last good checkpoint is {newest}" if newest else "there is no earlier checkpoint"
        raise UserError(
            f"cannot save step {self._saving} to {self.directory}: {reason}; {good}:"
            " make room there and run the same command again"
        ) from cause

    def _set_damaged_aside(self) -> None:
        for path in steps(self.directory):
            if (reason := defect(path)) is not None:
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                print(f"checkpoint {path} is not whole ({reason}): set aside as {aside.name}", file=sys.stderr)


def handler() -> Any:
    """How Orbax lays out a tree: a folder for each array, a file for each chunk, its bytes as they are.

    zstd would make parameters 8% smaller, and writing and reading them two to four times as slow.
    """
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)


def to_save(tree: Any) -> Any:
    """What Orbax is to save of a tree; stacked layers in chunks of one layer, so that a conversion reads by layer."""
    import orbax.checkpoint as ocp

    def chunked(path: tuple, leaf: Any) -> Any:
        stacked = any(getattr(key, "key", None) == "layers" for key in path) and leaf.ndim > 1
        layer = leaf.nbytes // leaf.shape[0] if stacked else 0
        return ocp.SaveArgs(chunk_byte_size=max(_CHUNK_BYTES, layer), shard_axes=(0,) if stacked else ())

    return ocp.args.PyTreeSave(tree, save_args=jax.tree_util.tree_map_with_path(chunked, tree))


def described(model: EncoderDecoderModel, config_text: str) -> dict[str, bytes]:
    """Path -> content of what a run folder and each of its checkpoints hold besides arrays and progress."""
    return {
        "config.gin": config_text.encode(),
        "model_config.json": model.config.to_json().encode(),
        **{f"vocabulary/{name}": content for name, content in vocabulary_files(model.vocabulary).items()},
    }


def check_vocabulary(path: Path, vocabulary: AnyVocabulary) -> None:
    """UserError where the checkpoint at `path` was made with another vocabulary."""
    saved = vocabulary_record(path / "vocabulary")
    if saved["fingerprint"] != vocabulary.fingerprint():
        model = path / "vocabulary" / "spiece.model"
        hint = f"set VOCABULARY_FILE to {model}" if model.exists() else "use byte_vocabulary.ByteVocabulary"
        raise UserError(
            f"checkpoint {path} has another vocabulary than {vocabulary!r} (or other EXTRA_IDS: it has"
            f" {saved['extra_ids']}): {hint}"
        )


def check_arrays(path: Path, like: TrainState, reset_optimizer: bool = False) -> None:
    """Whether `restore` with the same arguments would work, by the arrays' names and shapes; raises as it does."""
    import orbax.checkpoint as ocp

    _silence_orbax()
    hints = {"params": "set T5Config to the model that was saved"}
    if _has_optimizer(path, reset_optimizer):
        hints["opt_state"] = "use the optimizer that was saved, or set RestoreCheckpointConfig.reset_optimizer"
    for item, hint in hints.items():
        saved = _by_name(ocp.StandardCheckpointer().metadata(path / item).item_metadata.tree)
        wanted = _by_name(getattr(like, item))
        for name in [*wanted, *saved]:
            have, want = (f"{list(t[name].shape)}" if name in t else "absent" for t in (saved, wanted))
            if have != want:
                raise UserError(f"checkpoint {path}: {item}/{name} is {have}, this model's is {want}: {hint}")


def restore(path: Path, like: TrainState, reset_optimizer: bool = False) -> tuple[TrainState, dict[str, Any]]:
    """A checkpoint's state, placed as `like` says.

    Args:
      path: one whole checkpoint's folder.
      like: `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      (state, progress.json). `state.opt_state` is None where the checkpoint has none or `reset_optimizer` is set.

    Raises:
      UserError: a parameter is missing, unknown, or of another shape; names it, with both shapes.
    """
    import orbax.checkpoint as ocp

    check_arrays(path, like, reset_optimizer)
    progress = read_progress(path)
    step = jax.device_put(np.int32(progress["step"]), like.step.sharding)
    checkpointer = ocp.StandardCheckpointer()
    params, opt_state = checkpointer.restore(path / "params", like.params), None
    if _has_optimizer(path, reset_optimizer):
        opt_state = checkpointer.restore(path / "opt_state", like.opt_state)
    return TrainState(step, params, opt_state), progress


def _has_optimizer(path: Path, reset_optimizer: bool) -> bool:
    return not reset_optimizer and (path / "opt_state").is_dir()


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path): leaf
        for path, leaf in leaves
    }


@functools.cache
def _silence_orbax() -> None:
    """A failed save reaches the caller as one exception; its threads would also report each write that failed."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize.* was never awaited", RuntimeWarning)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # TensorStore: nobody waits for a write any more
            show(unraisable)

    sys.unraisablehook = hook
