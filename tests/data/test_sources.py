"""Sources against Python's own readers: every example once however a file is cut; bad input by file and line."""

import gzip
import itertools
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import seqio
import tensorflow as tf
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vikhr_t5.data import sources
from vikhr_t5.data.sources import HuggingFaceSource, JsonLinesSource, ParquetSource, TextSource, held_out
from vikhr_t5.errors import UserError

WORDS = st.text(st.sampled_from("абвгдёabc "), min_size=1, max_size=12).filter(str.strip)
DOCUMENTS = st.lists(st.lists(WORDS, min_size=1, max_size=4).map("\n".join), max_size=12)


def texts(source: sources.PieceSource, split: str = "train", field: str = "text") -> list[str]:
    return [example[field].decode() for example in source.examples(split)]


def write(path: Path, data: bytes) -> str:
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
    return str(path)


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, gaps=st.lists(st.sampled_from(["\n\n", "\n\n\n", "\n \t\n", "\r\n\r\n"]), min_size=12),
       head=st.sampled_from(["", "\n", "\n\n\n", "\ufeff"]), tail=st.sampled_from(["", "\n", "\n\n"]),
       piece=st.integers(1, 40))  # fmt: skip
def test_text_gives_each_document_once(tmp_path_factory, documents, gaps, head, tail, piece):
    body = "".join(document + gap for document, gap in zip(documents, gaps, strict=False))
    text = head + body.rstrip("\r\n \t") + tail
    parts = re.split(r"\n\s*\n", text.removeprefix("\ufeff").replace("\r\n", "\n").strip("\n"))
    expected = [part.rstrip("\n") for part in parts if part.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", piece)
        found = texts(TextSource({"train": write(tmp_path_factory.mktemp("text") / "a.txt", text.encode())}))
    assert [line.split() for line in found] == [line.split() for line in expected]
    assert [document.count("\n") for document in found] == [document.count("\n") for document in expected]


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(WORDS, max_size=20), piece=st.integers(1, 60), last=st.sampled_from(["", "\n", "\n\n"]),
       head=st.sampled_from(["", "\ufeff"]))  # fmt: skip
def test_json_lines_give_each_object_once(tmp_path_factory, lines, piece, last, head):
    objects = [json.dumps({"x": line, "n": number}, ensure_ascii=False) for number, line in enumerate(lines)]
    path = write(tmp_path_factory.mktemp("json") / "a.jsonl", (head + "\n".join(objects) + last).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", piece)
        found = list(JsonLinesSource({"train": path}, ["n", "x"]).examples("train"))
    assert [(int(example["n"]), example["x"].decode()) for example in found] == list(enumerate(lines))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_files_read_like_plain_ones(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 50)
    documents = [f"документ {number}\nвторая строка" for number in range(100)]
    source = TextSource({"train": write(tmp_path / f"a.txt{suffix}", "\n\n".join(documents).encode())})
    assert texts(source) == documents
    assert len(source.list_shards("train")) == (1 if suffix else 94)  # 4688 bytes


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    write(path, np.random.default_rng(0).bytes(20_000).hex().encode())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=rf"{path} cannot be read to its end: Truncated"):
        texts(TextSource({"train": str(path)}))


@pytest.fixture
def bad_text(tmp_path) -> str:
    lines = ["раз", "", "два", None, "четыре", "", None, "шесть"]
    return write(tmp_path / "bad.txt", b"\n".join(b"\xff\xfe" if line is None else line.encode() for line in lines))


@pytest.mark.parametrize("piece", [1, 9, 10_000])
def test_a_line_that_is_not_utf8_is_named(bad_text, piece, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", piece)
    with pytest.raises(UserError) as caught:
        texts(TextSource({"train": bad_text}))
    assert str(caught.value).startswith(f"{bad_text}, line 4: not UTF-8 (byte 0xff at position 0); ")
    assert "\n" not in str(caught.value)


def test_bad_lines_are_counted_and_skipped_up_to_a_limit(bad_text, capsys):
    source = TextSource({"train": bad_text}, max_bad_lines=2)
    assert texts(source) == ["раз", "два\nчетыре", "шесть"]
    assert source.skipped_lines == 2
    assert capsys.readouterr().err.count("skipped") == 2
    with pytest.raises(UserError, match=r"line 7: not UTF-8 .*; 2 are malformed, and max_bad_lines is 1"):
        texts(TextSource({"train": bad_text}, max_bad_lines=1))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"inputs": "a", "target": "b"}', "no 'targets' (nearest: target"),
        (b'{"inputs": "a", "targets": null}', "line 3: 'targets' is null"),
        (b'{"inputs": "a", ', "not a JSON line: "),
        (b'["a", "b"]', "a list instead of an object"),
        (b'{"inputs": "\xff", "targets": "b"}', "not UTF-8 (byte 0xff at position 12)"),
        (b'{"inputs": "\\ud800", "targets": "b"}', "surrogates not allowed"),
    ],
)
def test_a_malformed_json_line_is_named(tmp_path, line, words):
    good = b'{"inputs": "a", "targets": "b"}\n'
    path = write(tmp_path / "bad.jsonl", good * 2 + line + b"\n" + good)
    with pytest.raises(UserError, match=re.escape(f"{path}, line 3: ")) as caught:
        list(JsonLinesSource({"train": path}, ["inputs", "targets"]).examples("train"))
    assert words in str(caught.value)
    skipping = JsonLinesSource({"train": path}, ["inputs", "targets"], max_bad_lines=1)
    assert len(list(skipping.examples("train"))) == 3


def test_parquet(tmp_path):
    table = pa.table({"text": [f"т{n}" for n in range(10)], "n": range(10), "x": [0.5] * 10, "l": [[1]] * 10})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(pa.table({"text": ["ё", None, "ж"], "n": [7, 8, None]}), tmp_path / "b.parquet")
    pattern = {"train": str(tmp_path / "*.parquet")}
    source = ParquetSource(pattern, ["n", "text"], max_bad_lines=2)
    rows = [(int(example["n"]), example["text"].decode()) for example in source.examples("train")]
    assert rows == [*((n, f"т{n}") for n in range(10)), (7, "ё")]
    assert source.skipped_lines == 2
    assert len(source.list_shards("train")) == 5
    with pytest.raises(UserError, match=r"b\.parquet, row 2: 'text' is null"):
        list(ParquetSource(pattern, ["text"]).examples("train"))
    with pytest.raises(UserError, match=r"a\.parquet has no column 'txt': nearest: text"):
        list(ParquetSource(pattern, ["txt"]).examples("train"))
    lists = ParquetSource({"train": str(tmp_path / "a.parquet")}, ["l"])
    assert texts(lists, field="l") == ["[1]"] * 10
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"c\.parquet is not a whole Parquet file"):
        list(ParquetSource(pattern, ["text"], max_bad_lines=2).examples("train"))


def test_hugging_face_from_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_ROWS", 4)
    rows = datasets.Dataset.from_dict({"inputs": [f"вопрос {n}" for n in range(10)], "label": list(range(10))})
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(tmp_path / "dict")
    rows.save_to_disk(tmp_path / "plain")
    source = HuggingFaceSource(str(tmp_path / "dict"), {"train": "train", "validation": "test"}, ["inputs", "label"])
    assert source.splits == ("train", "validation")
    assert [int(example["label"]) for example in source.examples("train")] == list(range(10))
    assert texts(source, "validation", "inputs") == ["вопрос 3"]
    assert len(source.list_shards("train")) == 3
    assert all(Path(file).is_file() for file in source.files("train"))
    assert len(texts(HuggingFaceSource(str(tmp_path / "plain"), {"train": "train"}, ["inputs"]), field="inputs")) == 10
    with pytest.raises(UserError, match="has no split 'tests': nearest: test"):
        HuggingFaceSource(str(tmp_path / "dict"), {"train": "tests"}, ["inputs"]).list_shards("train")


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*\.txt \(split train\)"):
        TextSource({"train": str(tmp_path / "*.txt")}).list_shards("train")


def test_globs_and_lists_of_them(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, name.encode())
    every = TextSource({"train": str(tmp_path / "**/*.txt")})
    assert texts(every) == ["a/1.txt", "b/2.txt", "c.txt"]
    assert texts(TextSource({"train": [str(tmp_path / "c.txt"), str(tmp_path / "?/*.txt")]})) == texts(every)


def test_held_out_splits_are_disjoint_whole_and_stable(tmp_path):
    documents = [f"документ {number}" for number in range(5000)]
    path = write(tmp_path / "a.txt", "\n\n".join(documents).encode())
    source = TextSource({"train": path, "validation": path}, belongs=held_out("text", 0.05))
    train, validation = texts(source), texts(source, "validation")
    assert sorted(train + validation) == sorted(documents)
    assert 200 < len(validation) < 300
    assert validation[:3] == ["документ 7", "документ 38", "документ 39"]


# ---- in seqio --------------------------------------------------------------------------------------------------------


def dataset_texts(dataset: tf.data.Dataset) -> list[str]:
    return [example["text"].decode() for example in dataset.as_numpy_iterator()]


def test_seqio_shards_partition_the_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 300)
    documents = [f"документ {number}" for number in range(1000)]
    source = TextSource({"train": write(tmp_path / "a.txt", "\n\n".join(documents).encode())})
    assert dataset_texts(source.get_dataset("train", shuffle=False)) == documents
    shards = [
        dataset_texts(source.get_dataset("train", shuffle=False, shard_info=seqio.ShardInfo(index, 7)))
        for index in range(7)
    ]
    assert sorted(itertools.chain(*shards)) == sorted(documents)
    assert all(80 < len(shard) < 200 for shard in shards)
    shuffled = [dataset_texts(source.get_dataset("train", shuffle=True, seed=seed)) for seed in (1, 1, 2)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(shuffled[0]) == sorted(documents)


def test_errors_keep_their_words_in_tensorflow(bad_text):
    with pytest.raises(tf.errors.OpError, match=r"UserError: .*bad\.txt, line 4: not UTF-8"):
        dataset_texts(TextSource({"train": bad_text}).get_dataset("train", shuffle=False))
