"""BatchNorm with statistics of the batch, against plain NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pop3d_jax.models.batch_norm import EPSILON, MOMENTUM, BatchNorm


@pytest.mark.parametrize("shape", [(3, 7, 4), (3, 7, 5, 4)])
def test_statistics_are_of_the_counted_rows(shape):
    rng = np.random.default_rng(0)
    x = 3.0 + 2.0 * rng.standard_normal(shape)
    counted = np.arange(7) < np.asarray([7, 2, 5])[:, None]
    norm = BatchNorm(4)
    norm.scale[...], norm.bias[...] = jnp.arange(1.0, 5.0), jnp.arange(4.0)
    out = norm(jnp.asarray(x, jnp.float32), training=True, counted=jnp.asarray(counted))
    rows = x[counted].reshape(-1, 4)
    expected = (x - rows.mean(0)) / np.sqrt(rows.var(0) + EPSILON) * np.arange(1, 5) + np.arange(4)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], MOMENTUM * rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 1 - MOMENTUM + MOMENTUM * rows.var(0, ddof=1), rtol=1e-5)


def test_in_inference_the_running_statistics_count_and_stay():
    norm = BatchNorm(2)
    norm.mean[...], norm.var[...] = jnp.asarray([1.0, -1.0]), jnp.asarray([4.0, 0.25])
    out = norm(jnp.asarray([[3.0, 0.0]], jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), [[1.0, 2.0]], rtol=1e-2)
    np.testing.assert_array_equal(norm.mean[...], [1.0, -1.0])
    np.testing.assert_array_equal(norm.var[...], [4.0, 0.25])


def test_without_a_mask_every_row_counts():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    one, other = BatchNorm(3), BatchNorm(3)
    np.testing.assert_array_equal(one(x, training=True), other(x, training=True, counted=jnp.ones(5, bool)))
    np.testing.assert_array_equal(one.var[...], other.var[...])
