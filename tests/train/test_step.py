"""The step: accumulation, packing, chunked cross-entropy, clipping, non-finite updates, dropout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import CONFIG, LENGTHS, SOURCES, make_batch, tiny_model

from vikhr_t5.errors import UserError
from vikhr_t5.train import optimizers
from vikhr_t5.train.losses import loss_normalizer
from vikhr_t5.train.state import TrainState
from vikhr_t5.train.step import NEVER, Trainer, zero_sums

NO_DROPOUT = dataclasses.replace(CONFIG, dropout_rate=0.0)
BATCH = make_batch(8, (LENGTHS["inputs"], LENGTHS["targets"]), 0)
KEY = jax.random.key(7)


@functools.cache
def constant(rate=0.05):
    return optimizers.create_learning_rate_scheduler("constant", rate)


@functools.cache
def model_of(config=NO_DROPOUT, optimizer=None, **fields):
    return tiny_model(config, optimizer, **fields)


@functools.cache
def fresh_params():
    return jax.jit(tiny_model().init_state)(jax.random.key(0)).params


@functools.cache  # a compilation is most of a test's time
def jitted(model, trainer):
    return jax.jit(trainer.step_function(model, len(SOURCES)))


def fresh_state(model):
    return TrainState(jnp.int32(0), fresh_params(), model.optimizer.init(fresh_params()))


def do_step(model, trainer, batch=BATCH, state=None, key=KEY):
    state = state or fresh_state(model)
    state, sums, _ = jitted(model, trainer)(state, zero_sums(len(SOURCES)), batch, key)
    return state, jax.device_get(sums)


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


@pytest.mark.parametrize("factor", [None, "NUM_REAL_TARGET_TOKENS"])
def test_four_accumulation_steps_equal_the_full_batch(factor):
    """Loss, gradient norm and parameters, with rows of unlike lengths, so that a mean of means would differ."""
    batch = {name: array.copy() for name, array in BATCH.items()}
    batch["decoder_loss_weights"][::2, 3:] = 0
    model = model_of(optimizer=Descent(), loss_normalizing_factor=factor)
    full, full_sums = do_step(model, Trainer(constant()), batch)
    parts, parts_sums = do_step(model, Trainer(constant(), num_microbatches=4), batch)
    for name in ("loss", "grad_norm", "z_loss", "correct", "weight", "source_loss", "inputs", "targets"):
        np.testing.assert_allclose(parts_sums[name], full_sums[name], rtol=2e-6, err_msg=name)
    moved = float(full_sums["grad_norm"]) * 0.05
    assert largest_difference(parts.params, full.params) < 1e-6 * max(1, moved)


def test_a_packed_batch_is_the_sum_of_its_examples_alone():
    """Each example of the packed rows, in a row of its own and without segments: the losses add up."""
    model = model_of()
    params = jax.tree.map(lambda p: p * 3, fresh_params())  # attention far from uniform
    alone = {name: [] for name in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")}
    for row in range(8):
        for segment in range(1, BATCH["decoder_segment_ids"][row].max() + 1):
            for name, rows in alone.items():
                here = BATCH[f"{name[:7]}_segment_ids"][row] == segment
                tokens = BATCH[name][row][here]
                rows.append(np.pad(tokens, (0, BATCH[name].shape[1] - len(tokens))))
    alone = {name: np.stack(rows) for name, rows in alone.items()}
    alone["decoder_loss_weights"] = alone["decoder_source_ids"] = (alone["decoder_target_tokens"] > 0).astype(np.int32)

    def loss(batch):
        weights = loss_normalizer(None, batch).weights
        return jax.jit(lambda b: model.loss_sums(params, b, weights, len(SOURCES)))(batch)

    (packed, packed_sums), (sum_alone, alone_sums) = loss(BATCH), loss(alone)
    assert len(alone["decoder_target_tokens"]) > 20
    assert float(packed) == pytest.approx(float(sum_alone), rel=1e-5)
    assert float(packed_sums["correct"]) == float(alone_sums["correct"])


def test_chunked_cross_entropy_changes_nothing_and_holds_less():
    whole, chunked = model_of(), model_of(loss_chunk_size=5)
    (state, sums), (chunked_state, chunked_sums) = (do_step(model, Trainer(constant())) for model in (whole, chunked))
    assert sums["loss"] == pytest.approx(chunked_sums["loss"], rel=1e-6)
    assert largest_difference(state.params, chunked_state.params) < 1e-5

    def program(model):
        return jitted(model, Trainer(constant())).lower(state, zero_sums(2), BATCH, KEY).as_text()

    logits = f"tensor<8x{LENGTHS['targets']}x128xf32>"
    assert logits in program(whole)
    assert logits not in program(chunked)


def test_sums_per_source():
    _, sums = do_step(model_of(), Trainer(constant()))
    for name in ("loss", "correct", "weight"):
        assert sums[f"source_{name}"].sum() == pytest.approx(sums[name], rel=1e-6)
        assert sums[f"source_{name}"][0] == 0
    for source in (1, 2):
        assert sums["source_weight"][source] == (BATCH["decoder_source_ids"] == source).sum()
    assert sums["inputs"] == (BATCH["encoder_input_tokens"] > 0).sum()
    assert sums["targets"] == (BATCH["decoder_target_tokens"] > 0).sum()


def test_clipping_bounds_the_gradient_that_the_optimizer_sees():
    """With plain gradient descent the update itself shows the clipped norm."""
    model = model_of(optimizer=Descent())
    after, sums = do_step(model, Trainer(constant(1.0), max_grad_norm=0.25))
    assert sums["grad_norm"] > 1
    moved = optax.global_norm(jax.tree.map(lambda a, b: a - b, after.params, fresh_params()))
    assert float(moved) == pytest.approx(0.25, rel=1e-4)


@dataclasses.dataclass(frozen=True)
class Descent:
    """p <- p - lr * g."""

    def init(self, params):
        return {}

    def update(self, grads, state, params, learning_rate):
        return jax.tree.map(lambda g: -learning_rate * g, grads), state


def test_a_non_finite_update_changes_nothing_but_the_step():
    model = model_of()
    state = model.init_state(jax.random.key(0))
    state.params["decoder"]["decoder_norm"]["scale"] = (
        state.params["decoder"]["decoder_norm"]["scale"].at[0].set(jnp.inf)
    )
    after, sums = do_step(model, Trainer(constant()), state=state)
    assert int(after.step) == 1
    assert jax.tree.all(jax.tree.map(np.array_equal, after.params, state.params))
    assert jax.tree.all(jax.tree.map(np.array_equal, after.opt_state, state.opt_state))
    assert (int(sums["bad_steps"]), int(sums["first_bad_step"]), float(sums["loss"])) == (1, 1, 0.0)

    _, sums = do_step(model, Trainer(constant()))
    assert (int(sums["bad_steps"]), int(sums["first_bad_step"])) == (0, NEVER)


def test_an_update_of_a_non_finite_rate_is_not_applied():
    model = model_of()
    after, sums = do_step(model, Trainer(lambda step: jnp.where(step == 0, jnp.nan, 0.1)))
    assert int(sums["bad_steps"]) == 1
    assert jax.tree.all(jax.tree.map(np.array_equal, after.params, fresh_params()))


def test_dropout_depends_on_the_step_and_the_key_alone():
    model = model_of(dataclasses.replace(CONFIG, dropout_rate=0.5))
    state = fresh_state(model)
    losses = [
        float(do_step(model, Trainer(constant()), state=state._replace(step=jnp.int32(step)), key=key)[1]["loss"])
        for step, key in ((3, KEY), (3, KEY), (4, KEY), (3, jax.random.key(8)))
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_an_all_padding_batch_is_no_division_by_zero():
    empty = {name: np.zeros_like(array) for name, array in BATCH.items()}
    model = model_of(loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    state, sums = do_step(model, Trainer(constant()), empty)
    assert sums["bad_steps"] == 0
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(state.params))


def test_unknown_behaviour_is_refused():
    with pytest.raises(UserError, match="'ignore'"):
        Trainer(constant(), on_non_finite="ignore")
    with pytest.raises(UserError, match="num_microbatches cannot be -1"):
        Trainer(constant(), num_microbatches=-1)
