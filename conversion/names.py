"""What each parameter is called here, in t5x and in Hugging Face's T5, and how its array differs.

Our tree stacks the layers of a stack on axis 0 of one array; t5x (examples/t5) and Hugging Face name each layer's
array, which is {layer} in the table. t5x's scanned layout (examples/scalable_t5) is ours with "layers" written as the
stack's name, the layer axis at 1, and the heads apart; one table serves all.

Sources: t5x `examples/t5/network.py` (parameter tree), transformers `models/t5/modeling_t5.py` (state dict).

D model, V vocabulary, H heads, K head dim, F feed-forward, L layers.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from conversion.stored import StoredModel, shapes
from vikhr_t5.errors import UserError
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.parameters import mlp_inputs


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

    @property
    def t5x_scanned(self) -> str:
        """Path in t5x's scanned tree, where one array holds all layers of a stack: "encoder/encoder/..."."""
        return self.t5x.replace("layers_{layer}", self.t5x.split("/")[0])

    def t5x_axes(self, scanned: bool = False, split_heads: bool = False) -> str:
        """A letter for each axis of t5x's array; J is H*K in one, B the 32 buckets of the relative bias.

        The axes of a layer of ours, unless one of these is set: scanned, L stands at 1; split_heads, J is HK.
        """
        *_, parent, leaf = self.t5x.split("/")
        if leaf == "kernel":
            axes = {"out": "JD", "wo": "FD", "query": "DJ", "key": "DJ", "value": "DJ", "logits_dense": "DV"}
            letters = axes.get(parent, "DF")
        else:
            letters = {"embedding": "VD", "rel_embedding": "HB", "scale": "D"}[leaf]
        if split_heads:
            letters = letters.replace("J", "HK")
        return letters[0] + "L" + letters[1:] if scanned and self.per_layer else letters


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
    whole = shapes(config)
    for row in table(config):
        shape = whole[row.ours]
        layers: Iterable[int | None] = range(shape[0]) if row.per_layer else [None]
        one = shape[1:] if row.per_layer else shape
        for layer in layers:
            name = row.huggingface.format(layer=layer)
            yield Array(name, row.ours, layer, row.transpose, one[::-1] if row.transpose else one)


def to_huggingface(model: StoredModel) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of Hugging Face's state dict one after the other, as views of what the model reads."""
    for array in arrays(model.config):
        value = model.read(array.ours, array.layer)
        yield array.name, value.T if array.transpose else value


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
