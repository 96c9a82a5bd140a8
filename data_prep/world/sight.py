"""What rays from one place meet first: the same surfaces for cameras and lidar."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_prep.world.ground import SURFACE_LIDARSEG, trace_ground
from data_prep.world.scene import Scene
from data_prep.world.solids import PosedSolids, Solids
from data_prep.world.trace import GROUND, NOTHING, surface_normals, trace_solids

SKY_LIDARSEG = 255


@dataclass(frozen=True)
class Sight:
    """First hits of rays that start in one place.

    `distance` in metres (infinite: none); `part` as in `trace.Hits`; unit normals along the world's axes; `number` of
    the thing or of the ground's surface (0: none); raw `lidarseg` index (255: none). `soil` and `solid` are the
    indices of rays that meet the ground and parts: `soil_place` [soil, 2] is where in the world; `local` [solid, 3]
    and `face` [solid] are as `trace.surface_normals` returns them.
    """

    distance: Float[np.ndarray, " rays"]
    part: Int[np.ndarray, " rays"]
    normal: Float[np.ndarray, "rays 3"]
    number: Int[np.ndarray, " rays"]
    lidarseg: UInt8[np.ndarray, " rays"]
    soil: Int[np.ndarray, " soil"]
    solid: Int[np.ndarray, " solid"]
    soil_place: Float[np.ndarray, "soil 2"]
    local: Float[np.ndarray, "solid 3"]
    face: Int[np.ndarray, " solid"]


def look(
    scene: Scene,
    solids: Solids,
    posed: PosedSolids,
    windows: Int[np.ndarray, "windows 5"],
    origin: Float[np.ndarray, "3"],
    directions: Float[np.ndarray, "3 rows columns"],
    far: float,
) -> Sight:
    """Traces a grid of rays, flattened row by row in the result.

    Args:
      scene, solids: the world.
      posed: the parts relative to `origin`.
      windows: as for `trace.trace_solids`.
      origin: where the rays start, in the world.
      directions: unit vectors along the world's axes.
      far: metres beyond which nothing is seen.
    """
    hits = trace_solids(solids, posed, windows, np.zeros((3, 1, 1), np.float32), directions, far)
    distance, part = hits.distance.reshape(-1), hits.part.reshape(-1)
    d = directions.reshape(3, -1)
    start = origin.astype(np.float32)
    to_ground = trace_ground(scene.ground.field, start[:, None], d, np.minimum(distance, np.float32(far)))
    part = np.where(np.isfinite(to_ground), GROUND, part)
    distance = np.minimum(distance, to_ground)

    normal = np.zeros((part.size, 3), np.float32)
    number = np.zeros(part.size, np.int32)
    lidarseg = np.where(part == NOTHING, SKY_LIDARSEG, 0).astype(np.uint8)
    soil, solid = np.flatnonzero(part == GROUND), np.flatnonzero(part >= 0)
    x, y = (start[k] + distance[soil] * d[k, soil] for k in (0, 1))
    surface, _, _ = scene.ground.surface(x, y)
    normal[soil] = scene.ground.field.normal(x, y)
    number[soil], lidarseg[soil] = surface, SURFACE_LIDARSEG[surface]
    index = part[solid]
    normal[solid], local, face = surface_normals(solids, posed, index, (distance[solid] * d[:, solid]).T)
    thing = solids.part_thing[index]
    number[solid], lidarseg[solid] = solids.thing_number[thing], solids.thing_lidarseg[thing]
    return Sight(distance, part, normal, number, lidarseg, soil, solid, np.stack([x, y], 1), local, face)
