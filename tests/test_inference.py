"""Predictions and scores of a checkpoint: those of the model, whatever the batch size; what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import run, tiny_model

from vikhr_t5 import infer as infer_script
from vikhr_t5 import inference, task_examples
from vikhr_t5.data.pipeline import DatasetConfig
from vikhr_t5.errors import UserError
from vikhr_t5.model import decoding
from vikhr_t5.train.checkpoints import RestoreCheckpointConfig
from vikhr_t5.train.partitioning import Partitioner

LENGTHS = {"inputs": 12, "targets": 7}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, 2, evaluate=False)
    return folder


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    rows = []
    for length in (3, 9, 11, 1, 20):  # the last is longer than LENGTHS
        tokens = rng.integers(3, 90, length).astype(np.int32)
        rows.append({"inputs": np.append(tokens, 1), "targets": np.append(tokens[: 1 + length // 2], 1)})
    return rows


def predictor(checkpoint, batch_size, **options):
    restore = RestoreCheckpointConfig(str(checkpoint))
    return inference.restored(tiny_model(z_loss=0.3), Partitioner(), restore, batch_size, **options)[0]


def test_scores_are_the_models_losses_without_z_loss(checkpoint, examples):
    p = predictor(checkpoint, 2)
    model = tiny_model(z_loss=0.0)
    scores = p.score(task_examples.pairs(examples, LENGTHS))
    for example, score in zip(examples, scores, strict=True):
        targets = np.zeros((1, LENGTHS["targets"]), np.int32)
        ids = example["targets"][: LENGTHS["targets"]]
        targets[0, : len(ids)] = ids
        inputs = np.zeros((1, LENGTHS["inputs"]), np.int32)
        ids = example["inputs"][: LENGTHS["inputs"]]
        inputs[0, : len(ids)] = ids
        weights = jnp.asarray(targets > 0, jnp.float32)
        batch = {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": weights,
            "decoder_source_ids": np.ones_like(targets),
        }
        loss, sums = model.loss_sums(p.params, batch, weights, 1)
        assert score.log_likelihood == pytest.approx(-float(loss), rel=1e-5)
        assert (len(score.log_likelihoods), score.correct) == (int(weights.sum()), int(sums["correct"]))


def test_neither_the_batch_size_nor_padding_changes_an_answer(checkpoint, examples):
    small, large = predictor(checkpoint, 2), predictor(checkpoint, 8)
    pairs = task_examples.pairs(examples, LENGTHS)
    inputs, length = [asked for asked, _ in pairs], LENGTHS["targets"]
    answers, others = (p.generate(inputs, inference.Decoding(), length) for p in (small, large))
    assert [best.ids for best, *_ in answers] == [best.ids for best, *_ in others]
    assert len(answers) == len(examples)
    scores = [np.array([s.log_likelihood for s in p.score(pairs)]) for p in (small, large)]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    # Each row alone, straight from the decoder.
    for ids, (answer,) in zip(inputs, answers, strict=True):
        tokens = jnp.asarray(ids)[None]
        found = decoding.greedy(small.params, small.config, tokens, length, vocab_size=100)[0].tolist()
        assert answer.ids == (found[: found.index(1) + 1] if 1 in found else found)
        # What an answer says of its tokens is what scoring it says.
        assert small.score([(ids, answer.ids)])[0].log_likelihoods == pytest.approx(answer.log_probabilities, abs=1e-4)


def test_few_shapes_are_compiled():
    assert [inference.bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 65, 300, 512, 513)] == [
        16, 16, 24, 24, 32, 48, 64, 96, 384, 512, 768,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 0}, "num_beams is 0; it must be at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"num_beams": 4, "top_k": 3}, "beam search draws nothing: leave out top_k"),
        ({"num_beams": 2, "num_samples": 3}, "3 answers from 2 beams"),
        ({"temperature": 0.0, "num_samples": 2}, "temperature 0 draws nothing"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        inference.Decoding(**settings)


@pytest.mark.parametrize("seed", [0, 5, 3_000_000_000, 2**32 - 1])
def test_draws_are_keyed_by_seed_input_and_answer(checkpoint, seed):
    settings = inference.Decoding(temperature=1.0, num_samples=2, seed=seed)
    keys = predictor(checkpoint, 2)._draws(settings, [7, 9], 2).keys
    fold = jax.random.fold_in
    expected = [fold(fold(jax.random.key(np.uint32(seed)), number), answer) for number in (7, 9) for answer in (0, 1)]
    np.testing.assert_array_equal(*(jax.random.key_data(several) for several in (keys, jnp.stack(expected))))


def test_parameters_are_rounded_where_that_is_asked_for(checkpoint):
    exact, rounded = (predictor(checkpoint, 2, dtype=dtype).params for dtype in ("float32", "bfloat16"))
    differ = jax.tree.map(lambda a, b: bool((a != b).any()), exact, rounded)
    assert any(jax.tree.leaves(differ))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
        assert b.dtype == jnp.float32


def test_what_is_refused(checkpoint, tmp_path):
    restore = RestoreCheckpointConfig(str(checkpoint))
    with pytest.raises(UserError, match="set CHECKPOINT_PATH"):
        inference.restored(tiny_model(), Partitioner(), RestoreCheckpointConfig(), 2)
    with pytest.raises(UserError, match="no such folder"):
        inference.restored(tiny_model(), Partitioner(), RestoreCheckpointConfig(str(tmp_path / "no")), 2)
    config = DatasetConfig("a", LENGTHS, "validation", 2)
    given = (tiny_model(), config, restore, Partitioner(), str(tmp_path))
    with pytest.raises(UserError, match="'predct' is unknown"):
        infer_script.infer("predct", *given)
    with pytest.raises(UserError, match=r"infer\.shard_id 3 is not one of 3: give 0 to 2"):
        infer_script.infer("predict", *given, shard_id=3, num_shards=3)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="task a has no examples"):
        task_examples.longest([], "a")


class Words:
    def decode(self, ids):
        return " ".join(map(str, ids))


def test_texts_are_those_of_the_task_or_decoded():
    example = {
        "inputs": np.array([5, 1]),
        "inputs_pretokenized": "ёж".encode(),
        "options_pretokenized": np.array([b"a", "б".encode()], object),
        "weight_pretokenized": np.float32(0.5),
    }
    texts = task_examples.plain(example, Words())
    assert json.loads(json.dumps(texts)) == {
        "inputs_pretokenized": "ёж",
        "options_pretokenized": ["a", "б"],
        "weight_pretokenized": 0.5,
    }
    assert task_examples.plain({"inputs": np.array([5, 1])}, Words()) == {"inputs": "5 1"}
