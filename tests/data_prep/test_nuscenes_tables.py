"""Tables joined into key frames, and the geometry that comes out."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_root import IMAGE_HW, write_tiny_root

from data_prep import table_rows
from data_prep.nuscenes_tables import REQUIRED_TABLES, read_tables, tables_fingerprint
from data_prep.splits import SPLITS_OF_VERSION, scene_names
from data_prep.table_rows import SourceError, TableFolder
from pop3d_jax import geometry
from pop3d_jax.nuscenes import CAMERAS, LIDAR

_SCENES = ("scene-0061", "scene-0553")


@pytest.fixture
def root(tmp_path):
    return write_tiny_root(tmp_path / "source", scenes=(*_SCENES, "scene-0103"))


def _read(root, split="mini_train"):
    return read_tables(root.folder, root.version, split)


def _pose(row):
    return geometry.rigid_transform(np.array(row["rotation"]), np.array(row["translation"]))


def test_key_frames_are_those_of_the_split_in_order_of_time(root):
    tables = _read(root)
    assert [scene.scene_name for scene in tables.scenes] == list(_SCENES)
    assert tables.absent_scenes == [name for name in scene_names("mini_train") if name not in _SCENES]
    assert [row.sample_token for scene in tables.scenes for row in scene.key_frames] == root.samples[:4]
    assert not any(scene.broken for scene in tables.scenes)
    assert [row.sample_token for row in _read(root, "mini_val").scenes[0].key_frames] == root.samples[4:]


def test_a_key_frame_holds_its_own_rows(root):
    row = _read(root).scenes[0].key_frames[1]
    cameras = [root.key_frame_row(camera, 1) for camera in CAMERAS]
    lidar = root.key_frame_row(LIDAR, 1)
    assert row.lidar_token == lidar["token"]
    assert row.lidar_file == lidar["filename"]
    assert row.timestamp == lidar["timestamp"]
    assert row.label_file == str(root.label_file(1).relative_to(root.folder))
    assert row.camera_tokens == [camera["token"] for camera in cameras]
    assert row.camera_files == [camera["filename"] for camera in cameras]
    assert row.camera_timestamps.tolist() == [camera["timestamp"] for camera in cameras]
    assert row.image_sizes == [IMAGE_HW] * 6


def test_both_ego_poses_are_applied(root):
    row = _read(root).scenes[0].key_frames[0]
    lidar = root.key_frame_row(LIDAR)
    lidar_to_ego = _pose(root.row("calibrated_sensor", token=lidar["calibrated_sensor_token"]))
    ego_to_global = _pose(root.row("ego_pose", token=lidar["ego_pose_token"]))
    np.testing.assert_array_equal(row.lidar_to_ego, lidar_to_ego)
    np.testing.assert_array_equal(row.ego_to_global, ego_to_global)
    for number, camera in enumerate(CAMERAS):
        data = root.key_frame_row(camera)
        camera_to_ego = _pose(root.row("calibrated_sensor", token=data["calibrated_sensor_token"]))
        camera_ego_to_global = _pose(root.row("ego_pose", token=data["ego_pose_token"]))
        expected = np.linalg.inv(camera_ego_to_global @ camera_to_ego) @ ego_to_global @ lidar_to_ego
        np.testing.assert_allclose(row.lidar_to_camera[number], expected, atol=1e-12)


def test_a_data_set_without_labels_has_none(tmp_path):
    root = write_tiny_root(tmp_path, scenes=_SCENES, labelled=False)
    tables = _read(root)
    assert not tables.labelled
    assert tables.scenes[0].key_frames[0].label_file is None
    root.table("lidarseg").unlink()
    assert _read(root).scenes[0].key_frames[0].label_file is None


@pytest.mark.golden
def test_projections_are_the_official_ones(golden_file):
    source = golden_file("nuscenes/nuscenes_keyframe")
    golden = np.load(golden_file("nuscenes/projection.npz"))
    version = next(source.glob("v1.0-*")).name
    names = {scene["name"] for scene in json.loads((source / version / "scene.json").read_text())}
    split = next(split for split in SPLITS_OF_VERSION[version] if names & set(scene_names(split)))
    row = read_tables(source, version, split).scenes[0].key_frames[0]
    points = np.fromfile(source / row.lidar_file, np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
    matrices = geometry.lidar_to_image(row.intrinsics, row.lidar_to_camera)
    image_hw = tuple(int(size) for size in golden["image_hw"])
    assert row.image_sizes == [image_hw] * 6
    np.testing.assert_allclose(row.lidar_to_ego, golden["lidar2ego"], rtol=0, atol=1e-15)
    np.testing.assert_allclose(row.ego_to_global, golden["ego2global_LIDAR_TOP"], rtol=1e-15, atol=1e-15)
    for camera, matrix, lidar_to_camera in zip(CAMERAS, matrices, row.lidar_to_camera, strict=True):
        # Equal bit for bit where the linear algebra library is the same; another may round the last bit otherwise.
        np.testing.assert_allclose(lidar_to_camera, golden[f"lidar2cam_{camera}"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(matrix, golden[f"lidar2img_{camera}"], rtol=0, atol=1e-9)
        uv, depth = geometry.project(points, matrix)
        seen = np.flatnonzero(geometry.visible(uv, depth, image_hw))
        np.testing.assert_array_equal(seen, golden[f"points64_{camera}"])
        np.testing.assert_array_equal(np.round(uv[seen][:, ::-1]).astype(int), golden[f"pixels64_{camera}"])
        np.testing.assert_allclose(uv[seen], golden[f"uv64_{camera}"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(depth[seen], golden[f"depth64_{camera}"], rtol=0, atol=1e-11)
        # The official float32 pipeline rounds the cloud on its way through global coordinates; which points it sees
        # is compared in pop3d_jax/verification.
        assert np.abs(uv[golden[f"points_{camera}"]] - golden[f"uv_{camera}"]).max() < 0.1


@pytest.mark.parametrize("table", REQUIRED_TABLES)
def test_a_missing_table_is_named(root, table):
    root.table(table).unlink()
    with pytest.raises(SourceError, match=rf"missing table {table}: .*{table}\.json"):
        _read(root)


def test_a_missing_category_table_is_named(root):
    root.table("category").unlink()
    with pytest.raises(SourceError, match="missing table category"):
        _read(root)


def test_missing_folders_are_named(root):
    with pytest.raises(SourceError, match=r"holds no v1\.0-test; it has: v1\.0-mini"):
        read_tables(root.folder, "v1.0-test", "test")
    with pytest.raises(SourceError, match=r"no folder .*nowhere"):
        read_tables(root.folder / "nowhere", "v1.0-mini", "mini_train")


@pytest.mark.parametrize(
    ("table", "field", "target"),
    [
        ("sample_data", "ego_pose_token", "ego_pose"),
        ("sample_data", "calibrated_sensor_token", "calibrated_sensor"),
    ],
)
def test_a_dangling_token_of_a_key_frame_breaks_only_that(root, table, field, target):
    token = root.key_frame_row("CAM_BACK", 1)["token"]
    root.change(table, token, **{field: "nothing"})
    scenes = _read(root).scenes
    assert [row.sample_token for row in scenes[0].key_frames] == [root.samples[0]]
    (sample, error), *more = scenes[0].broken
    assert (sample, more) == (root.samples[1], [])
    for part in (f"table {table}", token, f"{field} nothing", str(root.table(target))):
        assert part in error
    assert not scenes[1].broken


def test_a_dangling_sensor_breaks_the_key_frames_that_use_it(root):
    root.change("calibrated_sensor", "calibrated CAM_BACK", sensor_token="nothing")
    scene = _read(root).scenes[0]
    assert not scene.key_frames
    assert "table calibrated_sensor: row calibrated CAM_BACK has sensor_token nothing" in scene.broken[0][1]


def test_a_missing_key_frame_of_a_camera_is_named(root):
    token = root.key_frame_row("CAM_BACK")["token"]
    root.write("sample_data", [row for row in root.rows("sample_data") if row["token"] != token])
    sample, error = _read(root).scenes[0].broken[0]
    assert sample == root.samples[0]
    assert f"no key frame of CAM_BACK for sample {root.samples[0]}" in error


def test_two_key_frames_of_a_camera_are_named(root):
    twin = root.key_frame_row("CAM_BACK") | {"token": "twin"}
    root.write("sample_data", [*root.rows("sample_data"), twin])
    error = _read(root).scenes[0].broken[0][1]
    assert "twin" in error
    assert root.key_frame_row("CAM_BACK")["token"] in error


def test_a_missing_label_row_is_named(root):
    token = root.key_frame_row(LIDAR)["token"]
    root.write("lidarseg", [row for row in root.rows("lidarseg") if row["token"] != token])
    assert f"table lidarseg: no row for the lidar sample_data {token}" in _read(root).scenes[0].broken[0][1]


def test_a_pose_that_is_none_is_named(root):
    token = root.key_frame_row(LIDAR)["ego_pose_token"]
    root.change("ego_pose", token, rotation=[0, 0, 0, 0])
    assert f"table ego_pose: row {token}" in _read(root).scenes[0].broken[0][1]


@pytest.mark.parametrize(
    ("table", "token_of", "fields", "message"),
    [
        ("sample_data", "data", {"sample_token": "nothing"}, "sample_token nothing, which table sample does not"),
        ("sample", "sample", {"scene_token": "nothing"}, "scene_token nothing, which table scene does not"),
        ("sample", "sample", {"timestamp": "noon"}, "table sample: row .*noon"),
        ("scene", "scene", {"nbr_samples": 7}, "2 rows of scene .*is 7"),
        ("category", "category", {"name": "unknown"}, "table category: row category 3: index 3 is 'unknown'"),
        ("calibrated_sensor", "calibrated", {"camera_intrinsic": []}, "row calibrated CAM_BACK: camera_intrinsic"),
    ],
)
def test_tables_that_contradict_each_other_stop(root, table, token_of, fields, message):
    tokens = {
        "data": root.key_frame_row("CAM_BACK")["token"],
        "sample": root.samples[0],
        "scene": root.rows("scene")[0]["token"],
        "category": "category 3",
        "calibrated": "calibrated CAM_BACK",
    }
    root.change(table, tokens[token_of], **fields)
    with pytest.raises(SourceError, match=message):
        _read(root)


def test_a_missing_field_is_named(root):
    rows = root.rows("category")
    del rows[5]["index"]
    root.write("category", rows)
    with pytest.raises(SourceError, match=r"table category: row category 5 has no field 'index' .*category\.json"):
        _read(root)


def test_a_split_without_scenes_here_stops(root):
    root.write("scene", [row for row in root.rows("scene") if row["name"] != "scene-0103"])
    with pytest.raises(SourceError, match=r"none of the 2 scenes of split mini_val"):
        _read(root, "mini_val")


@settings(deadline=None, max_examples=30)
@given(
    content=st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.floats(allow_nan=False)))),
    chunk=st.integers(1, 50),
    indent=st.sampled_from([None, 0, 2]),
)
def test_rows_are_those_of_the_file_for_any_chunk(tmp_path_factory, content, chunk, indent):
    folder = tmp_path_factory.mktemp("tables")
    (folder / "v").mkdir()
    (folder / "v" / "sample.json").write_text(json.dumps(content, indent=indent, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_rows, "_CHUNK_CHARACTERS", chunk)
        assert list(TableFolder(folder, "v").rows("sample")) == content


@pytest.mark.parametrize("end", [-1, -30])
def test_a_table_that_ends_early_is_named(root, end):
    path = root.table("ego_pose")
    path.write_text(path.read_text()[:end])
    with pytest.raises(SourceError, match=re.escape(f"table ego_pose: {path} ends early")):
        _read(root)


def test_a_damaged_row_does_not_fill_the_memory(root, monkeypatch):
    monkeypatch.setattr(table_rows, "_CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(table_rows, "_MAX_ROW_CHARACTERS", 1000)
    path = root.table("sample_data")
    path.write_text('[{"token": oops}' + " " * 5000 + "]")
    with pytest.raises(SourceError, match=r"table sample_data: .* is damaged"):
        _read(root)


def test_the_fingerprint_is_of_the_content(root, tmp_path):
    before = tables_fingerprint(root.folder, root.version)
    copy = write_tiny_root(tmp_path / "elsewhere", scenes=(*_SCENES, "scene-0103"))
    assert tables_fingerprint(copy.folder, copy.version) == before
    root.change("calibrated_sensor", "calibrated CAM_BACK", translation=[1, 2, 3])
    assert tables_fingerprint(root.folder, root.version) != before
