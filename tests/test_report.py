"""The report of synthetic run folders: what is in the page, that it is one file, and that long runs stay small."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vikhr_t5.errors import UserError
from vikhr_t5.report import report
from vikhr_t5.report_charts import POINTS, thin
from vikhr_t5.run_folder import Table

DENOISERS = tuple(f"demo_ul2/{name}" for name in ("R-3-15", "R-8-15", "X-3-50", "X-8-50", "X-64-15", "X-64-50", "S-25"))
TASKS = ("translate_ru_en", "translate_en_ru", "complete", "restore")


METRICS = {"chrf": 40.0, "chrf/complete": 30.0, "chrf/restore": 50.0}  # of generated text, at the end


def write_run(
    folder: Path, sources: tuple[str, ...], first: int, last: int, every: int = 10, measured: bool = False, **end: Any
) -> Path:
    """A run folder as the trainer leaves it, with made-up curves."""
    rng, task = np.random.default_rng(first), sources[0].split("/")[0]
    (folder / "vocabulary").mkdir(parents=True)
    (folder / "config.gin").write_text(f"# Macros\nTRAIN_STEPS = {last}\nMODEL_DIR = {folder.name!r}\nSEED = 0\n")
    (folder / "model_config.json").write_text(json.dumps({"emb_dim": 256, "mlp_activations": ["gelu", "linear"]}))
    (folder / "vocabulary" / "vocabulary.json").write_text(json.dumps({"size": 8300, "extra_ids": 300}))
    start = {
        "kind": "start",
        "step": first,
        "time": 1.7e9,
        "parameters": 10_491_648,
        "devices": 1,
        "device_kind": "cpu",
    }
    lines = [{**start, "peak": "cpu: 0.4 TFLOP/s"}]
    for step in range(first + every, last + 1, every):
        progress = (step - first) / (last - first)
        losses = {s: 3 + 0.2 * i + 6 * math.exp(-6 * progress) + rng.normal(0, 0.06) for i, s in enumerate(sources)}
        mean = sum(losses.values()) / len(losses)
        line = {f"loss/{s}": loss for s, loss in losses.items()} | {f"accuracy/{s}": 1 / x for s, x in losses.items()}
        line |= {
            "loss": mean,
            "accuracy": 1 / mean,
            "grad_norm": 0.5 + rng.gamma(2, 0.2),
            "learning_rate": 0.02 * progress,
        }
        line |= {"tokens_per_second": 6000 + rng.normal(0, 200), "step_seconds": 0.9, "mfu": 0.55 + rng.normal(0, 0.01)}
        line |= {"useful_inputs": 1.0, "useful_targets": 0.993, "memory_gib": 1.9, "grad_norm": rng.gamma(2, 0.2)}
        lines.append({"kind": "train", "step": step, "time": 1.7e9 + step, **line})
        if (step - first) % max(every, (last - first) // 6) < every:
            held_out = {name: value + 0.1 for name, value in line.items() if name.startswith(("loss", "accuracy"))}
            held_out |= {name: value * progress for name, value in METRICS.items() if measured}
            lines.append({"kind": "eval", "step": step, "time": 1.7e9 + step, "task": task, **held_out})
    lines += [{"kind": "end", "step": last, "time": 1.8e9, **end}] if end else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [
        {
            "step": step,
            "task": sources[i],
            "input": f"[NLU] Ёжик в <extra_id_0> шёл к медвежонку & пил <extra_id_1> из {'чашки ' * (20 * i)}<b>.",
            "target": "<extra_id_0> тумане <extra_id_1> чай",
            "prediction": "<extra_id_0> тумане <extra_id_1> чай" if step == last else "<extra_id_0>. <extra_id_0>",
        }
        for step in np.linspace(first, last, 9).astype(int).tolist()
        for i in range(3)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
    return folder


class _Page(HTMLParser):
    """The page's tags with their attributes, its visible text, and the numbers behind its charts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data, self._inside = "", "", ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open, f"not closed: {self.open}"
        self.charts = json.loads(self.data)["charts"]
        self.stages = json.loads(self.data)["stages"]

    def reset(self) -> None:
        super().reset()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.data += data if self.tags[-1][1].get("type") == "application/json" else ""
        elif inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "ul2", DENOISERS, 0, 400, finished=True)
    return [first, write_run(folder / "instruct", TASKS, 400, 700, measured=True, finished=True)]


@pytest.fixture(scope="module")
def page(stages: list[Path]) -> _Page:
    report(stages, stages[0].parent / "report.html")
    return _Page(stages[0].parent / "report.html")


def test_the_page_is_one_file(page: _Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "base", "object")
        assert not {"src", "href", "srcset"} & set(attributes)
    addresses = set(re.findall(r"\w+://[^\s\"'<]+|@import|url\(", page.source))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_key_figures(page: _Page) -> None:
    # 40 and 30 lines of 10 steps of 0.9 s.
    for said in ("ul2 → instruct", "10.5M parameters", "400", "6:00", "4:30", "held-out loss"):
        assert said in page.text
    assert float(re.findall(r"([\d.]+)M", page.text)[1]) == pytest.approx(2.16, abs=0.03)  # 6000 tokens/s


def test_every_source_has_its_curves(page: _Page) -> None:
    loss, accuracy = (next(c for c in page.charts if c["title"] == f"{name}, ul2") for name in ("Loss", "Accuracy"))
    names = [source.removeprefix("demo_ul2/") for source in DENOISERS]
    for chart in (loss, accuracy):
        assert [s["name"] for s in chart["series"] if not s["dots"]] == ["all", *names]
        assert [s["name"] for s in chart["series"] if s["dots"]] == ["all", *names]
    tasks = next(c for c in page.charts if c["title"] == "Loss, instruct")
    assert {s["name"] for s in tasks["series"]} == {"all", *TASKS}
    titles = [chart["title"] for chart in page.charts]
    for title in ("Throughput", "MFU", "Useful tokens", "Step time", "Memory", "Gradient norm", "Learning rate"):
        assert title in titles
    assert len([tag for tag, _ in page.tags if tag == "figure"]) == len(page.charts)


def test_each_metric_of_generated_text_has_a_chart(page: _Page) -> None:
    assert "chrf, ul2" not in [chart["title"] for chart in page.charts]
    assert "40.0chrf, held out" in page.text
    chart, loss = (next(c for c in page.charts if c["title"] == f"{name}, instruct") for name in ("chrf", "Loss"))
    assert {s["name"]: s["y"][-1] for s in chart["series"]} == {"all": 40, "complete": 30, "restore": 50}
    assert all(s["dots"] for s in chart["series"])
    slots = {s["name"]: s["slot"] for s in loss["series"]}
    assert all(s["slot"] == slots[s["name"]] for s in chart["series"])


def test_sets_that_only_evaluations_tell_apart_are_in_the_table_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "flan", ("flan", "chats", "text"), 0, 100, finished=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "eval":
            line |= {f"loss/flan/glue/set{n}:1.0.0": 1 + n / 1000 for n in range(300)}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report([run], tmp_path / "report.html")
    page = _Page(tmp_path / "report.html")
    assert {s["name"] for s in page.charts[0]["series"]} == {"all", "flan", "chats", "text"}
    assert "303 sources" in page.text
    assert "flan/glue/set299:1.0.0" in page.text
    assert "1.299" in page.text


def test_curves_are_the_metrics(page: _Page, stages: list[Path]) -> None:
    lines = [json.loads(line) for line in (stages[0] / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    chart = next(c for c in page.charts if c["title"] == "Loss, ul2")
    series = next(s for s in chart["series"] if s["name"] == "X-8-50" and not s["dots"])
    assert series["step"] == [line["step"] for line in train]
    np.testing.assert_allclose(series["y"], [line["loss/demo_ul2/X-8-50"] for line in train], rtol=1e-5)
    np.testing.assert_allclose(series["hours"], [line["step"] * 0.9 / 3600 for line in train], rtol=1e-5)
    held_out = next(s for s in chart["series"] if s["name"] == "X-8-50" and s["dots"])
    at = dict(zip(series["step"], series["tokens"], strict=True))
    assert [at[step] for step in held_out["step"]] == held_out["tokens"]


def test_stages_share_one_axis(page: _Page, stages: list[Path], tmp_path: Path) -> None:
    assert [stage["step"] for stage in page.stages] == [0, 400]
    whole = next(c for c in page.charts if c["title"] == "Throughput")["series"][0]
    for axis in ("step", "tokens", "hours"):
        assert whole[axis] == sorted(whole[axis])
    # A stage that counts from 0 goes on where the one before it ended.
    again = write_run(tmp_path / "again", TASKS, 0, 100, finished=True)
    report([*stages, again], tmp_path / "report.html")
    assert [stage["step"] for stage in _Page(tmp_path / "report.html").stages] == [0, 400, 700]


def test_text_is_shown_as_text(page: _Page, stages: list[Path], tmp_path: Path) -> None:
    assert "Ёжик в" in page.text
    assert "медвежонку & пил" in page.text
    assert "<b>." in page.text
    sentinels = [attributes for tag, attributes in page.tags if attributes.get("class") == "sentinel"]
    assert {attributes["title"] for attributes in sentinels} == {"<extra_id_0>", "<extra_id_1>"}
    evil = "</script><script>alert(1)</script>"
    folder = write_run(tmp_path / "evil", (evil, "<i>", "&amp;"), 0, 50, finished=True)
    with open(folder / "samples.jsonl", "a") as file:
        file.write(json.dumps({"step": 50, "task": evil, "input": evil, "target": evil, "prediction": evil}) + "\n")
    (folder / "config.gin").write_text(f"A = '{evil}'")
    report([folder], tmp_path / "report.html")
    shown = _Page(tmp_path / "report.html")
    assert len([tag for tag, _ in shown.tags if tag == "script"]) == 2
    assert evil in shown.text


def test_what_a_stage_changes(page: _Page) -> None:
    assert "what instruct changes from ul2" in page.text
    changes = page.source[page.source.index("what instruct changes") :]
    assert "<del>-TRAIN_STEPS = 400</del>\n<del>-MODEL_DIR = &#x27;ul2&#x27;</del>" in changes
    assert "<ins>+TRAIN_STEPS = 700</ins>" in changes
    assert "SEED" not in changes


def test_a_run_that_was_killed(tmp_path: Path) -> None:
    """No end, a last line cut short, a loss that is not finite, no samples, no configuration."""
    folder = write_run(tmp_path / "killed", DENOISERS, 0, 100)
    bad = {"kind": "train", "step": 110, "loss": math.nan, "grad_norm": math.inf, "step_seconds": 1.0}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(bad) + "\n" + '{"kind": "train", "step": 120, "lo')
    for name in ("samples.jsonl", "config.gin", "model_config.json"):
        (folder / name).unlink()
    report([folder], tmp_path / "report.html")
    shown = _Page(tmp_path / "report.html")
    assert "running, or interrupted" in shown.text
    assert next(c for c in shown.charts if c["title"] == "Loss, killed")["series"][0]["step"][-1] == 100
    assert next(c for c in shown.charts if c["title"] == "Step time")["series"][0]["step"][-1] == 110


def test_settings_of_vikhr_mistral(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "chats", DENOISERS, 0, 100)
    (folder / "config.gin").unlink()
    (folder / "config.yaml").write_text("train:\n  max_steps: 100\n")
    report([folder], tmp_path / "report.html")
    assert "settings, chats" in _Page(tmp_path / "report.html").text
    assert "max_steps: 100" in _Page(tmp_path / "report.html").text


def test_a_run_without_a_step_yet(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "new", DENOISERS, 0, 10)
    (folder / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "time": 1.7e9}\n')
    report([folder], tmp_path / "report.html")
    assert _Page(tmp_path / "report.html").charts[0]["series"] == []


def test_runs_side_by_side(stages: list[Path], tmp_path: Path) -> None:
    """Each from its own beginning: a curve of each in every chart, one of each shared source; a row of figures each."""
    other = write_run(tmp_path / "wide", DENOISERS, 0, 200, finished=True)
    report([stages[0], other], tmp_path / "report.html", compare=True)
    page = _Page(tmp_path / "report.html")
    assert page.stages == []
    for title in ("Loss", "Accuracy", "Loss of demo_ul2/S-25", "Throughput", "Gradient norm"):
        curves = [s for s in next(c for c in page.charts if c["title"] == title)["series"] if not s["dots"]]
        assert [s["name"] for s in curves] == ["ul2", "wide"]
        assert [s["step"][-1] for s in curves] == [400, 200]
        assert [s["step"][0] for s in curves] == [10, 10]
    assert "what wide changes from ul2" in page.text
    assert {"6:00", "3:00"} <= set(re.findall(r"\d+:\d\d", page.text))
    with pytest.raises(UserError, match="two run folders or more"):
        report([other], tmp_path / "report.html", compare=True)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        # 260 s on two devices; 1.3 s a step, so 800 more take 1,040 s: until 5,840 s, and 2,600 device seconds in all.
        ((2, 1000), (2, 1000), ("8:40", "$5.20", "01:37", "$26.00")),
        # 130 s on two devices, 130 s on one: 1.95 device seconds a step, so 800 more take 1,560 s: until 6,360 s.
        ((2, 200), (1, 1000), ("6:30", "$3.90", "01:46", "$19.50")),
    ],
    ids=["the same", "fewer devices, more steps"],
)
def test_cost_so_far_and_expected_end(
    tmp_path: Path, before: tuple[int, int], after: tuple[int, int], said: tuple[str, ...]
) -> None:
    """30 s to the first step, 100 steps in 100 s; a crash; an hour later 30 s and 100 s again. Of the two starts:
    (devices, total steps)."""
    folder = write_run(tmp_path / "run", DENOISERS, 0, 200)
    train = {"kind": "train", "loss": 1.0, "step_seconds": 0.9, "tokens_per_second": 10.0}
    first, second = (
        {"kind": "start", "startup_seconds": 30.0, "devices": devices, "total_steps": steps}
        for devices, steps in (before, after)
    )
    lines = [{**first, "step": 0, "time": 1000.0}]
    lines += [{**train, "step": step, "time": 1000.0 + step} for step in (50, 100)]
    lines += [{**second, "step": 100, "time": 4700.0}]
    lines += [{**train, "step": step, "time": 4600.0 + step} for step in (150, 200)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report([folder], tmp_path / "report.html", price_per_hour=36.0)
    text = _Page(tmp_path / "report.html").text
    for value, name in zip(said, ("device time", "spent", "expected end, UTC", "expected in the end"), strict=True):
        assert value + name in text
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "end", "step": 200, "time": 4800.0, "finished": True}) + "\n")
    report([folder], tmp_path / "report.html")
    assert "expected" not in _Page(tmp_path / "report.html").text


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="no run folder"):
        report([], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
    folder = write_run(tmp_path / "run", DENOISERS, 0, 50)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="run is a folder, and a file is to be written: give another name"):
        report([folder], folder)
    assert sorted(folder.rglob("*")) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", DENOISERS, 0, 5000, every=1, finished=True)
    report([folder], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 600_000
    for chart in _Page(tmp_path / "report.html").charts:
        assert all(len(series["y"]) <= 2 * POINTS for series in chart["series"])


def test_thinning_keeps_mean_and_extremes() -> None:
    values = np.random.default_rng(0).normal(size=100_003)
    values[[17, 50_000]] = 40, -40
    values[5::7] = np.nan
    steps = np.arange(len(values), dtype=float)
    curve = thin(np.stack([steps, 2 * steps, 3 * steps]), values)
    assert curve is not None
    assert len(curve["y"]) == POINTS
    assert (max(curve["high"]), min(curve["low"])) == (np.nanmax(values), np.nanmin(values))
    assert np.mean(curve["y"]) == pytest.approx(np.nanmean(values), abs=1e-3)
    assert all(low <= y <= high for low, y, high in zip(curve["low"], curve["y"], curve["high"], strict=True))
    np.testing.assert_allclose(curve["tokens"], 2 * np.array(curve["step"]), rtol=1e-5)
    assert thin(np.zeros((3, 4)), np.full(4, np.nan)) is None


def test_columns_of_lines_that_differ() -> None:
    table = Table()
    for step, line in enumerate([{"a": 1.0}, {"b": 2}, {"a": 3.0, "b": math.inf, "task": "x"}]):
        table.add({"step": step, **line})
    np.testing.assert_array_equal(table["a"], [1, np.nan, 3])
    np.testing.assert_array_equal(table["b"], [np.nan, 2, np.nan])
    assert table.ends("a") == (1, 3)
    assert np.isnan(table["nothing"]).all()
