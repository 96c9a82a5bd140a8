"""Counting pairs of labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.occ3d.counts import UNLABELLED_ROW, confusion_of, intersection_over_union, mean_of_defined
from pop3d_jax.occ3d.grid import FREE


def drawn_frame(seed, shape=(3, 4, 5)):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, FREE + 1, (2, *shape)).astype(np.uint8)
    truth[rng.random(shape) < 0.1] = 255
    return truth, predicted, rng.random(shape) < 0.6


def test_pairs_are_counted_where_the_mask_is_set():
    truth = np.array([4, 4, 255, 18, FREE, 3], np.uint8)
    predicted = np.array([4, FREE, 4, 5, FREE, 0], np.uint8)
    mask = np.array([True, True, True, True, True, False])
    expected = np.zeros((19, 18), np.int64)
    expected[4, 4] = expected[4, FREE] = expected[FREE, FREE] = 1
    expected[UNLABELLED_ROW, [4, 5]] = 1
    np.testing.assert_array_equal(confusion_of(truth, predicted, mask), expected)


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_frames_add_up_in_any_order(seed):
    frames = [drawn_frame(seed + number) for number in range(3)]
    together = confusion_of(*(np.stack(arrays) for arrays in zip(*frames, strict=True)))
    np.testing.assert_array_equal(sum(confusion_of(*frame) for frame in frames[::-1]), together)
    assert together.sum() == sum(mask.sum() for _, _, mask in frames)


@pytest.mark.parametrize("masked", [True, False])
def test_a_prediction_that_no_rule_has_a_place_for_is_named(masked):
    truth, predicted, mask = drawn_frame(0)
    predicted[0, 0, :2] = 18, 255
    mask[0, 0] = masked
    with pytest.raises(ValueError, match=r"2 predicted voxels have a label outside 0 to 17: 18, 255"):
        confusion_of(truth, predicted, mask)


def test_shapes_that_differ_are_named():
    truth, predicted, mask = drawn_frame(0)
    with pytest.raises(
        ValueError, match=r"ground truth of shape \(3, 4, 5\), prediction \(2, 4, 5\), mask \(3, 4, 5\)"
    ):
        confusion_of(truth, predicted[1:], mask)
    with pytest.raises(ValueError, match=r"mask \(3, 4\)"):
        confusion_of(truth, predicted, mask[..., 0])


def test_iou_of_nothing_is_undefined_unless_the_union_is_enlarged():
    both, truth, predicted = np.array([[2, 0, 0], [4, 4, 0], [3, 0, 0]])
    np.testing.assert_array_equal(intersection_over_union(both, truth, predicted), [0.4, 0.0, np.nan])
    enlarged = intersection_over_union(both, truth, predicted, 1.0)
    np.testing.assert_allclose(enlarged, [2 / 6, 0.0, 0.0], rtol=1e-15)
    assert mean_of_defined(np.array([0.5, np.nan, 0.0])) == 0.25
    assert np.isnan(mean_of_defined(np.array([np.nan])))
