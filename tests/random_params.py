"""Random T5 parameters for tests, drawn by NumPy: nothing to compile."""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vikhr_t5.model import network


def enlarged_params(config: network.T5Config, seed: int) -> dict[str, Any]:
    """Random parameters whose attention is far from uniform and whose norms differ from 1."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("scale"):
            return rng.uniform(0.5, 1.5, shape)
        if path.endswith(("rel_embedding", "embedding")):
            return rng.normal(0, 1.5, shape)
        return rng.normal(0, shape[-2] ** -0.5, shape)  # queries too: logits have a standard deviation of sqrt(K)

    shapes = flatten_dict(network.abstract_params(config), sep="/")
    flat = {path: draw(path, shaped.shape).astype(np.float32) for path, shaped in shapes.items()}
    return unflatten_dict(flat, sep="/")
