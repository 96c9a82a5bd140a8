"""MaskCLIP against the official numbers, and sampling at points against explicit upsampling."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.models.clip import load_clip
from pop3d_jax.models.maskclip import (
    ABSENT_LOGIT,
    CLIP_MEAN,
    CLIP_STD,
    REFINEMENT_SCALE,
    MaskCLIP,
    denoise_prompts,
    normalise,
    normalised_pixels,
    sample_at_points,
    smooth_by_keys,
)

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def clip(golden_file):
    return load_clip(golden_file("clip/tiny_clip")).model


def test_refinement_defaults_are_the_official_thresholds():
    defaults = {
        "pd_thresh": inspect.signature(denoise_prompts).parameters["threshold"].default,
        "ks_thresh": inspect.signature(smooth_by_keys).parameters["threshold"].default,
    }
    assert defaults == {"pd_thresh": 0.5, "ks_thresh": 1.0}


def test_denoising_takes_out_texts_that_no_patch_is_sure_of():
    # Three texts on a row of three patches: the first is certain somewhere, the second likely, the third nowhere.
    probabilities = np.array([[0.9, 0.08, 0.02], [0.3, 0.6, 0.1], [0.5, 0.35, 0.15]])
    logits = jnp.asarray(np.log(probabilities) / REFINEMENT_SCALE, jnp.float32)[None, None]
    other = logits.at[..., 2].set(jnp.log(9.0) / REFINEMENT_SCALE)  # another picture, where the third text is certain
    denoised = denoise_prompts(jnp.concatenate([logits, other]), 0.5)
    np.testing.assert_array_equal(denoised[0, ..., :2], logits[0, ..., :2])
    np.testing.assert_array_equal(denoised[0, ..., 2], ABSENT_LOGIT)
    np.testing.assert_array_equal(denoised[1, ..., 2], other[0, ..., 2])
    stricter = denoise_prompts(logits, 0.7)
    np.testing.assert_array_equal(stricter[..., 1:], ABSENT_LOGIT)
    np.testing.assert_array_equal(stricter[..., 0], logits[..., 0])


def test_smoothing_moves_unsure_patches_only():
    probabilities = np.array([[0.96, 0.04], [0.6, 0.4], [0.1, 0.9]])
    logits = jnp.asarray(np.log(probabilities) / REFINEMENT_SCALE, jnp.float32)[None, :, None]
    keys = np.random.default_rng(0).normal(size=(1, 3, 1, 5)).astype(np.float32)
    smoothed = smooth_by_keys(logits, jnp.asarray(keys), 0.93)[0, :, 0]
    unit = keys[0, :, 0] / np.sqrt((keys[0, :, 0] ** 2).sum(0))
    expected = np.where([[False], [True], [True]], unit @ unit.T @ probabilities, probabilities)
    np.testing.assert_allclose(smoothed, expected, atol=1e-5)


def test_unknown_variant(clip):
    with pytest.raises(ValueError, match="clip_consistent"):
        MaskCLIP(clip, "plus")


def test_teacher_survives_split_and_merge_inside_jit(clip):
    """How the training step holds it: split once, merged inside a plain jax.jit."""
    teacher = MaskCLIP(clip)
    graph, state = nnx.split(teacher)
    side = clip.vision.config.patch_size * 3
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, side, side + 5, 3)), jnp.uint8)
    inside = jax.jit(lambda s, x: nnx.merge(graph, s).dense_features(normalise(x)))(state, images)
    outside = nnx.jit(lambda m, x: m.patches(x).features)(teacher, normalise(images))
    np.testing.assert_allclose(inside, outside, atol=TOLERANCE)


def test_normalise_is_clips_preprocessing():
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 4, 5, 3)).astype(np.uint8)
    expected = (images / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(normalise(jnp.asarray(images)), expected, atol=1e-5)


def upsample(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """F.interpolate(bilinear, align_corners=False) of [rows, columns, d], written out in float64."""
    for axis, size in ((0, height), (1, width)):
        cells = grid.shape[axis]
        source = np.maximum((np.arange(size) + 0.5) * cells / size - 0.5, 0)
        low = np.floor(source).astype(int)
        share = np.expand_dims(source - low, tuple(i for i in range(3) if i != axis))
        high = np.minimum(low + 1, cells - 1)
        grid = np.take(grid, low, axis) * (1 - share) + np.take(grid, high, axis) * share
    return grid


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    height=st.integers(7, 40),
    width=st.integers(7, 40),
    seed=st.integers(0, 1000),
)
def test_sampling_equals_explicit_upsampling(rows, columns, height, width, seed):
    random = np.random.default_rng(seed)
    features = random.normal(size=(2, rows, columns, 3)).astype(np.float32)
    # Up to just inside the last pixel, corners and halves included.
    uv = np.concatenate(
        [
            random.uniform(0, 1, (12, 2)) * [width - 1, height - 1],
            [[0, 0], [width - 1, height - 1], [0.5, 1.5], [1.5, 2.5]],
        ]
    ).astype(np.float32)
    camera = random.integers(0, 2, len(uv)).astype(np.int32)
    maps = np.stack([upsample(grid, height, width) for grid in features.astype(np.float64)])
    column, row = np.round(uv).astype(int).T
    pixel = normalised_pixels(jnp.asarray(uv), (height, width))
    ours = sample_at_points(jnp.asarray(features), jnp.asarray(camera), pixel)
    np.testing.assert_allclose(ours, maps[camera, row, column], atol=2e-5)
