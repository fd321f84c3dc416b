"""gs://, s3:// and the like: a local copy, made once, whole or absent. Only a remote path imports fsspec."""

import contextlib
import os
import re
import shutil
import socket
import sys
from pathlib import Path

from vikhr_t5.errors import UserError
from vikhr_t5.files import atomic_path
from vikhr_t5.progress import human

DOWNLOADS = "VIKHR_T5_DOWNLOADS"
_URL = re.compile(r"^[a-z][a-z0-9+.-]+://")
_DRIVERS = {"gs": "gcsfs", "s3": "s3fs", "http": "aiohttp", "https": "aiohttp"}


def is_remote(path: str | os.PathLike[str]) -> bool:
    return _URL.match(os.fspath(path)) is not None


def local_copy(path: str, instead: str) -> str:
    """`path` itself, or, for `scheme://…`, the file or folder below $VIKHR_T5_DOWNLOADS that it was copied to.

    A folder or file that is there already is taken as it is: what such paths name is published once.

    Args:
        path: a local path or a URL that fsspec knows.
        instead: how to name a local copy; ends the message of an error.

    Raises:
        UserError: there is no driver, no network, no permission, no such path, or no room; one line.
    """
    if not is_remote(path):
        return path
    scheme, _, rest = path.partition("://")
    downloads = Path(os.environ.get(DOWNLOADS) or "~/.cache/vikhr_t5/downloads").expanduser()
    target = downloads / scheme / rest.strip("/")
    if target.exists():
        return str(target)
    try:
        import fsspec

        filesystem, name = fsspec.core.url_to_fs(path, **({"token": _google_token()} if scheme == "gs" else {}))
    except ImportError as error:
        driver = _DRIVERS.get(scheme, f"its driver of {scheme}://")
        raise UserError(f"{path} needs the packages fsspec and {driver} (pip install them); {instead}") from error
    except ValueError as error:
        raise UserError(f"{path}: {_line(error)}; {instead}") from error
    try:
        _check_network(scheme)
        size = filesystem.du(name)
        downloads.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(downloads).free < size:
            raise UserError(f"{path} is {human(size)}B, and {downloads} has no room: set {DOWNLOADS}; {instead}")
        print(f"copying {path} ({human(size)}B) to {target}", file=sys.stderr, flush=True)
        with atomic_path(target) as temporary:
            filesystem.get(name, str(temporary), recursive=filesystem.isdir(name))
    except UserError:
        raise
    except Exception as error:  # each driver has its own
        with contextlib.suppress(OSError):
            target.parent.rmdir()  # an empty folder says nothing
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {_line(error)}); {instead}") from error
    return str(target)


def _check_network(scheme: str) -> None:
    """OSError at once where Google cannot be reached: gcsfs takes two minutes, and logs each attempt, to find out."""
    elsewhere = {"https_proxy", "all_proxy", "storage_emulator_host"}
    if scheme == "gs" and not elsewhere & {name.lower() for name in os.environ}:
        socket.create_connection(("storage.googleapis.com", 443), timeout=10).close()


def _google_token() -> str | None:
    """Public buckets need no account, and looking for one where there is none takes minutes."""
    found = "GOOGLE_APPLICATION_CREDENTIALS" in os.environ
    found |= Path("~/.config/gcloud/application_default_credentials.json").expanduser().exists()
    return None if found else "anon"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]
