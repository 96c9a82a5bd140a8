"""SemanticKITTI's folder: calibration, poses, labels, a real frame, and bad input."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import semantic_kitti_builder
from data_prep.semantic_kitti_builder import parse_calibration, raw_indices, read_split
from data_prep.split_build import build_split
from data_prep.table_rows import SourceError
from data_prep.world import kitti_recording
from pop3d_jax.data.records import RecordSource
from pop3d_jax.geometry import lidar_to_image, project, visible
from pop3d_jax.lidar_datasets import SEMANTIC_KITTI

_TR = np.array([[0.0, -1.0, 0.0, 0.1], [0.0, 0.0, -1.0, -0.2], [1.0, 0.0, 0.0, -0.3]])
_P2 = np.array([[50.0, 0.0, 32.0, 4.0], [0.0, 60.0, 18.0, 0.5], [0.0, 0.0, 1.0, 0.01]])
# The first pose is not the identity: global is what it is all the same.
_POSES = np.array([np.eye(4)[:3], [[0.0, 0.0, 1.0, 2.0], [0.0, 1.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 3.0]]])


def _row(matrix):
    return " ".join(f"{value:.12e}" for value in np.ravel(matrix))


def _write_root(root: Path, sequences=("00",), labels=True, folder="dataset/sequences"):
    """Two key frames a sequence: thirty points, a picture, every known label."""
    rng = np.random.default_rng(0)
    for sequence in sequences:
        place = root / folder / sequence
        for name in ("velodyne", "image_2", *(["labels"] if labels else [])):
            (place / name).mkdir(parents=True)
        (place / "calib.txt").write_text(f"P0: {_row(_P2)}\nP2: {_row(_P2)}\nTr: {_row(_TR)}\n")
        (place / "poses.txt").write_text("".join(f"{_row(pose)}\n" for pose in _POSES))
        (place / "times.txt").write_text("0.000000e+00\n1.037587e-01\n")
        for frame in ("000000", "000001"):
            points = rng.uniform(0, 1, (34, 4)).astype("<f4")
            (place / "velodyne" / f"{frame}.bin").write_bytes(points.tobytes())
            Image.fromarray(rng.integers(0, 256, (36, 64, 3), np.uint8)).save(place / "image_2" / f"{frame}.png")
            if labels:
                instances = rng.integers(0, 2**16, 34).astype("<u4") << 16
                ids = np.array(SEMANTIC_KITTI.raw_ids, "<u4")
                (place / "labels" / f"{frame}.label").write_bytes((ids | instances).tobytes())
    return root


@pytest.fixture
def root(tmp_path):
    return _write_root(tmp_path / "source")


def _build(root, out, split="train", *, skip_errors=False):
    return build_split(root, None, split, out, dataset="semantic_kitti", skip_errors=skip_errors, workers=1)


def test_a_record_holds_the_files(root, tmp_path):
    _build(root, tmp_path / "records")
    source = RecordSource(tmp_path / "records", "train")
    assert source.sample_tokens == ["00_000000", "00_000001"]
    frame = source[1]
    place = root / "dataset" / "sequences" / "00"
    sweep = np.fromfile(place / "velodyne" / "000001.bin", "<f4").reshape(-1, 4)
    np.testing.assert_array_equal(frame.points[:, :4], sweep)
    np.testing.assert_array_equal(frame.points[:, 4], -1)
    assert frame.images == [(place / "image_2" / "000001.png").read_bytes()]
    # Positions in the official list, as 259 does not fit a byte.
    np.testing.assert_array_equal(frame.lidarseg, np.arange(34))
    assert frame.timestamp == 103_759
    assert frame.camera_timestamps.tolist() == [103_759]
    assert frame.camera_files == ["dataset/sequences/00/image_2/000001.png"]
    assert frame.scene_name == "00"


def test_the_folder_dataset_may_be_left_out(tmp_path):
    root = _write_root(tmp_path / "source", folder="sequences")
    assert read_split(root, "train").scenes[0].key_frames[0].lidar_file == "sequences/00/velodyne/000000.bin"


def test_the_projection_is_p2_times_tr():
    calibration = parse_calibration(f"P2: {_row(_P2)}\nTr: {_row(_TR)}\n\nmore: 1 2\n")
    np.testing.assert_array_equal(calibration.intrinsics, _P2[:, :3])
    composed = calibration.intrinsics @ calibration.lidar_to_camera[:3]
    np.testing.assert_allclose(composed, _P2 @ np.vstack([_TR, (0, 0, 0, 1)]), atol=1e-12)
    # The colour camera is not where the rectified frame of Tr has its origin.
    assert np.abs(calibration.lidar_to_camera - calibration.lidar_to_reference)[:3, 3].min() > 0.005


def test_poses_are_those_of_the_lidar(root):
    rows = read_split(root, "train").scenes[0].key_frames
    np.testing.assert_allclose(rows[0].ego_to_global, np.eye(4), atol=1e-12)
    # By hand: the grey camera moves 3 m ahead and 2 m to the right and turns; the lidar looks along z of that camera.
    tr, pose = np.vstack([_TR, (0, 0, 0, 1)]), np.vstack([_POSES[1], (0, 0, 0, 1)])
    np.testing.assert_allclose(tr @ rows[1].ego_to_global, pose @ tr, atol=1e-12)
    np.testing.assert_array_equal(rows[1].lidar_to_ego, np.eye(4))
    ahead = rows[1].ego_to_global @ [10.0, 0.0, 0.0, 1.0] - rows[1].ego_to_global @ [0.0, 0.0, 0.0, 1.0]
    np.testing.assert_allclose(ahead, [0.0, -10.0, 0.0, 0.0], atol=1e-9)


def test_splits_are_the_official_ones():
    splits = semantic_kitti_builder.SEQUENCES
    assert splits["train"] == ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10")
    assert splits["val"] == ("08",)
    assert splits["test"] == ("11", "12", "13", "14", "15", "16", "17", "18", "19", "20", "21")


def test_long_sequences_become_several_shards(tmp_path, monkeypatch):
    root = _write_root(tmp_path / "source", ("00", "04"))
    monkeypatch.setattr(semantic_kitti_builder, "_SHARD_KEY_FRAMES", 1)
    index = _build(root, tmp_path / "records")
    assert [shard.sample_tokens for shard in index.shards] == [[f"{s}_00000{n}"] for s in ("00", "04") for n in (0, 1)]


def test_the_test_split_has_no_labels(tmp_path):
    root = _write_root(tmp_path / "source", ("11",), labels=False)
    _build(root, tmp_path / "records", "test")
    assert len(RecordSource(tmp_path / "records", "test")[0].lidarseg) == 0


def _cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


def _label(path, value):
    labels = np.fromfile(path, "<u4")
    labels[3] = value
    path.write_bytes(labels.tobytes())


def _nan(path):
    points = np.fromfile(path, "<f4")
    points[5] = np.nan
    path.write_bytes(points.tobytes())


_IN_A_FRAME = {
    "no image": (
        lambda s: (s / "image_2/000001.png").unlink(),
        r"000001\.png does not exist: unpack data_odometry_color",
    ),
    "cut image": (lambda s: _cut(s / "image_2/000001.png", 300), r"image .*000001\.png is cut off or damaged"),
    "grey image": (
        lambda s: Image.new("L", (8, 8)).save(s / "image_2/000001.png"),
        r"000001\.png is a PNG of mode L, not of three colours",
    ),
    "no labels": (
        lambda s: (s / "labels/000001.label").unlink(),
        r"labels/000001\.label does not exist: unpack data_odometry_labels",
    ),
    "too few labels": (
        lambda s: _cut(s / "labels/000001.label", 132),
        r"000001\.label has 132 bytes, 136 are expected for 34 points",
    ),
    "an unknown label": (lambda s: _label(s / "labels/000001.label", 12), r"000001\.label has label 12, which"),
    "a sweep of five columns": (lambda s: _cut(s / "velodyne/000001.bin", 540), r"000001\.bin has 540 bytes, not a"),
    "an empty sweep": (lambda s: _cut(s / "velodyne/000001.bin", 0), r"000001\.bin has no points"),
    "a point that is none": (lambda s: _nan(s / "velodyne/000001.bin"), r"000001\.bin has 1 points that are NaN"),
    "no pose": (
        lambda s: (s / "poses.txt").write_text(f"{_row(_POSES[0])}\n"),
        r"000001\.bin has no pose or time: poses\.txt has 1 rows and times\.txt 2",
    ),
}


@pytest.mark.parametrize("damage", _IN_A_FRAME)
def test_damage_of_a_key_frame_is_named_and_can_be_skipped(root, tmp_path, damage):
    spoil, message = _IN_A_FRAME[damage]
    spoil(root / "dataset" / "sequences" / "00")
    with pytest.raises(SourceError, match=message):
        _build(root, tmp_path / "records")
    index = _build(root, tmp_path / "records", skip_errors=True)
    assert RecordSource(tmp_path / "records", "train").sample_tokens == ["00_000000"]
    (skipped,) = [entry for shard in index.shards for entry in shard.skipped]
    assert skipped["sample_token"] == "00_000001"
    assert re.search(message, skipped["error"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("calib.txt", None, r"calib\.txt does not exist: unpack data_odometry_calib"),
        ("poses.txt", None, r"poses\.txt does not exist: unpack data_odometry_labels"),
        ("times.txt", None, r"times\.txt does not exist: unpack data_odometry_calib"),
        ("calib.txt", "P2: 1 2 3\n", r"calib\.txt twelve finite numbers"),
        ("calib.txt", f"P0: {_row(_P2)}\nTr: {_row(_TR)}\n", r"calib\.txt has no line P2"),
        ("calib.txt", f"P2: {_row(_P2)}\n", r"calib\.txt has no line Tr"),
        ("calib.txt", f"P2: {_row(_TR)}\nTr: {_row(_TR)}\n", r"calib\.txt P2 is no camera matrix"),
        ("poses.txt", "1 0 0\n", r"poses\.txt is damaged, rows of 12"),
        ("times.txt", "0\nnan\n", r"times\.txt has numbers that are not finite"),
    ],
)
def test_damage_of_a_sequence_is_named(root, tmp_path, file, content, message):
    path = root / "dataset" / "sequences" / "00" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(SourceError, match=message):
        _build(root, tmp_path / "records", skip_errors=True)


def test_missing_folders_are_named(root, tmp_path):
    with pytest.raises(SourceError, match=r"no folder .*nowhere \(see --source\)"):
        _build(tmp_path / "nowhere", tmp_path / "records")
    with pytest.raises(SourceError, match="neither dataset/sequences nor sequences"):
        _build(root / "dataset" / "sequences" / "00", tmp_path / "records")
    with pytest.raises(SourceError, match="none of the sequences 08 of split val"):
        _build(root, tmp_path / "records", "val")
    shutil.rmtree(root / "dataset" / "sequences" / "00" / "velodyne")
    with pytest.raises(SourceError, match=r"velodyne has no sweeps: unpack data_odometry_velodyne"):
        _build(root, tmp_path / "records")


def test_labels_of_one_sequence_ask_for_those_of_the_others(tmp_path):
    root = _write_root(tmp_path / "source", ("00", "04"))
    shutil.rmtree(root / "dataset" / "sequences" / "04" / "labels")
    with pytest.raises(SourceError, match=r"04/labels/000000\.label does not exist"):
        _build(root, tmp_path / "records")


def test_raw_indices_are_positions_in_the_official_list():
    assert raw_indices(np.array([0, 10, 259, 40]), "x").tolist() == [0, 2, 33, 12]
    for unknown in (2, 260, 65535):
        with pytest.raises(SourceError, match=rf"file has label {unknown}"):
            raw_indices(np.array([0, unknown]), "file")


def test_another_calibration_is_another_source(root, tmp_path):
    before = semantic_kitti_builder.fingerprint(root)
    shutil.copytree(root, tmp_path / "copy")
    assert semantic_kitti_builder.fingerprint(tmp_path / "copy") == before
    path = root / "dataset" / "sequences" / "00" / "calib.txt"
    path.write_text(path.read_text().replace("P0", "P1"))
    assert semantic_kitti_builder.fingerprint(root) != before


def test_the_colour_camera_of_the_world_is_beside_the_grey_one(semantic_kitti_world):
    """The world renders from a place that P2's last column alone tells of."""
    row = read_split(semantic_kitti_world, "train").scenes[0].key_frames[0]
    to_grey = np.linalg.inv(kitti_recording.GREY_CAMERA.to_ego()) @ kitti_recording.LIDAR.to_ego()
    shift = row.lidar_to_camera[0] @ np.linalg.inv(to_grey)
    np.testing.assert_allclose(shift[:3, :3], np.eye(3), atol=1e-9)
    np.testing.assert_allclose(shift[:3, 3], kitti_recording.COLOUR_SHIFT, atol=1e-9)


@pytest.mark.golden
def test_a_real_frame_projects_as_kitti_says(golden_file, tmp_path):
    """Object-benchmark frame 000008 in this layout; it has neither poses nor times, so it gets one of each."""
    frame_root, golden = golden_file("nuscenes/kitti_frame"), np.load(golden_file("nuscenes/kitti_projection.npz"))
    shutil.copytree(frame_root, tmp_path / "source")
    place = next((tmp_path / "source" / "sequences").iterdir())
    (place / "poses.txt").write_text(f"{_row(np.eye(4)[:3])}\n")
    (place / "times.txt").write_text("0\n")
    _build(tmp_path / "source", tmp_path / "records", "val")
    (frame,) = RecordSource(tmp_path / "records", "val")
    assert len(frame.points) == len(golden["uv"])
    assert len(frame.lidarseg) == 0
    assert 0 <= frame.points[:, 3].min() < frame.points[:, 3].max() <= 1
    calibration = parse_calibration((place / "calib.txt").read_text())
    np.testing.assert_array_equal(frame.intrinsics[0], golden["P2"][:, :3])
    np.testing.assert_array_equal(calibration.lidar_to_reference, golden["Tr"])
    matrix = lidar_to_image(frame.intrinsics, frame.lidar_to_camera)[0]
    np.testing.assert_allclose(matrix[:3], golden["velo2img"], rtol=1e-12, atol=1e-9)
    uv, depth = project(frame.points[:, :3], matrix)
    np.testing.assert_allclose(uv, golden["uv"], atol=1e-8)
    np.testing.assert_allclose(depth, golden["proj_depth"], atol=1e-10)
    homogeneous = np.column_stack([frame.points[:, :3].astype(np.float64), np.ones(len(uv))])
    grey_depth = homogeneous @ calibration.lidar_to_reference[2]
    np.testing.assert_allclose(grey_depth, golden["cam_depth"], atol=1e-10)
    hw = tuple(golden["image_hw"].tolist())
    seen = np.flatnonzero(visible(uv, grey_depth, hw))
    np.testing.assert_array_equal(seen, golden["points"])
    np.testing.assert_array_equal(np.round(uv[seen, ::-1]).astype(np.int64), golden["pixels"])
    # ScaLR's rule: the lidar's x decides.
    ahead = np.flatnonzero(visible(uv, frame.points[:, 0].astype(np.float64), hw, SEMANTIC_KITTI.min_depth))
    np.testing.assert_array_equal(ahead, golden["points_xfront"])
    np.testing.assert_array_equal(np.floor(uv[ahead, ::-1]).astype(np.int64), golden["pixels_xfront_floor"])
