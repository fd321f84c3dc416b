"""The source files of Python modules, found and read without importing anything (importing tasks may import seqio)."""

import ast
import hashlib
import importlib.machinery
import importlib.util
import itertools
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeGuard

from vikhr_t5.packages import OWN

_SCHEMES = ("stdlib", "platstdlib", "purelib", "platlib")
_METRICS = "vikhr_t5.text_metrics"
_INSTALLED = tuple(os.path.realpath(sysconfig.get_path(name)) for name in _SCHEMES)


def file_digest(path: Path) -> str:
    """sha256 hex of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def preprocessing_digest(path: Path) -> str:
    """sha256 hex of a module's source without what says how a task is measured: the arguments `metric_fns`, and the
    imports of `vikhr_t5.text_metrics`. What is cached does not depend on them."""
    source = path.read_bytes()
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return hashlib.sha256(source).hexdigest()
    lines = list(itertools.accumulate(map(len, source.splitlines(keepends=True)), initial=0))
    kept, position = bytearray(), 0
    for node in sorted(filter(_of_metrics, ast.walk(tree)), key=lambda node: (node.lineno, node.col_offset)):
        start = lines[node.lineno - 1] + node.col_offset
        end = lines[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        if isinstance(node, ast.keyword):  # goes with the comma before it
            start = len(re.sub(rb",?\s*\Z", b"", source[:start]))
        else:  # goes with its line
            end = re.compile(rb"[ \t]*\r?\n?").match(source, end).end()  # type: ignore[union-attr]  # matches nothing, too
        kept += source[position:start]
        position = max(position, end)
    return hashlib.sha256(kept + source[position:]).hexdigest()


def _of_metrics(node: ast.AST) -> TypeGuard[ast.keyword | ast.Import | ast.ImportFrom]:
    if isinstance(node, ast.keyword):
        return node.arg == "metric_fns"
    if isinstance(node, ast.ImportFrom):
        return all(_METRICS in (node.module, f"{node.module}.{alias.name}") for alias in node.names)
    return isinstance(node, ast.Import) and all(alias.name == _METRICS for alias in node.names)


def module_file(module: str) -> Path | None:
    """The source file of a module, found on sys.path and in the current folder; None where there is none."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module that was made by hand has no spec
        spec = None
    spec = spec or importlib.machinery.PathFinder.find_spec(top, [os.getcwd()])
    for depth, name in enumerate(rest):
        if spec is None or spec.submodule_search_locations is None:
            return None
        path = list(spec.submodule_search_locations)
        spec = importlib.machinery.PathFinder.find_spec(".".join([top, *rest[:depth], name]), path)
    return Path(spec.origin) if spec is not None and spec.origin and os.path.isfile(spec.origin) else None


def source_digests(modules: str, digest: Callable[[Path], str] = preprocessing_digest) -> dict[str, str]:
    """Name -> digest of the source of `modules` (joined by commas) and of what they import, directly or not.

    Packages that are installed, and vikhr_t5, are left out unless a module of `modules` is theirs: they have versions.
    """
    tops = {name.split(".")[0] for name in modules.split(",")} | set(OWN)
    found: dict[str, str] = {}
    waiting = modules.split(",")
    while waiting:
        name = waiting.pop()
        file = module_file(name)
        if name in found or file is None or file.suffix != ".py":
            continue
        top = name.split(".")[0]
        if top == "vikhr_t5" or (top not in tops and os.path.realpath(file).startswith(_INSTALLED)):
            continue
        found[name] = digest(file)
        waiting += [*_imports(name, file), *_parents(name)]
    return dict(sorted(found.items()))


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _imports(module: str, file: Path) -> Iterator[str]:
    """What may be modules among the names that a file imports: `from a import b` gives a and a.b."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # importing it will say so
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
