"""How fast records are built and read, and how much memory the tables of full nuScenes take.

    python -m benchmarks.record_building [--source DIR --version V --split S] [--scale 0.1]

The key frames are those of --source where it is given. The tables are synthetic rows of nuScenes' shape: at scale 1
the 2,631,083 rows of sample_data and of ego_pose of v1.0-trainval.
"""

import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from data_prep.check_records import check_records
from data_prep.nuscenes_tables import read_tables
from data_prep.split_build import build_split
from data_prep.splits import scene_names
from pop3d_jax.data.records import RecordSource
from pop3d_jax.nuscenes import CAMERAS, LIDAR

_SOURCE = flags.DEFINE_string("source", None, "Data set to build records from; without it only tables are read.")
_VERSION = flags.DEFINE_string("version", "v1.0-trainval", "Of the source.")
_SPLIT = flags.DEFINE_string("split", "train", "Of the source.")
_SCALE = flags.DEFINE_float("scale", 0.1, "Size of the synthetic tables, 1 for all of v1.0-trainval.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Processes of the build.")

# Rows of a scene of v1.0-trainval: 850 scenes, 34,149 samples, 2,631,083 rows of sample_data, 12 sensors.
_SAMPLES_OF_SCENE = 40
_ROWS_OF_SAMPLE = 77
_CHANNELS = (LIDAR, *CAMERAS, *(f"RADAR_{number}" for number in range(5)))


def _write_tables(folder: Path, scale: float) -> int:
    """Tables with the row counts and row sizes of v1.0-trainval, times a scale; tells the rows of sample_data."""
    rng = np.random.default_rng(0)
    names = scene_names("train") + scene_names("val")
    scenes = names[:: max(1, round(1 / scale))]
    (folder / "v1.0-trainval").mkdir(parents=True)
    number = 0

    def token() -> str:
        nonlocal number
        number += 1
        return f"{number:032x}"

    def pose() -> dict[str, list[float]]:
        return {"rotation": rng.normal(size=4).tolist(), "translation": (1000 * rng.normal(size=3)).tolist()}

    tables = {name: [] for name in ("scene", "sample", "sensor", "calibrated_sensor")}
    tables["sensor"] = [{"token": token(), "channel": name, "modality": "camera"} for name in _CHANNELS]
    written = 0
    with (
        (folder / "v1.0-trainval" / "sample_data.json").open("w") as data_file,
        (folder / "v1.0-trainval" / "ego_pose.json").open("w") as pose_file,
    ):
        for scene in scenes:
            scene_token = token()
            tables["scene"].append({"token": scene_token, "name": scene, "nbr_samples": _SAMPLES_OF_SCENE})
            calibrated = [
                {
                    "token": token(),
                    "sensor_token": sensor["token"],
                    "camera_intrinsic": np.eye(3).tolist() if sensor["channel"] in CAMERAS else [],
                    **pose(),
                }
                for sensor in tables["sensor"]
            ]
            tables["calibrated_sensor"] += calibrated
            for _ in range(_SAMPLES_OF_SCENE):
                sample = token()
                tables["sample"].append(
                    {"token": sample, "timestamp": 1_532_402_927_647_951, "scene_token": scene_token}
                )
                for row in range(_ROWS_OF_SAMPLE):
                    data_token = token()
                    channel = _CHANNELS[row % len(_CHANNELS)]
                    start = "," if written else "["
                    data = {
                        "token": data_token,
                        "sample_token": sample,
                        "ego_pose_token": data_token,
                        "calibrated_sensor_token": calibrated[row % len(_CHANNELS)]["token"],
                        "timestamp": 1_532_402_927_647_951,
                        "fileformat": "jpg",
                        "is_key_frame": row < len(_CHANNELS),
                        "height": 900,
                        "width": 1600,
                        "filename": f"samples/{channel}/n015-2018-07-24-11-22-45+0800__{channel}__{data_token}.jpg",
                        "prev": data_token,
                        "next": data_token,
                    }
                    data_file.write(start + "\n" + json.dumps(data, indent=0))
                    row_pose = {"token": data_token, "timestamp": 1_532_402_927_647_951, **pose()}
                    pose_file.write(start + "\n" + json.dumps(row_pose, indent=0))
                    written += 1
        data_file.write("\n]")
        pose_file.write("\n]")
    for name, rows in tables.items():
        (folder / "v1.0-trainval" / f"{name}.json").write_text(json.dumps(rows))
    return written


def _read_measured(folder: Path, results: multiprocessing.Queue) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    tables = read_tables(folder, "v1.0-trainval", "train")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put((seconds, before / 1024, peak / 1024, sum(len(scene.key_frames) for scene in tables.scenes)))


def _measure_tables(scale: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _write_tables(folder, scale)
        size = sum(path.stat().st_size for path in folder.rglob("*.json"))
        # A process of its own: the peak of memory must be that of reading alone.
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=_read_measured, args=(folder, results))
        process.start()
        seconds, before, peak, key_frames = results.get()
        process.join()
    print(f"tables: {rows} rows of sample_data and ego_pose each, {size / 2**20:.0f} MiB of JSON")
    print(f"  read in {seconds:.1f} s to {key_frames} key frames ({seconds / rows * 1e6:.1f} us a row)")
    print(f"  peak memory {peak:.0f} MiB, of which {before:.0f} MiB is the program itself")


def _measure_records() -> None:
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        build_split(_SOURCE.value, _VERSION.value, _SPLIT.value, out, skip_errors=False, workers=_WORKERS.value)
        seconds = time.perf_counter() - start
        source = RecordSource(out, _SPLIT.value)
        count, size = len(source), sum(path.stat().st_size for path in Path(out).glob("*tfrecord*"))
        print(f"build: {count} key frames in {seconds:.2f} s with {_WORKERS.value} worker(s)")
        print(f"  {count / seconds:.1f} key frames/s, {size / count / 1e6:.3f} MB a key frame")
        order = np.random.default_rng(0).permutation(count)
        start = time.perf_counter()
        for position in order:
            _ = source[position]
        seconds = time.perf_counter() - start
        print(f"random access, JPEGs undecoded: {seconds / count * 1e3:.2f} ms a key frame (files in the cache)")
        start = time.perf_counter()
        check_records(out, None, _WORKERS.value)
        print(f"check: {count / (time.perf_counter() - start):.1f} key frames/s")


def main(_: list[str]) -> None:
    if _SOURCE.value:
        _measure_records()
    _measure_tables(_SCALE.value)


if __name__ == "__main__":
    app.run(main)
