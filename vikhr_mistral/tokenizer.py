"""`vikhr-mistral tokenizer`: a base's SentencePiece model with pieces for another script."""

import importlib.resources
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vikhr_mistral import donor as donors
from vikhr_mistral import merging, pieces, tokenizer_files, tokenizer_report
from vikhr_t5.data.hashing import text_hash
from vikhr_t5.data.records import read_texts
from vikhr_t5.data.task_texts import read_task
from vikhr_t5.errors import UserError
from vikhr_t5.files import atomic_path
from vikhr_t5.outputs import check_output
from vikhr_t5.progress import Progress

HELD_OUT = 0.01  # of the corpus' documents, when the donor is trained
MEASURED_LINES = 50_000  # at most, of each text


def extend(
    base: str,
    output_dir: str | os.PathLike[str],
    corpus: Sequence[str] = (),
    donor: str | None = None,
    task: str | None = None,
    donor_size: int = 50_000,
    strategy: str = merging.TAIL,
    script: str = "cyrillic",
    size: int | None = None,
    field: str = "text",
    texts: Sequence[str] = (),
    base_texts: Sequence[str] = (),
    module: str = "tasks",
    num_threads: int = 16,
) -> dict[str, Any]:
    """Writes an extended tokenizer and the report of it to `output_dir`, whole or not at all; prints the report.

    Args:
        base: a SentencePiece model, a folder with tokenizer.model, or "mistral" (`pieces.open_model`).
        corpus: what to train a donor on: sources of `records.read_texts`. One document in a hundred is held out.
        donor: a SentencePiece model in place of a corpus.
        task, module: a seqio task or mixture that the module registers, in place of files; its text is taken before it
            is tokenized.
        donor_size: pieces of the donor that is trained.
        strategy, script, size: as in `merging.merge`.
        field: of the corpus' and texts' rows.
        texts: sources of text in the script to measure on; by default the held-out documents, or without a corpus the
            embedded Russian pages.
        base_texts: sources of text that must keep its tokens; by default the embedded English pages.

    Returns:
        What report.json holds.

    Raises:
        UserError: `output_dir` holds something else; not one of `corpus`, `task` and `donor`; the base or the donor is
            not what it should be; too few
            pieces; no text.
    """
    if sum(map(bool, (corpus, task, donor))) != 1:
        raise UserError("give one of: a corpus or a task to train a donor on, or a donor, a SentencePiece BPE model")
    check_output(Path(output_dir), tokenizer_report.REPORT)
    base_model = pieces.open_model(base)
    pieces.check_base(base_model, base)
    held_out: list[str] = []
    if donor:
        donor_model = pieces.open_model(donor)
    else:
        with Progress("reading the corpus", None, unit="documents") as bar:
            documents = _task_texts(task, module) if task else (text for _, text in read_texts(corpus, field))
            to_train = _train_documents(documents, held_out, bar)
            donor_model = donors.train(to_train, base_model, donor_size, num_threads=num_threads)
    pieces.check_donor(donor_model, donor or "")
    merged = merging.merge(base_model, donor_model, strategy, script, size)
    lines = _lines(text for _, text in read_texts(texts, field)) if texts else _lines(held_out)
    lines = lines or _lines(_embedded("ru.txt"))
    base_lines = _lines(text for _, text in read_texts(base_texts, field)) if base_texts else []
    base_lines = base_lines or _lines(_embedded("en.txt"))
    with atomic_path(output_dir) as folder:
        folder.mkdir()
        tokenizer_files.write(merged.model, folder)
        report = tokenizer_report.build(base_model, merged, folder, strategy, script, lines, base_lines)
        tokenizer_report.write(report, folder)
    tokenizer_report.show(report)
    return report


def _task_texts(task: str, module: str) -> Iterator[str]:
    return (text for example in read_task(task, module) for text in example.texts.values())


def _train_documents(documents: Iterable[str], held_out: list[str], bar: Progress) -> Iterator[str]:
    """The documents, but for one in a hundred by a hash of its text: those are put into `held_out`."""
    for text in documents:
        bar.advance()
        if text_hash(text.encode()) < HELD_OUT:
            held_out.append(text)
        else:
            yield text


def _lines(texts: Iterable[str]) -> list[str]:
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    return list(itertools.islice(lines, MEASURED_LINES))


def _embedded(name: str) -> Iterator[str]:
    yield Path(str(importlib.resources.files("tasks.demo_data") / name)).read_text(encoding="utf-8")
