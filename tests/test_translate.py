"""Translation of a set: rows, provenance, rejected ones, kill -9; and the three families of models, tiny and random."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from vikhr_t5 import cli, translate
from vikhr_t5.errors import UserError
from vikhr_t5.translation_models import TranslationModel

ROOT = Path(__file__).resolve().parents[1]
LETTERS = dict(zip("abcdefghijklmnoprstuvwyz", "абцдефгхийклмнопрстуввыз", strict=True))
CYRILLIC = str.maketrans(LETTERS | {latin.upper(): cyrillic.upper() for latin, cyrillic in LETTERS.items()})


class Letters:
    """Latin letters become Cyrillic, those of masks (XXXA) stay. Some words make it fail as models do."""

    def __init__(self) -> None:
        self.given: list[list[str]] = []

    def fits(self, text: str) -> bool:
        return len(text.split()) <= 12

    def translate(self, texts: Sequence[str]) -> list[tuple[str, bool]]:
        self.given.append(list(texts))
        return [(self._one(text), "endless" not in text) for text in texts]

    def _one(self, text: str) -> str:
        if "forget" in text:  # a model that forgets its masks
            text = " ".join(word for word in text.split() if "XXX" not in word)
        if "copy" in text:
            return text
        if "loop" in text:
            return "опять " * 9
        if "sum" in text:
            text = text.replace("7", "8")
        kept = [word if "XXX" in word else word.translate(CYRILLIC) for word in text.split()]
        return " ".join(kept)


PROMPT = "Premise: {{premise}} in 1999.\n\nIs it so, {name}? Choose one.\n  (A) yes\n  (B) no, never"
ROWS = [
    {"inputs": PROMPT, "target": "yes", "task_name": "nli", "id": 3},
    {"inputs": "Please forget {this} and that.", "target": "- `code` stays\n- B", "task_name": "b", "id": 4},
    {"inputs": "This is a copy of what was there", "target": "yes", "task_name": "c", "id": 5},
    {"inputs": "A question", "target": "a loop of words, as a model has that is not sure", "task_name": "d", "id": 6},
    {"inputs": "A sum of 7", "target": "yes", "task_name": "e", "id": 7},
    {"inputs": "A question", "target": "an endless answer", "task_name": "f", "id": 8},
    {"inputs": "A question", "target": None, "task_name": "g", "id": 9},
    {"inputs": " \n", "target": "yes", "task_name": "h", "id": 10},
    {"inputs": "long " * 40, "target": "B", "task_name": "i", "id": None},
]
FIELDS = ("inputs", "target")


def source(rows: Sequence[dict[str, Any]]) -> Callable[[], Iterator[translate.Row]]:
    return lambda: ((f"set[{i}]", row) for i, row in enumerate(rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_in_their_order_with_provenance_and_the_failed_ones_beside(tmp_path: Path) -> None:
    output, model = tmp_path / "ru.jsonl", Letters()
    report = translate.translate(source(ROWS), output, model, {"model": "x"}, fields=FIELDS, chunk=4)
    kept, rejected = read(output), read(tmp_path / "ru.jsonl.rejected")
    assert kept[0] == {
        "task_name": "nli",
        "id": 3,
        "inputs": "Премисе: {{premise}} ин 1999.\n\nИс ит со, {name}? Цхоосе оне.\n  (A) ыес\n  (B) но, невер",
        "targets": "ыес",
    }
    # Masks were lost, and the pieces around them were translated.
    assert kept[1]["inputs"] == "Плеасе форгет {this} анд тхат."
    assert kept[1]["targets"] == "- `code` стаыс\n- B"
    assert [row["id"] for row in kept] == [3, 4, None]
    assert kept[2]["inputs"] == "лонг " * 40
    assert kept[2]["targets"] == "B"
    assert max(len(text.split()) for texts in model.given for text in texts) <= 12
    assert [(row["where"], row["reason"], row.get("field")) for row in rejected] == [
        ("set[2]", "script", "inputs"),
        ("set[3]", "repetition", "targets"),
        ("set[4]", "numbers", "inputs"),
        ("set[5]", "cut", "targets"),
        ("set[6]", "no_text", None),
        ("set[7]", "no_text", None),
    ]
    assert rejected[2]["source"] == {"inputs": "A sum of 7", "targets": "yes"}
    assert rejected[2]["translation"] == {"inputs": "А сум оф 8", "targets": "ыес"}
    assert str(report).startswith("9 rows read, 3 kept, 6 rejected (cut 1, no_text 2, numbers 1")
    recorded = json.loads((tmp_path / "ru.jsonl.report").read_text())
    assert recorded["report"] == {"total": 9, "read": 9, "kept": 3, "rejected": report.rejected}
    assert (recorded["settings"]["model"], recorded["settings"]["fields"]) == ("x", list(FIELDS))
    assert len(list(tmp_path.iterdir())) == 3
    # Equal sentences of a chunk are translated once.
    assert model.given[0].count("yes") == 1


def test_reasons_can_be_ignored(tmp_path: Path) -> None:
    report = translate.translate(source(ROWS), tmp_path / "o", Letters(), {}, FIELDS, ignore=["numbers", "script"])
    assert (report.kept, report.rejected["copy"]) == (4, 1)  # what is no longer of another script is still a copy
    with pytest.raises(UserError, match="'number'; nearest: numbers"):
        translate.translate(source(ROWS), tmp_path / "p", Letters(), {}, FIELDS, ignore=["number"])


def test_no_output_is_overwritten_or_mixed(tmp_path: Path) -> None:
    output = tmp_path / "ru.jsonl"
    translate.translate(source(ROWS), output, Letters(), {"model": "x"}, FIELDS)
    before, model = output.read_bytes(), Letters()
    again = translate.translate(source(ROWS), output, model, {"model": "x"}, FIELDS)
    assert (again.kept, model.given, output.read_bytes()) == (3, [], before)
    with pytest.raises(UserError, match=r"ru\.jsonl was made with model 'x', not 'y': remove it"):
        translate.translate(source(ROWS), output, Letters(), {"model": "y"}, FIELDS)
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="is there already, and has no report"):
        translate.translate(source(ROWS), tmp_path / "other.jsonl", Letters(), {}, FIELDS)


class Stopped(Letters):
    """Stops in the second chunk."""

    def translate(self, texts: Sequence[str]) -> list[tuple[str, bool]]:
        if len(self.given) > 2:
            raise KeyboardInterrupt
        return super().translate(texts)


def test_what_was_begun_with_other_settings_is_not_continued(tmp_path: Path) -> None:
    output = tmp_path / "ru.jsonl"
    with pytest.raises(KeyboardInterrupt):
        translate.translate(source(ROWS), output, Stopped(), {"model": "x"}, FIELDS, chunk=2)
    assert not output.exists()
    with pytest.raises(UserError, match=r"ru\.jsonl\.partial was made with model 'x', not 'y'"):
        translate.translate(source(ROWS), output, Letters(), {"model": "y"}, FIELDS, chunk=2)
    with pytest.raises(UserError, match="the source had 9 rows and now has 8"):
        translate.translate(source(ROWS[:8]), output, Letters(), {"model": "x"}, FIELDS, chunk=2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"inputs": "a", "targets": "b"}], r"set\[0\] has no field 'target'; nearest: targets; .* --fields"),
        ([], "the source has no row"),
    ],
)
def test_bad_sources(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        translate.translate(source(rows), tmp_path / "o.jsonl", Letters(), {}, FIELDS)
    with pytest.raises(UserError, match="unknown script 'Kyrl'; nearest: Cyrl"):
        translate.translate(source(rows), tmp_path / "o.jsonl", Letters(), {}, FIELDS, script="Kyrl")


PROGRAM = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import test_translate as t
class Slow(t.Letters):
    def translate(self, texts):
        time.sleep(0.02)
        return super().translate(texts)
rows = [dict(row, id=i) for i, row in enumerate(t.ROWS * {times})]
model = {model}
t.translate.translate(t.source(rows), {output!r}, model, {{}}, t.FIELDS, ignore=list({ignore!r}), chunk={chunk})
"""


def kill_and_rerun(
    folder: Path, model: str, kills: int, longest: float, times: int, chunk: int, ignore: tuple[str, ...] = ()
) -> None:
    """Asserts that a run killed some times, up to `longest` seconds after it began to write, gives the same bytes."""

    def run(output: str, seconds: float | None = None) -> bool:
        """Whether it came to its end before it was killed, `seconds` after it had opened its files."""
        places = {"root": str(ROOT), "tests": str(ROOT / "tests"), "output": str(folder / output)}
        program = PROGRAM.format(**places, model=model, ignore=ignore, times=times, chunk=chunk)
        state = folder / f"{output}.partial" / "state"
        before = state.stat().st_mtime_ns if state.exists() else None
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
        if seconds is not None:
            while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):
                time.sleep(0.01)
            time.sleep(seconds)
            process.kill()
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        return process.returncode == 0

    assert run("whole.jsonl")
    moments = random.Random(3)
    assert not run("killed.jsonl", 0.0)
    for _ in range(kills - 1):
        run("killed.jsonl", moments.uniform(0.0, longest))
    assert run("killed.jsonl")
    for suffix in ("", ".rejected", ".report"):
        assert (folder / f"killed.jsonl{suffix}").read_bytes() == (folder / f"whole.jsonl{suffix}").read_bytes()
    assert not (folder / "killed.jsonl.partial").exists()


def test_kill_9_at_any_moment_and_the_same_bytes(tmp_path: Path) -> None:
    kill_and_rerun(tmp_path, "Slow()", kills=5, longest=0.5, times=15, chunk=7)
    assert len(read(tmp_path / "killed.jsonl")) == 45


# ---- models ----------------------------------------------------------------------------------------------------------

EOS_OF = {"nllb": 2, "madlad": 1, "marian": 0}
LANGUAGES = {"nllb": ("eng_Latn", "rus_Cyrl"), "madlad": (None, "ru"), "marian": (None, "rus"), "pair": (None, None)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per family, as `save_pretrained` writes it."""
    import torch
    import transformers as hf

    folder = tmp_path_factory.mktemp("models")
    lines = (ROOT / "tasks" / "demo_data" / "ru.txt").read_text(encoding="utf-8").splitlines()[:500]
    lines += (ROOT / "tasks" / "demo_data" / "en.txt").read_text(encoding="utf-8").splitlines()[:500]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spm"),
        vocab_size=400,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=["<2ru>", "<2de>"],
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    torch.manual_seed(0)
    bart: dict[str, Any] = {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    bart |= {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("attention_heads",)}
    bart |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "init_std": 1.0}

    tokenizer: Any = hf.T5Tokenizer(vocab=[(name, pieces.get_score(i)) for i, name in enumerate(names)], extra_ids=0)
    small = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2, "initializer_factor": 5.0}
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=len(names), decoder_start_token_id=0, **small))
    saved = {"madlad": (t5, tokenizer)}

    vocabulary = {name: i for i, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *names[5:]])}
    vocabulary |= {
        c: len(vocabulary) + i for i, c in enumerate(sorted(set("".join(lines)) - vocabulary.keys() - {" "}))
    }
    tokenizer = hf.NllbTokenizer(vocab=vocabulary, merges=[])
    config = hf.M2M100Config(vocab_size=len(tokenizer), max_position_embeddings=256, **bart)
    saved["nllb"] = hf.M2M100ForConditionalGeneration(config), tokenizer

    for family, languages in (("marian", [">>rus<<", ">>ukr<<"]), ("pair", [])):
        ids = {name: i for i, name in enumerate(["</s>", "<unk>", *names[3:], *languages, "<pad>"])}
        (folder / "vocab.json").write_text(json.dumps(ids))
        tokenizer = hf.MarianTokenizer(*[str(folder / "spm.model")] * 2, str(folder / "vocab.json"))
        special = {"pad_token_id": ids["<pad>"], "eos_token_id": 0, "decoder_start_token_id": ids["<pad>"]}
        marian = hf.MarianConfig(vocab_size=len(ids), forced_eos_token_id=0, **special, **bart)
        saved[family] = hf.MarianMTModel(marian), tokenizer
    for family, (model, tokenizer) in saved.items():
        model.save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    hf.BertConfig().save_pretrained(folder / "bert")
    return folder


TEXTS = ["Open it", "A", "Save, or close"]


@pytest.mark.parametrize("family", LANGUAGES)
def test_batches_give_what_transformers_gives_for_each_text_alone(models: Path, family: str) -> None:
    import torch
    import transformers as hf

    source_lang, target_lang = LANGUAGES[family]
    ours = TranslationModel(str(models / family), source_lang, target_lang, batch_tokens=20)
    assert len(ours._batches([ours._length(text) for text in TEXTS])) > 1
    got = ours.translate(TEXTS)
    assert len(set(got)) == len(TEXTS)  # a model that heeds its input

    tokenizer = hf.AutoTokenizer.from_pretrained(models / family)
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(models / family)
    model.generation_config.forced_eos_token_id = None
    token = {"nllb": "rus_Cyrl", "madlad": "<2ru>", "marian": ">>rus<<"}.get(family)
    token_id = tokenizer.convert_tokens_to_ids(token) if token else None
    assert token_id != tokenizer.unk_token_id
    for text, (translation, whole) in zip(TEXTS, got, strict=True):
        ids = tokenizer(text).input_ids
        if family == "nllb":  # <language> text </s>
            ids = [tokenizer.convert_tokens_to_ids("eng_Latn"), *ids[1:]]
        elif family == "madlad":
            ids = [*tokenizer("<2ru>", add_special_tokens=False).input_ids, *ids]
            assert token_id in ids
        elif family == "marian":
            ids = [token_id, *ids]
        assert ours._length(text) == len(ids)
        forced = token_id if family == "nllb" else None
        places = next(batch for batch in ours._batches([ours._length(t) for t in TEXTS]) if TEXTS.index(text) in batch)
        limit = 2 * max(ours._length(TEXTS[place]) for place in places) + 16
        with torch.inference_mode():
            output = model.generate(torch.tensor([ids]), max_new_tokens=limit, num_beams=1, forced_bos_token_id=forced)
        assert " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split()) == translation
        assert whole == (tokenizer.eos_token_id in output[0, 1:])


def run(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit status, and what the command says: its errors when it has failed."""
    status = cli.main(["translate", *argv])
    out, err = capfd.readouterr()
    return status, err if status else out


def test_the_command(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or the hub is tried for half a minute
    rows = [{"question": f"Open the file {i}", "answer": "Save it", "set": "a"} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[2]) + "\n")
    given = ["--input", f"{tmp_path}/a.parquet,{tmp_path}/b.jsonl", "--fields", "question,answer"]
    output = tmp_path / "out" / "ru.jsonl"
    model = ["--model", str(models / "marian"), "--target_lang", "rus", "--output", str(output)]
    every = ["--ignore", "cut,numbers,script,length,repetition"]
    status, said = run(capfd, *given, *model, *every)
    assert (status, said) == (0, f"3 rows read, 3 kept, 0 rejected\nwritten: {output}\n")
    translated = read(output)
    assert [sorted(row) for row in translated] == [["inputs", "set", "targets"]] * 3
    assert len({row["targets"] for row in translated}) == 1
    settings = json.loads(Path(f"{output}.report").read_text())["settings"]
    assert (settings["target_lang"], settings["num_beams"], settings["script"]) == ("rus", 1, "Cyrl")
    assert run(capfd, *given, *model, *every)[0] == 0
    assert "made with num_beams 1, not 2" in run(capfd, *given, *model, *every, "--num_beams", "2")[1]

    for arguments, message in (
        ([*given[:2], *model], "has no field 'inputs'"),
        ([*model], "give --input FILES, or --mixture TASK"),
        ([*given[:2], *model, "--fields", "question"], "--fields question: two names"),
        ([*given, *model, "--target_lang", "ru"], "marian needs one of its languages (nearest: rus"),
        ([*given, *model, "--model", str(models / "nllb")], "no --source_lang: "),
        ([*given, *model, "--model", str(models / "bert")], "is a bert: translate takes NLLB"),
        ([*given, *model, "--model", str(tmp_path)], "no translation model"),
        ([*given, *model, "--model", "nobody/nothing"], "give --model a local folder; where there is a network"),
        (["--input", str(tmp_path / "none.jsonl"), *model], "none.jsonl: no such file"),
    ):
        output.unlink(missing_ok=True)
        status, said = run(capfd, *arguments)
        assert status == 2, said
        assert message in said
        assert said.count("\n") == 1


@pytest.mark.slow
def test_kill_9_of_a_model_with_beams(models: Path, tmp_path: Path) -> None:
    model = f"t.TranslationModel({str(models / 'pair')!r}, None, None, num_beams=2, batch_tokens=60, max_tokens=30)"
    every = ("cut", "empty", "placeholders", "options", "numbers", "script", "length", "repetition", "copy", "lines")
    kill_and_rerun(tmp_path, model, kills=4, longest=6.0, times=1, chunk=2, ignore=every)
    translated = read(tmp_path / "killed.jsonl")
    assert len(translated) == 7
    assert len({row["inputs"] for row in translated}) > 3
