"""Tokens per word of every kind of tokenizer file, against the libraries that own the formats; table and charts."""

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from rich.console import Console

from vikhr_t5 import cli
from vikhr_t5.data import fertility
from vikhr_t5.data.fertility import Fertility, measure, open_tokenizer, table, write_chart
from vikhr_t5.data.vocabulary import Vocabulary, vocabulary_files
from vikhr_t5.errors import UserError

MISTRAL = files("mistral_common") / "data"
TEXTS = ["Казнить нельзя,  помиловать.", "Страница 12 из 345", "English, too: don't"]
# Ranks of OpenAI's r50k_base begin with the bytes in another order; any 256 single bytes will do for a file of our own.
BYTES = {bytes([i]): i for i in range(256)}


def ranks_file(path: Path, ranks: dict[bytes, int]) -> str:
    path.write_text("".join(f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items()))
    return str(path)


def test_figures_by_hand() -> None:
    letters = fertility.Tokenizer("letters", 33, lambda text: [ord(letter) for letter in text], unk_id=ord("ы"))
    found = measure(letters, ["мы были", "", "ы"])
    assert (found.words, found.characters, found.tokens, found.unknown) == (3, 8, 8, 3)
    assert (found.tokens_per_word, found.characters_per_token, found.unknown_share) == (8 / 3, 1.0, 3 / 8)
    with pytest.raises(UserError, match="no word"):
        measure(letters, [" ", ""])


def test_mistrals_files_give_the_ids_of_mistral_common() -> None:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tekken = open_tokenizer(str(MISTRAL / "tekken_240718.json"))
    theirs = Tekkenizer.from_file(str(MISTRAL / "tekken_240718.json"))
    assert (tekken.name, tekken.size, tekken.unk_id) == ("tekken_240718", theirs.n_words, None)
    for text in TEXTS:
        ids = [id + theirs.num_special_tokens for id in tekken.encode(text)]
        assert ids == theirs.encode(text, bos=False, eos=False)
    first = open_tokenizer(str(MISTRAL / "tokenizer.model.v1"), "Mistral")
    sentencepieces = sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL / "tokenizer.model.v1"))
    assert (first.name, first.size) == ("Mistral", 32_000)
    assert [first.encode(text) for text in TEXTS] == sentencepieces.encode(TEXTS)


def test_a_vocabulary_of_ours_as_file_folder_and_run(small_vocabulary: Vocabulary, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "vocabulary"
    folder.mkdir(parents=True)
    for name, content in vocabulary_files(small_vocabulary).items():
        (folder / name).write_bytes(content)
    file = open_tokenizer(small_vocabulary.sentencepiece_model_file)
    assert (file.size, file.unk_id) == (small_vocabulary.size - 300, 2)
    for source, name in ((folder, "vocabulary"), (folder.parent, "run")):
        whole = open_tokenizer(str(source))
        assert (whole.name, whole.size, whole.unk_id) == (name, small_vocabulary.size, 2)
        assert [whole.encode(text) for text in TEXTS] == [small_vocabulary.encode(text) for text in TEXTS]
        assert [file.encode(text) for text in TEXTS] == [whole.encode(text) for text in TEXTS]
    bytes_ = measure(open_tokenizer("bytes"), ["слово и дело"])
    assert (bytes_.tokens, bytes_.size) == (len("слово и дело".encode()), 259)


def test_unknown_pieces_of_sentencepiece_are_counted(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a plain text", "of a few words", "without Cyrillic"] * 20),
        model_prefix=str(tmp_path / "latin"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    found = measure(open_tokenizer(str(tmp_path / "latin.model")), ["Казнить нельзя"])
    assert (found.tokens, found.unknown) == (4, 2)  # "▁", "Казнить", "▁", "нельзя"


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE"])
def test_tokenizers_json_by_file_and_folder_gives_the_ids_of_transformers(tmp_path: Path, kind: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", "[CLS]", "нельзя", "каз", "нить"]
    model: Any = {
        "WordPiece": lambda: models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0),
        "BPE": lambda: models.BPE({p: i for i, p in enumerate([*pieces, *"кажнить"])}, [], unk_token="[UNK]"),
    }[kind]()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=16)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    text = "каз нить нельзя помиловать каз"
    for source in (tmp_path / "model", tmp_path / "model" / "tokenizer.json"):
        ours = open_tokenizer(str(source))
        assert ours.unk_id == 0
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text).count(0) >= 1
        assert len(ours.encode(text)) > 2
        assert ours.size == len(theirs)


def test_tiktoken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiktoken_ext import openai_public

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("fetched from the network")

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", no_network)
    ranks = BYTES | {"ка".encode()[:3]: 256, " н".encode(): 257, b"do": 258, b"12": 259}
    ours = open_tokenizer(ranks_file(tmp_path / "cl100k_base.tiktoken", ranks))
    assert openai_public.load_tiktoken_bpe is no_network
    pattern = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++"""
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert (ours.name, ours.size, ours.unk_id) == ("cl100k_base", 100_277, None)  # with its special tokens
    assert ours.encode("<|endoftext|>") == theirs.encode_ordinary("<|endoftext|>")


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.model").write_text("not a model")
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "cut.json").write_text('{"model": {"type"')
    (tmp_path / "config.json").write_text('{"d_model": 512}')
    (tmp_path / "list.json").write_text('{"config": [1], "model": {"type": "no such"}}')
    (tmp_path / "bare").mkdir()
    ranks_file(tmp_path / "llama3.tiktoken", BYTES)
    ranks_file(tmp_path / "r50k_base.tiktoken", BYTES)
    (tmp_path / "o200k_base.tiktoken").write_text("hello world\n")
    (tmp_path / "tekken.json").write_text(
        json.dumps(
            {"config": {"pattern": "(", "default_vocab_size": 9, "default_num_special_tokens": 1}, "vocab": [{}]}
        )
    )
    for name, message in {
        "absent.model": "No such file.*hf download NAME",
        "text.model": "neither a SentencePiece model, nor JSON",
        "empty.model": "neither a SentencePiece model, nor JSON",
        "cut.json": "not whole JSON",
        "config.json": "neither a tokenizer.json",
        "list.json": "cannot be read by tokenizers",
        "bare": "has no tokenizer: none of vocabulary.json",
        "llama3.tiktoken": "name of its encoding",
        "r50k_base.tiktoken": "has not the pieces of r50k_base",  # 256 are too few
        "o200k_base.tiktoken": r"is no \.tiktoken file",
        "tekken.json": "tekken.json.*copy the file again",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            open_tokenizer(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


MEASURED = [Fertility("ours <8k>", 8_000, 10, 60, 21, 0), Fertility("latin", 32_000, 10, 60, 52, 7)]


def test_table_shows_every_figure() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(MEASURED))
    printed = console.export_text()
    for figure in ("ours <8k>", "8,000", "2.100", "2.857", "0.00%", "5.200", "13.46%", "10 words, 60 characters"):
        assert figure in printed


def test_charts(tmp_path: Path) -> None:
    for name in ("chart.png", "chart.svg", "chart.html"):
        for _ in range(2):  # the same bytes twice
            write_chart(MEASURED, tmp_path / name)
            (tmp_path / name).rename(tmp_path / f"{name}.{(tmp_path / f'{name}.0').exists():d}")
        assert (tmp_path / f"{name}.0").read_bytes() == (tmp_path / f"{name}.1").read_bytes()
    assert (tmp_path / "chart.png.0").read_bytes().startswith(b"\x89PNG")
    svg, page = ((tmp_path / f"chart.{kind}.0").read_text(encoding="utf-8") for kind in ("svg", "html"))
    for drawn in (svg, page):
        assert "tokens per word" in drawn
        assert "latin (13.5% unknown)" in drawn
    assert "<td>ours &lt;8k&gt;</td><td>8,000</td><td>2.100</td>" in page
    assert page.count("<svg") == 1
    assert "{{" not in page
    with pytest.raises(UserError, match=r"chart\.pdf: a chart is written as \.png, \.svg, \.html"):
        write_chart(MEASURED, tmp_path / "chart.pdf")


def test_the_command(small_vocabulary: Vocabulary, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "Казнить нельзя,\nпомиловать"}, {"text": " "}, {"text": "Один"}]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = f"bytes,ours={small_vocabulary.sentencepiece_model_file}"
    chart = tmp_path / "charts" / "chart.html"
    arguments = ["vocab", "chart", "--texts", str(texts)]
    assert cli.main([*arguments, "--tokenizers", named, "--output", str(chart)]) == 0
    printed = capfd.readouterr().out
    assert "measured on 4 words, 29 characters" in printed
    page = chart.read_text(encoding="utf-8")
    whole = "Казнить нельзя,", "помиловать", "Один"
    assert f"<td>bytes</td><td>259</td><td>{sum(len(line.encode()) for line in whole) / 4:.3f}</td>" in page
    ours = sum(len(small_vocabulary.encode(line)) for line in whole)
    assert f"<td>ours</td><td>1,500</td><td>{ours / 4:.3f}</td>" in page
    for bad, message in (
        ([*arguments, "--tokenizers", "a=none.model"], "tokenizer 'none.model': No such file"),
        ([*arguments, "--tokenizers", "bytes", "--fields", "txt"], "no field 'txt'; nearest: text"),
        ([*arguments[:3], str(tmp_path / "none.txt"), "--tokenizers", "bytes"], "none.txt: no such file"),
        ([*arguments, "--tokenizers", "a=bytes,a=bytes"], "two tokenizers are called 'a'"),
        ([*arguments, "--tokenizers", ","], "no tokenizer: --tokenizers NAME=FILE"),
    ):
        assert cli.main(bad) == 2
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1
