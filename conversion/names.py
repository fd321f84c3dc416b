"""What each parameter is called here, in t5x and in Hugging Face's T5, and how its array differs.

Our tree stacks the layers of a stack on axis 0 of one array; t5x (examples/t5) and Hugging Face name each layer's
array, which is {layer} in the table. t5x's scanned layout (examples/scalable_t5) is ours with "layers" written as the
stack's name, the layer axis at 1, and the heads apart; one table serves all.

Sources: t5x `examples/t5/network.py` (parameter tree), transformers `models/t5/modeling_t5.py` (state dict).

D model, V vocabulary, H heads, K head dim, F feed-forward, L layers.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vikhr_t5.errors import UserError
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.parameters import abstract_params, mlp_inputs


@dataclass(frozen=True)
class Parameter:
    """One row of the table.

    Args:
        ours: path in our tree.
        t5x: path in t5x's tree.
        huggingface: name in the state dict.
        transpose: Hugging Face's array is the transpose of ours and t5x's: torch keeps kernels as [out, in], and
            relative biases as [buckets, heads].
    """

    ours: str
    t5x: str
    huggingface: str
    transpose: bool

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.t5x


class Array(NamedTuple):
    """One array of Hugging Face's: its name, and where its content is in our tree."""

    name: str
    ours: str
    layer: int | None  # None: the whole array is of no layer
    transpose: bool
    shape: tuple[int, ...]  # Hugging Face's


_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}


def table(config: T5Config) -> tuple[Parameter, ...]:
    """Every parameter that a model of this configuration has, once."""
    rows = [Parameter("token_embedder/embedding", "token_embedder/embedding", "shared.weight", False)]
    if not config.logits_via_embedding:
        rows.append(Parameter("decoder/logits_dense/kernel", "decoder/logits_dense/kernel", "lm_head.weight", True))
    rows += _stack(config, "encoder", [("attention", "pre_attention_layer_norm", "SelfAttention")])
    rows += _stack(
        config,
        "decoder",
        [
            ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
            ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
        ],
    )
    return tuple(rows)


def _stack(config: T5Config, stack: str, attentions: list[tuple[str, str, str]]) -> Iterator[Parameter]:
    def layer(ours: str, huggingface: str, transpose: bool) -> Parameter:
        block = f"{stack}.block.{{layer}}.layer.{huggingface}.weight"
        return Parameter(f"{stack}/layers/{ours}", f"{stack}/layers_{{layer}}/{ours}", block, transpose)

    bias = "relpos_bias/rel_embedding"
    if config.relative_bias_per_layer:
        yield layer(bias, "0.SelfAttention.relative_attention_bias", True)
    else:
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Parameter(f"{stack}/{bias}", f"{stack}/{bias}", first, True)
    for place, (attention, norm, theirs) in enumerate(attentions):
        yield layer(f"{norm}/scale", f"{place}.layer_norm", False)
        for name, letter in _ATTENTION.items():
            yield layer(f"{attention}/{name}/kernel", f"{place}.{theirs}.{letter}", True)
    place = len(attentions)
    yield layer("pre_mlp_layer_norm/scale", f"{place}.layer_norm", False)
    for name in (*mlp_inputs(config), "wo"):
        yield layer(f"mlp/{name}/kernel", f"{place}.DenseReluDense.{name}", True)
    norm = f"{stack}/{stack}_norm/scale"
    yield Parameter(norm, norm, f"{stack}.final_layer_norm.weight", False)


def arrays(config: T5Config) -> Iterator[Array]:
    """Hugging Face's arrays of a model, in the order of the table, each layer's on its own."""
    shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(abstract_params(config)).items()}
    for row in table(config):
        shape = shapes[row.ours]
        layers: Iterable[int | None] = range(shape[0]) if row.per_layer else [None]
        one = shape[1:] if row.per_layer else shape
        for layer in layers:
            name = row.huggingface.format(layer=layer)
            yield Array(name, row.ours, layer, row.transpose, one[::-1] if row.transpose else one)


def to_huggingface(params: Mapping[str, Any], config: T5Config) -> Iterator[tuple[str, np.ndarray]]:
    """Our tree -> (name, array) one after the other, as views where it can be.

    Raises:
        UserError: the tree lacks a parameter of this configuration, has another one, or one of another shape.
    """
    flat = {"/".join(path): leaf for path, leaf in flatten_dict(dict(params)).items()}
    wanted = {"/".join(path): leaf.shape for path, leaf in flatten_dict(abstract_params(config)).items()}
    account({name: np.shape(leaf) for name, leaf in flat.items()}, wanted, "the checkpoint")
    for array in arrays(config):
        value = np.asarray(flat[array.ours] if array.layer is None else flat[array.ours][array.layer])
        yield array.name, value.T if array.transpose else value


def from_huggingface(state: Mapping[str, np.ndarray], config: T5Config) -> dict[str, Any]:
    """The inverse of `to_huggingface`: a state dict of NumPy arrays -> our tree.

    Raises:
        UserError: as `to_huggingface`.
    """
    wanted = {array.name: array.shape for array in arrays(config)}
    account({name: np.shape(value) for name, value in state.items()}, wanted, "the Hugging Face model")
    flat: dict[str, Any] = {}
    for array in arrays(config):
        value = state[array.name].T if array.transpose else state[array.name]
        if array.layer is None:
            flat[array.ours] = np.asarray(value)
        else:
            flat.setdefault(array.ours, []).append(value)
    stacked = {path: np.stack(value) if isinstance(value, list) else value for path, value in flat.items()}
    return unflatten_dict({tuple(path.split("/")): value for path, value in stacked.items()})


def account(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Every name on both sides, with its shape; a UserError lists all that do not match."""
    problems = {
        "missing": [f"{name} {list(wanted[name])}" for name in wanted if name not in found],
        "unknown": [f"{name} {list(found[name])}" for name in found if name not in wanted],
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(wanted[name])}"
            for name in wanted
            if name in found and tuple(found[name]) != tuple(wanted[name])
        ],
    }
    told = [f"{len(names)} {problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if told:
        raise UserError(f"{where} does not hold this model's parameters; {'; '.join(told)}; check its configuration")


def check_expressible(config: T5Config) -> None:
    """Refuses a model that Hugging Face's T5 cannot express, with the reason and the way out."""
    if config.relative_bias_per_layer:
        raise UserError(
            "relative_bias_per_layer: every layer has its own relative-position bias, and Hugging Face's T5 shares one"
            " per stack; such a model is a UMT5, which is not exported yet: train with relative_bias_per_layer=False"
        )
    feed_forward(config)


def feed_forward(config: T5Config) -> str:
    """Hugging Face's `feed_forward_proj` for our `mlp_activations`; UserError where it has none."""
    # Gated GELU is the tanh approximation by Hugging Face's own exception; elsewhere that is called gelu_new.
    theirs = {
        ("relu",): "relu",
        ("gelu",): "gelu_new",
        ("silu",): "silu",
        ("swish",): "silu",
        ("gelu", "linear"): "gated-gelu",
        ("relu", "linear"): "gated-relu",
        ("silu", "linear"): "gated-silu",
        ("swish", "linear"): "gated-silu",
    }
    try:
        return theirs[tuple(config.mlp_activations)]
    except KeyError:
        raise UserError(
            f"mlp_activations {tuple(config.mlp_activations)}: Hugging Face's T5 has one activation, alone or gating a"
            " linear branch, such as ('relu',) or ('gelu', 'linear')"
        ) from None
