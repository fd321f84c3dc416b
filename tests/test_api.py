"""The Python interface and `vikhr-t5 infer` over files: blanks, modes, scores, formats, resuming, what is refused."""

import dataclasses
import datetime
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from random_params import enlarged_params
from trained_models import V11, cloze, real_texts, save_hf, train, vocabulary
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import vikhr_t5
from conversion import convert
from conversion.stored import MemoryModel
from vikhr_t5 import cli, infer_files, prompts
from vikhr_t5.api import Decoding
from vikhr_t5.data.byte_vocabulary import ByteVocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.model.parameters import abstract_params

ROOT = Path(__file__).resolve().parents[1]


CONFIG = dataclasses.replace(V11, emb_dim=32, mlp_dim=64, num_encoder_layers=1, num_decoder_layers=1)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def stored(words):
    config = dataclasses.replace(CONFIG, vocab_size=words.padded_size)
    return MemoryModel(enlarged_params(config, 1), config, words)


@pytest.fixture(scope="module")
def folder(stored, tmp_path_factory):
    return save_hf(stored, tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return vikhr_t5.load(folder, batch_size=4, max_input_length=64)


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory):
    """A model that fills blanks, and its folder."""
    folder = save_hf(train(V11, words, steps=400), tmp_path_factory.mktemp("trained") / "model")
    return vikhr_t5.load(folder), folder


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_blanks_become_sentinels_glued_ones_too(words):
    prompt = prompts.encode("Нажмите ___ и сохра____те, ___", words, 64)
    assert prompt.num_blanks == 3
    sentinels = [words.sentinel(i) for i in range(3)]
    assert [id for id in prompt.ids if id in sentinels] == sentinels
    # Each is one id between the ids of the words, as in training: a word after a space keeps its mark, a part of a word
    # has none.
    parts = " ".join(words.piece(id) for id in prompt.ids[:-1])
    assert "▁и" in parts.split("<extra_id_0>")[1]
    assert not parts.split("<extra_id_1>")[1].strip().startswith("▁")
    assert prompts.encode("a ___ b", words, 64, blanks=False).num_blanks == 0


def test_filled_text_is_the_prompt_with_the_answer(words):
    text = "Нажмите ___ и сохра___те документ."
    prompt = prompts.encode(text, words, 64, mode=words.mode_id("[NLU]"))
    answer = words.encode("<extra_id_0> кнопку мыши <extra_id_1>ни <extra_id_2>")
    # "<extra_id_1>ни": the span has no mark of a new word.
    blanks = prompts.blanks_of([*answer, words.eos_id, 77], prompt, words)
    assert prompts.shown(blanks, words) == ["кнопку мыши", "ни"]
    assert prompts.fill(prompt, blanks, words) == "Нажмите кнопку мыши и сохраните документ."
    only = prompts.blanks_of(words.encode("<extra_id_1>ни"), prompt, words)
    assert prompts.shown(only, words) == [None, "ни"]
    assert prompts.fill(prompt, only, words) == "Нажмите ___ и сохраните документ."


def test_filled_text_keeps_what_the_vocabulary_does_not(words):
    """Line breaks, spaces, signs that SentencePiece turns into others, and what a limit cuts off."""
    text = "Строка 1.\nСтрока  ___, два…\n(___) № ½ конец ___"
    prompt = prompts.encode(text, words, 12, truncate=True)
    blanks = [words.encode("первая"), words.encode(" вода"), None]
    assert prompts.fill(prompt, blanks, words) == "Строка 1.\nСтрока  первая, два…\n( вода) № ½ конец ___"


def test_blanks_of_bytes():
    words = ByteVocabulary(5)
    prompt = prompts.encode("a ___ b", words, 64)
    assert words.decode(prompt.ids) == "a <extra_id_0> b"
    blanks = prompts.blanks_of(words.encode("<extra_id_0>ёж<extra_id_1>"), prompt, words)
    assert prompts.fill(prompt, blanks, words) == "a ёж b"


def test_modes_have_several_names(words):
    ids = {name: prompts.mode_id(name, words) for name in ("R", "NLU", "[NLU]", "S", "S2S", "X", "LM", "<LM>")}
    assert ids["R"] == ids["NLU"] == ids["[NLU]"] == words.mode_id("[NLU]")
    assert (ids["S"], ids["X"]) == (words.mode_id("[S2S]"), words.mode_id("[NLG]"))
    with pytest.raises(UserError, match=r"mode 'NLUU' is not in the vocabulary; nearest: .*NLU"):
        prompts.mode_id("NLUU", words)
    with pytest.raises(UserError, match="mode 'R' is not in the vocabulary"):
        prompts.mode_id("R", ByteVocabulary())


def test_a_long_prompt_is_said_never_cut_silently(model):
    text = "слово " * 100
    length = len(model.vocabulary.encode(text)) + 1
    with pytest.raises(UserError, match=f"^{length} tokens, and the limit is 64: --max_input_length {length}"):
        model.generate([text])
    cut = model.prompt(text, mode="R", truncate=True).ids
    assert len(cut) == 64
    assert cut[-1] == model.vocabulary.eos_id
    assert cut[0] == model.vocabulary.mode_id("[NLU]")
    with pytest.raises(UserError, match="11 blanks, and the vocabulary has 10 sentinels"):
        model.prompt("___ " * 11)


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fill(trained):
    model, _ = trained
    asked, _ = cloze(real_texts(40)[7])
    filled = model.fill(asked, max_length=16)
    before, _after = asked.split("___")
    assert filled.startswith(before.strip()[:10])
    assert "___" not in filled
    found = model.generate([asked], max_length=16)[0].answers[0]
    assert found.filled == filled
    assert len(found.blanks) == 1
    assert found.blanks[0] in filled


def test_fill_wants_a_blank(model):
    with pytest.raises(UserError, match="no blank to fill: write it as ___"):
        model.fill("нечего", max_length=8)


def torch_scores(folder, pairs, eos):
    """Sums of log-probabilities by transformers, one pair at a time, with its own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums = []
    for text, target in pairs:
        labels = tokenizer(target, return_tensors="pt", add_special_tokens=eos).input_ids
        with torch.inference_mode():
            logits = hf(input_ids=tokenizer(text, return_tensors="pt").input_ids, labels=labels).logits
        chosen = logits.log_softmax(-1).gather(-1, labels[..., None])
        sums.append(float(chosen.sum(dtype=torch.float64)))
    return sums


@pytest.mark.parametrize("eos", [True, False])
def test_scores_are_transformers(model, folder, eos):
    texts = real_texts(12)
    pairs = [
        (text, target) for text, other in zip(texts, reversed(texts), strict=True) for target in (text, other[:40])
    ]
    pairs = [(text[:60], target[:60]) for text, target in pairs]
    found = model.score([text for text, _ in pairs], [[target] for _, target in pairs], eos=eos)
    ours = np.array([one.log_probability for (one,) in found])
    assert np.abs(ours - torch_scores(folder, pairs, eos)).max() <= 1e-4
    assert all(len(one.tokens) == len(one.token_log_probabilities) for (one,) in found)


@pytest.mark.slow
def test_scores_are_lm_evals(trained):
    """200 pairs of real texts through lm-eval's `hf` backend in float32, as `vikhr-t5 benchmark` opens it:
    lm-eval itself ties the head of every T5."""
    from lm_eval.api.instance import Instance

    from vikhr_t5.benchmark_models import Model

    model, folder = trained
    pairs = [
        (one.partition("___")[0].strip() or "текст", two) for one, two in map(cloze, real_texts(220)) if two.strip()
    ]
    pairs = pairs[:200]
    assert len(pairs) == 200
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = Model("trained", folder, "float32", 8, None).loglikelihood(requests)
    found = model.score([text for text, _ in pairs], [[target] for _, target in pairs], eos=False)
    difference = np.abs(np.array([one.log_probability for (one,) in found]) - [value for value, _ in theirs])
    print(f"200 log-likelihoods from {min(v for v, _ in theirs):.1f}: largest difference {difference.max():.2e}")
    assert difference.max() <= 1e-4


def test_formats_give_the_same_answers(model, stored, folder, tmp_path):
    ours, t5x = tmp_path / "ours", tmp_path / "t5x"
    convert.write_model(stored, ours, "vikhr")
    convert.write_model(stored, t5x, "t5x")
    texts = [cloze(text)[0] for text in real_texts(4)]
    expected = [one.text for one in model.generate(texts, max_length=8)]
    source = stored.vocabulary.source
    for path, options in ((ours, {}), (t5x, {"vocabulary": source, "extra_ids": 10})):
        found = vikhr_t5.load(path, batch_size=4, **options).generate(texts, max_length=8)
        assert [one.text for one in found] == expected
    with pytest.raises(UserError, match="carries no vocabulary: give --vocabulary"):
        vikhr_t5.load(t5x)
    with pytest.raises(UserError, match="has its own vocabulary, and it is not"):
        vikhr_t5.load(ours, vocabulary=source, extra_ids=9)
    with pytest.raises(UserError, match=r"1024 rows of embedding, and .* has 1100 ids: that is another vocabulary"):
        vikhr_t5.load(t5x, vocabulary=source, extra_ids=200)


def test_another_vocabulary_is_refused(words, tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=4096)
    shapes = abstract_params(config)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    convert.write_model(MemoryModel(params, config, words), tmp_path / "t5x", "t5x")
    with pytest.raises(UserError, match=r"4096 rows of embedding, and .* has 910 ids: that is another vocabulary"):
        vikhr_t5.load(tmp_path / "t5x", vocabulary=words.source, extra_ids=10)


def test_bfloat16_answers(folder):
    half = vikhr_t5.load(folder, dtype="bfloat16", batch_size=4)
    assert half.config.dtype == "bfloat16"
    answer = half.generate([cloze(real_texts(1)[0])[0]], Decoding(num_beams=2), max_length=8)[0].answers[0]
    assert answer.text
    assert np.isfinite(answer.log_probability)


def test_the_package_is_light_until_a_model_is_loaded():
    program = "import vikhr_t5, sys; vikhr_t5.load; print([m for m in ('jax', 'numpy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the command -----------------------------------------------------------------------------------------------------


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def infer(folder, *flags):
    return cli.main(["infer", "--checkpoint", str(folder), "--batch_size", "4", "--max_length", "8", *map(str, flags)])


def test_a_text_file_is_answered_line_by_line(folder, model, tmp_path):
    texts = [cloze(text)[0] for text in real_texts(6)]
    (tmp_path / "in.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    assert infer(folder, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl", "--mode", "R") == 0
    lines = read(tmp_path / "out.jsonl")
    assert [line["inputs"] for line in lines] == texts
    expected = [one.answers[0] for one in model.generate(texts, max_length=8, mode="R")]
    assert [line["prediction"] for line in lines] == [answer.text for answer in expected]
    assert [line["filled"] for line in lines] == [answer.filled for answer in expected]
    assert [line["log_probability"] for line in lines] == pytest.approx([a.log_probability for a in expected], abs=1e-3)
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_rows_keep_their_fields_and_several_answers_are_lists(folder, tmp_path):
    rows = [{"id": i, "inputs": text} for i, text in enumerate(real_texts(3))]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ("--input", tmp_path / "in.jsonl", "--beam", 3, "--num_samples", 2, "--length_penalty", 0.6)
    assert infer(folder, *flags, "--output", tmp_path / "out.jsonl", "--token_log_probabilities") == 0
    for row, line in zip(rows, read(tmp_path / "out.jsonl"), strict=True):
        assert row.items() <= line.items()
        assert len(line["predictions"]) == len(line["log_probabilities"]) == 2
        assert "blanks" not in line
        assert [sum(one) for one in line["token_log_probabilities"]] == pytest.approx(line["log_probabilities"])


def test_targets_are_ranked_from_standard_input(folder, model, monkeypatch, capsys):
    text = real_texts(5)[3]
    asked, right = cloze(text)
    row = {"inputs": asked, "targets": [f"<extra_id_0> {right}", "<extra_id_0> Ы ъ щ ", "да"]}
    stdin = io.TextIOWrapper(io.BytesIO((json.dumps(row) + "\n").encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert infer_without_length(folder, "--input", "-", "--score") == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    expected = [answer.log_probability for answer in model.score([asked], [row["targets"]])[0]]
    assert line["log_probabilities"] == pytest.approx(expected, abs=1e-4)
    assert line["best"] == int(np.argmax(expected))
    assert line["targets"] == row["targets"]


def infer_without_length(folder, *flags):
    return cli.main(["infer", "--checkpoint", str(folder), "--batch_size", "4", *map(str, flags)])


class Killed(BaseException):
    """As a kill: nothing that handles errors sees it."""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(model, tmp_path, monkeypatch):
    texts = [text[:60] for text in real_texts(10)]
    rows = [(f"row {i}", {"inputs": text}) for i, text in enumerate(texts)]
    request = infer_files.Request(Decoding(temperature=1.0, num_samples=2, seed=5), max_length=6)
    monkeypatch.setattr(infer_files, "CHUNK_BATCHES", 1)

    def run(name, settings=None, rows=rows):
        infer_files.run(model, lambda: rows, str(tmp_path / name), request, settings or {"model": "m"}, 4)

    run("whole.jsonl")
    real, calls = infer_files.answers, []

    def dying(*arguments):
        calls.append(arguments[-1])
        if len(calls) == 2:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(infer_files, "answers", dying)
    with pytest.raises(Killed):
        run("out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with open(tmp_path / "out.jsonl.partial" / "lines", "ab") as file:
        file.write(b'{"half')  # what a kill leaves of a line
    with pytest.raises(UserError, match="was begun with model 'm', not 'n': remove it"):
        run("out.jsonl", {"model": "n"})
    with pytest.raises(UserError, match="was begun with other input"):
        run("out.jsonl", rows=[("row 0", {"inputs": "другое"}), *rows[1:]])
    run("out.jsonl")
    assert calls == [0, 4, 4, 8]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.partial").exists()
    with pytest.raises(UserError, match="is there already: remove it"):
        run("out.jsonl")


def test_a_killed_run_goes_on_with_its_own_checkpoint_alone(stored, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("\n".join(real_texts(10)), encoding="utf-8")
    run, hf = tmp_path / "run", shutil.copytree(folder, tmp_path / "hf")
    convert.write_model(stored, run / "checkpoints/1", "vikhr")
    monkeypatch.setattr(infer_files, "CHUNK_BATCHES", 1)
    real = infer_files.answers

    def dying(model, chunk, request, first):
        if first:
            raise Killed
        return real(model, chunk, request, first)

    def flags(path):
        return path, "--input", tmp_path / "in.txt", "--output", tmp_path / f"{path.name}.jsonl"

    monkeypatch.setattr(infer_files, "answers", dying)
    for path in (run, hf):
        with pytest.raises(Killed):
            infer(*flags(path))
    monkeypatch.setattr(infer_files, "answers", real)
    capsys.readouterr()
    convert.write_model(stored, run / "checkpoints/2", "vikhr")
    assert infer(*flags(run)) == 2
    assert f"begun with checkpoint '{run}/checkpoints/1', not '{run}/checkpoints/2'" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints/2")
    assert infer(*flags(run)) == 0
    os.utime(hf / "model.safetensors", (0, 0))  # exported again
    assert infer(*flags(hf)) == 2
    assert "hf.jsonl.partial was begun with checkpoint_files" in capsys.readouterr().err


def standard_input(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    return [row for _, row in infer_files.rows_of("-")()]


@pytest.mark.parametrize(
    "text",
    ["\ufeffa\u2028b\r\n\nc\x85d\x0be\x0cf\n", '\ufeff{"inputs": "a\u2028b"}\r\n\n{"inputs": "c\x85d"}\n'],
    ids=["txt", "jsonl"],
)
def test_standard_input_is_read_as_a_file_is(text, request, tmp_path, monkeypatch):
    path = tmp_path / f"in.{request.node.callspec.id}"
    path.write_bytes(text.encode())
    from_file = [row for _, row in infer_files.rows_of(str(path))()]
    assert standard_input(monkeypatch, text) == from_file
    assert len(from_file) == 2


def test_a_date_is_written_as_text(folder, tmp_path, capsys):
    table = pa.table({"inputs": ["a"], "day": [datetime.date(2024, 2, 29)]})
    pq.write_table(table, tmp_path / "in.parquet")
    for output in ("-", tmp_path / "out.jsonl"):
        assert infer(folder, "--input", tmp_path / "in.parquet", "--output", output) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines()[:1])
    assert line["day"] == "2024-02-29"
    assert [line] == read(tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        ("", [], "the input has no row that is not blank"),
        ('{"text": "a"}\n', [], "in.jsonl:1 has no field 'inputs'"),
        ('{"inputs": 5}\n', [], "in.jsonl:1: field 'inputs' is int, and text is wanted"),
        ('{"inputs": "a"}\n{"inputs": \n', [], "in.jsonl:2: not JSON"),
        ('{"inputs": "a"}\n', ["--score"], "in.jsonl:1 has no field 'targets'"),
        ('{"inputs": "a", "targets": ["b", " "]}\n', ["--score"], "in.jsonl:1: field 'targets' is blank, or has"),
        ('{"inputs": "a", "targets": " "}\n', ["--score", "--no_eos"], "in.jsonl:1: field 'targets' is blank"),
        ('{"inputs": "a\\ud83d"}\n', [], "in.jsonl:1: field 'inputs' holds \\ud83d"),
        ('{"inputs": "a", "targets": "b"}\n', ["--score", "--temperature", "0"], "--temperature says how to answer"),
        ('{"inputs": "a", "targets": "b"}\n', ["--score", "--seed", "0"], "--seed says how to answer"),
        ('{"inputs": "a"}\n', ["--extra_ids", "0"], "--extra_ids counts the sentinels of --vocabulary"),
        ('{"inputs": "a"}\n', ["--mode", "Q"], "vikhr-t5: mode 'Q' is not in the vocabulary"),
        ('{"inputs": "a a a a"}\n' * 2, ["--max_input_length", "3"], "tokens, and the limit is 3"),
        ('{"inputs": "a"}\n', ["--beam", "2", "--top_k", "3"], "beam search draws nothing"),
        ('{"inputs": "a"}\n', ["--length_penalty", "2"], "--length_penalty is for beam search"),
        ('{"inputs": "a"}\n', ["--batch_size", "0"], "--batch_size is 0"),
    ],
    ids=[
        "empty",
        "field",
        "type",
        "json",
        "no-targets",
        "blank-target",
        "one-blank-target",
        "half-a-pair",
        "score-at-0",
        "score-seed-0",
        "extra-ids-0",
        "mode",
        "long",
        "beams-draw",
        "penalty",
        "batch",
    ],
)
def test_what_is_refused(folder, tmp_path, capsys, rows, flags, said):
    (tmp_path / "in.jsonl").write_text(rows, encoding="utf-8")
    status = infer_without_length(folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *flags)
    error = capsys.readouterr().err
    assert status == 2
    assert said in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_cut_inputs_are_counted(folder, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a a a a a\nb\n", encoding="utf-8")
    flags = ("--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl", "--max_input_length", 4, "--truncate")
    assert infer(folder, *flags) == 0
    assert "1 of 2 inputs were longer than 4 tokens and were cut" in capsys.readouterr().err
