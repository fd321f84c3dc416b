"""Rows and lines of files without seqio: kinds, compression, and the place of what cannot be read."""

import gzip
import json
from pathlib import Path

import pytest

from vikhr_t5.data import vocabulary
from vikhr_t5.data.records import read_lines, read_rows
from vikhr_t5.errors import UserError


def test_lines_of_a_folder_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "один\n\nдва\r\nтри".encode())
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "четыре\\nпять", "n": 1}\n\n{"text": "шесть"}\n')
    (tmp_path / "c.json").write_text(json.dumps([{"text": "семь"}, {"text": " "}]))
    lines = list(vocabulary.read_lines(read_lines(str(tmp_path))))
    assert lines == ["один", "два", "три", "четыре", "пять", "шесть", "семь"]
    assert [(Path(where).name, row) for where, row in read_rows(str(tmp_path))][:3] == [
        ("a.txt:1", {"text": "один"}),
        ("a.txt:3", {"text": "два\nтри"}),
        ("b.jsonl.gz:1", {"text": "четыре\nпять", "n": 1}),
    ]


def test_zstandard_needs_no_package_of_its_own(tmp_path: Path) -> None:
    import pyarrow as pa

    with pa.output_stream(str(tmp_path / "a.txt.zst"), compression="zstd") as file:
        file.write("один\nдва\n".encode())
    assert list(read_lines(str(tmp_path / "a.txt.zst"))) == ["один\n", "два\n"]


@pytest.mark.parametrize("name", ["bad.txt", "bad.jsonl", "bad.jsonl.gz"])
def test_a_line_that_is_not_utf8_is_named_exactly(tmp_path: Path, name: str) -> None:
    content = b'{"text": "a"}\n' * 7 + b'{"text": "\xff"}\n' + b'{"text": "b"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match=rf"{name}:8: cannot be read: not UTF-8 \(invalid start byte at byte 10\)"):
        list(read_rows(str(tmp_path / name)))


def test_what_is_cut_short(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 5000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.json").write_text('[{"text": "a"},')
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"te')
    for name, message in (
        ("a.jsonl.gz", r"a\.jsonl\.gz:\d+: "),
        ("b.json", r"b\.json: not JSON"),
        ("c.jsonl", r"c\.jsonl:2: not JSON"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path, name: str) -> None:
    rows = [{"text": "\U0001f600 \\ud83d", "n": 1}, {"text": "a", "more": [{"deep": "b\udc00"}]}, {"\ud83d": 1}]

    def write(*rows: dict) -> str:
        text = json.dumps(rows) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    (_, whole), *_ = read_rows(write(rows[0]))
    assert whole == rows[0]  # a pair, and a backslash before letters
    place = {"a.jsonl": r"a\.jsonl:2", "a.json": r"a\.json\[1\]"}[name]
    with pytest.raises(UserError, match=place + r": field 'more' holds \\udc00, half of a surrogate pair"):
        list(read_rows(write(*rows[:2])))
    with pytest.raises(UserError, match=place + r": field '\\ud83d' holds \\ud83d"):
        list(read_rows(write(rows[0], rows[2])))


def test_text_has_one_field_and_other_endings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(UserError, match="has no field 'title': it is plain text"):
        list(read_lines(str(tmp_path / "a.txt"), "title"))
    with pytest.raises(UserError, match=r"a\.csv: not one of \.txt, \.jsonl"):
        list(read_lines(str(tmp_path / "a.csv")))


def test_one_line_of_a_hundred_megabytes() -> None:
    """Cutting it takes time in proportion to its length, not to its square (20 minutes)."""
    parts = 0
    for part in vocabulary.read_lines(["слово и дело " * 8_000_000]):
        parts += len(part) > 0
        assert len(part) <= 8192
    assert 104_000_000 / 8192 < parts < 13_500
