"""The surface of all solids of a scene at one instant, as dense samples: what the true labels are made of.

Every face, ellipsoid, mantle and disc is cut into tiles with sides of at most `TILE`, and a tile into a square lattice
of samples, so that no point of a surface is further than one spacing from a sample of the same surface. Tiles that lie
away from the volume are dropped before they are sampled.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from data_prep.world.parts import Roundness
from data_prep.world.solids import PosedSolids, Solids

# Sides of a tile, metres.
TILE = 0.8
# A sample this close to another solid counts as inside it, metres: where two solids touch there is no surface.
TOUCHING = 1e-3
# Corners of a hexahedron's faces (bits of the index as in parts.CORNER_SIGNS), in the order 00, 10, 01, 11.
_FACE_CORNERS = np.array(
    [
        [side << axis | (i & 1) << (axis + 1) % 3 | (i >> 1) << (axis + 2) % 3 for i in range(4)]
        for axis in range(3)
        for side in (0, 1)
    ]
)

_Array = Float[np.ndarray, "..."]
# From shape parameters and places u, v in 0..1 to positions [..., 3] and square metres per unit of u and v.
_Surface = Callable[[_Array, _Array, _Array], tuple[_Array, _Array]]


@dataclass(frozen=True)
class SurfaceSamples:
    """Samples of the surfaces, ascending by part; `points` relative to the posed solids' origin, metres.

    `area` is the piece of surface that a sample stands for, square metres.
    """

    points: Float[np.ndarray, "samples 3"]
    part: Int[np.ndarray, " samples"]
    area: Float[np.ndarray, " samples"]


def _quad(corners, u, v):
    c00, c10, c01, c11 = (corners[:, i, None] for i in range(4))
    u, v = u[..., None], v[..., None]
    position = (1 - u) * (1 - v) * c00 + u * (1 - v) * c10 + (1 - u) * v * c01 + u * v * c11
    along_u, along_v = (1 - v) * (c10 - c00) + v * (c11 - c01), (1 - u) * (c01 - c00) + u * (c11 - c10)
    return position, np.linalg.norm(np.cross(along_u, along_v), axis=-1)


def _ellipsoid(radii, u, v):
    a, b, c = (radii[:, i, None] for i in range(3))
    (x, y), (z, level) = _circle(2 * np.pi * u), _circle(np.pi * v)
    position = np.stack([a * level * x, b * level * y, c * z], -1)
    stretch = np.sqrt((b * c * level * x) ** 2 + (a * c * level * y) ** 2 + (a * b * z) ** 2)
    return position, 2 * np.pi**2 * level * stretch


def _mantle(dims, u, v):
    bottom, top, half = (dims[:, i, None] for i in range(3))
    x, y = _circle(2 * np.pi * u)
    radius = bottom + (top - bottom) * v
    position = np.stack([radius * x, radius * y, (2 * v - 1) * half], -1)
    return position, 2 * np.pi * radius * np.hypot(2 * half, top - bottom)


def _disc(dims, u, v):
    """`dims`: radius and height of the disc."""
    radius, z = dims[:, 0, None], dims[:, 1, None]
    x, y = _circle(2 * np.pi * u)
    return np.stack([radius * v * x, radius * v * y, np.broadcast_to(z, u.shape)], -1), 2 * np.pi * radius**2 * v


def _circle(angle):
    return np.cos(angle), np.sin(angle)


class _Family:
    """Patches of one kind of surface: `lengths` [patches, 2] are their longest extents along u and v, metres."""

    def __init__(self, surface: _Surface, part, parameters, lengths, posed: PosedSolids, flats: int):
        self._surface, self._part, self._parameters = surface, part, parameters
        self._counts = np.maximum(np.ceil(np.asarray(lengths) / TILE), 1).astype(np.int64)
        self._posed, self._flats = posed, flats

    def _place(self, part, position):
        """From the round parts' own frames to the world's axes; faces are there already."""
        if self._surface is _quad:
            return position
        k = part - self._flats
        return np.einsum("nij,nsj->nsi", self._posed.rotation[k], position) + self._posed.centre[k][:, None]

    def sample(self, spacing: float, near: Callable[[_Array], Bool[np.ndarray, " n"]]) -> SurfaceSamples:
        """Samples of the tiles whose middles are `near` the volume."""
        tiles = self._counts.prod(1)
        patch = np.repeat(np.arange(len(tiles)), tiles)
        number = np.arange(len(patch)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        low = np.stack([number % self._counts[patch, 0], number // self._counts[patch, 0]], 1)
        size = 1 / self._counts[patch]
        middle = (low + 0.5) * size
        position, _ = self._surface(self._parameters[patch], middle[:, :1], middle[:, 1:])
        kept = near(self._place(self._part[patch], position)[:, 0])
        patch, low, size = patch[kept], low[kept], size[kept]
        side = int(np.ceil(TILE / spacing))
        within = (np.stack(np.meshgrid(*[np.arange(side)] * 2), -1).reshape(-1, 2) + 0.5) / side
        u, v = np.moveaxis((low[:, None] + within) * size[:, None], -1, 0)
        position, density = self._surface(self._parameters[patch], u, v)
        part = self._part[patch]
        area = density * (size.prod(1) / side**2)[:, None]
        return SurfaceSamples(
            self._place(part, position).reshape(-1, 3), np.repeat(part, side * side), area.reshape(-1)
        )


def _families(solids: Solids, posed: PosedSolids, parts: Bool[np.ndarray, " parts"]) -> list[_Family]:
    flats = solids.flats
    flat = np.flatnonzero(parts[:flats])
    corners = posed.corners[flat][:, _FACE_CORNERS].reshape(-1, 4, 3).astype(np.float64)

    def longest(*pairs):
        return np.max([np.linalg.norm(corners[:, a] - corners[:, b], axis=-1) for a, b in pairs], 0)

    lengths = np.stack([longest((0, 1), (2, 3)), longest((0, 2), (1, 3))], 1)
    families = [_Family(_quad, np.repeat(flat, 6), corners, lengths, posed, flats)]
    dims = solids.round_dims.astype(np.float64)
    ellipsoid = np.flatnonzero(parts[flats:] & (solids.round_kind == Roundness.ELLIPSOID))
    radii = dims[ellipsoid]
    lengths = np.pi * np.stack([2 * radii[:, :2].max(1), radii.max(1)], 1)
    families.append(_Family(_ellipsoid, flats + ellipsoid, radii, lengths, posed, flats))
    frustum = np.flatnonzero(parts[flats:] & (solids.round_kind == Roundness.FRUSTUM))
    bottom, top, half = dims[frustum].T
    lengths = np.stack([2 * np.pi * np.maximum(bottom, top), np.hypot(2 * half, top - bottom)], 1)
    families.append(_Family(_mantle, flats + frustum, dims[frustum], lengths, posed, flats))
    for radius, z in ((bottom, -half), (top, half)):
        lengths = np.stack([2 * np.pi * radius, radius], 1)
        families.append(_Family(_disc, flats + frustum, np.stack([radius, z], 1), lengths, posed, flats))
    return families


def inside_part(
    solids: Solids, posed: PosedSolids, part: int, points: Float[np.ndarray, "n 3"]
) -> Bool[np.ndarray, " n"]:
    """Which points lie in a part or touch it; points relative to the posed solids' origin, metres."""
    if part < solids.flats:
        x, y, z = points.T
        inside = np.ones(len(points), bool)
        for a, b, c, d in posed.planes[part].astype(np.float64):
            inside &= a * x + b * y + c * z <= d + TOUCHING
        return inside
    k = part - solids.flats
    local = np.einsum("nj,ji->ni", points - posed.centre[k], posed.rotation[k].astype(np.float64))
    a, b, c = solids.round_dims[k].astype(np.float64)
    if solids.round_kind[k] == Roundness.ELLIPSOID:
        return ((local / ((a, b, c) + np.float64(TOUCHING))) ** 2).sum(1) <= 1
    z = np.clip(local[:, 2], -c, c)
    radius = (a + b) / 2 + (b - a) / (2 * c) * z
    return (np.abs(local[:, 2]) <= c + TOUCHING) & (np.hypot(local[:, 0], local[:, 1]) <= radius + TOUCHING)


def sample_surfaces(
    solids: Solids,
    posed: PosedSolids,
    parts: Bool[np.ndarray, " parts"],
    spacing: float,
    near: Callable[[Float[np.ndarray, "n 3"]], Bool[np.ndarray, " n"]],
) -> SurfaceSamples:
    """Samples of the parts' surfaces, without those inside another of these parts.

    Args:
      solids, posed: the parts and where they are.
      parts: which of them count.
      spacing: of the samples, metres.
      near: whether places lie within `TILE` metres of what matters.
    """
    families = [family.sample(spacing, near) for family in _families(solids, posed, parts)]
    points, part, area = (
        np.concatenate([getattr(samples, name) for samples in families]) for name in ("points", "part", "area")
    )
    order = np.argsort(part, kind="stable")
    points, part, area = points[order], part[order], area[order]
    present, first, counts = np.unique(part, return_index=True, return_counts=True)
    slices = [slice(start, start + count) for start, count in zip(first, counts, strict=True)]
    # A round part's box of corners may be turned: its axis-parallel hull holds it all the same.
    low, high = posed.corners.min(1) - TOUCHING, posed.corners.max(1) + TOUCHING
    hidden = np.zeros(len(part), bool)
    for container in np.flatnonzero(parts):
        meets = ((low[present] <= high[container]) & (high[present] >= low[container])).all(1) & (present != container)
        for index in np.flatnonzero(meets):
            where = slices[index]
            hidden[where] |= inside_part(solids, posed, container, points[where])
    return SurfaceSamples(points[~hidden], part[~hidden], area[~hidden])
