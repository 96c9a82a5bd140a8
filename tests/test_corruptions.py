"""The eight corruptions as a benchmark calls them: by name and severity, deterministic, labels in step with points."""

import numpy as np
import pytest

from pop3d_jax.corruptions import CORRUPTIONS, NUSCENES_SENSOR, SEVERITIES, Sensor, beam_indices, corrupt, raw_sensor
from pop3d_jax.lidar_datasets import LIDAR_DATASETS, NUSCENES, SEMANTIC_KITTI
from tests.test_weather import sweep as bare_sweep

UNLABELLED = 255
CAR = NUSCENES.class_names.index("car")


def sweep(count=6000):
    """Road, cars and walls; column 4 is the beam."""
    points, labels, ground = bare_sweep(count)
    labels[ground] = NUSCENES.class_names.index("driveable_surface")
    labels[~ground & (points[:, 0] > 50)] = CAR
    return points, labels


def run(name, severity, seed=3, sensor=NUSCENES_SENSOR):
    return corrupt(name, severity, *sweep(), np.random.default_rng(seed), sensor)


def test_the_classes_of_the_sensor_are_those_that_robo3d_names():
    names = NUSCENES.class_names
    assert [names[label] for label in NUSCENES_SENSOR.ground_classes] == [
        "driveable_surface", "other_flat", "sidewalk",
    ]  # fmt: skip
    assert [names[label] for (label,) in NUSCENES_SENSOR.object_classes] == [
        "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "trailer", "truck",
    ]  # fmt: skip


@pytest.mark.parametrize("dataset", LIDAR_DATASETS.values(), ids=lambda dataset: dataset.name)
def test_raw_labels_of_a_sensor_have_the_classes_that_the_data_set_names(dataset):
    sensor = raw_sensor(dataset)
    assert dataset.raw_to_class[sensor.unlabelled] == 255
    ground = {name for raw, name in _raw_names(dataset) if raw in sensor.ground_classes}
    assert ground == set(dataset.ground_classes)
    assert len(sensor.ground_classes) == sum(name in ground for _, name in _raw_names(dataset))
    assert len(sensor.object_classes) == len(dataset.object_classes)
    for labels, expected in zip(sensor.object_classes, dataset.object_classes, strict=True):
        assert labels == tuple(raw for raw, name in _raw_names(dataset) if name == expected)


def _raw_names(dataset):
    scored = [(raw, number) for raw, number in enumerate(dataset.raw_to_class) if number != 255]
    return [(raw, dataset.class_names[number]) for raw, number in scored]


def test_raw_labels_of_kitti_have_the_ids_that_robo3d_names():
    sensor = raw_sensor(SEMANTIC_KITTI)
    assert (sensor.beams, sensor.max_intensity) == (64, 1.0)
    ids = np.array(SEMANTIC_KITTI.raw_ids)
    assert ids[list(sensor.ground_classes)].tolist() == [40, 60, 44, 48, 49]
    # A moving car is a car.
    assert ids[list(sensor.object_classes[0])].tolist() == [10, 252]
    assert ids[sensor.unlabelled] == 0


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_a_changed_copy_the_same_for_the_same_seed(name, severity):
    points, labels = sweep()
    before = points.copy(), labels.copy()
    first = corrupt(name, severity, points, labels, np.random.default_rng(0), NUSCENES_SENSOR)
    np.testing.assert_array_equal(points, before[0])
    np.testing.assert_array_equal(labels, before[1])
    again = corrupt(name, severity, points, labels, np.random.default_rng(0), NUSCENES_SENSOR)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    found, found_labels = first
    assert found.dtype == np.float32
    assert found_labels.dtype == np.uint8
    assert len(found) == len(found_labels) <= len(points)
    assert found.shape[1] == points.shape[1]
    assert np.isfinite(found).all()
    assert found[:, 3].min() >= 0
    assert found[:, 3].max() <= 255
    assert len(found) < len(points) or not np.array_equal(found, points)


@pytest.mark.parametrize(("name", "shares"), [("beam_missing", (8, 16, 24)), ("cross_sensor", (8, 16, 24))])
def test_the_stated_number_of_beams_is_missing_and_what_is_left_is_untouched(name, shares):
    points, labels = sweep()
    rows = {tuple(row): label for row, label in zip(points, labels, strict=True)}
    left = []
    for severity, missing in zip(SEVERITIES, shares, strict=True):
        found, found_labels = run(name, severity)
        assert len(np.unique(found[:, 4])) == 32 - missing
        assert all(rows[tuple(row)] == label for row, label in zip(found, found_labels, strict=True))
        left.append(len(found))
    assert left[0] > left[1] > left[2]


def test_heavier_beam_loss_takes_the_same_beams_and_more_never_the_outermost():
    beams = [set(np.unique(run("beam_missing", severity)[0][:, 4])) for severity in SEVERITIES]
    assert beams[2] < beams[1] < beams[0]
    assert {0, 1, 29, 30, 31} <= beams[2]


def test_another_lidar_has_half_the_points_of_its_beams():
    points, labels = sweep()
    for severity, keeps in zip(SEVERITIES, (24, 16, 8), strict=True):
        found, _ = run("cross_sensor", severity)
        kept = np.isin(points[:, 4], np.unique(found[:, 4]))
        assert len(np.unique(found[:, 4])) == keeps
        assert len(found) == (kept.sum() + 1) // 2
    with_64 = Sensor(64, 1.0, (), ())
    points[:, 4] = np.random.default_rng(0).integers(0, 64, len(points))
    assert [
        len(np.unique(corrupt("cross_sensor", severity, points, labels, np.random.default_rng(0), with_64)[0][:, 4]))
        for severity in SEVERITIES
    ] == [48, 32, 16]


def test_beams_by_elevation_where_the_points_do_not_say():
    points, _ = sweep()
    np.testing.assert_array_equal(beam_indices(points[:, :4].copy(), 32), beam_indices(points, 32))


def test_a_column_of_minus_one_is_no_beam():
    points, labels = sweep()
    by_elevation = points[:, :4].copy()
    points[:, 4] = -1
    np.testing.assert_array_equal(beam_indices(points, 32), beam_indices(by_elevation, 32))
    for name in ("beam_missing", "cross_sensor"):
        found, found_labels = corrupt(name, 2, points, labels, np.random.default_rng(3), NUSCENES_SENSOR)
        assert 0.1 * len(points) < len(found) < 0.8 * len(points)
        assert np.all(found[:, 4] == -1)
        expected, expected_labels = corrupt(name, 2, by_elevation, labels, np.random.default_rng(3), NUSCENES_SENSOR)
        np.testing.assert_array_equal(found[:, :4], expected)
        np.testing.assert_array_equal(found_labels, expected_labels)


def test_blur_shifts_the_sweep_and_trembles_about_it():
    points, _ = sweep()
    shifts, tremors = [], []
    for severity in SEVERITIES:
        found, labels = run("motion_blur", severity)
        difference = found[:, :3] - points[:, :3]
        shifts.append(np.abs(difference.mean(0)))
        tremors.append(difference.std(0))
        np.testing.assert_array_equal(labels, sweep()[1])
        np.testing.assert_array_equal(found[:, 3:], points[:, 3:])
    for deviation, tremor in zip((0.2, 0.25, 0.3), tremors, strict=True):
        np.testing.assert_allclose(tremor, deviation * np.array([0.1, 0.1, 0.05]), rtol=0.05)
    assert np.all(np.diff(shifts, axis=0) > 0)
    drawn = [run("motion_blur", 3, seed)[0][:, 0].mean() - points[:, 0].mean() for seed in range(200)]
    np.testing.assert_allclose(np.std(drawn), 0.3, rtol=0.2)


def test_crosstalk_hits_the_stated_share():
    points, labels = sweep()
    hits = []
    for severity, share in zip(SEVERITIES, (0.006, 0.008, 0.01), strict=True):
        found, found_labels = run("crosstalk", severity)
        hit = found_labels == UNLABELLED
        assert hit.sum() == int(share * len(points))
        np.testing.assert_array_equal(found[~hit], points[~hit])
        np.testing.assert_array_equal(found_labels[~hit], labels[~hit])
        hits.append(hit)
    assert np.all(hits[1][hits[0]])
    assert np.all(hits[2][hits[1]])
    displaced = [run("crosstalk", 3, seed) for seed in range(10)]
    steps = np.concatenate([(found - points)[labels == UNLABELLED, :3] for found, labels in displaced])
    np.testing.assert_allclose(steps.std(), 3.0, rtol=0.1)


def test_echoes_are_lost_of_objects_only():
    points, labels = sweep()
    cars = np.sum(labels == CAR)
    assert cars > 100
    for severity, share in zip(SEVERITIES, (0.75, 0.85, 0.95), strict=True):
        found, found_labels = run("incomplete_echo", severity)
        assert np.sum(found_labels == CAR) == cars - int(share * cars)
        np.testing.assert_array_equal(found[found_labels != CAR], points[labels != CAR])
    few = np.flatnonzero(labels == CAR)[10:]
    labels[few] = UNLABELLED
    found, _ = corrupt("incomplete_echo", 3, points, labels, np.random.default_rng(0), NUSCENES_SENSOR)
    assert len(found) == len(points)


def test_the_labels_of_one_class_lose_their_echoes_together():
    points, labels = sweep()
    cars = np.flatnonzero(labels == CAR)
    moving = 200
    labels[cars[::2]] = moving
    sensor = Sensor(32, 255.0, (), ((CAR, moving),))
    _, found_labels = corrupt("incomplete_echo", 1, points, labels, np.random.default_rng(0), sensor)
    left = [np.sum(found_labels == label) for label in (CAR, moving)]
    assert sum(left) == len(cars) - int(0.75 * len(cars))
    assert min(left) > 0


def test_points_put_somewhere_get_the_stated_label():
    sensor = Sensor(32, 255.0, NUSCENES_SENSOR.ground_classes, NUSCENES_SENSOR.object_classes, unlabelled=77)
    for name in ("fog", "snow", "crosstalk"):
        _, found_labels = run(name, 3, sensor=sensor)
        assert np.any(found_labels == 77), name
        assert not np.any(found_labels == UNLABELLED), name


def test_fog_is_heavier_with_severity_for_every_draw_of_its_attenuation():
    for seed in range(6):
        foggy = [np.sum(run("fog", severity, seed)[1] == UNLABELLED) for severity in SEVERITIES]
        assert foggy[0] <= foggy[1] <= foggy[2]
        assert foggy[2] > foggy[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_sweep_without_points_stays_so(name):
    found, labels = corrupt(
        name, 1, np.zeros((0, 4), np.float32), np.zeros(0, np.uint8), np.random.default_rng(0), NUSCENES_SENSOR
    )
    assert found.shape == (0, 4)
    assert labels.shape == (0,)


def test_errors_say_what_to_choose():
    points, labels = sweep()
    rng = np.random.default_rng(0)
    for severity in (0, 4):
        with pytest.raises(ValueError, match=f"severity {severity} of fog: choose 1"):
            corrupt("fog", severity, points, labels, rng, NUSCENES_SENSOR)
    with pytest.raises(ValueError, match="corruption 'rain': choose one of fog, wet_ground"):
        corrupt("rain", 1, points, labels, rng, NUSCENES_SENSOR)
    with pytest.raises(ValueError, match="3 columns; x, y, z and intensity"):
        corrupt("fog", 1, points[:, :3], labels, rng, NUSCENES_SENSOR)
    with pytest.raises(ValueError, match="6000 points and 5999 labels"):
        corrupt("fog", 1, points, labels[1:], rng, NUSCENES_SENSOR)
