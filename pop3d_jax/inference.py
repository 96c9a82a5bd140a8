"""A trained run ready to predict: restored once, asked about single key frames."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, UInt8

from pop3d_jax.checkpoint import Checkpoints
from pop3d_jax.data.pipeline import make_example
from pop3d_jax.data.records import KeyFrame, RecordSource
from pop3d_jax.experiment import Student, example_settings, make_student, restored_parts
from pop3d_jax.images import network_images
from pop3d_jax.labels import semantic_rays
from pop3d_jax.models.parameters import merge_model
from pop3d_jax.sharding import make_mesh, replicated
from pop3d_jax.workdir import read_config


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the student says of one key frame, on the host.

    Attributes:
      occupancy: probability that a voxel is occupied.
      features: in the text encoder's space, not normalised.
    """

    occupancy: Float[np.ndarray, "x y z"]
    features: Float[np.ndarray, "x y z dim"]

    @property
    def occupied(self) -> Bool[np.ndarray, "x y z"]:
        """The official decision: the larger of the two logits."""
        return self.occupancy > 0.5


class Predictor:
    """The student of a workdir."""

    def __init__(self, workdir: epath.PathLike, step: int | None = None):
        """Restores a checkpoint (the newest by default).

        Raises:
          WorkdirError, CheckpointError: nothing to restore, or not of this model.
        """
        self.config: ml_collections.ConfigDict = read_config(workdir)
        self.student: Student = make_student(self.config)
        mesh = make_mesh()
        checkpoints = Checkpoints(epath.Path(workdir) / "checkpoints", read_only=True)
        self._restored = checkpoints.restore(restored_parts(self.student), replicated(mesh), step)
        self._settings = example_settings(self.config, training=False)

        def predict(restored: dict, images: jax.Array, lidar_to_image: jax.Array) -> tuple[jax.Array, jax.Array]:
            model = merge_model(self.student.graph, restored["parameters"], restored["statistics"])
            output = model(network_images(images), lidar_to_image, voxel_features=True)
            return jax.nn.softmax(output.occupancy_logits)[0, ..., 1], output.voxel_features[0]

        self._predict = jax.jit(predict)

    def __call__(self, key_frame: KeyFrame) -> Prediction:
        """Predicts one key frame; the lidar is not looked at."""
        example = make_example(key_frame, self._settings, None)
        occupancy, features = self._predict(self._restored, example["images"][None], example["lidar_to_image"][None])
        return Prediction(np.asarray(occupancy), np.asarray(features))

    def target(self, key_frame: KeyFrame) -> UInt8[np.ndarray, "x y z"] | None:
        """The semantic evaluation target of a key frame (`semantic_rays`), or None where it has no labels."""
        if not len(key_frame.lidarseg):
            return None
        example = make_example(key_frame, dataclasses.replace(self._settings, images=False), None)
        grid = semantic_rays(
            jnp.asarray(example["points"]),
            jnp.asarray(example["point_labels"]),
            jnp.asarray(example["point_mask"]),
            self.student.volume,
        )
        return np.asarray(grid)


def find_sample(source: RecordSource, sample: str) -> int:
    """Index of a sample given by its token or its number in the split.

    Raises:
      ValueError: there is no such sample.
    """
    if sample in source.sample_tokens:
        return source.sample_tokens.index(sample)
    if sample.isdigit() and int(sample) < len(source):
        return int(sample)
    raise ValueError(
        f"--sample={sample} is neither a sample token of the split nor a number from 0 to {len(source) - 1}"
    )
