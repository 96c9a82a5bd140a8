"""Metrics against the official evaluation's stored numbers and scikit-learn."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from pop3d_jax.metrics import (
    assign_classes,
    average_precision,
    best_constant_grid,
    class_logits,
    confusion_matrix,
    mean_iou,
    occupancy_iou,
    prompt_logits,
)
from pop3d_jax.nuscenes import EMPTY, IGNORE

NUM_LABELS = EMPTY + 1
counted = jax.jit(confusion_matrix, static_argnums=(2, 3))


@pytest.fixture(scope="module")
def stored(golden_file):
    with np.load(golden_file("pop3d/metrics.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def facts(golden_file):
    return json.loads(golden_file("pop3d/metrics.json").read_text())


@pytest.mark.golden
def test_every_official_configuration(stored, facts):
    configurations = [
        name for name, fact in facts.items() if isinstance(fact, dict) and "per_class_iou_percent" in fact
    ]
    assert configurations
    for name in configurations:
        fact = facts[name]
        ignore, classes = fact["arguments"]["ignore_label"], fact["arguments"]["class_indices"]
        total = np.zeros((NUM_LABELS, NUM_LABELS), np.int64)
        batches = sum(key.startswith(f"{name}:targets") for key in stored)
        for batch in range(batches):
            target, output = (stored[f"{name}:{kind}{batch}"] for kind in ("targets", "outputs"))
            total += np.asarray(counted(jnp.asarray(target), jnp.asarray(output), NUM_LABELS, ignore))
        np.testing.assert_array_equal(total.sum(1)[classes], fact["total_seen"], err_msg=name)
        np.testing.assert_array_equal(np.diag(total)[classes], fact["total_correct"], err_msg=name)
        np.testing.assert_array_equal(total.sum(0)[classes], fact["total_positive"], err_msg=name)
        result = mean_iou(total, classes)
        # The official quotients are float32.
        np.testing.assert_allclose(result.per_class, fact["per_class_iou_percent"], rtol=2e-7, err_msg=name)
        np.testing.assert_allclose(result.official_mean, fact["miou_percent"], rtol=2e-7, err_msg=name)
        seen = np.array(fact["total_seen"]) > 0
        assert result.present == tuple(seen.tolist())
        np.testing.assert_allclose(result.present_mean, np.array(fact["per_class_iou_percent"])[seen].mean(), rtol=2e-7)
        if "confusion_matrix_gt_by_pred" in fact:
            official = np.array(fact["confusion_matrix_gt_by_pred"])
            np.testing.assert_array_equal(total[np.ix_(classes, classes)], official, err_msg=name)
            iou = occupancy_iou(total[np.ix_(classes, classes)])
            np.testing.assert_allclose(100 * iou, fact["per_class_iou_percent"][1], rtol=2e-7)


@given(st.integers(0, 2**31), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_confusion_matrix_counts_pairs(seed, num_classes):
    rng = np.random.default_rng(seed)
    target, prediction = rng.integers(0, num_classes, (2, 7, 50)).astype(np.uint8)
    target[rng.random(target.shape) < 0.2] = IGNORE
    mask = rng.random(target.shape) < 0.7
    kept = mask & (target != IGNORE)
    matrix = counted(jnp.asarray(target), jnp.asarray(prediction), num_classes, IGNORE, jnp.asarray(mask))
    expected = np.zeros((num_classes, num_classes), int)
    np.add.at(expected, (target[kept], prediction[kept]), 1)
    np.testing.assert_array_equal(matrix, expected)
    assert matrix.dtype == jnp.int32


def test_labels_outside_the_matrix_fall_into_no_other_cell():
    matrix = confusion_matrix(jnp.array([0, 0, 1, 5]), jnp.array([0, 3, 1, 0]), 2)
    np.testing.assert_array_equal(matrix, [[1, 0], [0, 1]])


def test_mean_iou_refuses_classes_beyond_the_matrix():
    with pytest.raises(ValueError, match="do not fit"):
        mean_iou(np.zeros((2, 2), int), [0, 2])


def test_occupancy_iou():
    assert occupancy_iou(np.array([[5, 2], [1, 3]])) == 0.5
    assert np.isnan(occupancy_iou(np.array([[5, 0], [0, 0]])))


@pytest.mark.golden
@pytest.mark.parametrize("cosine", [0, 1])
@pytest.mark.parametrize("grouping", ["grouped", "permuted"])
def test_assignment_of_prompts_to_classes(stored, facts, grouping, cosine):
    order = stored["assign:permutation"] if grouping == "permuted" else slice(None)
    mapping = jnp.asarray(stored["assign:class_mapping"][order])
    features, text = (
        jnp.asarray(stored["assign:features"]),
        jnp.asarray(stored["assign:text_features"][order]),
    )
    dropped = facts["assign"]["dropped_class"]
    labels = assign_classes(features, text, mapping, bool(cosine), dropped)
    np.testing.assert_array_equal(labels, stored[f"assign:{grouping}:cosine{cosine}:labels"])
    # The official maxima hold only for grouped prompts; ours are the same in any order of the prompts.
    logits = class_logits(prompt_logits(features, text, bool(cosine)), mapping, int(mapping.max()) + 1)
    kept = [index for index in np.unique(stored["assign:class_mapping"]).tolist() if index != dropped]
    expected = stored[f"assign:grouped:cosine{cosine}:max_logits"]
    np.testing.assert_allclose(np.moveaxis(np.asarray(logits), -1, 1)[:, kept], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("cosine", [0, 1])
@pytest.mark.parametrize("grouping", ["grouped", "permuted"])
def test_the_official_flaw_of_ungrouped_prompts_is_repeated_on_demand(stored, facts, grouping, cosine):
    order = stored["assign:permutation"] if grouping == "permuted" else slice(None)
    mapping = stored["assign:class_mapping"][order]
    kept = mapping != facts["assign"]["dropped_class"]
    text = jnp.asarray(stored["assign:text_features"][order][kept])
    logits = prompt_logits(jnp.asarray(stored["assign:features"]), text, bool(cosine))
    count = int(mapping.max()) + 1
    found = class_logits(logits, jnp.asarray(mapping[kept]), count, official=True)
    classes = np.unique(mapping[kept])
    expected = stored[f"assign:{grouping}:cosine{cosine}:max_logits"]
    np.testing.assert_allclose(np.moveaxis(np.asarray(found), -1, 1)[:, classes], expected, rtol=1e-5, atol=1e-5)


def test_an_ignored_label_has_no_row():
    confusion = np.array([[0, 4, 0], [0, 2, 0], [0, 0, 3]])
    assert mean_iou(confusion, [1, 2]).per_class == (100 * 2 / 6, 100.0)
    assert mean_iou(confusion, [1, 2], ignore_label=0).per_class == (100.0, 100.0)
    assert mean_iou(confusion, [1, 2], ignore_label=IGNORE) == mean_iou(confusion, [1, 2])


@pytest.mark.golden
@pytest.mark.parametrize("cosine", [0, 1])
def test_assignment_without_classes(stored, facts, cosine):
    features, text = jnp.asarray(stored["assign:features"]), jnp.asarray(stored["assign:text_features"])
    assert facts["assign"]["class_offset_without_mapping"] == 1
    labels = assign_classes(features, text, None, bool(cosine))
    np.testing.assert_array_equal(labels, stored[f"assign:nomapping:cosine{cosine}:labels"])
    logits = np.moveaxis(np.asarray(prompt_logits(features, text, bool(cosine))), -1, 1)
    np.testing.assert_allclose(logits, stored[f"assign:nomapping:cosine{cosine}:logits"], rtol=1e-5, atol=1e-5)


def test_a_class_without_prompt_has_no_logit():
    logits = class_logits(jnp.array([[1.0, 3.0, 2.0]]), jnp.array([2, 0, 2]), 4)
    np.testing.assert_array_equal(logits, [[3.0, -np.inf, 2.0, -np.inf]])


@pytest.mark.golden
@pytest.mark.parametrize("cosine", [0, 1])
def test_retrieval_average_precision(stored, facts, cosine):
    queries = facts["retrieval"]["queries"]
    assert queries
    for number, query in enumerate(queries):
        scores, targets, visible = (
            stored[f"retrieval{number}:{name}"] for name in (f"scores_cosine{cosine}", "targets", "matching_points")
        )
        expected = query[f"cosine{cosine}"]
        unique = np.unique(visible)
        found = {
            "mAP": average_precision(scores, targets),
            "mAP_visible": average_precision(scores[visible], targets[visible]),
            "mAP_visible_unique": average_precision(scores[unique], targets[unique]),
        }
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-12, err_msg=f"{name} of query {number}")
        if query["score_rounding"] is None:
            features, text = (jnp.asarray(stored[f"retrieval{number}:{name}"]) for name in ("features", "text"))
            logits = np.asarray(prompt_logits(features, text, bool(cosine))).reshape(-1)
            np.testing.assert_allclose(logits, scores, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_average_precision_equals_scikit_learn(seed, count, decimals):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=count), decimals)
    targets = rng.random(count) < rng.random()
    targets[rng.integers(count)] = True
    np.testing.assert_allclose(average_precision(scores, targets), average_precision_score(targets, scores), rtol=1e-12)


def test_average_precision_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="no point matches"):
        average_precision(np.ones(3), np.zeros(3, bool))
    with pytest.raises(ValueError, match="NaN"):
        average_precision(np.array([1.0, np.nan]), np.ones(2, bool))


@given(st.integers(0, 2**31), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_best_constant_grid_beats_every_threshold(seed, frames):
    rng = np.random.default_rng(seed)
    mean = rng.integers(0, 5, (4, 3, 2)) / 4
    target = rng.choice([0, 1, IGNORE], (frames, 4, 3, 2), p=[0.6, 0.3, 0.1])
    target[0, 0, 0, 0] = 1
    occupied, observed = (target == 1).sum(0), (target != IGNORE).sum(0)
    best = best_constant_grid(mean, occupied, observed)

    def iou(grid):
        predicted, valid = np.broadcast_to(grid, target.shape), target != IGNORE
        return np.sum(predicted & (target == 1)) / np.sum(valid & (predicted | (target == 1)))

    np.testing.assert_allclose(best.iou, iou(best.occupied), rtol=1e-12)
    np.testing.assert_array_equal(best.occupied, mean >= best.threshold)
    every = [iou(mean >= threshold) for threshold in np.unique(mean)]
    np.testing.assert_allclose(best.iou, max(every), rtol=1e-12)


def test_best_constant_grid_refuses_empty_judging():
    mean, zeros = np.zeros((2, 2, 2)), np.zeros((2, 2, 2), int)
    with pytest.raises(ValueError, match="no voxel is occupied"):
        best_constant_grid(mean, zeros, zeros)
    with pytest.raises(ValueError, match="NaN"):
        best_constant_grid(mean * np.nan, zeros + 1, zeros + 1)
