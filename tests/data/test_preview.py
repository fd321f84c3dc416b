"""The preview: what it gathers against the data itself, and that terminal and page show it."""

import io
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vikhr_t5 import cli
from vikhr_t5.data import preview_html, preview_raw, preview_terminal, seqio_process
from vikhr_t5.data.cache import cache
from vikhr_t5.data.pipeline import DatasetConfig, open_dataset
from vikhr_t5.data.preview import SHOWN_PARTS, Preview, gather
from vikhr_t5.data.preview_terminal import STYLES
from vikhr_t5.data.vocabulary import Vocabulary


@pytest.fixture
def config(write_task: Callable[..., Path], text_task: dict, pairs_task: dict, tmp_path: Path) -> DatasetConfig:
    write_task("text", text_task, mixture="ul2")
    write_task("pairs", pairs_task)
    write_task.mixture("both", {"text": 1.0, "pairs": 1.0})  # type: ignore[attr-defined]
    return DatasetConfig("both", {"inputs": 128, "targets": 60}, "train", 4, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def seen(config: DatasetConfig, small_vocabulary: Vocabulary) -> Preview:
    return gather(config, small_vocabulary, 4)


@pytest.fixture
def console(seen: Preview) -> Console:
    console = Console(width=100, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    preview_terminal.show(seen, console)
    return console


class _Page(HTMLParser):
    """A page's tags and what one reads of it. Every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def page(seen: Preview, tmp_path: Path) -> _Page:
    preview_html.write(seen, tmp_path / "preview.html")
    return _Page(tmp_path / "preview.html")


def test_what_is_gathered_is_what_the_rows_hold(
    seen: Preview, config: DatasetConfig, small_vocabulary: Vocabulary, text_task: dict
) -> None:
    dataset = open_dataset(config, small_vocabulary)
    for place, row in enumerate(seen.rows):
        task, segments = dataset.segments(place)
        assert (row.place, row.task) == (place, task)
        for found, expected in zip(row.segments, segments, strict=True):
            np.testing.assert_array_equal(found.inputs, expected.inputs)
    batch = next(iter(dataset.batches(num_steps=1)))
    first = seen.rows[0].segments[0].inputs
    np.testing.assert_array_equal(batch["encoder_input_tokens"][0, : len(first)], first)
    text, pairs = seen.tasks
    assert sorted(text.documents) == sorted(len(tokens) for tokens in text_task["targets"])
    assert [len(source.inputs) for source in (text.whole, pairs.whole)] == [
        sum(len(denoiser.inputs) for denoiser in text.parts),
        len(pairs.whole.targets),
    ]
    for source in (text.whole, pairs.whole, *text.parts):
        assert source.measured == pytest.approx(source.nominal, rel=0.03)
    assert text.denoised
    assert not pairs.denoised
    assert not pairs.parts
    assert "no module" in seen.note
    for useful, planned in zip(seen.useful, seen.planned, strict=True):
        assert useful == pytest.approx(planned, abs=0.01)


def test_the_terminal_shows_rows_at_every_stage(console: Console, seen: Preview, small_vocabulary: Vocabulary) -> None:
    text = console.export_text(clear=False)
    assert max(len(line) for line in text.splitlines()) <= 100
    for row in seen.rows:
        assert f"row {row.place} of train: {row.task}, {len(row.segments)} segments" in text
        for number, segment in enumerate(row.segments, 1):
            name = "example" if segment.denoiser is None else segment.denoiser.name
            assert f"segment {number}: {name}" in text
            first = small_vocabulary.decode((segment.inputs if segment.text is None else segment.text)[:4].tolist())
            assert first in text  # readable, not only as pieces
    for token in ("<0>", "[NLU]", "</s>", "packed row"):
        assert token in text
    assert "\x1b[1;30;43m<0>" in console.export_text(styles=True, clear=False), f"no sentinel is {STYLES['sentinel']}"


def test_the_terminal_shows_shares_and_fill(console: Console) -> None:
    text = console.export_text(clear=False)
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in text.splitlines()
        if line.startswith("│") and "%" in line
    }
    assert {"text", "pairs", "R-3-15", "S-25"} <= set(cells)
    for nominal, measured, *_ in cells.values():
        assert float(measured.rstrip("%")) == pytest.approx(float(nominal.rstrip("%")), rel=0.03)
    for note in ("inputs 128:", "targets 60:", "as full as inputs of 128"):
        assert note in text


def test_the_page_is_one_file(page: _Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "base", "object")
        assert not {"src", "href", "srcset"} & set(attributes)
    assert not re.findall(r"\w+://|@import|url\(", page.source)


def test_the_page_shows_every_token_of_the_rows(page: _Page, seen: Preview) -> None:
    titles = [int(attributes["title"] or "") for _, attributes in page.tags if "title" in attributes]
    kinds = [
        (attributes.get("class"), int(attributes["title"] or ""))
        for tag, attributes in page.tags
        if "title" in attributes
    ]
    for row in seen.rows:
        for side in ("inputs", "targets"):
            packed = np.concatenate([getattr(segment, side) for segment in row.segments]).tolist()
            assert any(titles[start : start + len(packed)] == packed for start in range(len(titles)))
    vocabulary = seen.vocabulary
    for kind, token in kinds:
        expected = "sentinel" if token >= vocabulary.last_sentinel else "end" if token == vocabulary.eos_id else None
        assert kind == (expected or ("mode" if vocabulary.piece(token) in vocabulary.mode_tokens else None))


def test_the_page_shows_shares_lengths_and_fill(page: _Page, seen: Preview) -> None:
    for said in ("text", "pairs", "R-3-15", "useful inputs", f"{seen.useful[0]:.1%}", "median", "packed row"):
        assert said in page.text
    sources = len(seen.tasks[0].parts) + 1
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == len(seen.tasks) + 2 * sources
    bars = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert all(float(bar["height"] or "") > 0 for bar in bars)


TASKS = """
import functools, seqio
from tasks import cleaning, settings
from tasks.preprocessors import Denoise
from vikhr_t5.data.sources import JsonLinesSource, TextSource
rekey = seqio.preprocessors.rekey
seqio.TaskRegistry.add(
    "seen_text",
    source=TextSource({{"train": {text!r}}}),
    preprocessors=[
        cleaning.clean(cleaning.squeeze, functools.partial(cleaning.length_within, min_chars=100)),
        functools.partial(rekey, key_map={{"targets": "text"}}),
        seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), Denoise("ul2"),
    ],
    output_features=settings.output_features(),
)
seqio.TaskRegistry.add(
    "seen_pairs",
    source=JsonLinesSource({{"train": {pairs!r}}}, ["q", "a"]),
    preprocessors=[
        functools.partial(rekey, key_map={{"inputs": "q", "targets": "a"}}),
        seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos,
    ],
    output_features=settings.output_features(),
)
seqio.MixtureRegistry.add("seen_both", ["seen_text", "seen_pairs"], default_rate=1.0)
"""


def test_documents_are_followed_from_their_source(
    documents: list[str], small_vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command, its processes apart: raw text, cleaned, left out with the reason, tokens, the row."""
    evil = "<script>alert(1)</script> & больше"
    text = ["Коротко.", *(f"{document}   \n{evil}" for document in documents)]
    (tmp_path / "a.txt").write_text("\n\n".join(text), encoding="utf-8")
    pairs = [{"q": f"Вопрос {n}: {document[:80]}", "a": document[80:120]} for n, document in enumerate(documents)]
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    module = TASKS.format(text=str(tmp_path / "a.txt"), pairs=str(tmp_path / "a.jsonl"))
    (tmp_path / "tasks_to_see.py").write_text(module, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(preview_raw, "SEARCHED", 5)
    processes = {"vikhr_t5.data.cache": cache, "vikhr_t5.data.preview_raw": preview_raw.follow}
    monkeypatch.setattr(
        seqio_process, "run", lambda module, arguments: json.dumps(processes[module](**arguments), default=str)
    )
    arguments = ["--mixture=seen_both", "--module=tasks_to_see", "--inputs=128", "--targets=60", "-n=1"]
    arguments += [f"--vocabulary={small_vocabulary.sentencepiece_model_file}", "--html=preview.html"]
    monkeypatch.setenv("VIKHR_T5_VOCABULARY", "")  # so that what the command sets is undone
    monkeypatch.setenv("VIKHR_T5_EXTRA_IDS", "")
    assert cli.main(["preview", *arguments]) == 0
    page = _Page(tmp_path / "preview.html")
    assert not [tag for tag, _ in page.tags if tag == "script"]
    for said in (
        "left out: length_within",
        "leaves it out",
        documents[0][:60],
        evil,
        "Вопрос 0: ",
        "clean_squeeze_length_within",
        "the row where it begins",
        f"{len(text)} read",
        f"{len(documents)} kept",
    ):
        assert said in page.text, said
    # The document's tokens follow one another on the page: those of the stage, then those of its row.
    titles = [int(attributes["title"] or "") for _, attributes in page.tags if "title" in attributes]
    answer = [*small_vocabulary.encode(pairs[0]["a"]), small_vocabulary.eos_id]
    found = [start for start in range(len(titles)) if titles[start : start + len(answer)] == answer]
    assert len(found) >= 2


def test_sets_that_examples_name_are_parts_of_their_task(
    write_task: Callable[..., Path], pairs_task: dict, small_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """As in translated FLAN, whose examples bring the name of their set; only the largest are shown one by one."""
    sizes = [n + 1 for n in range(len(pairs_task["inputs"]))]
    sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), len(pairs_task["inputs"])))]
    names = [f"set_{n:02d}" for n, size in enumerate(sizes) for _ in range(size)]
    write_task("named", {side: values[: len(names)] for side, values in pairs_task.items()}, names=names)
    config = DatasetConfig("named", {"inputs": 128, "targets": 60}, "train", 4, cache_dir=str(tmp_path / "cache"))
    seen = gather(config, small_vocabulary, 1)
    (task,) = seen.tasks
    assert [part.name for part in task.parts] == [f"set_{n:02d}" for n in reversed(range(len(sizes)))]
    np.testing.assert_allclose([part.nominal for part in task.parts], np.array(sizes[::-1]) / sum(sizes))
    for part in task.parts:
        assert part.measured == pytest.approx(part.nominal, rel=0.15)
    console = Console(width=100, record=True, file=io.StringIO())
    preview_terminal.show(seen, console)
    preview_html.write(seen, tmp_path / "preview.html")
    for text in (console.export_text(), _Page(tmp_path / "preview.html").text):
        assert f"and {len(sizes) - SHOWN_PARTS} smaller" in text
        assert names[-1] in text
        assert names[0] not in text
