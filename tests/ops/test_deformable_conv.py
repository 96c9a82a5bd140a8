import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.ops.deformable_conv import Implementation, deformable_conv2d


def _close(actual, expected, relative):
    """Compares with a tolerance relative to the size of the whole array: sums of many terms cancel."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, atol=relative * np.sqrt(np.mean(expected**2)), rtol=relative)


def _random_inputs(seed, *, kernel_hw=(3, 3), stride=1, padding=1, dilation=1, scale=1.5):
    rng = np.random.default_rng(seed)
    images, height, width, channels, out_channels = 2, 7, 9, 3, 4
    out = [
        (size + 2 * padding - dilation * (extent - 1) - 1) // stride + 1
        for size, extent in zip((height, width), kernel_hw, strict=True)
    ]
    taps = kernel_hw[0] * kernel_hw[1]
    shapes = [(images, height, width, channels), (images, *out, taps, 2), (images, *out, taps)]
    x, offset, mask = (rng.normal(size=shape) for shape in shapes)
    kernel = rng.normal(size=(*kernel_hw, channels, out_channels))
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, scale * offset, mask, kernel))


@functools.cache
def _output_and_gradients(implementation, stride, padding, dilation):
    def total(*inputs):
        output = deformable_conv2d(
            *inputs, stride=stride, padding=padding, dilation=dilation, implementation=implementation
        )
        return jnp.sum(jnp.sin(output)), output

    return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))


@pytest.mark.parametrize(
    ("kernel_hw", "stride", "padding", "dilation"), [((3, 3), 2, 1, 1), ((3, 3), 1, 2, 2), ((1, 2), 1, 0, 1)]
)
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 4.0]))
def test_implementations_agree(kernel_hw, stride, padding, dilation, seed, scale):
    inputs = _random_inputs(seed, kernel_hw=kernel_hw, stride=stride, padding=padding, dilation=dilation, scale=scale)
    expected_gradients, expected_output = _output_and_gradients("reference", stride, padding, dilation)(*inputs)
    for implementation in ("taps", "matmul"):
        gradients, output = _output_and_gradients(implementation, stride, padding, dilation)(*inputs)
        _close(output, expected_output, 1e-5)
        for gradient, expected in zip(gradients, expected_gradients, strict=True):
            # What the golden data allows official gradients, too; sums of opposite terms lose digits.
            _close(gradient, expected, 1e-4)


def test_without_offsets_it_is_a_convolution_with_no_gradient_from_the_frame():
    x, offset, mask, kernel = _random_inputs(0)
    offset, mask = jnp.zeros_like(offset), jnp.ones_like(mask)
    output, pull_back = jax.vjp(lambda offset: deformable_conv2d(x, offset, mask, kernel, padding=1), offset)
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(output, expected, atol=2e-5)
    (to_offset,) = pull_back(jnp.ones_like(output))
    # The taps of the first row lie at exactly -1, where the official kernel gives nothing; the middle ones do move.
    np.testing.assert_array_equal(to_offset[:, 0, :, :3], 0)
    assert float(jnp.abs(to_offset[:, 0, 1:-1, 3:6]).min()) > 0


@pytest.mark.parametrize("value", [1e9, -1e9, np.inf, np.nan])
@pytest.mark.parametrize("implementation", get_args(Implementation))
def test_undefined_positions_read_nothing(value, implementation):
    x, offset, mask, kernel = _random_inputs(0)
    output, pull_back = jax.vjp(
        lambda x: deformable_conv2d(
            x, jnp.full_like(offset, value), mask, kernel, padding=1, implementation=implementation
        ),
        x,
    )
    np.testing.assert_array_equal(output, 0)
    np.testing.assert_array_equal(pull_back(jnp.ones_like(output))[0], 0)


def test_bfloat16_features_keep_their_positions():
    x, offset, mask, kernel = _random_inputs(0)
    half = [a.astype(jnp.bfloat16) for a in (x, mask, kernel)]

    def gradients(x, mask, kernel, implementation):
        def total(*inputs):
            output = deformable_conv2d(*inputs, padding=1, implementation=implementation)
            return jnp.sum(jnp.sin(output.astype(jnp.float32))), output

        return jax.grad(total, (0, 1, 2, 3), has_aux=True)(x, offset, mask, kernel)

    exact, expected = gradients(*(a.astype(jnp.float32) for a in half), "taps")
    errors = {}
    for implementation in ("taps", "matmul"):
        found, output = gradients(*half, implementation)
        assert output.dtype == jnp.bfloat16
        np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.1, rtol=0.02)
        errors[implementation] = [
            float(jnp.linalg.norm(gradient.astype(jnp.float32) - other) / jnp.linalg.norm(other))
            for gradient, other in zip(found, exact, strict=True)
        ]
    # The result's rounding to bfloat16 is most of the error; neither way of sampling may add much to it.
    assert max(errors["taps"]) < 0.03
    for one, other in zip(errors["matmul"], errors["taps"], strict=True):
        assert one < 1.2 * other + 1e-3


def test_taps_store_less_than_the_reference():
    shapes = [(2, 20, 30, 32), (2, 20, 30, 9, 2), (2, 20, 30, 9), (3, 3, 32, 32)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def temporary_bytes(implementation):
        def total(*inputs):
            return jnp.sum(deformable_conv2d(*inputs, padding=1, implementation=implementation) ** 2)

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("taps") < 0.5 * temporary_bytes("reference")


def test_wrong_calls_name_the_problem():
    x, offset, mask, kernel = _random_inputs(0)
    with pytest.raises(ValueError, match="offset"):
        deformable_conv2d(x, offset, mask, kernel, padding=0)
    with pytest.raises(ValueError, match=r"choose from .*'taps', 'matmul', 'reference', 'auto'"):
        deformable_conv2d(x, offset, mask, kernel, padding=1, implementation="fast")
