"""A trained run ready to predict: restored once, asked about single key frames."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, UInt8

from pop3d_jax.checkpoint import Checkpoints
from pop3d_jax.data.pipeline import make_example
from pop3d_jax.data.records import KeyFrame, RecordSource
from pop3d_jax.experiment import Student, example_settings, make_student, restored_parts
from pop3d_jax.images import network_images
from pop3d_jax.labels import semantic_rays
from pop3d_jax.models.parameters import merge_model
from pop3d_jax.models.pop3d import Pop3D
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


class StudentRun:
    """The student of a workdir on this host's devices.

    Attributes:
      config: of the run.
      student: structure of the network.
      step: of the checkpoint.
      restored: its arrays, `parameters` and `statistics`, on every device.
      mesh: the devices, one key frame on each at a time.
    """

    def __init__(self, workdir: epath.PathLike, step: int | None = None):
        """Restores a checkpoint (the newest by default).

        Raises:
          WorkdirError, CheckpointError: nothing to restore, or not of this model.
          ValueError: the run is one of a lidar network.
        """
        self.mesh = make_mesh(len(jax.local_devices()), 1, jax.local_devices())
        self.config: ml_collections.ConfigDict = read_config(workdir)
        task = self.config.get("task", "occupancy")
        if task != "occupancy":
            way = "query it with --lidar" if task == "distillation" else "judge it with pop3d_jax.evaluate_segmentation"
            raise ValueError(f"{workdir} holds a run of task {task!r}, a lidar network: {way}")
        self.student: Student = make_student(self.config)
        checkpoints = Checkpoints(epath.Path(workdir) / "checkpoints", read_only=True)
        self.step = checkpoints.latest_step() if step is None else step
        self.restored = checkpoints.restore(restored_parts(self.student), replicated(self.mesh), step)
        self._settings = example_settings(self.config, training=False)

    def model(self, restored: dict) -> Pop3D:
        """The network with its arrays, inside a jitted function that takes `restored`."""
        return merge_model(self.student.graph, restored["parameters"], restored["statistics"])

    def batches(
        self,
        key_frames: Sequence[KeyFrame],
        more: Callable[[KeyFrame], dict[str, np.ndarray]] = lambda _: {},
    ) -> Iterator[tuple[Sequence[KeyFrame], dict[str, jax.Array]]]:
        """Key frames, one for each device at a time, and their arrays there; pictures are decoded meanwhile.

        Args:
          key_frames: any number; the arrays of the last batch repeat the last, so that one shape is compiled.
          more: other arrays of a key frame, besides `images` and `lidar_to_image`.
        """
        devices, total = self.mesh.size, len(key_frames)

        def read(start: int) -> tuple[list[KeyFrame], dict[str, np.ndarray]]:
            frames = [key_frames[number] for number in range(start, min(start + devices, total))]
            padded = frames + [frames[-1]] * (devices - len(frames))
            examples = [make_example(frame, self._settings, None) for frame in padded]
            arrays = {name: np.stack([example[name] for example in examples]) for name in ("images", "lidar_to_image")}
            others = [more(frame) for frame in padded]
            return frames, arrays | {name: np.stack([other[name] for other in others]) for name in others[0]}

        with concurrent.futures.ThreadPoolExecutor(1) as decoder:
            # One batch ahead and no more: a split has thousands of key frames.
            coming = decoder.submit(read, 0) if total else None
            for start in range(0, total, devices):
                frames, decoded = coming.result()
                if start + devices < total:
                    coming = decoder.submit(read, start + devices)
                yield frames, jax.device_put(decoded, NamedSharding(self.mesh, PartitionSpec("data")))


class Predictor(StudentRun):
    """The student of a workdir, asked for its whole grid."""

    def __init__(self, workdir: epath.PathLike, step: int | None = None):
        """Restores a checkpoint; see `StudentRun`."""
        super().__init__(workdir, step)

        def predict(restored: dict, images: jax.Array, lidar_to_image: jax.Array) -> tuple[jax.Array, jax.Array]:
            output = self.model(restored)(network_images(images), lidar_to_image, voxel_features=True)
            return jax.nn.softmax(output.occupancy_logits)[..., 1], output.voxel_features

        self._predict = jax.jit(predict)

    def __call__(self, key_frame: KeyFrame) -> Prediction:
        """Predicts one key frame; the lidar is not looked at."""
        return next(self.many([key_frame]))

    def many(self, key_frames: Sequence[KeyFrame]) -> Iterator[Prediction]:
        """Predicts key frames, one on each of this host's devices at a time; pictures are decoded meanwhile."""
        for frames, arrays in self.batches(key_frames):
            with jax.set_mesh(self.mesh):
                occupancy, features = self._predict(self.restored, arrays["images"], arrays["lidar_to_image"])
            for i in range(len(frames)):
                yield Prediction(np.asarray(occupancy[i]), np.asarray(features[i]))

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


def find_sample(source: RecordSource, sample: str, flag: str = "--sample") -> int:
    """Index of a sample given by its token or its number in the split.

    Raises:
      ValueError: there is no such sample.
    """
    if sample in source.sample_tokens:
        return source.sample_tokens.index(sample)
    if sample.isdigit() and int(sample) < len(source):
        return int(sample)
    raise ValueError(f"{flag}={sample} is neither a sample token of the split nor a number from 0 to {len(source) - 1}")
