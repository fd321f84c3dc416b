"""Learning-rate schedules: step (int32 scalar, 0 for the first update) -> float32 scalar.

t5x composes a schedule from named factors; `cosine` and `warmup_stable_decay` are the two of today's recipes.
"""

from collections.abc import Callable

import jax.numpy as jnp

from vikhr_t5.errors import UserError, nearest

Schedule = Callable[[jnp.ndarray | int], jnp.ndarray]


def create_learning_rate_scheduler(
    factors: str = "constant * linear_warmup * rsqrt_decay",
    base_learning_rate: float = 0.5,
    warmup_steps: int = 1000,
    decay_factor: float = 0.5,
    steps_per_decay: int = 20000,
    steps_per_cycle: int = 100000,
    step_offset: int = 0,
    min_learning_rate: float = 1e-8,
) -> Schedule:
    """t5x's `utils.create_learning_rate_scheduler`: a product of factors, with s = max(0, step - step_offset).

    Args:
      factors: names joined by "*". With b = base_learning_rate, w = warmup_steps:
        constant                b
        linear_warmup           min(1, s/w)
        linear_decay            b * min(s/w, 1 + decay_factor*(w - s))
        rsqrt_decay             1 / sqrt(max(s, w))
        rsqrt_normalized_decay  sqrt(w / max(s, w))
        decay_every             decay_factor ** (s // steps_per_decay)
        cosine_decay            (1 + cos(pi * frac(max(0, s - w) / steps_per_cycle))) / 2: it starts anew each cycle
      min_learning_rate: the floor of the product.

    Raises:
      UserError: a factor is unknown, or divides by a number of steps that is less than 1.
    """
    w, b = warmup_steps, base_learning_rate
    known: dict[str, Callable[[jnp.ndarray], jnp.ndarray | float]] = {
        "constant": lambda s: b,
        "linear_warmup": lambda s: jnp.minimum(1.0, s / w),
        "linear_decay": lambda s: b * jnp.minimum(s / w, 1.0 + decay_factor * (w - s)),
        "rsqrt_decay": lambda s: 1.0 / jnp.sqrt(jnp.maximum(s, w)),
        "rsqrt_normalized_decay": lambda s: jnp.sqrt(w / jnp.maximum(s, w)),
        "decay_every": lambda s: decay_factor ** (s // steps_per_decay),
        "cosine_decay": lambda s: (1 + jnp.cos(jnp.pi * (jnp.maximum(0.0, (s - w) / steps_per_cycle) % 1.0))) / 2,
    }
    divisors = {
        "decay_every": ("steps_per_decay", steps_per_decay),
        "cosine_decay": ("steps_per_cycle", steps_per_cycle),
    }
    divisors |= {name: ("warmup_steps", w) for name in known if name.startswith(("linear", "rsqrt"))}
    names = [name.strip() for name in factors.split("*")]
    for name in names:
        if name not in known:
            raise UserError(f"unknown learning-rate factor {name!r} in {factors!r} ({nearest(name, known)})")
        argument, steps = divisors.get(name, ("", 1))
        if steps < 1:
            raise UserError(f"learning-rate factor {name!r} divides by {argument}, which is {steps}: at least 1")

    def schedule(step: jnp.ndarray | int) -> jnp.ndarray:
        since = jnp.maximum(0, jnp.asarray(step) - step_offset).astype(jnp.float32)
        rate = jnp.float32(1.0)
        for name in names:
            rate = rate * known[name](since)
        return jnp.maximum(rate, min_learning_rate).astype(jnp.float32)

    return schedule


def cosine(
    base_learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    final_fraction: float = 0.1,
    step_offset: int = 0,
) -> Schedule:
    """Linear warm-up to `base_learning_rate`, then half a cosine down to `final_fraction` of it at `total_steps`.

    The first step trains (its rate is 1/warmup_steps of the base), and the rate stays at its end value afterwards.
    """
    return _piecewise(base_learning_rate, total_steps, warmup_steps, total_steps - warmup_steps, step_offset,
                      lambda x: final_fraction + (1 - final_fraction) * (1 + jnp.cos(jnp.pi * x)) / 2)  # fmt: skip


def warmup_stable_decay(
    base_learning_rate: float,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int,
    final_fraction: float = 0.0,
    step_offset: int = 0,
) -> Schedule:
    """Linear warm-up, a plateau, then 1 - sqrt over the last `decay_steps` (WSD; Haegele et al., 2405.18392)."""
    return _piecewise(base_learning_rate, total_steps, warmup_steps, decay_steps, step_offset,
                      lambda x: final_fraction + (1 - final_fraction) * (1 - jnp.sqrt(x)))  # fmt: skip


def _piecewise(
    base: float, total: int, warmup: int, decay: int, offset: int, shape: Callable[[jnp.ndarray], jnp.ndarray]
) -> Schedule:
    """Warm-up (step + 1) / warmup, a plateau, then `shape` of the decay's progress in [0, 1]."""
    if warmup < 0 or decay < 1 or warmup + decay > total:
        raise UserError(f"learning rate: {warmup} warm-up and {decay} decay steps do not fit {total} total steps")

    def schedule(step: jnp.ndarray | int) -> jnp.ndarray:
        since = jnp.maximum(0, jnp.asarray(step) - offset).astype(jnp.float32)
        progress = jnp.clip((since - (total - decay)) / decay, 0.0, 1.0)
        return (base * jnp.minimum(1.0, (since + 1) / max(warmup, 1)) * shape(progress)).astype(jnp.float32)

    return schedule
