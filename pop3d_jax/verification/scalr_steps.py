"""Whole updates of ScaLR, by the functions that `pop3d_jax.train` runs, against those of the official loops."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from pop3d_jax.lidar_step import make_distillation_step, make_segmentation_step
from pop3d_jax.losses import segmentation_loss
from pop3d_jax.models.batch_norm import MOMENTUM
from pop3d_jax.models.maskclip_plus import containing_pixel
from pop3d_jax.models.parameters import merge_model, split_model
from pop3d_jax.models.waffleiron import WaffleIron
from pop3d_jax.models.waffleiron_weights import state_dict_to_waffleiron, waffleiron_to_state_dict
from pop3d_jax.optim import make_optimizer, parameter_groups
from pop3d_jax.schedules import make_schedule
from pop3d_jax.step import State, initial_state
from pop3d_jax.teacher import Teacher
from pop3d_jax.verification.checks import Check, absolute, exact, relative
from pop3d_jax.verification.golden_model import GoldenFile, golden_arrays, golden_json
from pop3d_jax.verification.waffleiron import (
    NOISE_FACTOR,
    TinyWaffleIron,
    forward,
    points_last,
    share_of_largest,
    statistics,
)

# Means of tens of float32 numbers that a whole network computed.
_LOSS = 1e-6
_FLOAT32 = 1e-6
# The norm of all gradients; the moments of Adam round once more.
_NORM = 1e-5
# Adam divides by the gradient's size: noise of small gradients counts as much as of large ones. As a share of the sum
# of all rates, which is the furthest that a parameter can go.
_ADAM = 2e-3
# A head that starts from zero is nothing but such updates, and so are its logits.
_ADAM_LOGITS = 2e-4
_PROBING = "linear_probe_steps"


class _StoredFeatures(nnx.Module):
    """A teacher that has learned the golden set's maps by heart, and looks at no picture."""

    def __init__(self, maps: Float[np.ndarray, "picture row column dim"]):
        self.maps = nnx.Param(jnp.asarray(maps))

    def features_at(
        self,
        images: UInt8[Array, "picture height width 3"],
        picture: Int[Array, " points"],
        pixel: Float[Array, "points 2"],
    ) -> Float[Array, "points dim"]:
        """The maps' pixels, one for each pixel of the pictures."""
        row, column = containing_pixel(pixel, images.shape[1:3])
        return self.maps[picture, row, column]


def distillation(golden_file: GoldenFile) -> Iterator[Check]:
    """Losses of every update, gradients of the first, parameters and statistics after the last."""
    tiny = TinyWaffleIron(golden_file)
    settings = tiny.info["distill"]
    optim, schedule = _optimizer_settings(settings)
    maps = np.moveaxis(tiny.arrays["in/teacher_feat"], 1, -1)
    teacher_graph, *arrays = split_model(_StoredFeatures(maps))
    constants = dict(zip(("parameters", "statistics"), arrays, strict=True))
    teacher = Teacher(teacher_graph, constants, maps.shape[-1], None, "golden set")
    batch = tiny.inputs() | _pairs(tiny, maps.shape[1:3])
    for norm in [norm for norm in tiny.norms if f"{norm}/distill/loss_per_step" in tiny.arrays]:
        official = tiny.under(f"{norm}/distill/")
        graph, parameters, start = split_model(tiny.model(norm))
        groups = parameter_groups(parameters, lambda path: False)
        optimizer = make_optimizer(optim, settings["max_steps"], groups)
        step = jax.jit(
            make_distillation_step(
                graph,
                teacher,
                optimizer,
                groups,
                neighbors=tiny.info["config"]["num_neighbors"],
                use_drop_path=False,
                seed=0,
            )
        )
        state, metrics, first = initial_state(parameters, start, optimizer), [], None
        for _ in range(settings["steps"]):
            state, found = step(state, batch, constants)
            metrics.append(jax.device_get(found))
            first = state if first is None else first
        rates = np.array([float(schedule(number)) for number in range(settings["steps"])])
        yield relative(f"{norm}: rates", rates, official["lr_per_step"], _FLOAT32)
        losses = np.array([found["total"] for found in metrics])
        yield relative(f"{norm}: losses", losses, official["loss_per_step_float64"], _LOSS)
        yield relative(
            f"{norm}: norm of the first gradients",
            np.asarray(metrics[0]["gradient_norm"]),
            np.asarray(official["grad_global_norm"]),
            _NORM,
        )
        yield from _gradients(norm, graph, first, settings, official)
        yield from _after_the_last_step(norm, graph, state, settings["steps"], official)


def _pairs(tiny: TinyWaffleIron, image_hw: tuple[int, int]) -> dict[str, jax.Array]:
    """The batch's arrays that pair points with pixels."""
    clouds, points = tiny.arrays["in/occupied_cell"].shape
    pixels, mask = np.zeros((clouds, points, 2), np.float32), np.zeros((clouds, points), bool)
    for cloud in range(clouds):
        paired = tiny.arrays[f"in/pairing_points_{cloud}"]
        pixels[cloud, paired] = (tiny.arrays[f"in/pairing_images_{cloud}"][:, 1:] + 0.5) / image_hw
        mask[cloud, paired] = True
    return {
        "images": jnp.zeros((clouds, 1, *image_hw, 3), jnp.uint8),
        "feature_cameras": jnp.zeros((clouds, points), jnp.int32),
        "feature_pixels": jnp.asarray(pixels),
        "feature_mask": jnp.asarray(mask),
    }


def _gradients(
    norm: str, graph: nnx.GraphDef, first: State, settings: Mapping[str, Any], official: Mapping[str, np.ndarray]
) -> Iterator[Check]:
    """Read off Adam's first moments after one update, which are a share of the gradients."""
    share = 1 - settings["betas"][0]
    moments = next(tree for _, tree in optax.tree.get_all_with_path(first["optimizer"], "mu") if jax.tree.leaves(tree))
    gradients = jax.tree.map(lambda moment: moment / share, moments)
    ours = waffleiron_to_state_dict(merge_model(graph, gradients, first["statistics"]))
    stored = {key.removeprefix("grad/"): value for key, value in official.items() if key.startswith("grad/")}
    precise = {key: official[f"grad_float64/{key}"] for key in stored}
    noise = max(np.abs(stored[key] - precise[key]).max() / np.abs(precise[key]).max() for key in stored)
    for key, value in precise.items():
        yield share_of_largest(f"{norm}: first gradient of {key}", ours[key], value, NOISE_FACTOR * float(noise))


def _after_the_last_step(
    norm: str, graph: nnx.GraphDef, state: State, steps: int, official: Mapping[str, np.ndarray]
) -> Iterator[Check]:
    rates = official["lr_per_step"]
    ours = waffleiron_to_state_dict(merge_model(graph, state["parameters"], state["statistics"]))
    parameters, stored = (
        {key.removeprefix(prefix): value for key, value in official.items() if key.startswith(prefix)}
        for prefix in (f"param_after_{steps}_steps/", f"stats_after_{steps}_steps/")
    )
    for key, value in parameters.items():
        yield absolute(f"{norm}: after {steps} updates, {key}", ours[key], value, _ADAM * float(rates.sum()))
    # The shift before this BatchNorm has no gradient but noise, of which Adam makes whole updates of any sign: by so
    # much may the mean that it takes away differ.
    row = np.abs(ours["embed.conv2.1.weight"]).sum(axis=1).max()
    noise = {"embed.conv2.2.running_mean": float(MOMENTUM * 2 * np.cumsum(rates).sum() * row)}
    yield from statistics(f"{norm}: after {steps} updates", ours, stored, noise)


def probing(golden_file: GoldenFile) -> Iterator[Check]:
    """Losses of every update of a linear probe, its head after the last, and what it then says in inference."""
    tiny = TinyWaffleIron(golden_file)
    settings = golden_json(golden_file("scalr/schedules_protocol.json"))[_PROBING]
    official = golden_arrays(golden_file("scalr/losses_metrics.npz"), f"{_PROBING}/")
    optim, _ = _optimizer_settings(settings)
    mask = np.asarray(tiny.inputs()["point_mask"])
    labels = np.full(mask.shape, settings["ignore_label"], np.uint8)
    labels[mask] = official["labels"]  # clouds in a row, without their padding
    batch = tiny.inputs() | {"point_labels": jnp.asarray(labels)}

    config = tiny.config(settings["norm"], head="probe", output_channels=settings["num_classes"])
    model = WaffleIron(config, rngs=nnx.Rngs(0))
    graph, parameters, start = split_model(tiny.filled(model, with_head=False))
    groups = parameter_groups(parameters, lambda path: path[0] != "head")
    optimizer = make_optimizer(optim, settings["max_steps"], groups)
    step = jax.jit(
        make_segmentation_step(
            graph,
            optimizer,
            groups,
            neighbors=tiny.info["config"]["num_neighbors"],
            lovasz_weight=settings["lovasz_weight"],
            train_backbone=False,
            use_drop_path=False,
            seed=0,
        )
    )
    state, losses = initial_state(parameters, start, optimizer), []
    for _ in range(settings["steps"]):
        state, metrics = step(state, batch, {})
        losses.append(float(metrics["total"]))
    yield relative("probing: losses", np.array(losses), official["loss"], _LOSS)

    after = f"after_{settings['steps']}_steps"
    before = waffleiron_to_state_dict(merge_model(graph, parameters, start))
    trained = merge_model(graph, state["parameters"], state["statistics"])
    ours = waffleiron_to_state_dict(trained)
    prefix = f"head_{after}/"
    stored = {f"classif.{key.removeprefix(prefix)}": value for key, value in official.items() if key.startswith(prefix)}
    head = [key for key in ours if key.startswith("classif.")]
    learned = {key for key in stored if key.endswith((".weight", ".bias"))}
    yield exact("probing: names of the head", np.array(sorted(head)), np.array(sorted(stored)))
    furthest = settings["base_lr"] * settings["steps"]
    for key in sorted(learned):
        yield absolute(f"probing: {key} {after}", ours[key], stored[key], _ADAM * furthest)
    yield from statistics(f"probing: {after}", ours, {key: stored[key] for key in stored.keys() - learned}, {})
    moved = [key for key in ours.keys() - stored.keys() if not np.array_equal(before[key], ours[key])]
    yield Check("probing: arrays of the backbone that moved", 0.0, float(len(moved)), ", ".join(moved[:3]))

    logits = forward(trained, tiny.inputs())
    name = f"eval_logits_{after}"
    yield share_of_largest("probing: logits in inference", points_last(logits), official[name], _ADAM_LOGITS)
    loss = segmentation_loss(logits, batch["point_labels"], lovasz_weight=settings["lovasz_weight"])["total"]
    yield relative("probing: loss in inference", np.asarray([loss]), official[f"eval_loss_{after}"], _LOSS)
    state_dict_to_waffleiron(ours | {key: stored[key] for key in head if key in stored}, trained)
    tolerance = NOISE_FACTOR * tiny.noise(settings["norm"], "eval")
    ours = points_last(forward(trained, tiny.inputs()))
    yield share_of_largest("probing: logits of the official head", ours, official[name], tolerance)


def _optimizer_settings(settings: Mapping[str, Any]) -> tuple[ml_collections.ConfigDict, Any]:
    """The `optim` part of an experiment that a golden set's training describes, and its schedule."""
    optim = ml_collections.ConfigDict(
        {
            "name": "adamw",
            "schedule": "warmup_cosine",
            "learning_rate": settings["base_lr"],
            "backbone_multiplier": 1.0,
            "weight_decay": settings["weight_decay"],
            "betas": tuple(settings["betas"]),
            "epsilon": settings["eps"],
            "clip_norm": 0.0,
            "warmup_steps": settings["warmup_steps"],
            "final_learning_rate": settings["min_lr"],
        }
    )
    return optim, make_schedule(optim, optim.learning_rate, settings["max_steps"])
