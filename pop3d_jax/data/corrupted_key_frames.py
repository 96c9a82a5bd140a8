"""Key frames whose sweeps are corrupted on the way, for `pop3d_jax.segmentation_evaluator`."""

import dataclasses
import functools
import hashlib
from typing import SupportsIndex

import numpy as np

from pop3d_jax.corruptions import Sensor, corrupt, raw_sensor
from pop3d_jax.data.lidar_pipeline import KeyFrames
from pop3d_jax.data.records import KeyFrame, RecordError
from pop3d_jax.lidar_datasets import LidarDataset


@dataclasses.dataclass(frozen=True)
class CorruptedKeyFrames:
    """The key frames of a split after one corruption: `points` and `lidarseg` change, all else stays.

    The draws of a sweep come from (seed, corruption, sample token) alone: the same in any order and on any host. They
    do not depend on the severity, so that a heavier corruption of points or beams takes those that a lighter one takes.

    A sweep is corrupted where the network has it, its z moved by `dataset.z_shift`. That rays begin at the origin there
    is so for nuScenes and SemanticKITTI; for PandaSet, whose records are in the frame of the car, it is an assumption.

    Attributes:
      key_frames: with labels, uncorrupted.
      dataset: whose they are.
      corruption: one of `pop3d_jax.corruptions.CORRUPTIONS`.
      severity: 1, 2 or 3.
      seed: of all draws.
    """

    key_frames: KeyFrames
    dataset: LidarDataset
    corruption: str
    severity: int
    seed: int = 0

    def __len__(self) -> int:
        return len(self.key_frames)

    def __getitem__(self, index: SupportsIndex) -> KeyFrame:
        """The corrupted key frame at `index`.

        Raises:
          RecordError: the sweep cannot be corrupted, such as one without labels; names the sample.
        """
        key_frame = self.key_frames[index]
        draws = hashlib.sha256(f"{self.seed}:{self.corruption}:{key_frame.sample_token}".encode()).digest()
        rng = np.random.default_rng(np.frombuffer(draws, "<u4"))
        shift = np.float32(self.dataset.z_shift)
        points = key_frame.points.copy()
        points[:, 2] += shift
        try:
            points, labels = corrupt(self.corruption, self.severity, points, key_frame.lidarseg, rng, self._sensor)
        except ValueError as error:
            raise RecordError(f"sample {key_frame.sample_token} of {self.dataset.name}: {error}") from error
        points[:, 2] -= shift
        return dataclasses.replace(key_frame, points=points, lidarseg=labels)

    @functools.cached_property
    def _sensor(self) -> Sensor:
        return raw_sensor(self.dataset)
