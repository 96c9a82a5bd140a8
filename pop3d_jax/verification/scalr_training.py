"""Losses, rates and scores of ScaLR's distillation, probing and fine-tuning against its official code."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pop3d_jax.losses import distillation_loss, lovasz_softmax, segmentation_loss
from pop3d_jax.metrics import confusion_matrix, segmentation_scores
from pop3d_jax.optim import layer_scales, waffleiron_layer
from pop3d_jax.schedules import warmup_cosine
from pop3d_jax.verification.checks import Check, absolute, exact, relative
from pop3d_jax.verification.golden_model import GoldenFile, golden_arrays, golden_json

_STORED, _FACTS = "scalr/losses_metrics.npz", "scalr/schedules_protocol.json"
# Sums of hundreds of float32 terms in another order.
_SUMS = 1e-5
# A few roundings of float32, doubled by a square.
_FLOAT32 = 1e-6
# Both sides compute in float64.
_FLOAT64 = 1e-12


def segmentation_losses(golden_file: GoldenFile) -> Iterator[Check]:
    """`SemSegLoss` and its gradients; where every label is ignored, the official NaN is 0 here."""
    stored = golden_arrays(golden_file(_STORED))
    settings = golden_json(golden_file(_FACTS))["losses"]

    def terms(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        return segmentation_loss(logits, labels, **settings)

    gradients = {name: jax.jit(jax.grad(lambda x, y, name=name: terms(x, y)[name])) for name in ("lovasz", "total")}
    for case in sorted({name.partition("/")[0] for name in stored if name.startswith("loss_")}):
        logits, labels = (jnp.asarray(stored[f"{case}/{name}"]) for name in ("logits", "labels"))
        found = jax.jit(terms)(logits, labels)
        empty = bool(np.all(stored[f"{case}/labels"] == settings["ignore_label"]))
        for name, value in found.items():
            official = np.zeros((), np.float32) if empty else stored[f"{case}/{name}"]
            yield relative(f"{case}: {name}", np.asarray(value), official, _SUMS)
        for name, gradient in gradients.items():
            ours = np.asarray(gradient(logits, labels))
            official = stored.get(f"{case}/grad_{name}", np.zeros_like(ours))
            tolerance = _SUMS * max(float(np.abs(official).max()), 1e-3)
            yield absolute(f"{case}: gradient of {name}", ours, official, tolerance)
    # The Jaccard gradient itself: one class, errors that fall in the stored order.
    foreground = stored["lovasz_grad/gt_sorted"]
    errors = np.linspace(0.9, 0.1, len(foreground), dtype=np.float32)
    probabilities = np.where(foreground == 1, 1 - errors, errors)[:, None]
    # Labels of no class here are background.
    labels = jnp.asarray(np.where(foreground == 1, 0, 1))
    slopes = np.asarray(jax.grad(lovasz_softmax)(jnp.asarray(probabilities), labels))[:, 0]
    ours = slopes * np.where(foreground == 1, -1, 1)
    yield absolute("lovasz_grad", ours.astype(np.float32), stored["lovasz_grad/value"], _FLOAT32)


def distances(golden_file: GoldenFile) -> Iterator[Check]:
    """The distillation loss of the stored features of student and teacher: that of the first stored update."""
    stored = golden_arrays(golden_file("scalr/tiny_model.npz"))
    teacher = np.moveaxis(stored["in/teacher_feat"], 1, -1)
    for norm in sorted({name.partition("/")[0] for name in stored if name.endswith("/distill/loss_per_step")}):
        student = np.moveaxis(stored[f"{norm}/train/out_float64"], 1, -1)
        target = np.full((*student.shape[:2], teacher.shape[-1]), np.nan, np.float32)
        mask = np.zeros(student.shape[:2], bool)
        for cloud in range(len(student)):
            points = stored[f"in/pairing_points_{cloud}"]
            _, rows, columns = stored[f"in/pairing_images_{cloud}"].T
            target[cloud, points], mask[cloud, points] = teacher[cloud, rows, columns], True
        loss = jax.jit(distillation_loss)(jnp.asarray(student, jnp.float32), jnp.asarray(target), jnp.asarray(mask))
        official = stored[f"{norm}/distill/loss_per_step_float64"][0]
        yield relative(f"{norm}: loss of the first update", np.asarray(loss), np.asarray(official), 1e-6)


def learning_rates(golden_file: GoldenFile) -> Iterator[Check]:
    """`WarmupCosine` at the stored steps of every training, its first rate exactly 0."""
    stored, facts = golden_arrays(golden_file(_STORED)), golden_json(golden_file(_FACTS))
    for name in sorted(key.split("/")[0].removeprefix("schedule_") for key in stored if key.endswith("/lr")):
        fact = facts[name]
        schedule = warmup_cosine(
            fact["base_lr"], total_steps=fact["max_steps"], warmup_steps=fact["warmup_steps"], final=fact["min_lr"]
        )
        rates = np.asarray(jax.vmap(schedule)(jnp.asarray(stored[f"schedule_{name}/step"])))
        yield relative(f"{name}: learning rates", rates, stored[f"schedule_{name}/lr"], _FLOAT32)
        yield exact(f"{name}: rate of the first update", np.asarray(schedule(0)), np.zeros((), np.float32))


def layer_decay(golden_file: GoldenFile) -> Iterator[Check]:
    """Factor of every parameter's rate in fine-tuning."""
    for name, facts in golden_json(golden_file("scalr/full_state_dict_inventory.json")).items():
        if "finetune_lr_scale" not in facts:
            continue
        official = facts["finetune_lr_scale"]
        depth = sum(key.startswith("waffleiron.spatial_mix.") and key.endswith(".scale.weight") for key in official)
        # A parameter's path has a part for each part of its official name.
        nested: dict = {}
        for key in official:
            *parents, last = key.split(".")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = 0.0
        scales = layer_scales(
            nested, facts["finetune_layer_decay"], lambda path, depth=depth: waffleiron_layer(path, depth), depth + 1
        )
        flat = {
            ".".join(str(step.key) for step in path): scale
            for path, scale in jax.tree_util.tree_flatten_with_path(scales)[0]
        }
        ours = np.array([flat[key] for key in official])
        yield relative(f"{name}: factors of the rates", ours, np.array(list(official.values())), _FLOAT64)


def scores(golden_file: GoldenFile) -> Iterator[Check]:
    """Confusion matrices, counted in parts, and every score read off them."""
    stored = golden_arrays(golden_file(_STORED))
    count = jax.jit(confusion_matrix, static_argnums=2)
    for case in sorted({name.partition("/")[0] for name in stored if name.startswith("metrics_")}):
        official = {name.partition("/")[2]: value for name, value in stored.items() if name.startswith(f"{case}/")}
        classes = len(official["confusion"])
        total = np.zeros((classes, classes), np.int64)
        for part in np.array_split(np.arange(len(official["labels"])), 3):
            labels, predictions = (jnp.asarray(official[name][part]) for name in ("labels", "predictions"))
            total += np.asarray(count(labels, predictions, classes))
        yield exact(f"{case}: confusion", total, official["confusion"])
        found = segmentation_scores(total)
        for name, ours in (("iou", found.per_class), ("class_accuracy", found.per_class_accuracy)):
            undefined = np.isnan(official[name])
            yield exact(f"{case}: {name}, where it is undefined", np.isnan(ours), undefined)
            yield relative(f"{case}: {name}", ours[~undefined], official[name][~undefined], _FLOAT64)
        for name, value in (
            ("miou_percent", 100 * found.mean_iou),
            ("overall_accuracy", found.accuracy),
            ("mean_accuracy_percent", 100 * found.mean_accuracy),
        ):
            yield relative(f"{case}: {name}", np.asarray(value), official[name], _FLOAT64)
