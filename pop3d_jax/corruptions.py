"""Corrupted lidar sweeps, as Robo3D names and grades them (Kong et al., ICCV 2023): eight kinds, three severities.

Severities are those of the published scripts (github.com/ldkong1205/Robo3D, `create/nuscenes_c` where they say it). The
scores of a network on such sweeps are read off by `pop3d_jax.robustness`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from pop3d_jax import weather
from pop3d_jax.lidar_datasets import NUSCENES, LidarDataset
from pop3d_jax.nuscenes import IGNORE
from pop3d_jax.weather import Sweep

SEVERITIES = (1, 2, 3)

# Fog: backscatter beta. The attenuation alpha, 1/m, is drawn from all of the second row for every sweep, as published.
_FOG_BACKSCATTER = (0.008, 0.05, 0.2)
_FOG_ATTENUATIONS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.06)
# Wet ground: height of the water in metres, noise floor.
_WET_GROUND = ((0.0002, 0.2), (0.001, 0.3), (0.0012, 0.7))
# Snow: mm of water per hour, terminal velocity in m/s. Heavier snow has fewer flakes, and larger ones.
_SNOW = ((0.5, 2.0), (1.0, 1.6), (2.5, 1.6))
# Motion blur: deviation of the sweep's shift, metres.
_BLUR = (0.20, 0.25, 0.30)
# Beams that are missing, as a share of all.
_MISSING_BEAMS = (0.25, 0.5, 0.75)
# Crosstalk: share of points. Those of KITTI-C; nuScenes-C begins at 0.03, its other two are in no script.
_CROSSTALK = (0.006, 0.008, 0.01)
_CROSSTALK_DEVIATION = 3.0
# Incomplete echo: share of an object class's points.
_MISSING_ECHOES = (0.75, 0.85, 0.95)
_FEWEST_OBJECT_POINTS = 10
# Cross-sensor: every fourth, every second, three of four beams are left out, from the second on.
_BEAM_STEPS = (4.0, 2.0, 1.33)


@dataclasses.dataclass(frozen=True)
class Sensor:
    """What the corruptions must know of a data set's sweeps and labels.

    Attributes:
      beams: of the lidar.
      max_intensity: largest value of the intensities: 255 or 1.
      ground_classes: labels of flat ground that gets wet.
      object_classes: labels of each class of vehicles and bicycles, whose dark paint swallows echoes.
      unlabelled: label of points that fog, snow or crosstalk put somewhere.
    """

    beams: int
    max_intensity: float
    ground_classes: tuple[int, ...]
    object_classes: tuple[tuple[int, ...], ...]
    unlabelled: int = IGNORE


def raw_sensor(dataset: LidarDataset) -> Sensor:
    """Facts for labels as the records of a data set hold them: raw categories, several of which may make a class.

    Raises:
      ValueError: the data set names a class of ground or objects that it does not have.
    """

    def raw_of(name: str) -> tuple[int, ...]:
        return tuple(np.flatnonzero(dataset.raw_to_class == dataset.class_names.index(name)).tolist())

    return Sensor(
        beams=dataset.beams,
        max_intensity=dataset.max_intensity,
        ground_classes=tuple(raw for name in dataset.ground_classes for raw in raw_of(name)),
        object_classes=tuple(raw_of(name) for name in dataset.object_classes),
        unlabelled=int(np.flatnonzero(dataset.raw_to_class == IGNORE)[0]),
    )


# For labels as `pop3d_jax.lidar_datasets.NUSCENES.raw_to_class` makes them.
NUSCENES_SENSOR = Sensor(
    beams=NUSCENES.beams,
    max_intensity=NUSCENES.max_intensity,
    ground_classes=tuple(NUSCENES.class_names.index(name) for name in NUSCENES.ground_classes),
    object_classes=tuple((NUSCENES.class_names.index(name),) for name in NUSCENES.object_classes),
)


def beam_indices(points: Float32[np.ndarray, "points columns"], beams: int) -> Int64[np.ndarray, " points"]:
    """Beam of every point: the fifth column where there is one without a -1, else equal steps of elevation.

    The second is right for lidars of evenly spaced beams only; Robo3D counts the beams of KITTI's files by their order.
    """
    if points.shape[1] > 4 and np.all(points[:, 4] >= 0):
        return points[:, 4].astype(np.int64)
    elevation = np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1]))
    span = max(float(np.ptp(elevation)), 1e-6) if len(points) else 1.0
    steps = (elevation - elevation.min(initial=np.inf)) / span * beams
    return np.minimum(steps.astype(np.int64), beams - 1)


def fog(
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " points"],
    level: int,
    rng: np.random.Generator,
    sensor: Sensor,
) -> Sweep:
    """Fog: `pop3d_jax.weather.fog`."""
    return weather.fog(
        points,
        labels,
        attenuation=float(rng.choice(_FOG_ATTENUATIONS)),
        backscatter=_FOG_BACKSCATTER[level],
        max_intensity=sensor.max_intensity,
        unlabelled=sensor.unlabelled,
        rng=rng,
    )


def wet_ground(
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " points"],
    level: int,
    rng: np.random.Generator,
    sensor: Sensor,
) -> Sweep:
    """A wet road: `pop3d_jax.weather.wet_ground`."""
    del rng
    water_height, noise_floor = _WET_GROUND[level]
    return weather.wet_ground(
        points,
        labels,
        ground=np.isin(labels, sensor.ground_classes),
        water_height=water_height,
        noise_floor=noise_floor,
        max_intensity=sensor.max_intensity,
    )


def snow(
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " points"],
    level: int,
    rng: np.random.Generator,
    sensor: Sensor,
) -> Sweep:
    """Falling snow: `pop3d_jax.weather.snow`."""
    snowfall_rate, terminal_velocity = _SNOW[level]
    return weather.snow(
        points,
        labels,
        ground=np.isin(labels, sensor.ground_classes),
        snowfall_rate=snowfall_rate,
        terminal_velocity=terminal_velocity,
        max_intensity=sensor.max_intensity,
        unlabelled=sensor.unlabelled,
        rng=rng,
    )


def motion_blur(
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " points"],
    level: int,
    rng: np.random.Generator,
    sensor: Sensor,
) -> Sweep:
    """The whole sweep shifts, and each point trembles about it with a tenth of that (z: a twentieth)."""
    del sensor
    deviation = _BLUR[level]
    shift = deviation * rng.normal(size=3)
    tremor = deviation * rng.normal(size=(len(points), 3)) * (0.1, 0.1, 0.05)
    points = points.copy()
    points[:, :3] += (shift + np.clip(tremor, -3 * deviation, 3 * deviation)).astype(np.float32)
    return points, labels.copy()


def beam_missing(
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " points"],
    level: int,
    rng: np.random.Generator,
    sensor: Sensor,
) -> Sweep:
    """Random beams are blocked, never the outermost ones.

    Differs from the published script: no beam is drawn twice, so that the stated number is missing.
    """
    # 2..28 of 32 beams, 4..58 of 64, as published.
    candidates = np.arange(sensor.beams // 16, sensor.beams * 59 // 64)
    missing = rng.permutation(candidates)[: round(_MISSING_BEAMS[level] * sensor.beams)]
    seen = ~np.isin(beam_indices(points, sensor.beams), missing)
    return points[seen], labels[seen]


def crosstalk(
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " points"],
    level: int,
    rng: np.random.Generator,
    sensor: Sensor,
) -> Sweep:
    """Other sensors' pulses: some points get noise of 3 m in each coordinate, and of 3 of 255 in intensity.

    Differs from the published script: intensities stay in their range, and are disturbed on their scale.
    """
    hit = rng.permutation(len(points))[: int(_CROSSTALK[level] * len(points))]
    noise = _CROSSTALK_DEVIATION * rng.normal(size=(len(hit), 4)) * (1, 1, 1, sensor.max_intensity / 255)
    points, labels = points.copy(), labels.copy()
    points[hit, :4] += noise.astype(np.float32)
    points[hit, 3] = np.clip(points[hit, 3], 0, sensor.max_intensity)
    labels[hit] = sensor.unlabelled
    return points, labels


def incomplete_echo(
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " points"],
    level: int,
    rng: np.random.Generator,
    sensor: Sensor,
) -> Sweep:
    """Most echoes of vehicles and bicycles are lost, of every class with more than ten points."""
    seen = np.ones(len(points), bool)
    for class_labels in sensor.object_classes:
        members = rng.permutation(np.flatnonzero(np.isin(labels, class_labels)))
        if len(members) > _FEWEST_OBJECT_POINTS:
            seen[members[: int(_MISSING_ECHOES[level] * len(members))]] = False
    return points[seen], labels[seen]


def cross_sensor(
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " points"],
    level: int,
    rng: np.random.Generator,
    sensor: Sensor,
) -> Sweep:
    """The sweep of a lidar of fewer beams, and of half the points along each."""
    del rng
    missing = np.arange(1, sensor.beams, _BEAM_STEPS[level]).astype(np.int64)
    seen: Bool[np.ndarray, " points"] = ~np.isin(beam_indices(points, sensor.beams), missing)
    return points[seen][::2], labels[seen][::2]


CORRUPTIONS: dict[str, Callable[..., Sweep]] = {
    "fog": fog,
    "wet_ground": wet_ground,
    "snow": snow,
    "motion_blur": motion_blur,
    "beam_missing": beam_missing,
    "crosstalk": crosstalk,
    "incomplete_echo": incomplete_echo,
    "cross_sensor": cross_sensor,
}


def corrupt(
    name: str,
    severity: int,
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " labels"],
    rng: np.random.Generator,
    sensor: Sensor,
) -> Sweep:
    """A corrupted copy of a sweep.

    Args:
      name: one of `CORRUPTIONS`.
      severity: 1 (light), 2 (moderate) or 3 (heavy).
      points: x, y, z in metres in the lidar's frame, intensity, and, where there are more columns, beam or -1.
      labels: of the points, in the classes that `sensor` names.
      rng: all randomness; with the same state a corruption of points or beams takes the same ones at a lower severity,
        and more at a higher one.
      sensor: facts of the data set.

    Returns:
      Points and labels. Points that vanish take their labels along; points that fog, snow or crosstalk put somewhere
      have the label `sensor.unlabelled`.

    Raises:
      ValueError: no such corruption or severity; points without intensity, or with another number of labels.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption {name!r}: choose one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity} of {name}: choose 1 (light), 2 (moderate) or 3 (heavy)")
    if points.shape[1] < 4:
        raise ValueError(f"{name}: points have {points.shape[1]} columns; x, y, z and intensity are needed")
    if len(points) != len(labels):
        raise ValueError(f"{name}: {len(points)} points and {len(labels)} labels; give every point one, 255 if unknown")
    return CORRUPTIONS[name](points, labels, severity - 1, rng, sensor)
