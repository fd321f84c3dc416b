"""What an extended tokenizer is worth, checked on real text: the report of `vikhr-mistral tokenizer`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vikhr_mistral import pieces
from vikhr_mistral.merging import Merged, padded_size
from vikhr_t5.data import fertility
from vikhr_t5.files import write_json

REPORT, CHARTS = "report.json", ("fertility.html", "fertility.png")
EXAMPLES = 5  # of lines that differ


def build(
    base: Any, merged: Merged, folder: Path, strategy: str, script: str, texts: Sequence[str], base_texts: Sequence[str]
) -> dict[str, Any]:
    """The report as JSON values.

    Args:
        base: the `ModelProto` that was extended.
        folder: holds the written tokenizer; its tokenizer.json is checked against the SentencePiece model.
        texts: lines, held out of the donor's training, for the figures before and after; of them, those whose letters
            are mostly of the script.
        base_texts: lines whose tokens must not change; those with a letter of the script are left out.
    """
    from tokenizers import Tokenizer

    old, new = pieces.processor(base), pieces.processor(merged.model)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.encode_special_tokens = True  # "<s>" in a text is text here, as to SentencePiece
    texts = [line for line in texts if script_share(line, script) > 0.5]
    untouched = [line for line in base_texts if not script_share(line, script)]
    lines = [*texts, *untouched]
    ids = new.EncodeAsIds(lines)
    encoded = fast.encode_batch(lines, add_special_tokens=False)
    decoded = new.DecodeIds(ids)
    fast_decoded = fast.decode_batch(ids, skip_special_tokens=False)
    reachable = pieces.reachable(merged.model, merged.added)
    size = len(merged.model.pieces)
    return {
        "strategy": strategy,
        "script": script,
        "base_size": len(base.pieces),
        "size": size,
        "padded_size": padded_size(size),
        "candidates": merged.candidates,
        "added": len(merged.added),
        "reachable": sum(reachable),
        "unreachable": len(merged.unreachable),
        "unchanged": _equal(untouched, old.EncodeAsIds(untouched), new.EncodeAsIds(untouched)),
        "tokenizer_json": _equal(lines, ids, [each.ids for each in encoded]),
        "round_trip": _equal(lines, lines, decoded),
        "round_trip_tokenizer_json": _equal(lines, decoded, fast_decoded),
        "text": {"before": _figures("base", old, texts), "after": _figures("extended", new, texts)},
        "base_text": {"before": _figures("base", old, untouched), "after": _figures("extended", new, untouched)},
    }


def script_share(line: str, script: str) -> float:
    """Of the letters of a line."""
    letters = [character for character in line if character.isalpha()]
    return sum(pieces.in_script(letter, script) for letter in letters) / max(len(letters), 1)


def _equal(lines: Sequence[str], left: Sequence[Any], right: Sequence[Any]) -> dict[str, Any]:
    """How many lines are equal on both sides, of how many; and the first that are not."""
    differ = [line for line, a, b in zip(lines, left, right, strict=True) if a != b]
    return {"lines": len(lines), "equal": len(lines) - len(differ), "differ": differ[:EXAMPLES]}


def _figures(name: str, processor: Any, texts: Sequence[str]) -> dict[str, Any]:
    tokenizer = fertility.Tokenizer(name, processor.GetPieceSize(), processor.EncodeAsIds, processor.unk_id())
    return dataclasses.asdict(fertility.measure(tokenizer, texts))


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Writes report.json and the chart of tokens per word, before and after."""
    write_json(folder / REPORT, report)
    measured = [fertility.Fertility(**figures) for figures in report["text"].values()]
    for chart in CHARTS:
        fertility.write_chart(measured, folder / chart)


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """The report as a table in the terminal."""
    title = (
        f"{report['base_size']:,} pieces → {report['size']:,} in {report['padded_size']:,} rows ({report['strategy']})"
    )
    table = Table(title=title, title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    considered = report["added"] + (report["unreachable"] if report["strategy"] in ("tail", "joint") else 0)
    table.add_row("donor's new pieces in the script", "", f"{report['candidates']:,}")
    table.add_row("pieces added", "", f"{report['added']:,}")
    table.add_row("reachable, of those added", "", _share(report["reachable"], report["added"]))
    if considered > report["added"]:
        table.add_row("left out as unreachable", "", f"{report['unreachable']:,} of {considered:,}")
    for key, name in (("text", f"{report['script']} text"), ("base_text", "base text")):
        before, after = (fertility.Fertility(**figures) for figures in report[key].values())
        per_word, per_token = f"{name}: tokens per word", f"{name}: characters per token"
        table.add_row(per_word, f"{before.tokens_per_word:.3f}", f"{after.tokens_per_word:.3f}")
        table.add_row(per_token, f"{before.characters_per_token:.3f}", f"{after.characters_per_token:.3f}")
    for key, name in (
        ("unchanged", "base text: lines with the same tokens"),
        ("tokenizer_json", "tokenizer.json: lines equal to SentencePiece"),
        ("round_trip", "lines that decode to themselves"),
    ):
        table.add_row(name, "", f"{report[key]['equal']:,} of {report[key]['lines']:,}")
    (console or Console()).print(table)


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"
