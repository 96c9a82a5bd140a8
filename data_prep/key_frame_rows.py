"""What is known of key frames before their sensor files are read: the same for every data set."""

import dataclasses

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8

from pop3d_jax.data.records import KeyFrame


@dataclasses.dataclass(frozen=True)
class KeyFrameRow:
    """What tables and calibration files say about one key frame; fields as in `pop3d_jax.data.records.KeyFrame`.

    Attributes:
      label_file: path below the data set's root, None where the data set has no point labels.
      image_sizes: (height, width) that the tables give for each camera; empty where the data set states none.
    """

    sample_token: str
    scene_token: str
    scene_name: str
    timestamp: int
    lidar_token: str
    lidar_file: str
    label_file: str | None
    lidar_to_ego: Float64[np.ndarray, "4 4"]
    ego_to_global: Float64[np.ndarray, "4 4"]
    camera_tokens: list[str]
    camera_files: list[str]
    camera_timestamps: Int64[np.ndarray, " cameras"]
    image_sizes: list[tuple[int, int]]
    intrinsics: Float64[np.ndarray, "cameras 3 3"]
    lidar_to_camera: Float64[np.ndarray, "cameras 4 4"]

    def key_frame(
        self,
        images: list[bytes],
        points: Float32[np.ndarray, "points 5"],
        lidarseg: UInt8[np.ndarray, " labels"],
    ) -> KeyFrame:
        """The record, with what the sensor files hold."""
        same = {field.name for field in dataclasses.fields(KeyFrame)} - {"images", "points", "lidarseg"}
        return KeyFrame(images=images, points=points, lidarseg=lidarseg, **{name: getattr(self, name) for name in same})


@dataclasses.dataclass(frozen=True)
class SceneKeyFrames:
    """The key frames of a scene, or of a part of one, in the order of their time: what one shard holds.

    Attributes:
      broken: sample token and error of each key frame that the tables do not join to a whole.
    """

    scene_name: str
    scene_token: str
    key_frames: list[KeyFrameRow]
    broken: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class SplitKeyFrames:
    """A split of a data set.

    Attributes:
      scenes: those of the split that the data set has, in the official order.
      absent_scenes: names of the split's other scenes, where they are known.
      labelled: whether there are point labels.
      fingerprint: of the tables.
    """

    scenes: list[SceneKeyFrames]
    absent_scenes: list[str]
    labelled: bool
    fingerprint: str


def parts(scene: SceneKeyFrames, length: int) -> list[SceneKeyFrames]:
    """The scene in pieces of at most `length` key frames, so that no shard gets too large for one worker."""
    starts = range(0, max(1, len(scene.key_frames)), length)
    pieces = [dataclasses.replace(scene, key_frames=scene.key_frames[at : at + length], broken=[]) for at in starts]
    return [dataclasses.replace(pieces[0], broken=scene.broken), *pieces[1:]]
