"""Learning rates against closed forms, at steps on both sides of every corner."""

import math

import numpy as np
import optax
import pytest

from vikhr_t5.errors import UserError
from vikhr_t5.train.schedules import cosine, create_learning_rate_scheduler, warmup_stable_decay

STEPS = (0, 1, 9, 10, 11, 55, 99, 100, 101, 149, 150, 1000)


@pytest.mark.parametrize(
    ("factors", "closed_form"),
    [
        ("constant", lambda s: 0.5),
        ("linear_warmup", lambda s: min(1, s / 10)),
        ("rsqrt_decay", lambda s: 1 / math.sqrt(max(s, 10))),
        ("constant * linear_warmup * rsqrt_decay", lambda s: 0.5 * min(1, s / 10) / math.sqrt(max(s, 10))),
        ("rsqrt_normalized_decay", lambda s: math.sqrt(10 / max(s, 10))),
        ("linear_decay", lambda s: 0.5 * min(s / 10, 1 + 0.9 * (10 - s))),
        ("decay_every", lambda s: 0.9 ** (s // 50)),
        ("cosine_decay", lambda s: 0.5 * (1 + math.cos(math.pi * (max(0, (s - 10) / 100) % 1)))),
    ],
)
def test_t5x_factors(factors, closed_form):
    schedule = create_learning_rate_scheduler(
        factors, base_learning_rate=0.5, warmup_steps=10, decay_factor=0.9, steps_per_decay=50, steps_per_cycle=100
    )
    for step in STEPS:
        assert float(schedule(step)) == pytest.approx(max(closed_form(step), 1e-8), rel=1e-5), step


def test_step_offset_and_floor():
    schedule = create_learning_rate_scheduler(
        "constant * linear_warmup", 2.0, 10, step_offset=100, min_learning_rate=0.1
    )
    assert [float(schedule(s)) for s in (0, 100, 105, 110, 500)] == pytest.approx([0.1, 0.1, 1.0, 2.0, 2.0])


def test_t5x_pretraining_rate():
    """base.gin at step 200: 0.01 (reference/info.json)."""
    schedule = create_learning_rate_scheduler("constant * rsqrt_decay", base_learning_rate=1.0, warmup_steps=10000)
    assert float(schedule(200)) == pytest.approx(0.01)


def test_unknown_factor_names_the_nearest():
    with pytest.raises(UserError, match="rsqrt_decay"):
        create_learning_rate_scheduler("constant * rsqrt_dekay")


@pytest.mark.parametrize("factor", ["linear_warmup", "linear_decay", "rsqrt_decay", "rsqrt_normalized_decay"])
def test_no_warmup_is_refused_by_what_divides_by_it(factor):
    with pytest.raises(UserError, match=rf"'{factor}' divides by warmup_steps, which is 0: at least 1"):
        create_learning_rate_scheduler(f"constant * {factor}", warmup_steps=0)
    assert float(create_learning_rate_scheduler("constant", 0.5, warmup_steps=0)(0)) == 0.5


def test_cosine_equals_optax():
    ours = cosine(3e-3, total_steps=150, warmup_steps=10, final_fraction=0.1)
    decay = optax.cosine_decay_schedule(3e-3, 140, alpha=0.1)
    for step in STEPS:
        expected = 3e-3 * (step + 1) / 10 if step < 10 else decay(step - 10)
        assert float(ours(step)) == pytest.approx(float(expected), rel=1e-5), step


def test_warmup_stable_decay():
    schedule = warmup_stable_decay(1.0, total_steps=100, warmup_steps=10, decay_steps=20, final_fraction=0.2)
    rates = np.array([float(schedule(s)) for s in range(120)])
    assert rates[:10] == pytest.approx((np.arange(10) + 1) / 10)
    assert rates[10:81] == pytest.approx(np.ones(71))
    assert rates[85] == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(5 / 20)))
    assert rates[100:] == pytest.approx(np.full(20, 0.2))


def test_phases_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="60 warm-up and 50 decay steps do not fit 100"):
        warmup_stable_decay(1.0, total_steps=100, warmup_steps=60, decay_steps=50)
