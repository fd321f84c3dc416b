"""Instructions out of raw rows: wordings in Russian, zero-shot and few-shot, with options and without, as in FLAN.

A row of a quiz, {question, options, answer}, becomes an example of up to four tasks, named as FLAN 2022 names its
template types (Longpre et al. 2023):

    NAME_zs_opt, NAME_zs_noopt   the question alone; the options are listed, or are not
    NAME_fs_opt, NAME_fs_noopt   other questions with their answers stand before it

    add_tasks(
        "my_quiz",
        settings.source("me/quiz", ["question", "options", "answer"], held_out("question", 0.01)),
        QUESTION,
    )

Wording, style of the options and exemplars are drawn by a hash of the row, so they are the same in every run.
Exemplars come from the split `train` alone, also for `validation`, and never ask what the example itself asks.
"""

import heapq
import itertools
import json
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import seqio
import tensorflow as tf

from tasks import settings
from tasks.preprocessors import to_instructions
from vikhr_t5.data.drops import drop
from vikhr_t5.data.hashing import text_hash
from vikhr_t5.data.sources import PieceSource
from vikhr_t5.errors import UserError, nearest

POOL = 1000  # rows that exemplars are drawn from: those of the least hash
SEARCHED = 20_000  # among the first rows of the split
BLOCK = "options"  # in braces, on a line of its own: where the options are listed
_LINE = f"{{{BLOCK}}}"


class Template(NamedTuple):
    """A wording: the row's fields stand in braces, as in str.format, and `{options}` on a line of its own for the list
    of options. That line is left out where none are shown."""

    inputs: str
    targets: str = "{answer}"


QUESTION = (
    Template("{question}\n{options}"),
    Template("Вопрос: {question}\n{options}\nОтвет:"),
    Template("Ответь на вопрос.\n\n{question}\n{options}"),
    Template("{question}\n{options}\nКакой ответ верен?"),
    Template("Прочитай вопрос и дай ответ.\n\nВопрос: {question}\n{options}\nОтвет:"),
    Template("Как ты ответишь на такой вопрос: {question}\n{options}"),
)
PASSAGE = (
    Template("{passage}\n\n{question}\n{options}"),
    Template("Текст: {passage}\n\nВопрос: {question}\n{options}\nОтвет:"),
    Template("Прочитай текст и ответь на вопрос.\n\n{passage}\n\n{question}\n{options}"),
    Template("{passage}\n\nЧто сказано в тексте: {question}\n{options}"),
    Template("Ответь на вопрос по тексту.\n\nВопрос: {question}\n{options}\nТекст: {passage}\nОтвет:"),
)
INFERENCE = (
    Template("{premise}\n\nСледует ли из этого, что {hypothesis}\n{options}"),
    Template("Посылка: {premise}\nГипотеза: {hypothesis}\nКак они связаны?\n{options}\nОтвет:"),
    Template("Дано: {premise}\nВерно ли утверждение «{hypothesis}»?\n{options}"),
    Template(
        "Прочитай два предложения и скажи, следует ли второе из первого.\n1. {premise}\n2. {hypothesis}\n{options}"
    ),
)

_STYLES = (  # the heading and how the options begin; the answer is an option's text in all of them, as in FLAN
    ("Варианты:", ("-",) * 26),
    ("Варианты ответа:", tuple(f"{number})" for number in range(1, 27))),
    ("Выбери из списка:", tuple(f"({letter})" for letter in "абвгдежзиклмнопрстуфхцчшщэ")),
    ("ВАРИАНТЫ:", tuple(f"{letter}." for letter in string.ascii_uppercase)),
)


def add_tasks(
    name: str,
    source: PieceSource,
    templates: Sequence[Template],
    options: str = "options",
    answer: str = "answer",
    numbered: bool = False,
    task_name: str | None = None,
    max_shots: int = 5,
    max_inputs: int = 1024,
) -> None:
    """Register the tasks of a set of raw rows, and the mixture NAME of them at equal rates, as in FLAN.

    Args:
        name: of the mixture; the tasks are NAME_zs_opt and so on. Without a field of options there are but two.
        source: of the rows, with the splits `train` and `validation`.
        templates: wordings.
        options: the field with the list of options, in JSON or as a column of lists.
        answer: the field with the answer.
        numbered: whether that is the number of an option, from 0, and not its text.
        task_name: the field that names an example's source in the metrics.
        max_shots: the most exemplars of a few-shot example; their number is drawn from 1 to that.
        max_inputs: tokens of the inputs of a few-shot example, with EOS: exemplars that find no room are left out, and
            with them all the example.

    Raises:
        UserError: a template asks for a field that the source does not give, or does not list options that there are.
    """
    _check(name, source, templates, options)
    listed = ("opt", "noopt") if options in source.fields else ("noopt",)
    tasks = [f"{name}_{shots}_{kind}" for shots, kind in itertools.product(("zs", "fs"), listed)]
    for task in tasks:
        shots = max_shots if "_fs_" in task.removeprefix(name) else 0
        seqio.TaskRegistry.add(
            task,
            source=source,
            preprocessors=[
                Ask(
                    task,
                    source,
                    templates,
                    options,
                    answer,
                    numbered,
                    task.endswith("_opt"),
                    shots,
                    max_inputs,
                    task_name,
                ),
                seqio.preprocessors.tokenize,
                seqio.CacheDatasetPlaceholder(),
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=settings.output_features(),
        )
    seqio.MixtureRegistry.add(name, tasks, default_rate=1.0)


def _check(name: str, source: PieceSource, templates: Sequence[Template], options: str) -> None:
    known = {*source.fields, BLOCK}
    for template in templates:
        for field in _fields(template.inputs + template.targets):
            if field not in known:
                raise UserError(f"{name}: the template {template.inputs!r} asks for {field!r}; {nearest(field, known)}")
        if options in source.fields and _LINE not in template.inputs.split("\n"):
            raise UserError(f"{name}: the template {template.inputs!r} has no line {_LINE} for the field {options!r}")


def _fields(text: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]


class Ask:
    """A seqio preprocessor: the rows of a set -> {inputs, targets} of one template type. See `add_tasks`.

    Args:
        task: its name; what is drawn for a row depends on that and on the row.
        listed: whether options are shown.
        max_shots: 0 for a question alone.
    """

    def __init__(
        self,
        task: str,
        source: PieceSource,
        templates: Sequence[Template],
        options: str,
        answer: str,
        numbered: bool,
        listed: bool,
        max_shots: int,
        max_inputs: int,
        task_name: str | None,
    ):
        self.task, self.source, self.templates, self.listed = task, source, tuple(templates), listed
        self.options, self.answer, self.numbered, self.task_name = options, answer, numbered, task_name
        self.max_shots, self.max_inputs = max_shots, max_inputs
        self._asks = {field for template in templates for field in _fields(template.inputs)} - {BLOCK}

    def __call__(self, dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]) -> tf.data.Dataset:
        """Called by seqio. UserError, as the rows are read, where options are no list, or an answer is none of them."""
        vocabulary = output_features["inputs"].vocabulary
        exemplars = self.exemplars() if self.max_shots else []

        def examples(*values: str) -> Iterator[tuple[str, str]]:
            row = self._row(values)
            if self.listed and not row.options:
                drop("no_options")
            elif (example := self._example(row, exemplars, lambda text: len(vocabulary.encode(text)))) is None:
                drop("no_room_for_exemplars")
            else:
                yield example

        return to_instructions(dataset, examples, self.source.fields, self.task_name)

    def exemplars(self) -> list["_Row"]:
        """Rows of the training split; which ones, depends on the data alone."""
        skipped = self.source.skipped_lines
        examples = itertools.islice(self.source.examples("train"), SEARCHED)
        rows = [tuple(example[field].decode() for field in self.source.fields) for example in examples]
        self.source.skipped_lines = skipped  # such lines are counted where the rows are trained on
        chosen = [self._row(row) for row in heapq.nsmallest(POOL, rows, key=lambda row: text_hash(repr(row).encode()))]
        return [row for row in chosen if row.options or not self.listed]

    def _row(self, values: Sequence[str]) -> "_Row":
        fields = dict(zip(self.source.fields, values, strict=True))
        options = _listed(fields[self.options]) if self.options in fields else []
        fields[self.answer] = _answer(fields[self.answer], options, self.numbered)
        asked = tuple(fields[field] for field in sorted(self._asks))
        return _Row(fields, options, asked)

    def _example(
        self, row: "_Row", exemplars: Sequence["_Row"], length: Callable[[str], int]
    ) -> tuple[str, str] | None:
        """(inputs, targets); None where not one exemplar finds room."""
        chance = random.Random(repr((self.task, row.fields)))  # a string seeds by its SHA-512
        template, style = chance.choice(self.templates), chance.choice(_STYLES)
        inputs, targets = self._texts(row, template, style)
        if not self.max_shots:
            return inputs, targets
        shots = chance.randint(1, self.max_shots)
        others = [
            other for other in chance.sample(exemplars, min(shots + 1, len(exemplars))) if other.asked != row.asked
        ]
        shown = [inputs]
        for other in others[:shots]:
            shown.insert(0, _answered(*self._texts(other, template, style)))
            if length("\n\n".join(shown)) >= self.max_inputs:
                del shown[0]
                break
        return ("\n\n".join(shown), targets) if len(shown) > 1 else None

    def _texts(self, row: "_Row", template: Template, style: tuple[str, Sequence[str]]) -> tuple[str, str]:
        lines, block = template.inputs.split("\n"), ""
        if self.listed:
            heading, marks = style
            marks = marks if len(row.options) <= len(marks) else ["-"] * len(row.options)
            block = "\n".join([heading, *(f"{mark} {text}" for mark, text in zip(marks, row.options, strict=False))])
        else:
            lines = [line for line in lines if line != _LINE]
        return "\n".join(lines).format(**{**row.fields, BLOCK: block}), template.targets.format(**row.fields)


class _Row(NamedTuple):
    """A row whose answer is a text. `asked`: the fields that the templates ask with."""

    fields: dict[str, str]
    options: list[str]
    asked: tuple[str, ...]


def _listed(options: str) -> list[str]:
    try:
        found = json.loads(options) if options else []
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise UserError(f"options are a list; this is none: {options[:80]!r}")
    return [str(option) for option in found]


def _answer(answer: str, options: Sequence[str], numbered: bool) -> str:
    if numbered:
        if answer.isdigit() and int(answer) < len(options):
            return options[int(answer)]
        raise UserError(f"the answer {answer[:80]!r} is not the number of an option, from 0: {options}")
    if answer in options or not options:
        return answer
    raise UserError(f"the answer {answer[:80]!r} is none of the options {options}; numbered=True for numbers of them")


def _answered(inputs: str, targets: str) -> str:
    return f"{inputs} {targets}" if inputs.endswith(":") else f"{inputs}\n{targets}"
