"""Poses of key frames, from records or from a store: where the rays of RayIoU start."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float64

from pop3d_jax.data.records import RecordSource
from pop3d_jax.grids.feature_grids import FeatureGrids
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


def poses_of_store(grids: FeatureGrids) -> Iterator[KeyFramePose]:
    """Of every key frame of a store."""
    timestamp, lidar_to_ego, ego_to_global = (
        grids.store.read(name) for name in ("timestamp", "lidar_to_ego", "ego_to_global")
    )
    for number, (token, scene) in enumerate(zip(grids.sample_tokens, grids.scene_names, strict=True)):
        yield KeyFramePose(token, scene, int(timestamp[number]), lidar_to_ego[number], ego_to_global[number])


def origins_by_token(poses: Iterable[KeyFramePose]) -> dict[str, Float64[np.ndarray, "origins 3"]]:
    """For each key frame the lidar's places at the key frames of its scene, as RayIoU takes them; see `lidar_origins`.

    The poses must be those of whole scenes: a key frame that is missing is a place that no ray starts from.
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
