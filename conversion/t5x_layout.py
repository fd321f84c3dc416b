"""Where t5x keeps what: the paths, shapes and factored moments of each parameter, in each of t5x's layouts.

    vanilla   examples/t5: each layer is a node, `layers_0`, and kernels are 2-D. A model with a relative bias in each
              layer is examples/scalable_t5 without scan: the same nodes, with H and K apart
    scanned   examples/scalable_t5: an array holds all layers of a stack on axis 1, and H and K are apart

t5x's Adafactor keeps per parameter {m, v, v_row, v_col}, of which those that are not used are zeros of shape (1,).
Arrays of more than two axes it factors by the names of the axes, whatever their sizes: D is the row. Others are
factored where both sizes are at least 128, the larger one as the column, as ours always are.
Source: t5x `adafactor.py`.

D model, V vocabulary, H heads, K head dim, J = H*K, F feed-forward, L layers, B buckets of the relative bias.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from conversion.names import Parameter, table
from vikhr_t5.errors import UserError
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.ops import NUM_BUCKETS

SLOTS = ("m", "v", "v_row", "v_col")
UNUSED = (1,)  # the shape of a slot that is not used
MIN_DIM_SIZE_TO_FACTOR = 128
Shapes = Mapping[str, tuple[int, ...]]
Moments = dict[str, np.ndarray]


class Factors(NamedTuple):
    """The axes, as letters, over which v_col and v_row are means."""

    rows: str
    columns: str


@dataclass(frozen=True)
class Layout:
    """t5x's layout of a model. `config.vocab_size` is set.

    Raises:
        UserError: t5x has no such model.
    """

    config: T5Config
    scanned: bool
    split_heads: bool

    def __post_init__(self) -> None:
        if self.scanned and not self.config.relative_bias_per_layer:
            raise UserError(
                "t5x's scanned model has a relative-position bias in each layer, and this one shares one per stack"
                " (relative_bias_per_layer=False): write it without scan, for examples/t5"
            )

    @functools.cached_property
    def rows(self) -> dict[str, Parameter]:
        return {row.ours: row for row in table(self.config)}

    def arrays(self, row: Parameter) -> Iterator[tuple[str, list[int | None]]]:
        """t5x's arrays of a row of the table: path, and the layers in it, as a `StoredModel` is asked for them."""
        layers = list(range(self._sizes(row)["L"]))
        if not row.per_layer:
            yield self.path(row, None), [None]
        elif self.scanned:
            yield self.path(row, None), [*layers]
        else:
            for layer in layers:
                yield self.path(row, layer), [layer]

    def path(self, row: Parameter, layer: int | None) -> str:
        return row.t5x_scanned if self.scanned else row.t5x.format(layer=layer)

    def axes(self, row: Parameter) -> str:
        return row.t5x_axes(self.scanned, self.split_heads)

    def shape(self, row: Parameter, axes: str | None = None) -> tuple[int, ...]:
        """Of one array of t5x's; `axes`: of one that has those instead of the parameter's."""
        sizes = self._sizes(row)
        return tuple(sizes[letter] for letter in (self.axes(row) if axes is None else axes))

    def our_shape(self, row: Parameter) -> tuple[int, ...]:
        """Of one layer."""
        return self.shape(row, row.t5x_axes())

    def _sizes(self, row: Parameter) -> dict[str, int]:
        c = self.config
        layers = c.num_encoder_layers if row.ours.startswith("encoder/") else c.num_decoder_layers
        sizes = {"D": c.emb_dim, "V": c.known_vocab_size(), "H": c.num_heads, "K": c.head_dim, "J": c.joined_dim}
        return {**sizes, "F": c.mlp_dim, "L": layers, "B": NUM_BUCKETS}

    def factors(self, row: Parameter) -> Factors | None:
        """How a factored second moment is factored; None where it never is."""
        axes = self.axes(row)
        own = axes.replace("L", "")
        if len(own) < 2 or (len(axes) > 2 and "B" in axes):
            return None
        if len(axes) > 2:
            return Factors("D", own.replace("D", ""))
        return _by_size(axes, self.shape(row))

    def is_factored(self, row: Parameter) -> bool:
        """Whether t5x's Adafactor, as its gin files configure it, factors the second moment."""
        sizes = self.shape(row)
        return self.factors(row) is not None and (len(sizes) > 2 or min(sizes) >= MIN_DIM_SIZE_TO_FACTOR)

    def slot_axes(self, row: Parameter, factored: bool, momentum: bool) -> dict[str, str]:
        """The used slots and their axes."""
        factors, axes = self.factors(row), self.axes(row)
        used = {"m": axes} if momentum else {}
        if not factored or factors is None:
            return {**used, "v": axes}
        without = {"v_row": factors.columns, "v_col": factors.rows}
        return used | {slot: "".join(a for a in axes if a not in gone) for slot, gone in without.items()}

    def slot_shapes(self, row: Parameter, factored: bool, momentum: bool) -> dict[str, tuple[int, ...]]:
        """Every slot's shape."""
        used = {slot: self.shape(row, axes) for slot, axes in self.slot_axes(row, factored, momentum).items()}
        return {slot: used.get(slot, UNUSED) for slot in SLOTS}

    def moments_to_ours(self, row: Parameter, theirs: Moments) -> Moments:
        """One layer's used slots -> what `optimizers.Adafactor` keeps, factored where t5x's are."""
        ours: Moments = {s: theirs[s].reshape(self.our_shape(row)) for s in ("m", "v") if s in theirs}
        if "v" in ours:
            return ours
        factors, own = self._factors(row), _by_size(row.t5x_axes(), self.our_shape(row))
        by_axis = {_joined(factors.rows): theirs["v_row"], _joined(factors.columns): theirs["v_col"]}
        return {**ours, "v_row": by_axis[own.rows].ravel(), "v_col": by_axis[own.columns].ravel()}

    def moments_from_ours(self, row: Parameter, ours: Moments, factored: bool) -> Moments:
        """The inverse, for a slot that is to be factored or not.

        Factoring what is not factored here is exact, since a mean of moments is a moment of means. For the way back
        there is no more than what the factors stand for, their product.
        """
        theirs = {"m": ours["m"]} if "m" in ours else {}
        axes, own = row.t5x_axes(), _by_size(row.t5x_axes(), self.our_shape(row))
        if not factored:
            if "v" in ours:
                return {**theirs, "v": ours["v"]}
            product = np.multiply.outer(ours["v_row"], ours["v_col"]) / ours["v_row"].mean()
            return {**theirs, "v": product if axes == own.rows + own.columns else product.T}
        factors = self._factors(row)
        if "v" in ours:
            by_axis = {axes[0]: ours["v"].mean(axis=1), axes[1]: ours["v"].mean(axis=0)}
        else:
            by_axis = {own.rows: ours["v_row"], own.columns: ours["v_col"]}
        return {**theirs, "v_row": by_axis[_joined(factors.rows)], "v_col": by_axis[_joined(factors.columns)]}

    def _factors(self, row: Parameter) -> Factors:
        factors = self.factors(row)
        assert factors is not None, row.ours
        return factors


def _by_size(axes: str, shape: tuple[int, ...]) -> Factors:
    """As ours and, where an array has two axes, t5x's: the larger one is the column. One axis: it is both."""
    order = np.argsort(shape, stable=True)
    return Factors(axes[order[-2:][0]], axes[order[-1]])


def _joined(letters: str) -> str:
    return letters.replace("HK", "J")


def infer(found: Shapes, checkpoint: str) -> tuple[T5Config, bool, bool]:
    """What the shapes of t5x's parameters say of the model: (configuration, scanned, split_heads).

    What they cannot say is T5 v1.1's or, with one input matrix in the feed-forward block, v1.0's: activations.

    Raises:
        UserError: they are not T5's.
    """

    def shape(path: str, *ranks: int) -> tuple[int, ...]:
        if path not in found or len(found[path]) not in ranks:
            has = f"is {list(found[path])}" if path in found else "is absent"
            raise UserError(f"{checkpoint} is not a T5 of t5x's: {path} {has}; check that it is the right checkpoint")
        return found[path]

    scanned = any(path.startswith("encoder/encoder/") for path in found)

    def layer(stack: str, path: str) -> str:
        return f"{stack}/{stack if scanned else 'layers_0'}/{path}"

    def depth(stack: str, query: tuple[int, ...]) -> int:
        nodes = {path.split("/")[1] for path in found if path.startswith(f"{stack}/layers_")}
        return query[1] if scanned else len(nodes)

    shared = "encoder/relpos_bias/rel_embedding"
    per_layer = shared not in found
    heads = shape(layer("encoder", "relpos_bias/rel_embedding") if per_layer else shared, 3 if scanned else 2)[0]
    query = shape(layer("encoder", "attention/query/kernel"), *([4] if scanned else [2, 3]))
    split = len(query) > 2
    gated = layer("encoder", "mlp/wi_0/kernel") in found
    vocab_size, emb_dim = shape("token_embedder/embedding", 2)
    config = T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=heads,
        head_dim=query[-1] if split else query[-1] // heads,
        mlp_dim=shape(layer("encoder", "mlp/wo/kernel"), 3 if scanned else 2)[0],
        num_encoder_layers=depth("encoder", query),
        num_decoder_layers=depth("decoder", shape(layer("decoder", "self_attention/query/kernel"), len(query))),
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in found,
        relative_bias_per_layer=per_layer,
    )
    return config, scanned, split
