"""Losses, gradients, optimiser steps and learning rates against the official training code."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from pop3d_jax.experiment import frozen_by
from pop3d_jax.losses import pop3d_loss
from pop3d_jax.models.parameters import merge_model, split_model
from pop3d_jax.official_weights import model_to_state_dict
from pop3d_jax.optim import make_optimizer, parameter_groups, trainable_norm
from pop3d_jax.schedules import cosine_with_warmup
from pop3d_jax.verification.checks import Check, absolute, relative, relative_norm
from pop3d_jax.verification.golden_model import GoldenFile, golden_arrays, golden_json, tiny_model
from pop3d_jax.verification.network import NOISE_FACTOR

# The two loss calls of the golden set, and the array that holds the target of each.
_TARGETS = {"plain": "loss_voxel_target", "weighted_ignore": "loss_voxel_target_ignore"}
# The call whose gradients and optimiser steps are stored.
_STORED = "weighted_ignore"
_TERMS = {"cross_entropy": "ce", "lovasz": "lovasz", "feature": "feature", "total": "total"}


@dataclasses.dataclass(frozen=True)
class _Network:
    """The small network, taken apart, and its loss on sample 0 as the official training call."""

    graph: nnx.GraphDef
    parameters: Any
    statistics: Any
    groups: Any
    loss_and_gradients: Callable[..., Any]

    def named(self, tree: Any) -> dict[str, np.ndarray]:
        """Parameters or gradients under the official names and in official layouts."""
        return model_to_state_dict(merge_model(self.graph, tree, self.statistics))


def training(golden_file: GoldenFile) -> Iterator[Check]:
    """Losses, norms of all gradients, the stored gradients, and the AdamW steps of the small network."""
    golden = golden_arrays(golden_file("pop3d/tiny_model.npz"))
    official = golden_json(golden_file("pop3d/tiny_training.json"))
    noise = golden_json(golden_file("pop3d/tiny_float32_noise.json"))
    network = _network(golden_file, golden)
    for variant in _TARGETS:
        (_, (terms, features)), gradients = network.loss_and_gradients(network.parameters, *_arguments(golden, variant))
        expected = official[variant]
        found = np.array([float(terms[name]) for name in _TERMS])
        told = np.array([expected["loss"][name] for name in _TERMS.values()])
        yield relative(f"loss_{variant}", found, golden[f"loss_{variant}"], 1e-5)
        yield relative(f"{variant}: losses in the JSON file", found, told, 1e-5)
        norm = np.asarray(float(trainable_norm(gradients, network.groups)))
        yield relative(f"{variant}: global gradient norm", norm, np.asarray(expected["global_grad_norm"]), 1e-4)
        named = network.named(gradients)
        yield _gradient_norms(variant, named, expected["grad_l2"])
        if variant == _STORED:
            expected, tolerance = golden["loss_point_features"], noise["outputs"]["point_features"]["max_abs"]
            yield absolute("loss_point_features", np.asarray(features), expected, max(NOISE_FACTOR * tolerance, 8e-6))
            yield from _stored_gradients(named, golden, noise["spread"]["gradient_relative_l2_by_parameter"])
    yield from _optimizer_steps(network, golden, official, noise["spread"]["adamw_delta_relative_l2"])


def learning_rates(golden_file: GoldenFile) -> Iterator[Check]:
    """The schedule of both parameter groups against timm's, at every stored step."""
    schedule = golden_json(golden_file("pop3d/lr_schedule.json"))
    groups = (("main groups", 1, 1.0), ("backbone", 2, schedule["backbone_lr_multiplier"]))
    for base in schedule["base_lrs"]:
        entry = schedule[f"base_lr_{base}"]
        rows = np.array(entry["rows"])
        for name, column, multiplier in groups:
            rate = cosine_with_warmup(
                base * multiplier,
                total_steps=schedule["t_initial"],
                warmup_steps=schedule["warmup_t"],
                warmup_start=schedule["warmup_lr_init"],
                final=schedule["lr_min"],
            )
            # The row of update i - 1 is what step i runs at; step 0 runs at the rate of construction.
            steps = np.concatenate([[0], rows[:, 0] + 1])
            expected = np.concatenate([[entry["lr_at_construction"][column - 1]], rows[:, column]])
            # rtol 2e-5, and atol 1e-7 of the base rate: near the end of a cosine the angle's rounding remains.
            floor = max(5e-8, 5e-3 * base * multiplier)
            yield relative(f"base_lr_{base}: {name}", np.asarray(jax.vmap(rate)(steps)), expected, 2e-5, floor)


def _network(golden_file: GoldenFile, golden: Mapping[str, np.ndarray]) -> _Network:
    graph, parameters, statistics = split_model(tiny_model(golden_file))
    config = golden_json(golden_file("pop3d/tiny_config.json"))
    backbone = config["model"]["img_backbone"]
    ignore, feature_weight = config["loss"]["ignore_label"], float(config["loss"]["ft_loss_weight"])
    images = jnp.asarray(golden["img"][:1].transpose(0, 1, 3, 4, 2))
    matrices = jnp.asarray(golden["lidar2img"][:1], jnp.float32)
    feature_points = jnp.asarray(golden["feature_points"][:1])
    feature_target = jnp.asarray(golden["loss_feature_target"])

    def loss(parameters, target, class_weights):
        model = merge_model(graph, parameters, statistics)
        output = model(images, matrices, feature_points=feature_points, voxel_features=False)
        terms = pop3d_loss(
            output.occupancy_logits,
            target,
            output.point_features,
            feature_target,
            jnp.ones(feature_target.shape[:2], bool),
            class_weights=class_weights,
            feature_weight=feature_weight,
            ignore_label=ignore,
        )
        return terms["total"], (terms, output.point_features)

    is_frozen = frozen_by(backbone["frozen_stages"], train_batch_norm=backbone["norm_cfg"]["requires_grad"])
    groups = parameter_groups(parameters, is_frozen)
    return _Network(graph, parameters, statistics, groups, jax.jit(jax.value_and_grad(loss, has_aux=True)))


def _arguments(golden: Mapping[str, np.ndarray], variant: str) -> tuple[jax.Array, jax.Array]:
    """Target [batch, x, y, z] and class weights of a loss call; the plain one weighs all classes alike."""
    weights = golden["loss_class_weights"]
    if variant != _STORED:
        weights = np.ones_like(weights)
    return jnp.asarray(golden[_TARGETS[variant]].astype(np.int32)), jnp.asarray(weights)


def _gradient_norms(variant: str, named: Mapping[str, np.ndarray], expected: Mapping[str, float]) -> Check:
    """One check of the norms of all gradients; the note names the worst."""
    # rtol 1e-4 and atol 1e-7.
    checks = {
        key: relative(key, np.asarray(np.linalg.norm(named[key])), np.asarray(norm), 1e-4, 1e-3)
        for key, norm in expected.items()
    }
    worst = max(checks.values(), key=lambda check: check.difference)
    name = f"{variant}: norms of {len(checks)} gradients"
    return dataclasses.replace(worst, name=name, note=f"{worst.note}; largest: {worst.name}")


def _stored_gradients(
    named: Mapping[str, np.ndarray], golden: Mapping[str, np.ndarray], spread: Mapping[str, float]
) -> Iterator[Check]:
    for name, expected in golden.items():
        if name.startswith("grad"):
            key = _parameter(name)
            # Our convolutions sum in another order than any of the official runs behind the spread.
            tolerance = max(20 * spread[key], 2e-5)
            yield relative_norm(name, named[key][: len(expected)], expected, tolerance)


def _optimizer_steps(
    network: _Network, golden: Mapping[str, np.ndarray], training: Mapping[str, Any], spread: Mapping[str, float]
) -> Iterator[Check]:
    official = training["adamw"]
    config = ml_collections.ConfigDict(
        {
            "name": "adamw",
            "learning_rate": official["base_lr"],
            "backbone_multiplier": official["backbone_lr_mult"],
            "weight_decay": official["weight_decay"],
            "betas": tuple(official["betas"]),
            "epsilon": official["eps"],
            "clip_norm": official["clip_max_norm_used_here"],
            "warmup_steps": 0,
            "warmup_start": 0.0,
            "final_learning_rate": 0.0,
        }
    )
    # A cosine that is still at its top after a few steps: the official run held its rate.
    optimizer = make_optimizer(config, 10**9, network.groups)
    parameters = network.parameters
    state = optimizer.init(parameters)
    target = _arguments(golden, _STORED)

    @jax.jit
    def update(gradients, state, parameters):
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    totals, norms = [], []
    for _ in range(official["number_of_steps"]):
        (total, _), gradients = network.loss_and_gradients(parameters, *target)
        totals.append(float(total))
        norms.append(float(trainable_norm(gradients, network.groups)))
        parameters, state = update(gradients, state, parameters)
    history = official["history"][: len(totals)]
    expected = {name: np.array([row[name] for row in history]) for name in ("total", "grad_norm_before_clip")}
    yield relative("adamw: losses before each step", np.array(totals), expected["total"], 1e-4)
    norms_check = "adamw: gradient norms before each step"
    yield relative(norms_check, np.array(norms), expected["grad_norm_before_clip"], 1e-3)

    before, after = network.named(network.parameters), network.named(parameters)
    unmoved = [key for key in training[_STORED]["grad_l2"] if np.array_equal(before[key], after[key])]
    yield Check("adamw: trained parameters that stayed", 0.0, float(len(unmoved)), ", ".join(unmoved[:3]))
    leaves = zip(*map(jax.tree.leaves, (network.groups, network.parameters, parameters)), strict=True)
    moved = sum(label == "frozen" and not np.array_equal(old, new) for label, old, new in leaves)
    yield Check("adamw: frozen parameters that moved", 0.0, float(moved))
    for name, delta in golden.items():
        if name.startswith("adamw_delta"):
            key = _parameter(name)
            # Adam divides by the gradient's size: tiny gradients turn rounding into a full step, so as a whole, and
            # with what other float32 runs of the official code differ by.
            yield relative_norm(name, (after[key] - before[key])[: len(delta)], delta, 5 * spread[name])


def _parameter(name: str) -> str:
    """Official key in the name of an array: "grad[:8]:a.weight" and "grad:a.weight" -> "a.weight"."""
    kind, _, rest = name.partition(":")
    return rest.partition("]:")[2] if "[" in kind else rest
