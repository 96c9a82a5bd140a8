"""Facts of the lidar data sets that ScaLR trains on: classes, label maps, intensities, fields of view.

Sources: the configuration files and dataset classes of ScaLR (github.com/valeoai/ScaLR), the label maps that each data
set publishes.
"""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from pop3d_jax.nuscenes import CAMERAS, CLASS_NAMES, IGNORE, LIDARSEG_TO_CLASS


@dataclasses.dataclass(frozen=True)
class LidarDataset:
    """One data set as its records hold it.

    Attributes:
      name: as in a records folder's index and in `config.datasets`.
      cameras: names of the cameras of a record, in its order.
      class_names: of the semantic classes that are scored, from class 0.
      raw_to_class: class of each raw category index of a record's labels; 255 where it is not scored.
      intensity_mean, intensity_std: of the network's input, in the unit of the record's intensities.
      min_depth: metres; points nearer than that are paired with no pixel.
      depth_of: "camera" where that depth is along the camera's axis, "lidar_x" where it is the lidar's own x.
      z_shift: added to z of every point, metres, before anything else.
    """

    name: str
    cameras: tuple[str, ...]
    class_names: tuple[str, ...]
    raw_to_class: UInt8[np.ndarray, " raw"]
    intensity_mean: float
    intensity_std: float
    min_depth: float
    depth_of: str = "camera"
    z_shift: float = 0.0


NUSCENES = LidarDataset(
    name="nuscenes",
    cameras=CAMERAS,
    class_names=CLASS_NAMES[1:17],
    # Class 0 of the occupancy protocol has no class here; the sixteen others move down by one.
    raw_to_class=np.where(LIDARSEG_TO_CLASS == 0, IGNORE, LIDARSEG_TO_CLASS - 1).astype(np.uint8),
    intensity_mean=18.742355,
    intensity_std=22.04632,
    min_depth=1.0,
)

LIDAR_DATASETS = {dataset.name: dataset for dataset in (NUSCENES,)}
