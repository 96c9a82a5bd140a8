"""Random transformations of lidar clouds: ScaLR's chains of distillation and of downstream training.

Each chain is a deterministic function of drawn values, and a draw from a NumPy generator.
Source: `utils/transforms.py`, `datasets/im_pc_dataset.py` and `finetune.py` of ScaLR (github.com/valeoai/ScaLR).
"""

import dataclasses

import numpy as np
from jaxtyping import Float32

FLIP_PROBABILITY = 2 / 3
SCALE_RANGE = 0.1


@dataclasses.dataclass(frozen=True)
class PointDraw:
    """What one cloud gets.

    Attributes:
      angle: turn about z, counter-clockwise, radians.
      feature_angle: the turn of the feature copies of x and y; downstream only, drawn apart from `angle`.
      flip_axis: 0 or 1, the coordinate whose sign changes; None for neither.
      scale: factor; 1 is neutral.
    """

    angle: float
    feature_angle: float
    flip_axis: int | None
    scale: float


def draw_point_augmentation(rng: np.random.Generator) -> PointDraw:
    """Angles uniform in [-pi, pi], with probability 2/3 a flip of x or of y, a scale uniform in [0.9, 1.1]."""
    angle, feature_angle = rng.uniform(-np.pi, np.pi, 2)
    flips, axis = rng.random() < FLIP_PROBABILITY, int(rng.integers(2))
    scale = rng.uniform(1 - SCALE_RANGE, 1 + SCALE_RANGE)
    return PointDraw(float(angle), float(feature_angle), axis if flips else None, float(scale))


def augment_distillation(xyz: Float32[np.ndarray, "points 3"], draw: PointDraw) -> Float32[np.ndarray, "points 3"]:
    """Turned, flipped and scaled coordinates; features are computed from the result."""
    return _flipped(_turned(xyz, draw.angle), draw.flip_axis) * np.float32(draw.scale)


def augment_downstream(
    xyz: Float32[np.ndarray, "points 3"], features: Float32[np.ndarray, "points 5"], draw: PointDraw
) -> tuple[Float32[np.ndarray, "points 3"], Float32[np.ndarray, "points 5"]]:
    """Coordinates and the copies of them among the features, augmented apart, as the official downstream code does.

    Coordinates, from which cells and neighbours come, are turned and flipped. Copies are turned by an angle of their
    own, not flipped, and scaled together with the radius.

    Args:
      xyz: metres.
      features: as `point_clouds.point_features` makes them of the same coordinates.
      draw: of this cloud.
    """
    features = features.copy()
    features[:, 1:3] = _turned(features[:, 1:3], draw.feature_angle)
    features[:, 1:] *= np.float32(draw.scale)
    return _flipped(_turned(xyz, draw.angle), draw.flip_axis), features


def _turned(points: Float32[np.ndarray, "points axes"], angle: float) -> Float32[np.ndarray, "points axes"]:
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    turned = points.copy()
    turned[:, 0] = points[:, 0] * cosine - points[:, 1] * sine
    turned[:, 1] = points[:, 0] * sine + points[:, 1] * cosine
    return turned


def _flipped(points: Float32[np.ndarray, "points 3"], axis: int | None) -> Float32[np.ndarray, "points 3"]:
    if axis is None:
        return points
    flipped = points.copy()
    flipped[:, axis] *= -1
    return flipped
