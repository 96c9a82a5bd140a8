"""Image augmentation of the official training: photometric distortion on the host, GridMask on the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

BRIGHTNESS_DELTA = 32.0
CONTRAST_RANGE = (0.5, 1.5)
SATURATION_RANGE = (0.5, 1.5)
HUE_DELTA = 18.0  # degrees

GRID_MASK_RATIO = 0.5
GRID_MASK_PROBABILITY = 0.7


@dataclasses.dataclass(frozen=True)
class PhotometricDraw:
    """What one image gets. The defaults change nothing.

    Attributes:
      brightness: added to all channels, in units of 0..255.
      early_contrast: factor before the colour change.
      saturation: factor on the saturation.
      hue: added to the hue, degrees.
      late_contrast: factor after the colour change.
      channel_order: which input channel every output channel shows.
    """

    brightness: float = 0.0
    early_contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    late_contrast: float = 1.0
    channel_order: tuple[int, int, int] = (0, 1, 2)


def draw_photometric(rng: np.random.Generator, *, swap_channels: bool = True) -> PhotometricDraw:
    """Draws a distortion: each part with probability one half, the contrast either early or late.

    Source: the official `PhotoMetricDistortionMultiViewImage`, which draws for every camera on its own.

    Args:
      rng: the source of randomness.
      swap_channels: whether the last part, a random order of the channels, may happen. Official: yes. It makes
        colours meaningless to the student, which is not wanted where the teacher speaks of colours.
    """

    def perhaps(low: float, high: float, otherwise: float) -> float:
        return float(rng.uniform(low, high)) if rng.integers(2) else otherwise

    brightness = perhaps(-BRIGHTNESS_DELTA, BRIGHTNESS_DELTA, 0.0)
    early = bool(rng.integers(2))
    contrast = perhaps(*CONTRAST_RANGE, 1.0)
    saturation = perhaps(*SATURATION_RANGE, 1.0)
    hue = perhaps(-HUE_DELTA, HUE_DELTA, 0.0)
    order = tuple(int(i) for i in rng.permutation(3)) if swap_channels and rng.integers(2) else (0, 1, 2)
    return PhotometricDraw(
        brightness=brightness,
        early_contrast=contrast if early else 1.0,
        saturation=saturation,
        hue=hue,
        late_contrast=1.0 if early else contrast,
        channel_order=order,
    )


def _change_colour(planes: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """HSV and back in one go, as OpenCV does it for floats: value in 0..255, nothing clipped.

    A channel is value - sign(value) * chroma * (how far the hue is from the channel, in 0..1). Where only the
    saturation changes, that last factor need not be known.
    """
    blue, green, red = planes
    value = np.maximum(np.maximum(blue, green), red)
    sign = np.sign(value)
    if hue == 0.0:
        # value - channel is the chroma times the unknown factor.
        return value - (sign * np.float32(saturation)) * (value - planes)
    chroma = value - np.minimum(np.minimum(blue, green), red)
    inverse = np.float32(1) / (chroma + np.finfo(np.float32).eps)
    # The hue in sixths of the circle, red at 0, green at 2, blue at 4.
    sixths = np.where(
        value == red,
        (green - blue) * inverse,
        np.where(value == green, (blue - red) * inverse + np.float32(2), (red - green) * inverse + np.float32(4)),
    )
    sixths += np.float32(hue / 60)
    sixths -= np.float32(6) * (sixths >= 6)
    sixths += np.float32(6) * (sixths < 0)
    chroma *= sign * np.float32(saturation)
    # Distance from the pure channel, 0 within one sixth of it and 1 from two sixths on.
    distances = (
        np.clip(np.abs(sixths - np.float32(4)) - 1, 0, 1),
        np.clip(np.abs(sixths - np.float32(2)) - 1, 0, 1),
        np.clip(2 - np.abs(sixths - np.float32(3)), 0, 1),
    )
    return np.stack([value - chroma * distance for distance in distances])


def apply_photometric(
    image_bgr: Float32[np.ndarray, "height width 3"], draw: PhotometricDraw
) -> Float32[np.ndarray, "height width 3"]:
    """Distorts an image as drawn.

    Args:
      image_bgr: 0..255, before the mean is subtracted.
      draw: what to do.

    Returns:
      A new image; values may leave 0..255, as official.
    """
    planes = np.ascontiguousarray(np.moveaxis(image_bgr, -1, 0))
    planes = (planes + np.float32(draw.brightness)) * np.float32(draw.early_contrast)
    # Where all channels are negative, even the official trip to HSV and back without a change is not neutral.
    if draw.saturation != 1.0 or draw.hue != 0.0 or planes.min() < 0:
        planes = _change_colour(planes, draw.saturation, draw.hue)
    planes *= np.float32(draw.late_contrast)
    return np.ascontiguousarray(np.moveaxis(planes[list(draw.channel_order)], 0, -1))


def photometric_distortion(
    image_bgr: Float32[np.ndarray, "height width 3"], rng: np.random.Generator, *, swap_channels: bool = True
) -> Float32[np.ndarray, "height width 3"]:
    """Distorts brightness, contrast, saturation, hue and channel order of one image at random, as official.

    Args:
      image_bgr: 0..255, before the mean is subtracted.
      rng: the source of randomness.
      swap_channels: see `draw_photometric`.

    Returns:
      A new image.
    """
    return apply_photometric(image_bgr, draw_photometric(rng, swap_channels=swap_channels))


def draw_grid_mask(key: PRNGKeyArray, height: int, *, probability: float = GRID_MASK_PROBABILITY) -> Int[Array, "3"]:
    """Draws the stripes of a GridMask.

    Source: `dataloader/grid_mask.py` of POP-3D.

    Args:
      key: the source of randomness.
      height: of the images as the network sees them, at least 3.
      probability: that a mask is used at all.

    Returns:
      (period, first row, first column), in pixels of the enlarged mask; (-1, -1, -1) for no mask.

    Raises:
      ValueError: if the images are too low for any period.
    """
    if height < 3:
        raise ValueError(f"GridMask draws its period from [2, height - 1]; a height of {height} leaves none")
    use_key, period_key, row_key, column_key = jax.random.split(key, 4)
    period = jax.random.randint(period_key, (), 2, height)
    drawn = jnp.stack(
        [period, jax.random.randint(row_key, (), 0, period), jax.random.randint(column_key, (), 0, period)]
    )
    return jnp.where(jax.random.uniform(use_key) < probability, drawn, -1)


def grid_mask(
    draw: Int[Array, "3"], height: int, width: int, *, ratio: float = GRID_MASK_RATIO
) -> Float[Array, "{height} {width}"]:
    """The mask of a draw: 1 in stripes of rows and of columns, 0 between them.

    The official mask is drawn half again as large as the image and cut out of its middle, it has only as many
    stripes as whole periods fit, and its mode 1 keeps the stripes. Multiply the images by it.

    Args:
      draw: from `draw_grid_mask`.
      height: of the images.
      width: of the images.
      ratio: width of a stripe, as a share of the period.

    Returns:
      1 where the image is kept.
    """
    period, first_row, first_column = draw[0], draw[1], draw[2]
    # Rounded in float64 on the host, as the official code rounds.
    periods = np.arange(height)
    stripe_lengths = np.minimum(np.maximum((periods * ratio + 0.5).astype(np.int32), 1), periods - 1)
    applied = period > 0
    period = jnp.where(applied, period, 2)
    length = jnp.asarray(stripe_lengths)[period]

    def in_stripe(size: int, first: jax.Array) -> jax.Array:
        enlarged = int(1.5 * size)
        distance = jnp.arange(size) + (enlarged - size) // 2 - first
        return (distance >= 0) & (distance // period < enlarged // period) & (distance % period < length)

    kept = in_stripe(height, first_row)[:, None] | in_stripe(width, first_column)
    return (kept | ~applied).astype(jnp.float32)


def draw_volume_turn(rng: np.random.Generator, *, flip: bool, degrees: float) -> Float[np.ndarray, "4 4"]:
    """A random mirroring and turn of the volume about the lidar's z axis; not part of the official recipe.

    Applied to the points, and its inverse to the calibration from the right, it changes where things are in the volume
    and leaves alone what the cameras see: the network cannot learn scenes by heart place by place.

    Args:
      rng: source of the draw.
      flip: whether x and y are each mirrored in half of the draws.
      degrees: the angle is uniform between minus and plus this.
    """
    angle = np.radians(rng.uniform(-degrees, degrees)) if degrees else 0.0
    mirror = rng.choice([-1.0, 1.0], 2) if flip else np.ones(2)
    turn = np.eye(4)
    turn[:2, :2] = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * mirror
    return turn
