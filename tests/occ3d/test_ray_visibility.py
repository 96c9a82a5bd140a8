"""Rays through voxel grids: every voxel they enter, and what a place or a camera sees."""

import numpy as np
import pytest

from pop3d_jax.occ3d import visibility
from pop3d_jax.occ3d.visibility import camera_mask, cell_indices, crossed_voxels, visible_from
from pop3d_jax.voxels import Volume

VOLUME = Volume((-2.0, -1.0, 0.0), (3.0, 3.0, 2.0), (10, 8, 4))
CUBES = Volume((0.0, 0.0, 0.0), (6.0, 6.0, 6.0), (6, 6, 6))


def _crossed_one_by_one(start, end, volume):
    """A segment is cut at all planes; the middle of every piece lies in one voxel."""
    grid = np.zeros(volume.grid_size, bool)
    last = cell_indices(end[None], volume)[0]
    a, b = ((p - volume.minimum) / np.array(volume.voxel_size) for p in (start, end))
    cuts = [0.0, 1.0]
    for k in range(3):
        low, high = sorted((a[k], b[k]))
        cuts += [(i - a[k]) / (b[k] - a[k]) for i in range(int(np.ceil(low)), int(np.floor(high)) + 1)]
    cuts = np.sort(cuts)
    for t in (cuts[1:] + cuts[:-1]) / 2:
        cell = np.floor(a + t * (b - a)).astype(int)
        if ((cell >= 0) & (cell < volume.grid_size)).all() and np.ravel_multi_index(cell, volume.grid_size) != last:
            grid[tuple(cell)] = True
    return grid


def _segments(count):
    rng = np.random.default_rng(0)
    return rng.uniform(-4, 4, (count, 3)), rng.uniform(-4, 4, (count, 3))


def test_rays_cross_the_voxels_that_walking_along_them_meets():
    for start, end in zip(*_segments(400), strict=True):
        grid = crossed_voxels(start[None], end[None], VOLUME)
        np.testing.assert_array_equal(grid, _crossed_one_by_one(start, end, VOLUME))


def test_blocks_change_nothing(monkeypatch):
    starts, ends = _segments(300)
    whole = crossed_voxels(starts, ends, VOLUME)
    monkeypatch.setattr(visibility, "_BLOCK", 7)
    np.testing.assert_array_equal(crossed_voxels(starts, ends, VOLUME), whole)
    each = [_crossed_one_by_one(start, end, VOLUME) for start, end in zip(starts, ends, strict=True)]
    np.testing.assert_array_equal(whole, np.any(each, 0))


@pytest.mark.parametrize("mirror", [np.array([False] * 3), np.array([True, False, True]), np.array([True] * 3)])
def test_a_ray_through_corners_enters_only_what_lies_on_the_diagonal(mirror):
    start, end = np.full(3, 0.5), np.full(3, 4.5)
    start, end = np.where(mirror, 6 - start, start), np.where(mirror, 6 - end, end)
    expected = np.zeros(CUBES.grid_size, bool)
    diagonal = np.where(mirror, 5 - np.arange(4)[:, None], np.arange(4)[:, None])
    expected[tuple(diagonal.T)] = True
    np.testing.assert_array_equal(crossed_voxels(start[None], end[None], CUBES), expected)


def test_a_ray_that_ends_in_its_first_voxel_or_passes_by_crosses_nothing():
    starts = np.array([[0.2, 0.2, 0.2], [-1.0, 7.0, 3.0]])
    ends = np.array([[0.8, 0.9, 0.4], [9.0, 7.0, 3.0]])
    assert not crossed_voxels(starts, ends, CUBES).any()


def test_a_ray_along_an_axis_from_outside_to_outside_crosses_its_row():
    expected = np.zeros(CUBES.grid_size, bool)
    expected[:, 2, 3] = True
    grid = crossed_voxels(np.array([[-3.0, 2.5, 3.5]]), np.array([[9.0, 2.5, 3.5]]), CUBES)
    np.testing.assert_array_equal(grid, expected)


def test_points_on_borders_belong_to_the_upper_voxel_and_outside_to_none():
    points = np.array([[0.0, 0, 0], [1, 2, 3], [5.999, 5.999, 5.999], [6, 0, 0], [0, -1e-9, 0]])
    assert cell_indices(points, CUBES).tolist() == [0, 36 + 12 + 3, 215, -1, -1]


def _faces_towards(origin, centre):
    """Centres of a voxel's faces that look at a place, a hair within the voxel."""
    for axis, half in enumerate(np.array(VOLUME.voxel_size) / 2):
        if abs(origin[axis] - centre[axis]) > half:
            face = centre.copy()
            face[axis] += np.copysign(half - 1e-9, origin[axis] - centre[axis])
            yield face


def test_what_is_seen_is_what_no_occupied_voxel_lies_before():
    rng = np.random.default_rng(1)
    occupied = rng.random(VOLUME.grid_size) < 0.1
    centres = np.stack(np.unravel_index(np.arange(VOLUME.num_voxels), VOLUME.grid_size), 1) + 0.5
    centres = centres * VOLUME.voxel_size + VOLUME.minimum
    # Drawn, so that no line of sight runs through an edge of a voxel.
    for origin in (rng.uniform(0, 1, 3), rng.uniform(-7, -6, 3)):
        solid = occupied.copy()
        own = cell_indices(origin[None], VOLUME)[0]
        if own >= 0:
            solid.reshape(-1)[own] = False
        expected = [
            any(
                not (_crossed_one_by_one(origin, face, VOLUME) & solid).any() for face in _faces_towards(origin, centre)
            )
            for centre in centres
        ]
        seen = visible_from(origin, np.arange(VOLUME.num_voxels), occupied, VOLUME)
        np.testing.assert_array_equal(seen, expected)
        assert 0.02 < seen.mean() < 0.98


def test_a_camera_sees_as_far_as_the_wall_and_within_its_image():
    # At the middle of the low face, looking along +x: a quarter of a turn wide, 16 by 12 pixels.
    ego_to_camera = np.eye(4)
    ego_to_camera[:3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
    ego_to_camera[:3, 3] = ego_to_camera[:3, :3] @ -np.array([0.01, 3.0, 3.0])
    intrinsics = np.array([[8.0, 0, 7.5], [0, 8.0, 5.5], [0, 0, 1]])
    occupied = np.zeros(CUBES.grid_size, bool)
    occupied[3] = True
    mask = camera_mask(occupied, intrinsics[None], ego_to_camera[None], [(12, 16)], CUBES)
    x, y, z = np.meshgrid(*[np.arange(6) + 0.5] * 3, indexing="ij")
    depth = x - 0.01
    in_image = (np.abs(y - 3) < depth) & (np.abs(z - 3) < 0.75 * depth)
    np.testing.assert_array_equal(mask, in_image & (x < 4))
    assert mask[3].any()
    wide = np.repeat(ego_to_camera[None], 2, 0)
    both = camera_mask(np.zeros_like(occupied), np.stack([intrinsics] * 2), wide, [(12, 16), (2, 2)], CUBES)
    np.testing.assert_array_equal(both, in_image)


def test_level_ground_is_seen_far_away():
    flat = Volume((0.0, 0.0, 0.0), (40.0, 3.0, 3.0), (100, 3, 6))
    ground = np.zeros(flat.grid_size, bool)
    ground[:, :, 0] = True
    row = np.ravel_multi_index((np.arange(100), np.ones(100, int), np.zeros(100, int)), flat.grid_size)
    origin = np.array([0.1, 1.4, 2.2])
    assert visible_from(origin, row, ground, flat).all()
    assert not visible_from(origin, row[1:], np.roll(ground, 1, 2) | ground, flat).any()
