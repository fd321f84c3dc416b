"""A model in any format, opened but not read: each format's module gives one, and writes one.

Reading is by array, so that converting a model takes the memory of its largest array.
"""

from typing import Protocol

import numpy as np

from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.model.config import T5Config


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
    vocabulary: Vocabulary | None
    dtype: str
    updates: int | None

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """A parameter in its stored dtype: the one layer of an array that stacks layers, else the whole array."""

    def read_moments(self, name: str, layer: int | None = None) -> dict[str, np.ndarray]:
        """Adafactor's {"v"} or {"v_row", "v_col"} of the same, as `optimizers.Adafactor` keeps them, float32."""
