"""Mistral's own tokenizer, extended: against SentencePiece and transformers, on real text and hard strings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hard_strings
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tasks import demo_data
from vikhr_mistral import donor as donors
from vikhr_mistral import merging, pieces, tokenizer, tokenizer_files
from vikhr_t5.data.vocabulary import train_vocabulary
from vikhr_t5.errors import UserError

DATA = Path(demo_data.__path__[0])
HARD = [
    *hard_strings.HARD,
    "[INST] привет [/INST]",
    "def f(x):\n    if x:\n        return\t'да'\n",
    "да" * 300,
    "мамамамамамама и папапапапа",
]
SPACES = [
    before + " " * count + after for count in range(70) for before, after in (("", "слово"), ("а", "№"), ("x", ""))
]
SPECIAL = ["<s>текст</s> и <unk>", "<s>", "до <s> после"]


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    return {name: (DATA / f"{name}.txt").read_text(encoding="utf-8").split("\n") for name in ("ru", "en")}


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, list[str]]) -> Path:
    model = donors.train(corpus["ru"], pieces.open_model("mistral"), 8000)
    path = tmp_path_factory.mktemp("donor") / "donor.model"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def extended(donor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the command writes it, with the config.json of a model, as `init` adds it."""
    folder = tmp_path_factory.mktemp("tokenizer") / "extended"
    tokenizer.extend("mistral", folder, donor=str(donor), texts=[str(DATA / "ru.txt")])
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}))
    return folder


@pytest.fixture(scope="module")
def sp(extended: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(extended / "tokenizer.model"))


@pytest.fixture(scope="module")
def hf(extended: Path) -> Any:
    return AutoTokenizer.from_pretrained(extended)


@pytest.fixture(scope="module")
def mistral() -> sentencepiece.SentencePieceProcessor:
    return pieces.processor(pieces.open_model("mistral"))


def differing(lines: Sequence[str], hf: Any, sp: sentencepiece.SentencePieceProcessor, **options: bool) -> list[str]:
    given = hf(list(lines), add_special_tokens=False, **options).input_ids
    return [line for line, left, right in zip(lines, given, sp.encode(list(lines)), strict=True) if left != right]


def test_the_base_itself_is_written_equal(tmp_path: Path, mistral: Any, corpus: dict[str, list[str]]) -> None:
    tokenizer_files.write(pieces.open_model("mistral"), tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert differing([*HARD, *SPACES, *corpus["ru"][::20], *corpus["en"][::20]], hf, mistral) == []
    assert hf("да").input_ids == [1, *mistral.encode("да")]


def test_english_keeps_its_tokens(sp: Any, mistral: Any, corpus: dict[str, list[str]]) -> None:
    lines = [line for line in corpus["en"] if line and not any("а" <= letter.lower() <= "я" for letter in line)]
    assert len(lines) > 20_000
    assert sp.encode(lines) == mistral.encode(lines)


def test_the_frame_of_the_base_stays(extended: Path) -> None:
    base, model = pieces.open_model("mistral"), pieces.open_model(extended)
    assert [p.SerializeToString() for p in model.pieces[:32000]] == [p.SerializeToString() for p in base.pieces]
    assert model.normalizer_spec == base.normalizer_spec
    assert model.trainer_spec.byte_fallback
    assert model.trainer_spec.vocab_size == len(model.pieces)
    scores = [piece.score for piece in model.pieces[32000:]]
    assert scores == [-31741.0 - place for place in range(len(scores))]


def test_every_new_piece_is_reachable(extended: Path, sp: Any) -> None:
    new = [piece.piece for piece in pieces.open_model(extended).pieces[32000:]]
    assert len(new) > 3000
    for id, piece in enumerate(new, start=32000):
        # Bytes join nothing: after them a piece stands alone, without a space in front.
        text, place = (piece[1:], slice(0, None)) if piece.startswith("▁") else (f"⁂{piece}", slice(-1, None))
        assert sp.encode(text)[place] == [id], piece


def test_what_is_left_out_comes_out_of_no_text(donor: Path, sp: Any, corpus: dict[str, list[str]]) -> None:
    """With the unreachable pieces in the model every line has the same tokens."""
    base, other = pieces.open_model("mistral"), pieces.open_model(donor)
    merged = merging.merge(base, other)
    assert len(merged.unreachable) > 100
    everything = [*merged.added, *merged.unreachable]
    assert len(everything) == merged.candidates
    scores = pieces.normal(other)
    everything.sort(key=lambda piece: (len(piece) > 1, -scores[piece]))
    for place, piece in enumerate(everything):
        base.pieces.add(piece=piece, score=-31741.0 - place)
    whole = pieces.processor(base)
    lines = [*corpus["ru"], *HARD]
    assert whole.encode(lines, out_type=str) == sp.encode(lines, out_type=str)


def test_pieces_are_of_the_script_with_their_space(extended: Path) -> None:
    new = [piece.piece for piece in pieces.open_model(extended).pieces[32000:]]
    assert all(letter in "▁ёЁ" or "А" <= letter <= "я" for piece in new for letter in piece)
    assert sum(piece.startswith("▁") for piece in new) > 1000
    assert sum("ё" in piece for piece in new) > 3


def test_tokenizer_json_agrees_on_a_part_of_both_corpora(hf: Any, sp: Any, corpus: dict[str, list[str]]) -> None:
    assert hf.is_fast
    assert differing([*corpus["ru"][::5], *corpus["en"][::5]], hf, sp) == []


@pytest.mark.slow
def test_tokenizer_json_agrees_on_every_line(hf: Any, sp: Any, corpus: dict[str, list[str]]) -> None:
    lines = [*corpus["ru"], *corpus["en"]]
    assert differing(lines, hf, sp) == []
    assert differing(["\n".join(lines)], hf, sp) == []  # as one text


def test_tokenizer_json_agrees_on_hard_strings(hf: Any, sp: Any) -> None:
    assert differing([*HARD, "▁ уже ▁▁ подчёркнуто ▁", *SPACES], hf, sp) == []


def test_special_tokens_in_a_text(hf: Any, sp: Any) -> None:
    """They are themselves where chat templates need it, and text where `split_special_tokens` asks for that."""
    assert differing(SPECIAL, hf, sp, split_special_tokens=True) == []
    assert hf("<s>да</s>", add_special_tokens=False).input_ids == [1, *sp.encode("да"), 2]
    assert hf("да").input_ids == [1, *sp.encode("да")]
    assert hf("да", "нет").input_ids == [1, *sp.encode("да"), 1, *sp.encode("нет")]
    assert (hf.bos_token_id, hf.eos_token_id, hf.unk_token_id) == (1, 2, 0)


def test_texts_come_back(hf: Any, sp: Any, corpus: dict[str, list[str]]) -> None:
    lines = [*HARD, *SPACES, *corpus["ru"][::5], *corpus["en"][::5]]
    assert sp.decode(sp.encode(lines)) == lines
    assert hf.batch_decode(sp.encode(lines)) == lines


def test_saved_again_by_transformers(hf: Any, sp: Any, tmp_path: Path) -> None:
    hf.save_pretrained(tmp_path)
    assert differing([*HARD, *SPACES], AutoTokenizer.from_pretrained(tmp_path), sp) == []


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.one_of(
            st.sampled_from([" ", "  ", "\n", "▁", "при", "мама", "ёл", "ка", "The ", "№", "я", "файл"]),
            st.characters(codec="utf-8", exclude_categories=("Cs",)),
        ),
        max_size=12,
    )
)
@example(parts=["мам", "а", "мам"])
def test_any_text(hf: Any, sp: Any, parts: list[str]) -> None:
    text = "".join(parts)
    assert hf(text, add_special_tokens=False).input_ids == sp.encode(text)
    if "▁" not in text:
        assert sp.decode(sp.encode(text)) == hf.decode(sp.encode(text)) == text


def test_the_report_says_what_holds(extended: Path, sp: Any, mistral: Any, corpus: dict[str, list[str]]) -> None:
    report = json.loads((extended / "report.json").read_text())
    assert (report["size"], report["added"]) == (sp.vocab_size(), sp.vocab_size() - 32000)
    assert report["padded_size"] % 64 == 0
    assert 0 <= report["padded_size"] - report["size"] < 64
    for check in ("unchanged", "tokenizer_json", "round_trip", "round_trip_tokenizer_json"):
        assert report[check]["equal"] == report[check]["lines"] > 20_000, check
    lines = [line for line in corpus["ru"] if line]
    russian = [line for line in lines if sum("а" <= c <= "ё" for c in line.lower()) * 2 > sum(map(str.isalpha, line))]
    words = sum(len(line.split()) for line in russian)
    for key, model in (("before", mistral), ("after", sp)):
        assert report["text"][key]["words"] == words
        assert report["text"][key]["tokens"] == sum(map(len, model.encode(russian)))
    assert report["text"]["after"]["tokens"] < 0.65 * report["text"]["before"]["tokens"]
    assert "base" in (extended / "fertility.html").read_text()
    assert (extended / "fertility.png").read_bytes()[:4] == b"\x89PNG"


def test_the_size_is_met_with_the_next_reachable_pieces(donor: Path) -> None:
    base, other = pieces.open_model("mistral"), pieces.open_model(donor)
    merged = merging.merge(base, other, size=33024)
    assert len(merged.model.pieces) == 33024 == merging.padded_size(33024)
    assert all(pieces.reachable(merged.model, merged.added))
    with pytest.raises(UserError, match=r"too few pieces: .* --size 45,000 asks for 13,000"):
        merging.merge(base, other, size=45000)


def test_joint_order_reads_the_script_as_the_donor_does(
    donor: Path, mistral: Any, sp: Any, tmp_path: Path, corpus: dict[str, list[str]]
) -> None:
    base, other = pieces.open_model("mistral"), pieces.open_model(donor)
    merged = merging.merge(base, other, "joint")
    assert len(merged.unreachable) < 0.002 * merged.candidates
    assert all(pieces.reachable(merged.model, merged.added))
    for old, new in zip(base.pieces, merged.model.pieces, strict=False):
        assert (old.piece, old.type) == (new.piece, new.type)
        assert old.score == new.score or pieces.in_script(old.piece, "cyrillic")
    joint, theirs = pieces.processor(merged.model), pieces.processor(other)
    english = [line for line in corpus["en"] if not any("а" <= letter.lower() <= "я" for letter in line)]
    assert joint.encode(english) == mistral.encode(english)
    words = [word for line in corpus["ru"][::9] for word in line.split() if pieces.in_script(word, "cyrillic")]
    same = [joint.encode(word, out_type=str) == theirs.encode(word, out_type=str) for word in words]
    assert sum(same) > 0.99 * len(words) > 10_000
    lines = corpus["ru"][::9]
    assert sum(map(len, joint.encode(lines))) < 0.95 * sum(map(len, sp.encode(lines)))
    tokenizer_files.write(merged.model, tmp_path)
    assert differing([*corpus["ru"][::9], *HARD], AutoTokenizer.from_pretrained(tmp_path), joint) == []


def test_append_scores_zero_and_loses_pieces(donor: Path) -> None:
    merged = merging.merge(pieces.open_model("mistral"), pieces.open_model(donor), "append")
    assert {piece.score for piece in merged.model.pieces[32000:]} == {0.0}
    assert len(merged.added) == merged.candidates
    assert len(merged.unreachable) > 0.1 * merged.candidates


def test_replacement_is_the_donor_in_the_frame_of_the_base(donor: Path, corpus: dict[str, list[str]]) -> None:
    base, other = pieces.open_model("mistral"), pieces.open_model(donor)
    merged = merging.merge(base, other, "replacement")
    kept = [piece for piece in base.pieces if piece.type != pieces.NORMAL or not piece.piece.strip("▁")]
    assert [piece.piece for piece in merged.model.pieces[: len(kept)]] == [piece.piece for piece in kept]
    assert len(merged.model.pieces) < len(other.pieces) + 20
    words = [word for line in corpus["ru"][::9] for word in line.split()]
    ours, theirs = pieces.processor(merged.model), pieces.processor(other)
    assert ours.encode(words, out_type=str) == theirs.encode(words, out_type=str)


def _donor(*new: str) -> Any:
    """A donor of given pieces, those of the highest score first."""
    model = pieces.open_model("mistral")
    del model.pieces[259:]
    for place, piece in enumerate(new):
        model.pieces.add(piece=piece, score=-float(place))
    return model


def test_letters_that_the_base_lacks_come_first() -> None:
    """A donor has its letters last, and without one of them `tokenizers` would read bytes in place of a piece."""
    base = pieces.open_model("mistral")
    assert not {"ꙮ", "ꙁ"} & pieces.normal(base).keys()
    merged = merging.merge(base, _donor("▁ꙮ", "▁ꙮк", "▁ꙁ", "ꙮ"), size=32002)
    assert merged.added == ("ꙮ", "▁ꙮ")
    assert merging.merge(base, _donor("▁ꙮ", "▁ꙮк", "▁ꙁ", "ꙮ")).added == ("ꙮ", "▁ꙮ", "▁ꙮк")


def test_other_scripts() -> None:
    new = _donor("▁ქართ", "ულ", "▁слово", "ქართ", "ქა", "▁ქა", "▁ქარ", "ქარ", "რთ", "და,", "word")
    added = set(merging.merge(pieces.open_model("mistral"), new, script="georgian").added)
    assert "▁ქა" in added
    assert not added & {"▁слово", "word", "და,"}
    with pytest.raises(UserError, match="script 'cyrilic' is not known to Unicode; nearest: cyrillic"):
        merging.merge(pieces.open_model("mistral"), new, script="cyrilic")
    with pytest.raises(UserError, match="0 in greek letters that the base lacks can be used, and none to add"):
        merging.merge(pieces.open_model("mistral"), new, script="greek")


def test_a_unigram_donor_is_refused_with_the_reason(tmp_path: Path, corpus: dict[str, list[str]]) -> None:
    train_vocabulary(corpus["ru"][:2000], tmp_path / "unigram.model", 1000)
    with pytest.raises(UserError, match=r"unigram\.model is a unigram model .* more than half .* --model_type=bpe"):
        tokenizer.extend("mistral", tmp_path / "out", donor=str(tmp_path / "unigram.model"))
    with pytest.raises(UserError, match="is a UNIGRAM model: only BPE can be extended"):
        tokenizer.extend(str(tmp_path / "unigram.model"), tmp_path / "out", donor=str(tmp_path / "unigram.model"))
    assert not (tmp_path / "out").exists()


def test_a_base_that_changes_text_is_refused(tmp_path: Path, donor: Path, corpus: dict[str, list[str]]) -> None:
    train_vocabulary(corpus["ru"][:2000], tmp_path / "nfkc.model", 1000, "bpe")
    with pytest.raises(UserError, match="changes characters"):
        tokenizer.extend(str(tmp_path / "nfkc.model"), tmp_path / "out", donor=str(donor))


def test_bad_arguments_and_files(tmp_path: Path, donor: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("give one of: a corpus or a task", {}),
        ("give one of: a corpus or a task", {"corpus": ["a.txt"], "donor": str(donor)}),
        ("strategy 'tial' is not known; nearest: tail", {"donor": str(donor), "strategy": "tial"}),
        ("no such file", {"corpus": [str(tmp_path / "none.txt")]}),
        ("No such file", {"donor": str(tmp_path / "none.model")}),
        ("cannot train a donor of 50,000 pieces on this text", {"corpus": [str(tmp_path / "short.txt")]}),
        ("no text to train a donor on", {"corpus": [str(tmp_path / "blank.txt")]}),
        ("is not a SentencePiece model", {"donor": str(tmp_path / "short.txt")}),
        ("latin.txt:3: cannot be read", {"corpus": [str(tmp_path / "latin.txt")]}),
    ]
    (tmp_path / "short.txt").write_text("Одна строка.\n")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("Строка.\n\n".encode() + "плохо\n".encode("cp1251"))
    for message, arguments in cases:
        with pytest.raises(UserError, match=message):
            tokenizer.extend("mistral", tmp_path / "out", **arguments)
    content = donor.read_bytes()
    (tmp_path / "cut.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.model is not a SentencePiece model, or not whole"):
        tokenizer.extend("mistral", tmp_path / "out", donor=str(tmp_path / "cut.model"))
    with pytest.raises(UserError, match="is not empty, and this command did not write it"):
        tokenizer.extend("mistral", tmp_path, donor=str(donor))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_donor_from_a_task(tmp_path: Path) -> None:
    made = tokenizer.extend("mistral", tmp_path / "out", task="demo_ul2", module="tasks.demo", donor_size=4000)
    assert made["added"] > 1000
    assert made["tokenizer_json"]["equal"] == made["tokenizer_json"]["lines"]
