"""Tables that are the same for every scene, and the writing of all tables and of the world's own files."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.world.recording import (
    SCENE_TABLES,
    VERSION,
    SceneRows,
    attribute_token,
    category_token,
    sensor_token,
    token,
)
from data_prep.world.rig import CAMERA_SENSORS, LIDAR_SENSOR
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES

_ATTRIBUTES = {
    "vehicle.moving": "the vehicle moves",
    "vehicle.stopped": "the vehicle stands in traffic",
    "vehicle.parked": "the vehicle is parked",
    "cycle.with_rider": "the cycle has a rider",
    "cycle.without_rider": "the cycle has no rider",
    "pedestrian.sitting_lying_down": "the pedestrian sits or lies",
    "pedestrian.standing": "the pedestrian stands",
    "pedestrian.moving": "the pedestrian walks",
}
_VISIBILITY = {"1": "v0-40", "2": "v40-60", "3": "v60-80", "4": "v80-100"}


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=0) + "\n")


def write_tables(root: Path, scenes: list[SceneRows]) -> None:
    """Writes v1.0-trainval/*.json, captions.json, annotations_2d.json and the retrieval lists from all scenes' rows."""
    tables = {name: [row for scene in scenes for row in scene.tables[name]] for name in SCENE_TABLES}
    tables["category"] = [
        {"token": category_token(name), "name": name, "description": name.rsplit(".", 1)[-1], "index": index}
        for index, name in enumerate(LIDARSEG_CATEGORIES)
    ]
    tables["attribute"] = [
        {"token": attribute_token(name), "name": name, "description": text} for name, text in _ATTRIBUTES.items()
    ]
    tables["visibility"] = [
        {"token": key, "level": level, "description": f"visible share {level[1:]} percent"}
        for key, level in _VISIBILITY.items()
    ]
    tables["sensor"] = [
        {
            "token": sensor_token(sensor.channel),
            "channel": sensor.channel,
            "modality": "lidar" if sensor is LIDAR_SENSOR else "camera",
        }
        for sensor in (LIDAR_SENSOR, *CAMERA_SENSORS)
    ]
    # Loaders want a map file; the world has none, so it is a black square.
    map_token = token("map")
    filename = f"maps/{map_token}.png"
    picture = io.BytesIO()
    Image.new("L", (64, 64)).save(picture, "png")
    (root / "maps").mkdir(exist_ok=True)
    (root / filename).write_bytes(picture.getvalue())
    tables["map"] = [
        {
            "token": map_token,
            "category": "semantic_prior",
            "filename": filename,
            "log_tokens": [row["token"] for row in tables["log"]],
        }
    ]
    for name, rows in tables.items():
        _write_json(root / VERSION / f"{name}.json", rows)
    _write_json(root / "captions.json", [row for scene in scenes for row in scene.captions])
    _write_json(root / "annotations_2d.json", [row for scene in scenes for row in scene.views])
    lines = [line for scene in scenes for line in scene.retrieval]
    (root / "retrieval").mkdir(exist_ok=True)
    for split in ("train", "val"):
        chosen = [line for line in lines if line.split(";")[1] == split]
        (root / "retrieval" / f"retrieval_anns_{split}.csv").write_text("".join(f"{line}\n" for line in chosen))
