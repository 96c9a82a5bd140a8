"""The solids that things are built of: hexahedra, ellipsoids and round frusta, in the thing's own frame.

A thing's frame has its origin on the ground under the thing's middle, x forward, y left, z up, metres.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Float

Colour = tuple[int, int, int]


class Material(IntEnum):
    """What a part is made of: decides texture and lidar reflectivity."""

    PAINT = 0
    CAR_BODY = 1
    CABIN = 2
    CAB = 3
    BUS_BODY = 4
    TYRE = 5
    LEAVES = 6
    BARK = 7
    CLOTH = 8
    SKIN = 9
    CONE = 10
    BARRIER = 11
    BRICK = 12
    CONCRETE = 13
    GLASS_FRONT = 14
    PLASTER = 15
    ROOF = 16
    METAL = 17


class Roundness(IntEnum):
    ELLIPSOID = 0
    FRUSTUM = 1


# Corners of a hexahedron: bit 0 of the index is +x, bit 1 is +y, bit 2 is +z.
CORNER_SIGNS = np.array([[(i & 1) * 2 - 1, (i >> 1 & 1) * 2 - 1, (i >> 2 & 1) * 2 - 1] for i in range(8)])
EDGES = np.array([(a, b) for a in range(8) for b in range(a + 1, 8) if bin(a ^ b).count("1") == 1])
# Three corners of each face, wound so that the cross product points outward: -x, +x, -y, +y, -z, +z.
_FACES = ((0, 4, 2), (1, 3, 5), (0, 1, 4), (2, 6, 3), (0, 2, 1), (4, 5, 6))


@dataclass(frozen=True)
class Hexahedron:
    """A convex solid with six flat faces: the points p with planes[:, :3] @ p <= planes[:, 3]."""

    planes: Float[np.ndarray, "6 4"]
    corners: Float[np.ndarray, "8 3"]
    material: Material
    colour: Colour


@dataclass(frozen=True)
class Round:
    """An ellipsoid (dims: three radii) or a round frustum about its z axis (dims: bottom and top radius, half height).

    `rotation` turns the part's frame into the thing's; `centre` is the middle of the part.
    """

    kind: Roundness
    centre: Float[np.ndarray, "3"]
    rotation: Float[np.ndarray, "3 3"]
    dims: Float[np.ndarray, "3"]
    material: Material
    colour: Colour

    def half_extent(self) -> Float[np.ndarray, "3"]:
        """Half sizes of the box around the part, in the part's frame."""
        if self.kind == Roundness.ELLIPSOID:
            return self.dims
        radius = max(self.dims[0], self.dims[1])
        return np.array([radius, radius, self.dims[2]])


def hexahedron(corners: Float[np.ndarray, "8 3"], material: Material, colour: Colour) -> Hexahedron:
    """The solid with these corners (order of `CORNER_SIGNS`); every face must be flat."""
    corners = np.asarray(corners, np.float64)
    planes = []
    for a, b, c in _FACES:
        normal = np.cross(corners[b] - corners[a], corners[c] - corners[a])
        normal /= np.linalg.norm(normal)
        planes.append([*normal, normal @ corners[a]])
    return Hexahedron(np.array(planes), corners, material, colour)


def box(
    centre: tuple[float, float, float], size: tuple[float, float, float], material: Material, colour: Colour
) -> Hexahedron:
    """An upright box; `size` is its length, width and height."""
    return hexahedron(np.array(centre) + CORNER_SIGNS * (np.array(size) / 2), material, colour)


def tapered(
    centre: tuple[float, float, float],
    bottom: tuple[float, float],
    top: tuple[float, float],
    height: float,
    material: Material,
    colour: Colour,
    shift: float = 0.0,
) -> Hexahedron:
    """A block standing on `centre` whose rectangle shrinks from `bottom` to `top` (length, width).

    The top is shifted forward by `shift` metres.
    """
    corners = np.zeros((8, 3))
    for i, (sx, sy, sz) in enumerate(CORNER_SIGNS):
        length, width = top if sz > 0 else bottom
        corners[i] = (sx * length / 2 + (shift if sz > 0 else 0), sy * width / 2, height if sz > 0 else 0)
    return hexahedron(corners + np.array(centre), material, colour)


def ellipsoid(
    centre: tuple[float, float, float], radii: tuple[float, float, float], material: Material, colour: Colour
) -> Round:
    """An ellipsoid with its axes along the thing's."""
    return Round(Roundness.ELLIPSOID, np.array(centre, float), np.eye(3), np.array(radii, float), material, colour)


def frustum(
    base: tuple[float, float, float],
    bottom_radius: float,
    top_radius: float,
    height: float,
    material: Material,
    colour: Colour,
) -> Round:
    """An upright round frustum (cylinder, cone) standing on `base`."""
    centre = np.array(base, float) + (0, 0, height / 2)
    dims = np.array([bottom_radius, top_radius, height / 2])
    return Round(Roundness.FRUSTUM, centre, np.eye(3), dims, material, colour)


def wheel(centre: tuple[float, float, float], radius: float, width: float) -> Round:
    """A wheel whose axle lies along the thing's y axis."""
    rotation = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])
    dims = np.array([radius, radius, width / 2])
    return Round(Roundness.FRUSTUM, np.array(centre, float), rotation, dims, Material.TYRE, (28, 28, 30))
