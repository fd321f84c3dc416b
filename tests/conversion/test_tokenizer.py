"""tokenizer.json beside the SentencePiece model: the same ids on the whole embedded corpus and on hard strings."""

import itertools
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import hard_strings
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from conversion import charsmap, tokenizer, tokenizer_json
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError

HARD = [
    *hard_strings.HARD,
    "▁ уже ▁▁ подчёркнуто ▁",
    "<extra_id_0> начало, середина <extra_id_1> и конец <extra_id_299>",
    "<extra_id_7>",
    "  <extra_id_7>  <extra_id_8>да <extra_id_9>.",
    "<extra_id_300> <extra_id_> <extra_id_01> <EXTRA_ID_1>",
    "[NLU]",
    " \t[S2S]\n",
    "<SC1> <LM>",
    "[NLU] понять",
    "дальше [S2S] и <LM>, <SC1><SC6>",
    " [NLG]слитно<SC2>с <extra_id_3> текстом [NLU] ",
    "[NLU][NLU] [nlu]",
    "Москва (<extra_id_0>) — столица; Россия<extra_id_1>.",
    "<extra_id_0><extra_id_1> <<extra_id_2> <extra_id_3>>",
    " <extra_id_4>слитно\t<extra_id_5>\n\n<extra_id_6><",
]


@pytest.fixture(scope="module")
def folder(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported")
    tokenizer.write(vocabulary, path)
    # What AutoTokenizer asks of a model folder.
    (path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    return path


@pytest.fixture(scope="module")
def exported(folder: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(folder)


def _assert_same_ids(exported: AutoTokenizer, vocabulary: Vocabulary, texts: list[str]) -> None:
    for text, ids in zip(texts, exported(texts).input_ids, strict=True):
        assert ids == [*vocabulary.encode(text), vocabulary.eos_id], text


def test_every_ninth_line_of_the_corpus(exported: AutoTokenizer, vocabulary: Vocabulary, corpus: list[str]) -> None:
    _assert_same_ids(exported, vocabulary, corpus[::9])


@pytest.mark.slow
def test_every_line_of_the_corpus(exported: AutoTokenizer, vocabulary: Vocabulary, corpus: list[str]) -> None:
    _assert_same_ids(exported, vocabulary, corpus)


@pytest.mark.slow
def test_long_texts_of_the_corpus(exported: AutoTokenizer, vocabulary: Vocabulary, corpus: list[str]) -> None:
    """SentencePiece adds scores up over the whole text in float32, which decides near ties beyond some 30,000 letters
    (a Unigram model's prefix score of 32,768 has steps of 0.004)."""
    whole = " ".join(corpus)
    _assert_same_ids(exported, vocabulary, [whole[start : start + 8000] for start in range(0, len(whole), 8000)])


@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_hard_strings(exported: AutoTokenizer, vocabulary: Vocabulary, text: str) -> None:
    assert exported(text).input_ids == [*vocabulary.encode(text), vocabulary.eos_id]


def test_decoding(exported: AutoTokenizer, vocabulary: Vocabulary, corpus: list[str]) -> None:
    space, word = vocabulary.encode("я ⁂")[-4:-3], vocabulary.encode("в")
    for ids in [*map(vocabulary.encode, [*corpus[::50], *HARD]), [*space, *space, *word], [*word, *space]]:
        assert exported.decode(ids).replace("<unk>", " ⁇ ") == vocabulary.decode(ids)
        if vocabulary.unk_id in ids:
            continue  # transformers writes and reads it as a token
        assert exported(exported.decode(ids)).input_ids[:-1] == vocabulary.encode(vocabulary.decode(ids))


def test_sentinels_and_mode_tokens(exported: AutoTokenizer, vocabulary: Vocabulary) -> None:
    assert len(exported) == vocabulary.size
    assert exported.convert_tokens_to_ids("<extra_id_0>") == vocabulary.size - 1 == max(exported.get_vocab().values())
    assert exported.convert_tokens_to_ids("<extra_id_299>") == vocabulary.sentinel(299)
    for name in vocabulary.mode_tokens:
        assert exported.convert_tokens_to_ids(name) == vocabulary.mode_id(name)
    assert (exported.pad_token_id, exported.eos_token_id, exported.unk_token_id) == (0, 1, 2)
    named = ["<pad>", "</s>", "<unk>", *vocabulary.mode_tokens, *(f"<extra_id_{i}>" for i in range(300))]
    assert sorted(exported.all_special_tokens) == sorted(named)
    ids = [vocabulary.mode_id("[NLU]"), *vocabulary.encode("Это <extra_id_0> так."), 1, 0, 0]
    assert exported.decode(ids, skip_special_tokens=True) == "Это так."


def test_a_sentinel_without_a_space_before_it_is_text(exported: AutoTokenizer, vocabulary: Vocabulary) -> None:
    glued, apart = "Москва-<extra_id_0>", "Москва- <extra_id_0>"
    assert vocabulary.sentinel(0) not in exported(glued).input_ids
    assert vocabulary.sentinel(0) in exported(apart).input_ids
    assert exported(glued).input_ids == [*vocabulary.encode(glued), vocabulary.eos_id]


def test_saved_again_by_transformers(exported: AutoTokenizer, tmp_path: Path) -> None:
    exported.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(HARD).input_ids == exported(HARD).input_ids


def test_a_pair_of_texts_ends_twice(exported: AutoTokenizer, vocabulary: Vocabulary) -> None:
    first, second = vocabulary.encode("первый"), vocabulary.encode("второй")
    assert exported("первый", "второй").input_ids == [*first, 1, *second, 1]


MARKS = [chr(code) for code in (*range(0x300, 0x30D), 0x31B, 0x323, 0x327, 0x328, 0x338, 0x345, 0x20DD, 0x3099)]
TOKENS = [
    " <extra_id_0>",
    "<extra_id_7>",
    " <extra_id_299>",
    "[NLU]",
    " [NLG]",
    " [S2S] ",
    "<SC1>",
    " <LM>",
    "<0x41>",
    " ",
    "  ",
    "\n",
]


def _pieces() -> st.SearchStrategy[str]:
    known = st.characters(codec="utf-8", exclude_categories=("Cs", "Cn", "Co"))
    decomposed = st.sampled_from("ёйЁЙéấềộšçñöå한국").map(lambda c: unicodedata.normalize("NFD", c))
    words = st.sampled_from(["файл", "Ёлка", "щёлкнуть", "—", "«да»", "LibreOffice", "½", "ﬁ", "№"])
    return st.one_of(words, st.sampled_from(TOKENS), st.sampled_from(MARKS), decomposed, known)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(_pieces(), max_size=10))
@example(parts=["[NLU]", "\x1b"])
def test_any_text(exported: AutoTokenizer, vocabulary: Vocabulary, parts: list[str]) -> None:
    text = "".join(parts)
    if ">\u0338" in text:
        return  # the mark would join the sign that ends a sentinel
    assert exported(text).input_ids == [*vocabulary.encode(text), vocabulary.eos_id]


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf"])
def test_character_maps(rule: str) -> None:
    """Each single code point, longer sources of the map, and the hard strings; spaces are squeezed by a later step."""
    model = proto.ModelProto()
    theirs = sentencepiece.SentencePieceNormalizer(rule_name=rule)
    model.ParseFromString(theirs.serialized_model_proto())
    ours = _normalizer(charsmap.normalizers(model))
    longer = [source for source, _ in theirs.Decompile() if len(source) > 1 and ord(max(source)) < 0x10000]
    if rule.endswith("_cf"):  # see conversion/charsmap.py
        longer = [source for source in longer if "\u0345" not in source and "\u0307" not in source]
    never_text = (*range(0xD800, 0xE000), *range(0xFDD0, 0xFDF0))
    texts = [chr(code) for code in range(1, 0x30000) if code not in never_text] + longer[::7] + HARD
    assert [text for text in texts if _squeezed(ours(text)) != _squeezed(theirs.Normalize(text))] == []


def _squeezed(text: str) -> str:
    return re.sub(" +", " ", text)


def _normalizer(steps: Sequence[dict]):  # type: ignore[no-untyped-def]
    whole = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    whole["normalizer"] = {"type": "Sequence", "normalizers": list(steps)}
    return Tokenizer.from_str(json.dumps(whole)).normalizer.normalize_str


def test_segmentations_of_one_score_are_decided_alike(unigram: Vocabulary, tmp_path: Path) -> None:
    """Scores are sums of quarters, exact in both libraries: of equally good segmentations both take the same one."""
    model = proto.ModelProto.FromString(unigram.model_bytes)
    del model.pieces[unigram.size - unigram.extra_ids :]
    kept = [piece for piece in model.pieces if piece.type != proto.ModelProto.SentencePiece.NORMAL]
    del model.pieces[:]
    model.pieces.extend(kept)
    letters = "абв"
    words = ["".join(word) for length in (1, 2, 3) for word in itertools.product(letters, repeat=length)]
    for place, piece in enumerate(["▁", *words]):
        model.pieces.add(piece=piece, score=-1 - len(piece) / 2 - place % 2 / 4)
    (tmp_path / "spiece.model").write_bytes(model.SerializeToString())
    vocabulary = Vocabulary(str(tmp_path / "spiece.model"), 10)
    ours = Tokenizer.from_str(json.dumps(tokenizer_json.tokenizer_json(vocabulary)))
    texts = ["".join(word) for length in range(1, 9) for word in itertools.product(letters, repeat=length)]
    scores = {piece.piece: piece.score for piece in model.pieces}
    tied = 0
    for text in texts:
        assert ours.encode(text).ids[:-1] == vocabulary.encode(text), text
        best = _best_scores(f"▁{text}", scores)
        tied += best[0] == best[1]
    assert tied > len(texts) / 3


def _best_scores(text: str, scores: dict[str, float]) -> list[float]:
    """The scores of the two best segmentations of a text."""
    best: list[list[float]] = [[0.0]]
    for end in range(1, len(text) + 1):
        starts = [start for start in range(max(0, end - 3), end) if text[start:end] in scores]
        found = [before + scores[text[start:end]] for start in starts for before in best[start]]
        best.append(sorted(found, reverse=True)[:2])
    return [*best[-1], float("-inf")][:2]


@pytest.mark.parametrize("setting", ["precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces"])
def test_other_settings_of_sentencepiece(vocabulary: Vocabulary, tmp_path: Path, setting: str) -> None:
    model = proto.ModelProto.FromString(vocabulary.model_bytes)
    setattr(model.normalizer_spec, setting, b"" if setting == "precompiled_charsmap" else False)
    (tmp_path / "spiece.model").write_bytes(model.SerializeToString())
    changed = Vocabulary(str(tmp_path / "spiece.model"), 300)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json.tokenizer_json(changed)))
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in HARD:
        if setting == "add_dummy_prefix" and text.lstrip().startswith(("<extra_id_", *changed.mode_tokens)):
            continue  # one without a space before it
        assert ours.encode(text).ids[:-1] == changed.encode(text), text
        decoded = ours.decode(changed.encode(text), skip_special_tokens=False)
        assert decoded.replace("<unk>", " ⁇ ") == changed.decode(changed.encode(text))


def test_mode_tokens_whose_pieces_have_no_space(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """As SentencePiece's own trainer makes them: found inside a word as well."""
    model = proto.ModelProto.FromString(vocabulary.model_bytes)
    for piece in model.pieces:
        if piece.type == proto.ModelProto.SentencePiece.USER_DEFINED:
            piece.piece = piece.piece.removeprefix("▁")
    (tmp_path / "bare.model").write_bytes(model.SerializeToString())
    bare = Vocabulary(str(tmp_path / "bare.model"), 300)
    assert bare.mode_tokens == vocabulary.mode_tokens
    assert bare.mode_id("[NLU]") == vocabulary.mode_id("[NLU]")
    ours = Tokenizer.from_str(json.dumps(tokenizer_json.tokenizer_json(bare)))
    for text in HARD:
        if text.strip() != "<extra_id_7>" and vocabulary.encode(text) not in [
            [bare.mode_id(m)] for m in bare.mode_tokens
        ]:
            assert ours.encode(text).ids[:-1] == bare.encode(text), text
    assert ours.encode("что[NLU]понять").ids[:-1].count(bare.mode_id("[NLU]")) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: setattr(model.trainer_spec, "model_type", proto.TrainerSpec.WORD), "WORD"),
        (lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False), "escape_whitespaces"),
        (lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True), "treat_whitespace_as_suffix"),
    ],
)
def test_what_cannot_be_written_is_refused(unigram: Vocabulary, tmp_path: Path, change, named: str) -> None:  # type: ignore[no-untyped-def]
    model = proto.ModelProto.FromString(unigram.model_bytes)
    change(model)
    (tmp_path / "a.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=named):
        tokenizer_json.tokenizer_json(Vocabulary(str(tmp_path / "a.model"), 10))


def test_rules_of_its_own_are_refused(unigram: Vocabulary) -> None:
    own = sentencepiece.SentencePieceNormalizer(norm_map=[("км", "километр"), ("a", "b")])
    with pytest.raises(UserError, match="'км' -> 'километр'"):
        charsmap.normalizers(proto.ModelProto.FromString(own.serialized_model_proto()))
