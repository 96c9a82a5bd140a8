"""Poses of key frames, from records: where the rays of RayIoU start."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float64

from pop3d_jax.data.records import RecordSource
from pop3d_jax.occ3d.frames import GroundTruth, some
from pop3d_jax.occ3d.label_files import OccupancyFileError
from pop3d_jax.occ3d.origins import lidar_origins


@dataclasses.dataclass(frozen=True)
class KeyFramePose:
    """When and where a key frame was taken; matrices as in `pop3d_jax.data.records.KeyFrame`."""

    sample_token: str
    scene_name: str
    timestamp: int
    lidar_to_ego: Float64[np.ndarray, "4 4"]
    ego_to_global: Float64[np.ndarray, "4 4"]


def poses_of_records(source: RecordSource) -> Iterator[KeyFramePose]:
    """Of every key frame of a split; each record is read once."""
    for number in range(len(source)):
        key_frame = source[number]
        yield KeyFramePose(**{field.name: getattr(key_frame, field.name) for field in dataclasses.fields(KeyFramePose)})


def origins_by_token(poses: Iterable[KeyFramePose]) -> dict[str, Float64[np.ndarray, "origins 3"]]:
    """For each key frame the lidar's places at the key frames of its scene, as RayIoU takes them; see `lidar_origins`.

    The poses must be those of whole scenes: a key frame that is missing is a place that no ray starts from.
    `check_poses` finds out.
    """
    scenes: dict[str, list[KeyFramePose]] = {}
    for pose in poses:
        scenes.setdefault(pose.scene_name, []).append(pose)
    origins = {}
    for scene in scenes.values():
        in_time = sorted(scene, key=lambda pose: pose.timestamp)
        lidar_to_ego = np.stack([pose.lidar_to_ego for pose in in_time])
        ego_to_global = np.stack([pose.ego_to_global for pose in in_time])
        for number, pose in enumerate(in_time):
            origins[pose.sample_token] = lidar_origins(lidar_to_ego, ego_to_global, number)
    return origins


def check_poses(truth: GroundTruth, tokens: Sequence[str], posed: Collection[str]) -> None:
    """Checks that there is a pose for every key frame of the scenes that are scored: else rays start elsewhere.

    Raises:
      OccupancyFileError: names those without one.
    """
    scenes = {truth.scene_of(token) for token in tokens}
    lacking = [token for token in truth.sample_tokens if token not in posed and truth.scene_of(token) in scenes]
    if lacking:
        raise OccupancyFileError(
            f"RayIoU starts from the lidar's places at all key frames of a scene, and the records have no pose for "
            f"{some(lacking, len(truth.sample_tokens))} key frames of the scored scenes: name whole records, or leave "
            "RayIoU out"
        )
