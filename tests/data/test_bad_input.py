"""Bad input through the command line: one line that says what and where, exit 2; what may be skipped is counted."""

import importlib
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vikhr_t5 import cli
from vikhr_t5.data import seqio_process, sources
from vikhr_t5.data.cache import cache
from vikhr_t5.data.sources import JsonLinesSource, TextSource
from vikhr_t5.data.store import TokenStore, task_directory
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError

ROWS = [{"q": f"вопрос {n}", "a": f"ответ {n}"} for n in range(20)]
HEADER = """
import functools, seqio
from tasks import flan, settings
from vikhr_t5.data.sources import HuggingFaceSource, JsonLinesSource, ParquetSource, TextSource
def add(name, source, key_map={"inputs": "q", "targets": "a"}):
    seqio.TaskRegistry.add(
        name, source=source, output_features=settings.output_features(), preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map=key_map), seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos])
def lines(file, fields=("q", "a"), **more): return JsonLinesSource({"train": file}, fields, **more)
def table(file, *splits): return ParquetSource(dict.fromkeys(splits or ("train",), file), ["q", "a"])
mix = seqio.MixtureRegistry.add
"""
NUMBER = iter(range(10**6))  # seqio keeps what was registered, so every module has names of its own


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


class Command:
    """Writes a module of tasks and runs a command on it; T and M in its text are names of its own."""

    def __init__(self, vocabulary: str, capsys: pytest.CaptureFixture[str]):
        self.vocabulary, self.capsys = vocabulary, capsys
        self.number = next(NUMBER)
        self.module = f"bad_tasks_{self.number}"

    def __call__(self, text: str, name: str, *flags: str, command: str = "cache") -> tuple[int, list[str]]:
        """(exit status, lines of stderr)."""
        Path(f"{self.module}.py").write_text(self.named(HEADER + text), encoding="utf-8")
        importlib.invalidate_caches()
        return self.run(command, f"--mixture={self.named(name)}", f"--module={self.module}", *flags)

    def named(self, text: str) -> str:
        return text.replace("T_", f"t{self.number}_").replace("M_", f"m{self.number}_")

    def run(self, *arguments: str) -> tuple[int, list[str]]:
        self.capsys.readouterr()
        vocabulary = (
            () if any(a.startswith("--vocabulary") for a in arguments) else (f"--vocabulary={self.vocabulary}",)
        )
        status = cli.main([*arguments, *vocabulary, "--cache_dir=cache"])
        progress = ("caching: ", self.named("T_"), self.named("M_"))  # and "NAME is not cached yet: caching it now"
        said = self.capsys.readouterr().err.splitlines()
        return status, [line for line in said if not line.startswith(progress)]

    def refused(self, *arguments: str, **more: str) -> str:
        """The one line that it says, progress aside."""
        status, err = self(*arguments, **more)
        assert (status, len(err)) == (2, 1), err
        assert err[0].startswith("vikhr-t5: ")
        return err[0]

    def manifest(self, task: str) -> dict:
        return json.loads((task_directory("cache", self.named(task), "train") / "manifest.json").read_text())["totals"]


@pytest.fixture
def command(
    tmp_path: Path,
    small_vocabulary: Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("VOCABULARY", "EXTRA_IDS", "MAX_BAD_LINES", "DATA_DIR"):
        monkeypatch.setenv(f"VIKHR_T5_{name}", "")  # what a command sets is undone
        monkeypatch.delenv(f"VIKHR_T5_{name}")
    monkeypatch.setenv("VIKHR_T5_VOCABULARY", small_vocabulary.sentencepiece_model_file)
    monkeypatch.setenv("VIKHR_T5_DATA_DIR", str(tmp_path))
    write_lines(tmp_path / "good.jsonl", ROWS)
    pq.write_table(pa.table({side: [row[side] for row in ROWS] for side in ("q", "a")}), "good.parquet")
    return Command(small_vocabulary.sentencepiece_model_file, capsys)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_field_that_is_not_there(command: Command) -> None:
    said = command.refused(
        'add("T_", lines("good.jsonl", ["question", "a"]), {"inputs": "question", "targets": "a"})', "T_"
    )
    assert said.endswith(
        "good.jsonl, line 1: no 'question' (known: a, q); mend it, or let the source skip some (max_bad_lines)"
    )


def test_a_feature_that_a_preprocessor_asks_for_is_not_there(command: Command) -> None:
    said = command.refused('add("T_", table("good.parquet"), {"inputs": "qq", "targets": "a"})', "T_")
    assert said == command.named("vikhr-t5: task T_: rekey asks for 'qq', which the examples lack (nearest: q)")


def test_a_null_is_named_or_counted(command: Command) -> None:
    write_lines(Path("nulls.jsonl"), [*ROWS[:3], {"q": None, "a": "x"}, *ROWS[3:]])
    text = 'add("T_", lines("nulls.jsonl"))\nadd("T_2", lines("nulls.jsonl", max_bad_lines=1))'
    assert "nulls.jsonl, line 4: 'q' is null" in command.refused(text, "T_")
    status, err = command(text, "T_2")
    assert status == 0
    assert "line 4: 'q' is null: skipped" in err[0]
    totals = command.manifest("T_2")
    assert (totals["skipped_lines"], totals["read"], totals["examples"]) == (1, 20, 20)


def test_bytes_that_are_not_utf8(command: Command) -> None:
    Path("latin.jsonl").write_bytes(b'{"q": "a", "a": "b"}\n{"q": "\xff", "a": "b"}\n')
    said = command.refused('add("T_", lines("latin.jsonl"))', "T_")
    assert "latin.jsonl, line 2: not UTF-8 (byte 0xff at position 7)" in said


def test_a_parquet_file_that_is_cut_short(command: Command) -> None:
    whole = Path("good.parquet").read_bytes()
    Path("cut.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cut.parquet is not a whole Parquet file" in command.refused('add("T_", table("cut.parquet"))', "T_")


def test_an_empty_file_and_no_file(command: Command) -> None:
    Path("empty.jsonl").touch()
    text = 'add("T_", lines("empty.jsonl"))\nadd("T_2", lines("none*.jsonl"))'
    assert "T_/train is empty: its files hold no text (" in command.refused(text, "T_").replace(
        command.named("T_"), "T_"
    )
    assert "no file matches " in command.refused(text, "T_2")


def test_empty_fields_of_an_instruction_are_counted(command: Command) -> None:
    write_lines(Path("me/some/a.jsonl"), [*ROWS, {"q": "", "a": "x"}, {"q": "x", "a": " \t"}])
    write_lines(Path("me/none/a.jsonl"), [{"q": f"вопрос {n}", "a": ""} for n in range(5)])
    text = 'flan.add_task("T_", "me/some", ("q", "a"))\nflan.add_task("T_2", "me/none", ("q", "a"))'
    assert command(text, "T_", "--splits=train")[0] == 0
    totals = command.manifest("T_")
    assert totals["read"] == totals["examples"] + 2
    assert list(totals["dropped"].values()) == [2]
    status, err = command(text, "T_2", "--splits=train")
    assert status == 2
    assert "/train is empty: 0 examples" in err[-1]


# ---- long lines ------------------------------------------------------------------------------------------------------

MIB = 1 << 20


def write_long(path: Path, before: bytes, after: bytes, mebibytes: int = 100) -> None:
    """A line of so many MiB between two that are in order."""
    with open(path, "wb") as file:
        file.write(before + b'{"q": "')
        for _ in range(mebibytes):
            file.write(b"x" * MIB)
        file.write(b'", "a": "b"}\n' + after)


def peak_mib(read: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def test_a_line_of_100_mb_is_named_counted_and_never_in_memory(command: Command) -> None:
    good = json.dumps(ROWS[0]).encode() + b"\n"
    write_long(Path("long.jsonl"), good, good)
    said = command.refused('add("T_", lines("long.jsonl"))', "T_", "--num_workers=1")
    assert "long.jsonl, line 2: a line of more than 16 MiB; mend it, or let the source skip some" in said
    source = JsonLinesSource({"train": "long.jsonl"}, ["q", "a"], max_bad_lines=1)
    found: list[object] = []
    assert peak_mib(lambda: found.extend(source.examples("train"))) < 40
    assert [example["q"].decode() for example in found] == ["вопрос 0"] * 2  # type: ignore[index]
    assert source.skipped_lines == 1


@pytest.mark.parametrize("piece", [64 << 20, 3 << 20, 1000])
def test_however_a_file_with_long_lines_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", piece)
    monkeypatch.setattr(sources, "LONGEST_LINE", 10_000)
    lines = [f"{n} " + "слово " * (n % 5) + "x" * (30_000 if n % 7 == 3 else 0) for n in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(lines), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    expected = [line.strip() for line in lines if len(line) < 10_000]
    for source in (
        TextSource({"train": str(tmp_path / "a.txt")}, max_bad_lines=40),
        JsonLinesSource({"train": str(tmp_path / "a.jsonl")}, ["text"], max_bad_lines=40),
    ):
        assert [example["text"].decode().strip() for example in source.examples("train")] == expected
        assert source.skipped_lines == 40 - len(expected)


def test_a_text_without_blank_lines_is_no_document(tmp_path: Path) -> None:
    with open(tmp_path / "a.txt", "w", encoding="utf-8") as file:
        file.write("Первый.\n\n")
        for _ in range(40 * 32):
            file.write(("строка " * 2300 + "\n") * 2)  # 64 KiB
        file.write("\nПоследний.\n")
    source = TextSource({"train": str(tmp_path / "a.txt")}, max_bad_lines=1)
    found: list[dict[str, bytes]] = []
    assert peak_mib(lambda: found.extend(source.examples("train"))) < 40
    assert [example["text"].decode() for example in found] == ["Первый.", "Последний."]
    with pytest.raises(
        UserError, match=r"line \d+: a document of more than 16 MiB ends here: separate documents by bl"
    ):
        list(TextSource({"train": str(tmp_path / "a.txt")}).examples("train"))


# ---- mixtures --------------------------------------------------------------------------------------------------------

TWO = 'add("T_1", table("good.parquet"))\nadd("T_2", table("good.parquet", "train", "validation"))\n'
RATE = "; give a positive number, or leave it out"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TWO + 'mix("M_", [("T_1", 0.0), ("T_2", 1.0)])', f"mixture M_: the rate of T_1 is 0.0{RATE}"),
        (TWO + 'mix("M_", [("T_1", 1.0), ("T_2", -0.5)])', f"mixture M_: the rate of T_2 is -0.5{RATE}"),
        (TWO + 'mix("M_", [("T_1", float("nan"))])', f"mixture M_: the rate of T_1 is nan{RATE}"),
        (TWO + 'mix("M_", [("T_1", "2")])', f"mixture M_: the rate of T_1 is '2'{RATE}"),
        (TWO + 'mix("M_1", [("T_1", 0)])\nmix("M_", [("M_1", 1), ("T_2", 1)])', f"M_1: the rate of T_1 is 0{RATE}"),
        (TWO + 'mix("M_", [("M_1", 1.0)])', "M_.py, line 15: no task or mixture M_1 is registered before this one; "),
        (TWO + 'mix("M_", [("M_", 1.0)])', "M_.py, line 15: no task or mixture M_ is registered before this one; "),
        (TWO + 'mix("M_", ["T_1"])', "M_.py, line 15: a mixture needs a rate for each task: [("),
        (
            TWO + 'add("T_1", table("good.parquet"))',
            "a task or mixture T_1 is registered already: give this one another",
        ),
        (TWO + "mix(", "SyntaxError: '(' was never closed"),
        (TWO + "mixx()", "M_.py, line 15: NameError: name 'mixx' is not defined"),
        (TWO + "import nowhere.at_all", "M_.py, line 15: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_mixture_that_cannot_be(command: Command, text: str, words: str) -> None:
    said = command.refused(text, "M_").replace(command.module, "M_")
    assert command.named(words).replace(command.named("M_.py"), "M_.py") in said
    assert not Path("cache/tasks").exists()  # it is noticed before hours of caching


def test_a_mixture_that_contains_itself(command: Command) -> None:
    """seqio's registry does not allow one by name; an object that is changed afterwards can be one."""
    text = (
        TWO
        + """
mix("M_a", [("T_1", 1.0)])
mix("M_b", [("M_a", 1.0)])
a, b = map(seqio.MixtureRegistry.get, ("M_a", "M_b"))
a._sub_mixtures.append(b)
a._task_to_rate["M_b"] = 1.0
"""
    )
    said = command.refused(text, "M_a")
    assert said == command.named("vikhr-t5: mixture M_a contains itself: M_a > M_b > M_a")


def test_a_rate_by_size_that_comes_to_nothing(command: Command) -> None:
    status, err = command(TWO + 'mix("M_", [("T_1", lambda task: 0.0), ("T_2", 1.0)])', "M_")
    assert (status, err[-1]) == (2, command.named(f"vikhr-t5: mixture M_: the rate of T_1 is 0.0{RATE}"))


def test_a_split_that_some_or_all_lack(command: Command) -> None:
    text = TWO + 'mix("M_", [("T_1", 1.0), ("T_2", 1.0)])'
    said = command.refused(text, "M_", "--splits=train,valid")
    assert said == command.named("vikhr-t5: M_ has no split valid; it has: train, validation")
    assert command(text, "M_", "--splits=validation")[0] == 0  # as in seqio, a task that lacks it is left out
    assert [path.parent.name for path in Path("cache/tasks").glob("*/validation")] == [command.named("T_2")]


# ---- the hub, names, vocabularies ------------------------------------------------------------------------------------


def test_the_hub_cannot_be_reached(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'me/answers' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    text = 'add("T_", HuggingFaceSource("me/answers", {"train": "train"}, ["q", "a"]))\n'
    said = command.refused(text + 'flan.add_task("T_2", "me/answers", ("q", "a"))', "T_")
    assert "Couldn't reach 'me/answers' on the Hub; it is read from the hub: mend the network or log in" in said
    assert "or read a copy, a folder that `save_to_disk` wrote" in said
    monkeypatch.delenv("VIKHR_T5_DATA_DIR")
    said = command.refused(text, "T_2")
    assert said.endswith("or put its files into a folder DIR/me/answers and set VIKHR_T5_DATA_DIR=DIR")


@pytest.mark.parametrize("name", ["cache", "preview"])
def test_names_of_tasks_and_modules(command: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(seqio_process, "run", lambda module, arguments: cache(**arguments))
    said = command.refused(TWO, "T_3", command=name)
    assert command.named("unknown task or mixture 'T_3' in ") in said
    assert command.named("nearest: T_2, T_1") in said
    for module in ("no_such_module", "tasks.no_such_module"):
        _, err = command.run(name, "--mixture=T_", f"--module={module}")
        assert [f"no Python module {module} (from " in line for line in err if "not cached yet" not in line] == [True]


@pytest.mark.parametrize("name", ["cache", "preview"])
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("", "no vocabulary: give --vocabulary=spiece.model (or bytes), or set VIKHR_T5_VOCABULARY"),
        ("none.model", "vocabulary 'none.model': No such file or directory; set VOCABULARY_FILE to a SentencePiece mo"),
        ("good.jsonl", "good.jsonl"),
    ],
)
def test_a_vocabulary_that_is_none(
    command: Command, monkeypatch: pytest.MonkeyPatch, name: str, file: str, words: str
) -> None:
    monkeypatch.setattr(seqio_process, "run", lambda module, arguments: cache(**arguments))
    assert words in command.refused(TWO, "T_1", f"--vocabulary={file}", command=name)


def test_a_vocabulary_without_text(command: Command) -> None:
    Path("blank.txt").write_text(" \n\n")
    for flags, words in (
        (["--input=nowhere.txt"], "nowhere.txt"),
        (["--input=blank.txt"], "no text"),
        (["--input=good.jsonl", "--fields=question"], "question"),
    ):
        command.capsys.readouterr()
        status = cli.main(["vocab", "train", "--output=a.model", "--size=300", *flags])
        err = command.capsys.readouterr().err.splitlines()
        assert (status, len(err), words in err[-1]) == (2, 1, True), err
        assert not Path("a.model").exists()


def test_what_is_refused_leaves_no_store(command: Command) -> None:
    write_lines(Path("nulls.jsonl"), [{"q": None, "a": "x"}])
    command.refused('add("T_", lines("nulls.jsonl"))', "T_")
    with pytest.raises(UserError, match="holds no cached split"):
        TokenStore(task_directory("cache", command.named("T_"), "train"))
