"""Augmentation: GridMask of the official training, on the device, and turns of the volume, on the host.

The official photometric distortion is in `pop3d_jax/images.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

GRID_MASK_RATIO = 0.5
GRID_MASK_PROBABILITY = 0.7


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
