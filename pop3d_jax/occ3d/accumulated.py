"""Dense ground truth from a scene's own sweeps, where there is no Occ3D download.

**This is our own construction, not Occ3D's.** Occ3D also reconstructs meshes, fills holes and refines labels by the
images; numbers against one are never to be compared with numbers against the other, nor mixed.

For a key frame, the points of all key frames of its scene are brought to its ego frame by pose:

- A point with a label of a thing that can move (raw lidarseg 1 to 23) belongs to the smallest annotated box of its own
  key frame that holds it, up to `BOX_MARGIN`. It goes where the box of that instance is at this key frame, and is left
  out where the instance has no box then. Such a point in no box counts at its own key frame only.
- All other points stand still. Returns of the recording car and noise are left out.
- A voxel with points is occupied; its label is the class of most of them (others is 0), the lowest one in a tie.
- Everything else is free in `semantics`. Only the masks say what is known.

`mask_lidar` has the voxels with points and those that rays pass on their way to a return, wherever it is moved to.
`mask_camera` has the voxels of `mask_lidar` that some camera of the key frame sees, with nothing occupied before them:
where no ray passed there is no ground truth to see.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float64, Int, UInt8

from pop3d_jax.data.boxes import Boxes
from pop3d_jax.data.pipeline import image_sizes
from pop3d_jax.data.records import KeyFrame, RecordError, RecordSource
from pop3d_jax.geometry import apply_rigid, invert_rigid, quaternion_to_rotation
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES, LIDARSEG_TO_CLASS
from pop3d_jax.occ3d.grid import FREE, OCC3D_VOLUME, Occ3DFrame
from pop3d_jax.occ3d.majority import majority_labels
from pop3d_jax.occ3d.visibility import camera_mask, cell_indices, crossed_voxels
from pop3d_jax.voxels import Volume

# Sensors put returns a few centimetres outside of what they hit, and annotators draw tight, metres.
BOX_MARGIN = 0.1

_NOISE = LIDARSEG_CATEGORIES.index("noise")
_OWN_CAR = LIDARSEG_CATEGORIES.index("vehicle.ego")
# Raw labels of things that can move come before those of the ground and of what stands.
_FIRST_STANDING = LIDARSEG_CATEGORIES.index("flat.driveable_surface")
_NO_BOX = -1


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """What is kept of a key frame: `box` numbers the annotation of each point that moves, `_NO_BOX` where it has none.

    Points and the lidar's place are in the global frame, metres.
    """

    token: str
    global_to_ego: Float64[np.ndarray, "4 4"]
    lidar: Float64[np.ndarray, "3"]
    points: Float64[np.ndarray, "points 3"]
    classes: UInt8[np.ndarray, " points"]
    movable: Bool[np.ndarray, " points"]
    box: Int[np.ndarray, " points"]
    intrinsics: Float64[np.ndarray, "cameras 3 3"]
    ego_to_camera: Float64[np.ndarray, "cameras 4 4"]
    image_sizes: list[tuple[int, int]]


class AccumulatedGroundTruth:
    """Ground truth of the key frames of a split, made as they are asked for; one scene in memory at a time.

    `truth[token]` is the `Occ3DFrame` of a key frame; ask for key frames of a scene one after another.

    Attributes:
      description: what this ground truth is, for reports.
    """

    description = (
        "accumulated from the sweeps of the records (our own construction, not Occ3D's labels; "
        "not comparable with numbers on Occ3D)"
    )

    def __init__(self, source: RecordSource, boxes: Boxes, volume: Volume = OCC3D_VOLUME):
        """Takes records and their boxes.

        Args:
          source: records of nuScenes with point labels.
          boxes: of the same records.
          volume: the grid, in the ego frame.

        Raises:
          RecordError: records of another data set, or boxes of other records.
        """
        if source.dataset != "nuscenes":
            raise RecordError(f"accumulated ground truth is made of records of nuscenes, these are of {source.dataset}")
        if boxes.fingerprint != source.fingerprint:
            raise RecordError("the boxes belong to other records: write them with python -m data_prep.boxes")
        self._source, self._boxes, self._volume = source, boxes, volume
        self._numbers = {token: number for number, token in enumerate(source.sample_tokens)}
        self._scene_names: dict[int, str] = {}
        self._shard: int | None = None
        self._sweeps: list[_Sweep] = []
        self._rotations = np.array([quaternion_to_rotation(rotation) for rotation in boxes.rotation]).reshape(-1, 3, 3)

    @property
    def sample_tokens(self) -> list[str]:
        """Sample tokens in the order of the records."""
        return self._source.sample_tokens

    def scene_of(self, token: str) -> str:
        """Name of the scene of a key frame; raises KeyError for a token of no record."""
        shard = int(self._source.shard_numbers[self._numbers[token]])
        if shard not in self._scene_names:
            first = int(np.flatnonzero(self._source.shard_numbers == shard)[0])
            self._scene_names[shard] = self._source[first].scene_name
        return self._scene_names[shard]

    def __getitem__(self, token: str) -> Occ3DFrame:
        """Ground truth of a key frame.

        Raises:
          KeyError: a token of no record.
          RecordError: a damaged record, one without point labels, or shards that hold several scenes.
        """
        key_frame = self._key_frame(token)
        volume = self._volume
        placed = [(cell_indices(points, volume), classes) for points, classes in self.placed_points(token)]
        voxels, classes = (np.concatenate(part) for part in zip(*placed, strict=True))
        semantics = majority_labels(voxels, classes, volume)
        observed = semantics != FREE
        for sweep in self._sweeps:
            ends = apply_rigid(key_frame.global_to_ego, sweep.points)
            starts = np.broadcast_to(apply_rigid(key_frame.global_to_ego, sweep.lidar[None]), ends.shape)
            observed = observed | crossed_voxels(starts, ends, volume)
        seen = camera_mask(
            semantics != FREE, key_frame.intrinsics, key_frame.ego_to_camera, key_frame.image_sizes, volume
        )
        return Occ3DFrame(semantics, observed, seen & observed)

    def placed_points(
        self, token: str
    ) -> Iterator[tuple[Float64[np.ndarray, "points 3"], UInt8[np.ndarray, " points"]]]:
        """Points that a key frame's labels are made of, sweep by sweep, where they are at that key frame.

        Yields:
          Points in the key frame's ego frame, metres, and their classes, 0..16.

        Raises:
          as `__getitem__`.
        """
        key_frame = self._key_frame(token)
        here = self._boxes_at(self._numbers[token])
        of_instance = {int(self._boxes.instance[box]): box for box in here}
        for sweep in self._sweeps:
            points, present = self._moved(sweep, key_frame, of_instance)
            yield apply_rigid(key_frame.global_to_ego, points[present]), sweep.classes[present]

    def _key_frame(self, token: str) -> _Sweep:
        self._load(int(self._source.shard_numbers[self._numbers[token]]))
        return next(sweep for sweep in self._sweeps if sweep.token == token)

    def _load(self, shard: int) -> None:
        """Keeps the sweeps of a shard, which of nuScenes is a scene, instead of those of another."""
        if self._shard == shard:
            return
        self._shard, self._sweeps = None, []
        scenes = set()
        for number in np.flatnonzero(self._source.shard_numbers == shard):
            key_frame = self._source[int(number)]
            scenes.add(key_frame.scene_name)
            self._sweeps.append(self._sweep(int(number), key_frame))
        if len(scenes) > 1:
            raise RecordError(f"a shard holds the scenes {', '.join(sorted(scenes))}: build the records again")
        self._shard = shard

    def _sweep(self, number: int, key_frame: KeyFrame) -> _Sweep:
        if len(key_frame.lidarseg) != len(key_frame.points):
            raise RecordError(
                f"sample {key_frame.sample_token} has {len(key_frame.lidarseg)} point labels for "
                f"{len(key_frame.points)} points: accumulated ground truth needs nuScenes-lidarseg; add it to the "
                "data set and build the records into a new folder"
            )
        lidar_to_global = key_frame.ego_to_global @ key_frame.lidar_to_ego
        kept = (key_frame.lidarseg != _NOISE) & (key_frame.lidarseg != _OWN_CAR)
        raw = key_frame.lidarseg[kept]
        points = apply_rigid(lidar_to_global, key_frame.points[kept, :3])
        movable = raw < _FIRST_STANDING
        box = np.full(len(points), _NO_BOX)
        box[movable] = self._box_of(number, points[movable])
        return _Sweep(
            token=key_frame.sample_token,
            global_to_ego=invert_rigid(key_frame.ego_to_global),
            lidar=lidar_to_global[:3, 3],
            points=points,
            classes=LIDARSEG_TO_CLASS[raw],
            movable=movable,
            box=box,
            intrinsics=key_frame.intrinsics,
            ego_to_camera=key_frame.lidar_to_camera @ invert_rigid(key_frame.lidar_to_ego),
            image_sizes=image_sizes(key_frame),
        )

    def _boxes_at(self, number: int) -> range:
        return range(*np.searchsorted(self._boxes.sample, [number, number + 1]).tolist())

    def _box_of(self, number: int, points: Float64[np.ndarray, "points 3"]) -> Int[np.ndarray, " points"]:
        """The smallest box of a key frame around each point, the first of equal ones."""
        found = np.full(len(points), _NO_BOX)
        for box in sorted(self._boxes_at(number), key=lambda box: -self._boxes.size[box].prod()):
            local = (points - self._boxes.centre[box]) @ self._rotations[box]
            half = self._boxes.size[box][[1, 0, 2]] / 2 + BOX_MARGIN
            found[(np.abs(local) <= half).all(1)] = box
        return found

    def _moved(
        self, sweep: _Sweep, key_frame: _Sweep, of_instance: dict[int, int]
    ) -> tuple[Float64[np.ndarray, "points 3"], Bool[np.ndarray, " points"]]:
        """Global places of a sweep's points at the time of a key frame, and which of them are known."""
        if sweep is key_frame:
            return sweep.points, np.ones(len(sweep.points), bool)
        points, present = sweep.points.copy(), ~sweep.movable
        for box in np.unique(sweep.box[sweep.box != _NO_BOX]).tolist():
            target = of_instance.get(int(self._boxes.instance[box]))
            if target is None:
                continue
            carried = sweep.box == box
            local = (points[carried] - self._boxes.centre[box]) @ self._rotations[box]
            points[carried] = local @ self._rotations[target].T + self._boxes.centre[target]
            present |= carried
        return points, present
