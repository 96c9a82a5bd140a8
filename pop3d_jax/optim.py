"""The official optimiser: AdamW with a slower backbone, frozen parts, clipping, warm-up and cosine.

Source: `config/_base_/optimizer.py`, `train.py` of POP-3D; the schedule is timm's CosineLRScheduler.
Muon may take the place of AdamW for matrices: from scratch it needs far fewer steps (the demo).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
import optax.contrib

from pop3d_jax.models.parameters import path_names

Parameters = Any  # a pytree of arrays, keyed as the model's modules are

OPTIMIZERS = ("adamw", "muon")
# Muon's updates get the size that AdamW's usually have, so that one learning rate fits both (Liu et al. 2025).
_MUON_UPDATE_RMS = 0.2


def cosine_with_warmup(
    base: float, *, total_steps: int, warmup_steps: int, warmup_start: float, final: float
) -> Callable[[jax.Array | int], jax.Array]:
    """Learning rate of every step.

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


def parameter_groups(parameters: Parameters, is_frozen: Callable[[tuple[str, ...]], bool]) -> Parameters:
    """Labels every parameter "frozen", "backbone" or "main", by its path."""

    def label(path: tuple, _: Any) -> str:
        names = path_names(path)
        if is_frozen(names):
            return "frozen"
        return "backbone" if names[0] == "backbone" else "main"

    return jax.tree_util.tree_map_with_path(label, parameters)


def trainable_norm(tree: Parameters, groups: Parameters) -> jax.Array:
    """L2 norm over everything that trains: the norm that is clipped, as torch leaves out what has no gradient."""
    squares = jax.tree.map(
        lambda x, group: jnp.zeros(()) if group == "frozen" else jnp.sum(jnp.square(x)), tree, groups
    )
    return jnp.sqrt(sum(jax.tree.leaves(squares)))


def _clip_trainable(max_norm: float, groups: Parameters) -> optax.GradientTransformation:
    def update(gradients: Parameters, state: optax.EmptyState, params: Parameters = None) -> tuple:
        del params
        # torch.nn.utils.clip_grad_norm_: max_norm / (norm + 1e-6), never above one.
        factor = jnp.minimum(max_norm / (trainable_norm(gradients, groups) + 1e-6), 1.0)
        return jax.tree.map(lambda gradient: gradient * factor, gradients), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _matrices(parameters: Parameters) -> Parameters:
    """What Muon orthogonalises: kernels, as matrices from all inputs to the outputs. None: AdamW's."""

    def dimensions(path: tuple, parameter: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if path_names(path)[-1] != "kernel" or parameter.ndim < 2:
            return None
        last = parameter.ndim - 1
        return optax.contrib.MuonDimensionNumbers(reduction_axis=tuple(range(last)), output_axis=(last,))

    return jax.tree_util.tree_map_with_path(dimensions, parameters)


def make_optimizer(
    config: ml_collections.ConfigDict, total_steps: int, groups: Parameters
) -> optax.GradientTransformation:
    """AdamW as official, or Muon with AdamW for all that is no kernel.

    Args:
      config: the `optim` part of an experiment: name ("adamw" or "muon"), learning_rate, backbone_multiplier,
        weight_decay, betas, epsilon, clip_norm, warmup_steps, warmup_start, final_learning_rate.
      total_steps: steps of the whole training.
      groups: from `parameter_groups`.

    Returns:
      The transformation; frozen parameters get no update and no optimiser state.

    Raises:
      ValueError: unknown name.
    """
    if config.name not in OPTIMIZERS:
        raise ValueError(f"config.optim.name is {config.name!r}: choose one of {OPTIMIZERS}")

    def rule(base: float) -> optax.GradientTransformation:
        schedule = cosine_with_warmup(
            base,
            total_steps=total_steps,
            warmup_steps=config.warmup_steps,
            warmup_start=config.warmup_start,
            final=config.final_learning_rate,
        )
        b1, b2 = config.betas
        if config.name == "adamw":
            return optax.adamw(schedule, b1=b1, b2=b2, eps=config.epsilon, weight_decay=config.weight_decay)
        return optax.contrib.muon(
            schedule,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            consistent_rms=_MUON_UPDATE_RMS,
            adam_b1=b1,
            adam_b2=b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
        )

    return optax.chain(
        _clip_trainable(config.clip_norm, groups),
        optax.multi_transform(
            {
                "main": rule(config.learning_rate),
                "backbone": rule(config.learning_rate * config.backbone_multiplier),
                "frozen": optax.set_to_zero(),
            },
            groups,
        ),
    )
