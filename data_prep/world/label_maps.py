"""The world's categories, which are nuScenes', in the ids of the other data sets.

| the world                     | SemanticKITTI    | PandaSet                           |
| ----------------------------- | ---------------- | ---------------------------------- |
| pedestrian                    | 30 person        | 30 pedestrian                      |
| barrier                       | 51 fence         | 39 temporary construction barriers |
| traffic cone                  | 99 other object  | 37 cones                           |
| bus                           | 13 bus           | 23 bus                             |
| car                           | 10 car           | 13 car                             |
| truck                         | 18 truck         | 15 medium-sized truck              |
| driveable surface             | 40 road          | 7 road                             |
| sidewalk                      | 48 sidewalk      | 11 sidewalk                        |
| terrain                       | 72 terrain       | 6 ground                           |
| man-made (buildings to posts) | 50 building      | 41 building                        |
| vegetation                    | 70 vegetation    | 5 vegetation                       |
| the recording car             | 1 outlier        | 0 noise                            |

Things that move keep the id of standing ones.
"""

import numpy as np
from jaxtyping import Int

from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES

_IDS = {
    "human.pedestrian.adult": (30, 30),
    "movable_object.barrier": (51, 39),
    "movable_object.trafficcone": (99, 37),
    "vehicle.bus.rigid": (13, 23),
    "vehicle.car": (10, 13),
    "vehicle.truck": (18, 15),
    "flat.driveable_surface": (40, 7),
    "flat.sidewalk": (48, 11),
    "flat.terrain": (72, 6),
    "static.manmade": (50, 41),
    "static.vegetation": (70, 5),
    "vehicle.ego": (1, 0),
}


def _table(column: int) -> Int[np.ndarray, " categories"]:
    """By raw lidarseg index; -1 for what the world does not have."""
    return np.array([_IDS[name][column] if name in _IDS else -1 for name in LIDARSEG_CATEGORIES])


SEMANTIC_KITTI_IDS = _table(0)
PANDASET_IDS = _table(1)
