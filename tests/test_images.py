"""From pixels to network input: the official photometric distortion, and what padding and mean do."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.images import PhotometricDraw, apply_photometric, draw_photometric, network_images
from pop3d_jax.nuscenes import IMAGE_MEAN_BGR

_APPLY = jax.jit(apply_photometric)


def _image(seed, height=5, width=7):
    return np.random.default_rng(seed).uniform(0, 255, (height, width, 3)).astype(np.float32)


def _draw(brightness=0.0, early_contrast=1.0, saturation=1.0, hue=0.0, late_contrast=1.0, channel_order=(0, 1, 2)):
    values = (brightness, early_contrast, saturation, hue, late_contrast)
    return PhotometricDraw(*(jnp.float32(value) for value in values), jnp.asarray(channel_order, jnp.int32))


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
    np.testing.assert_allclose(_APPLY(image, _draw(saturation=saturation, hue=hue)), expected, atol=2e-2)


def test_parts_act_in_the_official_order():
    image = _image(1)
    np.testing.assert_array_equal(_APPLY(image, _draw()), image)
    np.testing.assert_allclose(_APPLY(image, _draw(brightness=10.0, early_contrast=1.2)), (image + 10) * 1.2, rtol=1e-6)
    draw = _draw(brightness=10.0, late_contrast=0.7, channel_order=(2, 0, 1))
    np.testing.assert_allclose(_APPLY(image, draw), ((image + 10) * 0.7)[..., [2, 0, 1]], rtol=1e-6)
    # Contrast and hue commute, but brightness does not commute with either.
    separate = _APPLY(_APPLY(image, _draw(brightness=20.0)), _draw(saturation=1.4, hue=12.0))
    np.testing.assert_allclose(_APPLY(image, _draw(brightness=20.0, saturation=1.4, hue=12.0)), separate, atol=1e-3)


def test_below_zero_the_trip_to_hsv_mirrors_the_channels():
    """OpenCV divides the chroma by |value|: where the largest channel is negative, chroma is added instead."""
    image = np.array([[[-3.0, -5.0, -9.0], [-1.0, 2.0, 0.0]]], np.float32)
    expected = [[[-3.0, -1.0, 3.0], [-1.0, 2.0, 0.0]]]
    np.testing.assert_allclose(_APPLY(image, _draw()), expected, atol=1e-5)
    np.testing.assert_allclose(_APPLY(image, _draw(hue=1e-6)), expected, atol=1e-5)


def test_every_image_gets_its_own_distortion():
    images = np.stack([_image(seed) for seed in range(6)]).reshape(2, 3, 5, 7, 3)
    draw = draw_photometric(jax.random.key(3), (2, 3))
    together = _APPLY(images, draw)
    for index in np.ndindex(2, 3):
        alone = _APPLY(images[index], jax.tree.map(lambda values, index=index: values[index], draw))
        np.testing.assert_allclose(together[index], alone, atol=1e-4)
    again = draw_photometric(jax.random.key(3), (2, 3))
    assert all(jnp.array_equal(*pair) for pair in zip(draw, again, strict=True))
    other = draw_photometric(jax.random.key(4), (2, 3))
    assert not jnp.array_equal(draw.brightness, other.brightness)


def test_draws_follow_the_official_distributions():
    count = 5000
    draws = jax.tree.map(np.asarray, draw_photometric(jax.random.key(0), (count,)))

    def check(values, neutral, share, low, high):
        used = values[values != neutral]
        assert len(used) / count == pytest.approx(share, abs=0.03)
        assert used.min() >= low
        assert used.max() <= high
        # Uniform: mean and spread of the interval.
        assert used.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
        assert used.std() == pytest.approx((high - low) / np.sqrt(12), rel=0.05)

    check(draws.brightness, 0.0, 0.5, -32, 32)
    check(draws.saturation, 1.0, 0.5, 0.5, 1.5)
    check(draws.hue, 0.0, 0.5, -18, 18)
    check(draws.early_contrast, 1.0, 0.25, 0.5, 1.5)
    check(draws.late_contrast, 1.0, 0.25, 0.5, 1.5)
    assert not np.any((draws.early_contrast != 1) & (draws.late_contrast != 1))
    # The parts are drawn independently of each other.
    used = [draws.brightness != 0, draws.saturation != 1, draws.hue != 0]
    assert np.abs(np.corrcoef(used)[np.triu_indices(3, 1)]).max() < 0.05
    orders, counts = np.unique(draws.channel_order, axis=0, return_counts=True)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile([0, 1, 2], (6, 1)))
    # Half of the images get a random order, and one in six of those is the old one.
    np.testing.assert_allclose(counts / count, [0.5 + 0.5 / 6] + [0.5 / 6] * 5, atol=0.02)
    still = draw_photometric(jax.random.key(0), (50,), swap_channels=False)
    np.testing.assert_array_equal(still.channel_order, np.tile([0, 1, 2], (50, 1)))


def test_network_input_is_bgr_minus_the_mean_padded_with_zeros():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 36, 64, 3), np.uint8)
    images = np.asarray(jax.jit(network_images)(jnp.asarray(pixels)))
    assert images.shape == (2, 64, 64, 3)
    expected = pixels[..., ::-1].astype(np.float32) - np.array(IMAGE_MEAN_BGR, np.float32)
    np.testing.assert_array_equal(images[:, :36], expected)
    assert not images[:, 36:].any()
    draw = jax.tree.map(lambda value: jnp.broadcast_to(value, (2, *value.shape)), _draw(brightness=7.0))
    bright = np.asarray(network_images(jnp.asarray(pixels), draw))
    np.testing.assert_allclose(bright[:, :36], expected + 7.0, atol=1e-4)
    assert not bright[:, 36:].any()
