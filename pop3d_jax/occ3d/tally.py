"""What is counted of a prediction, key frame by key frame: enough for every rule at the end."""

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from pop3d_jax.occ3d.counts import confusion_of
from pop3d_jax.occ3d.grid import MASKS, OCC3D_VOLUME, Occ3DFrame
from pop3d_jax.occ3d.ray_iou import CastRays, RayCounts, count_rays


class Tally:
    """Sums over key frames of one prediction.

    Attributes:
      confusion: for each mask, voxels by label in the ground truth and in the prediction; see `confusion_of`.
      unseen: for each mask, its voxels that lie outside the predicting network's volume.
      rays: counts of RayIoU; None where no origins were given.
    """

    def __init__(self) -> None:
        self.confusion: dict[str, Int64[np.ndarray, "19 18"]] = {}
        self.unseen = dict.fromkeys(MASKS, 0)
        self.rays: RayCounts | None = None

    def add(
        self,
        frame: Occ3DFrame,
        predicted: UInt8[np.ndarray, "x y z"],
        *,
        unseen: Bool[np.ndarray, "x y z"] | None = None,
        origins: Float64[np.ndarray, "origins 3"] | None = None,
        true_rays: CastRays | None = None,
    ) -> None:
        """Adds a key frame.

        Args:
          frame: ground truth.
          predicted: labels.
          unseen: voxels outside the network's volume.
          origins: where rays start, metres, ego frame; None leaves RayIoU out.
          true_rays: what they hit in the ground truth; see `count_rays`.
        """
        for name in MASKS:
            mask = frame.mask(name)
            confusion = confusion_of(frame.semantics, predicted, mask)
            self.confusion[name] = self.confusion.get(name, 0) + confusion
            if unseen is not None:
                self.unseen[name] += int((unseen & mask).sum())
        if origins is not None:
            counts = count_rays(frame.semantics, predicted, origins, OCC3D_VOLUME, true_rays=true_rays)
            self.rays = counts if self.rays is None else self.rays + counts
