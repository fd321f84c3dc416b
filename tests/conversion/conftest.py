"""Vocabularies and small models that the tests of conversion share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from conversion.stored import DTYPES, MemoryModel
from vikhr_t5.data.vocabulary import Vocabulary, train_vocabulary
from vikhr_t5.model import network
from vikhr_t5.model.config import T5Config

DATA = Path(__file__).parents[2] / "tasks" / "demo_data"


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Every line of the embedded corpus, Russian and English, empty lines too."""
    return [line for name in ("ru.txt", "en.txt") for line in (DATA / name).read_text(encoding="utf-8").split("\n")]


KINDS: dict[str, dict[str, Any]] = {
    "unigram": {"size": 3000},
    "bpe": {"size": 3000, "model_type": "bpe"},
    "unigram without bytes": {"size": 1200, "byte_fallback": False, "split_digits": False},  # T5's
    "bpe without bytes": {"size": 1200, "model_type": "bpe", "byte_fallback": False},
}


@pytest.fixture(scope="session", params=KINDS)
def vocabulary(
    request: pytest.FixtureRequest, corpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Vocabulary:
    """A vocabulary of each kind, most with mode tokens; few characters have pieces of their own."""
    folder, kind = tmp_path_factory.mktemp("kind"), KINDS[request.param]
    texts = corpus[:: 4 if kind["size"] > 2000 else 16]
    return train_vocabulary(texts, folder / "spiece.model", character_coverage=0.999, **kind)


@pytest.fixture(scope="session")
def unigram(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return train_vocabulary(corpus[:3000], tmp_path_factory.mktemp("small") / "spiece.model", 1500)


VARIANTS: dict[str, dict[str, Any]] = {
    "v1.0": {"mlp_activations": ("relu",), "logits_via_embedding": True, "num_decoder_layers": 1},
    "v1.1": {"mlp_activations": ("gelu", "linear"), "num_encoder_layers": 2, "num_decoder_layers": 3},
    "umT5": {"mlp_activations": ("gelu", "linear"), "num_decoder_layers": 3, "relative_bias_per_layer": True},
}


@pytest.fixture(scope="session")
def make_model(unigram: Vocabulary) -> Callable[..., MemoryModel]:
    """make_model("v1.1", num_heads=3, ...) -> random parameters, larger than at the start of training."""

    def make(variant: str, scale: float = 1.25, stored: str = "float32", **fields: Any) -> MemoryModel:
        shape = {"emb_dim": 32, "num_heads": 3, "num_encoder_layers": 2, "head_dim": 8, "mlp_dim": 48}
        config = T5Config(**{"vocab_size": unigram.padded_size, **shape, **VARIANTS[variant], **fields})
        params = network.init(config, jax.random.key(1))
        # Norms differ from 1 and biases from 0, so that a swapped or forgotten one shows.
        noise = np.random.default_rng(0)
        params = jax.tree.map(lambda leaf: np.asarray(leaf) * scale * noise.uniform(0.7, 1.3, leaf.shape), params)
        params = jax.tree.map(lambda leaf: leaf.astype(DTYPES[stored]), params)
        return MemoryModel(params, config, unigram, 1000)

    return make
