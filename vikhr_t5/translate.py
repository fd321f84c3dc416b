"""A translated set of instructions: rows in, the same rows in another language out, failed ones beside them.

    OUTPUT                  JSON lines: the row's other fields, then `inputs` and `targets`, in the order of the source
    OUTPUT.rejected         JSON lines: where, reason, field, source, translation
    OUTPUT.report           JSON: settings, rows read and kept, rejected by reason
    OUTPUT.partial/         while it runs: what is done, and up to where

Only OUTPUT has a name that a reader of a folder takes for data.

Rows are translated a chunk at a time. After each chunk its rows are synced to disk, then the position is; a run that
was killed begins with the chunk it was in, so that the result is the same bytes. A sentence that stands twice in a
chunk is translated once: the answer of a row is the same words as the option it names.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from vikhr_t5 import translation_text
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import sync_directory, write_text_atomic
from vikhr_t5.progress import Progress
from vikhr_t5.translation_text import REASONS, SCRIPTS, Masked, Part, Unit

CHUNK = 400  # rows
NO_TEXT = "no_text"  # a row whose inputs or targets are null, no text, or blank

Row = tuple[str, Mapping[str, Any]]  # where it stands, and its fields


class Translator(Protocol):
    """What `translation_models.TranslationModel` does; a test may give another."""

    def fits(self, text: str) -> bool:
        """Whether a text is short enough to be translated whole."""

    def translate(self, texts: Sequence[str]) -> list[tuple[str, bool]]:
        """(translation on one line, whether it is whole) of each text."""


@dataclasses.dataclass
class Report:
    """Counts of a translation, so far."""

    total: int
    read: int = 0
    kept: int = 0
    rejected: dict[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejected.items())
        return f"{self.read} rows read, {self.kept} kept, {self.read - self.kept} rejected" + f" ({reasons})" * bool(
            reasons
        )


def translate(
    rows: Callable[[], Iterable[Row]],
    output: str | os.PathLike[str],
    translator: Translator,
    settings: Mapping[str, Any],
    fields: tuple[str, str] = ("inputs", "targets"),
    script: str = "Cyrl",
    ignore: Collection[str] = (),
    chunk: int = CHUNK,
) -> Report:
    """Translate all rows; go on where a run before this one ended.

    Args:
        rows: gives the rows anew each time, always the same in the same order: they are counted first.
        output: the JSON lines to write.
        settings: what the result depends on (model, languages, source, …), as JSON; a run that was begun with other
            settings is not continued.
        fields: names of a row's inputs and targets.
        script: the target's, a key of SCRIPTS.
        ignore: keys of REASONS that reject nothing.
        chunk: rows that are translated and written together.
    Raises:
        UserError: a row without the fields, other settings, an output that is there, a source that cannot be read.
    """
    if script not in SCRIPTS:
        raise UserError(f"unknown script {script!r}; {nearest(script, SCRIPTS)}")
    if unknown := [reason for reason in ignore if reason not in REASONS]:
        raise UserError(f"no reason to reject is called {unknown[0]!r}; {nearest(unknown[0], REASONS)}")
    fixed = {**settings, "fields": list(fields), "script": script, "ignore": sorted(ignore), "chunk": chunk}
    files = _Files(Path(output))
    if report := files.finished(fixed):
        return report
    with files.open(fixed, lambda: sum(1 for _ in rows())) as report:
        remaining = itertools.islice(rows(), report.read, None)
        with Progress("translating", report.total, "rows", done=report.read) as bar:
            while batch := list(itertools.islice(remaining, chunk)):
                kept, rejected = _translate_rows(batch, translator, fields, script, ignore)
                report.read += len(batch)
                report.kept += len(kept)
                counts = Counter(report.rejected) + Counter(row["reason"] for row in rejected)
                report.rejected = dict(sorted(counts.items()))
                files.append(kept, rejected, report)
                bar.advance(len(batch), note=f"{report.kept / report.read:.1%} kept")
        if report.read != report.total:
            raise UserError(
                f"{output}: the source had {report.total} rows and now has {report.read}; translate it anew"
            )
        files.finish()
    return report


class _Files:
    """What is on disk. `state` holds the settings, the counts, and the sizes of the files they are counts of."""

    def __init__(self, output: Path):
        self.output = output
        self.rejected = Path(f"{output}.rejected")
        self.report = Path(f"{output}.report")
        self.partial = Path(f"{output}.partial")
        self.state = self.partial / "state"
        self._handles: Sequence[BinaryIO] = ()
        self._settings: Mapping[str, Any] = {}

    def finished(self, settings: Mapping[str, Any]) -> Report | None:
        """The report of a translation that is whole; None where there is none. UserError where it is another one."""
        if self.state.exists() or not self.output.exists():
            return None
        if not self.report.exists():
            raise UserError(f"{self.output} is there already, and has no report: remove it, or choose another --output")
        record = json.loads(self.report.read_text(encoding="utf-8"))
        self._check(record, settings, self.output)
        return Report(**record["report"])

    @staticmethod
    def _check(record: Mapping[str, Any], settings: Mapping[str, Any], what: Path) -> None:
        before = record["settings"]
        if differing := [name for name in settings if before.get(name) != settings[name]]:
            name = differing[0]
            raise UserError(
                f"{what} was made with {name} {before.get(name)!r}, not {settings[name]!r}: remove it, or choose"
                " another --output"
            )

    @contextlib.contextmanager
    def open(self, settings: Mapping[str, Any], count: Callable[[], int]) -> Iterator[Report]:
        """Opens the files of a run, cut to what its state knows. One process at a time."""
        self.partial.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        with open(self.partial / "lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self.partial}: another process is translating into it") from error
            record = json.loads(self.state.read_text(encoding="utf-8")) if self.state.exists() else None
            if record and record["report"]["read"]:
                self._check(record, settings, self.partial)
            elif total := count():
                record = {"report": dataclasses.asdict(Report(total)), "sizes": [0, 0]}
            else:
                raise UserError(f"nothing to translate into {self.output}: the source has no row")
            report = Report(**record["report"])
            with contextlib.ExitStack() as stack:
                if report.read < report.total:
                    paths = [self.partial / name for name in ("kept", "rejected")]
                    self._handles = [stack.enter_context(open(path, "ab")) for path in paths]
                    for path, handle, size in zip(paths, self._handles, record["sizes"], strict=True):
                        if handle.tell() < size:
                            raise UserError(f"{path} is shorter than when it was written: remove {self.partial}")
                        handle.truncate(size)
                    self.append([], [], report)
                yield report

    def append(self, kept: Iterable[Mapping[str, Any]], rejected: Iterable[Mapping[str, Any]], report: Report) -> None:
        """Rows first, then the state that counts them."""
        for handle, rows in zip(self._handles, (kept, rejected), strict=True):
            for row in rows:
                handle.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        sizes = [handle.tell() for handle in self._handles]
        state = {"settings": self._settings, "report": dataclasses.asdict(report), "sizes": sizes}
        write_text_atomic(self.state, json.dumps(state, ensure_ascii=False))

    def finish(self) -> None:
        """Gives the files their names, the output last but for the folder; may be stopped and done again."""
        state = json.loads(self.state.read_text(encoding="utf-8"))
        del state["sizes"]
        write_text_atomic(self.report, json.dumps(state, ensure_ascii=False, indent=2))
        for name, final in (("rejected", self.rejected), ("kept", self.output)):
            if (self.partial / name).exists():
                os.replace(self.partial / name, final)
        sync_directory(self.output.parent)
        shutil.rmtree(self.partial)


def _translate_rows(
    rows: Sequence[Row], translator: Translator, fields: tuple[str, str], script: str, ignore: Collection[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to keep and the rejected ones."""
    sources = [_source(where, row, fields) for where, row in rows]
    translated = translate_texts([text for pair in sources if pair for text in pair], translator)
    results = iter(translated)
    kept: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for (where, row), source in zip(rows, sources, strict=True):
        found = {"where": where}
        if source is None:
            rejected.append({**found, "reason": NO_TEXT, "source": {name: row[name] for name in fields}})
            continue
        pair = [next(results), next(results)]
        texts = dict(zip(("inputs", "targets"), (text for text, _ in pair), strict=True))
        reasons = _defects(source, pair, script)
        if bad := next(((field, reason) for field, reason in reasons if reason not in ignore), None):
            originals = dict(zip(("inputs", "targets"), source, strict=True))
            rejected.append({**found, "reason": bad[1], "field": bad[0], "source": originals, "translation": texts})
        else:
            kept.append({**{name: value for name, value in row.items() if name not in fields}, **texts})
    return kept, rejected


def _source(where: str, row: Mapping[str, Any], fields: tuple[str, str]) -> tuple[str, str] | None:
    for field in fields:
        if field not in row:
            raise UserError(f"{where} has no field {field!r}; {nearest(field, row)}; say which are the texts: --fields")
    inputs, targets = (row[field] for field in fields)
    if not all(isinstance(text, str) and text.strip() for text in (inputs, targets)):
        return None
    return inputs, targets


def _defects(source: tuple[str, str], pair: Sequence[tuple[str, bool]], script: str) -> Iterator[tuple[str, str]]:
    for field, original, (text, whole) in zip(("inputs", "targets"), source, pair, strict=True):
        if not whole:
            yield field, "cut"
        yield from ((field, reason) for reason in translation_text.defects(original, text, script))
    if translation_text.lost_option(*source, *(text for text, _ in pair)):
        yield "targets", "options"


def translate_texts(texts: Sequence[str], translator: Translator) -> list[tuple[str, bool]]:
    """(translation, whether all of it is whole) of texts of any length and layout; equal sentences become equal."""
    split = [translation_text.split_text(text, lambda unit: translator.fits(unit)) for text in texts]
    units = _translate_units(_units(split), translator)
    return [_joined(parts, units) for parts in split]


def _translate_units(units: Sequence[str], translator: Translator) -> dict[str, tuple[str, bool]]:
    masked: list[Masked] = [translation_text.mask(unit) for unit in units]
    done: dict[str, tuple[str, bool]] = {}
    lost: dict[str, list[Part]] = {}
    for unit, one, (text, whole) in zip(units, masked, translator.translate([one.text for one in masked]), strict=True):
        restored = translation_text.unmask(text, one)
        if restored is None and whole:
            lost[unit] = translation_text.split_at_protected(unit)
        else:
            done[unit] = (text if restored is None else restored), whole
    if lost:
        between = _units(lost.values())
        pieces = dict(zip(between, translator.translate(between), strict=True))
        done |= {unit: _joined(parts, pieces) for unit, parts in lost.items()}
    return done


def _units(split: Iterable[Sequence[Part]]) -> list[str]:
    """The different units, in order."""
    return list(dict.fromkeys(part.text for parts in split for part in parts if isinstance(part, Unit)))


def _joined(parts: Sequence[Part], units: Mapping[str, tuple[str, bool]]) -> tuple[str, bool]:
    found = [units[part.text] if isinstance(part, Unit) else (part, True) for part in parts]
    return "".join(text for text, _ in found), all(whole for _, whole in found)
