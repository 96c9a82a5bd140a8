"""Key frames to arrays: the official order of steps, capacities, and what is refused."""

import dataclasses
import io

import numpy as np
import pytest
from lidar_frames import DATASET, IMAGE_HW, noise_frame
from PIL import Image

from pop3d_jax.data import point_clouds
from pop3d_jax.data.lidar_examples import LidarSettings, make_distillation_example, make_segmentation_example
from pop3d_jax.data.neighbors import nearest_neighbors
from pop3d_jax.data.records import RecordError
from pop3d_jax.geometry import lidar_to_image, project

SETTINGS = LidarSettings(
    capacity=420,
    raw_capacity=450,
    max_points=400,
    voxel_size=0.5,
    field_of_view=((-8.0, -8.0, -4.0), (8.0, 8.0, 4.0)),
    grid_shapes=((16, 16), (16, 4), (16, 4)),
    neighbors=5,
    image_hw=(16, 20),
)


def rng():
    return np.random.default_rng(0)


def test_shapes_and_types_are_those_of_the_settings():
    example = make_distillation_example(noise_frame(0), DATASET, SETTINGS, rng())
    assert {name: (array.shape, array.dtype.name) for name, array in example.items()} == {
        "point_features": ((420, 5), "float32"),
        "cells": ((3, 420), "int32"),
        "point_mask": ((420,), "bool"),
        "neighbors": ((420, 6), "int32"),
        "images": ((1, 16, 20, 3), "uint8"),
        "feature_cameras": ((420,), "int32"),
        "feature_pixels": ((420, 2), "float32"),
        "feature_mask": ((420,), "bool"),
        "points_left_out": ((), "int32"),
    }
    training = make_segmentation_example(noise_frame(0), DATASET, SETTINGS, rng())
    assert training["point_labels"].dtype == np.uint8
    assert "raw_labels" not in training
    evaluation = make_segmentation_example(noise_frame(0), DATASET, SETTINGS, None)
    assert {name: evaluation[name].shape for name in ("nearest_kept", "raw_labels", "raw_mask")} == {
        "nearest_kept": (450,),
        "raw_labels": (450,),
        "raw_mask": (450,),
    }
    assert evaluation["nearest_kept"].dtype == np.int32


def test_padding_is_the_official_one():
    example = make_distillation_example(noise_frame(0), DATASET, SETTINGS, rng())
    padding = ~example["point_mask"]
    assert 0 < padding.sum() < SETTINGS.capacity
    assert not example["point_features"][padding].any()
    assert not example["cells"][:, padding].any()
    assert (example["neighbors"][padding] == SETTINGS.capacity - 1).all()
    assert (example["neighbors"][~padding] < (~padding).sum()).all()
    np.testing.assert_array_equal(example["feature_mask"], example["point_mask"])


def test_distillation_keeps_what_one_camera_sees():
    frame = noise_frame(1)
    for camera in range(2):
        example = make_distillation_example(frame, DATASET, SETTINGS, None, camera=camera)
        kept = example["point_mask"]
        xyz = example["point_features"][kept, 1:4] - [0, 0, DATASET.z_shift]
        matrix = lidar_to_image(frame.intrinsics[camera], frame.lidar_to_camera[camera])
        uv, depth = project(xyz, matrix)
        assert kept.sum() > 20
        assert (depth > 1).all()
        # Two floors lose at most one and a bit of a pixel of the resized image.
        lost = uv[:, ::-1] / IMAGE_HW * SETTINGS.image_hw + 0.5 - example["feature_pixels"][kept] * SETTINGS.image_hw
        assert (lost > -1e-3).all()
        assert (lost < 2).all()
        assert kept.sum() < len(frame.points) / 2
        rgb = np.asarray(Image.open(io.BytesIO(frame.images[camera])))
        expected = point_clouds.resize_image(rgb, SETTINGS.image_hw, antialias=False)
        assert np.abs(example["images"][0] - expected).max() <= 0.5


def test_pixels_stay_with_their_points_through_limit_augmentation_and_crop():
    # Intensities, which nothing changes but their normalisation, tell the points apart.
    frame, one = noise_frame(1), dataclasses.replace(DATASET, cameras=("front",))
    frame = dataclasses.replace(
        frame, images=frame.images[:1], intrinsics=frame.intrinsics[:1], lidar_to_camera=frame.lidar_to_camera[:1],
        camera_timestamps=frame.camera_timestamps[:1],
    )  # fmt: skip
    settings = dataclasses.replace(SETTINGS, max_points=40, field_of_view=((-5.0, -5.0, -4.0), (5.0, 5.0, 4.0)))
    matrix = lidar_to_image(frame.intrinsics[0], frame.lidar_to_camera[0])
    generator, kept_counts = rng(), []
    for _ in range(5):
        example = make_distillation_example(frame, one, settings, generator)
        kept = example["point_mask"]
        intensities = example["point_features"][kept, 0] * one.intensity_std + one.intensity_mean
        points = np.abs(frame.points[:, 3] - intensities[:, None]).argmin(1)
        seen, pixels = point_clouds.pixel_pairs(frame.points[points, :3], matrix, IMAGE_HW, one)
        np.testing.assert_array_equal(seen, np.arange(len(points)))
        resized = point_clouds.resized_pixels(pixels, IMAGE_HW, settings.image_hw)
        np.testing.assert_allclose(example["feature_pixels"][kept], (resized + 0.5) / settings.image_hw, rtol=1e-6)
        kept_counts.append(kept.sum())
    assert min(kept_counts) > 0
    assert max(kept_counts) < 40  # the limit and the crop both left points out


def test_cameras_are_drawn_equally_often():
    frame = noise_frame(2, points=40)
    images = [make_distillation_example(frame, DATASET, SETTINGS, None, camera=camera)["images"] for camera in (0, 1)]
    generator, drawn = rng(), []
    for _ in range(300):
        example = make_distillation_example(frame, DATASET, SETTINGS, generator)
        drawn.append([np.array_equal(example["images"], image) for image in images].index(True))
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.1)


def test_distillation_makes_features_of_augmented_coordinates():
    frame, generator = noise_frame(3), rng()
    radii = []
    for _ in range(20):
        example = make_distillation_example(frame, DATASET, SETTINGS, generator)
        features = example["point_features"][example["point_mask"]]
        np.testing.assert_allclose(features[:, 4], np.linalg.norm(features[:, 1:4], axis=1), rtol=1e-5)
        assert (np.abs(features[:, 1:3]) < 8).all()
        expected = point_clouds.grid_cells(
            np.ascontiguousarray(features[:, 1:4]),
            SETTINGS.field_of_view,
            SETTINGS.projection_axes,
            SETTINGS.grid_shapes,
        )
        np.testing.assert_array_equal(example["cells"][:, example["point_mask"]], expected)
        radii.append(features[:, 4].max())
    assert max(radii) > 1.05 * min(radii)


def test_downstream_copies_are_augmented_apart_from_coordinates():
    # One point: its cell in the grid seen from above tells the coordinates, its features the copies.
    frame = noise_frame(4)
    point = np.array([[6.0, 0.0, 1.0, 12.0, 0.0]], np.float32)
    one = dataclasses.replace(frame, points=point, lidarseg=np.array([2], np.uint8))
    generator, angles, scales = rng(), [], []
    for _ in range(200):
        example = make_segmentation_example(one, DATASET, SETTINGS, generator)
        cell, (_, x, y, z, radius) = example["cells"][0, 0], example["point_features"][0]
        row, column = divmod(int(cell), SETTINGS.grid_shapes[0][1])
        angles.append([np.arctan2(column - 7.5, row - 7.5), np.arctan2(y, x)])
        # Coordinates are not scaled: the cell lies 6 m away; copies are, the radius with them.
        assert np.hypot(row - 7.5, column - 7.5) == pytest.approx(6.0, abs=0.8)
        scales.append(radius / 6.0)
        assert np.hypot(x, y) / 6.0 == pytest.approx(scales[-1])
        assert z == 0.0
        assert example["point_labels"][0] == 0
    assert abs(np.corrcoef(np.array(angles).T)[0, 1]) < 0.2
    assert 0.9 <= min(scales) < 0.92
    assert 1.08 < max(scales) <= 1.1


def test_labels_follow_their_points():
    # The label of a point is told by its intensity.
    frame = noise_frame(5)
    points = frame.points.copy()
    points[:, 3] = frame.lidarseg
    frame = dataclasses.replace(frame, points=points)
    for generator in (None, rng()):
        example = make_segmentation_example(frame, DATASET, SETTINGS, generator)
        kept = example["point_mask"]
        raw = np.rint(example["point_features"][kept, 0] * DATASET.intensity_std + DATASET.intensity_mean).astype(int)
        np.testing.assert_array_equal(example["point_labels"][kept], DATASET.raw_to_class[raw])
        assert (example["point_labels"][~kept] == 255).all()


def test_evaluation_answers_for_every_point_of_the_sweep():
    frame = noise_frame(6)
    example = make_segmentation_example(frame, DATASET, SETTINGS, None)
    count = len(frame.points)
    kept, raw = example["point_mask"], example["raw_mask"]
    assert raw.sum() == count
    np.testing.assert_array_equal(example["raw_labels"][raw], DATASET.raw_to_class[frame.lidarseg])
    assert (example["raw_labels"][~raw] == 255).all()
    xyz = frame.points[:, :3] + np.array([0, 0, -1], np.float32)
    inside = example["point_features"][kept, 1:4]
    distances = np.linalg.norm(xyz[:, None].astype(np.float64) - inside[None], axis=-1)
    np.testing.assert_array_equal(example["nearest_kept"][:count], distances.argmin(1))
    assert len(inside) < count  # some are outside the field of view, and are answered for all the same


def test_training_keeps_the_points_nearest_to_one_of_them():
    frame = noise_frame(7)
    few = dataclasses.replace(SETTINGS, max_points=30, field_of_view=((-50.0,) * 3, (50.0,) * 3), voxel_size=0.0)
    example = make_segmentation_example(frame, DATASET, few, rng())
    assert example["point_mask"].sum() == 30
    assert example["points_left_out"] == 0  # a rule, not a loss
    # Heights and distances from the lidar survive turns; intensities tell which points these are.
    intensities = example["point_features"][:30, 0] * DATASET.intensity_std + DATASET.intensity_mean
    chosen = np.abs(frame.points[:, 3] - intensities[:, None]).argmin(1)
    xyz = frame.points[:, :3].astype(np.float64)
    distances = np.linalg.norm(xyz - xyz[chosen[0]], axis=1)
    np.testing.assert_array_equal(np.argsort(distances)[:30], chosen)


def test_points_beyond_the_capacities_are_counted():
    frame = noise_frame(8)
    full = make_segmentation_example(frame, DATASET, SETTINGS, None)
    small = dataclasses.replace(SETTINGS, capacity=50, raw_capacity=60)
    example = make_segmentation_example(frame, DATASET, small, None)
    assert full["points_left_out"] == full["raw_points_left_out"] == 0
    assert example["points_left_out"] == full["point_mask"].sum() - 50
    assert example["raw_points_left_out"] == len(frame.points) - 60
    assert example["point_mask"].all()
    assert example["nearest_kept"].max() < 50
    seen = make_distillation_example(frame, DATASET, SETTINGS, None, camera=0)["point_mask"].sum()
    few = make_distillation_example(frame, DATASET, dataclasses.replace(SETTINGS, capacity=9), None, camera=0)
    assert few["points_left_out"] == seen - 9


def test_the_step_may_search_the_neighbours():
    frame = noise_frame(9)
    in_step = dataclasses.replace(SETTINGS, neighbor_search="all_pairs")
    for make in (make_distillation_example, make_segmentation_example):
        worker, step = make(frame, DATASET, SETTINGS, rng()), make(frame, DATASET, in_step, rng())
        assert worker.keys() - step.keys() == {"neighbors"}
        assert step.keys() - worker.keys() == {"points"}
        found = nearest_neighbors(
            step["points"], step["point_mask"], SETTINGS.neighbors, implementation=in_step.neighbor_search
        )
        np.testing.assert_array_equal(found, worker["neighbors"])


def test_a_camera_that_sees_nothing_gives_masked_rows():
    behind = dataclasses.replace(noise_frame(10), lidar_to_camera=np.stack([np.diag([1.0, 1, 0.01, 1])] * 2))
    example = make_distillation_example(behind, DATASET, SETTINGS, rng())
    assert not example["point_mask"].any()
    assert not example["point_features"].any()
    assert (example["neighbors"] == SETTINGS.capacity - 1).all()


def test_bad_labels_name_the_sample():
    frame = noise_frame(11)
    none = dataclasses.replace(frame, lidarseg=np.zeros(0, np.uint8))
    with pytest.raises(RecordError, match=r"sample sample11 of noise has no point labels: .* label files"):
        make_segmentation_example(none, DATASET, SETTINGS, None)
    to_predict = make_segmentation_example(none, DATASET, dataclasses.replace(SETTINGS, labelled=False), None)
    assert (to_predict["raw_labels"] == 255).all()
    short = dataclasses.replace(frame, lidarseg=frame.lidarseg[:-3])
    with pytest.raises(RecordError, match="sample sample11 of noise has 400 points and 397 labels"):
        make_segmentation_example(short, DATASET, SETTINGS, rng())
    labels = frame.lidarseg.copy()
    labels[[3, 8]] = 5
    with pytest.raises(RecordError, match="sample sample11 has the label 5 at 2 points; noise has labels below 5"):
        make_segmentation_example(dataclasses.replace(frame, lidarseg=labels), DATASET, SETTINGS, rng())


def test_damaged_sweeps_and_images_name_the_sample():
    frame = noise_frame(12)
    points = frame.points.copy()
    points[5, 1] = np.inf
    broken = dataclasses.replace(frame, points=points)
    with pytest.raises(ValueError, match="sample sample12: 1 points have coordinates that are not finite"):
        make_segmentation_example(broken, DATASET, SETTINGS, None)
    torn = dataclasses.replace(frame, images=[image[:200] for image in frame.images])
    with pytest.raises(ValueError, match="image of sample sample12, back cannot be decoded"):
        make_distillation_example(torn, DATASET, SETTINGS, None, camera=1)
    with pytest.raises(RecordError, match="sample sample12 has 1 images, data set noise has the cameras front, back"):
        make_distillation_example(dataclasses.replace(frame, images=frame.images[:1]), DATASET, SETTINGS, rng())
    with pytest.raises(TypeError, match="camera must be given"):
        make_distillation_example(frame, DATASET, SETTINGS, None)


def test_settings_that_contradict_are_refused():
    with pytest.raises(ValueError, match="neighbor_search is 'fast'; known implementations: kd_tree, all_pairs"):
        LidarSettings(neighbor_search="fast")
    with pytest.raises(ValueError, match="3 projection_axes and 1 grid_shapes"):
        LidarSettings(grid_shapes=((8, 8),))
