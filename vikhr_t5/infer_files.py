"""`vikhr-t5 infer --checkpoint`: rows of a file or of standard input, each with the model's answers, as JSON lines.

Rows are answered a chunk at a time and written in their order; inside a chunk those of alike lengths share a batch.
After each chunk what is written is synced, and then the place: a run that was killed goes on from there, and gives the
bytes of one that was not (resumable.py).
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vikhr_t5.api import MAX_LENGTH, Answer, TextModel
from vikhr_t5.data.records import json_row, read_rows, split_suffix, text_lines, text_of
from vikhr_t5.errors import UserError
from vikhr_t5.inference import Decoding
from vikhr_t5.progress import Progress
from vikhr_t5.prompts import TooLong
from vikhr_t5.resumable import ResumableOutput, json_line

STANDARD = "-"  # standard input, standard output
CHUNK_BATCHES = 16

Row = tuple[str, dict[str, Any]]  # where it stands, and its fields
Rows = Callable[[], Iterable[Row]]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of the model for every row.

    Args:
        decoding: how answers are found.
        max_length: longest answer, in tokens.
        mode, blanks, truncate: see `api.TextModel.prompt`.
        score: rank the `targets` of each row instead of answering it.
        eos: of scores: whether the end of a target counts.
        token_log_probabilities: write those of each token, too.
    """

    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    max_length: int = MAX_LENGTH
    mode: str | None = None
    blanks: bool = True
    truncate: bool = False
    score: bool = False
    eos: bool = True
    token_log_probabilities: bool = False


def rows_of(source: str) -> Rows:
    """The rows of a source, anew at each call: lines of text (blank ones left out) as {"inputs": line}, or objects.

    Args:
        source: a text file, a line a row; JSON lines, Parquet and what else `records.read_rows` takes; or "-":
            standard input, read to its end: JSON lines where it begins with "{", else text.

    Raises (when read):
        UserError: nothing is there, or a row cannot be read; names file and line.
    """
    if source != STANDARD:
        is_text = split_suffix(source)[1] == ".txt"
        return (lambda: _of_lines(text_lines(source))) if is_text else (lambda: read_rows(source))
    try:
        lines = sys.stdin.buffer.read().decode("utf-8").removeprefix("\ufeff").split("\n")  # as a file's
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 ({error.reason} at byte {error.start})") from None
    numbered = [(f"standard input:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered or not numbered[0][1].lstrip().startswith("{"):
        return lambda: _of_lines(numbered)
    objects = [(where, json_row(line, where)) for where, line in numbered]
    return lambda: objects


def _of_lines(lines: Iterable[tuple[str, str]]) -> Iterator[Row]:
    return ((where, {"inputs": line.rstrip("\r\n")}) for where, line in lines if line.strip())


def run(model: TextModel, rows: Rows, output: str, request: Request, settings: dict[str, Any], batch_size: int) -> None:
    """Answer all rows.

    A line of the output is the row's own fields, and: "prediction" and "log_probability", or of several answers
    "predictions" and "log_probabilities"; where the input has blanks, "blanks" and "filled"; of scores
    "log_probabilities" of the targets, and "best", the number of the likeliest.

    Args:
        output: a file, which appears when it is whole; or "-": standard output, chunk by chunk.
        settings: what the answers depend on besides `request`, as JSON: a run that was begun with others is not
            continued.

    Raises:
        UserError: a row that cannot be asked, before anything is computed; another run's output.
    """
    total, cut = check(model, rows, request)
    chunks = _chunks(rows(), CHUNK_BATCHES * batch_size)
    if output == STANDARD:
        with Progress("answering", total, "rows") as bar:
            for first, chunk in chunks:
                for line in answers(model, chunk, request, first):
                    print(json_line(line))
                sys.stdout.flush()
                bar.advance(len(chunk))
    else:
        fixed = {**settings, **dataclasses.asdict(request), "batch_size": batch_size}
        with (
            ResumableOutput(Path(output), fixed) as file,
            Progress("answering", total, "rows", done=file.done) as bar,
        ):
            for first, chunk in chunks:
                if not file.has(first + len(chunk), json.dumps([row for _, row in chunk], default=str).encode()):
                    file.write(answers(model, chunk, request, first))
                    bar.advance(len(chunk))
    if cut:
        limit = model.max_input_length
        print(f"{cut} of {total} inputs were longer than {limit} tokens and were cut (--truncate)", file=sys.stderr)


def check(model: TextModel, rows: Rows, request: Request) -> tuple[int, int]:
    """(rows, rows that are cut). UserError where one cannot be asked; of those too long, all are counted."""
    total, cut = 0, 0
    too_long = ""
    model.prompt("", mode=request.mode)  # a mode that is unknown is so for all rows
    for where, row in rows():
        total += 1
        text = text_of(row, "inputs", where)
        try:
            model.prompt(text, mode=request.mode, blanks=request.blanks)
        except TooLong as error:
            cut += 1
            too_long = too_long or f"{where}: {error}"
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if request.score:
            _targets(where, row)
    if too_long and not request.truncate:
        raise UserError(too_long + (f" (and {cut - 1} more of {total} rows are too long)" if cut > 1 else ""))
    if not total:
        raise UserError("the input has no row that is not blank")
    return total, cut


def answers(model: TextModel, chunk: Sequence[Row], request: Request, first: int) -> list[dict[str, Any]]:
    """The output's lines for some rows, of which the first has the number `first`."""
    texts = [row["inputs"] for _, row in chunk]
    options = {"mode": request.mode, "blanks": request.blanks, "truncate": request.truncate}
    if request.score:
        targets = [_targets(where, row) for where, row in chunk]
        scores = model.score(texts, targets, eos=request.eos, **options)  # type: ignore[arg-type]
        return [{**row, **_scored(found, request)} for (_, row), found in zip(chunk, scores, strict=True)]
    found = model.generate(texts, request.decoding, max_length=request.max_length, first=first, **options)  # type: ignore[arg-type]
    return [{**row, **_answered(one.answers, request)} for (_, row), one in zip(chunk, found, strict=True)]


def _answered(several: list[Answer], request: Request) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {
        "prediction": [answer.text for answer in several],
        "log_probability": [answer.log_probability for answer in several],
    }
    if several[0].filled is not None:
        columns |= {"blanks": [answer.blanks for answer in several], "filled": [answer.filled for answer in several]}
    if request.token_log_probabilities:
        columns |= {name: [getattr(answer, name) for answer in several] for name in _BY_TOKEN}
    if request.decoding.num_samples == 1:
        return {name: values[0] for name, values in columns.items()}
    return {_PLURALS.get(name, name): values for name, values in columns.items()}


_BY_TOKEN = ("tokens", "token_log_probabilities")
_PLURALS = {"prediction": "predictions", "log_probability": "log_probabilities"}


def _scored(targets: list[Answer], request: Request) -> dict[str, Any]:
    sums = [target.log_probability for target in targets]
    by_token = {name: [getattr(target, name) for target in targets] for name in _BY_TOKEN}
    return {
        "log_probabilities": sums,
        "best": max(range(len(sums)), key=sums.__getitem__),
        **(by_token if request.token_log_probabilities else {}),
    }


def _targets(where: str, row: dict[str, Any]) -> list[str]:
    found = row.get("targets")
    several = found if isinstance(found, list) and found else [text_of(row, "targets", where)]
    if not all(isinstance(target, str) and target.strip() for target in several):
        raise UserError(f"{where}: field 'targets' is blank, or has an entry that is no text, or blank")
    return several


def _chunks(rows: Iterable[Row], size: int) -> Iterator[tuple[int, list[Row]]]:
    """(number of the first row, rows)."""
    iterator, first = iter(rows), 0
    while chunk := list(itertools.islice(iterator, size)):
        yield first, chunk
        first += len(chunk)
