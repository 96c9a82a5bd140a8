"""Facts of the lidar data sets that ScaLR trains on: classes, label maps, intensities, rules of pairing.

Sources: the dataset classes of ScaLR (github.com/valeoai/ScaLR, datasets/), which hold statistics of intensities, depth
rules, the shift of PandaSet and its classes; the label map that SemanticKITTI publishes (semantic-kitti.yaml of
github.com/PRBonn/semantic-kitti-api); the file classes.json of PandaSet, which names no class 0: that it means noise is
ScaLR's reading. Classes of ground and objects: the scripts of Robo3D (github.com/ldkong1205/Robo3D, create/) for
nuScenes and SemanticKITTI; they know no PandaSet, whose classes were chosen here to mean the same.
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
      raw_ids: the ids in the data set's label files that the raw indices stand for, ascending; empty where the files
        hold the indices themselves.
      intensity_mean, intensity_std: of the network's input, in the unit of the record's intensities.
      beams: of the lidar.
      max_intensity: largest value of the record's intensities.
      ground_classes: names of the classes of flat ground, which rain makes wet.
      object_classes: names of the classes of vehicles and bicycles, whose dark paint swallows echoes.
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
    beams: int
    max_intensity: float
    ground_classes: tuple[str, ...]
    object_classes: tuple[str, ...]
    min_depth: float
    depth_of: str = "camera"
    z_shift: float = 0.0
    raw_ids: tuple[int, ...] = ()


NUSCENES = LidarDataset(
    name="nuscenes",
    cameras=CAMERAS,
    class_names=CLASS_NAMES[1:17],
    # Class 0 of the occupancy protocol has no class here; the sixteen others move down by one.
    raw_to_class=np.where(LIDARSEG_TO_CLASS == 0, IGNORE, LIDARSEG_TO_CLASS - 1).astype(np.uint8),
    intensity_mean=18.742355,
    intensity_std=22.04632,
    beams=32,
    max_intensity=255.0,
    ground_classes=("driveable_surface", "other_flat", "sidewalk"),
    object_classes=("bicycle", "bus", "car", "construction_vehicle", "motorcycle", "trailer", "truck"),
    min_depth=1.0,
)

# Class of each id in the label files, in the published order; None is not scored. Moving things are their class.
_KITTI_CLASSES = (
    ("car", (10, 252)),
    ("bicycle", (11,)),
    ("motorcycle", (15,)),
    ("truck", (18, 258)),
    ("other-vehicle", (13, 16, 20, 256, 257, 259)),
    ("person", (30, 254)),
    ("bicyclist", (31, 253)),
    ("motorcyclist", (32, 255)),
    ("road", (40, 60)),
    ("parking", (44,)),
    ("sidewalk", (48,)),
    ("other-ground", (49,)),
    ("building", (50,)),
    ("fence", (51,)),
    ("vegetation", (70,)),
    ("trunk", (71,)),
    ("terrain", (72,)),
    ("pole", (80,)),
    ("traffic-sign", (81,)),
)
# Unlabelled, outlier, other structure, other object.
_KITTI_UNSCORED = (0, 1, 52, 99)


def _raw_to_class(
    classes: tuple[tuple[str, tuple[int, ...]], ...], raw_ids: tuple[int, ...]
) -> UInt8[np.ndarray, " raw"]:
    """Class of the raw index of every id; `IGNORE` where no class has the id."""
    class_of = {raw: number for number, (_, ids) in enumerate(classes) for raw in ids}
    return np.array([class_of.get(raw, IGNORE) for raw in raw_ids], np.uint8)


_KITTI_IDS = tuple(sorted((*_KITTI_UNSCORED, *(raw for _, ids in _KITTI_CLASSES for raw in ids))))

SEMANTIC_KITTI = LidarDataset(
    name="semantic_kitti",
    cameras=("image_2",),
    class_names=tuple(name for name, _ in _KITTI_CLASSES),
    raw_to_class=_raw_to_class(_KITTI_CLASSES, _KITTI_IDS),
    intensity_mean=0.28613698,
    intensity_std=0.14090556,
    beams=64,
    max_intensity=1.0,
    ground_classes=("road", "parking", "sidewalk", "other-ground"),
    object_classes=("car", "bicycle", "motorcycle", "truck", "other-vehicle"),
    min_depth=1.0,
    depth_of="lidar_x",
    raw_ids=_KITTI_IDS,
)

# By the ids of classes.json. Not scored: noise, smoke, exhaust, spray, reflections, emergency vehicles, personal
# mobility devices, scooters, animals, rolling containers.
_PANDASET_CLASSES = (
    ("road", (7,)),
    ("traffic sign", (36, 38)),
    ("barrier", (35, 39)),
    ("pedestrian", (30, 31)),
    ("vegetation", (5,)),
    ("road marking", (8, 9, 10)),
    ("sidewalk", (11,)),
    ("manmade", (41, 42)),
    ("traffic cone", (34, 37)),
    ("car", (13,)),
    ("motorcycle", (18,)),
    ("truck", (14, 15, 16)),
    ("bus", (23,)),
    ("bicycle", (26,)),
    ("other vehicle", (17, 19, 20, 21, 27, 28, 29)),
    ("ground", (6,)),
    ("driveway", (12,)),
)
PANDASET_CATEGORY_COUNT = 43
# Scenes north of this latitude are trained on, the others validated on: San Francisco, El Camino Real.
PANDASET_TRAIN_LATITUDE = 37.6

PANDAR64 = LidarDataset(
    name="pandar64",
    cameras=(
        "front_camera",
        "front_right_camera",
        "front_left_camera",
        "back_camera",
        "left_camera",
        "right_camera",
    ),
    class_names=tuple(name for name, _ in _PANDASET_CLASSES),
    raw_to_class=_raw_to_class(_PANDASET_CLASSES, tuple(range(PANDASET_CATEGORY_COUNT))),
    intensity_mean=18.23640649,
    intensity_std=25.86983417,
    beams=64,
    max_intensity=255.0,
    ground_classes=("road", "road marking", "sidewalk", "ground", "driveway"),
    object_classes=("car", "motorcycle", "truck", "bus", "bicycle", "other vehicle"),
    min_depth=0.0,
    z_shift=-1.6,
)
# Only the front camera looks where this lidar does. It is solid state and has no beams: that its sweeps count as 64
# rows of equal elevation, as many as its neighbour has beams, is an assumption.
PANDAR_GT = dataclasses.replace(
    PANDAR64, name="pandar_gt", cameras=("front_camera",), intensity_mean=23.06113565, intensity_std=16.76273235
)

LIDAR_DATASETS = {dataset.name: dataset for dataset in (NUSCENES, SEMANTIC_KITTI, PANDAR64, PANDAR_GT)}
