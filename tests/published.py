"""The public sets as they are published: columns and types of their dataset cards, rows made here, nothing downloaded.

Columns were taken from the cards, and from public programs that read the sets. Of darulm only `text` is known that way;
its `meta` is that of rulm, which it is made of.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from vikhr_t5.data.hashing import text_hash

PAGES = (Path(__file__).parents[1] / "tasks/demo_data/ru.txt").read_text(encoding="utf-8").split("\n\n")
TEMPLATE_TYPES = ("zs_opt", "zs_noopt", "fs_opt", "fs_noopt")
Rows = list[dict[str, Any]]


class Published(NamedTuple):
    """folder: NAME[/CONFIG] on the hub; schema: of its columns; row: number and text -> a row."""

    folder: str
    schema: pa.Schema
    row: Callable[[int, str], dict[str, Any]]

    def table(self, texts: Sequence[str]) -> pa.Table:
        return pa.Table.from_pylist([self.row(number, text) for number, text in enumerate(texts)], self.schema)


def _schema(**types: pa.DataType | str) -> pa.Schema:
    return pa.schema([(name, getattr(pa, kind)() if isinstance(kind, str) else kind) for name, kind in types.items()])


def _struct(**types: str) -> pa.DataType:
    return pa.struct(_schema(**types))


# ---- corpora ---------------------------------------------------------------------------------------------------------

_STRINGS = pa.list_(pa.string())
_COUNTS = (
    "commentsCount",
    "favoritesCount",
    "readingCount",
    "score",
    "votesCount",
    "votesCountPlus",
    "votesCountMinus",
)
_SIGNED = {"score", "votesCount", "votesCountPlus", "votesCountMinus"}
HABR = Published(
    "IlyaGusev/habr",
    _schema(
        id="uint32",
        language="string",
        url="string",
        title="string",
        text_markdown="string",
        text_html="string",
        author="string",
        original_author="string",
        original_url="string",
        lead_html="string",
        lead_markdown="string",
        type="string",
        time_published="uint64",
        statistics=_struct(**{name: "int32" if name in _SIGNED else "uint32" for name in _COUNTS}),
        labels=_STRINGS,
        hubs=_STRINGS,
        flows=_STRINGS,
        tags=_STRINGS,
        reading_time="uint32",
        format="string",
        complexity="string",
        comments=pa.struct(
            [
                ("id", pa.list_(pa.uint64())),
                ("parent_id", pa.list_(pa.uint64())),
                ("level", pa.list_(pa.uint32())),
                ("time_published", pa.list_(pa.uint64())),
                ("score", pa.list_(pa.int32())),
                ("votes", pa.list_(pa.uint32())),
                ("message_html", _STRINGS),
                ("message_markdown", _STRINGS),
                ("author", _STRINGS),
                ("children", pa.list_(pa.list_(pa.uint64()))),
            ]
        ),
    ),
    lambda number, text: {
        "id": 12_730 + number,
        "language": "ru",
        "url": f"https://habr.com/ru/post/{12_730 + number}/",
        "title": "Хочешь в университет — сделай презентацию",
        "text_markdown": f"# Раздел\n\n{text}\n\nИ **это** [тоже](https://a.ru).",
        "text_html": f"<h1>Раздел</h1><p>{text}</p>",
        "author": "ivan",
        "original_author": None,
        "original_url": None,
        "lead_html": "<p>Начало</p>",
        "lead_markdown": "Начало",
        "type": "article",
        "time_published": 1_185_962_380 + number,
        "statistics": {**dict.fromkeys(_COUNTS, 5), "score": 9 + number % 2},
        "labels": [],
        "hubs": ["itcompanies"],
        "flows": ["popsci"],
        "tags": ["google", "университет"],
        "reading_time": 1,
        "format": None,
        "complexity": None,
        "comments": {
            "id": [11_653_537, 11_653_541],
            "parent_id": [None, 11_653_537],
            "level": [0, 1],
            "time_published": [1_185_963_192, 1_185_967_886],
            "score": [-1, 0],
            "votes": [1, 0],
            "message_html": ["<p>Да</p>", "<p>Нет</p>"],
            "message_markdown": ["Да", "Нет"],
            "author": ["petr", "ivan"],
            "children": [[11_653_541], []],
        },
    },
)
_WITH_META = _schema(text="string", meta=_struct(source="string", url="string"))


def _with_meta(number: int, text: str) -> dict[str, Any]:
    return {"text": text, "meta": {"source": "lenta", "url": f"https://lenta.ru/{number}"}}


CORPORA = {
    "habr_ul2": HABR,
    "ru_wikipedia_ul2": Published(
        "wikimedia/wikipedia/20231101.ru",
        _schema(id="string", url="string", title="string", text="string"),
        lambda number, text: {
            "id": str(number),
            "url": "https://ru.wikipedia.org/wiki/Имя",
            "title": "Имя",
            "text": text,
        },
    ),
    "rulm_ul2": Published("IlyaGusev/rulm", _WITH_META, _with_meta),
    "darulm_ul2": Published("dichspace/darulm", _WITH_META, _with_meta),
    "ru_news_ul2": Published(
        "IlyaGusev/ru_news",
        _schema(url="string", text="string", title="string", source="string", timestamp="uint64"),
        lambda number, text: {
            "url": f"https://lenta.ru/{number}",
            "text": text,
            "title": "Новость",
            "source": "lenta",
            "timestamp": 1_185_962_380 + number,
        },
    ),
}


# ---- FLAN ------------------------------------------------------------------------------------------------------------

_PAIR = _schema(inputs="string", target="string")


def _answer(text: str) -> str:
    return f"Ответ: {len(text)}."


def _pair(number: int, text: str) -> dict[str, Any]:
    return {"inputs": text, "target": _answer(text)}


def _aya(kind: str) -> Published:
    return Published(
        f"CohereForAI/aya_collection/translated_flan_{kind}",
        _schema(
            id="int64",
            inputs="string",
            targets="string",
            dataset_name="string",
            sub_dataset_name="string",
            task_type="string",
            template_id="int64",
            language="string",
            script="string",
            split="string",
        ),
        lambda number, text: {
            "id": number,
            "inputs": text,
            "targets": _answer(text),
            "dataset_name": f"Flan-{kind}-submix (T)",
            "sub_dataset_name": "-" if number % 3 else "esnli",
            "task_type": "question-answering",
            "template_id": 1,
            "language": "ukr" if number % 2 else "rus",  # the configs have all languages
            "script": "Cyrl",
            "split": "train",
        },
    )


FLAN = {
    "flan_translated_300k": Published("Vikhrmodels/Flan_translated_300k", _PAIR, _pair),
    "flan_alexwortega": Published("AlexWortega/flan", _PAIR, _pair),
    "flan2021_submix_ru": Published(
        "d0rj/flan2021_submix_original-ru",
        _schema(inputs="string", targets="string", task_source="string", task_name="string", template_type="string"),
        lambda number, text: {
            "inputs": text,
            "targets": _answer(text),
            "task_source": "Flan2021",
            "task_name": ("wmt16_translate/tr-en:1.0.0", "glue/mnli:2.0.0", "ag_news_subset:1.0.0")[number // 4 % 3],
            "template_type": TEMPLATE_TYPES[number % 4],
        },
    ),
    **{f"flan_aya_{kind}": _aya(kind) for kind in ("cot", "qa", "coqa", "gem_wiki", "lambada")},
}


# ---- Saiga -----------------------------------------------------------------------------------------------------------

# `datasets` stores a sequence of records as a record of sequences.
_MESSAGES = pa.struct([("role", _STRINGS), ("content", _STRINGS)])


def chat(text: str) -> list[dict[str, str]]:
    turns = [text, "Два ответа.", "А если подробнее?", f"Подробнее: {text[:20]}"]
    return [{"role": role, "content": turn} for role, turn in zip(("user", "bot") * 2, turns, strict=True)]


def _messages(text: str) -> dict[str, list[str]]:
    return {key: [turn[key] for turn in chat(text)] for key in ("role", "content")}


SAIGA = {
    "saiga_turbo": Published(
        "IlyaGusev/ru_turbo_saiga",
        _schema(messages=_MESSAGES, seed="string", source="string", model_name="string"),
        lambda number, text: {
            "messages": _messages(text),
            "seed": "арифметика",
            "source": "mail",
            "model_name": "gpt-3.5-turbo",
        },
    ),
    "saiga_sharegpt": Published(
        "IlyaGusev/ru_sharegpt_cleaned", _schema(messages=_MESSAGES), lambda number, text: {"messages": _messages(text)}
    ),
    "saiga_oasst1": Published(
        "IlyaGusev/oasst1_ru_main_branch",
        _schema(messages=_MESSAGES, id="string"),
        lambda number, text: {"messages": _messages(text), "id": f"6ab24d72-{number:04}"},
    ),
    "saiga_evol_instruct": Published(
        "IlyaGusev/ru_turbo_alpaca_evol_instruct",
        _schema(instruction="string", output="string", iteration="uint32"),
        lambda number, text: {"instruction": text, "output": _answer(text), "iteration": number % 4},
    ),
    "saiga_gpt4": Published(
        "lksy/ru_instruct_gpt4",
        _schema(instruction="string", input="string", output="string", full_output="string"),
        lambda number, text: {
            "instruction": text,
            "input": "" if number % 2 else "целые",
            "output": "коротко",
            "full_output": _answer(text),
        },
    ),
}
SETS = CORPORA | FLAN | SAIGA


# ---- evaluation sets -------------------------------------------------------------------------------------------------

XWINOGRAD = Published(
    "Muennighoff/xwinograd/ru",
    _schema(sentence="string", option1="string", option2="string", answer="string"),
    lambda number, text: {"sentence": text, "option1": "кубок", "option2": "чемодан", "answer": str(1 + number % 2)},
)
XNLI = Published(
    "facebook/xnli/ru",
    _schema(premise="string", hypothesis="string", label="int64"),
    lambda number, text: {"premise": text, "hypothesis": "Это так.", "label": number % 3},
)
MMLU = Published(
    "NLPCoreTeam/mmlu_ru",
    _schema(
        subject="string",
        question_en="string",
        choices_en=_STRINGS,
        question_ru="string",
        choices_ru=_STRINGS,
        answer="int64",
    ),
    lambda number, text: {
        "subject": "anatomy",
        "question_en": "What?",
        "choices_en": ["a", "b", "c", "d"],
        "question_ru": text,
        "choices_ru": ["один", "два", "три", "четыре"],
        "answer": number % 4,
    },
)


# ---- texts and files -------------------------------------------------------------------------------------------------


def texts(
    make: Callable[[int], str], count: int, share: float, held_out: int = 2, hashed: Callable[[str], str] = str
) -> list[str]:
    """`count` of the texts that `make` gives for 0, 1, …: the last `held_out` of them fall into `validation`, the
    others do not.

    Args:
        share: of the texts that are held out.
        hashed: what of a text decides.
    """

    def found(validation: bool) -> Iterator[str]:
        every = map(make, itertools.count())
        return (text for text in every if (text_hash(hashed(text).encode()) < share) == validation)

    return [*itertools.islice(found(False), count - held_out), *itertools.islice(found(True), held_out)]


def write(folder: Path, table: pa.Table, form: str) -> None:
    """A set in one of the forms that it may have on disk.

    Args:
        form: "jsonl", "jsonl.zst", "parquet", "saved" (`save_to_disk`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if form == "parquet":
        pq.write_table(table, folder / "train-00000-of-00001.parquet")
    elif form == "saved":
        datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(folder)
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()).encode()
        data = zstandard.ZstdCompressor().compress(lines) if form.endswith(".zst") else lines
        (folder / f"rows.{form}").write_bytes(data)


def write_repository(root: Path, folder: str, table: pa.Table) -> None:
    """A set as a repository of the hub: Parquet and a card that names its configs. `load_dataset`, called in `root`,
    reads it by the set's name."""
    owner, name, *config = folder.split("/")
    place = root / owner / name
    write(place.joinpath(*config), table, "parquet")
    if config:
        card = [{"config_name": config[0], "data_files": [{"split": "train", "path": f"{config[0]}/train-*"}]}]
        (place / "README.md").write_text(f"---\nconfigs: {json.dumps(card)}\n---\n")
