"""Where cameras and axes of a rig go in the picture of a sweep."""

import dataclasses

import numpy as np
import pytest

from pop3d_jax import lidar_pictures
from pop3d_jax.data.records import RecordSource
from pop3d_jax.lidar_datasets import NUSCENES, PANDAR64, SEMANTIC_KITTI
from pop3d_jax.nuscenes import CLASS_COLOURS


@pytest.fixture(scope="module")
def frames(small_records, semantic_kitti_records, pandar64_records):
    return {
        dataset.name: RecordSource(records, "val")[0]
        for dataset, records in (
            (NUSCENES, small_records),
            (SEMANTIC_KITTI, semantic_kitti_records),
            (PANDAR64, pandar64_records),
        )
    }


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        (NUSCENES, "CAM_FRONT_LEFT CAM_FRONT CAM_FRONT_RIGHT CAM_BACK_RIGHT CAM_BACK CAM_BACK_LEFT"),
        (PANDAR64, "front_left_camera front_camera front_right_camera right_camera back_camera left_camera"),
        (SEMANTIC_KITTI, "image_2"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_cameras_stand_as_they_look_around_the_car(frames, dataset, names):
    order = lidar_pictures.around_the_car(frames[dataset.name])
    assert [dataset.cameras[index] for index in order] == names.split()


def test_up_is_ahead_in_the_axes_of_each_data_set(frames):
    np.testing.assert_array_equal(lidar_pictures.right_and_ahead(frames["nuscenes"]), [[1, 0], [0, 1]])
    # x ahead and y to the left.
    np.testing.assert_array_equal(lidar_pictures.right_and_ahead(frames["semantic_kitti"]), [[0, -1], [1, 0]])


def test_every_class_has_a_colour_of_its_own():
    for dataset in (NUSCENES, SEMANTIC_KITTI, PANDAR64):
        colours = lidar_pictures.class_colours(dataset)
        assert colours.shape == (len(dataset.class_names), 3)
        assert len(np.unique(colours, axis=0)) == len(colours)
    car = NUSCENES.class_names.index("car")
    np.testing.assert_allclose(lidar_pictures.class_colours(NUSCENES)[car] * 255, CLASS_COLOURS[4])


def test_labels_make_room_for_the_ground_truth(frames, tmp_path):
    key_frame = frames["nuscenes"]
    count = len(key_frame.points)
    given = {
        "key_frame": dataclasses.replace(key_frame, lidarseg=np.zeros(0, np.uint8)),
        "dataset": NUSCENES,
        "similarity": np.linspace(-1, 1, count, dtype=np.float32),
        "hits": np.array([5, 9]),
        "chosen": None,
        "title": "a title",
        "asked": "the phrase",
    }
    classes = np.full(count, 255, np.uint8)
    classes[: count // 2] = 3
    lidar_pictures.draw_lidar_query(tmp_path / "without.png", classes=None, **given)
    lidar_pictures.draw_lidar_query(tmp_path / "with.png", classes=classes, **given)
    # As in every run: the same picture from the same numbers.
    lidar_pictures.draw_lidar_query(tmp_path / "again.png", classes=classes, **given)
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
