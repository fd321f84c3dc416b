"""The parameters of T5, each declared once: shape, logical axes, initialiser.

D model, H heads, K head dim, F feed-forward, V vocabulary, L layers.

The names are t5x's, with the layers of a stack on axis 0 of each array under `layers`. All are float32.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers

from vikhr_t5.model.config import T5Config
from vikhr_t5.model.ops import NUM_BUCKETS

Tree = dict[str, Any]
Initializer = Callable[[Array, tuple[int, ...], Any], Array]


class Parameter(NamedTuple):
    """What is known of a parameter before it has values."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical axis names, for sharding
    initializer: Initializer


def declare(config: T5Config) -> Tree:
    """The one declaration of the parameter tree: nested dictionaries of `Parameter`. Initialisers are t5x's."""
    d, hk, f, v = config.emb_dim, config.joined_dim, config.mlp_dim, config.known_vocab_size()

    def query_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return _scaled("fan_in", "normal")(key, shape, dtype) / config.head_dim**0.5

    def stack(layers: int, decoder: bool) -> Tree:
        def kernel(rows: int, columns: int, axes: tuple[str, str], init: Initializer) -> Tree:
            return {"kernel": Parameter((layers, rows, columns), ("layers", *axes), init)}

        def norm() -> Tree:
            return {"scale": Parameter((layers, d), ("layers", "embed"), initializers.ones)}

        def attention() -> Tree:
            into, normal = ("embed", "joined_kv"), _scaled("fan_in", "normal")
            return {
                "query": kernel(d, hk, into, query_init),
                "key": kernel(d, hk, into, normal),
                "value": kernel(d, hk, into, normal),
                "out": kernel(hk, d, ("joined_kv", "embed"), normal),
            }

        def mlp() -> Tree:
            truncated = _scaled("fan_in", "truncated_normal")
            inputs = {name: kernel(d, f, ("embed", "mlp"), truncated) for name in mlp_inputs(config)}
            return {**inputs, "wo": kernel(f, d, ("mlp", "embed"), truncated)}

        tree: Tree = {"pre_mlp_layer_norm": norm(), "mlp": mlp()}
        if decoder:
            tree |= {"pre_self_attention_layer_norm": norm(), "self_attention": attention()}
            tree |= {"pre_cross_attention_layer_norm": norm(), "encoder_decoder_attention": attention()}
        else:
            tree |= {"pre_attention_layer_norm": norm(), "attention": attention()}

        bias_shape, bias_axes = (config.num_heads, NUM_BUCKETS), ("heads", "relpos_buckets")
        uniform = _scaled("fan_avg", "uniform")
        if config.relative_bias_per_layer:
            tree["relpos_bias"] = {"rel_embedding": Parameter((layers, *bias_shape), ("layers", *bias_axes), uniform)}
            return {"layers": tree}
        return {"layers": tree, "relpos_bias": {"rel_embedding": Parameter(bias_shape, bias_axes, uniform)}}

    final_norm = {"scale": Parameter((d,), ("embed",), initializers.ones)}
    encoder = {**stack(config.num_encoder_layers, decoder=False), "encoder_norm": final_norm}
    decoder = {**stack(config.num_decoder_layers, decoder=True), "decoder_norm": final_norm}
    if not config.logits_via_embedding:
        decoder["logits_dense"] = {
            "kernel": Parameter((d, v), ("embed", "vocab"), _scaled("fan_in", "truncated_normal"))
        }
    embedding = Parameter((v, d), ("vocab", "embed"), initializers.normal(1.0))
    return {"token_embedder": {"embedding": embedding}, "encoder": encoder, "decoder": decoder}


def _scaled(mode: Any, distribution: Any) -> Initializer:
    """Variance 1/fan of the last two axes; an axis before them is the layers' and does not count."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        layers = tuple(range(len(shape) - 2))
        return initializers.variance_scaling(1.0, mode, distribution, batch_axis=layers)(key, shape, dtype)

    return draw


def mlp_inputs(config: T5Config) -> list[str]:
    gates = len(config.mlp_activations)
    return ["wi"] if gates == 1 else [f"wi_{i}" for i in range(gates)]


def _map(function: Callable[[str, Parameter], Any], tree: Tree, prefix: str = "") -> Tree:
    return {
        name: function(prefix + name, node) if isinstance(node, Parameter) else _map(function, node, f"{prefix}{name}/")
        for name, node in tree.items()
    }


def logical_axes(config: T5Config) -> Tree:
    """The tree of logical axis names, one tuple of strings per parameter: "layers", "embed", "vocab", ..."""
    return _map(lambda path, parameter: parameter.axes, declare(config))


def abstract_params(config: T5Config) -> Tree:
    """The tree of `jax.ShapeDtypeStruct`s (float32)."""
    return _map(lambda path, parameter: jax.ShapeDtypeStruct(parameter.shape, jnp.float32), declare(config))


def init(config: T5Config, key: Array) -> Tree:
    """Fresh parameters, float32. Each depends on `key` and its own path only; can be traced, to be born sharded."""
    return initialise(declare(config), key)


def initialise(tree: Tree, key: Array) -> Tree:
    def draw(path: str, parameter: Parameter) -> Array:
        return parameter.initializer(jax.random.fold_in(key, zlib.crc32(path.encode())), parameter.shape, jnp.float32)

    return _map(draw, tree)
