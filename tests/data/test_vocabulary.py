"""The vocabulary against seqio's on real Russian text; training; and what is refused."""

import copy
import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from vikhr_t5.data.denoisers import Codes, mixture
from vikhr_t5.data.vocabulary import DEFAULT_MODE_TOKENS, Vocabulary, train_vocabulary
from vikhr_t5.errors import UserError

RUSSIAN = Path(__file__).parents[2] / "tasks" / "demo_data" / "ru.txt"
LINES = [line for line in RUSSIAN.read_text(encoding="utf-8").splitlines() if line][:6000]
SIZE = 2020  # with 300 sentinels no multiple of 128


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return train_vocabulary(LINES, tmp_path_factory.mktemp("vocabulary") / "ru.model", SIZE)


# ---- layout ----------------------------------------------------------------------------------------------------------


def test_the_order_of_ids(vocabulary: Vocabulary) -> None:
    pieces = [vocabulary.piece(i) for i in range(vocabulary.size)]
    assert pieces[:3] == ["<pad>", "</s>", "<unk>"]
    assert tuple(pieces[3:13]) == DEFAULT_MODE_TOKENS == vocabulary.mode_tokens
    assert pieces[13:269] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert pieces[SIZE:] == [f"<extra_id_{i}>" for i in reversed(range(300))]
    assert len(set(pieces)) == len(pieces)


def test_sizes_and_sentinels(vocabulary: Vocabulary) -> None:
    assert vocabulary.size == SIZE + 300
    assert vocabulary.padded_size == 2432 == 19 * 128
    assert Vocabulary(vocabulary.sentencepiece_model_file, extra_ids=28).padded_size == 2048
    assert [vocabulary.sentinel(i) for i in (0, 1, 299)] == [2319, 2318, 2020]
    assert vocabulary.first_sentinel == vocabulary.sentinel(0) == vocabulary.size - 1


def test_sentinels_mode_tokens_and_text_never_collide(vocabulary: Vocabulary) -> None:
    denoisers = (*mixture("ul2"), *mixture("fred"))
    codes = Codes.of(vocabulary, denoisers)
    sentinels, modes = set(codes.sentinels.tolist()), set(codes.modes.values())
    text = {token for line in LINES for token in vocabulary.encode(line)}
    assert codes.sentinels.tolist() == [vocabulary.sentinel(i) for i in range(300)]
    assert set(codes.modes) == set(DEFAULT_MODE_TOKENS)
    assert len(modes) == len(DEFAULT_MODE_TOKENS)
    assert len(sentinels | modes | text) == len(sentinels) + len(modes) + len(text)
    assert max(text) < min(sentinels)


def test_against_seqio(vocabulary: Vocabulary) -> None:
    seqio = pytest.importorskip("seqio")
    theirs = seqio.SentencePieceVocabulary(vocabulary.sentencepiece_model_file, extra_ids=300)
    assert theirs.vocab_size == vocabulary.size
    assert (theirs.pad_id, theirs.eos_id, theirs.unk_id) == (0, 1, 2)
    samples = [*LINES[:1000], "[NLU] Текст <extra_id_0> и <extra_id_17>.", "<extra_id_299> 漢字 🙂 ё"]
    for line, tensor in zip(samples, (theirs.encode_tf(samples)), strict=True):
        assert vocabulary.encode(line) == theirs.encode(line) == tensor.numpy().tolist()
        assert vocabulary.decode(theirs.encode(line)) == theirs.decode(theirs.encode(line))
    for i in range(300):
        assert theirs.tokenizer.PieceToId(f"▁<extra_id_{i}>") == vocabulary.sentinel(i)


# ---- text ------------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40))
def test_no_text_is_unknown_or_off_the_vocabulary(vocabulary: Vocabulary, text: str) -> None:
    ids = vocabulary.encode(text)
    assert all(2 < token < SIZE for token in ids)
    assert vocabulary.encode(vocabulary.decode(ids)) == ids


def test_text_comes_back(vocabulary: Vocabulary) -> None:
    for line in LINES[:300]:
        assert vocabulary.decode(vocabulary.encode(line)) == sentencepiece.SentencePieceNormalizer(
            rule_name="nmt_nfkc", escape_whitespaces=False, remove_extra_whitespaces=True
        ).Normalize(line)


def test_decoding_shows_sentinels_and_drops_padding_and_eos(vocabulary: Vocabulary) -> None:
    ids = [*vocabulary.encode("Файл"), vocabulary.sentinel(0), *vocabulary.encode("открыт"), 1, 0, 0]
    assert vocabulary.decode(ids) == "Файл <extra_id_0> открыт"
    assert vocabulary.encode("Файл <extra_id_0> открыт") == ids[:-3]
    for outside in (vocabulary.size, vocabulary.padded_size - 1, -1):  # rows of padding are never text
        with pytest.raises(UserError, match=f"id {outside} is outside the vocabulary of 2320"):
            vocabulary.decode([5, outside])
        with pytest.raises(UserError, match=f"id {outside} is outside"):
            vocabulary.piece(outside)


def test_digits_are_split_and_mode_tokens_whole(vocabulary: Vocabulary) -> None:
    assert [vocabulary.piece(i) for i in vocabulary.encode("в 2024")][-4:] == list("2024")
    for text in ("[S2S]", "[S2S] слово", "слово [S2S] слово"):
        assert vocabulary.encode(text).count(vocabulary.mode_id("[S2S]")) == 1
    assert vocabulary.encode("[S2S]") == [vocabulary.mode_id("[S2S]")]
    assert vocabulary.mode_id("[S2S]") not in vocabulary.encode("слово[S2S]слово")


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_the_same_text_gives_the_same_bytes(tmp_path: Path, model_type: str) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(LINES[:2000]), encoding="utf-8")
    models = [
        train_vocabulary(texts, tmp_path / name, 1000, model_type, max_lines=1000, seed=seed).model_bytes
        for name, texts, seed in (("a", LINES[:2000], 1), ("b", [file], 1), ("c", [file], 2))
    ]
    assert models[0] == models[1] != models[2]
    assert str(tmp_path).encode() not in models[0]


def test_a_line_longer_than_sentencepiece_takes_is_used(tmp_path: Path) -> None:
    line = " ".join(LINES[:2000])
    assert len(line.encode()) > 100_000
    assert train_vocabulary([line], tmp_path / "one.model", 800, "bpe").encode("документ")
    unbroken = train_vocabulary(["щ" * 20_000], tmp_path / "two.model", 265, "bpe", mode_tokens=())
    assert unbroken.piece(unbroken.encode("щ")[-1]) == "щ"


def test_training_that_cannot_be(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes("Первая строка\n".encode() + b"abc \xff\n")
    cases: list[tuple[object, int, str]] = [
        ([], 1000, "no text to train"),
        ([" \n\n", ""], 1000, "no text to train"),
        ([bad], 1000, r"bad\.txt, line 2: not UTF-8"),
        ([tmp_path / "none.txt"], 1000, r"none\.txt: No such file"),
        (LINES[:100], 100, "of 100 pieces .* smaller than required_chars"),
        (LINES[:100], 50_000, "of 50000 pieces .* set it to a value <="),
    ]
    for texts, size, message in cases:
        with pytest.raises(UserError, match=message):
            train_vocabulary(texts, tmp_path / "out.model", size)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="model_type is 'word'"):
        train_vocabulary(LINES, tmp_path / "out.model", 1000, model_type="word")
    with pytest.raises(UserError, match="is a folder, and a file is to be written"):
        train_vocabulary(LINES, tmp_path, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_missing_or_foreign_file(tmp_path: Path, vocabulary: Vocabulary) -> None:
    with pytest.raises(UserError, match=r"none\.model': No such file.*VOCABULARY_FILE"):
        _ = Vocabulary(str(tmp_path / "none.model")).size
    whole = Path(vocabulary.sentencepiece_model_file).read_bytes()
    for content in (b"", b"hello\n", LINES[0].encode(), whole[: len(whole) // 2]):
        (tmp_path / "foreign.model").write_bytes(content)
        with pytest.raises(UserError, match=r"foreign\.model' is not a SentencePiece model"):
            Vocabulary(str(tmp_path / "foreign.model")).encode("текст")


def _with_pieces(vocabulary: Vocabulary, path: Path, pieces: list[str]) -> str:
    model = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model_bytes)
    for piece in pieces:
        model.pieces.add(piece=piece, score=0.0, type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED)
    path.write_bytes(model.SerializeToString())
    return str(path)


def test_sentinels_inside_the_model_as_in_mt5_are_those_that_seqio_would_add(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    outside = Vocabulary(vocabulary.sentencepiece_model_file, extra_ids=100)
    file = _with_pieces(vocabulary, tmp_path / "mt5.model", [f"▁<extra_id_{i}>" for i in reversed(range(100))])
    inside = Vocabulary(file, extra_ids=0)
    assert (inside.size, inside.padded_size, inside.num_sentinels) == (outside.size, outside.padded_size, 100)
    assert (inside.first_sentinel, inside.last_sentinel) == (outside.first_sentinel, outside.last_sentinel)
    assert inside.sentinel(99) == outside.sentinel(99)
    assert inside.mode_tokens == outside.mode_tokens
    text = "Раз <extra_id_0> два <extra_id_99> [NLU]"
    assert inside.encode(text) == outside.encode(text)
    assert inside.decode(inside.encode(text)) == outside.decode(outside.encode(text))
    assert [inside.piece(i) for i in range(inside.size)] == [outside.piece(i) for i in range(outside.size)]
    with pytest.raises(UserError, match="has 100 sentinels inside: set EXTRA_IDS to 0, not 300"):
        _ = Vocabulary(file).size
    with pytest.raises(UserError, match="100 sentinels"):
        inside.sentinel(100)


def test_only_sentinels_in_order_at_the_top_count(vocabulary: Vocabulary, tmp_path: Path) -> None:
    for number, pieces in enumerate((["<extra_id_0>", "b"], ["▁<extra_id_0>", "▁<extra_id_1>"])):
        file = _with_pieces(vocabulary, tmp_path / f"{number}.model", pieces)
        assert Vocabulary(file, extra_ids=0).num_sentinels == 0


def test_the_unknown_id_is_the_models_own(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES[:500]),
        model_prefix=str(tmp_path / "umt5"),
        vocab_size=300,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    vocabulary = Vocabulary(str(tmp_path / "umt5.model"))
    assert (vocabulary.unk_id, vocabulary.encode("漢")[-1]) == (3, 3)


def test_other_special_ids(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES[:500]), model_prefix=str(tmp_path / "bert"), vocab_size=300, minloglevel=2
    )
    with pytest.raises(UserError, match=r"has the ids \(-1, 2\) for padding and EOS, not \(0, 1\)"):
        _ = Vocabulary(str(tmp_path / "bert.model")).padded_size


def test_too_few_sentinels_and_unknown_mode_tokens(vocabulary: Vocabulary) -> None:
    few = Vocabulary(vocabulary.sentencepiece_model_file, extra_ids=100)
    with pytest.raises(UserError, match=r"<extra_id_100>.* has 100 sentinels"):
        few.sentinel(100)
    with pytest.raises(UserError, match="-1"):
        Vocabulary("x", extra_ids=-1)
    with pytest.raises(UserError, match=r"'\[NLX\]' is no user-defined symbol .*nearest: \[NLU\]"):
        vocabulary.mode_id("[NLX]")
    with pytest.raises(UserError, match="no user-defined symbol"):
        vocabulary.mode_id("</s>")


# ---- identity --------------------------------------------------------------------------------------------------------


def test_copies_are_light_and_fingerprints_tell(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.encode("загружен")
    assert len(pickle.dumps(vocabulary)) < 500
    for twin in (pickle.loads(pickle.dumps(vocabulary)), copy.deepcopy(vocabulary)):
        assert twin.encode(LINES[0]) == vocabulary.encode(LINES[0])
        assert twin.fingerprint() == vocabulary.fingerprint()
    moved = tmp_path / "moved.model"
    moved.write_bytes(vocabulary.model_bytes)
    assert Vocabulary(str(moved)).fingerprint() == vocabulary.fingerprint()
    assert Vocabulary(str(moved), extra_ids=299).fingerprint() != vocabulary.fingerprint()
