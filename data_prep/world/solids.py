"""All parts of a scene as arrays, and where they are at a given time."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from data_prep.world.parts import CORNER_SIGNS, Hexahedron
from data_prep.world.scene import Scene


@dataclass(frozen=True)
class PosedSolids:
    """The parts at one instant, relative to an origin, along the world's axes, float32 metres.

    Hexahedra come first, then round parts; `corners`, like `Solids.part_*`, holds both.
    """

    planes: Float[np.ndarray, "flats 6 4"]
    corners: Float[np.ndarray, "parts 8 3"]
    centre: Float[np.ndarray, "rounds 3"]
    rotation: Float[np.ndarray, "rounds 3 3"]
    thing_place: Float[np.ndarray, "things 3"]
    thing_yaw: Float[np.ndarray, " things"]


class Solids:
    """The parts of all things of a scene in arrays; things are indexed from 0, the own car last.

    Attributes:
      part_thing, part_material [parts], part_colour [parts, 3]: of hexahedra, then of round parts.
      part_middle, part_half [parts, 3]: middle and half sizes of the box around a part; for hexahedra along the axes
        of the thing, for round parts along their own.
      round_kind [rounds], round_dims [rounds, 3]: see `parts.Round`.
      thing_number, thing_lidarseg [things]: the things' numbers and raw lidarseg indices.
      flats: how many hexahedra there are.
    """

    def __init__(self, scene: Scene):
        self._scene = scene
        everything = [*scene.things, scene.own_car]
        flats = [(i, p) for i, t in enumerate(everything) for p in t.shape.parts if isinstance(p, Hexahedron)]
        rounds = [(i, p) for i, t in enumerate(everything) for p in t.shape.parts if not isinstance(p, Hexahedron)]
        self.flats = len(flats)
        self.thing_number = np.array([t.number for t in everything], np.int32)
        self.thing_lidarseg = np.array([t.shape.lidarseg_index for t in everything], np.uint8)
        self.part_thing = np.array([i for i, _ in flats + rounds])
        self.part_material = np.array([int(p.material) for _, p in flats + rounds], np.int32)
        self.part_colour = np.array([p.colour for _, p in flats + rounds], np.float32)
        self._planes = np.array([p.planes for _, p in flats]).reshape(-1, 6, 4)
        flat_corners = np.array([p.corners for _, p in flats]).reshape(-1, 8, 3)
        self.round_kind = np.array([int(p.kind) for _, p in rounds])
        self.round_dims = np.array([p.dims for _, p in rounds], np.float32).reshape(-1, 3)
        self._centre = np.array([p.centre for _, p in rounds]).reshape(-1, 3)
        self.round_rotation = np.array([p.rotation for _, p in rounds]).reshape(-1, 3, 3)
        half = np.array([p.half_extent() for _, p in rounds]).reshape(-1, 1, 3)
        around = np.einsum("nij,nkj->nki", self.round_rotation, CORNER_SIGNS * half) + self._centre[:, None]
        self._corners = np.concatenate([flat_corners, around])
        low, high = flat_corners.min(1), flat_corners.max(1)
        self.part_middle = np.concatenate([(low + high) / 2, self._centre]).astype(np.float32)
        self.part_half = np.concatenate([(high - low) / 2, half[:, 0]]).astype(np.float32)

    def poses(self, time: float) -> Float[np.ndarray, "things 4"]:
        """(x, y, z, yaw) of all things in the world at a time in seconds, z on the ground."""
        times = np.array([time])
        flat = np.array([t.motion.poses(times)[0] for t in (*self._scene.things, self._scene.own_car)])
        z = self._scene.ground.field.height(flat[:, 0], flat[:, 1])
        return np.stack([flat[:, 0], flat[:, 1], z, flat[:, 2]], 1)

    def at(self, time: float, origin: Float[np.ndarray, "3"]) -> PosedSolids:
        """The parts at a time in seconds, relative to an origin in the world."""
        poses = self.poses(time)
        place, yaw = poses[:, :3] - origin, poses[:, 3]
        turn = np.zeros((len(yaw), 3, 3))
        turn[:, 0, 0] = turn[:, 1, 1] = np.cos(yaw)
        turn[:, 1, 0] = np.sin(yaw)
        turn[:, 0, 1] = -turn[:, 1, 0]
        turn[:, 2, 2] = 1.0
        owner: Int[np.ndarray, " parts"] = self.part_thing
        corners = np.einsum("nij,nkj->nki", turn[owner], self._corners) + place[owner][:, None]
        flat_owner, round_owner = owner[: self.flats], owner[self.flats :]
        normals = np.einsum("nij,nkj->nki", turn[flat_owner], self._planes[..., :3])
        offsets = self._planes[..., 3] + np.einsum("nki,ni->nk", normals, place[flat_owner])
        centre = np.einsum("nij,nj->ni", turn[round_owner], self._centre) + place[round_owner]
        return PosedSolids(
            np.concatenate([normals, offsets[..., None]], -1).astype(np.float32),
            corners.astype(np.float32),
            centre.astype(np.float32),
            np.einsum("nij,njk->nik", turn[round_owner], self.round_rotation).astype(np.float32),
            place.astype(np.float32),
            yaw.astype(np.float32),
        )
