"""The heads: the official aggregator at twice the resolution, and the identity between voxels and their centres."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pop3d_jax.models.heads import TPVHeads, sample_planes
from pop3d_jax.models.tpv import TPVPlanes
from pop3d_jax.models.tpv_geometry import plane_shapes


@pytest.mark.parametrize(("grid_size", "upscale"), [((5, 3, 2), (1, 1, 1)), ((3, 4, 2), (2, 1, 3))])
def test_points_at_cell_centres_are_voxels(grid_size, upscale):
    heads = TPVHeads(
        grid_size,
        upscale,
        embed_dims=6,
        occupancy_classes=2,
        hidden_dims=5,
        out_dims=4,
        decoder_layers=3,
        feature_dim=3,
        feature_hidden_dims=5,
        feature_out_dims=4,
        feature_decoder_layers=1,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    planes = TPVPlanes(
        *(jax.random.normal(jax.random.key(i), (2, *shape, 6)) for i, shape in enumerate(plane_shapes(grid_size)))
    )
    fine = [n * s for n, s in zip(grid_size, upscale, strict=True)]
    centres = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in fine), indexing="ij"), -1).reshape(1, -1, 3)
    centres = jnp.asarray(np.repeat(centres, 2, 0), jnp.float32)
    graph, state = nnx.split(heads)
    output = jax.jit(lambda state: nnx.merge(graph, state)(planes, centres, centres))(state)
    occupancy = output.point_occupancy_logits.reshape(output.occupancy_logits.shape)
    np.testing.assert_allclose(occupancy, output.occupancy_logits, atol=1e-5)
    features = output.point_features.reshape(output.voxel_features.shape)
    np.testing.assert_allclose(features, output.voxel_features, atol=1e-5)


def test_planes_fade_outside():
    planes = TPVPlanes(*(jnp.ones((1, *shape, 1)) for shape in plane_shapes((4, 5, 3))))
    points = jnp.asarray([[[2.0, 2.0, 1.5], [4.0, 2.0, 1.5], [100.0, 100.0, 100.0]]])
    # Inside: all three planes. On the border of x: half of hw and of wz, all of zh. Far away: nothing.
    np.testing.assert_allclose(sample_planes(planes, points)[0, :, 0], [3.0, 2.0, 0.0], atol=1e-6)
