"""The true occupancy of a grid around the car: which voxels the surface of the world runs through, and of what it is.

The surface is the boundary of the union of ground and things, the recording car apart. It is sampled (`SPACING`), so a
voxel of which it cuts off only a corner smaller than a spacing may be missed; a point of the surface is never further
than a spacing from an occupied voxel.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from data_prep.world.ground import SURFACE_LIDARSEG
from data_prep.world.recorded_scene import RecordedKeyFrame, RecordedScene
from data_prep.world.scene import Scene
from data_prep.world.solids import PosedSolids, Solids
from data_prep.world.surfaces import TILE, TOUCHING, inside_part, sample_surfaces
from pop3d_jax.geometry import apply_rigid, invert_rigid
from pop3d_jax.nuscenes import LIDARSEG_TO_CLASS
from pop3d_jax.occ3d.grid import OCC3D_VOLUME
from pop3d_jax.occ3d.majority import majority_labels
from pop3d_jax.occ3d.visibility import cell_indices, crossed_voxels
from pop3d_jax.voxels import Volume

# An eighth of a voxel's edge, metres; benchmarks/accumulated_truth.py tells what halving it changes.
SPACING = 0.05
# Samples at once.
_BLOCK = 1 << 17
# Slopes and the tilt of the car carry corners of the volume this much further sideways, metres.
_TILT_REACH = 2.0


class _Votes:
    """Square metres of surface by voxel and label."""

    def __init__(self, world_to_ego: Float[np.ndarray, "4 4"], volume: Volume):
        self._to_ego, self._volume = _turn_of(world_to_ego), volume
        self._voxels, self._lidarseg, self._area = [], [], []

    def add(
        self, points: Float[np.ndarray, "n 3"], lidarseg: UInt8[np.ndarray, " n"], area: Float[np.ndarray, " n"]
    ) -> None:
        """Counts samples; points relative to the car's place, along the world's axes."""
        voxels = cell_indices(apply_rigid(self._to_ego, points), self._volume)
        inside = voxels >= 0
        self._voxels.append(voxels[inside])
        self._lidarseg.append(lidarseg[inside])
        self._area.append(area[inside])

    def semantics(self) -> UInt8[np.ndarray, "x y z"]:
        voxels, lidarseg, area = (np.concatenate(part) for part in (self._voxels, self._lidarseg, self._area))
        return majority_labels(voxels, LIDARSEG_TO_CLASS[lidarseg], self._volume, area)


def _turn_of(transform: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """The transform without its shift."""
    turn = np.eye(4)
    turn[:3, :3] = transform[:3, :3]
    return turn


def true_semantics(
    scene: Scene, solids: Solids, time: float, volume: Volume = OCC3D_VOLUME, spacing: float = SPACING
) -> UInt8[np.ndarray, "x y z"]:
    """Occ3D's labels of a grid in the car's frame at a time in seconds: 0..16 by most surface area, 17 free."""
    ego_to_world = scene.ego_to_world(time)
    origin, world_to_ego = ego_to_world[:3, 3], invert_rigid(ego_to_world)
    posed = solids.at(time, origin)
    # The recording car is the last thing.
    parts = solids.part_thing < len(solids.thing_number) - 1
    votes = _Votes(world_to_ego, volume)
    _add_things(votes, scene, solids, posed, parts, origin, world_to_ego, volume, spacing)
    _add_ground(votes, scene, solids, posed, parts, ego_to_world, volume, spacing)
    return votes.semantics()


def _add_things(votes, scene, solids, posed, parts, origin, world_to_ego, volume, spacing) -> None:
    turn = _turn_of(world_to_ego)
    low, high = np.array(volume.minimum) - TILE, np.array(volume.maximum) + TILE

    def near(points: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n"]:
        own = apply_rigid(turn, points)
        return ((own >= low) & (own <= high)).all(1)

    reach = np.linalg.norm(np.maximum(np.abs(low), np.abs(high)))
    corners = posed.corners
    around = (corners.min(1) <= reach).all(1) & (corners.max(1) >= -reach).all(1)
    samples = sample_surfaces(solids, posed, parts & around, spacing, near)
    # In blocks: arrays of millions of rows cost more in memory traffic than in arithmetic.
    for start in range(0, len(samples.points), _BLOCK):
        block = np.s_[start : start + _BLOCK]
        points = samples.points[block]
        soil = scene.ground.field.height(points[:, 0] + origin[0], points[:, 1] + origin[1]) - origin[2]
        above = points[:, 2] > soil + TOUCHING
        thing = solids.part_thing[samples.part[block][above]]
        votes.add(points[above], solids.thing_lidarseg[thing], samples.area[block][above])


def _add_ground(votes, scene, solids, posed, parts, ego_to_world, volume, spacing) -> None:
    """The ground on a lattice along the car's heading, strip by strip, without what lies under or in a solid."""
    heading = np.arctan2(ego_to_world[1, 0], ego_to_world[0, 0])
    ends = [(volume.minimum[k] - _TILT_REACH, volume.maximum[k] + _TILT_REACH) for k in (0, 1)]
    along, across = (np.arange(low, high, spacing) + spacing / 2 for low, high in ends)
    rows = max(1, _BLOCK // len(across))
    for start in range(0, len(along), rows):
        strip = _Lattice(along[start : start + rows], across, heading, ego_to_world[:3, 3], scene, spacing)
        strip.hide(solids, posed, parts)
        votes.add(*strip.samples(scene))


class _Lattice:
    """Samples of the ground: [along, across] the car's heading, relative to the car's place."""

    def __init__(self, along, across, heading: float, origin, scene: Scene, spacing: float):
        self._along, self._across, self._spacing = along, across, spacing
        self._heading = np.array([[np.cos(heading), np.sin(heading)], [-np.sin(heading), np.cos(heading)]])
        (c, s), _ = self._heading
        x, y = c * along[:, None] - s * across, s * along[:, None] + c * across
        self._world = x + origin[0], y + origin[1]
        z = scene.ground.field.height(*self._world) - origin[2]
        self._points = np.stack([x, y, z], -1)
        self._seen = np.ones(z.shape, bool)

    def hide(self, solids: Solids, posed: PosedSolids, parts: Bool[np.ndarray, " parts"]) -> None:
        """Leaves out what lies in parts."""
        beside = posed.corners[..., :2] @ self._heading.T
        corner = np.array([self._along[0], self._across[0]])
        first = np.floor((beside.min(1) - corner) / self._spacing).astype(int)
        last = np.ceil((beside.max(1) - corner) / self._spacing).astype(int) + 1
        first, last = (np.clip(ends, 0, self._seen.shape) for ends in (first, last))
        low, high = posed.corners[..., 2].min(1) - TOUCHING, posed.corners[..., 2].max(1) + TOUCHING
        for part in np.flatnonzero(parts & (last > first).all(1)):
            where = np.s_[first[part, 0] : last[part, 0], first[part, 1] : last[part, 1]]
            points = self._points[where]
            if points[..., 2].max() >= low[part] and points[..., 2].min() <= high[part]:
                hidden = inside_part(solids, posed, part, points.reshape(-1, 3))
                self._seen[where] &= ~hidden.reshape(points.shape[:2])

    def samples(self, scene: Scene):
        """Places, raw lidarseg indices and areas (square metres) of what is left."""
        x, y = (place[self._seen] for place in self._world)
        upward = scene.ground.field.normal(x, y)[:, 2]
        surface, _, _ = scene.ground.surface(x.astype(np.float32), y.astype(np.float32))
        return self._points[self._seen], SURFACE_LIDARSEG[surface], self._spacing**2 / upward


def lidar_mask(
    recorded: RecordedScene, frames: list[RecordedKeyFrame], number: int, volume: Volume = OCC3D_VOLUME
) -> Bool[np.ndarray, "x y z"]:
    """Voxels of a key frame's grid that rays of the scene's sweeps cross or hit.

    Rays lie where they were measured. What they hit is carried along with its thing to where that is at this key frame.
    Returns of the recording car are left out.

    Args:
      recorded: the scene.
      frames: all its key frames.
      number: of the key frame whose grid it is.
      volume: the grid, in the car's frame.
    """
    solids = recorded.solids
    now = frames[number].time
    world_to_ego = invert_rigid(recorded.scene.ego_to_world(now))
    there = solids.poses(now)
    observed = np.zeros(volume.num_voxels, bool)

    for frame in frames:
        foreign = frame.sweep.number != solids.thing_number[-1]
        pose = frame.lidar_to_world
        points = apply_rigid(pose, frame.sweep.points[foreign, :3])
        start = apply_rigid(world_to_ego, pose[None, :3, 3])
        crossed = crossed_voxels(np.broadcast_to(start, points.shape), apply_rigid(world_to_ego, points), volume)
        observed |= crossed.reshape(-1)
        carried = _carried(solids, frame.sweep.number[foreign], points, solids.poses(frame.time), there)
        hit = cell_indices(apply_rigid(world_to_ego, carried), volume)
        observed[hit[hit >= 0]] = True
    return observed.reshape(volume.grid_size)


def _carried(
    solids: Solids,
    number: Int[np.ndarray, " points"],
    points: Float[np.ndarray, "points 3"],
    poses: Float[np.ndarray, "things 4"],
    there: Float[np.ndarray, "things 4"],
) -> Float[np.ndarray, "points 3"]:
    """Points in the world after their things moved from `poses` to `there`; the ground stays."""
    index = np.full(int(max(number.max(initial=0), solids.thing_number.max())) + 1, -1)
    index[solids.thing_number] = np.arange(len(solids.thing_number))
    thing = index[number]
    on_thing = thing >= 0
    thing = thing[on_thing]
    offset = points[on_thing] - poses[thing, :3]
    turn = there[thing, 3] - poses[thing, 3]
    c, s = np.cos(turn), np.sin(turn)
    turned = np.stack([c * offset[:, 0] - s * offset[:, 1], s * offset[:, 0] + c * offset[:, 1], offset[:, 2]], 1)
    moved = points.copy()
    moved[on_thing] = turned + there[thing, :3]
    return moved
