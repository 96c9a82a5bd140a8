"""From pixels to network input, on the device: channel order, photometric distortion, mean, padding.

The host hands over the bytes that a JPEG decodes to; a quarter of what float32 images would be.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from pop3d_jax.nuscenes import IMAGE_MEAN_BGR

# The network's strides divide its input: sides are padded to multiples of this.
_PAD_MULTIPLE = 32

BRIGHTNESS_DELTA = 32.0
CONTRAST_RANGE = (0.5, 1.5)
SATURATION_RANGE = (0.5, 1.5)
HUE_DELTA = 18.0  # degrees


class PhotometricDraw(NamedTuple):
    """What every image gets.

    Attributes:
      brightness: added to all channels, in units of 0..255; neutral is 0.
      early_contrast: factor before the colour change; neutral is 1.
      saturation: factor on the saturation; neutral is 1.
      hue: added to the hue, degrees; neutral is 0.
      late_contrast: factor after the colour change; neutral is 1.
      channel_order: which input channel every output channel shows.
    """

    brightness: Float[Array, "*images"]
    early_contrast: Float[Array, "*images"]
    saturation: Float[Array, "*images"]
    hue: Float[Array, "*images"]
    late_contrast: Float[Array, "*images"]
    channel_order: Int[Array, "*images 3"]


def draw_photometric(key: PRNGKeyArray, images: tuple[int, ...], *, swap_channels: bool = True) -> PhotometricDraw:
    """Draws distortions: each part with probability one half, the contrast either early or late.

    Source: the official `PhotoMetricDistortionMultiViewImage`, which draws for every camera on its own.

    Args:
      key: the source of randomness.
      images: leading axes of the images, such as (batch, camera).
      swap_channels: whether the last part, a random order of the channels, may happen. Official: yes. It makes
        colours meaningless to the student, which is not wanted where the teacher speaks of colours.
    """
    keys = jax.random.split(key, 6)

    def perhaps(key: PRNGKeyArray, low: float, high: float, otherwise: float) -> Array:
        use, value = jax.random.split(key)
        drawn = jax.random.uniform(value, images, minval=low, maxval=high)
        return jnp.where(jax.random.bernoulli(use, shape=images), drawn, otherwise)

    contrast = perhaps(keys[1], *CONTRAST_RANGE, 1.0)
    early = jax.random.bernoulli(keys[2], shape=images)
    same = jnp.broadcast_to(jnp.arange(3), (*images, 3))
    use, order = jax.random.split(keys[5])
    swapped = jax.random.permutation(order, same, axis=-1, independent=True)
    swaps = jax.random.bernoulli(use, shape=images) & swap_channels
    return PhotometricDraw(
        brightness=perhaps(keys[0], -BRIGHTNESS_DELTA, BRIGHTNESS_DELTA, 0.0),
        early_contrast=jnp.where(early, contrast, 1.0),
        saturation=perhaps(keys[3], *SATURATION_RANGE, 1.0),
        hue=perhaps(keys[4], -HUE_DELTA, HUE_DELTA, 0.0),
        late_contrast=jnp.where(early, 1.0, contrast),
        channel_order=jnp.where(swaps[..., None], swapped, same),
    )


def _change_colour(
    planes: tuple[Array, Array, Array], saturation: Float[Array, "*images 1 1"], hue: Float[Array, "*images 1 1"]
) -> list[Array]:
    """HSV and back in one go, as OpenCV does it for floats: value in 0..255, nothing clipped.

    A channel is value - sign(value) * chroma * (how far the hue is from the channel, in 0..1).
    """
    blue, green, red = planes
    value = jnp.maximum(jnp.maximum(blue, green), red)
    chroma = value - jnp.minimum(jnp.minimum(blue, green), red)
    inverse = 1.0 / (chroma + np.finfo(np.float32).eps)
    # The hue in sixths of the circle, red at 0, green at 2, blue at 4.
    sixths = jnp.where(
        value == red,
        (green - blue) * inverse,
        jnp.where(value == green, (blue - red) * inverse + 2.0, (red - green) * inverse + 4.0),
    )
    sixths = (sixths + hue / 60.0) % 6.0
    chroma = chroma * jnp.sign(value) * saturation
    # Distance from the pure channel, 0 within one sixth of it and 1 from two sixths on.
    distances = (
        jnp.clip(jnp.abs(sixths - 4.0) - 1.0, 0.0, 1.0),
        jnp.clip(jnp.abs(sixths - 2.0) - 1.0, 0.0, 1.0),
        jnp.clip(2.0 - jnp.abs(sixths - 3.0), 0.0, 1.0),
    )
    return [value - chroma * distance for distance in distances]


def apply_photometric(
    images_bgr: Float[Array, "*images height width 3"], draw: PhotometricDraw
) -> Float[Array, "*images height width 3"]:
    """Distorts images as drawn.

    Args:
      images_bgr: 0..255, before the mean is subtracted.
      draw: what to do with each.

    Returns:
      Values may leave 0..255, as official.
    """

    def of_pixels(values: Array) -> Array:
        return values[..., None, None]

    images = (images_bgr + of_pixels(draw.brightness)[..., None]) * of_pixels(draw.early_contrast)[..., None]
    blue, green, red = (images[..., channel] for channel in range(3))
    changed = _change_colour((blue, green, red), of_pixels(draw.saturation), of_pixels(draw.hue))
    # Where all channels are negative, even the official trip to HSV and back without a change is not neutral.
    neutral = (draw.saturation == 1.0) & (draw.hue == 0.0)
    stays = of_pixels(neutral) & (jnp.maximum(jnp.maximum(blue, green), red) >= 0.0)
    images = jnp.stack([jnp.where(stays, *pair) for pair in zip((blue, green, red), changed, strict=True)], axis=-1)
    images = images * of_pixels(draw.late_contrast)[..., None]
    return jnp.take_along_axis(images, of_pixels(draw.channel_order).swapaxes(-1, -3), axis=-1)


def network_images(
    pixels: UInt8[Array, "*images height width 3"], draw: PhotometricDraw | None = None
) -> Float[Array, "*images padded_height padded_width 3"]:
    """RGB pixels to network input: BGR, distorted if asked for, minus the mean, zero-padded below and on the right.

    Args:
      pixels: as decoded.
      draw: distortions, of training only.

    Returns:
      float32; sides rounded up to multiples of 32.
    """
    images = jnp.asarray(pixels)[..., ::-1].astype(jnp.float32)
    if draw is not None:
        images = apply_photometric(images, draw)
    images = images - jnp.asarray(IMAGE_MEAN_BGR, jnp.float32)
    height, width = images.shape[-3:-1]
    padding = ((0, -height % _PAD_MULTIPLE), (0, -width % _PAD_MULTIPLE), (0, 0))
    return jnp.pad(images, ((0, 0),) * (images.ndim - 3) + padding)
