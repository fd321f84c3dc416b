"""T5Config: sizes of known models, validation, JSON."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from vikhr_t5.errors import UserError
from vikhr_t5.model import network
from vikhr_t5.model.config import T5Config

GATED = ("gelu", "linear")
# Sizes that transformers and the papers give for the public models.
KNOWN = [
    (60_506_624, T5Config(32128, "float32", 512, 8, 6, 6, 64, 2048, ("relu",), logits_via_embedding=True)),
    (76_961_152, T5Config(32128, "float32", 512, 6, 8, 8, 64, 1024, GATED)),
    (247_577_856, T5Config(32128, "float32", 768, 12, 12, 12, 64, 2048, GATED)),
    (2_849_757_184, T5Config(32128, "float32", 2048, 32, 24, 24, 64, 5120, GATED)),
]


@pytest.mark.parametrize(("count", "config"), KNOWN, ids=["small v1.0", "small", "base", "xl"])
def test_parameter_counts_of_known_models(count, config):
    assert config.param_count() == count
    assert sum(leaf.size for leaf in jax.tree.leaves(network.abstract_params(config))) == count


def test_biases_per_layer_are_counted():
    config = T5Config(128, num_encoder_layers=2, num_decoder_layers=5, relative_bias_per_layer=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(network.abstract_params(config))) == config.param_count()


def test_defaults_are_t5x_s():
    config = T5Config()
    assert (config.emb_dim, config.num_heads, config.head_dim, config.mlp_dim) == (512, 8, 64, 2048)
    assert (config.num_encoder_layers, config.num_decoder_layers, config.dropout_rate) == (6, 6, 0.1)
    assert config.mlp_activations == ("relu",)
    assert not config.logits_via_embedding


def test_json_round_trip():
    config = T5Config(256, jnp.bfloat16, mlp_activations=["gelu", "linear"], remat_policy="full")
    assert T5Config.from_json(config.to_json()) == config
    assert config.dtype == "bfloat16"
    assert hash(config) == hash(T5Config.from_json(config.to_json()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float16"}, ["float16", "overflows", "bfloat16"]),
        ({"dtype": "bfloat"}, ["dtype 'bfloat'", "nearest: bfloat16"]),
        ({"remat_policy": "layer_input"}, ["remat_policy 'layer_input'", "nearest: layer_inputs"]),
        ({"mlp_activations": ("gelu", "lineer")}, ["'lineer'", "nearest: linear"]),
        ({"mlp_activations": ()}, ["mlp_activations is empty"]),
        ({"num_heads": 0}, ["num_heads", "not 0"]),
        ({"emb_dim": 2.5}, ["emb_dim", "not 2.5"]),
        ({"vocab_size": -1}, ["vocab_size", "not -1"]),
        ({"dropout_rate": 1.0}, ["dropout_rate", "not 1.0"]),
    ],
)
def test_bad_values_are_named(change, words):
    with pytest.raises(UserError) as raised:
        dataclasses.replace(T5Config(128), **change)
    assert all(word in str(raised.value) for word in words), raised.value


def test_bad_json_is_named():
    with pytest.raises(UserError, match="'emb_dims'; nearest: emb_dim"):
        T5Config.from_json('{"emb_dims": 3}')
    with pytest.raises(UserError, match="not JSON"):
        T5Config.from_json("{")
    with pytest.raises(UserError, match="not a JSON object"):
        T5Config.from_json("[1]")


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="vocab_size is not set"):
        network.init(T5Config(), jax.random.key(0))
