"""The frozen teacher: what the lidar points look like, in the space of a text encoder.

It runs inside the training step, so that no features need be stored (the official layout keeps 1.5 TB of them); a cache
(`data/teacher_cache.py`) may take its place.
"""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from pop3d_jax.models.clip import LoadedCLIP, abstract_clip, load_clip
from pop3d_jax.models.deeplab import DeepLabV2
from pop3d_jax.models.maskclip import MaskCLIP
from pop3d_jax.models.maskclip_plus import MaskCLIPPlus
from pop3d_jax.models.maskclip_plus_weights import load_network
from pop3d_jax.models.parameters import ArrayTree, merge_model, split_model
from pop3d_jax.sharding import first_view, per_device, sum_over_views


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen image model, split into structure and arrays.

    Attributes:
      graph: structure of a model that has `features_at`, for `merge_model`.
      parameters: its arrays, `parameters` and `statistics`; they go into the jitted step as an argument, never as
        constants of the program.
      feature_dim: width of its features, which must be the student's.
      clip: both towers and the tokenizer, for the text side; None for shapes without weights.
    """

    graph: nnx.GraphDef
    parameters: ArrayTree
    feature_dim: int
    clip: LoadedCLIP | None

    def point_features(
        self,
        parameters: ArrayTree,
        images: UInt8[Array, "batch camera height width 3"],
        cameras: Int[Array, "batch points"],
        pixels: Float[Array, "batch points 2"],
    ) -> Float[Array, "batch points dim"]:
        """Teacher features at pixels: the targets of the student's features.

        Args:
          parameters: `self.parameters`, passed through the jitted function.
          images: RGB, 0..255, at the teacher's own resolution.
          cameras: which of the views each point is seen by.
          pixels: (row, column) of the pixel's centre as shares of the image.

        Returns:
          One feature a point, not normalised, as official.
        """
        split = [(), ("batch", "camera"), ("batch",), ("batch",)]
        return per_device(self._own_views, split, ("batch",))(parameters, images, cameras, pixels)

    def _own_views(self, parameters: ArrayTree, images: Array, cameras: Array, pixels: Array) -> Array:
        """Every device reads its own views; a point is seen by one of all devices' views."""
        batch, views = images.shape[:2]
        model = merge_model(self.graph, parameters["parameters"], parameters["statistics"])
        view = cameras - first_view(views)
        own = (view >= 0) & (view < views)
        # All views of the batch lie in one row of pictures: one gather serves every example.
        picture = jnp.clip(view, 0, views - 1) + views * jnp.arange(batch)[:, None]
        sampled = model.features_at(images.reshape(-1, *images.shape[2:]), picture.reshape(-1), pixels.reshape(-1, 2))
        sampled = sampled.reshape(batch, -1, self.feature_dim)
        return sum_over_views(jnp.where(own[..., None], sampled, 0.0))


def load_teacher(config: ml_collections.ConfigDict) -> Teacher:
    """Loads the teacher that an experiment names.

    Args:
      config: its `teacher` part: name ("maskclip" or "maskclip_plus"); path (hub name or folder) of a CLIP, whose
        text tower answers for both; variant of MaskCLIP; weights, the file of MaskCLIP+.

    Raises:
      ValueError: unknown name, or a text tower of another width than the teacher's features; see `load_clip` and
        `load_network` for what bad paths give.
    """
    if config.name not in ("maskclip", "maskclip_plus"):
        raise ValueError(f'config.teacher.name is {config.name!r}; known teachers: "maskclip", "maskclip_plus"')
    if config.name == "maskclip_plus" and not config.weights:
        raise ValueError(
            'config.teacher.name is "maskclip_plus" and config.teacher.weights is empty: name the .pth or .safetensors '
            "file of MaskCLIP+ with --config.teacher.weights=FILE"
        )
    clip = load_clip(config.path)
    embedding = clip.model.vision.config.embedding
    if config.name == "maskclip":
        model, feature_dim = MaskCLIP(clip.model, config.variant), embedding
    else:
        network = load_network(config.weights)
        model, feature_dim = MaskCLIPPlus(network), network.feature_dim
        if feature_dim != embedding:
            raise ValueError(
                f"teacher {config.weights} has features of width {feature_dim}, the texts of {config.path} have "
                f"{embedding}: set --config.teacher.path to the CLIP that taught it (published: "
                "openai/clip-vit-base-patch16)"
            )
    graph, parameters, statistics = split_model(model)
    return Teacher(graph, {"parameters": parameters, "statistics": statistics}, feature_dim, clip)


def abstract_teacher(config: ml_collections.ConfigDict) -> Teacher:
    """The teacher's structure and shapes without its weights, to compile a program with.

    Args:
      config: the `teacher` part of an experiment. MaskCLIP+ has its published sizes; its file is not read.

    Raises:
      FileNotFoundError, ValueError: see `abstract_clip`.
    """
    if config.name == "maskclip_plus":
        model = nnx.eval_shape(lambda: MaskCLIPPlus(DeepLabV2(rngs=nnx.Rngs(0))))
        feature_dim = model.network.feature_dim
    else:
        clip = abstract_clip(config.path)
        model, feature_dim = MaskCLIP(clip, config.variant), clip.vision.config.embedding
    graph, parameters, statistics = split_model(model)
    return Teacher(graph, {"parameters": parameters, "statistics": statistics}, feature_dim, None)


def teacher_fingerprint(teacher: Teacher) -> str:
    """Hash of the teacher's arrays, which variants may share; a cache is checked by it by variant, by image size."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(teacher.parameters)):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()
