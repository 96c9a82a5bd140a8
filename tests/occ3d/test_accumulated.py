"""Ground truth from accumulated sweeps: hand-made scenes, voxel by voxel."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from pop3d_jax.data import shards
from pop3d_jax.data.boxes import Boxes
from pop3d_jax.data.records import KeyFrame, RecordError, RecordSource, encode_record
from pop3d_jax.geometry import apply_rigid, invert_rigid, rigid_transform
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES, LIDARSEG_TO_CLASS
from pop3d_jax.occ3d.accumulated import AccumulatedGroundTruth
from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.voxels import Volume

# Cubes of a metre, x from 0 to 12, y from -4 to 4, z from 0 to 3.
VOLUME = Volume((0.0, -4.0, 0.0), (12.0, 4.0, 3.0), (12, 8, 3))
ROAD, CAR, WALL, OWN, NOISE, CONE = (
    LIDARSEG_CATEGORIES.index(name)
    for name in (
        "flat.driveable_surface", "vehicle.car", "static.manmade", "vehicle.ego", "noise", "movable_object.trafficcone",
    )
)  # fmt: skip
LIDAR_TO_EGO = rigid_transform(np.array([np.sqrt(0.5), 0, 0, np.sqrt(0.5)]), np.array([0.5, 0.5, 1.5]))
# One camera where the lidar is, looking along ego +x: a quarter of a turn wide.
EGO_TO_CAMERA = np.eye(4)
EGO_TO_CAMERA[:3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
EGO_TO_CAMERA[:3, 3] = EGO_TO_CAMERA[:3, :3] @ -LIDAR_TO_EGO[:3, 3]
# The car drives 2 m along its x axis between the key frames; the map is turned and far away.
START = rigid_transform(np.array([0.9, 0.0, 0.0, 0.4]), np.array([700.0, 1100.0, 3.0]))


def _ego_to_global(number):
    return START @ rigid_transform(np.array([1.0, 0, 0, 0]), np.array([2.0 * number, 0, 0]))


def _key_frame(number, places, lidarseg, scene="scene-0001"):
    """A key frame whose returns are at places in its own ego frame."""
    points = np.array(places, np.float64).reshape(-1, 3)
    lidar = apply_rigid(invert_rigid(LIDAR_TO_EGO), points)
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "jpeg")
    return KeyFrame(
        images=[picture.getvalue()],
        intrinsics=np.array([[[8.0, 0, 7.5], [0, 8.0, 7.5], [0, 0, 1]]]),
        lidar_to_camera=(EGO_TO_CAMERA @ LIDAR_TO_EGO)[None],
        points=np.concatenate([lidar, np.zeros((len(lidar), 2))], 1).astype(np.float32),
        lidarseg=np.array(lidarseg, np.uint8),
        lidar_to_ego=LIDAR_TO_EGO,
        ego_to_global=_ego_to_global(number),
        sample_token=f"{scene} {number}",
        scene_token=f"token {scene}",
        scene_name=scene,
        lidar_token="",
        lidar_file="",
        camera_tokens=[""],
        camera_files=[""],
        camera_timestamps=np.zeros(1, np.int64),
        timestamp=number,
    )


def _source(folder, *scenes, dataset="nuscenes"):
    written = []
    for shard, frames in enumerate(scenes):
        path = folder / f"{shards.shard_prefix(dataset)}-val.tfrecord-{shard:05d}-of-{len(scenes):05d}"
        written.append(shards.write_shard(path, [(frame.sample_token, encode_record(frame)) for frame in frames]))
    index = shards.SplitIndex(shards.SCHEMA_VERSION, "v1.0-trainval", "source", "val", written, dataset)
    shards.write_json(shards.index_path(folder, "val"), dataclasses.asdict(index))
    return RecordSource(folder, "val")


def _boxes(source, rows=()):
    """Rows of (number of the record, instance, ego centre then, size, yaw in that ego frame)."""
    columns = ([], [], [], [], [])
    for record, instance, centre, size, yaw in rows:
        frame = source[record]
        pose = frame.ego_to_global @ rigid_transform(
            np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]), np.array(centre)
        )
        heading = np.arctan2(pose[1, 0], pose[0, 0])
        turned = [np.cos(heading / 2), 0, 0, np.sin(heading / 2)]
        for column, value in zip(columns, (record, instance, pose[:3, 3], size, turned), strict=True):
            column.append(value)
    whole = (np.array(column, np.int32) for column in columns[:2])
    real = (np.array(c, np.float64).reshape(-1, n) for c, n in zip(columns[2:], (3, 3, 4), strict=True))
    category = np.full(len(columns[0]), CAR, np.int32)
    sample, instance = whole
    return Boxes(source.sample_tokens, source.fingerprint, sample, instance, category, *real)


def _grid(labels):
    """Semantics with labels at ego voxels given by a point inside."""
    grid = np.full(VOLUME.grid_size, FREE, np.uint8)
    for (x, y, z), raw in labels.items():
        grid[int(np.floor(x)), int(np.floor(y)) + 4, int(np.floor(z))] = LIDARSEG_TO_CLASS[raw]
    return grid


def _truth(tmp_path, frames, boxes=()):
    source = _source(tmp_path, frames)
    return AccumulatedGroundTruth(source, _boxes(source, boxes), VOLUME)


def test_standing_points_of_two_sweeps_meet_in_each_ego_frame(tmp_path):
    first = _key_frame(0, [(6.5, 0.5, 1.5), (4.5, -1.5, 0.5)], [WALL, ROAD])
    second = _key_frame(1, [(5.5, 2.5, 0.5)], [ROAD])
    truth = _truth(tmp_path, [first, second])
    assert truth.sample_tokens == ["scene-0001 0", "scene-0001 1"]
    own = {(6.5, 0.5, 1.5): WALL, (4.5, -1.5, 0.5): ROAD, (7.5, 2.5, 0.5): ROAD}
    np.testing.assert_array_equal(truth["scene-0001 0"].semantics, _grid(own))
    later = {(x - 2, y, z): label for (x, y, z), label in own.items()}
    np.testing.assert_array_equal(truth["scene-0001 1"].semantics, _grid(later))


def test_masks_have_what_rays_pass_and_what_cameras_see(tmp_path):
    truth = _truth(tmp_path, [_key_frame(0, [(6.5, 0.5, 1.5)], [WALL])])
    frame = truth["scene-0001 0"]
    # The lidar sits in the middle of voxel (0, 4, 1); its one ray is level.
    along = np.zeros(VOLUME.grid_size, bool)
    along[:7, 4, 1] = True
    np.testing.assert_array_equal(frame.mask_lidar, along)
    # The camera sits there too: it does not see the voxel that it is in the middle of, and nothing beyond the wall.
    along[0, 4, 1] = False
    np.testing.assert_array_equal(frame.mask_camera, along)


def test_a_hole_that_no_ray_passed_is_not_seen(tmp_path):
    truth = _truth(tmp_path, [_key_frame(0, [(6.5, 0.5, 1.5), (6.5, 2.5, 1.5)], [WALL, WALL])])
    frame = truth["scene-0001 0"]
    assert (frame.mask_camera <= frame.mask_lidar).all()
    assert not frame.mask_camera[4, 5, 2]


def test_majority_decides_and_the_lowest_label_in_a_tie(tmp_path):
    places = [(3.5, 0.5, 0.5)] * 3 + [(5.5, 0.5, 0.5)] * 2
    truth = _truth(tmp_path, [_key_frame(0, places, [WALL, ROAD, WALL, WALL, ROAD])])
    expected = _grid({(3.5, 0.5, 0.5): WALL, (5.5, 0.5, 0.5): ROAD})
    np.testing.assert_array_equal(truth["scene-0001 0"].semantics, expected)


def test_own_returns_and_noise_are_left_out_with_their_rays(tmp_path):
    truth = _truth(tmp_path, [_key_frame(0, [(2.5, 0.5, 0.5), (8.5, 0.5, 1.5)], [OWN, NOISE])])
    frame = truth["scene-0001 0"]
    assert (frame.semantics == FREE).all()
    assert not frame.mask_lidar.any()


def _moving_scene():
    """A car of 2 by 1 by 1 m: seen at its front, then turned by a quarter and seen at its side; a wall behind it."""
    first = _key_frame(0, [(5.9, 0.5, 0.5), (5.5, 0.4, 0.05), (9.5, 0.5, 1.5)], [CAR, ROAD, WALL])
    second = _key_frame(1, [(3.5, 2.9, 0.5)], [CAR])
    size = (1.0, 2.0, 1.0)
    # Ego frames of their own key frame; the front is at +x of the box.
    boxes = [(0, 7, (5.0, 0.5, 0.5), size, 0.0), (1, 7, (3.5, 2.5, 0.5), size, np.pi / 2)]
    return first, second, boxes


def test_a_thing_that_moves_is_assembled_where_its_box_is(tmp_path):
    first, second, boxes = _moving_scene()
    truth = _truth(tmp_path, [first, second], boxes)
    # Front, 0.9 m ahead of the middle: at the second key frame that is (3.5, 3.4); its point there is 0.4 m ahead.
    standing = {(5.5, 0.4, 0.05): ROAD, (9.5, 0.5, 1.5): WALL}
    expected = _grid({**standing, (5.9, 0.5, 0.5): CAR, (5.4, 0.5, 0.5): CAR})
    # Car and road share a voxel: two returns of the car there, one of the road.
    np.testing.assert_array_equal(truth["scene-0001 0"].semantics, expected)
    later = {(x - 2, y, z): raw for (x, y, z), raw in standing.items()}
    expected = _grid({**later, (3.5, 3.4, 0.5): CAR, (3.5, 2.9, 0.5): CAR})
    np.testing.assert_array_equal(truth["scene-0001 1"].semantics, expected)
    # Where the first ray met the car is free now, and the ray says nothing about the voxel it ended in.
    frame = truth["scene-0001 1"]
    assert frame.mask_lidar[2, 4, 1]
    assert not frame.mask_lidar[4, 4, 0]


def test_a_thing_without_a_box_at_a_key_frame_is_left_out_there(tmp_path):
    first, second, boxes = _moving_scene()
    truth = _truth(tmp_path, [first, second], boxes[:1])
    expected = _grid({(5.9, 0.5, 0.5): CAR, (5.5, 0.4, 0.05): CAR, (9.5, 0.5, 1.5): WALL})
    # A car's and a road's return tie in the voxel of the front: the car's label is lower.
    np.testing.assert_array_equal(truth["scene-0001 0"].semantics, expected)
    # At its own key frame a return without a box counts.
    expected = _grid({(3.5, 0.4, 0.05): ROAD, (7.5, 0.5, 1.5): WALL, (3.5, 2.9, 0.5): CAR})
    np.testing.assert_array_equal(truth["scene-0001 1"].semantics, expected)


def test_the_smaller_of_two_boxes_takes_a_point(tmp_path):
    first = _key_frame(0, [(5.5, 0.5, 0.5)], [CONE])
    second = _key_frame(1, [], [])
    small, large = (0.5, 0.5, 1.0), (2.0, 4.0, 2.0)
    boxes = [
        (0, 1, (5.0, 0.5, 1.0), large, 0.0),
        (0, 2, (5.5, 0.5, 0.5), small, 0.0),
        (1, 1, (9.0, 0.5, 1.0), large, 0.0),
        (1, 2, (2.5, -2.5, 0.5), small, 0.0),
    ]
    truth = _truth(tmp_path, [first, second], boxes)
    np.testing.assert_array_equal(truth["scene-0001 1"].semantics, _grid({(2.5, -2.5, 0.5): CONE}))


def test_scenes_do_not_mix_in_any_order_of_asking(tmp_path):
    one = _key_frame(0, [(6.5, 0.5, 1.5)], [WALL])
    other = _key_frame(0, [(3.5, 0.5, 1.5)], [WALL], scene="scene-0002")
    source = _source(tmp_path, [one], [other])
    truth = AccumulatedGroundTruth(source, _boxes(source), VOLUME)
    for _ in range(2):
        for token, x in (("scene-0002 0", 3.5), ("scene-0001 0", 6.5)):
            assert truth.scene_of(token) == token[:-2]
            np.testing.assert_array_equal(truth[token].semantics, _grid({(x, 0.5, 1.5): WALL}))


def test_it_says_that_it_is_not_occ3d(tmp_path):
    assert "not Occ3D" in _truth(tmp_path, [_key_frame(0, [(6.5, 0.5, 1.5)], [WALL])]).description


def test_what_cannot_be_accumulated_is_refused_with_a_way_out(tmp_path):
    truth = _truth(tmp_path, [_key_frame(0, [(6.5, 0.5, 1.5)], [])])
    with pytest.raises(RecordError, match=r"sample scene-0001 0 has 0 point labels for 1 points.*nuScenes-lidarseg"):
        truth["scene-0001 0"]
    with pytest.raises(KeyError, match="unknown"):
        truth["unknown"]
    source = RecordSource(tmp_path, "val")
    with pytest.raises(RecordError, match=r"python -m data_prep.boxes"):
        AccumulatedGroundTruth(source, dataclasses.replace(_boxes(source), fingerprint="other"), VOLUME)
    (tmp_path / "kitti").mkdir()
    kitti = _source(tmp_path / "kitti", [_key_frame(0, [(6.5, 0.5, 1.5)], [WALL])], dataset="semantic_kitti")
    with pytest.raises(RecordError, match="these are of semantic_kitti"):
        AccumulatedGroundTruth(kitti, _boxes(kitti), VOLUME)


def test_a_shard_of_two_scenes_is_refused(tmp_path):
    frames = [_key_frame(0, [(6.5, 0.5, 1.5)], [WALL], scene=f"scene-000{number}") for number in (1, 2)]
    with pytest.raises(RecordError, match="scene-0001, scene-0002"):
        _truth(tmp_path, frames)["scene-0001 0"]
