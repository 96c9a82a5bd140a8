"""Records one scene: files of all sensors, and its rows of nuScenes' tables."""

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from data_prep.world import retrieval, views
from data_prep.world.captions import scene_captions
from data_prep.world.lidar import HDL_32E, Lidar
from data_prep.world.recorded_scene import RecordedScene, SceneTask
from data_prep.world.render import sensor_pose, sun_map, take_picture
from data_prep.world.rig import LIDAR_SENSOR, Sensor, image_size
from data_prep.world.scene import Thing
from pop3d_jax.geometry import rotation_to_quaternion
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES

VERSION = "v1.0-trainval"
# Boxes further from the car than this are not annotated, metres.
_ANNOTATION_REACH = 80.0
_JPEG_QUALITY = 92

Row = dict[str, Any]


@dataclass
class SceneRows:
    """Rows of one scene for the tables, by table, and for the world's own files."""

    tables: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in SCENE_TABLES})
    captions: list[Row] = field(default_factory=list)
    views: list[Row] = field(default_factory=list)
    retrieval: list[str] = field(default_factory=list)


SCENE_TABLES = (
    "calibrated_sensor",
    "ego_pose",
    "instance",
    "lidarseg",
    "log",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
)


def token(*names: object) -> str:
    """A table token: 32 hexadecimal digits that depend on the names alone."""
    return hashlib.md5("/".join(map(str, names)).encode(), usedforsecurity=False).hexdigest()


def category_token(name: str) -> str:
    """Token of a lidarseg category."""
    return token("category", name)


def sensor_token(channel: str) -> str:
    """Token of a sensor."""
    return token("sensor", channel)


def attribute_token(name: str) -> str:
    """Token of an attribute."""
    return token("attribute", name)


class _Recorder:
    """One scene while it is being recorded."""

    def __init__(self, task: SceneTask, lidar: Lidar):
        self.task = task
        self.recorded = RecordedScene(task, lidar)
        self.scene, self.solids = self.recorded.scene, self.recorded.solids
        self.rows = SceneRows()
        self.log = f"world{task.seed}-{task.name}"

    def token(self, *names: object) -> str:
        return token(self.task.seed, self.task.name, *names)

    def instance_token(self, thing: Thing) -> str:
        return self.token("instance", thing.number) if thing.shape.boxed else ""

    def record(self) -> SceneRows:
        tables, task = self.rows.tables, self.task
        self.rows.captions = scene_captions(self.scene, task.name, self.instance_token)
        samples = [self.token("sample", k) for k in range(task.keyframes)]
        tables["log"].append(
            {
                "token": self.token("log"),
                "logfile": self.log,
                "vehicle": f"world{task.seed}",
                "date_captured": "2020-05-20",
                "location": "synthetic-world",
            }
        )
        tables["scene"].append(
            {
                "token": self.token("scene"),
                "log_token": self.token("log"),
                "nbr_samples": task.keyframes,
                "first_sample_token": samples[0],
                "last_sample_token": samples[-1],
                "name": task.name,
                "description": f"Synthetic world, {self.scene.weather.name}, {len(self.scene.ground.roads)} roads",
            }
        )
        for sensor in (LIDAR_SENSOR, *self.recorded.cameras):
            is_camera = sensor.focal is not None
            tables["calibrated_sensor"].append(
                {
                    "token": self.token("calibrated_sensor", sensor.channel),
                    "sensor_token": sensor_token(sensor.channel),
                    "translation": list(sensor.translation),
                    "rotation": sensor.quaternion().tolist(),
                    "camera_intrinsic": sensor.intrinsics(task.image_scale).tolist() if is_camera else [],
                }
            )
        for k, sample in enumerate(samples):
            self._keyframe(k, sample, samples)
        self._link_annotations()
        return self.rows

    def _keyframe(self, k: int, sample: str, samples: list[str]) -> None:
        task = self.task
        frame = self.recorded.key_frame(k)
        timestamp, time, lidar_to_world, sweep = frame.timestamp, frame.time, frame.lidar_to_world, frame.sweep
        last = task.keyframes - 1
        self.rows.tables["sample"].append(
            {
                "token": sample,
                "timestamp": timestamp,
                "prev": samples[k - 1] if k > 0 else "",
                "next": samples[k + 1] if k < last else "",
                "scene_token": self.token("scene"),
            }
        )
        lidar_row = self._sample_data(k, sample, LIDAR_SENSOR, timestamp, "pcd.bin", (0, 0))
        self._write(lidar_row["filename"], sweep.points.astype("<f4").tobytes())
        labels = f"lidarseg/{VERSION}/{lidar_row['token']}_lidarseg.bin"
        self._write(labels, sweep.lidarseg.tobytes())
        self.rows.tables["lidarseg"].append(
            {"token": lidar_row["token"], "sample_data_token": lidar_row["token"], "filename": labels}
        )
        self._annotate(k, sample, time, sweep.points[:, :3] @ lidar_to_world[:3, :3].T + lidar_to_world[:3, 3])

        shadows = sun_map(self.scene, self.solids, time)
        for sensor, fired in zip(self.recorded.cameras, frame.camera_timestamps, strict=True):
            self._photograph(k, sample, sensor, fired, shadows)

        if k > 0 and task.split == "train":
            return  # retrieval is judged on held-out scenes; of the others one key frame each is plenty
        for phrase, matches in retrieval.phrases(self.rows.captions, sweep.number).items():
            name = f"annotations/{sample}__{phrase.replace(' ', '_')}__retrieval.npy"
            retrieval.write_matches(task.root / "retrieval" / name, matches)
            self.rows.retrieval.append(f"{sample};{task.split};{name};{lidar_row['filename']};{phrase}")

    def _photograph(self, k: int, sample: str, sensor: Sensor, timestamp: int, shadows) -> None:
        shape = image_size(self.task.image_scale)
        time = self.recorded.seconds(timestamp)
        picture = take_picture(
            self.scene,
            self.solids,
            shadows,
            time,
            sensor_pose(self.scene, time, sensor.to_ego()),
            sensor.intrinsics(self.task.image_scale),
            shape,
        )
        row = self._sample_data(k, sample, sensor, timestamp, "jpg", shape)
        path = self.task.root / row["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.image).save(path, quality=_JPEG_QUALITY)
        views.write_maps(self.task.root, sensor.channel, path.stem, picture)
        self.rows.views.append(
            {
                "sample_token": sample,
                "scene_name": self.task.name,
                "camera": sensor.channel,
                "filename": row["filename"],
                "objects": views.visible_objects(picture, self.rows.captions),
            }
        )

    def _sample_data(
        self, k: int, sample: str, sensor: Sensor, timestamp: int, suffix: str, shape: tuple[int, int]
    ) -> Row:
        tokens = [self.token("sample_data", j, sensor.channel) for j in (k - 1, k, k + 1)]
        pose = self.scene.ego_to_world(self.recorded.seconds(timestamp))
        self.rows.tables["ego_pose"].append(
            {
                "token": tokens[1],
                "timestamp": timestamp,
                "rotation": rotation_to_quaternion(pose[:3, :3]).tolist(),
                "translation": (pose[:3, 3] + self.recorded.shift).tolist(),
            }
        )
        row = {
            "token": tokens[1],
            "sample_token": sample,
            "ego_pose_token": tokens[1],
            "calibrated_sensor_token": self.token("calibrated_sensor", sensor.channel),
            "timestamp": timestamp,
            "fileformat": "pcd" if suffix == "pcd.bin" else suffix,
            "is_key_frame": True,
            "height": shape[0],
            "width": shape[1],
            "filename": f"samples/{sensor.channel}/{self.log}__{sensor.channel}__{timestamp}.{suffix}",
            "prev": tokens[0] if k > 0 else "",
            "next": tokens[2] if k < self.task.keyframes - 1 else "",
        }
        self.rows.tables["sample_data"].append(row)
        return row

    def _annotate(self, k: int, sample: str, time: float, points: Float[np.ndarray, "points 3"]) -> None:
        """Boxes of the movable things near the car that hold at least one point, as in nuScenes."""
        poses = self.solids.poses(time)
        for thing, (x, y, z, yaw) in zip(self.scene.things, poses[:-1], strict=True):
            if not thing.shape.boxed or np.hypot(x - poses[-1, 0], y - poses[-1, 1]) > _ANNOTATION_REACH:
                continue
            width, length, height = thing.shape.size
            near = points[np.hypot(points[:, 0] - x, points[:, 1] - y) < np.hypot(width, length)] - (x, y, z)
            along = np.abs(np.cos(yaw) * near[:, 0] + np.sin(yaw) * near[:, 1])
            across = np.abs(np.cos(yaw) * near[:, 1] - np.sin(yaw) * near[:, 0])
            inside = (along <= length / 2) & (across <= width / 2) & (near[:, 2] >= 0) & (near[:, 2] <= height)
            if not inside.any():
                continue
            instance = self.instance_token(thing)
            self.rows.tables["sample_annotation"].append(
                {
                    "token": self.token("sample_annotation", k, thing.number),
                    "sample_token": sample,
                    "instance_token": instance,
                    "visibility_token": "",
                    "attribute_tokens": _attributes(thing),
                    "translation": (np.array([x, y, z + height / 2]) + self.recorded.shift).tolist(),
                    "size": [width, length, height],
                    "rotation": [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))],
                    "prev": "",
                    "next": "",
                    "num_lidar_pts": int(inside.sum()),
                    "num_radar_pts": 0,
                }
            )

    def _link_annotations(self) -> None:
        """Sets prev and next of the annotations of each instance, and writes the instances."""
        by_instance: dict[str, list[Row]] = {}
        for row in self.rows.tables["sample_annotation"]:
            by_instance.setdefault(row["instance_token"], []).append(row)
        for thing in self.scene.things:
            rows = by_instance.get(self.instance_token(thing), [])
            if not rows:
                continue
            for earlier, later in itertools.pairwise(rows):
                earlier["next"], later["prev"] = later["token"], earlier["token"]
            self.rows.tables["instance"].append(
                {
                    "token": rows[0]["instance_token"],
                    "category_token": category_token(LIDARSEG_CATEGORIES[thing.shape.lidarseg_index]),
                    "nbr_annotations": len(rows),
                    "first_annotation_token": rows[0]["token"],
                    "last_annotation_token": rows[-1]["token"],
                }
            )

    def _write(self, name: str, content: bytes) -> None:
        path = self.task.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _attributes(thing: Thing) -> list[str]:
    if thing.shape.noun in ("barrier", "traffic cone"):
        return []
    moving = thing.motion.speed > 0
    if thing.shape.noun == "pedestrian":
        return [attribute_token("pedestrian.moving" if moving else "pedestrian.standing")]
    return [attribute_token("vehicle.moving" if moving else "vehicle.parked")]


def record_scene(task: SceneTask, lidar: Lidar = HDL_32E) -> SceneRows:
    """Writes a scene's files under the task's root and returns its rows; depends on nothing but task and lidar."""
    return _Recorder(task, lidar).record()
