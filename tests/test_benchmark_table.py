"""The table of benchmarks in its three forms, and what the command refuses before it loads anything."""

import json
import re
from html.parser import HTMLParser

from vikhr_t5 import benchmark_table, cli
from vikhr_t5.benchmark_results import BENCHMARKS, PUBLISHED, Result

SETTINGS = {"dtype": "bfloat16", "lm_eval": "0.4.13"}


def result(model, benchmark, value, stderr=0.01, shots=0, cut=0, **fields):
    return Result(model, benchmark, value, stderr, 300, shots, 300, cut, 2048, "f", settings=SETTINGS, **fields)


PARTS = {"STEM": [0.2, 0.02], "humanities": (0.3, 0.02), "social_sciences": [0.25, 0.02], "other": [0.29, None]}
RESULTS = [
    result("small", "ru_mmlu", 0.26, 0.004, shots=5, cut=12, parts=PARTS),
    result("small", "xwinograd_ru", 0.51, 0.028),
    result("small", "perplexity_ru", 1.2345, 0.01),
    result("a|<b>", "xwinograd_ru", 0.7, None),
    result("a|<b>", "perplexity_ru", 2.0, 0.01),
    result("a|<b>", "translate_ru_en", 33.33, 0.51),
]


def cells_of(markdown):
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]


def test_the_table_in_markdown():
    shown = benchmark_table.table(RESULTS, limit=300)
    head, _, *rows = cells_of(benchmark_table.markdown(shown))
    assert head[:5] == ["Dataset", "Metric", "small", "a\\|<b>", "random"]
    assert head[5:] == [f"{column.model} (published)" for column in PUBLISHED]
    lines = {row[0]: row[1:] for row in rows}
    assert list(lines) == [
        "ru_mmlu (5-shot)", "· STEM", "· humanities", "· social sciences", "· other",
        "xwinograd_ru (0-shot)", "translate_ru_en (0-shot)", "perplexity_ru",
    ]  # fmt: skip
    assert lines["ru_mmlu (5-shot)"] == [
        "accuracy ↑",
        "0.260 ± 0.004",
        "–",
        "0.25",
        "0.32",
        "0.252",
        "0.28",
        "0.60",
        "0.66",
    ]
    assert lines["· other"][:3] == ["", "0.290", "–"]
    assert lines["xwinograd_ru (0-shot)"][1:4] == ["0.510 ± 0.028", "**0.700**", "0.5"]
    assert lines["perplexity_ru"][1:4] == ["**1.234 ± 0.010**", "2.000 ± 0.010", "–"]  # less is better
    assert lines["translate_ru_en (0-shot)"][:3] == ["chrF ↑", "–", "33.3 ± 0.5"]  # one model: nothing is the best
    notes = benchmark_table.markdown(shown)
    assert "small, ru_mmlu: 12 of 300 prompts are longer than the 2,048 tokens" in notes
    assert "at most 300 items" in notes
    assert all(column.source in notes for column in PUBLISHED)


def test_published_values_stand_only_beside_their_benchmarks():
    head, *_ = cells_of(benchmark_table.markdown(benchmark_table.table([result("m", "perplexity_en", 1.0)])))
    assert head == ["Dataset", "Metric", "m"]
    for column in PUBLISHED:
        assert column.values.keys() <= BENCHMARKS.keys()
        assert column.source.startswith("https://")


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.titles = [], []

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data


def test_all_forms_are_written(tmp_path):
    shown = benchmark_table.table(RESULTS)
    benchmark_table.write(shown, tmp_path / "scores", ["vikhr-t5", "benchmark", "a model"])
    page = (tmp_path / "scores/table.html").read_text(encoding="utf-8")
    found = Cells()
    found.feed(page)
    assert found.rows[0][2:4] == ["small", "a|<b>"]
    assert [row[2:5] for row in found.rows if row[0].startswith("xwinograd")] == [["0.510 ± 0.028", "0.700", "0.5"]]
    assert "vikhr-t5 benchmark 'a model'" in page.replace("&#x27;", "'")
    assert not re.search(r'(src|href)="|url\(|@import', page)  # one file
    picture = (tmp_path / "scores/table.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    record = json.loads((tmp_path / "scores/results.json").read_text(encoding="utf-8"))
    assert [one["value"] for one in record["results"]] == [one.value for one in RESULTS]
    assert record["results"][0]["settings"]["lm_eval"] == "0.4.13"


def refused(capfd, *arguments):
    status = cli.main(["benchmark", *map(str, arguments)])
    out, error = capfd.readouterr()
    assert (status, out, error.count("\n")) == (2, "", 1)
    return error


def test_bad_flags(capfd, tmp_path):
    assert "nearest: xnli_ru" in refused(capfd, "m", "--tasks", "ru_mmlu,xnli")
    assert "names none" in refused(capfd, "m", "--tasks", ",")
    for flag in ("--limit", "--batch_size", "--max_length"):
        assert f"{flag} 0: 1 or more" in refused(capfd, "m", flag, 0)
    assert "--num_fewshot -1" in refused(capfd, "m", "--num_fewshot", -1)
    (tmp_path / "mine").write_text("")
    assert "not empty" in refused(capfd, "m", "--output", tmp_path)
    assert (tmp_path / "mine").exists()
    assert "is a file" in refused(capfd, "m", "--output", tmp_path / "mine")
