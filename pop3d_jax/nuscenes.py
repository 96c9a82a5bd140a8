"""Facts of the nuScenes protocol: sensors, classes and label maps, as the official implementations use them."""

import numpy as np

# The order of the info files of TPVFormer and POP-3D, not of the devkit.
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
LIDAR = "LIDAR_TOP"

# Lidarseg categories by their index in the raw label files.
LIDARSEG_CATEGORIES = (
    "noise",
    "animal",
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.stroller",
    "human.pedestrian.wheelchair",
    "movable_object.barrier",
    "movable_object.debris",
    "movable_object.pushable_pullable",
    "movable_object.trafficcone",
    "static_object.bicycle_rack",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.car",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.motorcycle",
    "vehicle.trailer",
    "vehicle.truck",
    "flat.driveable_surface",
    "flat.other",
    "flat.sidewalk",
    "flat.terrain",
    "static.manmade",
    "static.other",
    "static.vegetation",
    "vehicle.ego",
)

# The sixteen classes of the zero-shot evaluation; 0 has no class, 17 is observed free space.
CLASS_NAMES = (
    "noise",
    "barrier",
    "bicycle",
    "bus",
    "car",
    "construction_vehicle",
    "motorcycle",
    "pedestrian",
    "traffic_cone",
    "trailer",
    "truck",
    "driveable_surface",
    "other_flat",
    "sidewalk",
    "terrain",
    "manmade",
    "vegetation",
    "empty",
)
UNLABELLED = 0
EMPTY = 17
IGNORE = 255

# Raw lidarseg index -> class index (the official 32-to-16 map; 0 where the class is not evaluated).
LIDARSEG_TO_CLASS = np.array(
    [0, 0, 7, 7, 7, 0, 7, 0, 0, 1, 0, 0, 8, 0, 2, 3, 3, 4, 5, 0, 0, 6, 9, 10, 11, 12, 13, 14, 15, 0, 16, 0],
    np.uint8,
)

# Colours for pictures, by class index; our own choice, distinguishable on a light background.
CLASS_COLOURS = np.array(
    [
        (60, 60, 60),
        (222, 130, 60),
        (214, 60, 140),
        (240, 200, 40),
        (40, 110, 220),
        (150, 90, 200),
        (190, 40, 60),
        (230, 50, 50),
        (255, 140, 0),
        (110, 130, 150),
        (0, 170, 190),
        (130, 130, 140),
        (170, 120, 120),
        (190, 150, 190),
        (150, 190, 90),
        (185, 165, 130),
        (40, 140, 70),
        (255, 255, 255),
    ],
    np.uint8,
)

# The official pipeline subtracts these from BGR images in 0..255 and divides by one.
IMAGE_MEAN_BGR = (103.53, 116.28, 123.675)
