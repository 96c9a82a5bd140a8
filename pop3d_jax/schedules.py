"""Learning rates over the steps of a training: POP-3D's, ScaLR's and ScaLR+'s."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

# From the step, counted from 0, to the rate.
Schedule = Callable[[jax.Array | int], jax.Array]

SCHEDULES = ("cosine_with_warmup", "warmup_cosine", "warmup_cooldown")


def cosine_with_warmup(
    base: float, *, total_steps: int, warmup_steps: int, warmup_start: float, final: float
) -> Schedule:
    """Learning rate of every step of POP-3D's training: timm's CosineLRScheduler, as the official loop calls it.

    The official loop updates the scheduler after the optimiser, with a counter that starts at zero: step 0 runs at
    the rate of construction, step i at the value of update i - 1. The cosine is not shifted by the warm-up.

    Args:
      base: the rate after the warm-up.
      total_steps: length of the cosine, in steps.
      warmup_steps: length of the linear warm-up.
      warmup_start: rate at construction, where the warm-up begins.
      final: rate at the end of the cosine.

    Returns:
      A function from the step (counted from 0) to the rate.
    """

    def rate(step: jax.Array | int) -> jax.Array:
        update = jnp.maximum(jnp.asarray(step, jnp.float32) - 1.0, 0.0)
        warm = warmup_start + update * (base - warmup_start) / max(warmup_steps, 1)
        # The fraction is formed first: float32 holds it to full precision at any length of training.
        angle = jnp.pi * jnp.minimum(update / total_steps, 1.0)
        # (1 + cos a) / 2 without its cancellation near the end.
        cosine = final + (base - final) * jnp.square(jnp.cos(0.5 * angle))
        return jnp.where(update < warmup_steps, warm, cosine)

    return rate


def warmup_cosine(base: float, *, total_steps: int, warmup_steps: int, final: float) -> Schedule:
    """Learning rate of every step of ScaLR's trainings (official `utils/scheduler.py`, `WarmupCosine`).

    The rate rises linearly from exactly 0 at step 0, so that the first update moves nothing, reaches `base` at step
    `warmup_steps`, and falls along a cosine that begins there.

    Args:
      base: the rate after the warm-up.
      total_steps: steps of the training, warm-up included. Later steps keep the final rate; the official cosine
        would rise again.
      warmup_steps: length of the linear warm-up.
      final: rate at the end.

    Returns:
      A function from the step (counted from 0) to the rate.

    Raises:
      ValueError: the warm-up is longer than the training.
    """
    _check_fits("warmup_steps", warmup_steps, total_steps)
    length = max(total_steps - warmup_steps, 1)

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = base * (step / max(warmup_steps, 1))
        # (1 + cos a) / 2 = sin^2 of half of what is left to go: relatively exact down to the last step.
        left = jnp.clip((total_steps - step) / length, 0.0, 1.0)
        cosine = final + (base - final) * jnp.square(jnp.sin(0.5 * jnp.pi * left))
        return jnp.where(step < warmup_steps, warm, cosine)

    return rate


def warmup_cooldown(
    base: float, *, total_steps: int, warmup_steps: int, cooldown_steps: int, timescale_steps: float
) -> Schedule:
    """Learning rate of ScaLR+ (`LinWarmup_ReciprocalSqrt_LinCoolDown` of the authors' newer `utils/scheduler.py`).

    It rises linearly from 0, falls as 1 / sqrt(1 + steps since then / timescale), and linearly to 0 at the end. As
    official, the cooldown begins at the value that the curve would have without the warm-up, a little lower.

    Args:
      base: the highest rate.
      total_steps: steps of the training; the last one has rate 0, and later steps too.
      warmup_steps: length of the warm-up.
      cooldown_steps: length of the cooldown, at the end.
      timescale_steps: after how many steps the rate is 1 / sqrt(2) of the highest.

    Returns:
      A function from the step (counted from 0) to the rate.

    Raises:
      ValueError: warm-up and cooldown together are longer than the training, or a timescale that is not positive.
    """
    _check_fits("warmup_steps and config.optim.cooldown_steps", warmup_steps + cooldown_steps, total_steps)
    if timescale_steps <= 0:
        raise ValueError(f"config.optim.timescale_steps is {timescale_steps}: it must be above 0")
    cooldown_start = total_steps - cooldown_steps
    at_cooldown = base / math.sqrt(1 + cooldown_start / timescale_steps)

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = base * (step / max(warmup_steps, 1))
        falling = base * jax.lax.rsqrt(1 + jnp.maximum(step - warmup_steps, 0.0) / timescale_steps)
        cooling = at_cooldown * jnp.clip((total_steps - 1 - step) / max(cooldown_steps - 1, 1), 0.0, 1.0)
        return jnp.where(step <= warmup_steps, warm, jnp.where(step <= cooldown_start, falling, cooling))

    return rate


def make_schedule(config: ml_collections.ConfigDict, base: float, total_steps: int) -> Schedule:
    """The schedule that a configuration asks for.

    Args:
      config: the `optim` part of an experiment: schedule ("cosine_with_warmup" where it is absent, "warmup_cosine" or
        "warmup_cooldown"), warmup_steps; final_learning_rate for the first two, warmup_start for the first,
        cooldown_steps and timescale_steps for the last.
      base: the highest rate.
      total_steps: steps of the whole training.

    Raises:
      ValueError: unknown schedule, or its phases do not fit into the training.
    """
    name = config.get("schedule", SCHEDULES[0])
    common = {"warmup_steps": config.warmup_steps, "final": config.final_learning_rate}
    if name == "cosine_with_warmup":
        return cosine_with_warmup(base, total_steps=total_steps, warmup_start=config.warmup_start, **common)
    if name == "warmup_cosine":
        return warmup_cosine(base, total_steps=total_steps, **common)
    if name == "warmup_cooldown":
        return warmup_cooldown(
            base,
            total_steps=total_steps,
            warmup_steps=config.warmup_steps,
            cooldown_steps=config.cooldown_steps,
            timescale_steps=config.timescale_steps,
        )
    raise ValueError(f"config.optim.schedule is {name!r}: choose one of {SCHEDULES}")


def _check_fits(what: str, steps: int, total_steps: int) -> None:
    if steps > total_steps:
        raise ValueError(
            f"config.optim.{what} take {steps} steps, the training has {total_steps}: shorten them or train longer"
        )
