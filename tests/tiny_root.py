"""A data set of a few key frames in nuScenes' layout, of noise: enough for the tables and the builder."""

import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pop3d_jax.nuscenes import CAMERAS, LIDAR, LIDARSEG_CATEGORIES

IMAGE_HW = (36, 64)
_RADAR = "RADAR_FRONT"


@dataclasses.dataclass
class TinyRoot:
    """A written root, with what the tests need to know or to break."""

    folder: Path
    version: str
    scenes: list[str]
    samples: list[str]

    def table(self, name: str) -> Path:
        return self.folder / self.version / f"{name}.json"

    def rows(self, table: str) -> list[dict[str, Any]]:
        return json.loads(self.table(table).read_text())

    def write(self, table: str, rows: list[dict[str, Any]]) -> None:
        self.table(table).parent.mkdir(parents=True, exist_ok=True)
        self.table(table).write_text(json.dumps(rows, indent=0))

    def row(self, table: str, **fields: Any) -> dict[str, Any]:
        """The first row with these values."""
        return next(row for row in self.rows(table) if all(row[name] == value for name, value in fields.items()))

    def change(self, table: str, token: str, **fields: Any) -> None:
        """Changes fields of one row."""
        rows = self.rows(table)
        next(row for row in rows if row["token"] == token).update(fields)
        self.write(table, rows)

    def key_frame_row(self, channel: str, sample: int = 0) -> dict[str, Any]:
        """The key-frame row of sample_data of a channel."""
        return self.row(
            "sample_data", sample_token=self.samples[sample], calibrated_sensor_token=f"calibrated {channel}",
            is_key_frame=True,
        )  # fmt: skip

    def file(self, channel: str, sample: int = 0) -> Path:
        """The sensor file of a key frame."""
        return self.folder / self.key_frame_row(channel, sample)["filename"]

    def label_file(self, sample: int = 0) -> Path:
        """The label file of a key frame."""
        token = self.key_frame_row(LIDAR, sample)["token"]
        return self.folder / self.row("lidarseg", sample_data_token=token)["filename"]


def _token(*parts: object) -> str:
    return hashlib.md5(" ".join(map(str, parts)).encode()).hexdigest()


def _pose(rng: np.random.Generator) -> dict[str, list[float]]:
    rotation = rng.normal(size=4)
    return {"rotation": list(rotation / np.linalg.norm(rotation)), "translation": list(rng.normal(size=3))}


def _jpeg(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*IMAGE_HW, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_tiny_root(
    folder: Path, *, scenes: tuple[str, ...], key_frames: int = 2, version: str = "v1.0-mini", labelled: bool = True
) -> TinyRoot:
    """Writes a root: `key_frames` per scene, between them rows that are no key frames, and a radar.

    Tokens of ego poses differ from those of the data; rows are not in the order of time.
    """
    rng = np.random.default_rng(0)
    root = TinyRoot(folder, version, list(scenes), [])
    channels = (LIDAR, *CAMERAS, _RADAR)
    sensors = [{"token": f"sensor {channel}", "channel": channel, "modality": ""} for channel in channels]
    calibrated = [
        {
            "token": f"calibrated {channel}",
            "sensor_token": f"sensor {channel}",
            "camera_intrinsic": [[50.0, 0, 32], [0, 50.0, 18], [0, 0, 1]] if channel in CAMERAS else [],
            **_pose(rng),
        }
        for channel in channels
    ]
    scene_rows, samples, data, poses, lidarseg = [], [], [], [], []
    for scene_number, scene in enumerate(scenes):
        scene_token = _token(scene)
        scene_rows.append({"token": scene_token, "name": scene, "nbr_samples": key_frames})
        for number in range(key_frames):
            sample = _token(scene, number)
            time = 1_500_000_000_000_000 + scene_number * 20_000_000 + number * 500_000
            root.samples.append(sample)
            samples.append({"token": sample, "scene_token": scene_token, "timestamp": time})
            for delay, channel in enumerate(channels):
                for key in (True, False):
                    token, pose = _token(sample, channel, key), _token("pose", sample, channel, key)
                    folder_name = "samples" if key else "sweeps"
                    name = f"{folder_name}/{channel}/{token}.{'jpg' if channel in CAMERAS else 'pcd.bin'}"
                    shift = delay * 5_000 + (0 if key else 50_000)
                    poses.append({"token": pose, "timestamp": time + shift, **_pose(rng)})
                    data.append(
                        {
                            "token": token,
                            "sample_token": sample,
                            "ego_pose_token": pose,
                            "calibrated_sensor_token": f"calibrated {channel}",
                            "timestamp": time + shift,
                            "is_key_frame": key,
                            "height": IMAGE_HW[0] if channel in CAMERAS else 0,
                            "width": IMAGE_HW[1] if channel in CAMERAS else 0,
                            "filename": name,
                        }
                    )
                    if not key or channel == _RADAR:
                        continue
                    path = folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if channel in CAMERAS:
                        path.write_bytes(_jpeg(rng))
                        continue
                    points = rng.normal(size=(rng.integers(20, 40), 5)).astype(np.float32)
                    path.write_bytes(points.tobytes())
                    label_name = f"lidarseg/{version}/{token}_lidarseg.bin"
                    lidarseg.append({"token": token, "sample_data_token": token, "filename": label_name})
                    if labelled:
                        (folder / label_name).parent.mkdir(parents=True, exist_ok=True)
                        labels = rng.integers(0, len(LIDARSEG_CATEGORIES), len(points), np.uint8)
                        (folder / label_name).write_bytes(labels.tobytes())
    categories = [
        {"token": f"category {index}", "name": name, "index": index} for index, name in enumerate(LIDARSEG_CATEGORIES)
    ]
    tables = {
        "scene": scene_rows,
        "sample": samples[::-1],
        "sample_data": data[::-1],
        "ego_pose": poses,
        "calibrated_sensor": calibrated,
        "sensor": sensors,
        "category": categories,
        "lidarseg": lidarseg if labelled else [],
    }
    for name, rows in tables.items():
        root.write(name, rows)
    return root
