"""Another vocabulary under a model: which rows are kept, which are means and of what; logits of what both share."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_run
from rich.console import Console
from sentencepiece import sentencepiece_model_pb2 as proto

from conversion import convert, vocabulary_change
from conversion.stored import MemoryModel, load
from conversion.vocabulary_swap import AVERAGED, EMBEDDING, FALLBACK, HEAD, KEPT, PADDING, SwappedModel, plan
from vikhr_t5 import cli
from vikhr_t5.data.vocabulary import ByteVocabulary, Vocabulary, train_vocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.model import network
from vikhr_t5.train import optimizers
from vikhr_t5.train.state import EncoderDecoderModel

Make = Callable[..., MemoryModel]


@pytest.fixture(scope="module")
def english(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """As T5's: no bytes, hardly any Cyrillic, 100 sentinels, one mode token."""
    lines = [line for line in corpus if line and line.isascii()][:4000]
    path = tmp_path_factory.mktemp("english") / "spiece.model"
    train_vocabulary([*lines, *["да ил"] * 9], path, 700, byte_fallback=False, mode_tokens=("[NLU]",))
    return Vocabulary(str(path), extra_ids=100)


@pytest.fixture
def old_model(make_model: Make, english: Vocabulary) -> MemoryModel:
    """Untied, with 24 rows of padding and then some, as T5's 32128 for 32100."""
    model = make_model("v1.1", vocab_size=english.padded_size + 128)
    model.vocabulary = english
    return model


def _pieces(vocabulary: Vocabulary) -> dict[str, int]:
    return {vocabulary.piece(i): i for i in range(vocabulary.size - vocabulary.extra_ids)}


def _closed_form(piece: str, english: Vocabulary, old: np.ndarray) -> tuple[str, np.ndarray]:
    """Kind and row of a piece that begins a word, by the old vocabulary's own encoding."""
    if piece in (theirs := _pieces(english)):
        return KEPT, old[theirs[piece]]
    ids = [id for id in english.encode(piece[1:]) if id != english.unk_id]
    if {english.piece(id) for id in ids} <= {"▁"}:
        return FALLBACK, old[: english.size].mean(0)
    return AVERAGED, np.mean([old[id] for id in ids], axis=0)


def test_every_row_is_its_closed_form(old_model: MemoryModel, english: Vocabulary, unigram: Vocabulary) -> None:
    swapped = SwappedModel(old_model, unigram)
    matrices = {
        EMBEDDING: (old_model.read(EMBEDDING), swapped.read(EMBEDDING)),
        HEAD: (old_model.read(HEAD).T, swapped.read(HEAD).T),
    }
    words = {piece: id for piece, id in _pieces(unigram).items() if piece.startswith("▁") and len(piece) > 1}
    kinds = dict.fromkeys((KEPT, AVERAGED, FALLBACK), 0)
    for old, new in matrices.values():
        assert new.shape == (unigram.padded_size, old.shape[1])
        for piece, id in words.items():
            kind, row = _closed_form(piece, english, old)
            assert swapped.plan.kinds[id] == kind, piece
            np.testing.assert_allclose(new[id], row, rtol=0, atol=0 if kind == KEPT else 2e-6, err_msg=piece)
            kinds[kind] += 1
        assert set(swapped.plan.kinds[unigram.size :]) == {PADDING}
        padding = old[english.size :].mean(0)
        np.testing.assert_allclose(new[unigram.size :] - padding, 0, atol=1e-6)
    assert min(kinds.values()) > 20, kinds


def test_without_old_padding_new_padding_is_the_mean_of_all(
    make_model: Make, english: Vocabulary, tmp_path: Path
) -> None:
    old = make_model("v1.0", vocab_size=english.size)
    old.vocabulary = english
    new = SwappedModel(old, _vocabulary(english, tmp_path, ["a"])).read(EMBEDDING)
    np.testing.assert_allclose(new[-1], old.read(EMBEDDING).mean(0), atol=1e-6)


def test_a_piece_from_inside_a_word_takes_no_space_of_the_old_vocabulary(
    old_model: MemoryModel, english: Vocabulary, tmp_path: Path
) -> None:
    space, letters = _pieces(english)["▁"], [english.encode("x" + letter)[-1] for letter in "qz"]
    new = _vocabulary(english, tmp_path, ["qz", "▁qz", "▁"])
    made = plan(english, new, english.padded_size)
    sources = {new.piece(i): made.sources[made.starts[i] : made.starts[i + 1]].tolist() for i in range(new.size)}
    assert sources["qz"] == letters
    assert sources["▁qz"] == [space, *letters]
    assert sources["▁"] == [space]
    assert made.pieces_averaged == (2 + 3) / 2


def _vocabulary(
    like: Vocabulary, folder: Path, pieces: list[str], modes: tuple[str, ...] = (), **more: int
) -> Vocabulary:
    """Padding, EOS, unknown, mode tokens, the pieces."""
    model = proto.ModelProto.FromString(like.model_bytes)
    first = [proto.ModelProto.SentencePiece.FromString(piece.SerializeToString()) for piece in model.pieces[:3]]
    del model.pieces[:]
    model.pieces.extend(first)
    for mode in modes:
        model.pieces.add(piece=mode, score=0.0, type=proto.ModelProto.SentencePiece.USER_DEFINED)
    for piece in pieces:
        model.pieces.add(piece=piece, score=-1.0)
    (folder / "new.model").write_bytes(model.SerializeToString())
    return Vocabulary(str(folder / "new.model"), **{"extra_ids": 10, **more})


def test_sentinels_and_mode_tokens_are_carried_over_by_meaning(
    old_model: MemoryModel, english: Vocabulary, tmp_path: Path
) -> None:
    new = _vocabulary(english, tmp_path, ["a"], ("[S2S]", "▁[NLU]"), extra_ids=120)
    swapped = SwappedModel(old_model, new)
    old, rows = old_model.read(EMBEDDING), swapped.read(EMBEDDING)
    assert np.array_equal(rows[:3], old[:3])
    for i in range(100):
        assert np.array_equal(rows[new.sentinel(i)], old[english.sentinel(i)])
    sentinels = old[[english.sentinel(i) for i in range(100)]].mean(0)
    for i in range(100, 120):
        np.testing.assert_allclose(rows[new.sentinel(i)], sentinels, atol=1e-6)
    assert np.array_equal(rows[new.mode_id("[NLU]")], old[english.mode_id("[NLU]")])
    np.testing.assert_allclose(rows[new.mode_id("[S2S]")], old[: english.size].mean(0), atol=1e-6)
    assert (swapped.plan.count(AVERAGED), swapped.plan.count(FALLBACK)) == (20, 1)
    assert (swapped.step, swapped.updates, swapped.config.vocab_size) == (1000, None, 128)


def test_bytes_take_letters_and_the_sentinels_of_byt5(old_model: MemoryModel, english: Vocabulary) -> None:
    made = plan(english, ByteVocabulary(), english.padded_size)
    letter = english.encode("xa")[-1]
    assert made.sources[made.starts[ord("a") + 3] : made.starts[ord("a") + 4]].tolist() == [letter]
    assert (made.kinds[ord("a") + 3], made.kinds[0xD0 + 3], made.kinds[258]) == (AVERAGED, FALLBACK, KEPT)
    assert made.sources[made.starts[258]] == english.sentinel(0)
    back = plan(ByteVocabulary(), english, 384)
    assert [back.sources[back.starts[english.sentinel(i)]] for i in (0, 50)] == [258, 208]
    id = english.encode("the")[0]
    assert (
        back.sources[back.starts[id] : back.starts[id + 1]].tolist()
        == [b + 3 for b in b" the"][: len(english.piece(id))]
    )


def _logits(params: dict, config: network.T5Config, inputs: list[int], targets: list[int]) -> np.ndarray:
    batch = np.array([inputs]), np.array([[0, *targets[:-1]]]), np.array([targets])
    with jax.default_matmul_precision("highest"):
        return np.asarray(network.Transformer(config).apply({"params": params}, *batch))[0]


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
@pytest.mark.parametrize("extend", [False, True])
def test_text_of_common_pieces_has_the_logits_it_had(
    make_model: Make, english: Vocabulary, unigram: Vocabulary, tmp_path: Path, variant: str, extend: bool
) -> None:
    old = make_model(variant, vocab_size=english.padded_size, dropout_rate=0.0)
    old.vocabulary = english
    new = unigram
    if extend:
        (tmp_path / "merged.model").write_bytes(vocabulary_change.merged(english, unigram))
        new = Vocabulary(str(tmp_path / "merged.model"), 100)
    swapped = SwappedModel(old, new)
    ours, theirs = _pieces(new), _pieces(english)
    common = [piece for piece in ours if piece in theirs and theirs[piece] > 3]
    if extend:
        assert len(common) == len(theirs) - 4
        assert all(ours[piece] == theirs[piece] for piece in theirs)
    text = list(np.random.default_rng(0).permutation(common)[:12])
    old_ids, new_ids = (
        [pieces[piece] for piece in text] + [v.sentinel(0), 1] for pieces, v in ((theirs, english), (ours, new))
    )
    before = _logits(load(old), old.config, old_ids, old_ids[3:])
    after = _logits(load(swapped), swapped.config, new_ids, new_ids[3:])
    columns = [theirs[p] for p in common] + [english.sentinel(0), 1], [ours[p] for p in common] + [new.sentinel(0), 1]
    np.testing.assert_allclose(after[:, columns[1]], before[:, columns[0]], atol=1e-5)
    assert np.abs(before).max() > 0.5


def test_rows_keep_their_stored_type(make_model: Make, english: Vocabulary, unigram: Vocabulary) -> None:
    old = make_model("v1.1", vocab_size=english.padded_size, stored="bfloat16")
    old.vocabulary = english
    swapped = SwappedModel(old, unigram)
    assert swapped.read(EMBEDDING).dtype == swapped.read(HEAD).dtype == ml_dtypes.bfloat16
    assert np.array_equal(swapped.read(EMBEDDING)[:3], old.read(EMBEDDING)[:3])


def test_the_merged_model_reads_old_text_as_before_and_new_text_with_the_new_pieces(
    english: Vocabulary, unigram: Vocabulary, corpus: list[str], tmp_path: Path
) -> None:
    (tmp_path / "merged.model").write_bytes(vocabulary_change.merged(english, unigram))
    merged = Vocabulary(str(tmp_path / "merged.model"), 100)
    texts = [line for line in corpus[:3000] if line]
    before, after = (vocabulary_change.measure(vocabulary, texts) for vocabulary in (english, merged))
    assert before[1] > 0.1
    assert after[1] == 0  # bytes came with the new model
    assert after[0] < before[0]
    assert after[0] < vocabulary_change.measure(unigram, texts)[0] * 1.02
    assert set(merged.mode_tokens) == set(english.mode_tokens) | set(unigram.mode_tokens)
    assert [merged.piece(i) for i in range(700)] == [english.piece(i) for i in range(700)]


def test_merging_bpe_leaves_old_text_as_it_was(corpus: list[str], tmp_path: Path) -> None:
    english = [line for line in corpus if line and line.isascii()]
    old = train_vocabulary(english[:3000], tmp_path / "old.model", 700, "bpe", ())
    new = train_vocabulary(corpus[:3000], tmp_path / "new.model", 900, "bpe", ())
    (tmp_path / "merged.model").write_bytes(vocabulary_change.merged(old, new))
    merged = Vocabulary(str(tmp_path / "merged.model"), 300)
    russian = [line for line in corpus[:3000] if line]
    assert vocabulary_change.measure(merged, russian)[0] < vocabulary_change.measure(old, russian)[0] / 2
    for line in english[:300]:
        finer = [merged.piece(i) for i in merged.encode(line)]
        assert len(finer) <= len(old.encode(line))
    with pytest.raises(UserError, match="a BPE model cannot extend a UNIGRAM model"):
        vocabulary_change.merged(train_vocabulary(english[:900], tmp_path / "u.model", 400), new)
    with pytest.raises(UserError, match="bytes cannot be extended"):
        vocabulary_change.merged(ByteVocabulary(), new)


def test_the_report_counts_rows_norms_and_tokens(
    old_model: MemoryModel, english: Vocabulary, unigram: Vocabulary
) -> None:
    swapped = SwappedModel(old_model, unigram)
    matrices = {name: old_model.read(name) for name in (EMBEDDING, HEAD)}
    for name in matrices:
        swapped.read(name)
    out = io.StringIO()
    texts = ["Откройте документ и выберите меню."]
    Console(file=out, width=120).print(vocabulary_change.report(swapped, english, unigram, texts))
    shown = {line.split("│")[1].strip(): line.split("│")[2:4] for line in out.getvalue().splitlines() if "│" in line}
    assert int(shown["rows kept"][1].replace(",", "")) == (swapped.plan.kinds == KEPT).sum()
    assert sum(int(shown[f"rows {kind}"][1].replace(",", "")) for kind in (KEPT, AVERAGED, FALLBACK, PADDING)) == (
        unigram.padded_size
    )
    norm = np.linalg.norm(matrices[HEAD].T[: english.size], axis=1).mean()
    assert float(shown["output layer: norm of rows kept"][0]) == pytest.approx(norm, rel=1e-3)
    tokens = len(unigram.encode(texts[0])) / 5
    assert float(shown["tokens per word"][1]) == pytest.approx(tokens, abs=0.006)
    assert shown["unknown tokens"][1].strip() == "0.0%"


def test_what_does_not_fit_is_refused(old_model: MemoryModel, english: Vocabulary, unigram: Vocabulary) -> None:
    old_model.vocabulary = None
    with pytest.raises(UserError, match="carries no vocabulary"):
        SwappedModel(old_model, unigram)
    old_model.vocabulary = Vocabulary(english.sentencepiece_model_file, 5000)
    with pytest.raises(UserError, match=r"rows and .* ids: name the vocabulary"):
        SwappedModel(old_model, unigram)


@pytest.mark.parametrize("action", ["swap", "extend"])
def test_the_command_writes_a_checkpoint_to_start_from(
    old_model: MemoryModel, english: Vocabulary, unigram: Vocabulary, tmp_path: Path, action: str, capsys
) -> None:  # type: ignore[no-untyped-def]
    convert.write_model(old_model, tmp_path / "flan", "hf")
    (tmp_path / "text.txt").write_text("Откройте документ.\n")
    command = ["vocab", action, "--from", "hf", str(tmp_path / "flan"), str(tmp_path / "start"), "--extra_ids", "120"]
    command += ["--vocabulary", unigram.sentencepiece_model_file, "--text", str(tmp_path / "text.txt")]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "rows kept" in shown
    assert "tokens per word" in shown
    written = convert.open_model(tmp_path / "start", "vikhr")
    assert written.vocabulary is not None
    assert written.vocabulary.num_sentinels == 120
    assert written.config.vocab_size == written.vocabulary.padded_size
    rows, old = written.read(EMBEDDING), old_model.read(EMBEDDING)
    assert np.array_equal(rows[written.vocabulary.sentinel(7)], old[english.sentinel(7)])
    if action == "extend":
        assert np.array_equal(rows[:700], old[:700])
        assert written.vocabulary.encode("Open the file") == english.encode("Open the file")
    assert cli.main([*command[:4], str(tmp_path / "none"), *command[5:]]) == 2


@pytest.mark.slow
def test_a_run_starts_from_a_swapped_model(old_model: MemoryModel, unigram: Vocabulary, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    convert.write_model(SwappedModel(old_model, unigram), tmp_path / "start", "vikhr")
    config = dataclasses.replace(old_model.config, vocab_size=None)
    model = EncoderDecoderModel(network.Transformer(config), unigram, unigram, optimizers.Adafactor())
    start = str(tmp_path / "start")
    assert tiny_run.run(tmp_path / "run", 1001, model=model, initial=start, evaluate=False) == 1001
    assert f"started from {start}" in capsys.readouterr().err
