"""gin files as gin reads them: found in the search paths, includes made absolute, t5x's modules replaced.

What else is learnt on the way: which task modules the files import, and which line binds what.
"""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vikhr_t5 import t5x_dialect
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.packages import OWN

_INCLUDE = re.compile(r"^(?P<head>\s*include\s+)(?P<quote>['\"])(?P<name>[^'\"]+)(?P=quote)(?P<rest>.*)$", re.DOTALL)
_BINDING = re.compile(r"(?:(?P<selector>[\w./]+)\.)?(?P<parameter>\w+)\s*=(?!=)")
_BLOCK = re.compile(r"(?P<selector>[\w./]+):\s*(?:#.*)?$")
_QUOTED_OR_COMMENT = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|#.*")


def gin_folder() -> Path:
    """The folder of our own gin files: `gin/` of the repository, or inside the installed package."""
    package = Path(__file__).resolve().parent
    return package / "gin" if (package / "gin").is_dir() else package.parent / "gin"


class GinFiles:
    """Finds and reads gin files: resolves includes, rewrites t5x's import lines, knows which file is being read."""

    def __init__(self, search_paths: Sequence[str]):
        self.search_paths = [Path(p).expanduser() for p in search_paths]
        self.open_files: list[Path] = []
        self.task_modules: list[str] = []  # imported by the files, and named by none of their bindings
        self.flags: dict[str, str] = {}  # "DatasetConfig.pack" → the flag that binds it
        self._roots: list[Path] = []
        self._statements: dict[Path, list[tuple[int, str | Path]]] = {}  # what a line binds, or includes

    def folders(self, beside: Path | None = None) -> list[Path]:
        """Where a relative name is looked for, in order."""
        return [Path(), *([beside] if beside else []), *self.search_paths, gin_folder()]

    def find(self, name: str, including: Path | None = None, line: int = 0) -> Path:
        path = Path(name).expanduser()
        folders = [Path("/")] if path.is_absolute() else self.folders(including.parent if including else None)
        for folder in folders:
            if (folder / path).is_file():
                return (folder / path).absolute()
        where = f"{shown(including)}:{line}: " if including else ""
        known = [str(p.relative_to(f)) for f in {gin_folder(), *self.search_paths} for p in f.rglob("*.gin")]
        searched = ", ".join(dict.fromkeys(str(f.absolute()) for f in folders))
        raise UserError(f"{where}gin file {name!r} was not found in {searched} ({nearest(name, known)})")

    @contextlib.contextmanager
    def read(self, name: str) -> Iterator[io.StringIO]:
        """gin's file reader: the file's text with includes made absolute and t5x's modules replaced."""
        path = Path(name)
        if path in self.open_files:
            raise UserError(f"{shown(path)} includes itself, through {shown(self.open_files[-1])}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{shown(path)} cannot be read as UTF-8 text: {error}") from None
        self._note_statements(text, path)
        code = re.sub(r"^\s*(?:import|from)\b.*", "", _QUOTED_OR_COMMENT.sub("", text), flags=re.MULTILINE)
        needs = functools.partial(_needs, code, dynamic="__gin__ import dynamic_registration" in text)
        lines = [self._rewrite(line, path, i, needs) for i, line in enumerate(text.splitlines(keepends=True), start=1)]
        handle = io.StringIO("".join(lines))
        handle.name = str(path)  # gin's messages show it
        self.open_files.append(path)
        yield handle
        self.open_files.pop()  # after an error it stays, and tells which file was being read

    def place(self, binding: str) -> str:
        """Where "DatasetConfig.pack" was bound last, in any scope: a flag, "a.gin:7", or "" where nowhere."""
        found = ""

        def walk(path: Path) -> None:
            nonlocal found
            for number, statement in self._statements.get(path, []):
                if isinstance(statement, Path):
                    walk(statement)
                elif statement == binding:
                    found = f"{shown(path)}:{number}"

        for root in self._roots:
            walk(root)
        return self.flags.get(binding, found)

    def _note_statements(self, text: str, path: Path) -> None:
        """For `place`: messages about a value that turns out not to do when it is used."""
        block, statements = "", list[tuple[int, str | Path]]()
        for number, line in enumerate(text.splitlines(), start=1):
            if include := _INCLUDE.match(line):
                statements.append((number, self.find(include["name"], path, number)))
            elif binding := _BINDING.match(line.strip()):
                selector = binding["selector"] or (block if line[:1].isspace() else "")
                statements.append((number, parameter_key(f"{selector}.{binding['parameter']}")))
            elif header := _BLOCK.match(line):
                block = header["selector"]
        self._statements[path] = statements
        if not self.open_files:
            self._roots.append(path)

    def _rewrite(self, line: str, path: Path, number: int, needs: Callable[[str], bool]) -> str:
        """One line as gin reads it. `needs(name)`: whether the file's bindings use the module imported as `name`."""
        include = _INCLUDE.match(line)
        if include:
            target = self.find(include["name"], path, number)
            return f"{include['head']}{str(target)!r}{include['rest']}"
        if found := t5x_dialect.imported(line):
            module, name = found
            used = needs(name)
            if not (used and module.split(".")[0] in OWN):
                self.task_modules.append(module)
            if not used:
                # It registers seqio tasks: needed where they are cached, which is another process. Imported here it
                # would bring TensorFlow, or fail on a machine that has only what training needs.
                return "\n"
        try:
            return t5x_dialect.rewrite_import(line)
        except UserError as error:
            raise UserError(f"{shown(path)}:{number}: {error}") from None


def _needs(code: str, name: str, *, dynamic: bool) -> bool:
    """Whether the bindings or references of a file need the module that it imports as `name`.

    Without dynamic registration a module registers itself with gin, under any name: every binding may need it.
    code: the file without comments, strings and import lines.
    """
    used = rf"(?<![\w.]){re.escape(name)}\.\w" if dynamic else r"^\s*[\w/]+\.\w|@"
    return re.search(used, code, re.MULTILINE) is not None


def parameter_key(name: str) -> str:
    """`train/utils.DatasetConfig.pack` → `DatasetConfig.pack`: enough to find where it stands."""
    return ".".join(re.split("[./]", name)[-2:])


def shown(path: Path | str) -> str:
    """A path as people know it: relative to the working folder where it lies inside."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
