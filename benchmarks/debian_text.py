"""Debian's documentation in Russian as JSON lines: real text to train on where only a Debian mirror can be reached.

    python benchmarks/debian_text.py data/local
    VIKHR_T5_DATA_DIR=data vikhr-t5 cache --mixture local_ul2 --module tasks.corpora --vocabulary spiece.model

Packages are fetched with `apt-get download` (no root, nothing is installed) and taken apart with `dpkg-deb`: pages of
HTML, Mallard pages, man pages. Each becomes one line {"text", "package", "file"}, as raw as that makes it: the cleaning
of the task has something to do. The texts are under the licences that the packages' copyright files give (GPL, GFDL,
CC BY-SA and others): train on them, and read those before you pass them on.
"""

import argparse
import gzip
import html.parser
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (  # without developers-reference-ru, whose pages stand there a second time as one page
    "manpages-ru",
    "gnome-user-docs",
    "debian-handbook",
    "gimp-help-ru",
    "aptitude-doc-ru",
    "debian-faq-ru",
    "maint-guide-ru",
    "kicad-doc-ru",
    "doublecmd-help-ru",
)
# What the name of a file in a language contains; manuals in English have no folder of their own, and are not read.
LANGUAGES = {
    "ru": re.compile(r"[/._](ru|ru[-_]RU)([/._]|$)"),
    "uk": re.compile(r"[/._](uk|uk[-_]UA)([/._]|$)"),
    "en": re.compile(r"[/._](en|en[-_]US|C)([/._]|$)"),
}
BLOCKS = {
    "p",
    "div",
    "li",
    "dt",
    "dd",
    "tr",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "pre",
    "br",
    "title",
    "item",
    "desc",
    "section",
}


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style")
        self.parts.append("\n" if tag in BLOCKS else "")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")
        self.parts.append("\n" if tag in BLOCKS else "")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def of_html(data: bytes) -> str:
    """The text of a page, a line for each block."""
    parser = _Text()
    parser.feed(data.decode(errors="replace"))
    return "".join(parser.parts)


def of_mallard(data: bytes) -> str:
    """The text of a GNOME help page."""
    parts: list[str] = []

    def visit(element: xml.etree.ElementTree.Element) -> None:
        tag = element.tag.rpartition("}")[2]
        if tag == "info":
            return
        parts.append("\n" if tag in BLOCKS else "")
        parts.append(element.text or "")
        for child in element:
            visit(child)
            parts.append(child.tail or "")
        parts.append("\n" if tag in BLOCKS else "")

    visit(xml.etree.ElementTree.fromstring(data))
    return "".join(parts)


def of_man(data: bytes) -> str:
    """The text of a man page: macros gone, headings kept, paragraphs on one line."""
    lines = []
    for line in gzip.decompress(data).decode(errors="replace").splitlines():
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].partition(" ")
            if macro in ("SH", "SS"):
                lines.append(f"\n\n{rest}\n")
            elif macro in ("B", "I", "BR", "IR", "BI", "IB", "RB", "RI", "SM"):
                lines.append(rest.replace(" ", "") if len(macro) == 2 else rest)
            elif macro in ("PP", "P", "LP", "TP", "IP", "sp", "br"):
                lines.append("\n\n")
            continue
        lines.append(line)
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[+-]?\d|\\&|\\c", "", " ".join(lines))
    for escape, character in (
        (r"\-", "-"),
        (r"\(aq", "'"),
        (r"\(bu", "•"),
        (r"\(em", "—"),
        (r"\(en", "–"),
        (r"\e", "\\"),
    ):
        text = text.replace(escape, character)
    return re.sub(r"\\\(..|\\\[\w+\]", "", text).replace('"', "")


READERS = {".html": of_html, ".page": of_mallard, ".gz": of_man}


def tidy(text: str) -> str:
    """One space, one blank line at most."""
    return re.sub(r"\n\s*\n\s*", "\n\n", re.sub(r"[ \t\r\f]+", " ", text)).strip()


def documents(folder: Path, language: str = "ru") -> Iterator[tuple[str, str]]:
    """(file, text) of every page of an unpacked package that is in a language of `LANGUAGES`."""
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        read = READERS.get(file.suffix)
        if read is None or not LANGUAGES[language].search(name) or file.is_symlink() or not file.is_file():
            continue
        if file.suffix == ".gz" and "/man/" not in name:
            continue
        try:
            text = tidy(read(file.read_bytes()))
        except (xml.etree.ElementTree.ParseError, OSError) as error:
            print(f"{name}: {error}: left out", file=sys.stderr)
            continue
        if text:
            yield name, text


def fetch(package: str, language: str = "ru") -> list[tuple[str, str]]:
    """(file, text) of the package's pages. OSError where apt-get cannot fetch it, or is not there."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["apt-get", "-qq", "download", package], cwd=folder, capture_output=True, text=True)
        files = list(Path(folder).glob("*.deb"))
        if done.returncode or not files:
            raise OSError(f"{package}: {(done.stderr.strip() or 'not found').splitlines()[-1]}")
        content = Path(folder) / "content"
        subprocess.run(["dpkg-deb", "-x", str(files[0]), str(content)], check=True)
        return list(documents(content, language))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="the folder to write PACKAGE.jsonl to")
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    parser.add_argument("--language", choices=LANGUAGES, default="ru")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    total = 0
    for package in arguments.packages:
        try:
            pages = fetch(package, arguments.language)
        except OSError as error:
            print(error, file=sys.stderr)
            continue
        size = sum(len(text.encode()) for _, text in pages)
        total += size
        with open(arguments.output / f"{package}.jsonl", "w", encoding="utf-8") as out:
            for file, text in pages:
                out.write(json.dumps({"text": text, "package": package, "file": file}, ensure_ascii=False) + "\n")
        print(f"{package}: {len(pages)} pages, {size / 1e6:.2f} MB of text")
    print(f"{total / 1e6:.1f} MB in {arguments.output}")
    return 0 if total else 1


if __name__ == "__main__":
    sys.exit(main())
