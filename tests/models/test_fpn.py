import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pop3d_jax.models.fpn import FPN, upsample_nearest


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
