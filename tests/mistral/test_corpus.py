"""Rows and texts of published files, errors with file and line; tokens on disk; settings from YAML."""

import dataclasses
import gzip
import json
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_mistral
import zstandard

from vikhr_mistral.config import read_config
from vikhr_mistral.corpus import tokenize
from vikhr_t5.data.records import read_rows, read_texts
from vikhr_t5.errors import UserError

ROWS = [{"text": "Первый документ.", "score": 1}, {"text": "A second one,\nof two lines.", "score": 2}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet", "saved", "folder", "glob"])
def test_all_kinds_give_the_same_rows(tmp_path, kind):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "jsonl.zst":
        path.write_bytes(zstandard.compress(text.encode()))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        for i, row in enumerate(ROWS):
            (path / f"{i}.jsonl").write_text(json.dumps(row))
    else:
        path.write_text(text) if kind == "jsonl" else (tmp_path / "rows-1.jsonl").write_text(text)
    source = str(tmp_path / "rows-*.jsonl") if kind == "glob" else str(path)
    assert [row for _, row in read_rows(source)] == ROWS


def test_text_files_are_documents_between_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\nlines\n \nthree")
    found = list(read_texts(str(tmp_path / "a.txt")))
    assert found == [(f"{tmp_path}/a.txt:{n}", text) for n, text in ((1, "one"), (4, "two\nlines"), (7, "three"))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl:2: a list, and an object"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl:1 has no field 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: field 'text' is int"),
        ("a.txt", "слово\n".encode("cp1251"), "a.txt:1: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20], "a.jsonl.gz:.*cannot be read"),
        ("a.parquet", b"PAR1 no", "a.parquet: not Parquet, or cut short"),
        ("a.csv", b"a,b\n", "a.csv: not one of .txt"),
        ("a.txt", b"\n\n", "no document"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    tokenizer = tiny_mistral.tokenizer(["some text"], 280)
    with pytest.raises(UserError, match=message):
        tokenize(str(tmp_path / name), tokenizer, tmp_path / "tokens")
    assert not list((tmp_path / "tokens").glob("*")) if (tmp_path / "tokens").exists() else True


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        list(read_rows(str(tmp_path / "none.jsonl")))
    with pytest.raises(UserError, match="the folder has none of"):
        list(read_rows(str(tmp_path)))


def test_tokens_on_disk_are_the_documents(tmp_path):
    tokenizer = tiny_mistral.tokenizer(tiny_mistral.lines("en", 50), 400)
    documents = tiny_mistral.lines("en", 40) + tiny_mistral.lines("ru", 40)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    corpus = tokenize(str(path), tokenizer, tmp_path / "tokens", base_tokenizer=tokenizer)
    pieces = np.split(corpus.tokens, corpus.ends[:-1])
    assert [tokenizer.decode(piece[1:-1]) for piece in pieces] == documents
    assert {(piece[0], piece[-1]) for piece in pieces} == {(1, 2)}
    assert corpus.tokens.dtype == np.uint16
    assert corpus.alike.all()
    made = (corpus.directory / "tokens.bin").stat().st_mtime_ns
    again = tokenize(str(path), tokenizer, tmp_path / "tokens", base_tokenizer=tokenizer)
    assert again.directory == corpus.directory
    assert (again.directory / "tokens.bin").stat().st_mtime_ns == made
    path.write_text('{"text": "other"}\n')  # a changed file is tokenized again
    assert len(tokenize(str(path), tokenizer, tmp_path / "tokens").ends) == 1


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.size < 0:
            raise ValueError("size is below 0")


@dataclasses.dataclass(frozen=True)
class Outer:
    rate: float
    inner: Inner = dataclasses.field(default_factory=Inner)
    named: dict[str, Inner] = dataclasses.field(default_factory=dict)
    files: str | list[str] = "x"
    end: float | None = None
    flag: bool = False


def test_settings_from_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("rate: 1e-4\ninner: {size: 3}\nnamed: {x: {kind: b}}\nfiles: [a, b]\nend: 2\n")
    expected = Outer(1e-4, Inner(5), {"x": Inner(kind="b")}, ["a", "b"], 2.0, True)
    assert read_config(Outer, path, ["inner.size=5", "flag=true"]) == expected


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("rat: 1", [], "unknown setting 'rat'; nearest: rate"),
        ("files: a", [], "setting 'rate' is missing"),
        ("rate: fast", [], "rate is 'fast', and a number"),
        ("rate: 1\ninner: {size: 1.5}", [], "inner: size is 1.5, and a whole number"),
        ("rate: 1\ninner: {kind: c}", [], "inner: kind is 'c'"),
        ("rate: 1\nnamed: {x: {sise: 1}}", [], "named.x: unknown setting 'sise'; nearest: size"),
        ("rate: 1\ninner: 5", [], "inner is 5, and `name: value` lines"),
        ("rate: 1\nflag: 1", [], "flag is 1, and true or false"),
        ("rate: [", [], "is no YAML"),
        ("- 1", [], "this is a list"),
        ("rate: 1", ["inner.size"], "'inner.size' is not of the form name=value"),
        ("rate: 1", ["inner.size=-1"], "inner: size is below 0"),
    ],
)
def test_bad_settings_are_named(tmp_path, text, overrides, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(Outer, tmp_path / "a.yaml", overrides)
