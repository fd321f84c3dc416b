"""The table of names beside transformers' own state dict and t5x's own parameter trees."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from flax.traverse_util import flatten_dict
from reference_checkpoint import REFERENCE, reference_params, under

from conversion import convert, names, t5x_files, verify
from conversion.huggingface import HuggingFaceModel
from conversion.huggingface_config import ARCHITECTURES, config_json
from conversion.stored import MemoryModel
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError
from vikhr_t5.model.config import T5Config

Make = Callable[..., MemoryModel]
REFERENCE_CONFIG = T5Config(
    vocab_size=1024,
    emb_dim=64,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    head_dim=16,
    mlp_dim=128,
    mlp_activations=("gelu", "linear"),
)


@pytest.mark.parametrize("variant", ["v1.0", "v1.1", "umT5"])
def test_names_and_shapes_are_transformers_own(make_model: Make, variant: str) -> None:
    config = make_model(variant).config
    fields = config_json(config, "float32")
    kind = fields.pop("model_type")
    theirs = transformers.AutoConfig.for_model(kind, **fields)
    model = getattr(transformers, ARCHITECTURES[kind])(theirs)
    # Copies of the embedding, which from_pretrained makes by itself; without a head, the head too.
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    copies |= {"lm_head.weight"} if config.logits_via_embedding else set()
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in copies}
    assert {array.name: array.shape for array in names.arrays(config)} == expected


def test_names_are_t5x_own() -> None:
    config = REFERENCE_CONFIG
    target = under(t5x_files.arrays(REFERENCE / "t511_d64" / "ckpt_legacy" / "checkpoint_200"), "target/")
    rows = names.table(config)
    found = {row.t5x.format(layer=layer) for row in rows for layer in range(2 if row.per_layer else 1)}
    assert found == set(target)


def test_names_of_a_bias_per_layer_are_t5x_scanned_own() -> None:
    target = under(t5x_files.arrays(REFERENCE / "scan_d64" / "ckpt_legacy" / "checkpoint_200"), "target/")
    rows = names.table(T5Config(**{**vars(REFERENCE_CONFIG), "relative_bias_per_layer": True}))
    assert {re.sub(r"^(\w+)/layers_{layer}", r"\1/\1", row.t5x) for row in rows} == set(target)


def test_there_and_back_of_what_t5x_trained(tmp_path: Path) -> None:
    model = MemoryModel(
        reference_params("t511_d64"), REFERENCE_CONFIG, Vocabulary(str(REFERENCE / "vocabulary" / "ru924.model"), 100)
    )
    convert.write_model(model, tmp_path / "out", "hf")
    assert verify.same_arrays(model, HuggingFaceModel(tmp_path / "out"))


def test_every_parameter_stands_once(make_model: Make) -> None:
    rows = names.table(make_model("v1.1").config)
    for field in ("ours", "t5x", "huggingface"):
        values = [getattr(row, field) for row in rows]
        assert len(set(values)) == len(values)


def test_unknown_missing_and_misshapen_are_listed(make_model: Make) -> None:
    wanted = {array.name: array.shape for array in names.arrays(make_model("v1.1").config)}
    found = {**wanted, "encoder.block.0.layer.9.weight": (2, 3), "encoder.final_layer_norm.weight": (31,)}
    del found["lm_head.weight"]
    with pytest.raises(UserError) as caught:
        names.account(found, wanted, "the folder")
    assert "1 missing: lm_head.weight [1" in str(caught.value)
    assert "1 unknown: encoder.block.0.layer.9.weight [2, 3]" in str(caught.value)
    assert "encoder.final_layer_norm.weight [31] instead of [32]" in str(caught.value)


def test_every_row_names_a_leaf_of_our_tree(make_model: Make) -> None:
    for variant, fields in (("v1.0", {}), ("v1.1", {}), ("v1.1", {"relative_bias_per_layer": True})):
        model = make_model(variant, **fields)
        leaves = {"/".join(path) for path in flatten_dict(model.params)}
        assert {row.ours for row in names.table(model.config)} == leaves
