"""Whether training examples hold what a model is evaluated on: n-grams of words that both have.

As in GPT-3 (Brown et al. 2020, appendix C): words in lower case and without punctuation, n-grams of 13; an item of an
evaluation set is contaminated where a training example has one of its n-grams. A text of fewer words counts as one
n-gram as long as it has 8; an item without a text of that many cannot be told. `ngram=8, min_share=0.7` is PaLM's rule
(Chowdhery et al. 2022, section 8: at least 70% of an item's 8-grams), but for this: all of them in one example.

    index = Index(read_items("xnli_ru", "data"), ngram=13)
    index.find("…")  ->  [Match(item, share of its n-grams, one of them), …]

`tasks.decontamination` leaves such examples out of training. Nothing here needs seqio; `check` has it run elsewhere.
"""

import dataclasses
import itertools
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vikhr_t5.data.records import read_rows, source_files
from vikhr_t5.data.task_texts import TaskExample, read_task
from vikhr_t5.errors import UserError, nearest
from vikhr_t5.files import check_file, write_text_atomic
from vikhr_t5.progress import Progress, human

NGRAM, SHORTEST = 13, 8  # words; a shorter n-gram is a turn of phrase
EXCERPT = 300  # characters

Row = dict[str, Any]


# ---- evaluation sets -------------------------------------------------------------------------------------------------

SPLIT = re.compile(r"(?:^|[-_./])(train|validation|val|dev|test)(?=[-_./]|$)")  # in names of files and folders


class EvaluationSet(NamedTuple):
    """dataset, config: on the hub (None: all of them); splits: those that are evaluated on; fields: of a row; texts:
    what of a row must not be trained on."""

    dataset: str
    config: str | None
    splits: tuple[str, ...]
    fields: tuple[str, ...]
    texts: Callable[[Row], list[str]]
    revision: str | None = None


def _filled(row: Row) -> list[str]:
    """The sentence with the right option in its gap."""
    return [row["sentence"].replace("_", row[f"option{row['answer']}"])]


SETS = {
    "xwinograd_ru": EvaluationSet(
        "Muennighoff/xwinograd", "ru", ("test",), ("sentence", "option1", "option2", "answer"), _filled
    ),
    "xnli_ru": EvaluationSet(
        "facebook/xnli",
        "ru",
        ("validation", "test"),
        ("premise", "hypothesis"),
        lambda row: [row["premise"], row["hypothesis"]],
    ),
    "ru_mmlu": EvaluationSet(
        "NLPCoreTeam/mmlu_ru",
        None,
        ("test",),
        ("question_ru", "choices_ru"),
        lambda row: [row["question_ru"], *row["choices_ru"]],
        revision="refs/convert/parquet",  # its repository has a loading script
    ),
}


class Item(NamedTuple):
    """One item of an evaluation set: its texts, and where it stands."""

    set_name: str
    where: str
    texts: tuple[str, ...]


def read_items(name: str, data_dir: str | os.PathLike[str] | None = None) -> Iterator[Item]:
    """The items of an evaluation set in its published schema.

    Args:
        name: of `SETS`.
        data_dir: the folder that has it: as NAME.jsonl or NAME.parquet, or as a folder NAME or DATASET[/CONFIG] of such
            files or saved by `datasets`; but for files whose names say train or dev. None: it is read from the hub.

    Raises:
        UserError: an unknown set; it is not there; a row lacks a field, or cannot be read.
    """
    if name not in SETS:
        raise UserError(f"unknown evaluation set {name!r}; {nearest(name, SETS)}")
    published = SETS[name]
    rows = _hub_rows(published) if data_dir is None else _local_rows(name, published, Path(data_dir))
    for where, row in rows:
        if missing := [field for field in published.fields if row.get(field) is None]:
            raise UserError(f"{where}: {name} needs {missing[0]!r}; {nearest(missing[0], row)}")
        try:
            yield Item(name, where, tuple(published.texts(row)))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where} is no row of {name} ({type(error).__name__}: {error})") from None


def split_of(label: str) -> str | None:
    """The split that a file's name or folders say; the last one where there are several."""
    found = SPLIT.findall(label)
    return found[-1] if found else None


def _local_rows(name: str, published: EvaluationSet, data_dir: Path) -> Iterator[tuple[str, Row]]:
    folders = [data_dir / name, data_dir / published.dataset / (published.config or "")]
    files = sorted(str(file) for file in data_dir.glob(f"{name}.*"))
    for folder in (folder for folder in folders if not files and folder.is_dir()):
        if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
            return _saved_rows(folder, published)
        files = source_files(str(folder))
    used = [file for file in files if split_of(os.path.relpath(file, data_dir)) not in ("train", "dev")]
    if not used:
        raise UserError(
            f"no evaluation set {name} in {data_dir}: put {name}.jsonl or {name}.parquet there, or its files into"
            f" {folders[1]}; without a data folder it is read from the hub"
        )
    return read_rows(used)


def _saved_rows(folder: Path, published: EvaluationSet) -> Iterator[tuple[str, Row]]:
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    splits = {"": loaded} if not isinstance(loaded, dict) else {s: loaded[s] for s in published.splits if s in loaded}
    if not splits:
        raise UserError(f"{folder} has none of the splits {', '.join(published.splits)}; it has {', '.join(loaded)}")
    for split, rows in splits.items():
        yield from ((f"{folder}/{split}[{number}]", dict(row)) for number, row in enumerate(rows))


def _hub_rows(published: EvaluationSet) -> Iterator[tuple[str, Row]]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{published.dataset} is on the hub: pip install 'vikhr-t5[hub]'") from None
    name, revision = published.dataset, published.revision
    try:
        configs = [published.config] if published.config else datasets.get_dataset_config_names(name, revision=revision)
        for config, split in itertools.product(configs, published.splits):
            rows = datasets.load_dataset(name, config, split=split, revision=revision)
            yield from ((f"{name}/{config}/{split}[{number}]", dict(row)) for number, row in enumerate(rows))
    except UserError:
        raise
    except Exception as error:  # the hub's and the network's, of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} cannot be read from the hub ({reason}): log in, mend the network, or give a data folder"
        ) from error


# ---- n-grams ---------------------------------------------------------------------------------------------------------

_WORDS = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case; ё is е."""
    return _WORDS.findall(text.lower().replace("ё", "е"))


class Match(NamedTuple):
    """item: its number; share: of its n-grams that a text has; ngram: one of these, as words."""

    item: int
    share: float
    ngram: str


class Index:
    """The n-grams of evaluation items.

    Args:
        items: of one set, or of several.
        ngram: words of an n-gram.
        min_share: of an item's n-grams that a text must have; 0 for a single one.

    Attributes:
        items: those given.
        too_short: numbers of the items without a text of `SHORTEST` words (or `ngram`, if that is less).
    """

    def __init__(self, items: Iterable[Item], ngram: int = NGRAM, min_share: float = 0.0):
        if ngram < 2 or not 0 <= min_share <= 1:
            raise UserError(f"--ngram {ngram} --min_share {min_share}: 2 words or more, and a share from 0 to 1")
        self.items, self.ngram, self.min_share = list(items), ngram, min_share
        self._ids: dict[str, int] = {}
        self._owners: dict[tuple[int, ...], list[int]] = {}
        self._counts = [0] * len(self.items)  # n-grams of each item
        for number, item in enumerate(self.items):
            grams = {gram for text in item.texts for gram in self._grams_of_item(text)}
            self._counts[number] = len(grams)
            for gram in grams:
                self._owners.setdefault(gram, []).append(number)
        self._words = list(self._ids)
        self._lengths = sorted({len(gram) for gram in self._owners})
        self._shortest = min(self._lengths, default=ngram)
        self._heads = {gram[: self._shortest] for gram in self._owners}  # most text stops here
        self.too_short = [number for number, count in enumerate(self._counts) if not count]

    def _grams_of_item(self, text: str) -> Iterator[tuple[int, ...]]:
        found = [self._ids.setdefault(word, len(self._ids)) for word in words(text)]
        length = min(self.ngram, len(found))
        if length >= min(self.ngram, SHORTEST):
            yield from (tuple(found[start : start + length]) for start in range(len(found) - length + 1))

    def find(self, text: str) -> list[Match]:
        """The items that a text contaminates."""
        found: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        run: list[int] = []  # the last words, as long as items have them
        for word in [*words(text), None]:
            number = None if word is None else self._ids.get(word)
            if number is not None:
                run.append(number)
                continue
            for start in range(len(run) - self._shortest + 1):
                if tuple(run[start : start + self._shortest]) not in self._heads:
                    continue
                for length in self._lengths:  # one that runs past the end is shorter, and found before
                    gram = tuple(run[start : start + length])
                    for item in self._owners.get(gram, ()):
                        found[item].add(gram)
            run.clear()
        matches = (
            Match(item, len(grams) / self._counts[item], " ".join(self._words[word] for word in min(grams)))
            for item, grams in found.items()
        )
        return [match for match in matches if match.share >= self.min_share]


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class SetCounts:
    """Of an evaluation set: items, those that cannot be told, and those that are contaminated."""

    items: int = 0
    too_short: int = 0
    contaminated: int = 0

    @property
    def share(self) -> float:
        """Contaminated, of those that can be told."""
        return self.contaminated / max(self.items - self.too_short, 1)


@dataclasses.dataclass
class TaskCounts:
    """Of a task: examples, those that contaminate something, and how many of these each set and each of the task's
    named sets has."""

    examples: int = 0
    contaminated: int = 0
    by_set: Counter[str] = dataclasses.field(default_factory=Counter)
    by_name: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass
class Finding:
    """A contaminated item, and the training example that has most of it. `examples`: how many have something of it."""

    set_name: str
    where: str
    text: str
    share: float
    examples: int
    ngram: str
    task: str
    example: str


@dataclasses.dataclass
class Report:
    """What `check` found; `findings` the worst first."""

    mixture: str
    split: str
    ngram: int
    min_share: float
    sets: dict[str, SetCounts]
    tasks: dict[str, TaskCounts]
    findings: list[Finding]

    @property
    def method(self) -> str:
        share = f"at least {self.min_share:.0%} of its" if self.min_share else "one of its"
        return (
            f"an item is contaminated where one training example has {share} {self.ngram}-grams of words (lower case,"
            " without punctuation; GPT-3, appendix C)"
        )

    def to_json(self) -> str:
        record = {
            "mixture": self.mixture,
            "split": self.split,
            "method": self.method,
            "ngram": self.ngram,
            "min_share": self.min_share,
            "sets": {name: {**vars(counts), "share": counts.share} for name, counts in self.sets.items()},
            "tasks": {name: vars(counts) for name, counts in self.tasks.items()},
            "findings": [vars(finding) for finding in self.findings],
        }
        return json.dumps(record, ensure_ascii=False, indent=1) + "\n"

    def lines(self) -> Iterator[str]:
        """A summary as text."""
        for name, counts in self.sets.items():
            yield (
                f"{name}: {counts.contaminated:,} of {counts.items:,} items contaminated ({counts.share:.1%}),"
                f" {counts.too_short:,} too short to tell"
            )
        for name, task in self.tasks.items():
            yield f"{name}: {task.contaminated:,} of {task.examples:,} examples contaminate something"


def check(
    mixture_or_task: str,
    module: str,
    against: Sequence[str],
    data_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    ngram: int = NGRAM,
    min_share: float = 0.0,
) -> Report:
    """Looks through every training example of a task or mixture, as text before tokenization.

    Args:
        mixture_or_task, module, split: as in `task_texts.read_task`.
        against, data_dir: names and the folder of evaluation sets, as in `read_items`.
        ngram, min_share: as in `Index`.

    Raises:
        UserError: what is not there, or cannot be read.
    """
    items = [item for name in dict.fromkeys(against) for item in read_items(name, data_dir)]
    index = Index(items, ngram, min_share)
    examples = read_task(mixture_or_task, module, split)
    tasks, findings = scan(examples, index)
    sets = {name: SetCounts() for name in against}
    for item in items:
        sets[item.set_name].items += 1
    for number in index.too_short:
        sets[items[number].set_name].too_short += 1
    for finding in findings:
        sets[finding.set_name].contaminated += 1
    return Report(mixture_or_task, split, ngram, min_share, sets, tasks, findings)


def scan(examples: Iterable[TaskExample], index: Index) -> tuple[dict[str, TaskCounts], list[Finding]]:
    """The counts of each task, and what was found, the worst first: by share of the item, then by examples."""
    tasks: dict[str, TaskCounts] = {}
    found: dict[int, Finding] = {}
    number_of_words = 0
    with Progress("decontamination", None, "examples") as bar:
        for example in examples:
            counts = tasks.setdefault(example.task, TaskCounts())
            counts.examples += 1
            text = " ".join(example.texts.values())
            number_of_words += text.count(" ")
            matches = index.find(text)
            if matches:
                counts.contaminated += 1
                counts.by_set.update({index.items[match.item].set_name for match in matches})
                counts.by_name.update([name] if (name := example.others.get("task_name")) else [])
            for match in matches:
                found[match.item] = _worse(found.get(match.item), index.items[match.item], match, example.task, text)
            bar.advance(1, note=f"{human(number_of_words)} words, {len(found)} items found")
    return tasks, sorted(found.values(), key=lambda finding: (-finding.share, -finding.examples))


def _worse(before: Finding | None, item: Item, match: Match, task: str, text: str) -> Finding:
    examples = 1 if before is None else before.examples + 1
    if before is not None and before.share >= match.share:
        return dataclasses.replace(before, examples=examples)
    whole = " / ".join(item.texts)
    return Finding(
        item.set_name,
        item.where,
        whole[:EXCERPT],
        match.share,
        examples,
        match.ngram,
        task,
        _excerpt(text, match.ngram),
    )


def _excerpt(text: str, ngram: str) -> str:
    """The part of a text that has the n-gram."""
    pattern = r"[\W_]+".join(re.escape(word).replace("е", "[её]") for word in ngram.split(" "))
    at = re.search(pattern, text, re.I)
    start = max(0, at.start() - EXCERPT // 4) if at else 0
    return ("…" if start else "") + text[start : start + EXCERPT] + ("…" if start + EXCERPT < len(text) else "")


def check_output(path: str | os.PathLike[str]) -> None:
    """UserError for a report whose name ends neither in .json nor in .html, or is a folder's."""
    check_file(path)
    if Path(path).suffix not in (".json", ".html"):
        raise UserError(f"--output {path}: its name must end in .json or .html")


def write(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report, whole: .json has all of it, .html is a page."""
    from vikhr_t5.data import decontamination_html

    check_output(path)
    if Path(path).suffix == ".json":
        write_text_atomic(path, report.to_json())
    else:
        decontamination_html.write(report, path)
    print(f"written: {path}", file=sys.stderr)
