"""Vocabularies and small models that the tests of conversion share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from vikhr_t5.data.vocabulary import Vocabulary, train_vocabulary
from vikhr_t5.model import network
from vikhr_t5.model.config import T5Config
from vikhr_t5.train.checkpoints import SavedModel

DATA = Path(__file__).parents[2] / "tasks" / "demo_data"


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Every line of the embedded corpus, Russian and English, empty lines too."""
    return [line for name in ("ru.txt", "en.txt") for line in (DATA / name).read_text(encoding="utf-8").split("\n")]


@pytest.fixture(scope="session", params=["unigram", "bpe"])
def vocabulary(
    request: pytest.FixtureRequest, corpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Vocabulary:
    """A vocabulary of each kind with byte fallback and mode tokens; few characters have pieces of their own."""
    folder = tmp_path_factory.mktemp(request.param)
    return train_vocabulary(
        corpus[::4], folder / "spiece.model", 3000, model_type=request.param, character_coverage=0.999
    )


@pytest.fixture(scope="session")
def unigram(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return train_vocabulary(corpus[:3000], tmp_path_factory.mktemp("small") / "spiece.model", 1500)


VARIANTS: dict[str, dict[str, Any]] = {
    "v1.0": {"mlp_activations": ("relu",), "logits_via_embedding": True, "num_decoder_layers": 1},
    "v1.1": {"mlp_activations": ("gelu", "linear"), "num_encoder_layers": 2, "num_decoder_layers": 3},
}


@pytest.fixture(scope="session")
def make_model(unigram: Vocabulary) -> Callable[..., SavedModel]:
    """make_model("v1.1", num_heads=3, ...) -> random parameters, larger than at the start of training."""

    def make(variant: str, scale: float = 1.25, **fields: Any) -> SavedModel:
        shape = {"emb_dim": 32, "num_heads": 3, "num_encoder_layers": 2, "head_dim": 8, "mlp_dim": 48}
        config = T5Config(**{"vocab_size": unigram.padded_size, **shape, **VARIANTS[variant], **fields})
        params = network.init(config, jax.random.key(1))
        # Norms differ from 1 and biases from 0, so that a swapped or forgotten one shows.
        noise = np.random.default_rng(0)
        params = jax.tree.map(lambda leaf: np.asarray(leaf) * scale * noise.uniform(0.7, 1.3, leaf.shape), params)
        params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
        return SavedModel(params, config, Path(unigram.sentencepiece_model_file), unigram.extra_ids, 1000)

    return make
