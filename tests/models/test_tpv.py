"""The encoder: batches, cameras and rematerialisation done right (its parts' numbers: test_golden.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pop3d_jax.models import tpv_attention
from pop3d_jax.models.tpv import TPVEncoder
from pop3d_jax.models.tpv_geometry import (
    PLANES,
    plane_views,
)

VOLUME = ((-51.2, -51.2, -5.0), (51.2, 51.2, 3.0))


def _ring_of_cameras(seed: int, batch: int, cameras: int, image_hw: tuple[int, int]) -> jax.Array:
    """Calibrations like a car's: cameras around, each rig turned and shifted a little."""
    rng = np.random.default_rng(seed)
    matrices = np.zeros((batch, cameras, 4, 4))
    for item in range(batch):
        for camera in range(cameras):
            yaw = 2 * np.pi * camera / cameras + rng.normal(0, 0.2)
            forward, right = np.array([np.sin(yaw), np.cos(yaw), 0]), np.array([np.cos(yaw), -np.sin(yaw), 0])
            rotation = np.stack([right, [0, 0, -1], forward])
            h, w = image_hw
            intrinsics = np.array([[0.8 * w, 0, w / 2], [0, 0.8 * w, h / 2], [0, 0, 1]])
            transform = np.eye(4)
            transform[:3, :3] = intrinsics @ rotation
            transform[:3, 3] = intrinsics @ rotation @ rng.normal(0, 0.3, 3)
            matrices[item, camera] = transform
    return jnp.asarray(matrices, jnp.float32)


def _encoder_case(batch=3, cameras=2, dropout_rate=0.0, remat=False, **changes):
    """A small encoder with other sizes than the official ones, all weights random, and its inputs."""
    sizes = {
        "num_layers": 1,
        "embed_dims": 16,
        "num_heads": 2,
        "self_attention_points": 3,
        "cross_attention_anchors": (2, 3, 3),
        "cross_attention_points": (4, 3, 6),
        "feedforward_dims": 24,
    } | changes
    levels = ((4, 7), (2, 4))
    image_hw = (32, 56)
    encoder = TPVEncoder(
        (7, 5, 3),
        *VOLUME,
        num_cameras=cameras,
        num_levels=len(levels),
        dropout_rate=dropout_rate,
        remat=remat,
        implementation="gather",
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
        **sizes,
    )
    graph, state = nnx.split(encoder)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    state = jax.tree.unflatten(
        tree, [leaf + 0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )
    features = tuple(
        jax.random.normal(jax.random.key(i), (batch, cameras, *level, sizes["embed_dims"]))
        for i, level in enumerate(levels)
    )
    return graph, state, features, _ring_of_cameras(0, batch, cameras, image_hw), image_hw


@pytest.mark.slow
def test_a_batch_is_its_items_one_by_one():
    graph, state, features, lidar_to_image, image_hw = _encoder_case()
    encode = jax.jit(lambda state, f, m: nnx.merge(graph, state)(f, m, image_hw))
    together = encode(state, features, lidar_to_image)
    for i in range(len(lidar_to_image)):
        alone = encode(state, tuple(f[i : i + 1] for f in features), lidar_to_image[i : i + 1])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i : i + 1], b, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_rematerialised_layers_and_slices_change_nothing(monkeypatch):
    def loss_and_gradients(remat):
        graph, state, features, lidar_to_image, image_hw = _encoder_case(remat=remat)

        def loss(state, features):
            planes = nnx.merge(graph, state)(features, lidar_to_image, image_hw)
            return sum((p**2 * jnp.arange(p.shape[-1])).sum() for p in planes)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(state, features)

    plain = loss_and_gradients(False)
    monkeypatch.setattr(tpv_attention, "_SAMPLES_PER_STEP", 50)
    other = loss_and_gradients(True)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(plain))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())


@pytest.mark.slow
def test_tokens_no_camera_sees_get_the_bias_only():
    graph, state, features, lidar_to_image, image_hw = _encoder_case(cameras=1)

    @jax.jit
    def encode(state):
        capture = {}
        nnx.merge(graph, state)(features, lidar_to_image, image_hw, capture=capture)
        return capture

    capture = encode(state)
    unseen = ~np.concatenate([np.asarray(capture[f"visible_{p}"]).any((1, 3)) for p in PLANES], axis=1)
    assert unseen.any()
    bias = nnx.merge(graph, state).layers[0].cross_attention.output_proj.bias[...]
    added = np.asarray(capture["layer0.cross_attention"] - capture["layer0.norm0"])
    np.testing.assert_allclose(added[unseen], np.broadcast_to(bias, added[unseen].shape), atol=1e-5)
    assert np.abs(added[~unseen] - np.asarray(bias)).max() > 1e-2


def test_order_puts_participants_first():
    rng = np.random.default_rng(0)
    visible = jnp.asarray(rng.random((2, 3, 11, 4)) < 0.2)
    views = plane_views(jnp.zeros((2, 3, 11, 4, 2)), visible)
    sorted_hits = np.take_along_axis(np.asarray(views.hit), np.asarray(views.order), -1)
    assert np.all(np.diff(sorted_hits.astype(int), axis=-1) <= 0)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(views.order), np.asarray(views.rank), -1)[0, 0], range(11)
    )


@pytest.mark.slow
def test_dropout_needs_a_key_and_follows_it():
    graph, state, features, lidar_to_image, image_hw = _encoder_case(dropout_rate=0.3)

    @jax.jit
    def encode(state, key):
        return nnx.merge(graph, state)(features, lidar_to_image, image_hw, key).hw

    first, again, other = (encode(state, jax.random.key(seed)) for seed in (0, 0, 1))
    inference = encode(state, None)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - inference).max() > 1e-3


def test_initial_samples_go_outwards_in_every_direction():
    attention = tpv_attention.ImageCrossAttention(
        16, 4, 2, (2, 2, 2), (4, 2, 2), dropout_rate=0.0, implementation="gather", dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    offsets = attention.sampling_offsets[0].bias[...].reshape(4, 2, 2, 2, 2)  # head, level, anchor, sample, xy
    np.testing.assert_allclose(offsets[0, 0, 0], [[1, 0], [2, 0]], atol=1e-6)
    np.testing.assert_allclose(offsets[1, 1, 1], [[0, 1], [0, 2]], atol=1e-6)
    assert not np.any(attention.sampling_offsets[0].kernel[...])
