"""MaskCLIP+: the published teacher of POP-3D, from a camera's picture to the features of single pixels.

Every step follows the official extraction (`tools/extract_features.py` of the MaskCLIP fork in POP-3D): OpenCV's
resize of 8-bit pictures, ImageNet's normalisation, `DeepLabV2`, and two bilinear resizes of the features, first to the
network's input, from there to the picture. Those two maps of 3 to 4 GB a picture are never built: a point reads the
sixteen cells that they would mix.
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from pop3d_jax.models.deeplab import DeepLabV2

# Of RGB values in 0..255, as the backbone was trained.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
# The longer and the shorter side that a picture is fitted into, keeping its ratio.
IMAGE_SCALE = (2048, 1024)
_WEIGHT_ONE = 2**11  # OpenCV's resize counts weights in this many steps


class MaskCLIPPlus(nnx.Module):
    """The MaskCLIP+ student as a teacher of points.

    Attributes:
      network: from `maskclip_plus_weights.load_network`.
      image_scale: pixels; longer and shorter side that pictures are fitted into.
    """

    def __init__(self, network: DeepLabV2, image_scale: tuple[int, int] = IMAGE_SCALE):
        self.network = network
        self.image_scale = image_scale

    def dense_features(self, images: UInt8[Array, "image height width 3"]) -> Float[Array, "image rows columns dim"]:
        """Features of RGB pictures (0..255) of any size, a cell per 8 x 8 pixels of the resized picture.

        Not normalised and never negative, as the official targets are.
        """
        return self.network(normalise(resize_pictures(images, fitted_hw(images.shape[1:3], self.image_scale))))

    def features_at(
        self,
        images: UInt8[Array, "image height width 3"],
        picture: Int[Array, " points"],
        pixel: Float[Array, "points 2"],
    ) -> Float[Array, "points dim"]:
        """Official features at pixels of the pictures.

        Args:
          images: RGB, 0..255. To be the official targets, as the camera took them: 900 x 1600 for nuScenes.
          picture: which picture each point is read from; must be a valid index.
          pixel: (row, column) of the pixel's centre as shares of the picture (see `maskclip.normalised_pixels`).
        """
        image_hw = images.shape[1:3]
        row, column = containing_pixel(pixel, image_hw)
        sizes = (fitted_hw(image_hw, self.image_scale), image_hw)
        return sample_resized(self.dense_features(images), sizes, picture, row, column)


def fitted_hw(image_hw: tuple[int, int], image_scale: tuple[int, int] = IMAGE_SCALE) -> tuple[int, int]:
    """Height and width of a picture resized to fit into `image_scale`, by mmcv's rule: 900 x 1600 -> 1024 x 1820."""
    factor = min(max(image_scale) / max(image_hw), min(image_scale) / min(image_hw))
    height, width = (int(side * factor + 0.5) for side in image_hw)
    return height, width


def resize_pictures(images: UInt8[Array, "image h w 3"], hw: tuple[int, int]) -> UInt8[Array, "image height width 3"]:
    """Resizes 8-bit pictures, byte for byte as OpenCV's `resize` with INTER_LINEAR.

    In integers, as there: weights of 11 bits, 4 bits dropped between the two directions. Enlarging and reducing
    alike look at two neighbours a direction; reducing to exactly half, which OpenCV hands to another algorithm, is
    not copied.
    """
    low, high, low_weight, high_weight = _opencv_neighbours(images.shape[2], hw[1])
    # At the left and right border OpenCV gives one pixel the whole weight, at the top and bottom it mixes a row with
    # itself; the two differ by rounding.
    alone = (low < 0) | (high >= images.shape[2])
    low_weight, high_weight = np.where(alone, _WEIGHT_ONE, low_weight), np.where(alone, 0, high_weight)
    # The lone pixel is the nearest one inside, which clipping makes of either neighbour.
    low, high = (np.clip(index, 0, images.shape[2] - 1) for index in (low, high))
    left, right = (images[:, :, index].astype(jnp.int32) for index in (low, high))
    rows = (left * low_weight[:, None] + right * high_weight[:, None]) >> 4

    low, high, low_weight, high_weight = _opencv_neighbours(images.shape[1], hw[0])
    low, high = (np.clip(index, 0, images.shape[1] - 1) for index in (low, high))
    top, bottom = ((rows[:, i] * w[:, None, None]) >> 16 for i, w in ((low, low_weight), (high, high_weight)))
    return ((top + bottom + 2) >> 2).astype(jnp.uint8)


def normalise(images: UInt8[Array, "*batch height width 3"]) -> Float[Array, "*batch height width 3"]:
    """ImageNet's normalisation of RGB pictures in 0..255, as float32."""
    mean, std = (jnp.array(values, jnp.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.astype(jnp.float32) - mean) / std


def containing_pixel(
    pixel: Float[Array, "points 2"], image_hw: tuple[int, int]
) -> tuple[Int[Array, " points"], Int[Array, " points"]]:
    """Row and column of the pixel that contains a position given as shares of the picture.

    A pixel's centre is half a pixel from its borders, so that the integer survives the shares' float32 exactly.
    """
    row, column = (
        jnp.clip(jnp.floor(pixel[:, axis] * side), 0, side - 1).astype(jnp.int32) for axis, side in enumerate(image_hw)
    )
    return row, column


def sample_resized(
    features: Float[Array, "image rows columns dim"],
    sizes: Sequence[tuple[int, int]],
    picture: Int[Array, " points"],
    row: Int[Array, " points"],
    column: Int[Array, " points"],
) -> Float[Array, "points dim"]:
    """Reads maps at pixels as if they had been resized step by step, without building anything.

    Bilinear, align_corners=False, as PyTorch's `interpolate`, down to its float32 positions.

    Args:
      features: one map per picture.
      sizes: height and width after each resize.
      picture: which map each point is read from; must be a valid index.
      row, column: pixel of the last size; must lie inside.
    """
    rows, columns, dim = features.shape[1:]
    row_cells, row_weights = (jnp.asarray(x)[row] for x in _resize_taps([rows, *(height for height, _ in sizes)]))
    column_cells, column_weights = (jnp.asarray(x)[column] for x in _resize_taps([columns, *(w for _, w in sizes)]))
    flat = features.reshape(-1, dim)
    # Sums over taps written out: one fused loop over the points, where a gather of all taps at once would need
    # sixteen times the memory of the result.
    total = jnp.zeros((len(row), dim), features.dtype)
    for i in range(row_cells.shape[1]):
        for j in range(column_cells.shape[1]):
            weight = row_weights[:, i] * column_weights[:, j]
            total += weight[:, None] * flat[(picture * rows + row_cells[:, i]) * columns + column_cells[:, j]]
    return total


def _opencv_neighbours(cells: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each of `size` pixels its two neighbours among `cells`, which may lie outside, and their integer weights."""
    position = ((np.arange(size) + 0.5) * (cells / size) - 0.5).astype(np.float32)
    low = np.floor(position)
    share = position - low
    weights = (np.rint(part * np.float32(_WEIGHT_ONE)).astype(np.int32) for part in (1 - share, share))
    low = low.astype(np.int32)
    return low, low + 1, *weights


def _resize_taps(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What each position of the last size is made of: cells of the first size, and their weights.

    Args:
      sizes: lengths of one axis before, between and after the resizes.

    Returns:
      Two arrays [last size, 2 ** resizes], of int32 and float32.
    """
    cells = np.arange(sizes[-1], dtype=np.int32)[:, None]
    weights = np.ones((sizes[-1], 1), np.float32)
    for before, after in reversed(list(itertools.pairwise(sizes))):
        scale = np.float32(before) / np.float32(after)
        position = np.maximum(scale * (np.arange(after, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
        low = np.minimum(position.astype(np.int32), before - 1)
        neighbours = np.stack([low, np.minimum(low + 1, before - 1)], axis=1)
        share = position - low.astype(np.float32)
        shares = np.stack([1 - share, share], axis=1)
        weights = (weights[:, :, None] * shares[cells]).reshape(sizes[-1], -1)
        cells = neighbours[cells].reshape(sizes[-1], -1)
    return cells, weights
