"""The heads: the official aggregator at twice the resolution, and the identity between voxels and their centres."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pop3d_jax.models.heads import TPVHeads, sample_planes
from pop3d_jax.models.tpv import TPVPlanes
from pop3d_jax.models.tpv_geometry import plane_shapes
from pop3d_jax.verification.golden_model import reference_weights


@pytest.fixture(scope="module")
def official(golden_file):
    with np.load(golden_file("pop3d/ops.npz")) as arrays:
        return {k.removeprefix("agg2_"): arrays[k] for k in arrays.files if k.startswith("agg2_")}


@pytest.fixture(scope="module")
def heads(official, golden_file):
    h, w, z = (int(n) for n in official["hwz"])
    scale_h, scale_w, scale_z = (int(n) for n in official["scale_hwz"])
    heads = TPVHeads(
        (w, h, z),
        (scale_w, scale_h, scale_z),
        embed_dims=int(official["in_dims"]),
        occupancy_classes=int(official["nbr_classes"]),
        hidden_dims=int(official["hidden_dims"]),
        out_dims=int(official["out_dims"]),
        decoder_layers=int(official["dec_layers_occupancy"]),
        feature_dim=int(official["feature_dim"]),
        feature_hidden_dims=int(official["hidden_dims_ft"]),
        feature_out_dims=int(official["out_dims_ft"]),
        feature_decoder_layers=int(official["dec_layers_features"]),
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    weights = reference_weights(golden_file)
    used = []
    for decoder, suffix in ((heads.occupancy, ""), (heads.features, "_ft")):
        named = [(f"decoder{suffix}.{2 * i}", layer) for i, layer in enumerate(decoder.layers)]
        for name, layer in [*named, (f"classifier{suffix}", decoder.classifier)]:
            shape = layer.kernel.shape[::-1]
            layer.kernel[...] = jnp.asarray(weights.reference_weight(f"tpv_aggregator.{name}.weight", shape).T)
            layer.bias[...] = jnp.asarray(weights.reference_weight(f"tpv_aggregator.{name}.bias", shape[:1]))
            used += [f"{name}.weight", f"{name}.bias"]
    assert sorted(used) == sorted(official["state_dict_keys"])
    return heads


@pytest.fixture(scope="module")
def planes(official, heads):
    shapes = plane_shapes(heads.grid_size)
    return TPVPlanes(
        *(
            jnp.asarray(official[f"plane_{p}"]).reshape(1, *shape, -1)
            for p, shape in zip(("hw", "zh", "wz"), shapes, strict=True)
        )
    )


@pytest.mark.golden
def test_official_aggregator_with_upscaling(official, heads, planes):
    points = jnp.asarray(official["points"])
    output = heads(planes, points, points)
    for name, ours in (
        ("voxel_logits", jnp.moveaxis(output.occupancy_logits, -1, 1)),
        ("point_logits", jnp.moveaxis(output.point_occupancy_logits, -1, 1)[..., None, None]),
        ("voxel_features", jnp.moveaxis(output.voxel_features, -1, 1)),
        ("point_features", output.point_features),
    ):
        np.testing.assert_allclose(ours, official[name], rtol=0, atol=5e-6, err_msg=name)


@pytest.mark.golden
def test_without_points_and_features(official, heads, planes):
    output = heads(planes, voxel_features=False)
    expected = official["voxel_logits_no_points"]
    np.testing.assert_allclose(jnp.moveaxis(output.occupancy_logits, -1, 1), expected, rtol=0, atol=5e-6)
    assert output.voxel_features is output.point_occupancy_logits is output.point_features is None


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
