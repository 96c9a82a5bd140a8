"""The frozen teacher: what the lidar points look like, in the space of a text encoder.

It runs inside the training step, so that no features are ever stored (the official layout keeps 1.5 TB of them).
"""

import dataclasses

import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from pop3d_jax.models.clip import LoadedCLIP, load_clip
from pop3d_jax.models.maskclip import MaskCLIP, normalise, sample_at_points
from pop3d_jax.models.parameters import ArrayTree, merge_model, split_model


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen image model, split into structure and parameters.

    Attributes:
      graph: structure, for `merge_model`.
      parameters: arrays; they go into the jitted step as an argument, never as constants of the program.
      feature_dim: width of its features, which must be the student's.
      clip: both towers and the tokenizer, for the text side.
    """

    graph: nnx.GraphDef
    parameters: ArrayTree
    feature_dim: int
    clip: LoadedCLIP

    def dense_features(
        self, parameters: ArrayTree, images: UInt8[Array, "image height width 3"]
    ) -> tuple[Float[Array, "image rows columns dim"], Float[Array, "2"]]:
        """Features of whole RGB images (0..255), and the share of the padded picture that the image fills.

        Pictures are padded at the bottom and right to whole patches; the grid covers the padded picture.
        """
        model = merge_model(self.graph, parameters, {})
        features = model.dense_features(normalise(images))
        patch = model.vision.config.patch_size
        image_hw = jnp.array(images.shape[1:3], jnp.float32)
        padded_hw = jnp.array(features.shape[1:3], jnp.float32) * patch
        return features, image_hw / padded_hw

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
        batch, views = images.shape[:2]
        features, share = self.dense_features(parameters, images.reshape(-1, *images.shape[2:]))
        # All views of the batch lie in one row of pictures: one gather serves every example.
        picture = cameras + views * jnp.arange(batch)[:, None]
        sampled = sample_at_points(features, picture.reshape(-1), (pixels * share).reshape(-1, 2))
        return sampled.reshape(batch, -1, features.shape[-1])


def load_teacher(config: ml_collections.ConfigDict) -> Teacher:
    """Loads the teacher that an experiment names.

    Args:
      config: its `teacher` part: name ("maskclip"), path (hub name or folder), variant.

    Raises:
      ValueError: unknown name; see `load_clip` for what a bad path gives.
    """
    if config.name != "maskclip":
        raise ValueError(f'config.teacher.name is {config.name!r}; known teachers: "maskclip"')
    clip = load_clip(config.path)
    model = MaskCLIP(clip.model, config.variant)
    graph, parameters, statistics = split_model(model)
    if statistics:
        raise ValueError(f"teacher {config.path} has state besides parameters, which a frozen teacher may not have")
    return Teacher(graph, parameters, clip.model.vision.config.embedding, clip)
