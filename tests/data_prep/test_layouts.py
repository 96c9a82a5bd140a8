"""The synthetic world in every layout, built into records: labels, geometry and pictures belong together."""

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tiny_root import write_tiny_root

from data_prep import layouts, synthetic
from data_prep.check_records import check_records
from data_prep.split_build import BuildError, build_split
from data_prep.splits import SplitError
from data_prep.world import kitti_recording, label_maps, lidar, objects, pandaset_recording
from data_prep.world.ground import SURFACE_LIDARSEG
from data_prep.world.scene import draw_scene
from pop3d_jax.data.records import RecordSource
from pop3d_jax.geometry import invert_rigid, lidar_to_image, project, visible
from pop3d_jax.lidar_datasets import LIDAR_DATASETS

DATASETS = ("semantic_kitti", "pandar64", "pandar_gt")
# Height of the road and of roofs over it in the record's lidar frame, metres; top of the intensities.
ROAD_HEIGHT = {"semantic_kitti": -1.73, "pandar64": -0.1, "pandar_gt": -0.1}
FULL_INTENSITY = {"semantic_kitti": 1.0, "pandar64": 255.0, "pandar_gt": 255.0}
WORLD_IDS = {
    "semantic_kitti": label_maps.SEMANTIC_KITTI_IDS,
    "pandar64": label_maps.PANDASET_IDS,
    "pandar_gt": label_maps.PANDASET_IDS,
}


@pytest.fixture(params=DATASETS)
def dataset(request):
    return request.param


@pytest.fixture
def world(request, dataset):
    return request.getfixturevalue("semantic_kitti_world" if dataset == "semantic_kitti" else "pandaset_world")


@pytest.fixture
def records(request, dataset):
    return request.getfixturevalue(f"{dataset}_records")


def _names(dataset, lidarseg):
    """Class name of every raw label; the empty text where it is not scored."""
    facts = LIDAR_DATASETS[dataset]
    return np.array([*facts.class_names, *[""] * (256 - len(facts.class_names))])[facts.raw_to_class[lidarseg]]


def _seen(frame, camera):
    """Indices of the points a camera sees, their pixels (row, column), and its picture."""
    picture = np.asarray(Image.open(io.BytesIO(frame.images[camera])))
    matrix = lidar_to_image(frame.intrinsics, frame.lidar_to_camera)[camera]
    uv, depth = project(frame.points[:, :3], matrix)
    inside = np.flatnonzero(visible(uv, depth, picture.shape[:2]))
    return inside, np.round(uv[inside, ::-1]).astype(int), picture


def _map_file(world, dataset, frame, camera):
    scene, number = frame.sample_token.split("_")
    if dataset == "semantic_kitti":
        return world / "segmentation" / scene / f"{number}.png"
    return world / "segmentation" / LIDAR_DATASETS[dataset].cameras[camera] / f"{scene}_{number}.png"


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_lie_on_the_things_they_name(records, dataset, split):
    source = RecordSource(records, split)
    assert source.dataset == dataset
    assert len(source) == 2
    for frame in (source[0], source[1]):
        facts = LIDAR_DATASETS[dataset]
        assert len(frame.images) == len(facts.cameras) == len(frame.intrinsics) == len(frame.lidar_to_camera)
        assert frame.points.shape == (len(frame.lidarseg), 5)
        x, y, z, intensity, ring = frame.points.T
        assert (ring == -1).all()
        assert 0 <= intensity.min() < intensity.max() <= FULL_INTENSITY[dataset]
        assert intensity.max() > 0.5 * FULL_INTENSITY[dataset]
        names = _names(dataset, frame.lidarseg)
        near = np.hypot(x, y) < 25
        road = z[near & (names == "road")]
        assert len(road) > 1000
        assert abs(np.median(road) - ROAD_HEIGHT[dataset]) < 0.5
        standing = z[near & np.isin(names, ["building", "manmade", "vegetation", "car"])]
        assert (standing > np.median(road) + 0.3).mean() > 0.6


def test_points_project_to_pixels_of_the_same_thing(world, records, dataset):
    frame = RecordSource(records, "train")[1]
    for camera in range(len(frame.images)):
        points, pixels, _ = _seen(frame, camera)
        assert len(points) > 500
        cells = np.asarray(Image.open(_map_file(world, dataset, frame, camera)))
        row, column = np.minimum(pixels // 4, np.array(cells.shape) - 1).T
        shown = np.where(cells[row, column] == 255, -1, WORLD_IDS[dataset][np.minimum(cells[row, column], 31)])
        ids = np.array(LIDAR_DATASETS[dataset].raw_ids or range(256))
        assert (ids[frame.lidarseg[points]] == shown).mean() > 0.8, camera


def test_leaves_are_green_in_the_pictures(records, dataset):
    green, count = 0, 0
    other_green, other_count = 0, 0
    for split in ("train", "val"):
        for frame in RecordSource(records, split):
            for camera in range(len(frame.images)):
                points, pixels, picture = _seen(frame, camera)
                red, greens, blue = picture[pixels[:, 0], pixels[:, 1]].T.astype(int)
                is_green = greens > np.maximum(red, blue) + 5
                names = _names(dataset, frame.lidarseg[points])
                leaves, other = (
                    names == "vegetation",
                    np.isin(names, ["road", "sidewalk", "building", "manmade", "bus"]),
                )
                green, count = green + is_green[leaves].sum(), count + leaves.sum()
                other_green, other_count = other_green + is_green[other].sum(), other_count + other.sum()
    assert count > 500
    assert other_count > 500
    assert green / count > 0.75
    assert other_green / other_count < 0.25


def test_poses_and_times_follow_the_drive(records, dataset):
    source = RecordSource(records, "train")
    first, second = source[0], source[1]
    assert second.timestamp - first.timestamp == pytest.approx(100_000, abs=1)
    step = invert_rigid(first.ego_to_global) @ second.ego_to_global
    forward = 0 if dataset == "semantic_kitti" else 1
    assert 0.1 < step[forward, 3] < 1.5  # metres in a tenth of a second
    assert abs(step[1 - forward, 3]) < 0.3
    # What stands still stays where it was in the world.
    grounds = []
    for frame in (first, second):
        road = frame.points[_names(dataset, frame.lidarseg) == "road", :3].astype(np.float64)
        grounds.append(road @ frame.ego_to_global[:3, :3].T + frame.ego_to_global[:3, 3])
    distance = np.linalg.norm(grounds[0][::50, None, :] - grounds[1][None, ::5, :], axis=-1).min(1)
    assert np.median(distance) < 0.6


def test_cameras_of_pandaset_have_their_own_moment(pandar64_records):
    frame = RecordSource(pandar64_records, "train")[0]
    delays = [camera.delay for camera in pandaset_recording.CAMERAS]
    by_name = dict(zip((camera.channel for camera in pandaset_recording.CAMERAS), delays, strict=True))
    expected = [by_name[name] for name in LIDAR_DATASETS["pandar64"].cameras]
    np.testing.assert_allclose(frame.camera_timestamps - frame.timestamp, expected, atol=1)


def test_images_are_the_files_and_check_finds_nothing(world, records):
    for split in ("train", "val"):
        for frame in RecordSource(records, split):
            assert frame.images == [(world / file).read_bytes() for file in frame.camera_files]
            assert (world / frame.lidar_file).exists()
    checks = check_records(records, None, 1)
    found = [(check.split, check.key_frames, check.labelled, check.problems) for check in checks]
    assert found == [("train", 2, 2, []), ("val", 2, 2, [])]


@pytest.mark.slow
def test_tfds_reads_pngs_of_one_camera(semantic_kitti_records):
    program = (
        "import sys, tensorflow_datasets as tfds\n"
        "dataset = tfds.builder_from_directory(sys.argv[1]).as_dataset(split='train')\n"
        "for example in tfds.as_numpy(dataset):\n"
        "    print(example['sample_token'].decode(), *example['images'].shape, *example['points'].shape,\n"
        "          int(example['images'].sum(dtype='int64')))\n"
    )
    command = [sys.executable, "-c", program, semantic_kitti_records]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = []
    for frame in RecordSource(semantic_kitti_records, "train"):
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in frame.images])
        numbers = (*pixels.shape, *frame.points.shape, pixels.sum(dtype=np.int64))
        expected.append([frame.sample_token, *map(str, numbers)])
    assert [line.split() for line in done.stdout.splitlines()] == expected


def test_builds_resume_and_share_no_folder(world, records, dataset, tmp_path):
    out = tmp_path / "records"
    shutil.copytree(records, out)
    before = {path.name: path.read_bytes() for path in out.glob(f"{dataset}_*")}
    assert len(before) == 2
    assert tfds.builder_from_directory(out).info.splits["train"].num_examples == 2
    shard = next(out.glob(f"{dataset}_keyframes-train.tfrecord-*"))
    shard.unlink()
    index = build_split(world, None, "train", out, dataset=dataset, skip_errors=False, workers=1)
    assert index.dataset == dataset
    assert {path.name: path.read_bytes() for path in out.glob(f"{dataset}_*")} == before


@pytest.mark.parametrize("other", ["pandar_gt", "nuscenes"])
def test_data_sets_share_no_folder(pandar64_records, pandaset_world, tmp_path, other):
    out = tmp_path / "records"
    shutil.copytree(pandar64_records, out)
    if other == "nuscenes":
        root = write_tiny_root(tmp_path / "source", scenes=("scene-0061",))
        arguments = (root.folder, root.version, "mini_train", out)
    else:
        arguments = (pandaset_world, None, "train", out)
    with pytest.raises(BuildError, match=rf"holds another build \(dataset pandar64, here {other}"):
        build_split(*arguments, dataset=other, skip_errors=False, workers=1)


def test_a_folder_that_names_no_data_set_is_of_nuscenes(tmp_path):
    """As all were before there were others."""
    root = write_tiny_root(tmp_path / "source", scenes=("scene-0061",))
    out = tmp_path / "records"
    build_split(root.folder, root.version, "mini_train", out, skip_errors=False, workers=1)
    for name in ("build.json", "index_mini_train.json"):
        content = json.loads((out / name).read_text())
        assert content.pop("dataset") == "nuscenes"
        (out / name).write_text(json.dumps(content))
    assert RecordSource(out, "mini_train").dataset == "nuscenes"
    build_split(root.folder, root.version, "mini_train", out, skip_errors=False, workers=1)


def test_unknown_splits_and_versions_are_refused(tmp_path, dataset):
    out = tmp_path / "records"
    with pytest.raises(SplitError, match=rf"no split 'mini_train' in {dataset}; there are train, val"):
        build_split(tmp_path, None, "mini_train", out, dataset=dataset, skip_errors=False, workers=1)
    with pytest.raises(SplitError, match="leave out --version"):
        build_split(tmp_path, "v1.0-mini", "train", out, dataset=dataset, skip_errors=False, workers=1)
    assert not out.exists()


def test_the_command(semantic_kitti_world, tmp_path):
    command = [sys.executable, "-m", "data_prep.build", "--dataset=semantic_kitti", f"--out={tmp_path / 'records'}"]
    done = subprocess.run([*command, "--split=val", f"--source={semantic_kitti_world}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "val: 2 key frames in 1 shards" in done.stderr
    usage = subprocess.run(command, capture_output=True, text=True)
    assert "building needs --source, --split" in usage.stdout + usage.stderr


def test_every_data_set_has_its_facts():
    assert set(layouts.DATASETS) == set(LIDAR_DATASETS)


# The world itself.


@pytest.mark.parametrize("layout", ["semantic_kitti", "pandaset"])
def test_worlds_depend_on_the_seed_alone(layout, request, tmp_path):
    world = request.getfixturevalue(f"{layout}_world")
    scale = 0.5 if layout == "semantic_kitti" else 0.25
    assert synthetic.build_world(tmp_path / "again", 2, 2, 0, scale, 2, layout=layout)

    def hashes(root):
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert hashes(tmp_path / "again") == hashes(world)
    assert json.loads((world / "world.json").read_text())["layout"] == layout
    with pytest.raises(synthetic.WorldError, match="differs in layout"):
        synthetic.build_world(world, 2, 2, 0, scale, 1)


def test_scenes_have_names_of_their_splits():
    assert synthetic.scenes_of(3, "semantic_kitti") == [("00", "train"), ("01", "train"), ("08", "val")]
    with pytest.raises(synthetic.WorldError, match="2 to 11 scenes, which take their names from semantic_kitti"):
        synthetic.scenes_of(12, "semantic_kitti")
    assert synthetic.scenes_of(2, "pandaset") == [("001", "train"), ("077", "val")]


def test_every_category_of_the_world_has_an_id_everywhere():
    rng = np.random.default_rng(0)
    categories = {int(category) for category in SURFACE_LIDARSEG[1:]} | {objects.own_car().lidarseg_index}
    for seed in range(4):
        categories |= {thing.shape.lidarseg_index for thing in draw_scene(np.random.default_rng(seed), 2).things}
    categories |= {make(rng).lidarseg_index for make in (objects.bus, objects.truck, objects.pedestrian)}
    for dataset, ids in WORLD_IDS.items():
        known = LIDAR_DATASETS[dataset].raw_ids or range(43)
        assert all(ids[category] in known for category in categories), dataset


@pytest.mark.parametrize(
    ("make", "beams", "low", "high", "window"),
    [
        (lidar.HDL_32E, 32, -30.67, 10.67, 360),
        (lidar.HDL_64E, 64, -24.8, 2.0, 360),
        (lidar.PANDAR_64, 64, -25.0, 15.0, 360),
        (lidar.PANDAR_GT, 96, -10.0, 10.0, 60),
    ],
)
def test_lidars_look_where_they_say(make, beams, low, high, window):
    assert len(make.elevations) == beams
    assert (make.elevations[0], make.elevations[-1]) == (low, high)
    assert (np.diff(make.elevations) > 0).all()
    scene = draw_scene(np.random.default_rng(5), 1)
    drive_pose = scene.ego_to_world(0.0) @ kitti_recording.LIDAR.to_ego()
    solids = lidar.Solids(scene)
    sweep = lidar.take_sweep(scene, solids, 0.0, drive_pose, np.random.default_rng(0), make)
    x, y, z, intensity, ring = sweep.points.T
    azimuth = np.degrees(np.arctan2(y, x))
    # The range noise moves points along their rays only, through the sensor for none of these.
    assert np.abs(azimuth).max() <= window / 2 + 1e-3
    assert np.abs(azimuth).max() > 0.9 * window / 2
    elevation = np.degrees(np.arctan2(z, np.hypot(x, y)))
    np.testing.assert_allclose(elevation, np.array(make.elevations)[ring.astype(int)], atol=1e-3)
    steps = intensity / make.intensity_step
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    assert np.linalg.norm(sweep.points[:, :3], axis=1).max() < make.max_range + 1


def test_a_part_of_a_turn_sees_what_the_whole_turn_sees():
    """A window of a spinning lidar and the whole turn meet the same things in the same directions."""
    scene = draw_scene(np.random.default_rng(6), 1)
    solids = lidar.Solids(scene)
    pose = scene.ego_to_world(0.0) @ kitti_recording.LIDAR.to_ego()
    quiet = dataclasses.replace(lidar.PANDAR_GT, range_noise=0.0, sensitivity=0.0)
    part = lidar.take_sweep(scene, solids, 0.0, pose, np.random.default_rng(0), quiet)
    # Turned by half a turn, what was ahead lies across the seam of the window's own azimuths.
    back = np.diag([-1.0, -1.0, 1.0, 1.0])
    behind = lidar.take_sweep(scene, solids, 0.0, pose @ back, np.random.default_rng(0), quiet)
    wide = dataclasses.replace(quiet, window=359.9999)
    whole = lidar.take_sweep(scene, solids, 0.0, pose, np.random.default_rng(0), wide)
    shown = set(whole.number.tolist())
    assert set(part.number.tolist()) | set(behind.number.tolist()) <= shown
    azimuth = np.degrees(np.arctan2(whole.points[:, 1], whole.points[:, 0]))
    for sweep, inside in ((part, np.abs(azimuth) < 30), (behind, np.abs(azimuth) > 150)):
        counts = [np.bincount(numbers, minlength=max(shown) + 1) for numbers in (sweep.number, whole.number[inside])]
        assert np.abs(counts[0] - counts[1]).sum() < 0.02 * counts[0].sum()
