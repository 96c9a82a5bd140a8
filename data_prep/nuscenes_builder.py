"""The TFDS builder of nuScenes key frames: one shard a scene, in the official order of the scenes."""

from typing import ClassVar

from data_prep.keyframes_builder import KeyframesBuilder


class NuscenesKeyframes(KeyframesBuilder, skip_registration=True):
    """nuScenes key frames, six images and a sweep each."""

    name = "nuscenes_keyframes"
    DESCRIPTION: ClassVar[str] = (
        "Key frames in nuScenes' layout: six surround images, lidar sweep, calibration, labels."
    )
