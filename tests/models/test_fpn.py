import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from official_weights import load_official, reference_weight_function

from pop3d_jax.models.fpn import FPN, upsample_nearest


def _last(array):
    return jnp.asarray(np.moveaxis(array, -3, -1))


def _merge(array):
    return array.reshape(-1, *array.shape[2:])


@pytest.mark.golden
def test_matches_official(golden_file):
    golden = np.load(golden_file("pop3d/tiny_model.npz"))
    tiny = json.loads(golden_file("pop3d/tiny_config.json").read_text())
    noise = json.loads(golden_file("pop3d/tiny_float32_noise.json").read_text())["outputs"]
    settings = tiny["model"]["img_neck"]
    reference_weight = reference_weight_function(golden_file("pop3d/reference_weights.py"))
    neck, names = load_official(
        lambda: FPN(settings["in_channels"], settings["out_channels"], settings["num_outs"], rngs=nnx.Rngs(0)),
        lambda name, shape: reference_weight(f"img_neck.{name}", shape),
        convolution_prefix="conv.",
    )
    assert {f"img_neck.{name}" for name in names} == {
        name for name, _ in tiny["state_dict"] if name.startswith("img_neck.")
    }
    # The stored inputs, so that only the neck's own rounding counts.
    outputs = jax.jit(neck)([_merge(_last(golden[name])) for name in ("c3", "c4", "c5")])
    assert len(outputs) == settings["num_outs"]
    for level, output in enumerate(outputs):
        expected = _last(golden[f"fpn{level}"])
        tolerance = 2 * noise[f"fpn{level}"]["max_abs"]
        np.testing.assert_allclose(output, _merge(expected), atol=tolerance, rtol=0)


def test_upsampling_repeats_and_cuts():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(
        upsample_nearest(x, (3, 5))[0, :, :, 0], [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    )
    with pytest.raises(ValueError, match="half"):
        upsample_nearest(x, (5, 5))


def test_odd_sizes_and_no_extra_level():
    features = [jnp.ones((2, 7, 9, 3)), jnp.ones((2, 4, 5, 4))]
    outputs = jax.eval_shape(lambda: FPN((3, 4), 5, 2, rngs=nnx.Rngs(0))(features))
    assert [output.shape for output in outputs] == [(2, 7, 9, 5), (2, 4, 5, 5)]
    with pytest.raises(ValueError, match="at most one"):
        FPN((3, 4), 5, 4, rngs=nnx.Rngs(0))


def test_the_extra_level_sees_negative_values():
    """No ReLU before it: with everything below zero it must still answer."""
    neck = FPN((2,), 2, 2, rngs=nnx.Rngs(0))
    for convolution, value in ((neck.lateral_convs[0], -1.0), (neck.fpn_convs[0], 1.0), (neck.fpn_convs[1], 1.0)):
        convolution.kernel[...] = jnp.full(convolution.kernel.shape, value)
    first, extra = neck([jnp.ones((1, 4, 4, 2))])
    assert float(first.max()) < 0
    assert float(extra.max()) < 0
