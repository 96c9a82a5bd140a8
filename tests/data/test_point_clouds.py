"""Thinning, cropping, features, cells, pixels: against the official formulations written out, point by point."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.data import point_clouds
from pop3d_jax.lidar_datasets import NUSCENES

FIELD = ((-8.0, -6.0, -2.0), (8.0, 6.0, 2.0))


@st.composite
def clouds(draw, scale=10.0):
    count = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.uniform(-scale, scale, (count, 3)).astype(np.float32)


def voxels_of(xyz, size):
    return np.floor((xyz - xyz.min(0)) / np.float32(size)).astype(int)


@settings(max_examples=60, deadline=None)
@given(clouds(), st.sampled_from([0.1, 2.0, 7.0]))
def test_thinning_takes_the_first_point_of_each_voxel_in_their_order(xyz, size):
    voxels = voxels_of(xyz, size)
    _, expected = np.unique(voxels, axis=0, return_index=True)
    np.testing.assert_array_equal(point_clouds.thin(xyz, size), expected)


@settings(max_examples=60, deadline=None)
@given(clouds(), st.integers(0, 1000))
def test_a_drawn_representative_stands_for_its_voxel(xyz, seed):
    voxels = voxels_of(xyz, 5.0)
    kept = point_clouds.thin(xyz, 5.0, np.random.default_rng(seed))
    np.testing.assert_array_equal(voxels[kept], np.unique(voxels, axis=0))


def test_every_point_of_a_voxel_is_drawn_equally_often():
    xyz = np.concatenate([np.zeros((1, 3)), np.linspace(5.1, 5.9, 4)[:, None].repeat(3, 1)]).astype(np.float32)
    rng = np.random.default_rng(0)
    drawn = [tuple(point_clouds.thin(xyz, 5.0, rng)) for _ in range(4_000)]
    assert {first for first, _ in drawn} == {0}
    counts = np.bincount([second for _, second in drawn], minlength=5)
    np.testing.assert_allclose(counts[1:] / len(drawn), 0.25, atol=0.025)


def test_thinning_knows_its_limits():
    xyz = np.zeros((3, 3), np.float32)
    np.testing.assert_array_equal(point_clouds.thin(xyz, 0.0), [0, 1, 2])
    assert len(point_clouds.thin(xyz[:0], 0.1)) == 0
    # A stray point far away needs no more than its own voxel.
    far = np.array([[0, 0, 0], [3e9, -3e9, 3e9], [0.05, 0, 0]], np.float32)
    assert len(point_clouds.thin(far, 0.1)) == 2
    xyz[1, 2] = np.nan
    with pytest.raises(ValueError, match="1 points have coordinates that are not finite"):
        point_clouds.thin(xyz, 0.1)


def test_the_field_of_view_is_open_and_smaller_by_the_margin():
    inside = np.array([[7.9998, 0, 0], [-7.9998, 5.9998, -1.9998]], np.float32)
    outside = np.array([[8.0, 0, 0], [7.99995, 0, 0], [0, -6.0, 0], [0, 0, 1.99995], [0, 0, -2.5]], np.float32)
    assert point_clouds.in_field_of_view(inside, FIELD).all()
    assert not point_clouds.in_field_of_view(outside, FIELD).any()
    assert point_clouds.in_field_of_view(outside, FIELD, margin=1e-5).tolist() == [False, True, False, True, False]


@settings(max_examples=60, deadline=None)
@given(clouds())
def test_cells_are_counted_along_the_two_axes_left(xyz):
    xyz = xyz[point_clouds.in_field_of_view(xyz, FIELD)]
    axes, shapes = (2, 1, 0), ((16, 12), (16, 5), (12, 7))
    cells = point_clouds.grid_cells(xyz, FIELD, axes, shapes)
    for axis, shape, row in zip(axes, shapes, cells, strict=True):
        left = [other for other in range(3) if other != axis]
        for point, cell in zip(xyz, row, strict=True):
            parts = [
                (float(point[other]) - FIELD[0][other]) / ((FIELD[1][other] - FIELD[0][other]) / count)
                for other, count in zip(left, shape, strict=True)
            ]
            assert cell == int(parts[0]) * shape[1] + int(parts[1])


def test_points_outside_have_no_cell():
    points = np.array([[0, 0, 0], [-8.1, 0, 0], [0, 6.0, 0]], np.float32)
    with pytest.raises(ValueError, match="2 points lie outside the field of view"):
        point_clouds.grid_cells(points, FIELD, (2,), ((16, 12),))


def test_features_are_intensity_place_and_radius():
    xyz = np.array([[3, 4, 12]], np.float32)
    dataset = dataclasses.replace(NUSCENES, intensity_mean=10.0, intensity_std=4.0)
    features = point_clouds.point_features(xyz, np.array([18], np.float32), dataset)
    assert dict(zip(point_clouds.FEATURES, features[0], strict=True)) == {
        "intensity": 2.0,
        "x": 3.0,
        "y": 4.0,
        "z": 12.0,
        "radius": 13.0,
    }


@settings(max_examples=40, deadline=None)
@given(clouds(), st.integers(1, 70))
def test_the_nearest_points_come_by_distance(xyz, count):
    centre = xyz[0]
    kept = point_clouds.nearest(xyz, centre, count)
    if count >= len(xyz):
        np.testing.assert_array_equal(kept, np.arange(len(xyz)))
        return
    distances = np.linalg.norm(xyz.astype(np.float64) - centre, axis=1)
    assert kept[0] == 0
    np.testing.assert_allclose(distances[kept], np.sort(distances)[:count], rtol=1e-12)


def test_raw_points_follow_the_nearest_kept_one():
    rng = np.random.default_rng(0)
    raw, kept = rng.normal(size=(50, 3)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
    expected = np.linalg.norm(raw[:, None].astype(np.float64) - kept[None], axis=-1).argmin(1)
    np.testing.assert_array_equal(point_clouds.nearest_kept(raw, kept), expected)
    np.testing.assert_array_equal(point_clouds.nearest_kept(raw, kept[:0]), 0)


def test_pixels_are_rounded_down_twice_and_borders_are_strict():
    # At depth 2 a point (2u, 2v, 2) lands on pixel (u, v) of an image of 8 x 10.
    uv = np.array([[0.0, 3], [0.5, 3], [8.9, 6.9], [9, 3], [4, 7], [4, 0.25]])
    xyz = np.concatenate([2 * uv, np.full((len(uv), 1), 2.0)], 1).astype(np.float32)
    xyz = np.concatenate([xyz, np.array([[4.0, 3.0, 1.0], [8.0, 6.0, -2.0]], np.float32)])
    index, pixels = point_clouds.pixel_pairs(xyz, np.eye(4), (8, 10), NUSCENES)
    np.testing.assert_array_equal(index, [1, 2, 5])
    np.testing.assert_array_equal(pixels, [[3, 0], [6, 8], [0, 4]])
    np.testing.assert_array_equal(point_clouds.resized_pixels(pixels, (8, 10), (4, 4)), [[1, 0], [3, 3], [0, 1]])
    # u = 2.9 of 3 columns: rounded once, it would be column 3 of 4.
    np.testing.assert_array_equal(point_clouds.resized_pixels(np.array([[0, 2]]), (8, 3), (8, 4)), [[0, 2]])


def test_the_depth_rule_is_the_data_sets():
    by_x = dataclasses.replace(NUSCENES, depth_of="lidar_x", min_depth=1.0)
    xyz = np.array([[1.0, 3.0, 2.0], [1.5, 1.5, 0.5], [2.0, 2.0, 0.8]], np.float32)
    matrix = np.eye(4)
    assert point_clouds.pixel_pairs(xyz, matrix, (8, 10), NUSCENES)[0].tolist() == [0]
    assert point_clouds.pixel_pairs(xyz, matrix, (8, 10), by_x)[0].tolist() == [1, 2]


def test_images_are_squashed():
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    for antialias in (True, False):
        np.testing.assert_array_equal(point_clouds.resize_image(image, (6, 8), antialias=antialias), image)
    # To a third, without antialiasing: the middle pixel of three; with it: a triangle over six rows and columns.
    image = np.random.default_rng(1).integers(0, 256, (9, 12, 3), np.uint8)
    np.testing.assert_allclose(point_clouds.resize_image(image, (3, 4), antialias=False), image[1::3, 1::3], atol=1e-3)
    smooth = point_clouds.resize_image(image, (3, 4), antialias=True)
    weights = np.maximum(0, 1 - np.abs(np.arange(2, 7) - 4) / 3)
    weights /= weights.sum()
    expected = np.einsum("r,c,rck->k", weights, weights, image[2:7, 2:7].astype(float))
    np.testing.assert_allclose(smooth[1, 1], expected, rtol=1e-5)
    # To double the size both are the same interpolation.
    doubled = [point_clouds.resize_image(image, (18, 24), antialias=antialias) for antialias in (True, False)]
    np.testing.assert_allclose(*doubled, atol=1e-3)
