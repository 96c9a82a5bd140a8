"""The official optimisers: AdamW with a slower backbone or layer-wise rates, frozen parts, clipping, a schedule.

Sources: `config/_base_/optimizer.py`, `train.py` of POP-3D; `distill.py`, `finetune.py` of ScaLR. The rates over the
steps are in `pop3d_jax.schedules`. Muon may take the place of AdamW for matrices: from scratch it needs far fewer steps
(the demo).
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
import optax.contrib

from pop3d_jax.models.parameters import path_names
from pop3d_jax.schedules import make_schedule

Parameters = Any  # a pytree of arrays, keyed as the model's modules are

OPTIMIZERS = ("adamw", "muon")
# Muon's updates get the size that AdamW's usually have, so that one learning rate fits both (Liu et al. 2025).
_MUON_UPDATE_RMS = 0.2


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


def waffleiron_layer(path: tuple[str, ...], depth: int) -> int:
    """Layer of a parameter of WaffleIron, for layer-wise rates (official `finetune.py`, `get_layer_id`).

    Args:
      path: names from the model down to the parameter, ours or those of the official modules.
      depth: blocks of the backbone.

    Returns:
      0 for the embedding, d + 1 for both halves of block d, depth + 1 for the head.

    Raises:
      ValueError: the path belongs to none of them.
    """
    if path[0] in ("embedding", "embed"):
        return 0
    if path[0] in ("head", "classif"):
        return depth + 1
    for name, block in itertools.pairwise(path):
        if name in ("blocks", "spatial_mix", "channel_mix") and block.isdigit() and int(block) < depth:
            return int(block) + 1
    raise ValueError(f"parameter {'.'.join(path)} belongs to no layer of a WaffleIron of depth {depth}")


def layer_scales(
    tree: Parameters, decay: float, layer_of: Callable[[tuple[str, ...]], int], last_layer: int
) -> Parameters:
    """Factor of every parameter's learning rate: decay ** (last_layer - layer).

    Args:
      tree: parameters, or `parameter_groups` of them.
      decay: in (0, 1]; 0.99 is official for all labels, 0.95 for few.
      layer_of: layer of a parameter by its path, such as `waffleiron_layer` of a depth.
      last_layer: the layer with factor 1: the head's.

    Returns:
      A tree of floats.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: float(decay ** (last_layer - layer_of(path_names(path)))), tree
    )


def _scale_updates(scales: Parameters) -> optax.GradientTransformation:
    def update(updates: Parameters, state: optax.EmptyState, params: Parameters = None) -> tuple:
        del params
        return jax.tree.map(lambda step, scale: step * scale, updates, scales), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def make_optimizer(
    config: ml_collections.ConfigDict,
    total_steps: int,
    groups: Parameters,
    layer_of: Callable[[tuple[str, ...]], int] | None = None,
) -> optax.GradientTransformation:
    """AdamW as official, or Muon with AdamW for all that is no kernel.

    Weights decay wherever they train, norms and biases included, as in both official trainings.

    Args:
      config: the `optim` part of an experiment: name ("adamw" or "muon"), learning_rate, backbone_multiplier (1 where
        it is absent), weight_decay, betas, epsilon, clip_norm (0: gradients are not clipped), layer_decay (0 or
        absent: one rate for all layers), and what `make_schedule` reads.
      total_steps: steps of the whole training.
      groups: from `parameter_groups`.
      layer_of: layer of a parameter by its path, for layer_decay; the layer of highest number has the full rate.

    Returns:
      The transformation; frozen parameters get no update and no optimiser state.

    Raises:
      ValueError: unknown name or schedule, or layer_decay for a network without `layer_of`.
    """
    if config.name not in OPTIMIZERS:
        raise ValueError(f"config.optim.name is {config.name!r}: choose one of {OPTIMIZERS}")
    layer_decay = config.get("layer_decay", 0.0)
    if layer_decay and layer_of is None:
        raise ValueError(
            f"config.optim.layer_decay is {layer_decay}, but this network's layers have no order: set it to 0"
        )

    def rule(base: float) -> optax.GradientTransformation:
        schedule = make_schedule(config, base, total_steps)
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

    transformations = [
        _clip_trainable(config.clip_norm, groups) if config.clip_norm else optax.identity(),
        optax.multi_transform(
            {
                "main": rule(config.learning_rate),
                "backbone": rule(config.learning_rate * config.get("backbone_multiplier", 1.0)),
                "frozen": optax.set_to_zero(),
            },
            groups,
        ),
    ]
    if layer_decay:
        # The update is proportional to the rate, decay of weights included: scaling it is scaling the rate.
        layers = jax.tree_util.tree_map_with_path(lambda path, _: layer_of(path_names(path)), groups)
        last_layer = max(jax.tree.leaves(layers))
        transformations.append(_scale_updates(layer_scales(groups, layer_decay, layer_of, last_layer)))
    return optax.chain(*transformations)
