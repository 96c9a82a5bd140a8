"""Rays through small grids, by hand and against a test of every voxel's box."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.occ3d.rays import cast_rays, ray_directions
from pop3d_jax.voxels import Volume

SIZE = (8, 8, 4)
UNIT = Volume((0.0, 0.0, 0.0), tuple(map(float, SIZE)), SIZE)
# Occ3D's lower corner and voxels.
OCC3D_CORNER = Volume((-40.0, -40.0, -1.0), (-36.8, -36.8, 0.6), SIZE)
CAR, ROAD, WALL = 4, 11, 15


def grid_of(occupied):
    grid = np.full(SIZE, FREE, np.uint8)
    for voxel, label in occupied.items():
        grid[voxel] = label
    return grid


def cast(grid, origin, *directions, volume=UNIT):
    """Labels and distances of rays from one origin."""
    labels, distances = cast_rays(grid, np.array([origin], float), np.array(directions, np.float32), volume)
    return labels[0].tolist(), distances[0].tolist()


def test_directions_are_rings_that_the_flat_ground_spaces_evenly():
    directions = ray_directions().reshape(39, 360, 3)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, atol=1e-6)
    reach = -directions[:10, 0, 0] / directions[:10, 0, 2]
    np.testing.assert_allclose(reach, np.arange(1, 11), rtol=1e-5)
    pitch = np.arcsin(directions[:, 0, 2].astype(float))
    np.testing.assert_allclose(np.diff(pitch)[8:], pitch[9] - pitch[8], atol=1e-6)
    assert pitch[-2] < 0.21 <= pitch[-1]
    np.testing.assert_allclose(directions[20, 90] / np.cos(pitch[20]), [0, 1, np.tan(pitch[20])], atol=1e-6)


def test_distances_are_to_the_far_side_of_what_is_hit():
    wall = {(6, y, z): WALL for y in range(8) for z in range(4)}
    floor = {(x, y, 0): ROAD for x in range(6) for y in range(8)}
    origin = np.array([0.5, 4.5, 1.5]) * 0.4 + OCC3D_CORNER.minimum
    rays = ((1, 0, 0), (0, 0, -1), (-1, 0, 0), (0, 0, 1), (0, 1, 0))
    labels, distances = cast(grid_of(wall | floor), origin, *rays, volume=OCC3D_CORNER)
    assert labels == [WALL, ROAD, FREE, FREE, FREE]
    # The far side of the wall and of the floor; the grid's border where nothing is hit.
    np.testing.assert_allclose(distances, np.array([6.5, 1.5, 0.5, 2.5, 3.5]) * 0.4, atol=1e-6)


def test_a_voxel_without_a_label_stops_rays_and_so_does_the_origins_own():
    assert cast(grid_of({(5, 1, 1): 255}), (1.5, 1.5, 1.5), (1, 0, 0)) == ([255], [4.5])
    assert cast(grid_of({(1, 1, 1): CAR}), (1.5, 1.5, 1.5), (1, 0, 0)) == ([CAR], [0.5])


def test_where_borders_are_met_at_once_z_goes_before_y_before_x():
    neighbours = {(1, 0, 0): 1, (0, 1, 0): 2, (0, 0, 1): 3}
    labels, distances = cast(grid_of(neighbours), (0.5, 0.5, 0.5), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
    assert labels == [2, 3, 3, 3]
    np.testing.assert_allclose(distances, np.sqrt([0.5, 0.5, 0.5, 0.75]), rtol=1e-6)


def test_rays_from_outside():
    grid = grid_of({(3, 3, 3): CAR, (0, 0, 0): ROAD})
    # From above: down into the car; past the grid, which is minus one voxel with the first voxel's label.
    assert cast(grid, (3.5, 3.5, 6.0), (0, 0, -1), (0, 0, 1), (1, 0, 0)) == ([CAR, ROAD, ROAD], [3.0, -1.0, -1.0])
    # A little below, the official truncation starts the ray in the lowest layer: it meets the car before it is there.
    assert cast(grid_of({(4, 3, 0): CAR}), (3.9, 3.5, -0.3), (1, 0, 0.5))[0] == [CAR]
    assert cast(grid_of({(4, 3, 0): CAR}), (3.9, 3.5, -1.3), (1, 0, 0.5))[0] == [FREE]


def boxes_hit(grid, origin, direction):
    """Label, far side and whether the answer is clear, by intersecting the ray with every voxel's box."""
    unit = direction.astype(float) / np.linalg.norm(direction)
    lower = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), -1).astype(float)
    with np.errstate(divide="ignore"):
        sides = np.stack([(lower - origin) / unit, (lower + 1 - origin) / unit])
    near, far = sides.min(0).max(-1).clip(0), sides.max(0).min(-1)
    occupied = grid != FREE
    clear = np.abs(far - near)[occupied].min(initial=1.0) > 1e-3
    hits = occupied & (far > near)
    if not hits.any():
        return FREE, far[far > near].max(), clear
    first = np.unravel_index(np.where(hits, near, np.inf).argmin(), SIZE)
    return grid[first], far[first], clear


@given(st.integers(0, 2**31), st.floats(0.02, 0.6))
@settings(max_examples=30, deadline=None)
def test_the_walk_finds_what_a_test_of_every_box_finds(seed, density):
    rng = np.random.default_rng(seed)
    grid = np.where(rng.random(SIZE) < density, rng.integers(0, FREE, SIZE), FREE).astype(np.uint8)
    origins = rng.uniform(0.01, np.array(SIZE) - 0.01, (2, 3))
    directions = rng.normal(size=(30, 3)).astype(np.float32)
    labels, distances = cast_rays(grid, origins, directions, UNIT)
    unclear = 0
    for row, origin in enumerate(origins):
        for column, direction in enumerate(directions):
            label, distance, clear = boxes_hit(grid, origin, direction)
            unclear += not clear
            if clear:
                assert labels[row, column] == label
                assert distances[row, column] == pytest.approx(distance, abs=1e-3)
    assert unclear < 30


def test_the_precision_of_everything_else_stays_as_it_was():
    precision = jax.config.jax_enable_x64
    labels, distances = cast_rays(grid_of({}), np.zeros((0, 3)), np.ones((30, 3), np.float32), UNIT)
    assert labels.shape == distances.shape == (0, 30)
    assert cast(grid_of({}), (0.5, 0.5, 0.5), (1, 0, 0)) == ([FREE], [7.5])
    assert jax.config.jax_enable_x64 == precision


def test_what_cannot_be_cast_is_refused():
    grid, up = grid_of({}), np.array([[0, 0, 1]], np.float32)
    inside = np.ones((1, 3))
    with pytest.raises(ValueError, match=r"labels of shape \(8, 8, 3\) in a volume of \(8, 8, 4\) voxels"):
        cast_rays(grid[..., :3], inside, up, UNIT)
    with pytest.raises(ValueError, match="no cubes"):
        cast_rays(grid, inside, up, Volume((0.0, 0.0, 0.0), (8.0, 8.0, 8.0), SIZE))
    for origins, directions in ((inside * np.nan, up), (inside, up + np.inf)):
        with pytest.raises(ValueError, match="must be finite"):
            cast_rays(grid, origins, directions, UNIT)
    for directions in (0 * up, 1e-9 * up):
        with pytest.raises(ValueError, match=r"zero, or vanishes in float32 beside its origin \[1.0, 1.0, 1.0\]"):
            cast_rays(grid, inside, directions, UNIT)
