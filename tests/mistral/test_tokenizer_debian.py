"""The proof on real text: Debian's Russian documentation and the embedded pages, 20,000 pieces and more."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks import debian_text
from tasks import demo_data
from vikhr_mistral import pieces, tokenizer

DATA = Path(demo_data.__path__[0])
HELD_OUT = ("debian-handbook", "developers-reference-ru")  # books by other authors, on other subjects
TRAINED = (
    "manpages-ru",
    "gnome-user-docs",
    "gimp-help-ru",
    "aptitude-doc-ru",
    "debian-faq-ru",
    "maint-guide-ru",
    "kicad-doc-ru",
    "doublecmd-help-ru",
    "libreoffice-help-ru",
    "installation-guide-amd64",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Files of each package's Russian pages; skipped where there is no Debian mirror."""
    folder = tmp_path_factory.mktemp("debian")

    def files(packages: tuple[str, ...]) -> Iterator[str]:
        for package in packages:
            try:
                pages = debian_text.fetch(package, "ru")
            except OSError as error:
                pytest.skip(f"Debian's packages cannot be fetched: {error}")
            with open(folder / f"{package}.jsonl", "w", encoding="utf-8") as out:
                out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _, text in pages)
            yield out.name

    return {"trained": [*files(TRAINED), str(DATA / "ru.txt")], "held_out": list(files(HELD_OUT))}


@pytest.mark.parametrize(("strategy", "at_most"), [("tail", 0.65), ("joint", 0.58)])
def test_twenty_thousand_pieces(corpora: dict[str, list[str]], tmp_path: Path, strategy: str, at_most: float) -> None:
    out = tmp_path / "out"
    report = tokenizer.extend(
        "mistral", out, corpus=corpora["trained"], texts=corpora["held_out"], donor_size=50_000, strategy=strategy
    )
    assert report["added"] >= 20_000
    assert report["reachable"] >= 0.98 * report["added"]
    assert report["unchanged"]["equal"] == report["unchanged"]["lines"] >= 5_000
    before, after = report["text"]["before"], report["text"]["after"]
    assert before["words"] == after["words"] > 50_000
    assert after["tokens"] / before["tokens"] <= at_most

    (out / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    sp, hf = pieces.processor(pieces.open_model(out)), AutoTokenizer.from_pretrained(out)
    for lines in _lines(corpora["held_out"]):
        ids: Any = sp.EncodeAsIds(lines)
        assert hf(lines, add_special_tokens=False, split_special_tokens=True).input_ids == ids
        assert sp.DecodeIds(ids) == hf.batch_decode(ids) == lines


def _lines(files: list[str]) -> Iterator[list[str]]:
    """Lines of each page, and each page as one text; U+2581 means a space to SentencePiece."""
    for file in [*files, str(DATA / "ru.txt"), str(DATA / "en.txt")]:
        for line in Path(file).read_text(encoding="utf-8").split("\n"):
            text = json.loads(line)["text"] if file.endswith(".jsonl") and line else line
            if text and "▁" not in text:
                yield [*text.split("\n"), text]
