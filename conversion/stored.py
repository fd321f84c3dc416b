"""A model in any format, opened but not read: each format's module gives one, and writes one.

Reading is by array, so that converting a model takes the memory of its largest array.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.model.config import T5Config
from vikhr_t5.model.parameters import abstract_params

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class StoredModel(Protocol):
    """What a conversion needs of a model. Names are those of our tree: "encoder/layers/mlp/wo/kernel".

    Attributes:
        config: with `vocab_size` set.
        step: training steps done; 0 where the format does not say.
        vocabulary: None where the format carries none.
        dtype: of the stored parameters, "float32" or "bfloat16".
        updates: updates that Adafactor has done; None where its state is not stored.
    """

    config: T5Config
    step: int
    vocabulary: AnyVocabulary | None
    dtype: str
    updates: int | None

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """A parameter in its stored dtype: the one layer of an array that stacks layers, else the whole array."""

    def read_moments(self, name: str, layer: int | None = None) -> dict[str, np.ndarray]:
        """Adafactor's {"v"} or {"v_row", "v_col"} of the same, as `optimizers.Adafactor` keeps them, float32."""


class WithoutOptimizer:
    """The part of a `StoredModel` that stores no optimizer's state."""

    updates: int | None = None

    def read_moments(self, name: str, layer: int | None = None) -> dict[str, np.ndarray]:
        raise ValueError("no optimizer state is stored: ask for moments only where `updates` is not None")


class MemoryModel(WithoutOptimizer):
    """A parameter tree of ours as a stored model."""

    def __init__(
        self, params: Mapping[str, Any], config: T5Config, vocabulary: AnyVocabulary | None = None, step: int = 0
    ):
        self.params = params
        self._flat = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(dict(params)).items()}
        self.config, self.vocabulary, self.step = config, vocabulary, step
        self.dtype = next(iter(self._flat.values())).dtype.name

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        return self._flat[name] if layer is None else self._flat[name][layer]


class SampledLayers(WithoutOptimizer):
    """A model of some layers of another's: small enough to compute with, and made of the same arrays."""

    def __init__(self, model: StoredModel, encoder: Sequence[int], decoder: Sequence[int]):
        self._model, self._layers = model, {"encoder": encoder, "decoder": decoder}
        self.config = dataclasses.replace(
            model.config, num_encoder_layers=len(encoder), num_decoder_layers=len(decoder)
        )
        self.step, self.vocabulary, self.dtype = model.step, model.vocabulary, model.dtype

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        return self._model.read(name, None if layer is None else self._layers[name.split("/")[0]][layer])


def shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of our tree, layers stacked."""
    return {"/".join(path): leaf.shape for path, leaf in flatten_dict(abstract_params(config)).items()}


def arrays(config: T5Config) -> Iterator[tuple[str, int | None]]:
    """(name, layer) of everything that `StoredModel.read` gives of a model, in the order of our tree."""
    for name, shape in shapes(config).items():
        yield from ((name, layer) for layer in range(shape[0])) if "/layers/" in name else [(name, None)]


def load(model: StoredModel, dtype: str = "float32") -> dict[str, Any]:
    """Our parameter tree in memory, rounded to `dtype`, in float32."""
    flat = {name: np.empty(shape, np.float32) for name, shape in shapes(model.config).items()}
    for name, layer in arrays(model.config):
        flat[name][... if layer is None else layer] = model.read(name, layer).astype(DTYPES[dtype])
    return unflatten_dict({tuple(name.split("/")): whole for name, whole in flat.items()})
