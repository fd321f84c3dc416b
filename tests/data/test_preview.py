import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from vikhr_t5.data.pipeline import DatasetConfig, open_dataset
from vikhr_t5.data.preview import SENTINEL, preview
from vikhr_t5.data.vocabulary import Vocabulary


@pytest.fixture
def shown(
    write_task: Callable[..., Path], text_task: dict, pairs_task: dict, small_vocabulary: Vocabulary, tmp_path: Path
) -> tuple[Console, DatasetConfig]:
    write_task("text", text_task, mixture="ul2")
    write_task("pairs", pairs_task)
    write_task.mixture("both", {"text": 1.0, "pairs": 1.0})  # type: ignore[attr-defined]
    config = DatasetConfig("both", {"inputs": 128, "targets": 60}, "train", 4, cache_dir=str(tmp_path / "cache"))
    console = Console(width=100, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    preview(config, small_vocabulary, 4, console)
    return console, config


def test_rows_are_shown_at_every_stage(shown: tuple[Console, DatasetConfig], small_vocabulary: Vocabulary) -> None:
    console, config = shown
    text = console.export_text(clear=False)
    assert max(len(line) for line in text.splitlines()) <= 100
    dataset = open_dataset(config, small_vocabulary)
    for place in range(4):
        task, segments = dataset.segments(place)
        assert f"row {place} of train: {task}, {len(segments)} segments" in text
        for number, segment in enumerate(segments, 1):
            name = "example" if segment.denoiser is None else segment.denoiser.name
            assert f"segment {number}: {name}" in text
            first = small_vocabulary.decode((segment.inputs if segment.text is None else segment.text)[:4].tolist())
            assert first in text  # readable, not only as pieces
    for token in ("<0>", "[NLU]", "</s>", "packed row"):
        assert token in text
    styled = console.export_text(styles=True, clear=False)
    assert "\x1b[1;30;43m<0>" in styled, f"sentinels are not shown as {SENTINEL}"


def test_the_table_gives_shares_and_fill(shown: tuple[Console, DatasetConfig]) -> None:
    text = shown[0].export_text(clear=False)
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in text.splitlines()
        if line.startswith("│")
    }
    assert {"text", "pairs", "R-3-15", "S-25"} <= set(cells)
    for nominal, measured, *_ in cells.values():
        assert float(measured.rstrip("%")) == pytest.approx(float(nominal.rstrip("%")), rel=0.03)
    for note in ("inputs 128:", "targets 60:", "as full as inputs of 128"):
        assert note in text
