"""The rows of benchmarks, checked one by one: from the hub, or from local files in the published schema.

data = BenchmarkData("xnli_ru", data_dir="evaluation")
data.dataset(num_fewshot=5)  ->  DatasetDict of the splits that lm-eval's task asks for
"""

import functools
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, load_dataset

from vikhr_t5.data.decontamination import SETS, SPLIT, split_of
from vikhr_t5.data.records import read_rows, source_files, split_suffix
from vikhr_t5.errors import UserError, nearest

Row = dict[str, Any]


class Schema(NamedTuple):
    """What a benchmark's rows are.

    Attributes:
        fields: those that its prompts need.
        wrong: what is wrong with a row that has them; None where nothing is.
        evaluated: the split that is scored, as the hub names it, then names that files have for it.
        fewshot: the split of examples in prompts, likewise; empty: lm-eval takes the scored items.
    """

    fields: tuple[str, ...]
    wrong: Callable[[Row], str | None]
    evaluated: tuple[str, ...] = ("test",)
    fewshot: tuple[str, ...] = ()


def _texts(*fields: str) -> Callable[[Row], str | None]:
    def wrong(row: Row) -> str | None:
        blank = [name for name in fields if not isinstance(row[name], str) or not row[name].strip()]
        return f"{blank[0]!r} is {row[blank[0]]!r}, and text is wanted" if blank else None

    return wrong


def _wrong_xwinograd(row: Row) -> str | None:
    if reason := _texts("sentence", "option1", "option2")(row):
        return reason
    if not row["sentence"].partition("_")[2].strip():
        return "'sentence' has no gap '_' with text after it"
    return None if row["answer"] in ("1", "2") else f"'answer' is {row['answer']!r}, and '1' or '2' is wanted"


def _wrong_xnli(row: Row) -> str | None:
    reason = _texts("premise", "hypothesis")(row)
    return reason or (
        None if _number_below(row["label"], 3) else f"'label' is {row['label']!r}, and 0, 1 or 2 is wanted"
    )


def _wrong_mmlu(row: Row) -> str | None:
    choices = row["choices_ru"]
    if reason := _texts("question_ru")(row):
        return reason
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        return f"'choices_ru' is {choices!r}, and a list of 4 texts is wanted"
    return None if _number_below(row["answer"], 4) else f"'answer' is {row['answer']!r}, and 0, 1, 2 or 3 is wanted"


def _number_below(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


SCHEMAS = {
    "ru_mmlu": Schema(("question_ru", "choices_ru", "answer"), _wrong_mmlu, ("test",), ("dev",)),
    "xwinograd_ru": Schema(("sentence", "option1", "option2", "answer"), _wrong_xwinograd),
    "xnli_ru": Schema(("premise", "hypothesis", "label"), _wrong_xnli, ("validation", "val", "dev"), ("train",)),
    "translate": Schema(("ru", "en"), _texts("ru", "en")),
    "perplexity_ru": Schema(("text",), _texts("text")),
    "perplexity_en": Schema(("text",), _texts("text")),
}
EMBEDDED = ("translate", "perplexity_ru", "perplexity_en")  # with texts of their own in tasks/demo_data


class BenchmarkData:
    """The rows of one of SCHEMAS, read when they are first asked for.

    Args:
        name: of SCHEMAS.
        data_dir: the folder with NAME.jsonl (the scored split), NAME_SPLIT.jsonl, or a folder NAME or
            DATASET[/CONFIG] of files whose names or folders say the split; also .json, .parquet, and text for
            perplexity. None: the hub.
    """

    def __init__(self, name: str, data_dir: str | os.PathLike[str] | None):
        self.name, self.schema, self.data_dir = name, SCHEMAS[name], Path(data_dir) if data_dir else None
        self._published = SETS.get(name)

    @property
    def source(self) -> str:
        """Where the rows come from, in words."""
        return str(self.data_dir) if self.data_dir else f"hub: {self._hub_name}"

    @property
    def _hub_name(self) -> str:
        assert self._published
        return "/".join(filter(None, (self._published.dataset, self._published.config)))

    def exists(self) -> bool:
        """Whether the data folder has a file of this set."""
        return bool(self._files())

    def dataset(self, num_fewshot: int, subject: str | None = None) -> DatasetDict:
        """The splits that lm-eval's task reads, each row with the schema's fields alone.

        Args:
            num_fewshot: examples in a prompt; at 0 their split is empty and no file is needed for it.
            subject: of ru_mmlu.

        Raises:
            UserError: there are no rows, too few for the prompts, or a malformed one; says which and where from.
        """
        schema, splits = self.schema, {}
        splits[schema.evaluated[0]] = self._read(schema.evaluated, subject, at_least=1)
        if schema.fewshot:
            shots = self._read(schema.fewshot, subject, num_fewshot) if num_fewshot else []
            splits[schema.fewshot[0]] = shots
        elif num_fewshot >= len(splits[schema.evaluated[0]]):
            raise UserError(f"{self.name} has too few items to take {num_fewshot} examples for a prompt from them")
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})

    def _read(self, split: tuple[str, ...], subject: str | None, at_least: int) -> list[Row]:
        found = self._local(split, subject) if self.data_dir else self._hub(split[0], subject)
        rows = [self._checked(where, row) for where, row in found]
        if len(rows) >= max(at_least, 1):
            return rows
        of = f"{self.name}, split {split[0]}" + (f", subject {subject}" if subject else "")
        if rows:
            raise UserError(
                f"{of}: {len(rows)} rows, and {at_least} examples stand in a prompt: --num_fewshot {len(rows)}"
            )
        raise UserError(f"no rows of {of} in {self.source}: {self._advice(split)}")

    def _advice(self, split: tuple[str, ...]) -> str:
        """How to come by a split's rows."""
        file = f"{self.name}.jsonl" if split == self.schema.evaluated else f"{self.name}_{split[0]}.jsonl"
        fields = ", ".join(self.schema.fields)
        origin = ""
        if self._published:
            origin = f", exported from {self._hub_name} on the hub, split {split[0]}"
            subject = " and subject" if self.name == "ru_mmlu" else ""
            fields += subject
            origin += f", or that dataset's own files into {self._folders()[1]}"
        fewer = ", or ask for --num_fewshot 0" if split == self.schema.fewshot else ""
        return f"put {file} there, with the fields {fields}{origin}{fewer}"

    def _checked(self, where: str, row: Row) -> Row:
        if missing := [field for field in self.schema.fields if row.get(field) is None]:
            raise UserError(f"{where}: {self.name} needs the field {missing[0]!r}; {nearest(missing[0], row)}")
        if reason := self.schema.wrong(row):
            raise UserError(f"{where}: no row of {self.name}: {reason}")
        return {field: row[field] for field in self.schema.fields}

    # ---- local files -------------------------------------------------------------------------------------------------

    def _folders(self) -> list[Path]:
        assert self.data_dir
        folders = [self.data_dir / self.name]
        if self._published:
            folders.append(self.data_dir / self._published.dataset / (self._published.config or ""))
        return folders

    def _files(self) -> list[tuple[Path, str]]:
        """(file, what of its path may say split and subject); the data folder's own files before those of folders."""
        assert self.data_dir
        if not self.data_dir.is_dir():
            raise UserError(f"--data_dir {self.data_dir}: no such folder")
        bare = re.compile(re.escape(self.name) + r"([-_.].*)?")
        # xnli_ru.jsonl, xnli_ru_train.jsonl.gz; "perplexity_ru" is no split of "perplexity"
        own = [path for path in sorted(self.data_dir.iterdir()) if path.is_file() and bare.fullmatch(_stem(path.name))]
        if own := [path for path in own if _has_rows(path.name)]:
            return [(path, _stem(path.name)[len(self.name) :]) for path in own]
        for folder in filter(Path.is_dir, self._folders()):
            files = map(Path, source_files(str(folder)))
            return [(path, str(path.relative_to(folder).with_name(_stem(path.name)))) for path in files]
        return []

    @functools.cache  # noqa: B019 - one object per set, for the length of a command
    def _rows(self, split: tuple[str, ...]) -> list[tuple[str, str, Row]]:
        """(where, its file's label, row) of every file of a split; a file that names none is of the scored one."""
        named = {*split, None} if split == self.schema.evaluated else {*split}
        files = [(path, label) for path, label in self._files() if split_of(label) in named]
        return [(where, label, row) for path, label in files for where, row in read_rows(str(path))]

    def _local(self, split: tuple[str, ...], subject: str | None) -> Iterable[tuple[str, Row]]:
        for where, label, row in self._rows(split):
            if subject is None or subject == row.get("subject", _subject(label, subject)):
                yield where, row

    # ---- the hub -----------------------------------------------------------------------------------------------------

    def _hub(self, split: str, subject: str | None) -> Iterable[tuple[str, Row]]:
        published = self._published
        assert published
        config = subject or published.config
        try:
            rows = load_dataset(published.dataset, config, split=split, revision=published.revision)
        except Exception as error:  # the hub's and the network's, of many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{published.dataset} cannot be read from the hub ({reason}): log in, mend the network, or give"
                f" --data_dir with {self.name}.jsonl, whose fields are {', '.join(self.schema.fields)}"
            ) from error
        return ((f"{published.dataset}/{config}/{split}[{number}]", dict(row)) for number, row in enumerate(rows))


def _stem(name: str) -> str:
    return split_suffix(name)[0]


def _has_rows(name: str) -> bool:
    return _stem(name) != name


def _subject(label: str, subject: str) -> str | None:
    """`subject` where a file's folder or name is of it: anatomy/…, anatomy_test, anatomy-dev."""
    return subject if any(SPLIT.sub("", part).strip("-_.") == subject for part in label.split("/")) else None
