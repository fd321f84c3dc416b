"""What the YAML files of this folder ask of Python: embedded held-out texts, and prompts that a template cannot say.

lm-eval finds these functions by name, `!function formulations.NAME`. The texts are the LibreOffice help of
tasks/demo_data: the pages, and the pairs of paragraphs, that `tasks.demo` holds out of all its training splits.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from vikhr_t5.data.hashing import text_hash

DATA = Path(__file__).resolve().parents[1] / "demo_data"
HELD_OUT = 0.05  # as in tasks.demo, which cannot be imported without TensorFlow
SENTINEL = "<extra_id_0>"
PIECE = 1000  # characters at most: about 250 tokens of a Russian vocabulary, and 1,000 to 2,000 bytes

Row = dict[str, Any]


# ---- embedded texts --------------------------------------------------------------------------------------------------


def held_out_ru(**_: Any) -> DatasetDict:
    """Russian pages that tasks.demo trains on nowhere: {"test": text}."""
    return _test([{"text": page} for page in _pages("ru") if _is_held_out(page)])


def held_out_en(**_: Any) -> DatasetDict:
    """As many English pages, chosen by the same hash. (No English page is in a denoising task of tasks.demo.)"""
    return _test([{"text": page} for page in _pages("en") if _is_held_out(page)])


def parallel(**_: Any) -> DatasetDict:
    """Pairs of paragraphs whose Russian page is held out; one that stands on no page goes by itself."""
    page_of = {paragraph: page for page in _pages("ru") for paragraph in page.split("\n")}
    with open(DATA / "parallel.jsonl", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    return _test([pair for pair in pairs if _is_held_out(page_of.get(pair["ru"], pair["ru"]))])


def _pages(language: str) -> list[str]:
    return (DATA / f"{language}.txt").read_text(encoding="utf-8").strip("\n").split("\n\n")


def _is_held_out(text: str) -> bool:
    return text_hash(text.encode()) < HELD_OUT


def _test(rows: list[Row]) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list(rows)})


# ---- perplexity ------------------------------------------------------------------------------------------------------


def pieces(documents: Dataset) -> Dataset:
    """Documents -> {text, first_half, second_half} of at most PIECE characters, cut between words.

    The pieces of a document are about equally long. A piece of fewer than two words is left out.
    """
    rows = []
    for document in documents["text"]:
        words = document.split(" ")
        count = -(-len(document) // PIECE)
        for part in _parts(words, count):
            if len(part) >= 2:
                first, second = _parts(part, 2)
                rows.append(
                    {"text": " ".join(part), "first_half": " ".join(first), "second_half": " " + " ".join(second)}
                )
    return Dataset.from_list(rows)


def _parts(words: list[str], count: int) -> list[list[str]]:
    """`count` runs of words with about equally many characters; each has at least one word where there are enough."""
    total = sum(map(len, words)) + len(words)
    found: list[list[str]] = [[]]
    passed = 0
    for number, word in enumerate(words):
        rest = len(words) - number
        full = passed >= total * len(found) / count
        if found[-1] and len(found) < count and (full or rest == count - len(found)):
            found.append([])
        found[-1].append(word)
        passed += len(word) + 1
    return found


def bits_of_second_half(doc: Row, results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """(log-likelihood, bytes) of a piece; lm-eval's aggregation `bits_per_byte` sums both."""
    return {"bits_per_byte": (results[0][0], len(doc["second_half"].encode()))}


# ---- xwinograd_ru_seq2seq --------------------------------------------------------------------------------------------


def sentence_with_sentinel(doc: Row) -> str:
    """The sentence with the sentinel in its gap."""
    return doc["sentence"].replace("_", SENTINEL, 1)


def options_after_sentinel(doc: Row) -> list[str]:
    """What the decoder is scored on."""
    return [f"{SENTINEL} {doc['option1']}", f"{SENTINEL} {doc['option2']}"]


def right_option(doc: Row) -> int:
    """Its index."""
    return ("1", "2").index(doc["answer"])
