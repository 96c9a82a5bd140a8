"""What lidar rays and cameras see of a voxel grid, exactly: every voxel that a ray enters counts (host, float64).

A ray enters a voxel through one of its faces, so the voxels along it follow from where it crosses the planes between
the voxels: one entry for every crossing, no step depends on the one before, and all rays are crossed at once in blocks
of bounded size. A voxel that a ray only touches at an edge or a corner is not entered.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from pop3d_jax.voxels import Volume

# Crossings at once: about 100 bytes each while they are worked on.
_BLOCK = 1 << 17
# Images reach half a pixel beyond the centres of their outer pixels.
_HALF_PIXEL = 0.5


def cell_indices(points: Float[np.ndarray, "points 3"], volume: Volume) -> Int[np.ndarray, " points"]:
    """Flat index (C order of [x, y, z]) of the voxel that holds each point, metres; -1 outside, borders go up."""
    cells = _in_cells(points, volume)
    np.floor(cells, out=cells)
    (x, y, z), (nx, ny, nz) = cells.T, volume.grid_size
    inside = (x >= 0) & (y >= 0) & (z >= 0) & (x < nx) & (y < ny) & (z < nz)
    return np.where(inside, (x * ny + y) * nz + z, -1).astype(np.int64)


def _in_cells(points: Float[np.ndarray, "*n 3"], volume: Volume) -> Float64[np.ndarray, "*n 3"]:
    cells = points - np.array(volume.minimum)
    cells /= np.array(volume.voxel_size)
    return cells


class _Rays:
    """Segments in units of cells, mirrored so that all of them run upward along every axis."""

    def __init__(self, starts: Float64[np.ndarray, "rays 3"], ends: Float64[np.ndarray, "rays 3"], volume: Volume):
        size = np.array(volume.grid_size)
        strides = np.array([size[1] * size[2], size[2], 1])
        down = ends < starts
        self.size = size
        self.start = np.where(down, size - starts, starts)
        self.end = np.where(down, size - ends, ends)
        # flat index = base + step . (mirrored cell)
        self.base = (down * (size - 1) * strides).sum(1).astype(np.int32)
        self.step = np.where(down, -strides, strides).astype(np.int32)

    def entries(self, axis: int) -> Iterator[tuple[Int[np.ndarray, " entries"], Int[np.ndarray, " entries"]]]:
        """(ray, flat voxel) of the voxels entered across the planes of one axis, the starts' own voxels apart."""
        one, two = (other for other in range(3) if other != axis)
        first = np.maximum(np.floor(self.start[:, axis]) + 1, 0).astype(np.int64)
        last = np.minimum(np.floor(self.end[:, axis]), self.size[axis] - 1).astype(np.int64)
        counts = np.maximum(last - first + 1, 0)
        run = self.end - self.start
        with np.errstate(divide="ignore", invalid="ignore"):  # a ray along the planes crosses none
            slope_one, slope_two = run[:, one] / run[:, axis], run[:, two] / run[:, axis]
        # y = intercept + slope x
        zero_one = self.start[:, one] - slope_one * self.start[:, axis]
        zero_two = self.start[:, two] - slope_two * self.start[:, axis]
        total = np.concatenate([[0], np.cumsum(counts)])
        begin = 0
        while begin < len(counts):
            stop = max(begin + 1, int(np.searchsorted(total, total[begin] + _BLOCK, "right")) - 1)
            number = counts[begin:stop]
            ray = np.repeat(np.arange(begin, stop, dtype=np.int32), number)
            cell = np.arange(total[begin], total[stop]) - np.repeat(total[begin:stop] - first[begin:stop], number)
            there = cell.astype(np.float64)
            at_one = np.floor(zero_one[ray] + slope_one[ray] * there).astype(np.int32)
            at_two = np.floor(zero_two[ray] + slope_two[ray] * there).astype(np.int32)
            # Seen as unsigned, what is below zero is beyond the grid as well.
            inside = at_one.view(np.uint32) < self.size[one]
            inside &= at_two.view(np.uint32) < self.size[two]
            ray, cell, at_one, at_two = ray[inside], cell[inside].astype(np.int32), at_one[inside], at_two[inside]
            step = self.step
            flat = self.base[ray] + step[ray, axis] * cell + step[ray, one] * at_one + step[ray, two] * at_two
            yield ray, flat
            begin = stop


def crossed_voxels(
    starts: Float[np.ndarray, "rays 3"], ends: Float[np.ndarray, "rays 3"], volume: Volume
) -> Bool[np.ndarray, "x y z"]:
    """Voxels that the segments pass through on their way; the voxel that holds a segment's end does not count for it.

    Args:
      starts, ends: metres, frame of the volume; may lie outside.
      volume: the grid.
    """
    crossed = np.zeros(volume.num_voxels, bool)
    last = cell_indices(ends, volume)
    first = cell_indices(starts, volume)
    crossed[first[(first >= 0) & (first != last)]] = True
    rays = _Rays(_in_cells(starts, volume), _in_cells(ends, volume), volume)
    for axis in range(3):
        for ray, flat in rays.entries(axis):
            crossed[flat[flat != last[ray]]] = True
    return crossed.reshape(volume.grid_size)


def visible_from(
    origin: Float[np.ndarray, "3"],
    voxels: Int[np.ndarray, " voxels"],
    occupied: Bool[np.ndarray, "x y z"],
    volume: Volume,
) -> Bool[np.ndarray, " voxels"]:
    """Whether voxels are seen: nothing occupied lies before the centre of one of their faces that look at the place.

    Not their own centres: of level ground seen at a low angle, every voxel's centre lies behind the voxels before it,
    and its upper face before none.

    Args:
      origin: metres, frame of the volume; may lie outside. What is in the place's own voxel is no bar.
      voxels: flat indices; they may be occupied themselves.
      occupied: what blocks the sight.
      volume: the grid.
    """
    solid = occupied.reshape(-1).copy()
    own = cell_indices(origin[None], volume)[0]
    if own >= 0:
        solid[own] = False
    cells = np.stack(np.unravel_index(voxels, volume.grid_size), 1)
    start = _in_cells(origin, volume)
    seen = np.zeros(len(voxels), bool)
    for axis in (2, 0, 1):
        below, above = start[axis] < cells[:, axis], start[axis] > cells[:, axis] + 1
        left = np.flatnonzero((below | above) & ~seen)
        faces = cells[left] + 0.5
        faces[:, axis] = cells[left, axis] + above[left]
        seen[left] = _clear(start, faces, voxels[left], solid, volume)
    return seen


def _clear(
    start: Float64[np.ndarray, "3"],
    ends: Float64[np.ndarray, "voxels 3"],
    voxels: Int[np.ndarray, " voxels"],
    solid: Bool[np.ndarray, " cells"],
    volume: Volume,
) -> Bool[np.ndarray, " voxels"]:
    """Whether the way from a place to each end, in units of cells, is free but for the end's own voxel."""
    clear = np.arange(len(voxels))
    # Few planes across z, and they stop all that lies below the ground: the long way is left to the others.
    for axis in (2, 0, 1):
        rays = _Rays(np.broadcast_to(start, (len(clear), 3)), ends[clear], volume)
        blocked = np.zeros(len(clear), bool)
        for ray, flat in rays.entries(axis):
            hit = solid[flat]
            ray, flat = ray[hit], flat[hit]
            blocked[ray[flat != voxels[clear[ray]]]] = True
        clear = clear[~blocked]
    found = np.zeros(len(voxels), bool)
    found[clear] = True
    return found


def camera_mask(
    occupied: Bool[np.ndarray, "x y z"],
    intrinsics: Float[np.ndarray, "cameras 3 3"],
    ego_to_camera: Float[np.ndarray, "cameras 4 4"],
    image_sizes: list[tuple[int, int]],
    volume: Volume,
) -> Bool[np.ndarray, "x y z"]:
    """Voxels that some camera sees: the centre falls into its image, and they are `visible_from` its place.

    Free voxels before the first occupied one of a line of sight, and that one itself.

    Args:
      occupied: what blocks the sight.
      intrinsics: pixels; pixel centres lie at whole numbers.
      ego_to_camera: from the frame of the volume to the cameras' (x right, y down, z forward), metres.
      image_sizes: (height, width) of each camera.
      volume: the grid.
    """
    seen = np.zeros(volume.num_voxels, bool)
    sides = zip(volume.minimum, volume.voxel_size, volume.grid_size, strict=True)
    axes = [low + (np.arange(cells) + 0.5) * size for low, size, cells in sides]
    x, y, z = np.meshgrid(*axes, sparse=True, indexing="ij")
    for matrix, pose, (height, width) in zip(intrinsics, ego_to_camera, image_sizes, strict=True):
        u, v, depth = ((a * x + b * y + c * z + d).reshape(-1) for a, b, c, d in matrix @ pose[:3])
        ahead = depth > 0
        low, right, bottom = -_HALF_PIXEL, width - _HALF_PIXEL, height - _HALF_PIXEL
        ahead &= (u >= low * depth) & (u < right * depth) & (v >= low * depth) & (v < bottom * depth)
        voxels = np.flatnonzero(ahead & ~seen)
        origin = -pose[:3, :3].T @ pose[:3, 3]
        seen[voxels[visible_from(origin, voxels, occupied, volume)]] = True
    return seen.reshape(volume.grid_size)
