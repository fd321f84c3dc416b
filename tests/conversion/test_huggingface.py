"""Exported folders: loaded by transformers, verified, sharded, atomic; and what is refused."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from safetensors import safe_open

from conversion import convert, huggingface_config, names, safetensors, verify
from conversion.huggingface import HuggingFaceModel
from conversion.stored import MemoryModel
from conversion.vikhr import Checkpoint
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.train.checkpoint_files import seal

Make = Callable[..., MemoryModel]
LINES = verify.LINES[:4]
PAIRS = [("Переведи на английский: файл", "file")]
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.mark.parametrize(
    ("variant", "dtype", "fields"),
    [
        ("v1.0", "float32", {}),
        ("v1.1", "float32", {}),
        ("v1.1", "bfloat16", {"vocab_size": 2048}),
        ("v1.1", "float32", {"mlp_activations": ("silu", "linear"), "num_encoder_layers": 3, "num_decoder_layers": 1}),
        ("v1.0", "float32", {"mlp_activations": ("gelu",), "logits_via_embedding": False}),
        ("v1.1", "float32", {"logits_via_embedding": True}),
        ("umT5", "float32", {}),
        ("umT5", "bfloat16", {"logits_via_embedding": True, "num_heads": 5}),
    ],
)
def test_transformers_computes_the_same(
    make_model: Make, tmp_path: Path, variant: str, dtype: str, fields: dict
) -> None:
    model = make_model(variant, **fields)
    convert.write_model(model, tmp_path / "out", "hf", dtype)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    measured = verify.measure(model, tmp_path / "out", LINES)
    assert measured.logit_difference <= 1e-4
    assert measured.largest_logit > 1
    assert all(measured.checks().values()), measured


def test_verification_finds_a_wrong_weight(make_model: Make, tmp_path: Path) -> None:
    model = make_model("v1.1")
    convert.write_model(model, tmp_path / "out", "hf", "float32")
    model.params["decoder"]["layers"]["self_attention"]["key"]["kernel"][1, 3, 5] += 0.05
    with open(os.devnull, "w") as sink:
        assert not verify.verify(model, tmp_path / "out", console=Console(file=sink))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_gives_its_last_samples_without_sentinels(tmp_path: Path) -> None:
    samples = [
        {"step": 1, "input": "раньше", "target": "нет"},
        {"step": 2, "input": "[NLU] до <extra_id_0>.", "target": "<extra_id_0> дома"},
        {"step": 2, "input": PAIRS[0][0], "target": PAIRS[0][1]},
    ]
    assert verify.held_out(tmp_path) == []
    cut_short = '{"step": 3, "input": "поз'
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples) + cut_short)
    assert verify.held_out(tmp_path) == PAIRS


def test_verification_prints_a_table(make_model: Make, tmp_path: Path) -> None:
    model = make_model("v1.0")
    convert.write_model(model, tmp_path / "out", "hf", "float32")
    console = Console(record=True, width=120)
    assert verify.verify(model, tmp_path / "out", LINES, PAIRS, console)
    text = console.export_text()
    for shown in ("logits", "loss", "greedy tokens", "token ids", "5 of 5 equal", "ok", PAIRS[0][0]):
        assert shown in text


def test_rows_past_the_vocabulary_are_never_generated(make_model: Make, unigram: Vocabulary, tmp_path: Path) -> None:
    model = make_model("v1.1")
    rows = unigram.padded_size
    assert rows > unigram.size
    model.params["decoder"]["logits_dense"]["kernel"][:, unigram.size :] *= 50
    convert.write_model(model, tmp_path / "out", "hf", "float32")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    generated = theirs.generate(torch.tensor([[5, 6, 7, 1]]), max_new_tokens=20, do_sample=False)
    assert generated.max() < unigram.size
    assert verify.measure(model, tmp_path / "out", LINES).greedy_equal == len(LINES)


def test_shards_hold_every_array_and_their_index(make_model: Make, tmp_path: Path) -> None:
    model = make_model("v1.1")
    convert.write_model(model, tmp_path / "one", "hf", "float32")
    convert.write_model(model, tmp_path / "many", "hf", max_shard_size=100_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * model.config.param_count()
    assert len(set(index["weight_map"].values())) > 3
    expected = dict(names.to_huggingface(model))
    assert set(index["weight_map"]) == set(expected)
    with safe_open(tmp_path / "one" / "model.safetensors", "numpy") as whole:
        assert set(whole.keys()) == set(expected)
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "many" / file, "numpy") as shard:
                np.testing.assert_array_equal(shard.get_tensor(name), expected[name])
                np.testing.assert_array_equal(whole.get_tensor(name), expected[name])
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "many").state_dict()
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded[name].numpy(), value)


def test_bfloat16_is_rounded_to_nearest(make_model: Make, tmp_path: Path) -> None:
    model = make_model("v1.0")
    convert.write_model(model, tmp_path / "out", "hf", "bfloat16")
    stored = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert stored.dtype == torch.bfloat16
    expected = model.params["token_embedder"]["embedding"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(stored.shared.weight.detach().float().numpy(), expected)


@pytest.mark.parametrize("variant", ["v1.0", "v1.1", "umT5"])
def test_saved_again_by_transformers_it_computes_the_same(make_model: Make, tmp_path: Path, variant: str) -> None:
    model = make_model(variant)
    convert.write_model(model, tmp_path / "out", "hf")
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert all(verify.measure(model, tmp_path / "again", LINES).checks().values())
    assert verify.same_arrays(model, HuggingFaceModel(tmp_path / "again", model.vocabulary))


def test_an_interrupted_export_leaves_nothing(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("v1.1")
    convert.write_model(model, tmp_path / "out", "hf", "float32")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    first = list(names.to_huggingface(model))[:3]

    def interrupted(*args: object) -> Iterator[tuple[str, np.ndarray]]:
        yield from first
        raise KeyboardInterrupt

    monkeypatch.setattr(names, "to_huggingface", interrupted)
    for name in ("out", "other"):
        with pytest.raises(KeyboardInterrupt):
            convert.write_model(model, tmp_path / name, "hf", "bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_full_disk_is_said(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match="no room for the model"):
            convert.write_model(make_model("v1.0"), tmp_path / "out", "hf")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors, "blocks", full)
    with pytest.raises(UserError, match="the disk filled while the model was written"):
        convert.write_model(make_model("v1.0"), tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(make_model: Make, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    model = make_model("v1.1")
    for said, arguments in {
        "holds no converted model": (tmp_path / "mine", "hf"),
        "dtype 'float16'": (tmp_path / "out", "hf", "float16"),
        "max_shard_size 'big'": (tmp_path / "out", "hf", None, "big"),
    }.items():
        with pytest.raises(UserError, match=said):
            convert.write_model(model, *arguments)
    with pytest.raises(UserError, match="trained with another vocabulary"):
        convert.write_model(make_model("v1.1", vocab_size=1024), tmp_path / "out", "hf")
    with pytest.raises(UserError, match="carries no vocabulary"):
        convert.write_model(MemoryModel(model.params, model.config), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("activations", [("gelu", "gelu"), ("linear",), ("linear", "gelu"), ("gelu", *["linear"] * 2)])
def test_activations_without_a_name_are_refused(make_model: Make, activations: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="mlp_activations"):
        huggingface_config.feed_forward(make_model("v1.1", mlp_activations=activations).config)


@pytest.mark.parametrize(("size", "count"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), (7, 7), ("300", 300)])
def test_sizes(size: int | str, count: int) -> None:
    assert safetensors.parse_size(size) == count


def test_card_and_configuration(make_model: Make, unigram: Vocabulary, tmp_path: Path) -> None:
    model = make_model("v1.1")
    convert.write_model(model, tmp_path / "my-t5", "hf", "float32")
    card = (tmp_path / "my-t5" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for said in ("# my-t5", "1,000 steps", "`[NLU]`", f"{unigram.size:,} ids", 'from_pretrained("my-t5")'):
        assert said in card
    config = json.loads((tmp_path / "my-t5" / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["feed_forward_proj"]) == (False, "gated-gelu")
    assert [config[f"{name}_token_id"] for name in ("decoder_start", "pad", "eos")] == [0, 0, 1]


def test_the_card_tells_what_the_run_says_of_itself(make_model: Make, tmp_path: Path) -> None:
    convert.write_model(make_model("v1.1"), tmp_path / "run" / "checkpoints" / "1000", "vikhr")
    folder = tmp_path / "run" / "checkpoints" / "1000"
    said = "MIXTURE_OR_TASK_NAME = 'my_flan'\nBATCH_SIZE = 8\n"
    (folder / "config.gin").write_text(said)
    seal(folder)
    evaluations = [
        {"kind": "eval", "step": step, "loss": loss, "loss/habr": 2} for step, loss in ((1000, 1.5), (2000, 1))
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in evaluations))
    convert.write_model(Checkpoint(tmp_path / "run"), tmp_path / "hf", "hf", license="apache-2.0")
    card = (tmp_path / "hf" / "README.md").read_text()
    for part in ("license: apache-2.0\n", "`my_flan`", "| loss | 1.5 |", "| loss/habr | 2 |", said.strip()):
        assert part in card
    convert.write_model(Checkpoint(folder), tmp_path / "copied", "vikhr")
    convert.write_model(Checkpoint(tmp_path / "copied"), tmp_path / "plain", "hf")
    assert "## Training" not in (tmp_path / "plain" / "README.md").read_text()
