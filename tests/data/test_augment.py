import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.data.augment import (
    GRID_MASK_PROBABILITY,
    PhotometricDraw,
    apply_photometric,
    draw_grid_mask,
    draw_photometric,
    grid_mask,
    photometric_distortion,
)


def _image(seed, height=5, width=7):
    return np.random.default_rng(seed).uniform(0, 255, (height, width, 3)).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 1.5), st.floats(-18, 18))
def test_colour_change_is_that_of_hsv(seed, saturation, hue):
    image = _image(seed)
    image[0, 0] = image[0, 0, 0]  # a grey pixel has no hue
    image[0, 1, :2] = image[0, 1, 2]
    expected = np.empty_like(image)
    for index in np.ndindex(image.shape[:2]):
        blue, green, red = image[index].astype(np.float64)
        h, s, v = colorsys.rgb_to_hsv(red, green, blue)
        red, green, blue = colorsys.hsv_to_rgb((h + hue / 360) % 1, s * saturation, v)
        expected[index] = blue, green, red
    result = apply_photometric(image, PhotometricDraw(saturation=saturation, hue=hue))
    np.testing.assert_allclose(result, expected, atol=2e-2)


def test_saturation_alone_takes_the_short_way_to_the_same_result():
    image = _image(0)
    short = apply_photometric(image, PhotometricDraw(saturation=1.3))
    long = apply_photometric(image, PhotometricDraw(saturation=1.3, hue=1e-6))
    np.testing.assert_allclose(short, long, atol=1e-3)


def test_parts_act_in_the_official_order():
    image = _image(1)
    np.testing.assert_array_equal(apply_photometric(image, PhotometricDraw()), image)
    draw = PhotometricDraw(brightness=10.0, early_contrast=1.2)
    np.testing.assert_allclose(apply_photometric(image, draw), (image + 10) * 1.2, rtol=1e-6)
    draw = PhotometricDraw(brightness=10.0, late_contrast=0.7, channel_order=(2, 0, 1))
    np.testing.assert_allclose(apply_photometric(image, draw), ((image + 10) * 0.7)[..., [2, 0, 1]], rtol=1e-6)
    # Contrast and hue commute, but brightness does not commute with either.
    full = PhotometricDraw(brightness=20.0, saturation=1.4, hue=12.0)
    separate = apply_photometric(
        apply_photometric(image, PhotometricDraw(brightness=20.0)), PhotometricDraw(saturation=1.4, hue=12.0)
    )
    np.testing.assert_allclose(apply_photometric(image, full), separate, atol=1e-3)


def test_below_zero_the_trip_to_hsv_mirrors_the_channels():
    """OpenCV divides the chroma by |value|: where the largest channel is negative, chroma is added instead."""
    image = np.array([[[-3.0, -5.0, -9.0], [-1.0, 2.0, 0.0]]], np.float32)
    expected = [[[-3.0, -1.0, 3.0], [-1.0, 2.0, 0.0]]]
    np.testing.assert_allclose(apply_photometric(image, PhotometricDraw()), expected, atol=1e-5)
    np.testing.assert_allclose(apply_photometric(image, PhotometricDraw(hue=1e-6)), expected, atol=1e-5)


def test_distortion_leaves_its_input_and_follows_the_generator():
    image = _image(2)
    kept = image.copy()
    results = [photometric_distortion(image, np.random.default_rng(5)) for _ in range(2)]
    np.testing.assert_array_equal(image, kept)
    np.testing.assert_array_equal(results[0], results[1])
    assert results[0].dtype == np.float32
    assert np.abs(photometric_distortion(image, np.random.default_rng(6)) - results[0]).max() > 1


def test_draws_follow_the_official_distributions():
    rng = np.random.default_rng(0)
    count = 1500
    draws = [draw_photometric(rng) for _ in range(count)]

    def check(values, neutral, share, low, high):
        used = np.array([value for value in values if value != neutral])
        assert len(used) / count == pytest.approx(share, abs=0.05)
        assert used.min() >= low
        assert used.max() <= high
        # Uniform: mean and spread of the interval.
        assert used.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))
        assert used.std() == pytest.approx((high - low) / np.sqrt(12), rel=0.08)

    check([draw.brightness for draw in draws], 0.0, 0.5, -32, 32)
    check([draw.saturation for draw in draws], 1.0, 0.5, 0.5, 1.5)
    check([draw.hue for draw in draws], 0.0, 0.5, -18, 18)
    check([draw.early_contrast for draw in draws], 1.0, 0.25, 0.5, 1.5)
    check([draw.late_contrast for draw in draws], 1.0, 0.25, 0.5, 1.5)
    assert not any(draw.early_contrast != 1 and draw.late_contrast != 1 for draw in draws)
    orders = [draw.channel_order for draw in draws]
    # Half of the images get a random order, and one in six of those is the old one.
    assert sum(order != (0, 1, 2) for order in orders) / count == pytest.approx(0.5 * 5 / 6, abs=0.04)
    assert len(set(orders)) == 6
    assert {draw_photometric(rng, swap_channels=False).channel_order for _ in range(50)} == {(0, 1, 2)}


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
