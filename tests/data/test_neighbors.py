"""Both searches of neighbours against distances of all pairs in float64, and against the official neighbours."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.data.neighbors import IMPLEMENTATIONS, nearest_neighbors

_ROWS = 40


def padded(xyz, rows=_ROWS):
    points = np.zeros((rows, 3), np.float32)
    points[: len(xyz)] = xyz
    return points, np.arange(rows) < len(xyz)


def by_all_distances(xyz):
    """Indices of all points by distance, then by index, the point itself first; and the distances."""
    exact = xyz.astype(np.float64)
    squared = np.square(exact[:, None] - exact[None]).sum(-1)
    np.fill_diagonal(squared, -1.0)
    order = np.argsort(squared, axis=1, kind="stable")
    return order, np.sqrt(np.maximum(np.take_along_axis(squared, order, 1), 0))


@pytest.mark.golden
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_golden_neighbors(golden_file, implementation):
    with np.load(golden_file("scalr/preprocess.npz")) as arrays:
        names = [name for name in arrays if name.endswith("/neighbors_emb")]
        assert names
        for name in names:
            expected = arrays[name][0].T
            features = arrays[name.replace("neighbors_emb", "feat")][0].T
            # Validation and distillation search among coordinates that equal their features.
            xyz = np.ascontiguousarray(features[:, 1:4])
            if implementation == "all_pairs" and len(xyz) > 10_000:
                continue  # seconds here; the shorter clouds say the same
            found = nearest_neighbors(
                xyz, np.ones(len(xyz), bool), expected.shape[1] - 1, implementation=implementation
            )
            np.testing.assert_array_equal(found, expected, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, _ROWS), st.integers(0, 2**32 - 1), st.booleans())
def test_all_pairs_are_exact_and_ties_go_by_index(count, seed, lattice):
    rng = np.random.default_rng(seed)
    xyz = rng.integers(0, 4, (count, 3)) / 8 if lattice else rng.normal(0, 30, (count, 3))
    points, mask = padded(xyz.astype(np.float32))
    order, _ = by_all_distances(points[:count])
    found = np.asarray(nearest_neighbors(points, mask, 5, implementation="all_pairs", block=16))
    expected = np.concatenate([order, np.repeat(np.arange(count)[:, None], 6, 1)], 1)[:, :6]
    np.testing.assert_array_equal(found[:count], expected)
    np.testing.assert_array_equal(found[count:], _ROWS - 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, _ROWS), st.integers(0, 2**32 - 1), st.booleans())
def test_the_tree_finds_the_same_distances_and_the_point_first(count, seed, lattice):
    rng = np.random.default_rng(seed)
    xyz = rng.integers(0, 3, (count, 3)) / 8 if lattice else rng.normal(0, 30, (count, 3))
    points, mask = padded(xyz.astype(np.float32))
    found = nearest_neighbors(points, mask, 5, implementation="kd_tree")
    np.testing.assert_array_equal(found[:count, 0], np.arange(count))
    _, distances = by_all_distances(points[:count])
    exact = points.astype(np.float64)
    of_found = np.linalg.norm(exact[found[:count]] - exact[:count, None], axis=-1)
    there = min(count, 6)
    np.testing.assert_allclose(of_found[:, :there], distances[:, :there], rtol=1e-12)
    # Only where points are missing does one come twice.
    assert all(len(set(row[:there])) == there for row in found[:count].tolist())
    np.testing.assert_array_equal(found[:count, there:], np.arange(count)[:, None].repeat(6 - there, 1))
    np.testing.assert_array_equal(found[count:], _ROWS - 1)


def test_distances_that_float32_cannot_tell_apart_are_ordered():
    # Around a point 60 m away, neighbours whose distances differ by a few parts in 1e8.
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(30, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    centre = np.array([40.0, -45.0, 1.5])
    xyz = np.concatenate([centre[None], centre + directions * (1 + 1e-7 * rng.permutation(30)[:, None])])
    points, mask = padded(xyz.astype(np.float32))
    order, distances = by_all_distances(points[:31])
    single = np.square(points[1:31] - points[0]).sum(1, dtype=np.float32)
    assert len(np.unique(single)) < len(np.unique(distances[0, 1:]))  # float32 does confuse some of them
    found = nearest_neighbors(points, mask, 25, implementation="all_pairs")
    np.testing.assert_array_equal(found[0], order[0, :26])


def test_a_batch_is_searched_within_a_jitted_step():
    rng = np.random.default_rng(1)
    clouds = [padded(rng.normal(0, 5, (count, 3)).astype(np.float32)) for count in (12, 40)]
    points, mask = (np.stack(arrays) for arrays in zip(*clouds, strict=True))
    search = jax.jit(jax.vmap(lambda xyz, keep: nearest_neighbors(xyz, keep, 4, implementation="all_pairs")))
    for found, (xyz, keep) in zip(search(points, mask), clouds, strict=True):
        np.testing.assert_array_equal(found, nearest_neighbors(xyz, keep, 4, implementation="kd_tree"))


def test_what_cannot_be_searched_is_named():
    points, mask = padded(np.zeros((2, 3), np.float32), 5)
    with pytest.raises(ValueError, match="5 neighbours in a cloud of 5 rows"):
        nearest_neighbors(points, mask, 5, implementation="kd_tree")
    with pytest.raises(ValueError, match=r"'magic'; known implementations: kd_tree, all_pairs"):
        nearest_neighbors(points, mask, 2, implementation="magic")
