"""What tells a stored model from another, and from itself after a change, without reading its weights."""

import hashlib
from pathlib import Path


def fingerprint(folder: Path) -> str:
    """Of a folder: its place, the names, sizes and last changes of its files, and what its JSON files say.

    Below a Hugging Face folder nothing counts: it has no part in the model, and commands may write there.
    """
    files = folder.glob("*") if (folder / "config.json").is_file() else folder.rglob("*")
    digest = hashlib.sha256(f"{folder.resolve()}\n".encode())
    for file in sorted(path for path in files if path.is_file()):
        state = file.stat()
        digest.update(f"{file.relative_to(folder)} {state.st_size} {state.st_mtime_ns}\n".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
