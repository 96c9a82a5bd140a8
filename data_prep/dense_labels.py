"""The true dense labels of a synthetic world in nuScenes' layout, in Occ3D's own layout.

    python -m data_prep.dense_labels --world WORLD --split val --out WORLD/gts

Writes OUT/SCENE_NAME/SAMPLE_TOKEN/labels.npz for every key frame, with `semantics`, `mask_lidar` and `mask_camera`:
uint8 [200, 200, 16], the grid of `pop3d_jax.occ3d.grid` (ego frame at lidar time); OUT/ground_truth.json says that they
are not Occ3D's. The world is drawn again from world.json; where its tables or sweeps say something else than what is
drawn, nothing is written for the scene.

semantics     A voxel is occupied where the surface of the world runs through it: the boundary of the union of the
              ground and of all things, the recording car apart. Its label is the lidarseg class (0 others) with the
              most surface area in it. All else is 17, free, the insides of solids too: no sensor sees them, so no mask
              has them. The surface is sampled every `data_prep.world.truth.SPACING` metres: a voxel of which it cuts
              off less than that may be missed.
mask_lidar    Voxels that lidar rays of the scene's key frames cross, or hit: what was hit is carried along with its
              thing to where that is at this key frame. Returns of the recording car are left out.
mask_camera   Voxels that some camera of this key frame sees: free ones before the first occupied voxel of a line of
              sight, and that one itself (`pop3d_jax.occ3d.visibility.camera_mask`).
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from data_prep import parallel
from data_prep.key_frame_rows import KeyFrameRow
from data_prep.nuscenes_tables import read_tables
from data_prep.synthetic import GENERATOR_VERSION, WorldError, scene_tasks
from data_prep.table_rows import SourceError
from data_prep.world.recorded_scene import RecordedKeyFrame, RecordedScene, SceneTask
from data_prep.world.recording import VERSION
from data_prep.world.rig import LIDAR_SENSOR
from data_prep.world.truth import lidar_mask, true_semantics
from pop3d_jax import geometry
from pop3d_jax.commands import run
from pop3d_jax.nuscenes import CAMERAS
from pop3d_jax.occ3d.grid import FREE, OCC3D_VOLUME, Occ3DFrame
from pop3d_jax.occ3d.ground_truth import describe_labels
from pop3d_jax.occ3d.visibility import camera_mask

# Tables hold quaternions; what they and the drawn poses may differ by, metres and parts of one.
_POSE_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class _SceneWork:
    task: SceneTask
    rows: list[KeyFrameRow]
    out: Path


def read_world(world: Path) -> list[SceneTask]:
    """What makes each scene of a finished world.

    Raises:
      WorldError: no world, an unfinished one, one of another layout or of another generator.
    """
    path = world / "world.json"
    if not path.exists():
        raise WorldError(f"--world {world} holds no world.json: write a world with python -m data_prep.synthetic")
    try:
        content = json.loads(path.read_text())
        if content.get("layout", "nuscenes") != "nuscenes":
            raise WorldError(f"--world {world} has the layout {content['layout']}; dense labels are made for nuscenes")
        if content["generator_version"] != GENERATOR_VERSION:
            raise WorldError(
                f"--world {world} was written by generator {content['generator_version']}, this program has "
                f"{GENERATOR_VERSION}: write the world again with python -m data_prep.synthetic"
            )
        if not content["complete"]:
            raise WorldError(f"--world {world} is not finished: run its python -m data_prep.synthetic again")
        return scene_tasks(world, content)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise WorldError(f"{path} is damaged ({error!r}): write the world again") from error


def key_frames_as_recorded(recorded: RecordedScene, rows: list[KeyFrameRow]) -> list[RecordedKeyFrame]:
    """The key frames of a scene, drawn again.

    Args:
      recorded: the scene, drawn again.
      rows: what its tables say, in the order of time.

    Raises:
      WorldError: number, times, poses, cameras or sweeps are not those of the tables and files.
    """
    task = recorded.task
    if len(rows) != task.keyframes:
        raise WorldError(f"{task.root}: {task.name} has {len(rows)} key frames in its tables, {task.keyframes} drawn")
    return [_as_recorded(recorded, number, row) for number, row in enumerate(rows)]


def _as_recorded(recorded: RecordedScene, number: int, row: KeyFrameRow) -> RecordedKeyFrame:
    frame = recorded.key_frame(number)
    ego = recorded.scene.ego_to_world(frame.time)
    ego[:3, 3] += recorded.shift
    cameras = {camera.channel: camera for camera in recorded.cameras}
    fired = dict(zip(cameras, frame.camera_timestamps, strict=True))
    lidar_to_camera = []
    for channel in CAMERAS:
        camera_ego = recorded.scene.ego_to_world(recorded.seconds(fired[channel]))
        camera_ego[:3, 3] += recorded.shift
        camera = cameras[channel].to_ego()
        lidar_to_camera.append(geometry.lidar_to_camera(LIDAR_SENSOR.to_ego(), ego, camera, camera_ego))
    scale = recorded.task.image_scale
    drawn = {
        "timestamp": (frame.timestamp, row.timestamp),
        "camera_timestamps": ([fired[channel] for channel in CAMERAS], row.camera_timestamps),
        "lidar_to_ego": (LIDAR_SENSOR.to_ego(), row.lidar_to_ego),
        "ego_to_global": (ego, row.ego_to_global),
        "lidar_to_camera": (lidar_to_camera, row.lidar_to_camera),
        "intrinsics": ([cameras[channel].intrinsics(scale) for channel in CAMERAS], row.intrinsics),
    }
    wrong = [name for name, pair in drawn.items() if not np.allclose(*pair, rtol=0, atol=_POSE_ROUNDING)]
    sweep = recorded.task.root / row.lidar_file
    if not sweep.exists() or sweep.read_bytes() != frame.sweep.points.astype("<f4").tobytes():
        wrong.append(f"the sweep {row.lidar_file}")
    if wrong:
        raise WorldError(
            f"{recorded.task.root}: sample {row.sample_token} of {row.scene_name} was not recorded as world.json "
            f"draws it (differs: {', '.join(wrong)}): write the world again with python -m data_prep.synthetic"
        )
    return frame


def dense_frame(recorded: RecordedScene, frames: list[RecordedKeyFrame], number: int, row: KeyFrameRow) -> Occ3DFrame:
    """The true labels and masks of one key frame.

    Args:
      recorded: the scene.
      frames: all its key frames.
      number: of the one that is meant.
      row: its calibration, as in the tables.
    """
    semantics = true_semantics(recorded.scene, recorded.solids, frames[number].time)
    ego_to_camera = row.lidar_to_camera @ geometry.invert_rigid(row.lidar_to_ego)
    seen = camera_mask(semantics != FREE, row.intrinsics, ego_to_camera, row.image_sizes, OCC3D_VOLUME)
    return Occ3DFrame(semantics, lidar_mask(recorded, frames, number), seen)


def write_labels(folder: Path, frame: Occ3DFrame) -> None:
    """Writes FOLDER/labels.npz, which appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"labels.incomplete-{os.getpid()}.npz"
    masks = {name: getattr(frame, name).astype(np.uint8) for name in ("mask_lidar", "mask_camera")}
    np.savez_compressed(unfinished, semantics=frame.semantics, **masks)
    unfinished.replace(folder / "labels.npz")


def _label_scene(work: _SceneWork) -> int:
    recorded = RecordedScene(work.task)
    frames = key_frames_as_recorded(recorded, work.rows)
    # Before any labels: a half-finished folder says whose they are, too.
    work.out.mkdir(parents=True, exist_ok=True)
    describe_labels(work.out, f"true labels of a synthetic world, seed {work.task.seed}")
    for number, row in enumerate(work.rows):
        write_labels(work.out / row.scene_name / row.sample_token, dense_frame(recorded, frames, number, row))
    return len(work.rows)


def label_world(world: Path, split: str, out: Path, workers: int) -> int:
    """Writes the labels of a split; returns how many key frames it has.

    Raises:
      WorldError: as `read_world` and `key_frames_as_recorded`.
      SourceError: its tables are damaged.
    """
    tasks = {task.name: task for task in read_world(world)}
    tables = read_tables(world, VERSION, split)
    broken = [error for scene in tables.scenes for _, error in scene.broken]
    if broken:
        raise SourceError(broken[0])
    work = [_SceneWork(tasks[scene.scene_name], scene.key_frames, out) for scene in tables.scenes]
    return sum(parallel.run(_label_scene, work, workers, "labelling scenes"))


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    flags.DEFINE_string("world", None, "Folder of a synthetic world in nuScenes' layout.", required=True)
    flags.DEFINE_enum("split", "val", ["train", "val"], "Scenes to label.")
    flags.DEFINE_string("out", None, "Folder to write SCENE_NAME/SAMPLE_TOKEN/labels.npz to.", required=True)
    flags.DEFINE_integer("workers", os.cpu_count(), "Number of processes; each works on one scene.", lower_bound=1)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    values = flags.FLAGS
    try:
        count = label_world(Path(values.world), values.split, Path(values.out), values.workers)
    except (WorldError, SourceError, parallel.WorkerError, OSError) as error:
        logging.error("%s", error)
        return 1
    logging.info("%d key frames of %s are labelled in %s", count, values.split, values.out)
    return 0


if __name__ == "__main__":
    _define_flags()
    run(main)
