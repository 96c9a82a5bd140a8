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
    segmentation_scores,
)
from pop3d_jax.nuscenes import IGNORE

counted = jax.jit(confusion_matrix, static_argnums=(2, 3))


@pytest.fixture(scope="module")
def stored(golden_file):
    with np.load(golden_file("pop3d/metrics.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def facts(golden_file):
    return json.loads(golden_file("pop3d/metrics.json").read_text())


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


def test_an_ignored_label_has_no_row():
    confusion = np.array([[0, 4, 0], [0, 2, 0], [0, 0, 3]])
    assert mean_iou(confusion, [1, 2]).per_class == (100 * 2 / 6, 100.0)
    assert mean_iou(confusion, [1, 2], ignore_label=0).per_class == (100.0, 100.0)
    assert mean_iou(confusion, [1, 2], ignore_label=IGNORE) == mean_iou(confusion, [1, 2])


def test_a_class_without_prompt_has_no_logit():
    logits = class_logits(jnp.array([[1.0, 3.0, 2.0]]), jnp.array([2, 0, 2]), 4)
    np.testing.assert_array_equal(logits, [[3.0, -np.inf, 2.0, -np.inf]])


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


def test_segmentation_scores_by_hand():
    # Class 2 is only predicted, class 3 neither occurs nor is predicted.
    scores = segmentation_scores(np.array([[3, 1, 0, 0], [2, 2, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_allclose(scores.per_class, [3 / 6, 2 / 7, 0.0, np.nan])
    np.testing.assert_allclose(scores.mean_iou, np.mean([3 / 6, 2 / 7, 0.0]))
    np.testing.assert_allclose(scores.per_class_accuracy, [3 / 4, 2 / 6, np.nan, np.nan])
    np.testing.assert_allclose(scores.mean_accuracy, np.mean([3 / 4, 2 / 6]))
    np.testing.assert_allclose(scores.accuracy, 5 / 10)


def test_segmentation_scores_of_nothing_are_undefined():
    scores = segmentation_scores(jnp.zeros((3, 3), jnp.int32))
    assert np.isnan([scores.mean_iou, scores.mean_accuracy, scores.accuracy, *scores.per_class]).all()
