"""A report on contamination as one HTML page."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vikhr_t5.page import escape, write_page

if TYPE_CHECKING:
    from vikhr_t5.data.decontamination import Finding, Report

SHOWN = 200  # items


def write(report: "Report", path: str | os.PathLike[str]) -> None:
    """Write the page; a JSON report has the items beyond the first `SHOWN`, too."""
    sets = [
        _row(name, f"{counts.items:,}", f"{counts.too_short:,}", f"{counts.contaminated:,}", f"{counts.share:.2%}")
        for name, counts in report.sets.items()
    ]
    tasks = [
        _row(
            name,
            f"{counts.examples:,}",
            f"{counts.contaminated:,}",
            f"{counts.contaminated / max(counts.examples, 1):.3%}",
            ", ".join(f"{other} {count:,}" for other, count in (counts.by_set + counts.by_name).most_common(3)) or "–",
        )
        for name, counts in report.tasks.items()
    ]
    count = len(report.findings)
    write_page(
        path,
        Path(__file__).with_name("decontamination_template.html"),
        title=f"Contamination of {escape(f'{report.mixture}, {report.split}')}",
        method=escape(report.method[0].upper() + report.method[1:] + "."),
        sets="\n".join(sets),
        tasks="\n".join(tasks),
        shown=escape(f"{min(count, SHOWN):,} of {count:,}" if count else "None was found."),
        findings="\n".join(line for finding in report.findings[:SHOWN] for line in _finding(finding)),
    )


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _finding(finding: "Finding") -> Iterator[str]:
    examples = f"{finding.examples:,} example" + "s" * (finding.examples > 1)
    yield f'<div class="sample"><b>{escape(finding.set_name)}</b> <span class="soft">{escape(finding.where)}</span><dl>'
    yield f"<dt>item</dt><dd>{_marked(finding.text, finding.ngram)}</dd>"
    yield f"<dt>{escape(finding.task)}</dt><dd>{_marked(finding.example, finding.ngram)}</dd>"
    yield f"<dt>n-gram</dt><dd>{escape(finding.ngram)}</dd>"
    yield f"<dt>share</dt><dd>{finding.share:.0%} of the item's n-grams; {examples}</dd></dl></div>"


def _marked(text: str, ngram: str) -> str:
    """A text as HTML, with the n-gram marked where it stands."""
    pattern = r"[\W_]+".join(re.escape(word).replace("е", "[её]") for word in ngram.split(" "))
    at = re.search(pattern, text, re.I)
    if not at:
        return escape(text)
    return f"{escape(text[: at.start()])}<mark>{escape(at[0])}</mark>{escape(text[at.end() :])}"
