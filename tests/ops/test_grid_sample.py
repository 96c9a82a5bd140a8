import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.ops.grid_sample import grid_sample, resize_bilinear


def test_cell_centres_give_the_cells():
    features = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    y, x = np.meshgrid((np.arange(4) + 0.5) / 4 * 2 - 1, (np.arange(6) + 0.5) / 6 * 2 - 1, indexing="ij")
    grid = jnp.broadcast_to(jnp.asarray(np.stack([x, y], -1), jnp.float32), (2, 4, 6, 2))
    np.testing.assert_allclose(grid_sample(features, grid), features, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.floats(1.5, 1e9), st.sampled_from([-1.0, 1.0]), st.integers(0, 1))
def test_far_outside_is_zero_and_has_no_gradient(distance, sign, axis):
    features = jnp.ones((1, 3, 5, 2))
    grid = jnp.zeros((1, 1, 2)).at[0, 0, axis].set(sign * distance)
    output, pull_back = jax.vjp(grid_sample, features, grid)
    to_features, to_grid = pull_back(jnp.ones_like(output))
    for array in (output, to_features, to_grid):
        np.testing.assert_array_equal(array, 0)


def test_half_a_cell_outside_fades():
    features = jnp.ones((1, 4, 4, 1))
    edge = grid_sample(features, jnp.array([[[-1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]]))
    np.testing.assert_allclose(edge[0, :, 0], [0.5, 0.5, 0.25], atol=1e-6)


def test_keeps_bfloat16():
    assert grid_sample(jnp.ones((1, 3, 3, 2), jnp.bfloat16), jnp.zeros((1, 4, 2))).dtype == jnp.bfloat16


def test_resize_to_the_same_size_changes_nothing_and_means_stay():
    features = jax.random.normal(jax.random.key(0), (1, 5, 4, 2))
    np.testing.assert_allclose(resize_bilinear(features, (5, 4)), features, atol=1e-6)
    np.testing.assert_allclose(resize_bilinear(jnp.ones((1, 5, 4, 2)), (3, 9)), 1, atol=1e-6)
    with pytest.raises(ValueError, match="at least 1"):
        resize_bilinear(features, (0, 3))
