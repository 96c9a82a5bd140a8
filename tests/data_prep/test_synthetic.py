"""The synthetic world: same files for the same seed, nuScenes' layout, sensors that see the same things."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import synthetic
from data_prep.split_build import build_split
from data_prep.splits import scene_names
from data_prep.world import lidar, objects, rig
from data_prep.world.ground import HeightField, Road, draw_height_field, trace_ground
from data_prep.world.motion import Footprints, Standing
from data_prep.world.recorded_scene import SceneTask
from data_prep.world.recording import VERSION, record_scene
from data_prep.world.render import sensor_pose, take_picture
from data_prep.world.scene import draw_scene
from data_prep.world.solids import Solids
from pop3d_jax.data.records import RecordSource
from pop3d_jax.geometry import invert_rigid, lidar_to_image, project, rigid_transform, visible
from pop3d_jax.nuscenes import CAMERAS, LIDARSEG_CATEGORIES

SCENES, KEYFRAMES, SCALE = 2, 2, 0.125
TABLES = {
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "lidarseg",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world") / "out"
    assert synthetic.build_world(out, SCENES, KEYFRAMES, 3, SCALE, workers=1)
    return out


@pytest.fixture(scope="module")
def tables(world) -> dict[str, list[dict]]:
    return {path.stem: json.loads(path.read_text()) for path in (world / VERSION).iterdir()}


def _by_token(rows: list[dict]) -> dict[str, dict]:
    assert len({row["token"] for row in rows}) == len(rows)
    return {row["token"]: row for row in rows}


def _sweeps(world, tables):
    """(lidar row, points, labels) of every key frame."""
    labels = {row["sample_data_token"]: row["filename"] for row in tables["lidarseg"]}
    for row in tables["sample_data"]:
        if row["fileformat"] == "pcd":
            points = np.fromfile(world / row["filename"], np.float32).reshape(-1, 5)
            yield row, points, np.fromfile(world / labels[row["token"]], np.uint8)


def _hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_files_depend_neither_on_the_number_of_workers_nor_on_a_broken_run(world, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    begun = json.loads((world / "world.json").read_text()) | {"complete": False}
    (again / "world.json").write_text(json.dumps(begun))
    (again / "captions.json").write_text("[")
    synthetic.build_world(again, SCENES, KEYFRAMES, 3, SCALE, workers=2)
    assert _hashes(again) == _hashes(world)


def test_another_seed_is_another_world(world, tmp_path):
    task = SceneTask(tmp_path, 4, 0, "scene-0001", "train", 1, SCALE)
    record_scene(task)
    names = [path.name.replace("world4", "world3") for path in tmp_path.rglob("*.pcd.bin")]
    assert names
    here = {hashlib.sha256(path.read_bytes()).digest() for path in world.rglob("*.pcd.bin")}
    assert all(hashlib.sha256(path.read_bytes()).digest() not in here for path in tmp_path.rglob("*.pcd.bin"))


def test_a_folder_with_the_same_world_is_left_alone_and_with_another_refused(world, tmp_path):
    assert not synthetic.build_world(world, SCENES, KEYFRAMES, 3, SCALE, workers=1)
    with pytest.raises(synthetic.WorldError, match="differs in seed"):
        synthetic.build_world(world, SCENES, KEYFRAMES, 4, SCALE, workers=1)
    (tmp_path / "something").write_text("mine")
    with pytest.raises(synthetic.WorldError, match="is not empty"):
        synthetic.build_world(tmp_path, SCENES, KEYFRAMES, 3, SCALE, workers=1)


@pytest.mark.parametrize(("count", "val"), [(2, 1), (5, 1), (20, 4)])
def test_a_fifth_of_the_scenes_is_held_out_under_official_names(count, val):
    scenes = synthetic.scenes_of(count)
    assert [split for _, split in scenes].count("val") == val
    for name, split in scenes:
        assert name in scene_names(split)
    assert len({name for name, _ in scenes}) == count


def test_too_many_scenes_are_refused():
    with pytest.raises(synthetic.WorldError, match="--scenes 1000"):
        synthetic.scenes_of(1000)


def test_tables_and_foreign_keys(world, tables):
    assert set(tables) == TABLES
    rows = {name: _by_token(tables[name]) for name in TABLES}
    references = {
        "calibrated_sensor": {"sensor_token": "sensor"},
        "instance": {
            "category_token": "category",
            "first_annotation_token": "sample_annotation",
            "last_annotation_token": "sample_annotation",
        },
        "lidarseg": {"sample_data_token": "sample_data"},
        "sample": {"scene_token": "scene"},
        "sample_annotation": {"sample_token": "sample", "instance_token": "instance"},
        "sample_data": {
            "sample_token": "sample",
            "ego_pose_token": "ego_pose",
            "calibrated_sensor_token": "calibrated_sensor",
        },
        "scene": {"log_token": "log", "first_sample_token": "sample", "last_sample_token": "sample"},
    }
    for table, fields in references.items():
        assert rows[table]
        for row in rows[table].values():
            for field, target in fields.items():
                assert row[field] in rows[target], (table, field)
    for row in tables["sample_annotation"]:
        for attribute in row["attribute_tokens"]:
            assert attribute in rows["attribute"]
    assert [row["name"] for row in sorted(tables["category"], key=lambda r: r["index"])] == list(LIDARSEG_CATEGORIES)
    assert len(tables["sample"]) == SCENES * KEYFRAMES
    assert len(tables["sample_data"]) == 7 * SCENES * KEYFRAMES
    for row in tables["sample_data"]:
        assert (world / row["filename"]).is_file()
        if row["fileformat"] == "jpg":
            with Image.open(world / row["filename"]) as image:
                assert image.size == (row["width"], row["height"])
    for row in tables["map"]:
        assert (world / row["filename"]).is_file()


@pytest.mark.parametrize("table", ["sample", "sample_data", "sample_annotation"])
def test_chains_go_both_ways(tables, table):
    rows = _by_token(tables[table])
    linked = 0
    for token, row in rows.items():
        if row["next"]:
            assert rows[row["next"]]["prev"] == token
            linked += 1
        if row["prev"]:
            assert rows[row["prev"]]["next"] == token
    assert linked


def test_instances_count_their_annotations(tables):
    by_instance = {}
    for row in tables["sample_annotation"]:
        by_instance.setdefault(row["instance_token"], []).append(row["token"])
    for row in tables["instance"]:
        assert row["nbr_annotations"] == len(by_instance[row["token"]])


def test_every_sensor_has_its_own_moment_and_pose(tables):
    poses = _by_token(tables["ego_pose"])
    for sample in tables["sample"]:
        rows = [row for row in tables["sample_data"] if row["sample_token"] == sample["token"]]
        lidar_row = next(row for row in rows if row["fileformat"] == "pcd")
        assert lidar_row["timestamp"] == sample["timestamp"]
        stamps = [row["timestamp"] for row in rows]
        assert len(set(stamps)) == 7
        assert max(abs(stamp - sample["timestamp"]) for stamp in stamps) < rig.SWEEP_MICROSECONDS
        at = np.array(poses[lidar_row["ego_pose_token"]]["translation"])
        moved = [np.linalg.norm(np.array(poses[row["ego_pose_token"]]["translation"]) - at) for row in rows]
        assert sum(distance > 0 for distance in moved) == 6
        assert max(moved) < 1.0


def test_sweeps(world, tables):
    for row, points, labels in _sweeps(world, tables):
        assert 15_000 < len(points) <= len(lidar.HDL_32E.elevations) * lidar.HDL_32E.firings, row["filename"]
        assert len(labels) == len(points)
        assert np.isfinite(points).all()
        ring = points[:, 4]
        assert set(np.unique(ring)) == set(range(32))
        distance = np.linalg.norm(points[:, :3], axis=1)
        assert distance.max() < lidar.HDL_32E.max_range + 1
        elevation = np.degrees(np.arcsin(points[:, 2] / distance))
        np.testing.assert_allclose(elevation, -30.67 + ring * 41.34 / 31, atol=0.02)
        assert points[:, 3].min() >= 0
        assert points[:, 3].max() <= 255
        assert {17, 24} <= set(np.unique(labels))
        own = distance < 1.5
        assert (labels[own] == LIDARSEG_CATEGORIES.index("vehicle.ego")).mean() > 0.95


def test_boxes_hold_the_points_of_their_things(world, tables):
    """Points labelled as a car lie in or just at a car's box, and boxes count their points."""
    poses, calibrations = _by_token(tables["ego_pose"]), _by_token(tables["calibrated_sensor"])
    instances, categories = _by_token(tables["instance"]), _by_token(tables["category"])
    for row, points, labels in _sweeps(world, tables):
        pose, mount = poses[row["ego_pose_token"]], calibrations[row["calibrated_sensor_token"]]
        to_global = rigid_transform(np.array(pose["rotation"]), np.array(pose["translation"])) @ rigid_transform(
            np.array(mount["rotation"]), np.array(mount["translation"])
        )
        xyz = points[:, :3].astype(np.float64) @ to_global[:3, :3].T + to_global[:3, 3]
        close = np.linalg.norm(points[:, :3], axis=1) < 60
        cars = (labels == 17) & close
        covered = np.zeros(len(points), bool)
        for box in tables["sample_annotation"]:
            if box["sample_token"] != row["sample_token"]:
                continue
            frame = rigid_transform(np.array(box["rotation"]), np.array(box["translation"]))
            width, length, height = box["size"]
            local = np.abs(xyz @ frame[:3, :3] - frame[:3, 3] @ frame[:3, :3])
            half = np.array([length, width, height]) / 2
            assert abs(int((local <= half).all(1).sum()) - box["num_lidar_pts"]) <= 1
            if categories[instances[box["instance_token"]]["category_token"]]["name"] == "vehicle.car":
                covered |= (local <= half + 0.15).all(1)
        assert cars.sum() > 100
        assert covered[cars].mean() > 0.99


def test_cameras_and_lidar_see_the_same_surfaces(world, tables):
    """A point that projects into an image has the label that the image shows there, but for edges and parallax."""
    poses, calibrations = _by_token(tables["ego_pose"]), _by_token(tables["calibrated_sensor"])

    def sensor_to_global(row):
        pose, mount = poses[row["ego_pose_token"]], calibrations[row["calibrated_sensor_token"]]
        return rigid_transform(np.array(pose["rotation"]), np.array(pose["translation"])) @ rigid_transform(
            np.array(mount["rotation"]), np.array(mount["translation"])
        )

    agree = seen = 0
    for lidar_row, points, labels in _sweeps(world, tables):
        for row in tables["sample_data"]:
            if row["fileformat"] != "jpg" or row["sample_token"] != lidar_row["sample_token"]:
                continue
            intrinsics = np.array(calibrations[row["calibrated_sensor_token"]]["camera_intrinsic"])
            lidar_to_camera = invert_rigid(sensor_to_global(row)) @ sensor_to_global(lidar_row)
            uv, depth = project(points[:, :3].astype(np.float64), lidar_to_image(intrinsics, lidar_to_camera))
            inside = visible(uv, depth, (row["height"], row["width"]))
            channel = row["filename"].split("/")[1]
            with Image.open(world / "segmentation" / channel / f"{Path(row['filename']).stem}.png") as image:
                shown = np.array(image)
            assert shown.shape == (row["height"] // 4, row["width"] // 4)
            column, line = np.round(uv[inside] / 4 - 0.5).astype(int).T
            line, column = np.clip(line, 0, shown.shape[0] - 1), np.clip(column, 0, shown.shape[1] - 1)
            agree += (shown[line, column] == labels[inside]).sum()
            seen += inside.sum()
    assert seen > 10_000
    assert agree / seen > 0.85


def test_maps_of_categories_and_things_agree_with_the_captions(world, tables):
    captions = json.loads((world / "captions.json").read_text())
    categories = {(entry["scene_name"], entry["number"]): entry["lidarseg_index"] for entry in captions}
    assert len(categories) == len(captions)
    instances = _by_token(tables["instance"])
    boxed = [entry for entry in captions if entry["instance_token"]]
    assert set(instances) <= {entry["instance_token"] for entry in boxed}
    assert any(entry["caption"] == f"a {entry['colour']} car" for entry in boxed)
    for entry in json.loads((world / "annotations_2d.json").read_text()):
        name = f"{entry['camera']}/{Path(entry['filename']).stem}.png"
        with Image.open(world / "segmentation" / name) as image:
            shown = np.array(image)
        with Image.open(world / "things" / name) as image:
            numbers = np.array(image)
        assert numbers.shape == shown.shape
        for number in np.unique(numbers):
            expected = 255 if number == 0 else categories[entry["scene_name"], int(number)]
            assert (shown[numbers == number] == expected).all()
        with Image.open(world / entry["filename"]) as image:
            width, height = image.size
        for thing in entry["objects"]:
            u0, v0, u1, v1 = thing["box"]
            assert 0 <= u0 < u1 <= width
            assert 0 <= v0 < v1 <= height
            assert 12 <= thing["pixels"] <= (u1 - u0) * (v1 - v0)
            assert categories[entry["scene_name"], thing["number"]] == thing["lidarseg_index"]


def test_retrieval_lists(world, tables):
    lengths = {row["sample_token"]: (row["filename"], labels) for row, _, labels in _sweeps(world, tables)}
    for split in ("train", "val"):
        lines = (world / "retrieval" / f"retrieval_anns_{split}.csv").read_text().splitlines()
        assert len(lines) >= 6
        for line in lines:
            sample, where, annotation, points, phrase = line.split(";")
            matches = np.load(world / "retrieval" / annotation)
            filename, labels = lengths[sample]
            assert (where, points) == (split, filename)
            assert matches.dtype == bool
            assert matches.shape == labels.shape
            assert matches.sum() >= 20
            if phrase == "a car":
                np.testing.assert_array_equal(matches, labels == 17)


def test_a_wall_hides_what_is_behind_it():
    """The camera sees a building's front where its plane is, and nothing beyond it."""
    rng = np.random.default_rng(0)
    scene = draw_scene(rng, 1)
    solids = Solids(scene)
    mount = rig.LIDAR_SENSOR.to_ego()
    to_world = sensor_pose(scene, 0.0, mount)
    sweep = lidar.take_sweep(scene, solids, 0.0, to_world, np.random.default_rng(1))
    building = next(t for t in scene.things if t.shape.noun == "building" and (sweep.number == t.number).sum() > 200)
    x, y, yaw = building.motion.poses(np.zeros(1))[0]
    xyz = sweep.points[sweep.number == building.number, :3] @ to_world[:3, :3].T + to_world[:3, 3] - (x, y, 0)
    depth, length, _ = building.shape.size
    along = np.abs(np.cos(yaw) * xyz[:, 0] + np.sin(yaw) * xyz[:, 1]) - length / 2
    across = np.abs(np.cos(yaw) * xyz[:, 1] - np.sin(yaw) * xyz[:, 0]) - depth / 2
    outside = np.maximum(along, across)
    # On the walls (the eaves of the roof stand out a little), give or take the range noise.
    assert np.quantile(np.abs(outside), 0.9) < 3 * lidar.HDL_32E.range_noise
    assert outside.min() > -6 * lidar.HDL_32E.range_noise


def test_rendered_distances_end_on_the_surfaces_the_lidar_measures():
    rng = np.random.default_rng(2)
    scene = draw_scene(rng, 1)
    solids = Solids(scene)
    sensor = rig.CAMERA_SENSORS[0]
    to_world = sensor_pose(scene, 0.0, sensor.to_ego())
    intrinsics, shape = sensor.intrinsics(0.25), rig.image_size(0.25)
    picture = take_picture(scene, solids, None, 0.0, to_world, intrinsics, shape)
    lidar_pose = sensor_pose(scene, 0.0, rig.LIDAR_SENSOR.to_ego())
    sweep = lidar.take_sweep(scene, solids, 0.0, lidar_pose, np.random.default_rng(0))
    to_camera = invert_rigid(to_world) @ lidar_pose
    uv, depth = project(sweep.points[:, :3].astype(np.float64), lidar_to_image(intrinsics, to_camera))
    inside = visible(uv, depth, shape)
    column, line = np.round(uv[inside]).astype(int).T
    same = picture.number[line, column] == sweep.number[inside]
    assert same.mean() > 0.9
    ray = np.stack([(column - intrinsics[0, 2]) / intrinsics[0, 0], (line - intrinsics[1, 2]) / intrinsics[1, 1]])
    shown_depth = picture.distance[line, column] / np.sqrt(1 + (ray**2).sum(0))
    error = np.abs(shown_depth - depth[inside])[same] / depth[inside][same]
    assert np.median(error) < 0.01


def test_ground_is_met_where_the_height_field_is():
    rng = np.random.default_rng(0)
    field = draw_height_field(rng, 0.1)
    directions = rng.normal(size=(3, 4000)).astype(np.float32)
    directions[2] *= 0.2
    directions /= np.linalg.norm(directions, axis=0)
    start = np.array([3.0, -5.0, 0.0], np.float32)
    start[2] = field.height(start[:1], start[1:2])[0] + 1.8
    far = np.full(4000, 90, np.float32)
    distance = trace_ground(field, start[:, None], directions, far)
    hit = np.isfinite(distance)
    place = start[:, None] + distance[hit] * directions[:, hit]
    np.testing.assert_allclose(place[2], field.height(place[0], place[1]), atol=0.02)
    # Nothing was crossed on the way there.
    for share in np.linspace(0.05, 0.95, 19, dtype=np.float32):
        at = start[:, None] + share * distance[hit] * directions[:, hit]
        assert (at[2] - field.height(at[0], at[1]) > -0.02).all()
    # Rays that find no ground stay above it.
    for along in np.linspace(1, 89, 45, dtype=np.float32):
        at = start[:, None] + along * directions[:, ~hit]
        assert (at[2] - field.height(at[0], at[1]) > -0.05).mean() > 0.9995


def test_road_coordinates_undo_positions_on_the_centre_line():
    road = Road((10.0, -4.0), 0.7, 60.0, 7.0, 2.0, 2, 3.5, 0)
    along = np.linspace(-80, 80, 33)
    x, y, heading = road.position(along, np.zeros(33))
    back, lateral = road.coordinates(x, y)
    np.testing.assert_allclose(back, along, atol=1e-9)
    np.testing.assert_allclose(lateral, 0, atol=1e-9)
    tangent = np.arctan2(np.gradient(y, along), np.gradient(x, along))
    np.testing.assert_allclose(np.cos(tangent[1:-1] - heading[1:-1]), 1, atol=1e-3)


def test_footprints_refuse_overlaps_only():
    footprints = Footprints(np.zeros(1))
    footprints.add(Standing(0.0, 0.0, np.pi / 2), (5.0, 1.0))
    assert not footprints.free(Standing(0.0, 4.0, 0.0), (1.0, 1.0), 0.1)
    assert footprints.free(Standing(4.0, 0.0, 0.0), (1.0, 1.0), 0.1)
    assert not footprints.free(Standing(4.0, 0.0, 0.0), (3.5, 1.0), 0.1)


@pytest.mark.parametrize(
    "make",
    [
        objects.car,
        objects.truck,
        objects.bus,
        objects.pedestrian,
        objects.traffic_cone,
        objects.barrier,
        objects.tree,
        objects.hedge,
    ],
)
def test_boxes_enclose_their_shapes(make):
    rng = np.random.default_rng(0)
    for _ in range(8):
        shape = make(rng)
        width, length, height = shape.size
        for part in shape.parts:
            if hasattr(part, "corners"):
                reach = np.abs(part.corners).max(0)
                top = part.corners[:, 2].max()
            else:
                extent = np.abs(part.rotation) @ part.half_extent()
                reach, top = np.abs(part.centre) + extent, part.centre[2] + extent[2]
            if shape.boxed:
                assert reach[0] <= length / 2 + 0.05, shape.caption
                assert reach[1] <= width / 2 + 0.05, shape.caption
            assert top <= height + 0.3, shape.caption


def test_flat_ground_without_waves():
    flat = HeightField(np.zeros(1), np.zeros((1, 2)), np.zeros(1))
    distance = trace_ground(
        flat, np.array([[0], [0], [2.0]], np.float32), np.array([[0.8], [0], [-0.6]], np.float32), np.float32([50])
    )
    np.testing.assert_allclose(distance, 2 / 0.6, rtol=1e-6)


def test_data_prep_build_reads_the_world(world, tmp_path):
    for split in ("train", "val"):
        build_split(world, VERSION, split, tmp_path / "records", skip_errors=False, workers=1)
        source = RecordSource(tmp_path / "records", split)
        assert len(source) == KEYFRAMES
        frame = source[0]
        assert len(frame.images) == len(CAMERAS)
        assert frame.points.shape == (len(frame.lidarseg), 5)
        assert frame.scene_name in scene_names(split)
