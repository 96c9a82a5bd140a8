"""Scores of the official evaluations: mean IoU, assignment of prompts to classes, retrieval, the devkit."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pop3d_jax.lidarseg import devkit_scores
from pop3d_jax.metrics import (
    assign_classes,
    average_precision,
    class_logits,
    confusion_matrix,
    mean_iou,
    occupancy_iou,
    prompt_logits,
)
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES, LIDARSEG_TO_CLASS
from pop3d_jax.protocol import zero_shot_protocol
from pop3d_jax.verification.checks import Check, exact, exact_where_clear, relative
from pop3d_jax.verification.golden_model import GoldenFile, golden_arrays, golden_json

# Labels are bytes.
_NUM_LABELS = 256
# The official quotients are float32.
_FLOAT32 = 2e-7
# Both sides compute in float64.
_FLOAT64 = 1e-12
_METRICS = ("pop3d/metrics.npz", "pop3d/metrics.json")


def mean_ious(golden_file: GoldenFile) -> Iterator[Check]:
    """`MeanIoU` in each configuration of the official script: counts, IoU of every class, the mean."""
    stored, facts = _stored(golden_file)
    count = jax.jit(confusion_matrix, static_argnums=(2, 3))
    for name, fact in facts.items():
        if "per_class_iou_percent" not in fact:
            continue
        ignore, classes = fact["arguments"]["ignore_label"], fact["arguments"]["class_indices"]
        total = np.zeros((_NUM_LABELS, _NUM_LABELS), np.int64)
        for key in stored:
            if key.startswith(f"{name}:targets"):
                target, output = jnp.asarray(stored[key]), jnp.asarray(stored[key.replace("targets", "outputs")])
                total += np.asarray(count(target, output, _NUM_LABELS, ignore))
        for key, counts in (
            ("total_seen", total.sum(1)),
            ("total_correct", np.diag(total)),
            ("total_positive", total.sum(0)),
        ):
            yield exact(f"{name}: {key}", counts[classes], np.asarray(fact[key]))
        result = mean_iou(total, classes)
        official = np.asarray(fact["per_class_iou_percent"])
        yield relative(f"{name}: per_class_iou_percent", np.asarray(result.per_class), official, _FLOAT32)
        mean = np.asarray(fact["miou_percent"])
        yield relative(f"{name}: miou_percent", np.asarray(result.official_mean), mean, _FLOAT32)
        if "confusion_matrix_gt_by_pred" in fact:
            confusion = total[np.ix_(classes, classes)]
            matrix = np.asarray(fact["confusion_matrix_gt_by_pred"])
            yield exact(f"{name}: confusion_matrix_gt_by_pred", confusion, matrix)
            iou = np.asarray(100 * occupancy_iou(confusion))
            yield relative(f"{name}: IoU of occupied voxels", iou, np.asarray(official[1]), _FLOAT32)


def assignment(golden_file: GoldenFile) -> Iterator[Check]:
    """Classes of features by their best prompt: prompts grouped by class, permuted, and without classes."""
    stored, facts = _stored(golden_file)
    features, text = jnp.asarray(stored["assign:features"]), stored["assign:text_features"]
    dropped = facts["assign"]["dropped_class"]
    for cosine in (0, 1):
        for grouping, order in (("grouped", slice(None)), ("permuted", stored["assign:permutation"])):
            name = f"assign:{grouping}:cosine{cosine}"
            mapping = stored["assign:class_mapping"][order]
            found = assign_classes(features, jnp.asarray(text[order]), jnp.asarray(mapping), bool(cosine), dropped)
            kept = mapping != dropped
            clear = _clear(prompt_logits(features, jnp.asarray(text[order][kept]), bool(cosine)))
            yield exact_where_clear(f"{name}:labels", np.asarray(found), stored[f"{name}:labels"], clear)
            # The official maxima of prompts in another order mix up classes; the flaw is repeated on demand.
            logits = prompt_logits(features, jnp.asarray(text[order][kept]), bool(cosine))
            maxima = class_logits(logits, jnp.asarray(mapping[kept]), int(mapping.max()) + 1, official=True)
            ours = np.moveaxis(np.asarray(maxima), -1, 1)[:, np.unique(mapping[kept])]
            yield relative(f"{name}:max_logits", ours, stored[f"{name}:max_logits"], 1e-5, 1.0)
        name = f"assign:nomapping:cosine{cosine}"
        found = assign_classes(features, jnp.asarray(text), None, bool(cosine))
        clear = _clear(prompt_logits(features, jnp.asarray(text), bool(cosine)))
        yield exact_where_clear(f"{name}:labels", np.asarray(found), stored[f"{name}:labels"], clear)
        logits = np.moveaxis(np.asarray(prompt_logits(features, jnp.asarray(text), bool(cosine))), -1, 1)
        yield relative(f"{name}:logits", logits, stored[f"{name}:logits"], 1e-5, 1.0)


def retrieval(golden_file: GoldenFile) -> Iterator[Check]:
    """Scores and average precision of the stored queries, over all, visible, and distinct visible points."""
    stored, facts = _stored(golden_file)
    for number, query in enumerate(facts["retrieval"]["queries"]):
        targets, visible = (stored[f"retrieval{number}:{name}"] for name in ("targets", "matching_points"))
        unique = np.unique(visible)
        for cosine in (0, 1):
            scores = stored[f"retrieval{number}:scores_cosine{cosine}"]
            prefix, expected = f"retrieval{number}:cosine{cosine}", query[f"cosine{cosine}"]
            found = {
                "mAP": _precision(scores, targets),
                "mAP_visible": _precision(scores[visible], targets[visible]),
                "mAP_visible_unique": _precision(scores[unique], targets[unique]),
            }
            for name, value in found.items():
                yield relative(f"{prefix}: {name}", np.asarray(value), np.asarray(expected[name]), _FLOAT64)
            if query["score_rounding"] is None:
                features, text = (jnp.asarray(stored[f"retrieval{number}:{name}"]) for name in ("features", "text"))
                logits = np.asarray(prompt_logits(features, text, bool(cosine))).reshape(-1)
                yield relative(f"{prefix}: scores", logits, scores, 1e-5, 1.0)
    templates = np.asarray(facts["retrieval"]["templates"])
    yield exact("templates of the prompts", np.asarray(zero_shot_protocol().templates), templates)


def devkit(golden_file: GoldenFile) -> Iterator[Check]:
    """Lidarseg scores of the nuScenes devkit and its map from categories to classes."""
    facts = golden_json(golden_file("nuscenes/devkit_eval.json"))
    stored = golden_arrays(golden_file("nuscenes/devkit_eval_arrays.npz"))
    for name, case in facts["cases"].items():
        scores = devkit_scores(np.asarray(case["confusion_matrix"]))
        per_class = np.array([np.nan if value is None else value for value in case["iou_per_class"].values()])
        undefined = np.isnan(per_class)
        yield exact(f"{name}: classes without IoU", np.isnan(scores.per_class), undefined)
        yield relative(f"{name}: iou_per_class", scores.per_class[~undefined], per_class[~undefined], _FLOAT64)
        means = np.array([scores.mean_iou, scores.frequency_weighted_iou])
        official = np.array([case["miou"], case["freq_weighted_iou"]])
        yield relative(f"{name}: miou, freq_weighted_iou", means, official, _FLOAT64)
    fine = facts["fine_idx_to_coarse_idx"]
    classes = np.array([fine[str(index)] for index in range(len(fine))])
    yield exact("fine_idx_to_coarse_idx", LIDARSEG_TO_CLASS, classes)
    names = np.array([facts["fine_names"][str(index)] for index in range(len(fine))])
    yield exact("fine_names", np.asarray(LIDARSEG_CATEGORIES), names)
    for name in (name for name in stored if name.startswith("raw_")):
        target = name.replace("raw_", "gt_")
        yield exact(target, LIDARSEG_TO_CLASS[stored[name]], stored[target])


def _clear(logits: jax.Array) -> np.ndarray:
    """Where the best prompt leads by more than rounding."""
    ordered = np.sort(np.asarray(logits), axis=-1)
    return ordered[..., -1] - ordered[..., -2] > 1e-5 * np.maximum(1.0, np.abs(ordered[..., -1]))


def _precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Average precision; 0 where nothing matches, as the official library has it and ours refuses to say."""
    return average_precision(scores, targets) if targets.any() else 0.0


def _stored(golden_file: GoldenFile) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, facts = map(golden_file, _METRICS)
    return golden_arrays(arrays), golden_json(facts)
