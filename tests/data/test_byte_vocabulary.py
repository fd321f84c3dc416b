"""Bytes as a vocabulary: ByT5's ids, as seqio and transformers give them, and a run on them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vikhr_t5.data import denoisers
from vikhr_t5.data.vocabulary import (
    ByteVocabulary,
    Vocabulary,
    load_vocabulary,
    open_vocabulary,
    train_vocabulary,
    vocabulary_files,
)
from vikhr_t5.errors import UserError

TEXTS = ["", "a", "Ёж e\u0308 \u0000\x7f", "  два  пробела \n", "🙂 👩‍👩‍👧‍👦", "</s><pad>", "漢字", "<extra_id_>"]
WITHOUT_SENTINELS = st.text().filter(lambda text: "<extra_id_" not in text)


def test_the_embedding_of_byt5_has_the_rows_of_its_checkpoints() -> None:
    assert (ByteVocabulary().size, ByteVocabulary().padded_size) == (259, 384)
    assert (ByteVocabulary(125).size, ByteVocabulary(125).padded_size) == (384, 384)


@pytest.mark.parametrize("extra_ids", [0, 7])
def test_ids_are_those_of_seqio(extra_ids: int) -> None:
    seqio = pytest.importorskip("seqio")
    ours, theirs = ByteVocabulary(extra_ids), seqio.ByteVocabulary(extra_ids)
    assert (ours.pad_id, ours.eos_id, ours.unk_id) == (theirs.pad_id, theirs.eos_id, theirs.unk_id)
    assert (ours.size, ours.extra_ids) == (theirs.vocab_size, theirs.extra_ids)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text) == theirs.encode_tf(text).numpy().tolist()
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text
    cut = ours.encode("Ёж")[:-1]
    assert ours.decode(cut) == theirs.decode(cut) == "Ё"


@settings(deadline=None)
@given(text=WITHOUT_SENTINELS)
def test_any_text_without_sentinels_is_its_bytes(text: str) -> None:
    for vocabulary in (ByteVocabulary(), ByteVocabulary(20)):
        assert vocabulary.encode(text) == [byte + 3 for byte in text.encode()]
        assert vocabulary.decode(vocabulary.encode(text)) == text


@settings(deadline=None)
@given(text=WITHOUT_SENTINELS)
def test_ids_are_those_of_transformers(text: str) -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    if not any(token in text for token in ("<pad>", "</s>", "<unk>")):
        assert tokenizer(text).input_ids == [*ByteVocabulary().encode(text), 1]


def test_the_sentinels_of_byt5_are_its_highest_bytes_and_its_padding_rows_are_never_given() -> None:
    """T5's span corruption counts down from `vocab_size - 1`; transformers counts up from what only pads."""
    seqio = pytest.importorskip("seqio")
    vocabulary = ByteVocabulary()
    assert vocabulary.sentinel(0) == vocabulary.first_sentinel == seqio.ByteVocabulary().vocab_size - 1 == 258
    assert (vocabulary.sentinel(99), vocabulary.num_sentinels) == (159, 100)
    with pytest.raises(UserError, match="100 sentinels"):
        vocabulary.sentinel(100)
    assert vocabulary.encode("а <extra_id_0>б<extra_id_10>") == [211, 179, 35, 258, 211, 180, 248]
    assert vocabulary.decode([258, 35, 248, 1, 0]) == "<extra_id_0> <extra_id_10>"
    # 247 is the byte 0xF4, which UTF-8 has: its name stays text.
    assert vocabulary.encode("<extra_id_11>") == [byte + 3 for byte in b"<extra_id_11>"]
    never = {byte for byte in range(256) if all(byte not in chr(code).encode() for code in (0, 0xFF, 0xFFFF, 0x10FFFF))}
    assert {id - 3 for id in range(vocabulary.last_sentinel, 259)} <= never


def test_sentinels_of_their_own_stand_above_the_bytes() -> None:
    vocabulary = ByteVocabulary(20)
    assert (vocabulary.size, vocabulary.first_sentinel, vocabulary.last_sentinel) == (279, 278, 259)
    text = "Москва<extra_id_0> — <extra_id_19><extra_id_20>"
    ids = vocabulary.encode(text)
    assert (ids[12], ids[-14]) == (278, 259)
    assert vocabulary.decode(ids) == text
    with pytest.raises(UserError, match="20 sentinels"):
        vocabulary.sentinel(20)


def test_pieces_to_look_at() -> None:
    vocabulary = ByteVocabulary()
    assert [vocabulary.piece(i) for i in (0, 1, 2, 35, 100, 211, 258)] == (
        ["<pad>", "</s>", "<unk>", "▁", "a", "<0xD0>", "<extra_id_0>"]
    )
    for give in (vocabulary.piece, lambda id: vocabulary.decode([id])):
        with pytest.raises(UserError, match="id 259 is outside the vocabulary of 259"):
            give(259)


def test_it_is_pickled_compared_and_refuses_mode_tokens() -> None:
    vocabulary = ByteVocabulary(5)
    again = pickle.loads(pickle.dumps(vocabulary))
    assert again.fingerprint() == vocabulary.fingerprint() != ByteVocabulary().fingerprint()
    assert again.encode("ё") == vocabulary.encode("ё")
    with pytest.raises(UserError, match="no mode tokens"):
        denoisers.Codes.of(vocabulary, denoisers.mixture("ul2"))
    with pytest.raises(UserError, match="cannot be negative"):
        ByteVocabulary(-1)


def test_corruption_of_bytes_uses_the_sentinels_of_t5x() -> None:
    denoiser = denoisers.Denoiser("byt5", "span", rate=0.15, mean_span=20.0)
    vocabulary = ByteVocabulary()
    codes = denoisers.Codes.of(vocabulary, [denoiser])
    denoisers.check([denoiser], codes, 1024, 300)
    window = denoisers.longest_window(denoiser, 1024, 300)
    tokens = np.array(vocabulary.encode("Откройте документ. " * 99), np.int32)[: window.raw]
    inputs, targets = denoisers.corrupt(tokens, denoiser, window, np.random.default_rng(0), codes)
    found = [id for id in inputs.tolist() if id >= vocabulary.last_sentinel]
    assert found == [258 - i for i in range(window.spans)] == [id for id in targets.tolist() if id in found]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Vocabulary | ByteVocabulary]:
    path = tmp_path_factory.mktemp("kinds") / "a.model"
    pieces = train_vocabulary(["мама мыла раму, а папа пил чай"] * 20, path, 286)
    return {"pieces": pieces, "bytes": ByteVocabulary(), "bytes and sentinels": ByteVocabulary(30)}


@pytest.mark.parametrize("kind", ["pieces", "bytes", "bytes and sentinels"])
def test_a_folder_gives_back_the_vocabulary(kinds, kind: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name, content in vocabulary_files(kinds[kind]).items():
        (tmp_path / name).write_bytes(content)
    again = load_vocabulary(tmp_path)
    assert type(again) is type(kinds[kind])
    assert again.fingerprint() == kinds[kind].fingerprint()
    assert again.encode("мама <extra_id_0>") == kinds[kind].encode("мама <extra_id_0>")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("spiece.model", None, "No such file"),
        ("spiece.model", b"", "is damaged|is not a SentencePiece model"),
        ("vocabulary.json", None, "No such file"),
        ("vocabulary.json", b"{", "is damaged"),
        ("vocabulary.json", b"[]", "is damaged"),
        ("vocabulary.json", b'{"extra_ids": "ten", "fingerprint": ""}', "is damaged"),
        ("vocabulary.json", b'{"extra_ids": 10, "fingerprint": "0"}', "is damaged"),
        ("vocabulary.json", b'{"kind": "bytes", "extra_ids": 10, "fingerprint": "0"}', "is damaged"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(kinds, tmp_path, name: str, content: bytes | None, said: str) -> None:  # type: ignore[no-untyped-def]
    for file, whole in vocabulary_files(kinds["pieces"]).items():
        (tmp_path / file).write_bytes(whole)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_vocabulary(tmp_path)
    assert "\n" not in str(error.value)


def test_the_command_line_names_bytes() -> None:
    assert repr(open_vocabulary("bytes")) == "ByteVocabulary(extra_ids=0)"
    assert repr(open_vocabulary("bytes", 9)) == "ByteVocabulary(extra_ids=9)"
    assert open_vocabulary(ByteVocabulary().source, 9).fingerprint() == ByteVocabulary(9).fingerprint()
    assert repr(open_vocabulary("a.model")) == "Vocabulary('a.model', extra_ids=300)"
