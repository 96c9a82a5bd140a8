"""The whole network: its frozen parameters, gradients, precisions and errors (its numbers: test_golden.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pop3d_jax.experiment import frozen_by
from pop3d_jax.models.pop3d import Pop3D, Pop3DConfig

SMALL = Pop3DConfig(
    backbone_blocks=(1, 1, 1, 1),
    backbone_width=4,
    grid_size=(6, 5, 2),
    num_cameras=2,
    embed_dims=16,
    num_heads=2,
    num_layers=1,
    self_attention_points=2,
    cross_attention_anchors=(2, 4, 4),
    cross_attention_points=(2, 4, 8),
    feedforward_dims=16,
    hidden_dims=8,
    out_dims=8,
    feature_dim=6,
    feature_hidden_dims=8,
    feature_out_dims=8,
)


def _small_inputs(batch=2, config=SMALL):
    keys = jax.random.split(jax.random.key(0), 3)
    images = 50.0 * jax.random.normal(keys[0], (batch, config.num_cameras, 32, 64, 3))
    intrinsics = jnp.asarray([[40.0, 0, 32, 0], [0, 40, 16, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    forward = jnp.asarray([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    turned = jnp.asarray([[-1.0, 0, 0, 0], [0, 0, -1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    lidar_to_image = jnp.broadcast_to(jnp.stack([intrinsics @ forward, intrinsics @ turned]), (batch, 2, 4, 4))
    points = jax.random.uniform(keys[1], (batch, 9, 3), maxval=jnp.asarray(config.grid_size, jnp.float32))
    return images, lidar_to_image, points


@pytest.mark.slow
def test_gradients_reach_every_parameter():
    config = dataclasses.replace(SMALL, remat="all")
    graph, parameters, statistics = nnx.split(Pop3D(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    images, lidar_to_image, points = _small_inputs()

    @jax.jit
    @jax.grad
    def gradients(parameters, key):
        model = nnx.merge(graph, parameters, statistics)
        output = model(images, lidar_to_image, points, points, voxel_features=False, dropout_key=key)
        losses = (output.occupancy_logits, output.point_occupancy_logits, output.point_features)
        return sum((x**2).mean() for x in losses)

    for path, gradient in nnx.to_flat_state(gradients(parameters, jax.random.key(1))):
        assert gradient[...].dtype == jnp.float32, path
        assert np.isfinite(gradient[...]).all(), path
        # The positional encoding acts only through sampling kernels, which start at zero.
        if "positional_encoding" not in path:
            assert np.any(gradient[...]), path


@pytest.mark.slow
def test_bfloat16_computes_about_the_same():
    images, lidar_to_image, points = _small_inputs()

    def predict(compute_dtype):
        model = Pop3D(dataclasses.replace(SMALL, compute_dtype=compute_dtype), rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
        return jax.jit(lambda state: nnx.merge(graph, state)(images, lidar_to_image, points, points))(state)

    for exact, rough in zip(predict("float32"), predict("bfloat16"), strict=True):
        assert rough.dtype == jnp.float32
        difference = np.abs(exact - rough)
        # bfloat16 keeps eight bits; a dozen layers lose some of them.
        assert 0 < difference.max() < 0.1 * np.abs(exact).max()


@pytest.mark.slow
def test_cameras_are_not_interchangeable_and_items_do_not_mix():
    graph, state = nnx.split(Pop3D(SMALL, rngs=nnx.Rngs(0)))
    images, lidar_to_image, _ = _small_inputs()
    forward = jax.jit(lambda images: nnx.merge(graph, state)(images, lidar_to_image).occupancy_logits)
    before = forward(images)
    after = forward(images.at[1].multiply(-1.0))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1e-3
    assert np.abs(forward(images[:, ::-1])[0] - before[0]).max() > 1e-3


def test_published_network_has_the_published_sizes():
    model = nnx.eval_shape(lambda: Pop3D(Pop3DConfig(), rngs=nnx.Rngs(0)))
    sizes = {path: int(np.prod(v.shape)) for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    # Both numbers are the official model's (all parameters; those with requires_grad).
    assert sum(sizes.values()) == 64_626_752
    is_frozen = frozen_by(frozen_stages=1, train_batch_norm=False)
    assert sum(size for path, size in sizes.items() if not is_frozen(tuple(map(str, path)))) == 64_299_008


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_size": (10, 10)}, "grid_size"),
        ({"embed_dims": 18, "num_heads": 4}, "embed_dims"),
        ({"cross_attention_points": (8, 60, 64)}, "cross_attention_points"),
        ({"remat": "some"}, "remat = 'some' must be 'none', 'encoder', 'all', or a list of blocks"),
        ({"attention_implementation": "fast"}, "attention_implementation = 'fast' must be one of 'auto', 'ref"),
        ({"convolution_implementation": "fast"}, "convolution_implementation = 'fast' must be one of 'auto', 'taps'"),
        ({"remat": "layer3,layer5"}, "from layer1, layer2, layer3, layer4, encoder"),
        ({"decoder_layers": 0}, "decoder_layers"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Pop3DConfig(**change)


def test_lists_of_config_files_become_tuples():
    assert Pop3DConfig(grid_size=[4, 5, 6]) == Pop3DConfig(grid_size=(4, 5, 6))


def test_wrong_inputs_are_refused():
    model = nnx.eval_shape(lambda: Pop3D(SMALL, rngs=nnx.Rngs(0)))
    images, lidar_to_image, _ = _small_inputs()
    with pytest.raises(ValueError, match="cameras"):
        model(images[:, :1], lidar_to_image[:, :1])
    with pytest.raises(ValueError, match="multiples of 32"):
        model(images[:, :, :30], lidar_to_image)
