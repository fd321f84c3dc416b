"""Evaluation: sums over the batches, per source; examples taken out of packed rows; greedy predictions."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from tiny_run import CONFIG, SOURCES, TinyDataset, dataset_config, tiny_model

from vikhr_t5.model import decoding
from vikhr_t5.train.evaluate import Evaluator, unpack
from vikhr_t5.train.losses import loss_normalizer
from vikhr_t5.train.partitioning import Partitioner

MODEL = tiny_model(dataclasses.replace(CONFIG, dropout_rate=0.5))
DATASET = TinyDataset(dataset_config(4, shuffle=False))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init_state)(jax.random.key(0)).params


def evaluator(num_batches=3, num_samples=4):
    shardings = Partitioner().shardings(MODEL.state_axes(), MODEL.abstract_state())
    return Evaluator(MODEL, Partitioner(), DATASET, num_batches, num_samples, shardings.params)


def test_metrics_are_means_over_tokens_without_dropout(params):
    found = evaluator().metrics(params)
    assert found == evaluator().metrics(params)
    total = dict.fromkeys(("loss", "correct", "weight"), 0.0)
    by_source = {name: np.zeros(3) for name in total}
    loss_sums = jax.jit(lambda batch: MODEL.loss_sums(params, batch, loss_normalizer(None, batch).weights, 2)[1])
    for batch in DATASET.eval_batches(3):
        sums = jax.device_get(loss_sums(batch))
        for name in total:
            total[name] += sums[name]
            by_source[name] += sums[f"source_{name}"]
    assert found["loss"] == pytest.approx(total["loss"] / total["weight"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(total["correct"] / total["weight"], rel=1e-5)
    for i, name in enumerate(SOURCES, start=1):
        assert found[f"loss/{name}"] == pytest.approx(by_source["loss"][i] / by_source["weight"][i], rel=1e-5)
        assert found[f"accuracy/{name}"] == pytest.approx(by_source["correct"][i] / by_source["weight"][i], rel=1e-5)


def test_unpack_gives_every_example_of_a_packed_row():
    batch = next(DATASET.eval_batches(1))
    examples = list(unpack(batch))
    assert len(examples) == sum(len(set(row) - {0}) for row in batch["decoder_segment_ids"])
    for source, example in examples:
        body = example["inputs"][:-1]
        assert example["targets"].tolist() == [*(body if SOURCES[source - 1] == "copy" else body[::-1]), 1]
    for side, name in (("encoder_input_tokens", "inputs"), ("decoder_target_tokens", "targets")):
        tokens = list(itertools.chain(*(example[name].tolist() for _, example in examples)))
        assert tokens == batch[side][batch[side] > 0].tolist()


def test_unpack_of_unpacked_rows():
    batch = next(DATASET.eval_batches(1))
    alone = {name: np.where(batch[f"{name[:7]}_segment_ids"] == 1, array, 0) for name, array in batch.items()}
    del alone["encoder_segment_ids"], alone["decoder_segment_ids"]
    assert len(list(unpack(alone))) == 4


def test_samples_take_turns_between_sources_and_are_greedy(params):
    samples = evaluator().samples(params)
    assert [sample["task"] for sample in samples] == ["copy", "reverse", "copy", "reverse"]
    first = samples[1]
    tokens = np.array([[*map(int, first["input"].split()), 1]], np.int32)
    expected = decoding.greedy(params, MODEL.config, tokens, 64, eos_id=1, vocab_size=MODEL.vocabulary.size)
    assert first["prediction"] == MODEL.vocabulary.decode(np.asarray(expected)[0].tolist())
    assert evaluator(num_samples=0).samples(params) == []
