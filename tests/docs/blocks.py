"""The fenced blocks of the documentation, and the commands that stand in them.

A comment directly before a block says that it is not run, and why: `<!-- not run: needs eight GPUs -->`.
"""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in [ROOT / "README.md", ROOT / "README.ru.md", *(ROOT / "docs").rglob("*.md")])
LANGUAGES = {"bash", "python", "gin", "yaml", "json", "text"}  # text: output and diagrams, nothing to run
_NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")
_ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=")


@dataclasses.dataclass(frozen=True)
class Block:
    """line: of the opening fence, counted from 1. not_run: the reason, or None."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The words of each command of a bash block, without comments and assignments; a pipe divides."""
        for line in self.text.replace("\\\n", " ").split("\n"):
            for part in re.split(r"\s(?:\||&&)\s", line):
                words = shlex.split(part, comments=True)
                while words and _ASSIGNMENT.match(words[0]):
                    words = words[1:]
                if words[-1:] == ["&"]:
                    words = words[:-1]
                if words:
                    yield words


def blocks(page: Path) -> list[Block]:
    """In their order."""
    found, lines = [], page.read_text(encoding="utf-8").split("\n")
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        before = next((lines[i] for i in range(start - 1, -1, -1) if lines[i].strip()), "")
        reason = _NOT_RUN.match(before.strip())
        text = "\n".join(lines[start + 1 : number])
        found.append(Block(page, start + 1, lines[start].removeprefix("```"), text, reason and reason[1]))
        start = None
    assert start is None, f"{page}:{start}: a block that does not end"
    return found
