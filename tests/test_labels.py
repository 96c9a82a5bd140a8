"""Occupancy and semantic grids, exactly those of the official data pipeline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax import labels
from pop3d_jax.nuscenes import EMPTY, IGNORE, UNLABELLED
from pop3d_jax.voxels import Volume, crossed_by_rays

SMALL = Volume((-4.0, -3.0, -2.0), (4.0, 3.0, 2.0), (8, 6, 4))


@pytest.fixture(scope="module")
def golden(golden_file):
    with np.load(golden_file("pop3d/labels.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def computed(golden):
    """All grids of the golden sweep by one jitted function, with padded points, as in a training step."""
    limits = (tuple(golden["volume_min"].tolist()), tuple(golden["volume_max"].tolist()))
    volume = Volume(*limits, tuple(golden["grid_size"].tolist()))
    empty, ignore, unlabelled = (int(golden[f"{name}_label"]) for name in ("empty", "ignore", "unlabelled"))

    @jax.jit
    def everything(points, classes, mask):
        crossed = crossed_by_rays(points, mask, volume)
        majority = labels.semantic_majority(points, classes, mask, volume, empty)
        names = {"ignore_label": ignore, "empty_label": empty, "unlabelled_label": unlabelled}
        rays = labels.semantic_rays(points, classes, mask, volume, crossed=crossed, **names)
        return {
            "occupancy_tpvformer": labels.occupancy_tpvformer(points, mask, volume),
            "semantic_majority": majority,
            "semantic_rays": rays,
            "occupancy_rays": labels.occupancy_rays(points, mask, volume, ignore_label=ignore),
            "occupancy_eval": labels.occupancy_eval(rays, majority, **names),
        }

    count = len(golden["points_xyz"])
    padding = ((0, 500), (0, 0))
    points = np.pad(golden["points_xyz"], padding, constant_values=7.0)
    classes = np.pad(golden["point_label_cls"], padding[0], constant_values=3)
    return everything(jnp.asarray(points), jnp.asarray(classes), jnp.arange(count + 500) < count)


@pytest.mark.golden
def test_evaluation_labels_are_the_single_functions(golden, computed):
    limits = (tuple(golden["volume_min"].tolist()), tuple(golden["volume_max"].tolist()))
    volume = Volume(*limits, tuple(golden["grid_size"].tolist()))
    points = jnp.asarray(golden["points_xyz"])
    arguments = (points, jnp.asarray(golden["point_label_cls"]), jnp.ones(len(points), bool))
    together = jax.jit(labels.evaluation_labels, static_argnums=3)(*arguments, volume)
    stored = tuple(int(golden[f"{name}_label"]) for name in ("empty", "ignore", "unlabelled"))
    if stored != (EMPTY, IGNORE, UNLABELLED):
        pytest.skip(
            f"this golden set numbers empty, ignored and unlabelled {stored}, the package {EMPTY, IGNORE, UNLABELLED}"
        )
    for name, grid in together.items():
        np.testing.assert_array_equal(grid, computed[name])


@functools.cache
def compiled_majority():
    return jax.jit(labels.majority_label)


@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([2, 18, 256]))
@settings(max_examples=40, deadline=None)
def test_majority_counts_every_point(seed, crowding, num_labels):
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, np.minimum(SMALL.grid_size, crowding), (300, 3))
    classes = rng.integers(0, num_labels, 300).astype(np.uint8)
    mask = rng.random(300) < 0.8
    fill = rng.integers(0, 256, SMALL.grid_size).astype(np.uint8)
    counts = np.zeros((*SMALL.grid_size, 256), int)
    np.add.at(counts, (*cells[mask].T, classes[mask]), 1)
    expected = np.where(counts.any(-1), counts.argmax(-1), fill)
    grid = compiled_majority()(
        jnp.asarray(cells, jnp.int32), jnp.asarray(classes), jnp.asarray(mask), jnp.asarray(fill)
    )
    np.testing.assert_array_equal(grid, expected)


def test_without_points_nothing_is_observed():
    points, classes = jnp.ones((5, 3), jnp.float32), jnp.ones(5, jnp.uint8)
    grids = jax.jit(labels.evaluation_labels, static_argnums=3)(points, classes, jnp.zeros(5, bool), SMALL)
    assert np.all(grids["semantic_majority"] == EMPTY)
    assert np.all(grids["semantic_rays"] == IGNORE)
    assert np.all(grids["occupancy_rays"] == IGNORE)
    assert np.all(grids["occupancy_eval"] == IGNORE)
    assert not np.any(labels.occupancy_tpvformer(points, jnp.zeros(5, bool), SMALL))


def test_a_point_outside_occupies_a_border_voxel_in_training_only():
    points, mask = jnp.array([[10.0, 0.5, 0.5]], jnp.float32), jnp.ones(1, bool)
    assert labels.occupancy_tpvformer(points, mask, SMALL)[7, 3, 2] == labels.OCCUPIED
    assert np.all(labels.occupancy_rays(points, mask, SMALL) == IGNORE)


def test_unlabelled_points_are_ignored_semantically_and_occupied_for_occupancy():
    points = jnp.array([[2.5, 0.5, 0.5]], jnp.float32)
    grids = labels.evaluation_labels(points, jnp.zeros(1, jnp.uint8), jnp.ones(1, bool), SMALL)
    assert grids["semantic_rays"][6, 3, 2] == IGNORE
    assert grids["semantic_rays"][5, 3, 2] == EMPTY
    assert grids["occupancy_eval"][6, 3, 2] == labels.OCCUPIED
    assert grids["occupancy_eval"][5, 3, 2] == labels.FREE


def test_a_batch_by_vmap_is_its_samples():
    rng = np.random.default_rng(1)
    points = jnp.asarray(rng.normal(0, 2, (3, 100, 3)).astype(np.float32))
    classes = jnp.asarray(rng.integers(0, 17, (3, 100)).astype(np.uint8))
    mask = jnp.asarray(rng.random((3, 100)) < 0.7)
    single = jax.jit(functools.partial(labels.evaluation_labels, volume=SMALL))
    together = jax.jit(jax.vmap(functools.partial(labels.evaluation_labels, volume=SMALL)))(points, classes, mask)
    for sample in range(3):
        alone = single(points[sample], classes[sample], mask[sample])
        for name, grid in alone.items():
            np.testing.assert_array_equal(together[name][sample], grid)
