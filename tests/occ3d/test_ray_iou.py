"""RayIoU's counts and scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.occ3d.ray_iou import count_cast_rays, count_rays, ray_iou
from pop3d_jax.voxels import Volume

SIZE = (8, 8, 4)
VOLUME = Volume((0.0, 0.0, 0.0), (8.0, 8.0, 4.0), SIZE)
CAR, ROAD, TREE = 4, 11, 16


def drawn_frame(seed, density=0.2):
    rng = np.random.default_rng(seed)
    grids = np.where(rng.random((2, *SIZE)) < density, rng.integers(0, FREE, (2, *SIZE)), FREE).astype(np.uint8)
    return *grids, rng.uniform(0, SIZE, (2, 3)), VOLUME, rng.normal(size=(40, 3)).astype(np.float32)


def test_counts_by_hand():
    true_labels = np.array([CAR, CAR, CAR, ROAD, FREE, 255], np.uint8)
    labels = np.array([CAR, CAR, TREE, FREE, TREE, ROAD], np.uint8)
    true_distances = np.array([5, 5, 5, 5, 5, 5], np.float32)
    distances = np.array([5.5, 6.0, 5.0, 5.0, 5.0, 5.0], np.float32)
    counts = count_cast_rays(true_labels, true_distances, labels, distances)
    assert (counts.ground_truth[CAR], counts.ground_truth[ROAD], counts.ground_truth.sum()) == (3, 1, 4)
    # The ray that is free in the ground truth is in no count; the one without a label is in the prediction's.
    assert (counts.predicted[CAR], counts.predicted[TREE], counts.predicted[FREE], counts.predicted[ROAD]) == (
        2,
        1,
        1,
        1,
    )
    # Exactly one metre apart is not less than one.
    assert counts.true_positive[:, CAR].tolist() == [1, 2, 2]
    assert counts.true_positive.sum() == 5
    scores = ray_iou(counts)
    np.testing.assert_allclose(scores.per_class[:, CAR], [1 / 4, 2 / 3, 2 / 3])
    assert scores.per_class[:, [ROAD, TREE]].tolist() == [[0, 0]] * 3
    assert np.isnan(scores.per_class).sum() == 3 * 14
    np.testing.assert_allclose(scores.per_threshold, [1 / 12, 2 / 9, 2 / 9])
    assert scores.ray_iou == pytest.approx(19 / 108)


@given(st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_a_prediction_equal_to_the_ground_truth_is_perfect(seed):
    truth, _, *where = drawn_frame(seed)
    counts = count_rays(truth, truth, *where)
    per_class = ray_iou(counts).per_class
    hit = counts.ground_truth[:FREE] > 0
    assert hit.any()
    assert (per_class[:, hit] == 1).all()
    assert np.isnan(per_class[:, ~hit]).all()
    assert ray_iou(counts).ray_iou == 1


@given(st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_frames_add_up_in_any_order(seed):
    counts = [count_rays(*drawn_frame(seed + number)) for number in range(3)]
    forward, backward = ray_iou(counts[0] + counts[1] + counts[2]), ray_iou(counts[2] + counts[1] + counts[0])
    np.testing.assert_array_equal(forward.per_class, backward.per_class)
    assert (counts[0] + counts[1]).predicted.sum() == counts[0].predicted.sum() + counts[1].predicted.sum()


def test_rays_that_are_free_in_the_ground_truth_cost_nothing():
    truth = np.full(SIZE, FREE, np.uint8)
    truth[6:, :, :] = CAR
    predicted = truth.copy()
    predicted[:2] = TREE
    origin = np.array([[4.5, 4.5, 1.5]])
    directions = np.array([[1, 0, 0], [1, 0.1, 0], [-1, 0, 0], [-1, 0.1, 0]], np.float32)
    assert ray_iou(count_rays(truth, predicted, origin, VOLUME, directions)).ray_iou == 1
    # The same rays in the other direction hit nothing that is there.
    assert np.isnan(ray_iou(count_rays(truth, predicted, origin, VOLUME, -np.abs(directions))).ray_iou)
    # A hole in the prediction is a miss.
    predicted[6:] = FREE
    assert ray_iou(count_rays(truth, predicted, origin, VOLUME, directions)).ray_iou == 0


def test_bad_input_is_named():
    truth, predicted, *where = drawn_frame(0)
    with pytest.raises(ValueError, match=r"ground truth of shape \(8, 8, 4\), prediction \(8, 8, 2\)"):
        count_rays(truth, predicted[..., :2], *where)
    predicted[0, 0, 0] = 18
    with pytest.raises(ValueError, match="1 predicted voxels have a label outside 0 to 17: 18"):
        count_rays(truth, predicted, *where)
    counts = count_rays(truth, truth, *where)
    with pytest.raises(ValueError, match=r"thresholds \(1.0, 2.0, 4.0\) and \(3.0,\) do not add up"):
        counts + count_rays(truth, truth, *where, thresholds=(3.0,))
