"""Small T5 models that have learned a little Russian, so that their answers are not those of noise; tests only."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conversion import huggingface
from conversion.stored import MemoryModel
from vikhr_t5.data.vocabulary import Vocabulary, train_vocabulary
from vikhr_t5.model import network
from vikhr_t5.train.losses import token_losses

DATA = Path(__file__).parents[1] / "tasks" / "demo_data"
V10 = network.T5Config(
    emb_dim=64, num_heads=4, head_dim=16, mlp_dim=128, num_encoder_layers=2, num_decoder_layers=2,
    mlp_activations=("relu",), logits_via_embedding=True, dropout_rate=0.0,
)  # fmt: skip
V11 = network.T5Config(
    emb_dim=64, num_heads=4, head_dim=16, mlp_dim=96, num_encoder_layers=2, num_decoder_layers=3,
    mlp_activations=("gelu", "linear"), dropout_rate=0.0,
)  # fmt: skip
ROWS, LENGTH, TARGETS = 16, 40, 20


def real_texts(count: int, offset: int = 0) -> list[str]:
    """Lines of the embedded corpus, spread over it."""
    lines = (DATA / "ru.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if 20 <= len(line) <= 160 and "_" not in line]
    return lines[offset :: len(lines) // count][:count]


def vocabulary(folder: Path, size: int = 900) -> Vocabulary:
    """With ids 900 to 909 for sentinels and the rows of the embedding up to 1,024 as padding."""
    path = folder / "spiece.model"
    train_vocabulary(real_texts(1500), path, size=size)
    return Vocabulary(str(path), extra_ids=10)


def cloze(text: str) -> tuple[str, str]:
    """(a text with its middle third blank, what stood there)."""
    words = text.split()
    start, stop = len(words) // 3, -(-2 * len(words) // 3)
    return " ".join([*words[:start], "___", *words[stop:]]), " ".join(words[start:stop])


def train(config: network.T5Config, words: Vocabulary, steps: int, learning_rate: float = 3e-3) -> MemoryModel:
    """A model that fills blanks in the middle of lines, after so many steps of Adam."""
    config = dataclasses.replace(config, vocab_size=words.padded_size)
    optimizer = optax.adam(learning_rate)
    rows = [_example(text, words) for text in real_texts(2000, offset=1)]

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, inputs: Any, targets: Any) -> Any:
        def loss(params: Any) -> Any:
            shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
            encoded = network.encode(params, config, inputs)
            hidden = network.decode(params, config, encoded, inputs, shifted, targets)
            losses = token_losses(hidden, *network.head(params, config), targets).loss
            return (losses * (targets > 0)).sum() / (targets > 0).sum()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.jit(lambda: network.init(config, jax.random.key(0)))()
    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = [rows[i] for i in rng.integers(len(rows), size=ROWS)]
        params, state = step(params, state, *(np.stack(side) for side in zip(*chosen, strict=True)))
    return MemoryModel(jax.device_get(params), config, words)


def _example(text: str, words: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    asked, answer = cloze(text)
    inputs, targets = np.zeros(LENGTH, np.int32), np.zeros(TARGETS, np.int32)
    for row, written in ((inputs, asked.replace("___", "<extra_id_0>")), (targets, f"<extra_id_0> {answer}")):
        ids = [*words.encode(written)[: len(row) - 1], words.eos_id]
        row[: len(ids)] = ids
    return inputs, targets


def save_hf(model: MemoryModel, folder: Path) -> Path:
    """The model as a Hugging Face folder."""
    huggingface.write(model, folder, "float32", 10**9, "trained")
    return folder
