"""Occ3D's files: what is read, and what is refused by name."""

import re
import shutil

import numpy as np
import pytest
from label_folders import SHAPE, random_labels, random_mask, write_truth

from pop3d_jax.occ3d.ground_truth import Occ3DGroundTruth, describe_labels
from pop3d_jax.occ3d.label_files import OccupancyFileError


def test_what_is_written_is_read(tmp_path):
    semantics = random_labels(0)
    semantics[0, 0, 0] = 255
    write_truth(tmp_path / "gts", "scene-0002", "bb")
    write_truth(tmp_path / "gts", "scene-0001", "aa", semantics, mask_lidar=random_mask(1), mask_camera=random_mask(2))
    truth = Occ3DGroundTruth(tmp_path)  # the folder that holds gts does too
    assert truth.sample_tokens == ["aa", "bb"]
    assert truth.description == "Occ3D's labels.npz files"
    assert truth.scene_of("bb") == "scene-0002"
    frame = truth["aa"]
    np.testing.assert_array_equal(frame.semantics, semantics)
    assert frame.mask_lidar.dtype == frame.mask_camera.dtype == bool  # as integers they would be indices
    np.testing.assert_array_equal(frame.mask("lidar"), random_mask(1))
    np.testing.assert_array_equal(frame.mask("camera"), random_mask(2))
    assert frame.mask("none").all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"semantics": np.zeros((100, 100, 8), np.uint8)},
            r"shape \(100, 100, 8\), not \(200, 200, 16\)",
        ),
        ({"semantics": np.full(SHAPE, 18, np.uint8)}, "semantics, holds labels that Occ3D does not have: 18"),
        ({"semantics": np.zeros(SHAPE)}, "holds float64, not integer labels"),
        ({"mask_camera": np.full(SHAPE, 2, np.uint8)}, "mask_camera, holds values other than 0 and 1"),
        ({"mask_lidar": np.ones((2, 2, 2), np.uint8)}, r"mask_lidar, has the shape \(2, 2, 2\)"),
        ({"mask_lidar": None}, "has no array mask_lidar"),
        ({"semantics": np.array([{}], object)}, "cannot be read"),
    ],
)
def test_other_files_are_named(tmp_path, changes, message):
    path = write_truth(tmp_path, "scene-0001", "aa", **changes)
    with pytest.raises(OccupancyFileError, match=message) as caught:
        Occ3DGroundTruth(tmp_path)["aa"]
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_half_written_file_is_named(tmp_path, share):
    path = write_truth(tmp_path, "scene-0001", "aa")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(OccupancyFileError, match=f"{re.escape(str(path))} cannot be read"):
        Occ3DGroundTruth(tmp_path)["aa"]


def test_other_labels_are_not_called_occ3ds(tmp_path):
    write_truth(tmp_path, "scene-0001", "aa")
    describe_labels(tmp_path, "made up")
    assert Occ3DGroundTruth(tmp_path).description == "made up"
    (tmp_path / "ground_truth.json").write_text("[]")
    with pytest.raises(OccupancyFileError, match=r"ground_truth\.json is damaged"):
        Occ3DGroundTruth(tmp_path)


def test_a_lost_file_is_named(tmp_path):
    write_truth(tmp_path, "scene-0001", "aa").unlink()
    with pytest.raises(OccupancyFileError, match=r"labels.npz does not exist"):
        Occ3DGroundTruth(tmp_path)["aa"]


def test_doubled_and_absent_folders_are_named(tmp_path):
    with pytest.raises(OccupancyFileError, match="there is no folder"):
        Occ3DGroundTruth(tmp_path / "nowhere")
    with pytest.raises(OccupancyFileError, match=r"holds no SCENE/TOKEN/labels\.npz"):
        Occ3DGroundTruth(tmp_path)
    other = tmp_path / "nuscenes"
    for folder in ("samples/CAM_BACK", "sweeps/CAM_BACK"):
        (other / folder).mkdir(parents=True)
    with pytest.raises(OccupancyFileError, match=r"nuscenes holds no SCENE/TOKEN/labels\.npz"):
        Occ3DGroundTruth(other)
    shutil.rmtree(other)
    write_truth(tmp_path, "scene-0001", "aa")
    write_truth(tmp_path, "scene-0002", "aa")
    with pytest.raises(OccupancyFileError, match=r"aa is doubled: .*scene-0001.*scene-0002"):
        Occ3DGroundTruth(tmp_path)
