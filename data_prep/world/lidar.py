"""Lidars, spinning or looking one way, ray-cast with range noise, lost returns and intensities."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_prep.world.parts import Material
from data_prep.world.scene import Scene
from data_prep.world.sight import look
from data_prep.world.solids import PosedSolids, Solids
from data_prep.world.trace import NOTHING, windows_of


@dataclass(frozen=True)
class Lidar:
    """A make of lidar.

    Attributes:
      elevations: of the beams, degrees above the horizon, ascending.
      firings: of all beams in a whole turn.
      window: degrees of azimuth in which it fires, around its x axis; 360 turns from a random phase on.
      max_range: metres.
      range_noise: one sigma, metres.
      sensitivity: a return is kept where reflectivity * cosine of incidence / (range / 50 m)^2 exceeds about this.
      full_intensity: what a white wall before the sensor gives; the unit of the data set's intensities.
      intensity_step: intensities are whole multiples of this.
    """

    elevations: tuple[float, ...]
    firings: int
    window: float = 360.0
    max_range: float = 90.0
    range_noise: float = 0.02
    sensitivity: float = 0.0035
    full_intensity: float = 255.0
    intensity_step: float = 1.0

    @property
    def columns(self) -> int:
        """Firings in the window."""
        return round(self.firings * self.window / 360.0)

    def radians(self) -> Float[np.ndarray, " beams"]:
        """Elevations of the beams."""
        return np.radians(np.array(self.elevations))


# Data sheet: +10.67 to -30.67 degrees in steps of 1.33; nuScenes turns it 20 times a second.
HDL_32E = Lidar(tuple(np.linspace(-30.67, 10.67, 32).tolist()), 1084)
# Like an HDL-64E: 64 beams from +2 to -24.8 degrees, evenly spread here, about 0.17 degrees of azimuth at 10 Hz.
HDL_64E = Lidar(
    tuple(np.linspace(-24.8, 2.0, 64).tolist()), 2083, max_range=100.0, full_intensity=1.0, intensity_step=0.01
)
# Like a Pandar64: dense (a sixth of a degree) around the horizon, one to six degrees apart below and above.
PANDAR_64 = Lidar(
    (-25.0, -19.0, *map(float, range(-14, -6)), *np.linspace(-6.0, 2.0, 49).tolist(), 3.0, 5.0, 8.0, 11.0, 15.0),
    1800,
    max_range=120.0,
)
# Like a PandarGT: solid state, 60 degrees wide and 20 high, finer than a spinning one, and it sees further.
PANDAR_GT = Lidar(tuple(np.linspace(-10.0, 10.0, 96).tolist()), 2160, window=60.0, max_range=150.0, sensitivity=0.0015)

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
    """One turn: points (x, y, z, intensity, ring from the lowest), raw lidarseg index and thing number per point.

    Points are in the lidar's frame in metres, in the order of firing, rings ascending within a firing.
    """

    points: Float[np.ndarray, "points 5"]
    lidarseg: UInt8[np.ndarray, " points"]
    number: Int[np.ndarray, " points"]


def _windows(
    lidar: Lidar, posed: PosedSolids, rotation: Float[np.ndarray, "3 3"], start: float
) -> Int[np.ndarray, "windows 5"]:
    """Beams and firings that can meet each part; a window across the seam becomes two."""
    corners = posed.corners @ rotation
    middle = corners.mean(1)
    heading = np.arctan2(middle[:, 1], middle[:, 0])
    turn = np.arctan2(corners[..., 1], corners[..., 0]) - heading[:, None]
    turn -= 2 * np.pi * np.round(turn / (2 * np.pi))
    step = 2 * np.pi / lidar.firings
    around = turn.max(1) - turn.min(1) > 0.98 * np.pi
    # Firings run clockwise from `start`.
    first = np.floor((start - heading - turn.max(1)) / step).astype(np.int64)
    last = np.ceil((start - heading - turn.min(1)) / step).astype(np.int64) + 1
    width = np.where(around, lidar.firings, last - first)
    first = np.where(around, 0, first % lidar.firings)

    distance = np.hypot(middle[:, 0], middle[:, 1])
    radius = np.hypot(corners[..., 0] - middle[:, :1], corners[..., 1] - middle[:, 1:2]).max(1)
    close, wide = np.maximum(distance - radius, 0.05), distance + radius
    low, high = corners[..., 2].min(1), corners[..., 2].max(1)
    lowest = np.arctan2(low, np.where(low < 0, close, wide))
    highest = np.arctan2(high, np.where(high > 0, close, wide))
    elevation = lidar.radians()
    rows = np.stack([np.searchsorted(elevation, lowest - 0.003), np.searchsorted(elevation, highest + 0.003)], 1)
    near = close < lidar.max_range
    ends = first + width
    shape = (len(elevation), lidar.columns)
    whole = windows_of(near, np.concatenate([rows, first[:, None], ends[:, None]], 1), shape)
    rest = np.concatenate([rows, np.zeros_like(first)[:, None], (ends - lidar.firings)[:, None]], 1)
    return np.concatenate([whole, windows_of(near, rest, shape)])


def take_sweep(
    scene: Scene,
    solids: Solids,
    time: float,
    lidar_to_world: Float[np.ndarray, "4 4"],
    rng: np.random.Generator,
    lidar: Lidar = HDL_32E,
) -> Sweep:
    """One sweep at a time in seconds, all beams at once (no motion within the sweep).

    Args:
      scene, solids: the world.
      time: seconds since the first key frame.
      lidar_to_world: pose of the lidar at that time.
      rng: draws the phase of the turn, range noise, lost returns and intensities.
      lidar: its make.
    """
    rotation, origin = lidar_to_world[:3, :3], lidar_to_world[:3, 3]
    posed = solids.at(time, origin)
    start = rng.uniform(-np.pi, np.pi) if lidar.window == 360.0 else np.radians(lidar.window) / 2
    beams, columns = len(lidar.elevations), lidar.columns
    azimuth = start - 2 * np.pi / lidar.firings * (np.arange(columns) + 0.5)
    elevation = lidar.radians()
    level = np.cos(elevation)[:, None]
    rays = np.stack(
        [
            level * np.cos(azimuth),
            level * np.sin(azimuth),
            np.broadcast_to(np.sin(elevation)[:, None], (beams, columns)),
        ]
    )
    directions = np.einsum("ij,jhw->ihw", rotation, rays).astype(np.float32)
    windows = _windows(lidar, posed, rotation.astype(np.float32), start)
    sight = look(scene, solids, posed, windows, origin, directions, lidar.max_range)
    part = sight.part
    d = directions.reshape(3, -1)
    reflectivity = np.zeros(part.size, np.float32)
    reflectivity[sight.soil] = _SURFACE_REFLECTIVITY[sight.number[sight.soil]]
    reflectivity[sight.solid] = _REFLECTIVITY[solids.part_material[part[sight.solid]]]

    cosine = np.abs((sight.normal * d.T).sum(1))
    finite = np.where(part == NOTHING, np.float32(1.0), sight.distance)
    energy = reflectivity * cosine / (np.maximum(finite, 5.0) / 50) ** 2
    luck = np.exp(rng.normal(0, 0.6, part.size))
    kept = (part != NOTHING) & (energy > lidar.sensitivity * luck) & (rng.random(part.size) > 0.005)
    measured = finite + rng.normal(0, lidar.range_noise, part.size)
    xyz = measured * rays.reshape(3, -1)
    full, step = lidar.full_intensity, lidar.intensity_step
    intensity = np.clip(full * reflectivity * (0.25 + 0.75 * cosine) * rng.uniform(0.7, 1.1, part.size), 0, full)
    ring = np.repeat(np.arange(beams), columns)
    points = np.concatenate([xyz, (np.floor(intensity / step) * step)[None], ring[None]]).T.astype(np.float32)
    order = np.arange(part.size).reshape(beams, columns).T.reshape(-1)
    order = order[kept[order]]
    return Sweep(points[order], sight.lidarseg[order], sight.number[order])
