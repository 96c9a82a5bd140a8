"""PandaSet's folder: splits, frames, the two lidars, and bad input."""

import gzip
import io
import json
import pickle
import re
import shutil
import sys

import numpy as np
import pandas
import pytest
from PIL import Image

from data_prep import pandaset_builder
from data_prep.pandaset_builder import read_split
from data_prep.split_build import build_split
from data_prep.table_rows import SourceError
from pop3d_jax.data.records import RecordSource
from pop3d_jax.geometry import lidar_to_image, project, rigid_transform
from pop3d_jax.lidar_datasets import PANDAR64

_COUNT = 43


def _pose(rng):
    heading = rng.normal(size=4)
    heading /= np.linalg.norm(heading)
    return {
        "position": dict(zip("xyz", rng.uniform(-50, 50, 3).tolist(), strict=True)),
        "heading": dict(zip("wxyz", heading.tolist(), strict=True)),
    }


def _matrix(pose):
    return rigid_transform(
        np.array([pose["heading"][axis] for axis in "wxyz"]), np.array([pose["position"][axis] for axis in "xyz"])
    )


def _table(columns):
    table = pandas.DataFrame(columns)
    table.columns = pandas.Index(list(columns), dtype=object)
    return gzip.compress(pickle.dumps(table, protocol=4))


def _write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_scene(root, name, latitude=37.7, frames=2):
    """Two lidars mixed point by point; the labels of the frames go through all ids."""
    rng = np.random.default_rng(int(name))
    scene = root / name
    _write_json(scene / "meta" / "gps.json", [{"lat": latitude, "long": -122.0}] * frames)
    for place in ("lidar", *(f"camera/{camera}" for camera in PANDAR64.cameras)):
        _write_json(scene / place / "poses.json", [_pose(rng) for _ in range(frames)])
        _write_json(scene / place / "timestamps.json", [1557539924.5 + 0.1 * number for number in range(frames)])
        if place != "lidar":
            lens = {"fx": 60.0, "fy": 55.0, "cx": 32.0, "cy": 18.0}
            _write_json(scene / place / "intrinsics.json", lens)
    (scene / "annotations" / "semseg").mkdir(parents=True)
    for number in range(frames):
        points = {axis: rng.uniform(-30, 30, _COUNT) for axis in "xyz"}
        points |= {"i": rng.integers(0, 256, _COUNT).astype(float), "t": np.full(_COUNT, 1557539924.5)}
        points["d"] = np.arange(_COUNT) % 3 // 2
        (scene / "lidar" / f"{number:02d}.pkl.gz").write_bytes(_table(points))
        labels = _table({"class": np.arange(_COUNT)})
        (scene / "annotations" / "semseg" / f"{number:02d}.pkl.gz").write_bytes(labels)
        for camera in PANDAR64.cameras:
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (36, 64, 3), np.uint8)).save(file, "JPEG")
            (scene / "camera" / camera / f"{number:02d}.jpg").write_bytes(file.getvalue())
    return scene


@pytest.fixture
def root(tmp_path):
    _write_scene(tmp_path / "source", "002")
    _write_scene(tmp_path / "source", "001")
    _write_scene(tmp_path / "source", "057", 37.4)
    # Not labelled, so not used.
    shutil.copytree(tmp_path / "source" / "001", tmp_path / "source" / "003")
    shutil.rmtree(tmp_path / "source" / "003" / "annotations")
    return tmp_path / "source"


def _build(root, out, split="train", dataset="pandar64", *, skip_errors=False):
    return build_split(root, None, split, out, dataset=dataset, skip_errors=skip_errors, workers=1)


@pytest.mark.parametrize(("dataset", "sensor"), [("pandar64", 0), ("pandar_gt", 1)])
def test_a_record_holds_one_lidar_in_the_ego_frame(root, tmp_path, dataset, sensor):
    _build(root, tmp_path / "records", dataset=dataset)
    source = RecordSource(tmp_path / "records", "train")
    assert source.sample_tokens == ["001_00", "001_01", "002_00", "002_01"]
    frame = source[1]
    scene = root / "001"
    table = pandas.read_pickle(scene / "lidar" / "01.pkl.gz")
    rows = np.flatnonzero(table["d"] == sensor)
    assert 0 < len(rows) < _COUNT
    np.testing.assert_array_equal(frame.lidarseg, rows)  # the label of row n is n
    np.testing.assert_array_equal(frame.points[:, 3], table["i"].to_numpy()[rows])
    np.testing.assert_array_equal(frame.points[:, 4], -1)
    world = table[["x", "y", "z"]].to_numpy()[rows]
    back = frame.points[:, :3].astype(np.float64) @ frame.ego_to_global[:3, :3].T + frame.ego_to_global[:3, 3]
    np.testing.assert_allclose(back, world, atol=1e-4)
    np.testing.assert_array_equal(frame.lidar_to_ego, np.eye(4))
    pose = json.loads((scene / "lidar" / "poses.json").read_text())[1]
    np.testing.assert_allclose(frame.ego_to_global, _matrix(pose), atol=1e-12)
    assert frame.timestamp == 1557539924_600_000
    cameras = PANDAR64.cameras if dataset == "pandar64" else ("front_camera",)
    assert frame.images == [(scene / "camera" / camera / "01.jpg").read_bytes() for camera in cameras]


def test_points_project_as_from_the_world(root, tmp_path):
    """By the devkit's way: world to camera by the inverse of the camera's pose, then the pinhole."""
    _build(root, tmp_path / "records")
    frame = RecordSource(tmp_path / "records", "train")[0]
    table = pandas.read_pickle(root / "001" / "lidar" / "00.pkl.gz")
    world = table.loc[table["d"] == 0, ["x", "y", "z"]].to_numpy()
    matrices = lidar_to_image(frame.intrinsics, frame.lidar_to_camera)
    for camera, matrix in zip(PANDAR64.cameras, matrices, strict=True):
        pose = json.loads((root / "001" / "camera" / camera / "poses.json").read_text())[0]
        seen = np.linalg.solve(_matrix(pose), np.column_stack([world, np.ones(len(world))]).T)[:3]
        uv, depth = project(frame.points[:, :3], matrix)
        np.testing.assert_allclose(depth, seen[2], atol=1e-4)
        far = np.abs(seen[2]) > 1
        np.testing.assert_allclose(uv[far, 0], (60.0 * seen[0] / seen[2] + 32.0)[far], atol=0.1, rtol=1e-4)
        np.testing.assert_allclose(uv[far, 1], (55.0 * seen[1] / seen[2] + 18.0)[far], atol=0.1, rtol=1e-4)


def test_the_first_latitude_decides_the_split(root):
    def names(split):
        return [scene.scene_name for scene in read_split(root, split, dataset="pandar64").scenes]

    assert names("train") == ["001", "002"]
    assert names("val") == ["057"]
    gps = root / "002" / "meta" / "gps.json"
    gps.write_text(json.dumps([{"lat": 37.6}, {"lat": 37.8}]))
    assert names("train") == ["001"]
    assert names("val") == ["002", "057"]


def test_long_scenes_become_several_shards(root, tmp_path, monkeypatch):
    monkeypatch.setattr(pandaset_builder, "_SHARD_KEY_FRAMES", 1)
    index = _build(root, tmp_path / "records", "val")
    assert [shard.sample_tokens for shard in index.shards] == [["057_00"], ["057_01"]]


def _labels(path, values):
    path.write_bytes(_table({"class": values}))


class _Stranger:
    def __reduce__(self):
        return sys.exit, (7,)


_SWEEP, _SEMSEG = "lidar/01.pkl.gz", "annotations/semseg/01.pkl.gz"
_IN_A_FRAME = {
    "no labels": (lambda s: (s / _SEMSEG).unlink(), r"semseg/01\.pkl\.gz does not exist: copy it again from PandaSet"),
    "too few labels": (
        lambda s: _labels(s / _SEMSEG, np.arange(7)),
        r"semseg/01\.pkl\.gz has 7 labels for 43 points",
    ),
    "an unknown label": (
        lambda s: _labels(s / _SEMSEG, np.arange(1, 44)),
        r"semseg/01\.pkl\.gz has label 43; PandaSet's go from 0 to 42",
    ),
    "half a label": (lambda s: _labels(s / _SEMSEG, np.arange(43) / 2), r"semseg/01\.pkl\.gz has label 0\.5, 1\.5"),
    "labels of another name": (
        lambda s: (s / _SEMSEG).write_bytes(_table({"label": np.arange(43)})),
        r"semseg/01\.pkl\.gz has no column class but label",
    ),
    "words for labels": (
        lambda s: _labels(s / _SEMSEG, pandas.Series(["car"] * 43, dtype=object)),
        r"semseg/01\.pkl\.gz holds something that is no number",
    ),
    "no sweep of this lidar": (
        lambda s: (s / _SWEEP).write_bytes(_table({name: np.ones(43) for name in "xyzitd"})),
        r"lidar/01\.pkl\.gz has no point of lidar d = 0",
    ),
    "a point that is none": (
        lambda s: (s / _SWEEP).write_bytes(_table({name: np.full(43, np.nan) for name in "xyzitd"})),
        r"lidar/01\.pkl\.gz has 43 points that are NaN",
    ),
    "cut sweep": (
        lambda s: (s / _SWEEP).write_bytes((s / _SWEEP).read_bytes()[:-30]),
        r"lidar/01\.pkl\.gz is no whole gzip file .*: copy it again",
    ),
    "a sweep that runs": (
        lambda s: (s / _SWEEP).write_bytes(gzip.compress(pickle.dumps(_Stranger()))),
        r"lidar/01\.pkl\.gz names sys\.exit, which no table of numbers needs",
    ),
    "no image": (lambda s: (s / "camera/left_camera/01.jpg").unlink(), r"left_camera/01\.jpg does not exist"),
    "cut image": (
        lambda s: (s / "camera/left_camera/01.jpg").write_bytes((s / "camera/left_camera/01.jpg").read_bytes()[:400]),
        r"left_camera/01\.jpg is cut off or damaged",
    ),
    "too few poses": (
        lambda s: _write_json(s / "camera/left_camera/poses.json", [_pose(np.random.default_rng(0))]),
        r"left_camera has no pose or time of frame 01",
    ),
}


@pytest.mark.parametrize("damage", _IN_A_FRAME)
def test_damage_of_a_key_frame_is_named_and_can_be_skipped(root, tmp_path, damage):
    spoil, message = _IN_A_FRAME[damage]
    spoil(root / "057")
    with pytest.raises(SourceError, match=message):
        _build(root, tmp_path / "records", "val")
    index = _build(root, tmp_path / "records", "val", skip_errors=True)
    assert RecordSource(tmp_path / "records", "val").sample_tokens == ["057_00"]
    (skipped,) = [entry for shard in index.shards for entry in shard.skipped]
    assert skipped["sample_token"] == "057_01"
    assert re.search(message, skipped["error"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("meta/gps.json", None, r"gps\.json does not exist"),
        ("meta/gps.json", [], r"gps\.json gives no latitude .* decides the split"),
        ("lidar/poses.json", None, r"lidar/poses\.json does not exist"),
        ("lidar/poses.json", [{"heading": {}}], r"lidar/poses\.json has an entry that is no pose"),
        ("lidar/timestamps.json", ["noon"], r"lidar/timestamps\.json is no list of seconds"),
        ("lidar/timestamps.json", None, r"lidar/timestamps\.json does not exist"),
        ("camera/back_camera/intrinsics.json", None, r"back_camera/intrinsics\.json does not exist"),
        ("camera/back_camera/intrinsics.json", {"fx": 1}, r"intrinsics\.json does not give fx, fy, cx and cy"),
        ("camera/back_camera/poses.json", None, r"back_camera/poses\.json does not exist"),
    ],
)
def test_damage_of_a_scene_is_named(root, tmp_path, file, content, message):
    path = root / "001" / file
    path.unlink()
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=message):
        _build(root, tmp_path / "records", skip_errors=True)


def test_a_damaged_json_file_is_named(root, tmp_path):
    (root / "001" / "lidar" / "poses.json").write_text("[")
    with pytest.raises(SourceError, match=r"lidar/poses\.json is damaged"):
        _build(root, tmp_path / "records")


def test_missing_folders_are_named(root, tmp_path):
    with pytest.raises(SourceError, match=r"no folder .*nowhere \(see --source\)"):
        _build(tmp_path / "nowhere", tmp_path / "records")
    with pytest.raises(SourceError, match=r"has no scene with annotations/semseg: --source is the folder"):
        _build(root / "001", tmp_path / "records")
    for name in ("001", "002"):
        shutil.rmtree(root / name)
    with pytest.raises(SourceError, match="has no scene of split train"):
        _build(root, tmp_path / "records")


def test_without_pandas_the_extra_is_named(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SourceError, match=r"pip install 'pop3d-jax\[pandaset\]'"):
        _build(root, tmp_path / "records")
