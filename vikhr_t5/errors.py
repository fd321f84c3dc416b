"""The one error that people see: what is wrong, where, and what to do, in one line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input or a bad environment. The command line prints the message alone and exits with 2."""


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint to append to "unknown NAME": the closest known names, or all of them where none is close."""
    known = sorted(set(names))
    if not known:
        return "none is known here"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(close)
    shown = ", ".join(known[:12])
    return f"known: {shown}" + (f", and {len(known) - 12} more" if len(known) > 12 else "")
