"""From the three planes to occupancy and language features, at voxels and at points; the official ``TPVAggregator``."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from pop3d_jax.models.layers import linear
from pop3d_jax.models.tpv import TPVPlanes
from pop3d_jax.ops.grid_sample import grid_sample, resize_bilinear


class Pop3DOutput(NamedTuple):
    """What the network says; float32.

    occupancy_logits: (free, occupied) per voxel.
    voxel_features, point_features: vectors in the space of the teacher's text embeddings, not normalised.
    point_occupancy_logits: (free, occupied) per point.
    """

    occupancy_logits: Float[Array, "batch x y z classes"]
    voxel_features: Float[Array, "batch x y z features"] | None
    point_occupancy_logits: Float[Array, "batch points classes"] | None
    point_features: Float[Array, "batch feature_points features"] | None


class Decoder(nnx.Module):
    """Linear layers with Softplus in between, then a linear classifier directly after the last of them."""

    def __init__(
        self,
        in_dims: int,
        hidden_dims: int,
        out_dims: int,
        classes: int,
        num_layers: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        dims = [in_dims] + [hidden_dims] * (num_layers - 1) + [out_dims]
        self.layers = nnx.List([linear(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(dims)])
        self.classifier = linear(out_dims, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch classes"]:
        """Decodes features of any layout; the result is float32."""
        return self._after_first(self.layers[0](x))

    def decode_voxels(self, planes: TPVPlanes) -> Float[Array, "batch x y z classes"]:
        """Decodes the sum of the planes at every voxel.

        The first linear layer is applied to the planes and its results are summed over the voxels: the same numbers
        (up to rounding) for a fraction of the multiplications, since planes have far fewer cells than the volume.
        """
        first = self.layers[0]
        kernel = first.kernel[...].astype(first.dtype)
        hw, zh, wz = (plane.astype(first.dtype) @ kernel for plane in planes)
        hw = hw + first.bias[...].astype(first.dtype)
        summed = hw.swapaxes(1, 2)[:, :, :, None] + zh.swapaxes(1, 2)[:, None] + wz[:, :, None]
        return self._after_first(summed)

    def _after_first(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch classes"]:
        for layer in self.layers[1:]:
            x = layer(jax.nn.softplus(x))
        return self.classifier(x).astype(jnp.float32)


class TPVHeads(nnx.Module):
    """An occupancy decoder and a feature decoder; both read the sum of the three planes."""

    def __init__(
        self,
        grid_size: tuple[int, int, int],
        upscale: tuple[int, int, int],
        *,
        embed_dims: int,
        occupancy_classes: int,
        hidden_dims: int,
        out_dims: int,
        decoder_layers: int,
        feature_dim: int,
        feature_hidden_dims: int,
        feature_out_dims: int,
        feature_decoder_layers: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.grid_size, self.upscale = grid_size, upscale
        self.occupancy = Decoder(
            embed_dims, hidden_dims, out_dims, occupancy_classes, decoder_layers, dtype=dtype, rngs=rngs
        )
        self.features = Decoder(
            embed_dims,
            feature_hidden_dims,
            feature_out_dims,
            feature_dim,
            feature_decoder_layers,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        planes: TPVPlanes,
        points: Float[Array, "batch points 3"] | None = None,
        feature_points: Float[Array, "batch feature_points 3"] | None = None,
        *,
        voxel_features: bool = True,
    ) -> Pop3DOutput:
        """Decodes.

        Args:
            planes: of the encoder; scaled up (bilinear) where the heads have a finer grid.
            points: where to decode occupancy, in cells of the (finer) grid: centres at index + 0.5. Within half a
                cell of the border and beyond, features fade to zero, as officially.
            feature_points: where to decode features.
            voxel_features: whether to decode features at every voxel; training does not need them.
        """
        planes = self.upscaled(planes)
        return Pop3DOutput(
            occupancy_logits=self.occupancy.decode_voxels(planes),
            voxel_features=self.features.decode_voxels(planes) if voxel_features else None,
            point_occupancy_logits=None if points is None else self.occupancy(sample_planes(planes, points)),
            point_features=None if feature_points is None else self.features(sample_planes(planes, feature_points)),
        )

    def upscaled(self, planes: TPVPlanes) -> TPVPlanes:
        """The planes on the heads' own grid: scaled up (bilinear) where it is finer than the encoder's."""
        if self.upscale == (1, 1, 1):
            return planes
        x, y, z = (n * s for n, s in zip(self.grid_size, self.upscale, strict=True))
        sizes = ((y, x), (z, y), (x, z))
        return TPVPlanes(*(resize_bilinear(p, size) for p, size in zip(planes, sizes, strict=True)))


def sample_planes(planes: TPVPlanes, points: Float[Array, "batch points 3"]) -> Float[Array, "batch points channels"]:
    """Sum of the three planes' bilinear samples at points (x, y, z) in grid cells."""
    size = jnp.asarray([planes.hw.shape[2], planes.hw.shape[1], planes.zh.shape[1]], jnp.float32)
    scaled = points / size * 2.0 - 1.0
    # Each plane is an image whose columns are the first of its coordinates: (x, y), (y, z), (z, x).
    return (
        grid_sample(planes.hw, scaled[..., :2])
        + grid_sample(planes.zh, scaled[..., 1:])
        + grid_sample(planes.wz, scaled[..., ::-2])
    )
