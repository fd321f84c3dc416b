"""HTML pages that are one file each: a template, the style they share (page.css), and what is put into it."""

import html
import os
import re
from pathlib import Path

from vikhr_t5.files import write_text_atomic


def escape(text: str) -> str:
    """Text as HTML that shows it, also inside an attribute."""
    return html.escape(text, quote=True)


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}"""


def write_page(path: str | os.PathLike[str], template: Path, title: str, **values: str) -> None:
    """Write a page, whole.

    Args:
        path: the HTML file; replaced.
        template: HTML in which `{{name}}` stands for a value, and `{{head}}`, at its beginning, for all up to page.css
            in a style element that is still open.
        title, values: HTML of each name; nothing in it is escaped or put in again.
    """
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    values |= {"title": title, "head": _HEAD.format(title=title, style=style)}
    text = template.read_text(encoding="utf-8")
    write_text_atomic(path, re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], text))
