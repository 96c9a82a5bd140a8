"""The voxel grid: where points lie in it, and which voxels their rays cross.

Frames and units: lidar frame, metres (x right, y forward, z up); grids are indexed [x, y, z].

**Exactness.** The official code (`dataloader/dataset_wrapper.py`) finds voxels in float64: a sample at the
fraction t of a ray lies at `t * p` (p is the float32 lidar point), is clipped to the volume (less one
millimetre at its upper side), shifted by the lower corner, divided by the voxel size, rounded down.
Accelerators have float32 only, and points sit on voxel borders often enough for float32 arithmetic to put
some in another voxel. But every step of that chain never decreases as p grows, so for each fraction t and
each border i there is one float32 number, the smallest p whose sample reaches cell i, and comparing p with it
gives the official answer bit for bit. These numbers depend on the volume alone: the host finds them once by
bisection over all float32 numbers, running the official float64 chain, and the device only compares. Float32
arithmetic merely guesses which border is near.

Points must be finite (the builder refuses others). Points of padding carry False in the mask. All functions
are for one sample: use `jax.vmap` for a batch. Volumes and labels are static.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int32, Integer

# Official: points are clipped to one millimetre below the upper faces, so that they fall into the last cell.
_UPPER_MARGIN = 1e-3
# Official: samples on the ray from the lidar to a point, both ends included.
RAY_SAMPLES = 100


@dataclasses.dataclass(frozen=True)
class Volume:
    """A box in the lidar frame cut into voxels.

    Attributes:
      minimum: lower corner (x, y, z), metres.
      maximum: upper corner, metres.
      grid_size: number of voxels along x, y, z.

    Raises:
      ValueError: the box is empty, or its voxels are too small or too many for the exact tests of this
        module.
    """

    minimum: tuple[float, float, float] = (-51.2, -51.2, -5.0)
    maximum: tuple[float, float, float] = (51.2, 51.2, 3.0)
    grid_size: tuple[int, int, int] = (100, 100, 8)

    def __post_init__(self):
        if min(self.grid_size) < 1:
            raise ValueError(f"volume: grid_size {self.grid_size} must be at least 1 along every axis")
        if min(self.voxel_size) < 2 * _UPPER_MARGIN:
            raise ValueError(f"volume: voxels of {self.voxel_size} m; give a maximum above the minimum, 2 mm a voxel")
        if self.num_voxels * 256 >= 2**31 or max(self.grid_size) > 10_000:
            raise ValueError(f"volume: grid_size {self.grid_size}; at most 10000 an axis and 2**23 voxels in all")

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        """Edges of a voxel along x, y, z, metres."""
        sides = zip(self.minimum, self.maximum, self.grid_size, strict=True)
        return tuple((upper - lower) / cells for lower, upper, cells in sides)

    @property
    def num_voxels(self) -> int:
        """Number of voxels."""
        return int(np.prod(self.grid_size))


def voxel_centres(coordinates: Integer[np.ndarray, "voxels 3"], volume: Volume) -> Float64[np.ndarray, "voxels 3"]:
    """Centres of voxels given by their indices (x, y, z); metres, lidar frame."""
    return (coordinates + 0.5) * volume.voxel_size + volume.minimum


def grid_coordinates_float64(points: Float[np.ndarray, "*batch 3"], volume: Volume) -> Float64[np.ndarray, "*batch 3"]:
    """Continuous cell coordinates on the host, the official numbers bit for bit (`Voxelize`).

    Args:
      points: metres, lidar frame.

    Returns:
      Coordinates in cells: cell centres at index + 0.5; points outside are clipped into the border cells.
    """
    lower, upper = np.array(volume.minimum, np.float64), np.array(volume.maximum, np.float64)
    clipped = np.clip(points.astype(np.float64), lower, upper - _UPPER_MARGIN)
    return (clipped - lower) / ((upper - lower) / np.array(volume.grid_size))


def grid_coordinates(points: Float32[Array, "*batch 3"], volume: Volume) -> Float32[Array, "*batch 3"]:
    """Continuous cell coordinates on the device: what the model takes as `points` and `feature_points`.

    Float32 arithmetic: within three units in the last place of the grid size of `grid_coordinates_float64`. The
    model interpolates, so a point on a border may round to either side; labels use the exact `voxel_indices`.
    """
    lower, upper = jnp.array(volume.minimum, jnp.float32), jnp.array(volume.maximum, jnp.float32)
    return (jnp.clip(points, lower, upper - _UPPER_MARGIN) - lower) / jnp.array(volume.voxel_size, jnp.float32)


@functools.lru_cache(maxsize=32)
def _borders(volume: Volume, fractions: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each axis, the smallest float32 coordinate whose sample at each fraction reaches each cell.

    Returns:
      Three float32 arrays [fraction, cells + 1]; the first column is minus, the last plus infinity.
    """
    fraction = np.array(fractions, np.float64)[:, None]
    tables = []
    for axis, cells in enumerate(volume.grid_size):
        border = np.arange(1, cells)

        def reaches(coordinate, axis=axis, border=border):
            points = np.zeros((*coordinate.shape, 3))
            points[..., axis] = fraction * coordinate
            return np.floor(grid_coordinates_float64(points, volume)[..., axis]) >= border

        # Bisection over the ordinals of float32: integers in the order of the numbers, zero at zero.
        largest = int(np.float32(np.finfo(np.float32).max).view(np.int32))
        below = np.full((len(fractions), cells - 1), -largest - 1, np.int64)
        above = np.full_like(below, largest + 1)
        while np.any(above - below > 1):
            middle = (below + above) // 2
            magnitude = np.abs(middle).clip(max=largest).astype(np.int32).view(np.float32)
            reached = reaches(np.copysign(magnitude, middle.astype(np.float32)).astype(np.float64))
            above, below = np.where(reached, middle, above), np.where(reached, below, middle)
        smallest = np.abs(above).clip(max=largest).astype(np.int32).view(np.float32) * np.sign(above)
        table = np.full((len(fractions), cells + 1), -np.inf, np.float32)
        table[:, 1:cells] = np.where(above > largest, np.inf, np.where(above <= -largest, -np.inf, smallest))
        table[:, cells] = np.inf
        tables.append(table)
    return tuple(tables)


def _cells(
    points: Float32[Array, "points 3"], fraction, borders: tuple[Array, Array, Array], volume: Volume
) -> list[Int32[Array, " points"]]:
    """Cell along each axis of the samples at one fraction of the rays, given that fraction's border rows."""
    cells = []
    for axis, row in enumerate(borders):
        coordinate = points[:, axis]
        guess = (fraction * coordinate - volume.minimum[axis]) / volume.voxel_size[axis]
        nearest = jnp.clip(jnp.round(guess), 0, volume.grid_size[axis]).astype(jnp.int32)
        cells.append(nearest - (coordinate < row[nearest]).astype(jnp.int32))
    return cells


def _flatten(cells: list[Int32[Array, " points"]], volume: Volume) -> Int32[Array, " points"]:
    """Flat voxel index in C order of the grid [x, y, z]."""
    return (cells[0] * volume.grid_size[1] + cells[1]) * volume.grid_size[2] + cells[2]


def voxel_indices(points: Float32[Array, "points 3"], volume: Volume) -> Int32[Array, "points 3"]:
    """Voxel (x, y, z) of each point, points outside clipped into the border: the official floor.

    Exactly the float64 result, see the head of this module.
    """
    borders = tuple(jnp.asarray(table[0]) for table in _borders(volume, (1.0,)))
    return jnp.stack(_cells(points, 1.0, borders, volume), -1)


def in_range(points: Float32[Array, "points 3"], volume: Volume) -> Bool[Array, " points"]:
    """Points strictly inside the volume, compared with its float64 corners as official."""
    # For float32 p: p > c exactly if p > the largest float32 not above c; and the mirror image.
    lower, upper = np.array(volume.minimum, np.float32), np.array(volume.maximum, np.float32)
    lower = np.where(lower > np.array(volume.minimum), np.nextafter(lower, np.float32(-np.inf)), lower)
    upper = np.where(upper < np.array(volume.maximum), np.nextafter(upper, np.float32(np.inf)), upper)
    return jnp.all((points > lower) & (points < upper), -1)


def contains_point(
    points: Float32[Array, "points 3"], mask: Bool[Array, " points"], volume: Volume
) -> Bool[Array, "x y z"]:
    """Voxels with at least one point (clipped into the volume)."""
    flat = _flatten(list(voxel_indices(points, volume).T), volume)
    # Masked points go to an index beyond the grid, which the scatter drops.
    hit = jnp.zeros(volume.num_voxels, bool).at[jnp.where(mask, flat, volume.num_voxels)].set(True, mode="drop")
    return hit.reshape(volume.grid_size)


def crossed_by_rays(
    points: Float32[Array, "points 3"],
    mask: Bool[Array, " points"],
    volume: Volume,
    samples: int = RAY_SAMPLES,
) -> Bool[Array, "x y z"]:
    """Voxels touched by a sample of the rays from the lidar origin to the points inside the volume.

    Official (`prepare_gt_occupancy_also`): `samples` equally spaced points a ray, both ends included. Points
    outside the volume shoot no ray. One sample of all rays at a time, so memory stays at a few numbers a
    point.
    """
    fractions = np.linspace(0.0, 1.0, samples)
    shoots = mask & in_range(points, volume)

    def mark(crossed, sample):
        fraction, borders = sample
        flat = _flatten(_cells(points, fraction, borders, volume), volume)
        return crossed.at[jnp.where(shoots, flat, volume.num_voxels)].set(True, mode="drop"), None

    rows = tuple(jnp.asarray(table) for table in _borders(volume, tuple(fractions.tolist())))
    start = jnp.zeros(volume.num_voxels, bool)
    crossed, _ = jax.lax.scan(mark, start, (jnp.asarray(fractions, jnp.float32), rows))
    return crossed.reshape(volume.grid_size)
