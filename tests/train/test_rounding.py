"""bfloat16 numbers rounded at random: no number moves on average, small updates add up, and a run follows float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import make_batch, tiny_model

from vikhr_t5.errors import UserError
from vikhr_t5.train import optimizers
from vikhr_t5.train import step as step_module
from vikhr_t5.train.rounding import apply_updates, round_stochastically
from vikhr_t5.train.step import Trainer, zero_sums


def test_rounding_gives_a_neighbour_and_its_mean_is_the_number():
    rng = np.random.default_rng(0)
    numbers = (rng.normal(size=64) * 10.0 ** rng.integers(-30, 30, 64)).astype(np.float32)
    draws = 4096
    rounded = round_stochastically(jnp.tile(numbers, (draws, 1)), jax.random.key(0))
    rounded = np.asarray(rounded.astype(jnp.float32)).astype(np.float64)
    bits = numbers.view(np.uint32) & 0xFFFF0000
    toward_zero = bits.view(np.float32).astype(np.float64)
    away = (bits + 0x10000).view(np.float32).astype(np.float64)
    assert np.all((rounded == toward_zero) | (rounded == away))
    step = np.abs(away - toward_zero)
    # The mean of n draws has a standard deviation of at most step / (2 sqrt(n)): 4.5 of them, for 64 numbers.
    assert np.all(np.abs(rounded.mean(0) - numbers) <= 4.5 * step / 2 / draws**0.5)


def test_what_bfloat16_holds_is_not_rounded():
    numbers = jnp.asarray([0.0, -0.0, 1.0, -2.5, 2.0**-126, 3.0e38], jnp.bfloat16)
    rounded = round_stochastically(numbers.astype(jnp.float32), jax.random.key(0))
    np.testing.assert_array_equal(rounded.view(jnp.uint16), numbers.view(jnp.uint16))


def test_updates_too_small_for_bfloat16_add_up():
    """1 + 1000 updates of 0.001, a quarter of what bfloat16 sees beside 1: nearest stays at 1, ours comes to 2."""
    params = {"x": {"kernel": jnp.ones((64, 64), jnp.bfloat16)}}
    update = {"x": {"kernel": jnp.full((64, 64), 0.001)}}

    def move(params, number):
        return apply_updates(params, update, jax.random.fold_in(jax.random.key(0), number)), None

    moved = jax.lax.scan(move, params, jnp.arange(1000))[0]["x"]["kernel"]
    assert moved.dtype == jnp.bfloat16
    nearest = jax.lax.fori_loop(0, 1000, lambda _, p: optax.apply_updates(p, update), params)["x"]["kernel"]
    assert np.all(np.asarray(nearest, np.float32) == 1)
    # A walk of n steps of 2^-7 with probability q has the deviation 2^-7 sqrt(n q (1 - q)): 0.083; of the mean, 64^-1.
    assert abs(float(np.asarray(moved, np.float32).mean()) - 2) < 4 * 0.083 / 64


def test_an_unknown_parameter_type_is_refused():
    with pytest.raises(UserError, match=r"EncoderDecoderModel\.param_dtype 'float16' \(nearest"):
        tiny_model(param_dtype="float16")


def train(param_dtype: str, steps: int, optimizer, rate: float) -> list[float]:
    """Loss per target token of each step, over few batches again and again."""
    model = tiny_model(optimizer=optimizer, param_dtype=param_dtype)
    step = jax.jit(Trainer(lambda _: jnp.float32(rate)).step_function(model, 2), donate_argnums=(0, 1))
    state, losses = model.init_state(jax.random.key(0)), []
    for number in range(steps):
        state, sums, _ = step(state, zero_sums(2), make_batch(8, (24, 12), number % 4), jax.random.key(1))
        losses.append(float(sums["loss"] / sums["weight"]))
    assert {p.dtype.name for p in jax.tree.leaves(state.params)} == {param_dtype}
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_run_with_bfloat16_parameters_follows_float32_where_nearest_rounding_stalls(name, monkeypatch):
    """Small learning rates, as at the end of a schedule."""
    optimizer, rate = {"adamw": (optimizers.AdamW(), 3e-4), "adafactor": (optimizers.Adafactor(), 1e-3)}[name]
    start, *_, exact = means(train("float32", STEPS, optimizer, rate))
    *_, ours = means(train("bfloat16", STEPS, optimizer, rate))
    monkeypatch.setattr(step_module, "apply_updates", lambda params, updates, key: optax.apply_updates(params, updates))
    *_, nearest = means(train("bfloat16", STEPS, optimizer, rate))
    print(name, start, exact, ours, nearest)
    assert abs(ours - exact) <= 0.05 * (start - exact)
    assert nearest - exact >= 0.25 * (start - exact)


STEPS = 1200


def means(losses: list[float]) -> list[float]:
    return np.asarray(losses).reshape(-1, 40).mean(1).tolist()
