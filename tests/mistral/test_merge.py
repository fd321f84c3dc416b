"""A merged model against the base with peft's adapter on it: logits, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from vikhr_mistral import fingerprint
from vikhr_mistral.merge import merge
from vikhr_t5.errors import UserError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {
    "saiga": {"r": 16, "lora_alpha": 16, "target_modules": ATTENTION},
    "all linear, patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 32, "up_proj": 1},
    },
    "embeddings and head": {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    "new rows": {
        "r": 4,
        "target_modules": ATTENTION,
        "trainable_token_indices": {"embed_tokens": [60, 61, 63], "lm_head": [60, 61, 63]},
    },
    "rows of the embeddings": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
    "new rows alone": {"target_modules": ["embed_tokens", "lm_head"], "token_indices": [60, 61, 63]},
    "low-rank embeddings": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
}


def model(seed: int = 0, vocab_size: int = 64, dtype: torch.dtype = torch.float32) -> MistralForCausalLM:
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return MistralForCausalLM(config).to(dtype).eval()


def train_adapter(base: Path, folder: Path, settings: dict[str, object], dtype: torch.dtype = torch.float32) -> Path:
    """An adapter whose every trainable number is random, as training leaves it; with the fingerprint of its base."""
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    kind = TrainableTokensConfig if "token_indices" in settings else LoraConfig
    adapted = get_peft_model(loaded, kind(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    fingerprint.write(folder, base)
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    model().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return train_adapter(base, tmp_path / "adapter", KINDS["saiga"])


def logits(network) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(torch.arange(64)[None]).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_base_and_adapter(base, tmp_path, kind):
    adapter = train_adapter(base, tmp_path / "adapter", KINDS[kind])
    merge(adapter, tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (found - expected).abs().max() < 1e-3
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.5


def test_weights_without_a_change_are_the_same_bytes(base, adapter, tmp_path):
    merge(adapter, tmp_path / "merged", base)
    assert {path.name for path in (tmp_path / "merged").glob("model*")} == {path.name for path in base.glob("model*")}
    for file in base.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "merged" / file.name)
        for name in before:
            assert torch.equal(before[name], after[name]) == (name.split(".")[-2] not in ATTENTION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_once(tmp_path, dtype):
    model(dtype=dtype).save_pretrained(tmp_path / "base")
    adapter = train_adapter(tmp_path / "base", tmp_path / "adapter", KINDS["saiga"], dtype)
    merge(adapter, tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    change = {
        name.removeprefix("base_model.model."): t
        for name, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    name = "model.layers.1.self_attn.o_proj"
    a, b = (change[f"{name}.lora_{part}.weight"].double() for part in "AB")
    exact = before[f"{name}.weight"].double() + b @ a
    assert after[f"{name}.weight"].dtype == dtype
    error = (after[f"{name}.weight"].double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 1e-6).all()


def test_settings_and_the_adapters_tokenizer_come_along(base, adapter, tmp_path):
    for folder in (base, adapter):
        (folder / "tokenizer.json").write_text(f'"{folder.name}"')
        (folder / "tokenizer_config.json").write_text("{}")
    (base / "tokenizer.model").write_text("of the base")
    (adapter / "chat_template.jinja").write_text("Saiga")
    merge(adapter, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir() if not path.name.startswith("model")}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (tmp_path / "merged/tokenizer.json").read_text() == '"adapter"'


def test_an_adapter_of_another_base_is_refused(base, adapter, tmp_path):
    model(seed=2).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"trained on other weights than those in {tmp_path}/other.*{base}"):
        merge(adapter, tmp_path / "merged", tmp_path / "other")
    assert not (tmp_path / "merged").exists()


def test_without_a_fingerprint_the_shapes_tell(base, tmp_path):
    model(vocab_size=80).save_pretrained(tmp_path / "wide")
    narrow = train_adapter(base, tmp_path / "narrow", KINDS["embeddings and head"])
    rows = {"r": 4, "target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [70]}}
    wide = train_adapter(tmp_path / "wide", tmp_path / "tokens", rows)
    for adapter in (narrow, wide):
        (adapter / fingerprint.FILE).unlink()
    with pytest.raises(UserError, match=r"of another base: it changes lm_head.weight of 64 × 32, and .* is 80 × 32"):
        merge(narrow, tmp_path / "merged", tmp_path / "wide")
    with pytest.raises(UserError, match=r"embed_tokens.weight of at least 71 × 32, and .* is 64 × 32"):
        merge(wide, tmp_path / "merged", base)
    merge(wide, tmp_path / "merged", tmp_path / "wide")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "LOHA"}, "kind LOHA"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=pissa_niter_16"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"base_model_name_or_path": "someone/model"}, "someone/model.*give it with --base"),
    ],
)
def test_what_cannot_be_merged_is_refused(adapter, tmp_path, changes, says):
    edit(adapter, **changes)
    with pytest.raises(UserError, match=says):
        merge(adapter, tmp_path / "merged")


def test_other_kinds_of_adapters(base, tmp_path):
    dora = train_adapter(base, tmp_path / "dora", {**KINDS["saiga"], "use_dora": True})
    with pytest.raises(UserError, match=r"lora_magnitude_vector.*merge_and_unload"):
        merge(dora, tmp_path / "merged")
    prompts = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    prompts.save_pretrained(tmp_path / "prompts")
    with pytest.raises(UserError, match="kind PROMPT_TUNING"):
        merge(tmp_path / "prompts", tmp_path / "merged")


def test_folders_that_are_none_and_files_that_are_cut(base, adapter, tmp_path):
    with pytest.raises(UserError, match="is no adapter"):
        merge(base, tmp_path / "merged")
    with pytest.raises(UserError, match="give another folder"):
        merge(adapter, base)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty"):
        merge(adapter, tmp_path / "mine")
    shutil.copytree(adapter, tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        merge(tmp_path / "cut", tmp_path / "merged")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensors[name] for name in tensors if "lora_B" not in name}, weights)
    with pytest.raises(UserError, match=r"lora_A.* and no .*lora_B"):
        merge(tmp_path / "cut", tmp_path / "merged", base)
    shard = min(base.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"{shard} is not a whole safetensors file"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_fingerprint_is_of_every_byte(base, tmp_path):
    same = tmp_path / "same"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(same)  # one file in place of many
    assert fingerprint.fingerprint(same) == fingerprint.fingerprint(base)
    tensors = load_file(same / "model.safetensors")
    value = np.float32(tensors["lm_head.weight"][17, 3])
    tensors["lm_head.weight"][17, 3] = float(np.nextafter(value, np.float32(9)))
    save_file(tensors, same / "model.safetensors", {"format": "pt"})
    assert fingerprint.fingerprint(same) != fingerprint.fingerprint(base)
