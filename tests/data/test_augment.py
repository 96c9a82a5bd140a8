import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.data.augment import GRID_MASK_PROBABILITY, GRID_MASK_RATIO, draw_grid_mask, grid_mask


@functools.cache
def _jitted_mask(height, width, ratio):
    return jax.jit(lambda draw: grid_mask(draw, height, width, ratio=ratio))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(20, 33, 0.5), (33, 20, 0.3)]), st.data())
def test_grid_mask_is_the_stripes_painted_one_by_one(shape, data):
    height, width, ratio = shape
    period = data.draw(st.integers(2, height - 1))
    first = data.draw(st.tuples(st.integers(0, period - 1), st.integers(0, period - 1)))
    length = min(max(int(period * ratio + 0.5), 1), period - 1)
    enlarged = (int(1.5 * height), int(1.5 * width))
    painted = np.zeros(enlarged)
    for i in range(enlarged[0] // period):
        painted[first[0] + i * period :][:length] = 1
    for i in range(enlarged[1] // period):
        painted[:, first[1] + i * period :][:, :length] = 1
    top, left = (enlarged[0] - height) // 2, (enlarged[1] - width) // 2
    expected = painted[top : top + height, left : left + width]
    draw = jnp.array([period, *first], jnp.int32)
    np.testing.assert_array_equal(_jitted_mask(*shape)(draw), expected)


def test_grid_mask_is_set_as_in_the_official_network():
    # Of the golden set that ships with the project: others may be drawn at another ratio.
    with np.load(Path(__file__).parent.parent / "golden" / "pop3d" / "ops.npz") as golden:
        assert golden["gridmask_ratio"] == GRID_MASK_RATIO
        assert golden["gridmask_probability"] == GRID_MASK_PROBABILITY


def test_grid_mask_draws_follow_the_official_distributions():
    height = 12
    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: draw_grid_mask(key, height)))(keys))
    used = draws[draws[:, 0] > 0]
    assert len(used) / len(draws) == pytest.approx(GRID_MASK_PROBABILITY, abs=0.015)
    np.testing.assert_array_equal(draws[draws[:, 0] <= 0], -1)
    periods, counts = np.unique(used[:, 0], return_counts=True)
    np.testing.assert_array_equal(periods, np.arange(2, height))
    np.testing.assert_allclose(counts / len(used), 1 / len(periods), rtol=0.1)
    for first in used[:, 1:].T:
        for period in (2, 7, height - 1):
            starts, counts = np.unique(first[used[:, 0] == period], return_counts=True)
            np.testing.assert_array_equal(starts, np.arange(period))
            np.testing.assert_allclose(counts / counts.sum(), 1 / period, rtol=0.3)
    assert abs(np.corrcoef(((used[:, 1:] + 0.5) / used[:, :1]).T)[0, 1]) < 0.05


def test_grid_mask_needs_room():
    with pytest.raises(ValueError, match="height of 2"):
        draw_grid_mask(jax.random.key(0), 2)
