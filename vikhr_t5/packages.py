"""What must be installed before it is imported: the packages of an extra; and of `tasks` and `conversion`, names that
other distributions use too, ours."""

import importlib.util
from pathlib import Path

from vikhr_t5.errors import UserError

OWN = ("tasks", "conversion")
MARKER = "__vikhr_t5__"  # stands in the `__init__.py` of ours


def require(extra: str, *names: str) -> None:
    """UserError with the command that installs the extra, where one of the packages `names` is not there."""
    if missing := [name for name in names if not importlib.util.find_spec(name)]:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'vikhr-t5[{extra}]'")


def require_own(module: str | None) -> None:
    """Check where `module` would come from, if it lies in one of OWN; nothing is imported.

    Raises:
        UserError: Python finds another package under that name, or none; names the file that it finds.
    """
    name = (module or "").split(".")[0]
    if name not in OWN:
        return
    spec = importlib.util.find_spec(name)
    origin = Path(spec.origin) if spec and spec.origin else None
    if origin and origin.suffix == ".py" and MARKER in origin.read_text(encoding="utf-8", errors="replace"):
        return
    found = origin or (next(iter(spec.submodule_search_locations or []), None) if spec else None) or "nothing"
    raise UserError(
        f"vikhr-t5's package {name!r} is hidden: Python finds {found} under that name; "
        "uninstall or rename that package, or start from another folder"
    )
