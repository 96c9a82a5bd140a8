"""How fast records are built and read, and how much memory the tables of full nuScenes take.

    python -m benchmarks.record_building [--source DIR --version V --split S --repeat N] [--scale 0.1]

The key frames are those of --source where it is given; a few real ones repeated give real sizes and times. The tables
are synthetic rows of nuScenes' shape: at scale 1 the 2,631,083 rows of sample_data and of ego_pose of v1.0-trainval.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.measure import peak_mebibytes
from benchmarks.report import Table
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
_REPEAT = flags.DEFINE_integer("repeat", 1, "Take every key frame so many times, under new tokens.")
_RUNS = flags.DEFINE_integer("runs", 5, "Timed runs of each; medians are told.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Folder of record_building.json.")

# Rows of a scene of v1.0-trainval: 850 scenes, 34,149 samples, 2,631,083 rows of sample_data, 12 sensors.
_SAMPLES_OF_SCENE = 40
_KEY_FRAMES = 34_149
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
    before = peak_mebibytes()
    start = time.perf_counter()
    tables = read_tables(folder, "v1.0-trainval", "train")
    seconds = time.perf_counter() - start
    results.put((seconds, before, peak_mebibytes(), sum(len(scene.key_frames) for scene in tables.scenes)))


def _measure_tables(scale: float, table: Table) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _write_tables(folder, scale)
        size = sum(path.stat().st_size for path in folder.rglob("*.json"))
        # A process of its own: the peak of memory must be that of reading alone.
        context = multiprocessing.get_context("spawn")
        runs = []
        for _ in range(_RUNS.value):
            results = context.Queue()
            process = context.Process(target=_read_measured, args=(folder, results))
            process.start()
            runs.append(results.get())
            process.join()
    seconds, before, peak, key_frames = map(statistics.median, zip(*runs, strict=True))
    table.add(
        f"reading {size / 2**20:.0f} MiB of tables, {rows:,} rows of sample_data, to {key_frames:,} key frames",
        f"{seconds:.1f} s, peak {peak:.0f} MiB, of which {before:.0f} MiB are the program",
    )


def _repeated(source: Path, version: str, times: int, folder: Path) -> Path:
    """The data set with every key frame several times under new tokens; files are links to the source's."""
    for entry in source.iterdir():
        if entry.name != version:
            (folder / entry.name).symlink_to(entry.resolve())
    (folder / version).mkdir(parents=True)
    renamed = {"sample": ("token",), "sample_data": ("token", "sample_token"), "lidarseg": ("sample_data_token",)}
    for path in (source / version).glob("*.json"):
        rows = json.loads(path.read_text())
        if path.stem == "scene":
            rows = [row | {"nbr_samples": row["nbr_samples"] * times} for row in rows]
        if path.stem in renamed:
            names = renamed[path.stem]
            rows = [row | {name: f"{row[name]}-{number}" for name in names} for number in range(times) for row in rows]
        (folder / version / path.name).write_text(json.dumps(rows))
    return folder


def _measure_records(table: Table) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "root"
        root.mkdir()
        source = _repeated(Path(_SOURCE.value), _VERSION.value, _REPEAT.value, root)
        runs = []
        for number in range(_RUNS.value):
            out = Path(name) / f"records{number}"
            start, cpu = time.perf_counter(), time.process_time()
            build_split(str(source), _VERSION.value, _SPLIT.value, str(out), skip_errors=False, workers=1)
            runs.append((time.perf_counter() - start, time.process_time() - cpu))
        seconds, cpu = map(statistics.median, zip(*runs, strict=True))
        records = RecordSource(str(out), _SPLIT.value)
        count, size = len(records), sum(path.stat().st_size for path in out.glob("*tfrecord*"))
        table.add(f"building {count} key frames, one worker", f"{seconds:.2f} s, {cpu:.2f} s of processor time")
        table.add("key frames a second and core", f"{count / seconds:.1f}")
        table.add(
            f"nuScenes trainval ({_KEY_FRAMES:,} key frames) on 32 cores, if the disk keeps up",
            f"{_KEY_FRAMES * seconds / count / 32 / 60:.1f} min",
        )
        table.add("bytes a key frame", f"{size / count / 1e6:.3f} MB")
        table.add("all of them", f"{_KEY_FRAMES * size / count / 1e9:.1f} GB")
        order = np.random.default_rng(0).permutation(count)

        def read_all() -> None:
            for position in order:
                _ = records[position]

        seconds = _median_seconds(read_all)
        table.add("random access, JPEGs undecoded, files in the cache", f"{seconds / count * 1e3:.2f} ms a key frame")
        seconds = _median_seconds(lambda: check_records(str(out), None, 1))
        table.add("checking the build", f"{count / seconds:.1f} key frames a second")


def _median_seconds(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_RUNS.value):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(_: list[str]) -> None:
    table = Table("record_building", ["records from nuScenes' files", "measured"])
    if _SOURCE.value:
        _measure_records(table)
    _measure_tables(_SCALE.value, table)
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)
