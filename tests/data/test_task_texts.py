"""The texts of tasks before tokenization, read from a process that has seqio, and a vocabulary trained on them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from vikhr_t5 import cli
from vikhr_t5.data import seqio_process, task_texts
from vikhr_t5.data.task_texts import TaskExample, read_task
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError

MODULE = """
import functools
import seqio
import tensorflow as tf
from tasks import settings
from tasks.preprocessors import Denoise
from vikhr_t5.data.sources import JsonLinesSource

print("a task may print")
rekey = functools.partial(seqio.preprocessors.rekey, key_map={"inputs": "q", "targets": "a", "origin": "from"})
upper = seqio.map_over_dataset(lambda x: {**x, "targets": tf.strings.upper(x["targets"], encoding="utf-8"), "n": 1})
for name, file in (("answers", "a.jsonl"), ("cut", "cut.jsonl")):
    seqio.TaskRegistry.add(
        name,
        source=JsonLinesSource({"train": file}, ("q", "a", "from")),
        preprocessors=[rekey, upper, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(),
                       seqio.preprocessors.append_eos],
        output_features=settings.output_features(),
    )
seqio.TaskRegistry.add(
    "words",
    source=JsonLinesSource({"train": "a.jsonl"}, ("a",)),
    preprocessors=[functools.partial(seqio.preprocessors.rekey, key_map={"targets": "a"}),
                   seqio.CacheDatasetPlaceholder(), functools.partial(seqio.preprocessors.tokenize), Denoise("ul2")],
    output_features=settings.output_features(),
)
seqio.MixtureRegistry.add("both", [("answers", 1.0), ("words", 9.0)])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_texts.py").write_text(MODULE)
    rows = [{"q": f"вопрос {i}", "a": f"ответ\n{i}", "from": "книга"} for i in range(600)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (tmp_path / "cut.jsonl").write_text('{"q": "в", "a": "о", "fro')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIKHR_T5_VOCABULARY", raising=False)
    return tmp_path


def test_a_mixture_in_the_order_of_its_sources(folder: Path) -> None:
    examples = list(read_task("both", "own_texts"))
    assert [one.task for one in examples] == ["answers"] * 600 + ["words"] * 600
    assert examples[599].texts == {"inputs": "вопрос 599", "targets": "ОТВЕТ\n599"}
    assert examples[599].others == {"origin": "книга"}
    assert examples[600].texts == {"targets": "ответ\n0"}


def test_a_vocabulary_of_a_task(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "vocab",
        "train",
        "--mixture",
        "answers",
        "--module",
        "own_texts",
        "--size",
        "40",
        "--output",
        "v.model",
    ]
    options = ["--no-byte_fallback", "--mode_tokens=[NLU]", "--model_type=bpe", "--character_coverage=1"]
    assert cli.main([*arguments, *options]) == 0
    assert "40 pieces; with 300 sentinels 384 rows" in capfd.readouterr().out
    vocabulary = Vocabulary("v.model")
    assert vocabulary.mode_tokens == ("[NLU]",)
    assert vocabulary.decode(vocabulary.encode("вопрос ОТВЕТ 17")) == "вопрос ОТВЕТ 17"
    assert vocabulary.unk_id in vocabulary.encode("книга")  # no feature of the task, so no "к" to learn


def test_bad_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("VIKHR_T5_VOCABULARY", "bytes")
    for name, split, message in (
        ("anwers", "train", "unknown task or mixture 'anwers' in own_texts; nearest: answers"),
        ("answers", "test", "answers has no split 'test'; it has: train"),
        ("cut", "train", "cut.jsonl, line 1: not a JSON line"),
    ):
        arguments = {"mixture_or_task": name, "module": "own_texts", "split": split}
        monkeypatch.setattr(sys, "argv", ["task_texts", json.dumps(arguments)])
        assert task_texts.main() == 2
        printed = capsys.readouterr().out
        assert message in printed
        assert printed.count("\n") == 1


def test_an_error_in_the_other_process_is_raised_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other_process.py").write_text("print('one')\nprint('two')\nprint('what to do')\nraise SystemExit(2)")
    monkeypatch.syspath_prepend(tmp_path)
    got = []
    with pytest.raises(UserError, match="what to do"):
        for line in seqio_process.lines("other_process", {}):
            got.append(line)
    lines = seqio_process.lines("other_process", {})
    assert (next(lines), got) == ("one\n", ["one\n", "two\n"])
    lines.close()
    (tmp_path / "other_process.py").write_text("print('one')\nraise SystemExit(3)")
    with pytest.raises(RuntimeError, match="exit status 3"):
        list(seqio_process.lines("other_process", {}))


def test_a_translated_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    class Upper:
        settings: ClassVar[dict[str, str]] = {"model": "upper"}

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def fits(self, text: str) -> bool:
            return True

        def translate(self, texts: list[str]) -> list[tuple[str, bool]]:
            return [(text.upper(), True) for text in texts]

    def read(name: str, module: str, split: str) -> Iterator[TaskExample]:  # as the first test has it
        assert (name, module, split) == ("answers", "own_texts", "train")
        for i in range(600):
            yield TaskExample("answers", {"inputs": f"вопрос {i}", "targets": f"ответ\n{i}"}, {"origin": "книга"})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(task_texts, "read_task", read)
    monkeypatch.setattr("vikhr_t5.translation_models.TranslationModel", Upper)
    arguments = ["translate", "--mixture", "answers", "--module", "own_texts", "--model=x", "--output=ru.jsonl"]
    assert cli.main(arguments) == 0
    rows = [json.loads(line) for line in Path("ru.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[7] == {"origin": "книга", "task": "answers", "inputs": "ВОПРОС 7", "targets": "ОТВЕТ\n7"}
    assert len(rows) == 600
