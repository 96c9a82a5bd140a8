"""Ray tracing of a grid of rays against posed solids, each part only inside a window of the grid.

The same code serves the cameras (rays through pixels), the lidar (rays of its beams) and the sun (parallel rays, for
shadows), so that all of them see the same surfaces.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from data_prep.world.parts import Roundness
from data_prep.world.solids import PosedSolids, Solids

NOTHING, GROUND = -1, -2
_NEAR = 0.05


@dataclass(frozen=True)
class Hits:
    """First hits of a grid of rays: distance in metres (infinite: none) and the part's index, NOTHING or GROUND."""

    distance: Float[np.ndarray, "rows columns"]
    part: Int[np.ndarray, "rows columns"]


def _hit_hexahedron(
    planes: Float[np.ndarray, "6 4"], origins: Float[np.ndarray, "3 #h #w"], d: Float[np.ndarray, "3 h w"]
) -> Float[np.ndarray, "h w"]:
    enter = np.full(d.shape[1:], -np.inf, np.float32)
    leave = np.full(d.shape[1:], np.inf, np.float32)
    for nx, ny, nz, offset in planes:
        toward = nx * d[0] + ny * d[1] + nz * d[2]
        gap = offset - (nx * origins[0] + ny * origins[1] + nz * origins[2])
        t = gap / toward
        # A ray along the plane divides by zero: +inf or -inf by the side it runs on, which is what is wanted.
        facing = toward < 0
        np.maximum(enter, t, out=enter, where=facing)
        np.minimum(leave, t, out=leave, where=~facing)
    return np.where((enter <= leave) & (enter > _NEAR), enter, np.inf)


def _local(rotation, origins, d):
    o = np.stack(
        [rotation[0, k] * origins[0] + rotation[1, k] * origins[1] + rotation[2, k] * origins[2] for k in range(3)]
    )
    return o, np.stack([rotation[0, k] * d[0] + rotation[1, k] * d[1] + rotation[2, k] * d[2] for k in range(3)])


def _hit_ellipsoid(
    radii: Float[np.ndarray, "3"], o: Float[np.ndarray, "3 #h #w"], d: Float[np.ndarray, "3 h w"]
) -> Float[np.ndarray, "h w"]:
    o, d = o / radii[:, None, None], d / radii[:, None, None]
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
    c = o[0] * o[0] + o[1] * o[1] + o[2] * o[2] - 1
    root = b * b - a * c
    t = (-b - np.sqrt(np.maximum(root, 0))) / a
    return np.where((root >= 0) & (t > _NEAR), t, np.inf)


def _hit_frustum(
    dims: Float[np.ndarray, "3"], o: Float[np.ndarray, "3 #h #w"], d: Float[np.ndarray, "3 h w"]
) -> Float[np.ndarray, "h w"]:
    bottom, top, half = dims
    slope = (top - bottom) / (2 * half)
    middle = (top + bottom) / 2
    # x^2 + y^2 = (middle + slope z)^2 along the ray
    ro, rd = middle + slope * o[2], slope * d[2]
    a = d[0] * d[0] + d[1] * d[1] - rd * rd
    b = o[0] * d[0] + o[1] * d[1] - ro * rd
    c = o[0] * o[0] + o[1] * o[1] - ro * ro
    root = b * b - a * c
    span = np.sqrt(np.maximum(root, 0))
    best = np.full(d.shape[1:], np.inf, np.float32)
    for sign in (-1, 1):
        t = (-b + sign * span) / a
        z = o[2] + t * d[2]
        good = (root >= 0) & (np.abs(z) <= half) & (t > _NEAR)
        best = np.where(good & (t < best), t, best)
    for z, radius in ((-half, bottom), (half, top)):
        t = (z - o[2]) / d[2]
        x, y = o[0] + t * d[0], o[1] + t * d[1]
        good = (x * x + y * y <= radius * radius) & (t > _NEAR)
        best = np.where(good & (t < best), t, best)
    return best


def trace_solids(
    solids: Solids,
    posed: PosedSolids,
    windows: Int[np.ndarray, "windows 5"],
    origins: Float[np.ndarray, "3 #rows #columns"],
    directions: Float[np.ndarray, "3 rows columns"],
    far: float,
) -> Hits:
    """First hits with the parts, each tried in its windows only.

    Args:
      solids, posed: the parts and where they are.
      windows: rows of (part, first row, last row + 1, first column, last column + 1) of the grid.
      origins: starts of the rays relative to the posed solids' origin, metres.
      directions: unit vectors along the world's axes.
      far: hits beyond this are ignored, metres.
    """
    distance = np.full(directions.shape[1:], far, np.float32)
    part = np.full(directions.shape[1:], NOTHING, np.int32)
    shared = origins.shape[1:] == (1, 1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for index, r0, r1, c0, c1 in windows.tolist():
            d = directions[:, r0:r1, c0:c1]
            o = origins if shared else origins[:, r0:r1, c0:c1]
            if index < solids.flats:
                t = _hit_hexahedron(posed.planes[index], o, d)
            else:
                k = index - solids.flats
                o, d = _local(posed.rotation[k], o - posed.centre[k][:, None, None], d)
                hit = _hit_ellipsoid if solids.round_kind[k] == Roundness.ELLIPSOID else _hit_frustum
                t = hit(solids.round_dims[k], o, d)
            nearest = distance[r0:r1, c0:c1]
            closer = t < nearest
            np.copyto(nearest, t, where=closer)
            np.copyto(part[r0:r1, c0:c1], index, where=closer)
    distance[part == NOTHING] = np.inf
    return Hits(distance, part)


def surface_normals(
    solids: Solids, posed: PosedSolids, part: Int[np.ndarray, " n"], points: Float[np.ndarray, "n 3"]
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"], Int[np.ndarray, " n"]]:
    """Of points on parts: normals (world axes), positions in the part's texture frame, and faces hit.

    Args:
      part: indices of parts, none of them NOTHING or GROUND.
      points: relative to the posed solids' origin, metres.

    Returns:
      Unit normals; positions relative to the middle of the part, metres, along the axes of the thing (hexahedra) or
      of the part (round parts); the face of a hexahedron, 0..5 as -x, +x, -y, +y, -z, +z, or 6 for round parts.
    """
    normals, local = np.zeros_like(points), np.zeros_like(points)
    face = np.full(len(part), 6, np.int32)
    flat = np.flatnonzero(part < solids.flats)
    index, p = part[flat], points[flat]
    thing = solids.part_thing[index]
    closest = np.full(flat.size, np.inf, np.float32)
    for k in range(6):
        plane = posed.planes[index, k]
        gap = np.abs(plane[:, 0] * p[:, 0] + plane[:, 1] * p[:, 1] + plane[:, 2] * p[:, 2] - plane[:, 3])
        better = gap < closest
        closest = np.where(better, gap, closest)
        face[flat[better]] = k
        normals[flat[better]] = plane[better, :3]
    offset = p - posed.thing_place[thing]
    c, s = np.cos(posed.thing_yaw[thing]), np.sin(posed.thing_yaw[thing])
    turned = np.stack([c * offset[:, 0] + s * offset[:, 1], c * offset[:, 1] - s * offset[:, 0], offset[:, 2]], 1)
    local[flat] = turned - solids.part_middle[index]

    round_ = np.flatnonzero(part >= solids.flats)
    index = part[round_]
    k = index - solids.flats
    offset = points[round_] - posed.centre[k]
    rotation, dims = posed.rotation[k], solids.round_dims[k]
    p = np.einsum("nij,ni->nj", rotation, offset)
    local[round_] = p
    egg = p / (dims * dims)
    slope = (dims[:, 1] - dims[:, 0]) / (2 * dims[:, 2])
    radius = (dims[:, 0] + dims[:, 1]) / 2 + slope * p[:, 2]
    side = np.stack([p[:, 0], p[:, 1], -slope * radius], 1)
    cap = np.zeros_like(p)
    cap[:, 2] = np.sign(p[:, 2])
    on_cap = np.hypot(p[:, 0], p[:, 1]) < radius - 2e-3
    normal = np.where((solids.round_kind[k] == Roundness.ELLIPSOID)[:, None], egg, np.where(on_cap[:, None], cap, side))
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    normals[round_] = np.einsum("nij,nj->ni", rotation, normal)
    return normals, local, face


def windows_of(
    keep: Bool[np.ndarray, " parts"], bounds: Int[np.ndarray, "parts 4"], shape: tuple[int, int]
) -> Int[np.ndarray, "windows 5"]:
    """Rows of `trace_solids`' windows from (first row, last row + 1, first column, last column + 1), clipped."""
    rows = np.clip(bounds[:, :2], 0, shape[0])
    columns = np.clip(bounds[:, 2:], 0, shape[1])
    keep = keep & (rows[:, 1] > rows[:, 0]) & (columns[:, 1] > columns[:, 0])
    return np.concatenate([np.arange(len(keep))[:, None], rows, columns], 1)[keep].astype(np.int64)
