"""Voxels of points and of ray samples: equal to the official float64 arithmetic, on borders too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.voxels import (
    RAY_SAMPLES,
    Volume,
    contains_point,
    crossed_by_rays,
    in_range,
    voxel_indices,
)

VOLUMES = (
    Volume(),
    Volume((-51.2, -51.2, -5.0), (51.2, 51.2, 3.0), (128, 96, 16)),
    Volume((-40.0, -40.0, -1.0), (40.0, 40.0, 5.4), (200, 200, 16)),
    Volume((0.1, -7.3, -2.2), (33.7, 9.9, 2.9), (7, 1, 300)),
)


def official_coordinates(points, volume):
    """The official chain in float64, written independently of the package."""
    lower, upper = np.array(volume.minimum), np.array(volume.maximum)
    interval = (upper - lower) / np.array(volume.grid_size)
    return (np.clip(points.astype(np.float64), lower, upper - 1e-3) - lower) / interval


def official_crossed(points, volume):
    inside = ((points > np.array(volume.minimum)) & (points < np.array(volume.maximum))).all(-1)
    samples = np.linspace(0, 1, RAY_SAMPLES)[:, None, None] * points[inside]
    grid = np.zeros(volume.grid_size, bool)
    grid[tuple(np.floor(official_coordinates(samples, volume)).astype(int).reshape(-1, 3).T)] = True
    return grid, inside


@functools.cache
def compiled(volume):
    def everything(points, mask):
        return (
            voxel_indices(points, volume),
            in_range(points, volume),
            crossed_by_rays(points, mask, volume),
            contains_point(points, mask, volume),
        )

    return jax.jit(everything)


def test_float32_arithmetic_alone_would_not_do():
    # If this fails, the border tables are needless; they cost a gather for every sample.
    volume = Volume()
    points = np.linspace(volume.minimum, volume.maximum, volume.grid_size[0] + 1).astype(np.float32)
    lower, size = np.array(volume.minimum, np.float32), np.array(volume.voxel_size, np.float32)
    naive = np.floor((np.clip(points, lower, np.array(volume.maximum, np.float32) - 1e-3) - lower) / size)
    exact = np.floor(official_coordinates(points, volume))
    assert np.any(naive != exact)
    np.testing.assert_array_equal(voxel_indices(jnp.asarray(points), volume), exact)


@given(
    volume=st.sampled_from(VOLUMES),
    seed=st.integers(0, 2**31),
    borders=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 400), st.integers(1, RAY_SAMPLES - 1), st.integers(-2, 2)),
        min_size=1,
        max_size=200,
    ),
)
@settings(max_examples=40, deadline=None)
def test_voxels_equal_float64_next_to_borders(volume, seed, borders):
    rng = np.random.default_rng(seed)
    lower, upper = np.array(volume.minimum), np.array(volume.maximum)
    points = rng.uniform(lower * 1.3 - 1, upper * 1.3 + 1, (256, 3)).astype(np.float32)
    # Points whose sample at some fraction of the ray falls within two float32 steps of a border.
    for row, (axis, border, sample, steps) in enumerate(borders):
        edge = lower[axis] + (border % (volume.grid_size[axis] + 1)) * volume.voxel_size[axis]
        points[row, axis] = edge / np.linspace(0, 1, RAY_SAMPLES)[sample]
        for _ in range(abs(steps)):
            points[row, axis] = np.nextafter(points[row, axis], np.float32(np.sign(steps) * np.inf))
    points[-4:] = np.array([lower, upper, np.zeros(3), upper - 1e-3], np.float32)
    mask = rng.random(256) < 0.9
    indices, inside, crossed, occupied = compiled(volume)(jnp.asarray(points), jnp.asarray(mask))
    expected = np.floor(official_coordinates(points, volume)).astype(int)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(inside, official_crossed(points, volume)[1])
    np.testing.assert_array_equal(crossed, official_crossed(points[mask], volume)[0])
    grid = np.zeros(volume.grid_size, bool)
    grid[tuple(expected[mask].T)] = True
    np.testing.assert_array_equal(occupied, grid)


def test_a_batch_by_vmap_is_its_samples():
    volume = VOLUMES[1]
    rng = np.random.default_rng(0)
    points = jnp.asarray(rng.normal(0, 20, (3, 200, 3)).astype(np.float32))
    mask = jnp.asarray(rng.random((3, 200)) < np.array([[0.5], [0.0], [1.0]]))
    together = jax.jit(jax.vmap(functools.partial(crossed_by_rays, volume=volume)))(points, mask)
    for sample in range(3):
        np.testing.assert_array_equal(together[sample], compiled(volume)(points[sample], mask[sample])[2])
    assert not together[1].any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"maximum": (51.2, 51.2, -5.0)},
        {"grid_size": (0, 100, 8)},
        {"grid_size": (100, 100, 8000)},
        {"grid_size": (2000, 2000, 8)},
    ],
)
def test_an_impossible_volume_is_refused(arguments):
    with pytest.raises(ValueError, match="volume: "):
        Volume(**arguments)
