"""Pairs of points and cameras, exactly those of the official projection script."""

import numpy as np
import pytest

from pop3d_jax.data.visibility import visible_pairs


@pytest.mark.golden
def test_golden_pairs_are_exact(golden_file):
    with np.load(golden_file("pop3d/labels.npz")) as arrays:
        data = dict(arrays)
    index, camera, pixel = visible_pairs(
        data["points_xyz"],
        data["camera_intrinsics"],
        data["lidar2cam"],
        tuple(data["image_hw"].tolist()),
        float(data["projection_min_depth"]),
    )
    np.testing.assert_array_equal(index, data["matching_points"])
    np.testing.assert_array_equal(pixel, data["matching_pixels_row_col"])
    counts = np.bincount(camera, minlength=len(data["camera_names"]))
    np.testing.assert_array_equal(counts, data["matching_counts_per_camera"])
    assert np.all(np.diff(camera) >= 0)


def test_borders_are_strict_and_pixels_round_half_to_even():
    intrinsics = np.array([[[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]])
    # At depth 2 a point (2u, 2v, 2) lands on pixel (u, v).
    uv = np.array([[0.0, 3], [0.5, 3], [1.5, 2.5], [9, 3], [8.75, 3], [4, 7], [4, 0.25], [4, 6.5]])
    points = np.concatenate([2 * uv, np.full((len(uv), 1), 2.0)], 1)
    points = np.concatenate([points, [[4.0, 3.0, 1.0], [4.0, 3.0, -2.0]]])
    index, camera, pixel = visible_pairs(points, intrinsics, np.eye(4)[None], (8, 10))
    np.testing.assert_array_equal(index, [1, 2, 4, 6, 7])
    np.testing.assert_array_equal(pixel, [[3, 0], [2, 2], [3, 9], [0, 4], [6, 4]])
    np.testing.assert_array_equal(camera, np.zeros(5))


def test_a_camera_that_sees_nothing_has_no_pairs():
    index, camera, pixel = visible_pairs(np.array([[0.0, 0.0, -5.0]]), np.eye(3)[None], np.eye(4)[None], (8, 10))
    assert (len(index), len(camera), pixel.shape) == (0, 0, (0, 2))
