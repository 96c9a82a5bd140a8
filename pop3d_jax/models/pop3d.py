"""POP-3D (Vobecky et al. 2023): surround images to voxel occupancy and language-aligned voxel features."""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from pop3d_jax.models.fpn import FPN
from pop3d_jax.models.heads import Pop3DOutput, TPVHeads
from pop3d_jax.models.resnet import ResNet
from pop3d_jax.models.tpv import Capture, TPVEncoder, TPVPlanes
from pop3d_jax.ops.deformable_attention import Implementation
from pop3d_jax.ops.deformable_conv import Implementation as ConvolutionImplementation
from pop3d_jax.sharding import per_device

_TRIPLES = (
    "grid_size",
    "volume_minimum",
    "volume_maximum",
    "cross_attention_anchors",
    "cross_attention_points",
    "upscale",
)
# The backbone's four stages, and the encoder's layers.
_REMAT_BLOCKS = ("layer1", "layer2", "layer3", "layer4", "encoder")
_REMAT_NAMES = {"none": (), "encoder": ("encoder",), "all": _REMAT_BLOCKS}


@dataclasses.dataclass(frozen=True)
class Pop3DConfig:
    """Sizes of the network; the defaults are the published one (64.6 M parameters).

    Triples follow (x, y, z), those of ``cross_attention_*`` the planes (hw, zh, wz). ``grid_mask`` says that training
    hides stripes of the images; the training step does it, the network does not know. ``remat`` says what the backward
    pass computes again instead of remembering: "none", the "encoder"'s layers, "all" (those and the backbone's residual
    blocks), or a list such as "layer3,layer4,encoder" of the backbone's stages and the encoder.

    Raises:
        ValueError: sizes that do not fit together.
    """

    backbone_depth: int = 101
    backbone_blocks: Sequence[int] | None = None
    backbone_width: int = 64
    deformable_stages: Sequence[bool] = (False, False, True, True)
    grid_size: Sequence[int] = (100, 100, 8)
    volume_minimum: Sequence[float] = (-51.2, -51.2, -5.0)
    volume_maximum: Sequence[float] = (51.2, 51.2, 3.0)
    num_cameras: int = 6
    num_levels: int = 4
    embed_dims: int = 256
    num_heads: int = 8
    num_layers: int = 3
    self_attention_points: int = 4
    cross_attention_anchors: Sequence[int] = (4, 32, 32)
    cross_attention_points: Sequence[int] = (8, 64, 64)
    feedforward_dims: int = 512
    dropout: float = 0.1
    occupancy_classes: int = 2
    hidden_dims: int = 512
    out_dims: int = 256
    decoder_layers: int = 2
    feature_dim: int = 512
    feature_hidden_dims: int = 1024
    feature_out_dims: int = 1024
    feature_decoder_layers: int = 2
    upscale: Sequence[int] = (1, 1, 1)
    grid_mask: bool = True
    convolution_implementation: str = "auto"  # or one of those of pop3d_jax/ops/deformable_conv.py
    attention_implementation: str = "auto"  # likewise, deformable_attention.py
    compute_dtype: str = "float32"
    remat: str = "encoder"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # config files and JSON have lists
                object.__setattr__(self, field.name, tuple(value))
        for name in _TRIPLES:
            if len(getattr(self, name)) != 3:
                raise ValueError(f"model.{name} = {getattr(self, name)} must have three entries")
        if self.embed_dims % self.num_heads or self.embed_dims % 2:
            raise ValueError(
                f"model.embed_dims = {self.embed_dims} must be even and a multiple of num_heads = {self.num_heads}"
            )
        for points, anchors in zip(self.cross_attention_points, self.cross_attention_anchors, strict=True):
            if points % anchors:
                raise ValueError(
                    f"model.cross_attention_points = {self.cross_attention_points} must be multiples of "
                    f"cross_attention_anchors = {self.cross_attention_anchors}"
                )
        unknown = self.rematerialised - set(_REMAT_BLOCKS)
        if unknown:
            raise ValueError(
                f"model.remat = {self.remat!r} must be {', '.join(map(repr, _REMAT_NAMES))}, or a list of blocks "
                f"such as 'layer3,layer4,encoder' from {', '.join(_REMAT_BLOCKS)}"
            )
        for name, known in (
            ("convolution_implementation", ConvolutionImplementation),
            ("attention_implementation", Implementation),
        ):
            if getattr(self, name) not in ("auto", *get_args(known)):
                names = ", ".join(map(repr, ("auto", *get_args(known))))
                raise ValueError(f"model.{name} = {getattr(self, name)!r} must be one of {names}")
        if self.decoder_layers < 1 or self.feature_decoder_layers < 1:
            raise ValueError("model.decoder_layers and model.feature_decoder_layers must be at least 1")

    @property
    def rematerialised(self) -> frozenset[str]:
        """Blocks that the backward pass computes again."""
        return frozenset(_REMAT_NAMES.get(self.remat, tuple(name.strip() for name in self.remat.split(","))))


class Pop3D(nnx.Module):
    """The whole network. Holds no random state: dropout takes its key with the call."""

    def __init__(self, config: Pop3DConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.compute_dtype)
        self.backbone = ResNet(
            config.backbone_depth,
            blocks=config.backbone_blocks,
            width=config.backbone_width,
            deformable_stages=config.deformable_stages,
            dtype=dtype,
            implementation=config.convolution_implementation,
            remat=tuple(stage in config.rematerialised for stage in _REMAT_BLOCKS[:4]),
            rngs=rngs,
        )
        self.neck = FPN(self.backbone.out_channels, config.embed_dims, config.num_levels, dtype=dtype, rngs=rngs)
        self.encoder = TPVEncoder(
            config.grid_size,
            config.volume_minimum,
            config.volume_maximum,
            num_cameras=config.num_cameras,
            num_levels=config.num_levels,
            num_layers=config.num_layers,
            embed_dims=config.embed_dims,
            num_heads=config.num_heads,
            self_attention_points=config.self_attention_points,
            cross_attention_anchors=config.cross_attention_anchors,
            cross_attention_points=config.cross_attention_points,
            feedforward_dims=config.feedforward_dims,
            dropout_rate=config.dropout,
            remat="encoder" in config.rematerialised,
            implementation=config.attention_implementation,
            dtype=dtype,
            rngs=rngs,
        )
        self.heads = TPVHeads(
            config.grid_size,
            config.upscale,
            embed_dims=config.embed_dims,
            occupancy_classes=config.occupancy_classes,
            hidden_dims=config.hidden_dims,
            out_dims=config.out_dims,
            decoder_layers=config.decoder_layers,
            feature_dim=config.feature_dim,
            feature_hidden_dims=config.feature_hidden_dims,
            feature_out_dims=config.feature_out_dims,
            feature_decoder_layers=config.feature_decoder_layers,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        images: Float[Array, "batch camera height width 3"],
        lidar_to_image: Float[Array, "batch camera 4 4"],
        points: Float[Array, "batch points 3"] | None = None,
        feature_points: Float[Array, "batch feature_points 3"] | None = None,
        *,
        voxel_features: bool = True,
        dropout_key: PRNGKeyArray | Array | None = None,
        capture: Capture = None,
    ) -> Pop3DOutput:
        """Predicts.

        Args:
            images: BGR minus the mean, padded with zeros at the bottom and right to multiples of 32.
            lidar_to_image: lidar metres to (u * depth, v * depth, depth, 1), pixels of ``images``.
            points: where to predict occupancy besides the voxels, in grid cells (`voxels.grid_coordinates`).
            feature_points: where to predict features besides the voxels, in grid cells.
            voxel_features: whether to predict features at every voxel.
            dropout_key: key of this step's dropout; None means inference.
            capture: a dict that receives intermediate arrays by name, for tests and studies.

        Raises:
            ValueError: see `planes`.
        """
        planes = self.planes(images, lidar_to_image, dropout_key=dropout_key, capture=capture)
        return self.heads(planes, points, feature_points, voxel_features=voxel_features)

    def planes(
        self,
        images: Float[Array, "batch camera height width 3"],
        lidar_to_image: Float[Array, "batch camera 4 4"],
        *,
        dropout_key: PRNGKeyArray | Array | None = None,
        capture: Capture = None,
    ) -> TPVPlanes:
        """What the heads read; arguments as those of the call.

        Raises:
            ValueError: the number of cameras is not the config's, or the images are not padded.
        """
        _, camera, height, width, _ = images.shape
        if camera != self.config.num_cameras:
            raise ValueError(f"the network has {self.config.num_cameras} cameras, the images {camera}")
        if height % 32 or width % 32:
            raise ValueError(f"images of {height} x {width} pixels must be padded to multiples of 32")
        levels = self._pyramids(images, capture)
        return self.encoder(levels, lidar_to_image, (height, width), dropout_key, capture)

    def _pyramids(
        self, images: Float[Array, "batch camera height width 3"], capture: Capture
    ) -> tuple[Float[Array, "batch camera _ _ channels"], ...]:
        """Backbone and neck, every device on its own pictures."""
        graph, state = nnx.split((self.backbone, self.neck))

        def run(state: Any, images: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            backbone, neck = nnx.merge(graph, state)
            leading = images.shape[:2]
            maps = backbone(images.reshape(-1, *images.shape[2:]))
            levels = neck(maps)
            captured = () if capture is None else maps
            return jax.tree.map(lambda array: array.reshape(*leading, *array.shape[1:]), (captured, levels))

        maps, levels = per_device(run, [(), ("batch", "camera")], ("batch", "camera"))(state, images)
        if capture is not None:
            capture |= {f"backbone.{i}": array for i, array in enumerate(maps)}
            capture |= {f"neck.{i}": level for i, level in enumerate(levels)}
        return levels
