"""Deformable attention: the official numbers, and the implementations against each other."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.measure import absent_chip
from pop3d_jax.ops.deformable_attention import Implementation, deformable_attention

IMPLEMENTATIONS = get_args(Implementation)


def _random_case(seed, batch=(2, 3), queries=5, heads=2, points=3, channels=4, shapes=((3, 5), (1, 2), (1, 1))):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(*batch, sum(h * w for h, w in shapes), heads, channels))
    locations = rng.uniform(-0.4, 1.4, (*batch, queries, heads, len(shapes), points, 2))
    weights = rng.uniform(0, 1, locations.shape[:-1])
    return shapes, *(jnp.asarray(a, jnp.float32) for a in (values, locations, weights))


@pytest.mark.parametrize(("batch", "queries"), [pytest.param((), 300, marks=pytest.mark.slow), ((2, 3), 5)])
def test_implementations_agree_on_any_batch_axes(batch, queries):
    shapes, *arguments = _random_case(0, batch, queries)
    results = []
    for implementation in IMPLEMENTATIONS:

        def attend(values, locations, weights, implementation=implementation):
            return deformable_attention(values, shapes, locations, weights, implementation=implementation)

        output, pullback = jax.vjp(jax.jit(attend), *arguments)
        results.append((output, *pullback(jnp.cos(jnp.arange(output.size)).reshape(output.shape))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_agree_on_maps_wider_than_a_tile(dtype):
    shapes, values, *samples = _random_case(3, batch=(), queries=40, points=2, shapes=((4, 130),))
    values = values.astype(dtype)

    def total(implementation):
        def attend(values, *samples):
            output = deformable_attention(values, shapes, *samples, implementation=implementation)
            return jnp.sum(jnp.sin(output.astype(jnp.float32))), output

        return jax.jit(jax.grad(attend, (0, 1, 2), has_aux=True))(values, *samples)

    (expected, expected_output), (gradients, output) = total("gather"), total("pallas")
    # bfloat16 results are rounded once, by half a percent at most.
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for a, b in zip((output, *gradients), (expected_output, *expected), strict=True):
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_asked_and_what_is_not_a_number_is_told(implementation):
    shapes, values, locations, weights = _random_case(4)
    none = locations[..., :0, :, :, :, :], weights[..., :0, :, :, :]
    nothing = deformable_attention(values, shapes, *none, implementation=implementation)
    assert nothing.shape == (*values.shape[:2], 0, *values.shape[-2:])
    locations = locations.at[0, 0, 0, 0, 0, 0, 0].set(jnp.nan)
    output = deformable_attention(values, shapes, locations, weights, implementation=implementation)
    assert jnp.isnan(output[0, 0, 0, 0]).all()
    assert jnp.isfinite(output[1]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_locations_read_nothing_and_have_no_gradient(implementation):
    shapes, values, locations, weights = _random_case(0)
    huge = jnp.asarray([1e9, -1e9, 3e38, jnp.inf, -jnp.inf])[:, None, None, None, None]
    locations = jnp.broadcast_to(huge, locations.shape)

    def total(values, locations):
        return deformable_attention(values, shapes, locations, weights, implementation=implementation).sum()

    output, gradients = jax.value_and_grad(total, (0, 1))(values, locations)
    assert output == 0
    assert all(not np.any(g) for g in gradients)


def test_texel_centres_are_read_exactly():
    shapes, values, _, _ = _random_case(1, batch=(), shapes=((3, 5),))
    y, x = np.mgrid[0:3, 0:5].reshape(2, -1)
    centres = np.stack([(x + 0.5) / 5, (y + 0.5) / 3], -1)[:, None, None, None]
    locations = jnp.asarray(np.broadcast_to(centres, (15, 2, 1, 1, 2)), jnp.float32)
    output = deformable_attention(values, shapes, locations, jnp.ones(locations.shape[:-1]))
    np.testing.assert_allclose(output, values, atol=1e-5)


@pytest.mark.parametrize("shapes", [((3, 5),), ((3, 5), (2, 2)), ((3, 5), (1, 2), (2, 1), (0, 0))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    _, values, locations, weights = _random_case(0)
    with pytest.raises(ValueError, match="spatial_shapes"):
        deformable_attention(values, shapes, locations, weights)


@pytest.mark.parametrize("implementation", ["gather", "packed"])
def test_no_array_of_queries_by_samples_by_channels_exists(implementation):
    """The largest intermediate of forward and backward stays far below all sampled rows together."""
    shapes = ((16, 16), (8, 8))
    _, values, locations, weights = _random_case(
        0, batch=(), queries=512, heads=4, points=16, channels=128, shapes=shapes
    )

    def total(values, locations, weights):
        return (deformable_attention(values, shapes, locations, weights, implementation=implementation) ** 2).sum()

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(values, locations, weights).compile()
    all_rows = weights.size * 4 * values.shape[-1] * 4
    assert compiled.memory_analysis().temp_size_in_bytes < all_rows / 4


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x2", "v6e:4x4"])
def test_the_kernels_compile_for_tpus(topology):
    """Mosaic takes forward and backward kernel; nothing is run."""
    pytest.importorskip("libtpu", reason="needs the extra: pip install 'pop3d-jax[tpu]'")
    place = absent_chip(topology)
    shapes, *arguments = _random_case(0, batch=(), queries=70, points=8, channels=32, shapes=((29, 50), (3, 5)))
    shaped = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place) for array in arguments]

    def total(*arrays):
        return (deformable_attention(arrays[0], shapes, *arrays[1:], implementation="pallas") ** 2).sum()

    text = jax.jit(jax.grad(total, (0, 1, 2))).lower(*shaped).compile().as_text()
    # Forward and backward, of each of the two levels.
    assert text.count('custom_call_target="tpu_custom_call"') == 4
