"""The lidar: 32 beams turning 20 times a second, ray-cast with range noise, lost returns and intensities.

Beam angles and firing count are those of the HDL-32E (data sheet: +10.67 to -30.67 degrees in steps of 1.33).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_prep.world.parts import Material
from data_prep.world.scene import Scene
from data_prep.world.sight import look
from data_prep.world.solids import PosedSolids, Solids
from data_prep.world.trace import NOTHING, windows_of

BEAMS, FIRINGS = 32, 1084
MAX_RANGE = 90.0
RANGE_NOISE = 0.02
_ELEVATION = np.radians(np.linspace(-30.67, 10.67, BEAMS))
# A return is kept where reflectivity * cosine of incidence / (range / 50 m)^2 exceeds about this.
_SENSITIVITY = 0.0035

# Reflectivity at the lidar's wavelength: of parts by material, of the ground by surface number.
_REFLECTIVITY = np.full(len(Material), 0.3, np.float32)
for _material, _value in {
    Material.PAINT: 0.5,
    Material.CAR_BODY: 0.45,
    Material.CABIN: 0.12,
    Material.TYRE: 0.08,
    Material.LEAVES: 0.4,
    Material.CONE: 0.8,
    Material.BARRIER: 0.7,
    Material.GLASS_FRONT: 0.15,
    Material.METAL: 0.5,
}.items():
    _REFLECTIVITY[_material] = _value
_SURFACE_REFLECTIVITY = np.array([0, 0.12, 0.25, 0.3], np.float32)


@dataclass(frozen=True)
class Sweep:
    """One turn: points (x, y, z, intensity 0..255, ring 0..31), raw lidarseg index and thing number per point.

    Points are in the lidar's frame in metres, in the order of firing, rings ascending within a firing.
    """

    points: Float[np.ndarray, "points 5"]
    lidarseg: UInt8[np.ndarray, " points"]
    number: Int[np.ndarray, " points"]


def _windows(posed: PosedSolids, rotation: Float[np.ndarray, "3 3"], start: float) -> Int[np.ndarray, "windows 5"]:
    """Beams and firings that can meet each part; a window across the seam becomes two."""
    corners = posed.corners @ rotation
    middle = corners.mean(1)
    heading = np.arctan2(middle[:, 1], middle[:, 0])
    turn = np.arctan2(corners[..., 1], corners[..., 0]) - heading[:, None]
    turn -= 2 * np.pi * np.round(turn / (2 * np.pi))
    step = 2 * np.pi / FIRINGS
    around = turn.max(1) - turn.min(1) > 0.98 * np.pi
    # Firings run clockwise from `start`.
    first = np.floor((start - heading - turn.max(1)) / step).astype(np.int64)
    last = np.ceil((start - heading - turn.min(1)) / step).astype(np.int64) + 1
    width = np.where(around, FIRINGS, last - first)
    first = np.where(around, 0, first % FIRINGS)

    distance = np.hypot(middle[:, 0], middle[:, 1])
    radius = np.hypot(corners[..., 0] - middle[:, :1], corners[..., 1] - middle[:, 1:2]).max(1)
    close, wide = np.maximum(distance - radius, 0.05), distance + radius
    low, high = corners[..., 2].min(1), corners[..., 2].max(1)
    lowest = np.arctan2(low, np.where(low < 0, close, wide))
    highest = np.arctan2(high, np.where(high > 0, close, wide))
    rows = np.stack([np.searchsorted(_ELEVATION, lowest - 0.003), np.searchsorted(_ELEVATION, highest + 0.003)], 1)
    near = close < MAX_RANGE
    ends = first + width
    shape = (BEAMS, FIRINGS)
    whole = windows_of(near, np.concatenate([rows, first[:, None], ends[:, None]], 1), shape)
    rest = np.concatenate([rows, np.zeros_like(first)[:, None], (ends - FIRINGS)[:, None]], 1)
    return np.concatenate([whole, windows_of(near, rest, shape)])


def take_sweep(
    scene: Scene, solids: Solids, time: float, lidar_to_world: Float[np.ndarray, "4 4"], rng: np.random.Generator
) -> Sweep:
    """One sweep at a time in seconds, all beams at once (no motion within the sweep).

    Args:
      scene, solids: the world.
      time: seconds since the first key frame.
      lidar_to_world: pose of the lidar at that time.
      rng: draws the phase of the turn, range noise, lost returns and intensities.
    """
    rotation, origin = lidar_to_world[:3, :3], lidar_to_world[:3, 3]
    posed = solids.at(time, origin)
    start = rng.uniform(-np.pi, np.pi)
    azimuth = start - 2 * np.pi / FIRINGS * (np.arange(FIRINGS) + 0.5)
    level = np.cos(_ELEVATION)[:, None]
    rays = np.stack(
        [
            level * np.cos(azimuth),
            level * np.sin(azimuth),
            np.broadcast_to(np.sin(_ELEVATION)[:, None], (BEAMS, FIRINGS)),
        ]
    )
    directions = np.einsum("ij,jhw->ihw", rotation, rays).astype(np.float32)
    windows = _windows(posed, rotation.astype(np.float32), start)
    sight = look(scene, solids, posed, windows, origin, directions, MAX_RANGE)
    part = sight.part
    d = directions.reshape(3, -1)
    reflectivity = np.zeros(part.size, np.float32)
    reflectivity[sight.soil] = _SURFACE_REFLECTIVITY[sight.number[sight.soil]]
    reflectivity[sight.solid] = _REFLECTIVITY[solids.part_material[part[sight.solid]]]

    cosine = np.abs((sight.normal * d.T).sum(1))
    finite = np.where(part == NOTHING, np.float32(1.0), sight.distance)
    energy = reflectivity * cosine / (np.maximum(finite, 5.0) / 50) ** 2
    luck = np.exp(rng.normal(0, 0.6, part.size))
    kept = (part != NOTHING) & (energy > _SENSITIVITY * luck) & (rng.random(part.size) > 0.005)
    measured = finite + rng.normal(0, RANGE_NOISE, part.size)
    xyz = measured * rays.reshape(3, -1)
    intensity = np.clip(255 * reflectivity * (0.25 + 0.75 * cosine) * rng.uniform(0.7, 1.1, part.size), 0, 255)
    ring = np.repeat(np.arange(BEAMS), FIRINGS)
    points = np.concatenate([xyz, np.floor(intensity)[None], ring[None]]).T.astype(np.float32)
    order = np.arange(part.size).reshape(BEAMS, FIRINGS).T.reshape(-1)
    order = order[kept[order]]
    return Sweep(points[order], sight.lidarseg[order], sight.number[order])
