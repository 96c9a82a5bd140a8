import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from official_weights import load_official

from pop3d_jax.models.batch_norm import EPSILON, FrozenBatchNorm, calibrate_batch_norm
from pop3d_jax.models.resnet import BLOCKS, DeformableConv, ResNet, _max_pool, _rematerialised


def _random_weight(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = 0.1 if "conv_offset" in name else np.sqrt(2 / np.prod(shape[1:]))
    return (scale * rng.normal(size=shape)).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    """A ResNet small enough to run everything on."""
    return load_official(lambda: ResNet(blocks=(1, 1, 1, 1), width=8, rngs=nnx.Rngs(0)), _random_weight)[0]


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(60 * np.random.default_rng(1).normal(size=(2, 64, 96, 3)), jnp.float32)


def test_strides_and_channels_follow_the_settings(small, images):
    outputs = jax.eval_shape(small, images)
    assert [output.shape for output in outputs] == [
        (2, 64 // stride, 96 // stride, channels)
        for stride, channels in zip((8, 16, 32), small.out_channels, strict=True)
    ]
    assert small.out_channels == (64, 128, 256)


def test_published_sizes(golden_file):
    inventory = dict(json.loads(golden_file("pop3d/full_state_dict_inventory.json").read_text()))
    network = nnx.eval_shape(lambda: ResNet(101, rngs=nnx.Rngs(0)))
    ours = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
    official = sum(
        int(np.prod(shape))
        for name, shape in inventory.items()
        if name.startswith("img_backbone.") and name.rsplit(".", 1)[1] in ("weight", "bias")
    )
    assert ours == official


def test_deformable_stages_and_initialisation(small):
    for stage, deformable in ((small.layer1, False), (small.layer2, False), (small.layer3, True), (small.layer4, True)):
        for block in stage:
            assert isinstance(block.conv2, DeformableConv) == deformable
    conv = DeformableConv(16, 32, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(conv.conv_offset.kernel[...], 0)
    np.testing.assert_array_equal(conv.conv_offset.bias[...], 0)
    # He: variance 2 / fan_out.
    assert float(jnp.std(conv.kernel[...])) == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.1)


def test_frozen_batch_norm_is_the_textbook_formula():
    rng = np.random.default_rng(0)
    norm = FrozenBatchNorm(5)
    scale, bias, mean, var = rng.uniform(0.5, 2, (4, 5)).astype(np.float32)
    norm.scale[...], norm.bias[...], norm.mean[...], norm.var[...] = map(jnp.asarray, (scale, bias, mean, var))
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    expected = (x - mean) / np.sqrt(var + EPSILON) * scale + bias
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_calibration_normalises_every_layer(small, images):
    network = nnx.clone(small)
    calibrate_batch_norm(network, images)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(network, nnx.Param), nnx.state(small, nnx.Param))
    graph, state = nnx.split(network)

    @jax.jit
    def before_activations(state):
        """What the first and the last BatchNorm give, in a plain forward pass with the new statistics."""
        model = nnx.merge(graph, state)
        first = model.bn1(model.conv1(images))
        x = _max_pool(jax.nn.relu(first))
        for layer in (model.layer1, model.layer2, model.layer3):
            for block in layer:
                x = block(x)
        block = model.layer4[0]
        x = jax.nn.relu(block.bn2(block.conv2(jax.nn.relu(block.bn1(block.conv1(x))))))
        return first, block.bn3(block.conv3(x))

    norms = (network.bn1, network.layer4[0].bn3)
    for norm, normalised in zip(norms, map(np.asarray, before_activations(state)), strict=True):
        np.testing.assert_allclose(normalised.mean((0, 1, 2)), norm.bias[...], atol=2e-3)
        np.testing.assert_allclose(normalised.std((0, 1, 2)), norm.scale[...], rtol=2e-2)


def test_remat_changes_memory_not_numbers(small, images):
    graph, state = nnx.split(small.layer3[0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 8, small.out_channels[0])), jnp.float32)

    def gradients(run):
        return jax.jit(jax.grad(lambda state, x: jnp.sum(jnp.sin(run(nnx.merge(graph, state), x))), (0, 1)))(state, x)

    plain, rematerialised = gradients(lambda block, x: block(x)), gradients(_rematerialised)
    for gradient, expected in zip(jax.tree.leaves(rematerialised), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))
    network = nnx.clone(small)
    for network.remat in ((False,) * 4, (False, False, True, False), (True,) * 4):
        # A function of its own each time: JAX remembers traces by function.
        traced = jax.make_jaxpr(lambda images: network(images))(images)
        layers = (network.layer1, network.layer2, network.layer3, network.layer4)
        blocks = sum(len(layer) for layer, chosen in zip(layers, network.remat, strict=True) if chosen)
        assert len([1 for equation in traced.eqns if equation.primitive.name.startswith("remat")]) == blocks


def test_max_pool_is_the_windowed_maximum():
    for shape in ((2, 7, 9, 3), (1, 8, 6, 2), (1, 1, 2, 1)):
        x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
        expected = jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        )
        np.testing.assert_array_equal(_max_pool(x), expected)


def test_bfloat16_compute_keeps_float32_parameters(images):

    def build_and_run():
        network = ResNet(blocks=(1, 1, 1, 1), width=8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return nnx.to_pure_dict(nnx.state(network)), network(images)

    parameters, outputs = jax.eval_shape(build_and_run)
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype(jnp.float32)}
    assert {output.dtype for output in outputs} == {jnp.dtype(jnp.bfloat16)}


def test_wrong_settings_are_named():
    assert sorted(BLOCKS) == [50, 101]
    with pytest.raises(ValueError, match="depth 34"):
        ResNet(34, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="four stages"):
        ResNet(blocks=(1, 1, 1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="deformable_stages"):
        ResNet(50, deformable_stages=(True,), rngs=nnx.Rngs(0))
