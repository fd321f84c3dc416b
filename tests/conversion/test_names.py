"""The table of names beside transformers' own state dict and t5x's own parameter trees."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict
from reference_checkpoint import REFERENCE, load_legacy, reference_params, under

from conversion import huggingface, names
from vikhr_t5.errors import UserError
from vikhr_t5.model.config import T5Config
from vikhr_t5.train.checkpoints import SavedModel

Make = Callable[..., SavedModel]
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


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
def test_names_and_shapes_are_transformers_own(make_model: Make, variant: str) -> None:
    config = make_model(variant).config
    theirs = transformers.T5Config(**huggingface.config_json(config, "float32"))
    model = transformers.T5ForConditionalGeneration(theirs)
    # Copies of the embedding, which from_pretrained makes by itself; without a head, the head too.
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    copies |= {"lm_head.weight"} if config.logits_via_embedding else set()
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in copies}
    assert {array.name: array.shape for array in names.arrays(config)} == expected


def test_names_are_t5x_own() -> None:
    config = REFERENCE_CONFIG
    target = under(load_legacy(REFERENCE / "t511_d64" / "ckpt_legacy" / "checkpoint_200"), "target/")
    rows = names.table(config)
    found = {row.t5x.format(layer=layer) for row in rows for layer in range(2 if row.per_layer else 1)}
    assert found == set(target)


def test_names_of_a_bias_per_layer_are_t5x_scanned_own() -> None:
    target = under(load_legacy(REFERENCE / "scan_d64" / "ckpt_legacy" / "checkpoint_200"), "target/")
    rows = names.table(T5Config(**{**vars(REFERENCE_CONFIG), "relative_bias_per_layer": True}))
    assert {re.sub(r"^(\w+)/layers_{layer}", r"\1/\1", row.t5x) for row in rows} == set(target)


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
def test_there_and_back_is_bitwise(make_model: Make, variant: str) -> None:
    model = make_model(variant)
    state = dict(names.to_huggingface(model.params, model.config))
    _assert_equal(names.from_huggingface(state, model.config), model.params)


def test_there_and_back_of_what_t5x_trained() -> None:
    params = reference_params("t511_d64")
    state = dict(names.to_huggingface(params, REFERENCE_CONFIG))
    _assert_equal(names.from_huggingface(state, REFERENCE_CONFIG), params)


def _assert_equal(tree: Any, expected: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_every_parameter_stands_once(make_model: Make) -> None:
    rows = names.table(make_model("v1.1").config)
    for field in ("ours", "t5x", "huggingface"):
        values = [getattr(row, field) for row in rows]
        assert len(set(values)) == len(values)


def test_unknown_missing_and_misshapen_are_listed(make_model: Make) -> None:
    model = make_model("v1.1")
    params = jax.tree.map(lambda leaf: leaf, model.params)
    params["encoder"]["layers"]["mlp"]["wi"] = params["encoder"]["layers"]["mlp"].pop("wi_1")
    params["decoder"]["decoder_norm"]["scale"] = np.ones(31, np.float32)
    with pytest.raises(UserError) as caught:
        dict(names.to_huggingface(params, model.config))
    assert "1 missing: encoder/layers/mlp/wi_1/kernel [2, 32, 48]" in str(caught.value)
    assert "1 unknown: encoder/layers/mlp/wi/kernel [2, 32, 48]" in str(caught.value)
    assert "decoder/decoder_norm/scale [31] instead of [32]" in str(caught.value)

    state = dict(names.to_huggingface(model.params, model.config))
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((32, 3), np.float32)
    del state["lm_head.weight"]
    with pytest.raises(UserError) as caught:
        names.from_huggingface(state, model.config)
    assert "1 missing: lm_head.weight" in str(caught.value)
    assert "1 unknown: decoder.block.0.layer.1.EncDecAttention" in str(caught.value)


def test_a_bias_per_layer_is_refused_with_the_reason(make_model: Make) -> None:
    with pytest.raises(UserError, match="one per stack; such a model is a UMT5"):
        names.check_expressible(make_model("v1.1", relative_bias_per_layer=True).config)


@pytest.mark.parametrize("activations", [("gelu", "gelu"), ("linear",), ("linear", "gelu"), ("gelu", *["linear"] * 2)])
def test_activations_without_a_name_are_refused(make_model: Make, activations: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="mlp_activations"):
        names.check_expressible(make_model("v1.1", mlp_activations=activations).config)


def test_every_row_names_a_leaf_of_our_tree(make_model: Make) -> None:
    for variant, fields in (("v1.0", {}), ("v1.1", {}), ("v1.1", {"relative_bias_per_layer": True})):
        model = make_model(variant, **fields)
        leaves = {"/".join(path) for path in flatten_dict(model.params)}
        assert {row.ours for row in names.table(model.config)} == leaves
