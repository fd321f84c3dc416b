"""A checkpoint on disk: Orbax's arrays, and beside them all that a resume or a conversion needs.

    <run>/checkpoints/<step>/
        params/  opt_state/     arrays (opt_state is absent where a conversion made the checkpoint)
        progress.json           step, data position and fingerprint, seed, counters
        model_config.json  config.gin  vocabulary/{spiece.model, vocabulary.json}
        manifest.json           the size of every file above; written last

A checkpoint appears under its name by one rename, after everything in it is synced; the manifest then tells a whole
one from one that lost files later (a full disk, a broken copy). No JAX here.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from vikhr_t5.errors import UserError
from vikhr_t5.files import write_text_atomic

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Sync what was written in a checkpoint's folder, and write its manifest."""
    unlisted = {"_CHECKPOINT_METADATA", MANIFEST}  # Orbax changes the first once more, after this
    listed = [path for path in folder.rglob("*") if path.is_file() and path.name not in unlisted]
    for path in listed:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(listed)}
    write_text_atomic(folder / MANIFEST, json.dumps({"version": 1, "files": sizes}, indent=1))


def defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint's folder; None where every file of its manifest is there in full.

    Raises:
      UserError: it cannot be read (no permission, a file system that does not answer), and so may be whole.
    """
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["files"]
        for name, size in sizes.items():
            found = _size(folder / name)
            if found is None:
                return f"{name} is missing"
            if found != size:
                return f"{name} has {found} of {size} bytes"
    except (FileNotFoundError, NotADirectoryError):
        return f"no {MANIFEST}"
    except OSError as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_progress(folder: Path) -> dict[str, Any]:
    """`progress.json` of a whole checkpoint: {"step", "first_step", "seed", "tokens", ...}."""
    progress: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    return progress


def steps(directory: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in directory.glob("*") if path.name.isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint meant by `path`: itself, or the newest whole one of a run folder (or of its `checkpoints`).

    Raises:
      UserError: `path` does not exist, or has no whole checkpoint; says what is wrong with the newest.
    """
    reasons: list[str] = []
    for candidate in _candidates(path):
        reason = defect(candidate)
        if reason is None:
            if reasons:
                print(f"{reasons[0]}: using {candidate}", file=sys.stderr)
            return candidate
        reasons.append(f"checkpoint {candidate} is not whole ({reason})")
    raise UserError(
        reasons[0] if reasons else f"{path} holds no checkpoint: give a run folder or a checkpoint's folder"
    )


def find_checkpoints(path: str | os.PathLike[str]) -> list[Path]:
    """All whole checkpoints meant by `path`, the oldest first; says which are not. Raises as `find_checkpoint`."""
    defects = {candidate: defect(candidate) for candidate in reversed(_candidates(path))}
    whole = [candidate for candidate, reason in defects.items() if reason is None]
    for candidate, reason in defects.items() if whole else ():
        if reason:
            print(f"checkpoint {candidate} is not whole ({reason}): left out", file=sys.stderr)
    return whole or [find_checkpoint(path)]


def _candidates(path: str | os.PathLike[str]) -> list[Path]:
    """The newest first."""
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"checkpoint {path}: no such folder")
    if (folder / MANIFEST).is_file():
        return [folder]
    found = steps(folder / "checkpoints") or steps(folder)
    return found or ([folder] if folder.name.isdigit() else [])  # a run folder may be named so, too
