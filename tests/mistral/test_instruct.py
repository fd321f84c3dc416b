"""A run of `instruct`, small: its losses against transformers', chat by chat, and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from vikhr_mistral import chats, fingerprint, pieces, tokenizer_files
from vikhr_mistral.instruct import instruct
from vikhr_t5.errors import UserError

COUNT = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("instruct") / "base"
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32_000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer_files.write(pieces.open_model("mistral"), folder)
    return folder


def write_chats(path: Path, count: int = COUNT) -> Path:
    rows = []
    for n in range(count):
        turns = [
            ("user", f"Сколько будет {n} + 1?"),
            ("bot", f"Будет {n + 1}."),
            ("user", "Точно?"),
            ("bot", "Да! " * (n % 7 + 1)),
        ]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(folder: Path, base: Path, **changes: object) -> Path:
    train = {
        "batch_size": 4,
        "per_device_batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "precision": "float32",
        "gradient_checkpointing": False,
        "data_workers": 0,
        "log_every": 1,
        "loss_chunk": 64,
    }
    values = {
        "model": str(base),
        "output_dir": str(folder / "run"),
        "chats": [str(write_chats(folder / "chats.jsonl"))],
        "epochs": 2,
        "sequence_length": 256,
        "held_out": 0.2,
        "dtype": "float32",
        "train": train,
        **changes,
    }
    path = folder / "instruct.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    instruct(settings(folder, base), ["train.save_every=3"])
    return folder / "run"


def lines(run: Path, kind: str) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def reference_loss(model, base: Path, chat_file: Path) -> float:
    """transformers' own loss of the held-out chats: each alone, weighed by the bot's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    chats.set_chat_template(tokenizer)
    total, count = 0.0, 0
    for example in chats.load(tokenizer, [str(chat_file)], 256, 0.2).validation:
        ids, labels = (torch.tensor(example[name])[None].long() for name in ("input_ids", "labels"))
        tokens = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model.eval()(input_ids=ids, labels=labels).loss) * tokens
        count += tokens
    return total / count


def test_held_out_losses_are_those_of_each_chat_alone(run, base):
    """So packed chats do not see each other, and only the bot's tokens count."""
    first, last = lines(run, "eval")[0], lines(run, "eval")[-1]
    model = AutoModelForCausalLM.from_pretrained(base)
    chat_file = run.parent / "chats.jsonl"
    assert first["loss"] == pytest.approx(reference_loss(model, base, chat_file), abs=2e-5)
    tuned = PeftModel.from_pretrained(model, run / "model")
    assert last["loss"] == pytest.approx(reference_loss(tuned, base, chat_file), abs=2e-5)
    assert last["loss"] < first["loss"] - 0.02


def test_what_a_run_leaves_behind(run, base):
    assert {"model", "metrics.jsonl", "run.json", "config.yaml", "checkpoints"} <= {path.name for path in run.iterdir()}
    written = json.loads((run / "model/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (16, 16, 0.05)
    assert set(written["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert written["modules_to_save"] is None
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    asked = [{"role": "user", "content": "Да?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<s>user\nДа?</s>\n<s>bot\n")
    assert (run / "model/tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert fingerprint.check(run / "model", base)


def test_steps_are_those_of_the_epochs(run, base, tmp_path):
    steps = lines(run, "train")[-1]["step"]
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    loaded = chats.load(tokenizer, [str(run.parent / "chats.jsonl")], 256, 0.2)
    rows = sum(len(example["input_ids"]) for example in loaded.train) / 256
    assert 2 * rows / 4 <= steps <= 2 * rows / 4 * 1.3 + 1
    instruct(settings(tmp_path, base, pack=False, epochs=1), ["train.max_steps=2"])
    assert lines(tmp_path / "run", "train")[-1]["step"] == 2


def test_a_run_goes_on_with_its_own_chats_only(run, base):
    configuration = run.parent / "instruct.yaml"
    before = (run / "model/adapter_model.safetensors").read_bytes()
    instruct(configuration)  # it has ended: the model is written again
    assert (run / "model/adapter_model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="was begun with chats = "):
        instruct(configuration, ["held_out=0.3"])


def test_full_tuning_gives_a_plain_model(base, tmp_path):
    instruct(settings(tmp_path, base, trainable="full"), ["train.max_steps=1", "train.learning_rate=1e-3"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert not (tmp_path / "run/model/adapter_config.json").exists()
    loss = lines(tmp_path / "run", "eval")[-1]["loss"]
    assert loss == pytest.approx(reference_loss(model, base, tmp_path / "chats.jsonl"), abs=2e-5)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(base, tmp_path):
    """Under torchrun on gloo, sharded by FSDP2."""
    changes = ["train.max_steps=4", "train.fsdp=true", "lora.dropout=0.0"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        settings(tmp_path / name, base)
    instruct(tmp_path / "one/instruct.yaml", changes)
    flags = [flag for change in changes for flag in ("--set", change)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "vikhr_mistral.cli", "instruct", "--config", str(tmp_path / "two/instruct.yaml"), *flags]
    root = str(Path(__file__).parents[2])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"})
    for kind in ("eval", "train"):
        one, two = ([line["loss"] for line in lines(tmp_path / name / "run", kind)] for name in ("one", "two"))
        assert two == pytest.approx(one, abs=1e-4)
        assert len(one) > 1
    weights = [load_file(tmp_path / name / "run/model/adapter_model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("epoch=3", "unknown setting 'epoch'; nearest: epochs"),
        ("lora.rank=8", "unknown setting 'rank'"),
        ("lora.target_modules=[q_prj]", "no module 'q_prj'; nearest: q_proj"),
        ("train.learning_rate=fast", "train: learning_rate is 'fast', and a number is wanted"),
        ("chats=[]", "chats is empty"),
        ("chats=absent.jsonl", "chats is 'absent.jsonl', and a list is wanted"),
        ("chats=[absent.jsonl]", "absent.jsonl: no such file or folder"),
        ("model=absent", "absent: no such folder"),
        ("epochs=0", "epochs and sequence_length are at least"),
    ],
)
def test_bad_settings_are_one_line(base, tmp_path, override, says):
    with pytest.raises(UserError, match=says) as caught:
        instruct(settings(tmp_path, base), [override])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
