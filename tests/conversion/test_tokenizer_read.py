"""Folders as Hugging Face's hub has them, made alike: the sentinels are the same ids here and in transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2 as proto
from transformers import AutoTokenizer, ByT5Tokenizer

from conversion import tokenizer
from vikhr_t5.data.vocabulary import ByteVocabulary, Vocabulary
from vikhr_t5.errors import UserError

NAMED = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "tokenizer_class": "T5Tokenizer"}
TEXT = "Москва <extra_id_0> столица <extra_id_1> России"


def _names(count: int) -> list[str]:
    return [f"<extra_id_{i}>" for i in range(count)]


@pytest.fixture
def hub(unigram: Vocabulary, tmp_path: Path) -> Callable[..., Path]:
    """hub(inside=100, extra_ids=0, …) -> a folder with spiece.model, `inside` sentinels in it, and a configuration."""

    def make(inside: int = 0, files: dict[str, Any] | None = None, **config: Any) -> Path:
        model = proto.ModelProto.FromString(unigram.model_bytes)
        for name in reversed(_names(inside)):
            model.pieces.add(piece=f"▁{name}", score=0.0, type=proto.ModelProto.SentencePiece.USER_DEFINED)
        (tmp_path / "spiece.model").write_bytes(model.SerializeToString())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**NAMED, **config}))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
        for name, content in (files or {}).items():
            (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("made", "sentinels"),
    [
        ({"extra_ids": 100, "additional_special_tokens": _names(100)}, 100),  # T5, FLAN-T5
        ({"inside": 100, "extra_ids": 0, "additional_special_tokens": None}, 100),  # mT5
        ({"extra_ids": 300, "additional_special_tokens": _names(300)}, 300),  # umT5
        ({}, 100),
        ({"extra_ids": 20}, 20),
    ],
)
def test_sentinels_have_the_ids_of_transformers(hub, unigram: Vocabulary, made: dict[str, Any], sentinels: int) -> None:  # type: ignore[no-untyped-def]
    folder = hub(**made)
    ours, theirs = tokenizer.read(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.num_sentinels, ours.size) == (sentinels, len(theirs))
    assert theirs(TEXT).input_ids[-1] == ours.eos_id
    for name, id in (("<extra_id_0>", ours.sentinel(0)), (f"<extra_id_{sentinels - 1}>", ours.sentinel(sentinels - 1))):
        text = TEXT.replace("<extra_id_0>", name)
        assert id in ours.encode(text)
        assert id in theirs(text).input_ids
    assert ours.first_sentinel == len(theirs) - 1
    assert ours.encode(TEXT) == Vocabulary(unigram.sentencepiece_model_file, sentinels).encode(TEXT)


def test_the_number_of_sentinels_where_transformers_5_or_only_an_added_file_tells_it(hub) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.read(hub(extra_special_tokens=_names(30), extra_ids=30)).num_sentinels == 30
    first = tokenizer.read(hub(extra_ids=0)).size
    added = {name: first + 39 - i for i, name in enumerate(_names(40))}
    assert tokenizer.read(hub(files={"added_tokens.json": added}, extra_ids=0)).num_sentinels == 40


@pytest.mark.parametrize("inside", [0, 100])
def test_what_is_written_is_read_back_and_transformers_agrees(hub, tmp_path: Path, inside: int) -> None:  # type: ignore[no-untyped-def]
    vocabulary = tokenizer.read(hub(inside=inside, extra_ids=0 if inside else 100))
    folder = tmp_path / "written"
    folder.mkdir()
    tokenizer.write(vocabulary, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert tokenizer.read(folder).fingerprint() == vocabulary.fingerprint()
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == vocabulary.size
    for text in (TEXT, "[NLU] <extra_id_99>", "слово<extra_id_0>"):
        assert theirs(text).input_ids == [*vocabulary.encode(text), 1]
    assert theirs.convert_tokens_to_ids("<extra_id_0>") == vocabulary.sentinel(0)


def test_byt5_as_transformers_saves_it_has_the_sentinels_that_it_was_trained_with(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert ByT5Tokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<extra_id_0>") == 259
    vocabulary = tokenizer.read(tmp_path)
    assert repr(vocabulary) == "ByteVocabulary(extra_ids=0)"
    assert vocabulary.sentinel(0) == 258


def test_byt5_is_known_by_its_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "tokenizer_class": "ByT5Tokenizer"}))
    assert repr(tokenizer.read(tmp_path)) == "ByteVocabulary(extra_ids=0)"


@pytest.mark.parametrize("extra_ids", [0, 1, 30])
def test_bytes_are_written_and_read_back_and_transformers_agrees(tmp_path: Path, extra_ids: int) -> None:
    vocabulary = ByteVocabulary(extra_ids)
    tokenizer.write(vocabulary, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert tokenizer.read(tmp_path).fingerprint() == vocabulary.fingerprint()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    again = ByT5Tokenizer.from_pretrained(tmp_path / "again")
    assert isinstance(theirs, ByT5Tokenizer)
    assert len(theirs) == vocabulary.size
    for text in (TEXT, "слитно<extra_id_0>с текстом", " ё <extra_id_10>\n", "<extra_id_11> <extra_id_30>", "", "🙂\0"):
        ids = [*vocabulary.encode(text), 1]
        assert theirs(text).input_ids == again(text).input_ids == ids
        assert theirs.decode(ids[:-1]) == vocabulary.decode(ids) == text
    assert theirs.decode(vocabulary.encode("<extra_id_0>да"), skip_special_tokens=True) == "да"


def _added_word(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<sep>": 5000}))


def _ascending(folder: Path) -> None:
    first = tokenizer.read(folder).last_sentinel
    added = {name: first + i for i, name in enumerate(_names(100))}
    (folder / "added_tokens.json").write_text(json.dumps(added))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: (folder / "spiece.model").unlink(), r"no spiece\.model .*copy it from the original model"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), r"tokenizer_config\.json: cannot be read"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "is no JSON object"),
        (lambda folder: (folder / "spiece.model").write_bytes(b"version https"), "is not a SentencePiece model"),
        (_added_word, "token '<sep>' .id 5000; 1 such. was added"),
        (_ascending, "gives <extra_id_0> the id .* descend from the highest"),
    ],
)
def test_what_cannot_be_read_says_why_in_one_line(hub, break_it: Callable[[Path], None], said: str) -> None:  # type: ignore[no-untyped-def]
    folder = hub(extra_ids=100)
    break_it(folder)
    with pytest.raises(UserError, match=said) as error:
        tokenizer.read(folder)
    assert "\n" not in str(error.value)


def test_byt5_with_sentinels_elsewhere_is_refused(tmp_path: Path) -> None:
    added = {"<extra_id_0>": 259, "<extra_id_1>": 300}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(UserError, match="<extra_id_0> the id 259"):
        tokenizer.read(tmp_path)
