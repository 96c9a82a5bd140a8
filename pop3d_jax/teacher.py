"""The frozen teacher: what the lidar points look like, for some teachers in the space of a text encoder.

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
from pop3d_jax.models.dinov2 import FEATURES, POSITION_RULES, DINOv2Teacher
from pop3d_jax.models.dinov2_weights import abstract_dinov2, load_dinov2
from pop3d_jax.models.maskclip import MaskCLIP
from pop3d_jax.models.maskclip_plus import MaskCLIPPlus
from pop3d_jax.models.maskclip_plus_weights import load_network
from pop3d_jax.models.parameters import ArrayTree, merge_model, split_model
from pop3d_jax.sharding import first_view, per_device, sum_over_views

TEACHERS_WITH_TEXT = ("maskclip", "maskclip_plus")
TEACHERS = (*TEACHERS_WITH_TEXT, "dinov2")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen image model, split into structure and arrays.

    Attributes:
      graph: structure of a model that has `features_at`, for `merge_model`.
      parameters: its arrays, `parameters` and `statistics`; they go into the jitted step as an argument, never as
        constants of the program.
      feature_dim: width of its features, which must be the student's.
      clip: both towers and the tokenizer, for the text side; None for DINOv2, which has none, and for shapes without
        weights.
      description: name and origin, for messages.
    """

    graph: nnx.GraphDef
    parameters: ArrayTree
    feature_dim: int
    clip: LoadedCLIP | None
    description: str

    def check_width(self, head: int, field: str) -> None:
        """Whether a student's head predicts as many numbers as the teacher says.

        Args:
          head: width of the head.
          field: of the configuration, which sets it.

        Raises:
          ValueError: it does not.
        """
        if self.feature_dim != head:
            raise ValueError(
                f"teacher {self.description} has features of width {self.feature_dim}, the student's head has {head}: "
                f"set --{field}={self.feature_dim}"
            )

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
      config: its `teacher` part: name, one of `TEACHERS`; path (hub name or folder) of a CLIP, whose text tower answers
        for "maskclip" and "maskclip_plus", or of a DINOv2; variant of MaskCLIP, or DINOv2's position rule; weights,
        the file of MaskCLIP+, or optionally one of the original DINOv2 code; feature of DINOv2 ("x_pre_norm" unless
        it says otherwise).

    Raises:
      ValueError: unknown name or variant, or a text tower of another width than the teacher's features; see
        `load_clip`, `load_network` and `load_dinov2` for what bad paths give.
    """
    _check_name(config)
    if config.name == "dinov2":
        network = load_dinov2(config.path, weights=config.get("weights", ""), position_rule=_position_rule(config))
        return _teacher(config, DINOv2Teacher(network, _feature(config)), network.config.width, None)
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
    return _teacher(config, model, feature_dim, clip)


def abstract_teacher(config: ml_collections.ConfigDict) -> Teacher:
    """The teacher's structure and shapes without its weights, to compile a program with.

    Args:
      config: the `teacher` part of an experiment. MaskCLIP+ has its published sizes; its file is not read.

    Raises:
      FileNotFoundError, ValueError: see `abstract_clip` and `abstract_dinov2`.
    """
    _check_name(config)
    if config.name == "dinov2":
        network = abstract_dinov2(config.path, weights=config.get("weights", ""), position_rule=_position_rule(config))
        model, feature_dim = nnx.eval_shape(lambda: DINOv2Teacher(network, _feature(config))), network.config.width
    elif config.name == "maskclip_plus":
        model = nnx.eval_shape(lambda: MaskCLIPPlus(DeepLabV2(rngs=nnx.Rngs(0))))
        feature_dim = model.network.feature_dim
    else:
        clip = abstract_clip(config.path)
        model, feature_dim = MaskCLIP(clip, config.variant), clip.vision.config.embedding
    return _teacher(config, model, feature_dim, None)


def check_text_side(config: ml_collections.ConfigDict, way_out: str = "") -> None:
    """Whether phrases can be compared with what the teacher of an experiment says.

    Args:
      config: the `teacher` part of an experiment.
      way_out: what else the user may do, for the message.

    Raises:
      ValueError: they cannot; the message names the teacher.
    """
    if config.name not in TEACHERS_WITH_TEXT:
        raise ValueError(
            f"teacher {_description(config)} has no text side: no phrase or class name can be compared with the "
            "features of its students. What asks for texts needs a run whose config.teacher.name is one of "
            + ", ".join(TEACHERS_WITH_TEXT)
            + (f"; or {way_out}" if way_out else "")
        )


def load_text_side(config: ml_collections.ConfigDict) -> LoadedCLIP:
    """The CLIP in whose text space the students of a teacher live.

    Args:
      config: the `teacher` part of an experiment.

    Raises:
      ValueError: the teacher has no text side; see `load_clip` for what bad paths raise.
    """
    check_text_side(config)
    return load_clip(config.path)


def teacher_fingerprint(teacher: Teacher) -> str:
    """Hash of the teacher's arrays, which variants may share; a cache is checked by it by variant, by image size."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(teacher.parameters)):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def _teacher(
    config: ml_collections.ConfigDict, model: nnx.Module, feature_dim: int, clip: LoadedCLIP | None
) -> Teacher:
    graph, parameters, statistics = split_model(model)
    arrays = {"parameters": parameters, "statistics": statistics}
    return Teacher(graph, arrays, feature_dim, clip, _description(config))


def _description(config: ml_collections.ConfigDict) -> str:
    return f"{config.name} ({config.get('weights') or config.path})"


def _check_name(config: ml_collections.ConfigDict) -> None:
    if config.name not in TEACHERS:
        known = ", ".join(f'"{name}"' for name in TEACHERS)
        raise ValueError(f"config.teacher.name is {config.name!r}; known teachers: {known}")


def _position_rule(config: ml_collections.ConfigDict) -> str:
    if config.variant not in POSITION_RULES:
        raise ValueError(
            f"config.teacher.variant is {config.variant!r}; of the teacher dinov2 it is the rule by which positions "
            f"are resized: set --config.teacher.variant to one of {', '.join(POSITION_RULES)}"
        )
    return config.variant


def _feature(config: ml_collections.ConfigDict) -> str:
    # Experiments of POP-3D have no such field.
    return config.get("feature", FEATURES[0])
