"""MaskCLIP (Zhou et al., ECCV 2022): dense image features in CLIP's text space, the teacher of POP-3D.

The last block's attention is replaced by its value path, so every patch keeps its own content; official code:
`VisionTransformer(return_qkv)` and `MaskClipHead` of the MaskCLIP fork in POP-3D.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from pop3d_jax.models.clip import CLIP
from pop3d_jax.models.clip_towers import VisionTower

# Of RGB values in 0..1, as CLIP was trained; MaskCLIP's configs have the same numbers times 255.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Refinement turns cosines into probabilities with this factor, and knocks out texts with that logit, as official.
REFINEMENT_SCALE = 100.0
ABSENT_LOGIT = -100.0

# The shipped MaskCLIP config runs OpenAI's weights with exact GELU and an epsilon they were not trained with.
# `clip_consistent` keeps what the checkpoint's own config says.
VARIANTS = {
    "official_config": {"activation": "gelu", "layer_norm_epsilon": 1e-6},
    "clip_consistent": {},
}


class DensePatches(NamedTuple):
    """What MaskCLIP's head sees of a patch grid: all `[b, rows, columns, ...]`.

    features: in CLIP's text space, not normalised; values: the value path after the post-LayerNorm, before the
    projection; keys: keys of the last block after its output projection (for key smoothing).
    """

    features: Array
    values: Array
    keys: Array


class MaskCLIP(nnx.Module):
    """A CLIP image tower read densely.

    Args of the constructor:
      clip: where the weights come from; they are shared, not copied.
      variant: a key of `VARIANTS`.

    Raises:
      ValueError: unknown variant.
    """

    def __init__(self, clip: CLIP, variant: str = "official_config"):
        if variant not in VARIANTS:
            raise ValueError(f"unknown MaskCLIP variant {variant!r}: known are {sorted(VARIANTS)}")
        tower = clip.vision
        config = dataclasses.replace(tower.config, **VARIANTS[variant])
        dtype = tower.dtype
        graph, _ = nnx.split(nnx.eval_shape(lambda: VisionTower(config, dtype=dtype, rngs=nnx.Rngs(0))))
        self.vision = nnx.merge(graph, nnx.state(tower))

    def patches(self, images: Float[Array, "batch height width 3"]) -> DensePatches:
        """Dense features of normalised RGB pictures of any size.

        Sides that are no multiple of the patch size are padded with zeros at the bottom and right, as official:
        the grid then covers the padded picture.
        """
        tower, patch = self.vision, self.vision.config.patch_size
        _, height, width, _ = images.shape
        images = jnp.pad(images, ((0, 0), (0, -height % patch), (0, -width % patch), (0, 0)))
        grid = (images.shape[1] // patch, images.shape[2] // patch)
        hidden = tower.pre_layernorm(tower.embed(images))
        *layers, last = tower.layers
        for layer in layers:
            hidden = layer(hidden)
        hidden = hidden[:, 1:]  # the value path mixes no tokens: the class token is not needed any more
        normed = last.layer_norm1(hidden)
        values = hidden + last.self_attn.out_proj(last.self_attn.v_proj(normed))
        values = tower.post_layernorm(values + last.mlp(last.layer_norm2(values)))
        keys = last.self_attn.out_proj(last.self_attn.k_proj(normed))
        return DensePatches(*(x.reshape(x.shape[0], *grid, -1) for x in (tower.projection(values), values, keys)))

    def dense_features(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch rows columns dim"]:
        """Official MaskCLIP features, one per patch, not normalised (see `patches`)."""
        return self.patches(images).features

    def features_at(
        self,
        images: UInt8[Array, "image height width 3"],
        picture: Int[Array, " points"],
        pixel: Float[Array, "points 2"],
    ) -> Float[Array, "points dim"]:
        """Features at pixels of RGB pictures (0..255), bilinearly between patches.

        Args:
          images: pictures of any size.
          picture: which picture each point is read from; must be a valid index.
          pixel: (row, column) of the pixel's centre as shares of the picture (see `normalised_pixels`).
        """
        features = self.dense_features(normalise(images))
        # The grid covers the picture padded to whole patches.
        padded_hw = jnp.array(features.shape[1:3], jnp.float32) * self.vision.config.patch_size
        share = jnp.array(images.shape[1:3], jnp.float32) / padded_hw
        return sample_at_points(features, picture, pixel * share)


def normalise(images: UInt8[Array, "*batch height width 3"]) -> Float[Array, "*batch height width 3"]:
    """CLIP's preprocessing of RGB pictures in 0..255, as float32; meant to run on the device."""
    scale = 1.0 / (255.0 * jnp.array(CLIP_STD, jnp.float32))
    offset = jnp.array(CLIP_MEAN, jnp.float32) / jnp.array(CLIP_STD, jnp.float32)
    return images.astype(jnp.float32) * scale - offset


def cosine_logits(
    features: Float[Array, "*batch dim"], texts: Float[Array, "texts dim"]
) -> Float[Array, "*batch texts"]:
    """Cosine of every feature with every text, no temperature, as MaskCLIP's head classifies patches."""
    features = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features @ (texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)).T


def denoise_prompts(
    logits: Float[Array, "batch rows columns texts"], threshold: float = 0.5
) -> Float[Array, "batch rows columns texts"]:
    """The paper's prompt denoising: texts that no patch is sure of leave the picture (`MaskClipHead.refine_output`).

    Args:
      logits: from `cosine_logits`.
      threshold: a text stays in a picture where some patch gives it at least this probability. Official: 0.5 where
        it is used (`pd_thresh`).

    Returns:
      The logits, `ABSENT_LOGIT` for texts that left.
    """
    best = jax.nn.softmax(REFINEMENT_SCALE * logits, axis=-1).max((1, 2), keepdims=True)
    return jnp.where(best < threshold, ABSENT_LOGIT, logits)


def smooth_by_keys(
    logits: Float[Array, "batch rows columns texts"],
    keys: Float[Array, "batch rows columns width"],
    threshold: float = 1.0,
) -> Float[Array, "batch rows columns texts"]:
    """The paper's key smoothing: unsure patches take over what patches with similar keys say (same function).

    Args:
      logits: from `cosine_logits` or `denoise_prompts`.
      keys: of the same patches (`DensePatches.keys`).
      threshold: patches whose best probability is below it are smoothed. Official: 1.0 where it is used, all that
        are not entirely sure (`ks_thresh`).

    Returns:
      Probabilities for patches left alone, sums of probabilities weighted by similarity for smoothed ones.
    """
    batch, rows, columns, texts = logits.shape
    probabilities = jax.nn.softmax(REFINEMENT_SCALE * logits, axis=-1).reshape(batch, -1, texts)
    keys = keys.reshape(batch, rows * columns, -1)
    # Each channel is divided by its length over the patches, not each key by its own: so the official code does it.
    keys = keys / jnp.maximum(jnp.linalg.norm(keys, axis=1, keepdims=True), 1e-12)
    smoothed = keys @ (keys.swapaxes(1, 2) @ probabilities)
    unsure = probabilities.max(-1, keepdims=True) < threshold
    return jnp.where(unsure, smoothed, probabilities).reshape(logits.shape)


def normalised_pixels(uv: Float[Array, "points 2"], image_hw: tuple[int, int]) -> Float[Array, "points 2"]:
    """Where the projected points (u right, v down, pixels) read the picture: the rounded pixel's centre.

    Official targets are read at the rounded pixel (`generate_projections_nuscenes.py`); half rounds to even.

    Returns:
      (row, column) of the pixel's centre, both as shares of the picture's height and width, so that they hold
      at any resolution.
    """
    height, width = image_hw
    rounded = jnp.round(uv)
    return jnp.stack([(rounded[:, 1] + 0.5) / height, (rounded[:, 0] + 0.5) / width], axis=1)


def sample_at_points(
    features: Float[Array, "camera rows columns dim"],
    camera: Int[Array, " points"],
    pixel: Float[Array, "points 2"],
) -> Float[Array, "points dim"]:
    """Reads patch features at points of the pictures, bilinearly.

    Equals upsampling each grid to its picture's size (bilinear, align_corners=False, clamped at the border) and
    reading the pixel, without ever building that map.

    Args:
      features: one grid per camera.
      camera: which picture each point is read from; must be a valid index.
      pixel: (row, column) as shares of the picture that the grid covers, pixel centres (see `normalised_pixels`).
    """
    size = jnp.array(features.shape[1:3], jnp.float32)
    return sample_cells(features, camera, pixel * size - 0.5)


def sample_cells(
    features: Float[Array, "camera rows columns dim"],
    camera: Int[Array, " points"],
    position: Float[Array, "points 2"],
) -> Float[Array, "points dim"]:
    """Reads patch features bilinearly between cells.

    Args:
      features: one grid per camera.
      camera: which grid each point is read from; must be a valid index.
      position: (row, column) in cells, 0 the centre of the first one; clamped at the first and the last.
    """
    rows, columns = features.shape[1:3]
    position = jnp.clip(position, 0.0, jnp.array([rows - 1, columns - 1], jnp.float32))
    low = jnp.floor(position)
    weight = (position - low).astype(features.dtype)
    low = low.astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.array([rows - 1, columns - 1]))

    flat = features.reshape(-1, features.shape[-1])

    def read(row: Array, column: Array) -> Array:
        return flat[(camera * rows + row) * columns + column]

    row_weight, column_weight = weight[:, :1], weight[:, 1:]
    top = read(low[:, 0], low[:, 1]) * (1 - column_weight) + read(low[:, 0], high[:, 1]) * column_weight
    bottom = read(high[:, 0], low[:, 1]) * (1 - column_weight) + read(high[:, 0], high[:, 1]) * column_weight
    return top * (1 - row_weight) + bottom * row_weight
