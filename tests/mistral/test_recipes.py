"""Every recipe: read strictly, and carried to a model of its size on the meta device."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import MistralConfig, MistralForCausalLM

import vikhr_mistral
from vikhr_mistral.config import read_config
from vikhr_mistral.demo import MODEL
from vikhr_mistral.instruct import InstructConfig
from vikhr_mistral.models import add_adapters
from vikhr_mistral.pretrain import PretrainConfig
from vikhr_t5.data.chats import PUBLISHED

CONFIGS = Path(vikhr_mistral.__file__).parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
ROWS = 40_000
GPUS = {"8xH100": (8, 80), "1xH100": (1, 80), "4xV100": (4, 32), "instruct": (1, 80)}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def read(path: Path) -> PretrainConfig | InstructConfig:
    return read_config(InstructConfig if "instruct" in path.stem else PretrainConfig, path)


@cache
def mistral_7b_shape() -> dict[str, object]:
    """MistralConfig's defaults are those of Mistral-7B-v0.1."""
    config = MistralConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (4096, 32, 8)
    return {**config.to_dict(), "vocab_size": ROWS, "tie_word_embeddings": False}


def abstract_model(config: PretrainConfig | InstructConfig, shape: dict[str, object]) -> torch.nn.Module:
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(**shape)).to(getattr(torch, config.dtype))
    if config.trainable != "full":
        model = add_adapters(config.model, model, config.trainable, config.lora, config.new_rows_from)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    return model


def test_there_are_the_recipes_of_the_plan():
    wanted = {f"vikhr_7b_pretrain_{machine}" for machine in ("4xV100", "1xH100", "8xH100")}
    assert {path.stem for path in RECIPES} == {*wanted, "vikhr_7b_instruct", "demo_pretrain", "demo_instruct"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_expects(path):
    head = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    for word in ("Model ", "Data ", "Hardware "):
        assert f"# {word}" in head
    if "demo" not in path.stem:
        for word in ("Hours ", "Figures ", "derived, not measured"):
            assert word in head
        assert f"--config {path.stem}" in head


@pytest.mark.parametrize("path", [path for path in RECIPES if "7b" in path.stem], ids=lambda path: path.stem)
def test_a_recipe_fits_its_machine_and_trains_what_it_says(path):
    config = read(path)
    count, gib = next(machine for name, machine in GPUS.items() if name in path.stem)
    assert config.train.accumulation(count) >= 1
    model = abstract_model(config, mistral_7b_shape())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    text = path.read_text(encoding="utf-8")
    if config.trainable == "full":
        assert f"{everything / 1e9:.2f}B parameters" in text
    else:
        millions = re.search(r"([\d.]+)M trained parameters", text)
        assert millions, "the head says how many parameters are trained"
        assert float(millions[1]) == pytest.approx(trained / 1e6, rel=0.005)
    # Weights and gradients as they are kept, AdamW's two moments; sharded where the recipe says so.
    state = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
    if config.train.fsdp:
        state /= count
    anchor = getattr(config, "anchor", None)
    copy = 2 * everything if anchor and anchor.active and config.trainable == "full" else 0
    logits = config.train.loss_chunk * ROWS * 4 * 4
    assert state + copy + logits < 0.75 * gib * 1e9, "a quarter is for activations"
    if "V100" in path.stem:
        assert (config.dtype, config.train.precision) == ("float16", "float16")
        assert "flash" not in config.attention


@pytest.mark.parametrize("name", ["demo_pretrain", "demo_instruct"])
def test_the_demos_recipes_train_its_model(name):
    config = read(CONFIGS / f"{name}.yaml")
    model = abstract_model(config, {**MODEL, "vocab_size": ROWS})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == (39 if config.trainable == "full" else 4 * 4 * 2 + 2)
    assert config.sequence_length <= MODEL["max_position_embeddings"]
    assert config.train.accumulation(1) == 1


def test_the_instruct_recipe_is_saigas():
    config = read(CONFIGS / "vikhr_7b_instruct.yaml")
    train, lora = config.train, config.lora
    assert (lora.r, lora.alpha, lora.dropout, lora.embeddings) == (16, 16, 0.05, "none")
    assert lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (train.learning_rate, train.schedule, train.warmup_steps, config.epochs) == (3e-4, "cosine", 15, 5)
    assert (train.batch_size, config.sequence_length, config.dtype, train.precision) == (
        128,
        4096,
        "bfloat16",
        "bfloat16",
    )
    assert set(config.chats) == set(PUBLISHED)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == GPUS[path.stem][0]
    assert config.distributed_type == ("NO" if config.num_processes == 1 else "MULTI_GPU")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_setting_that_nobody_reads_is_refused(path, tmp_path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["train"]["warmup_step"] = 3
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(Exception, match="unknown setting 'warmup_step'; nearest: warmup_steps"):
        read_config(InstructConfig if "instruct" in path.stem else PretrainConfig, tmp_path / "other.yaml")
