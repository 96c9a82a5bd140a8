"""True dense labels of the synthetic world: exact on hand-made scenes, and around every noise-free return."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from data_prep import dense_labels
from data_prep.boxes import write_split_boxes
from data_prep.dense_labels import key_frames_as_recorded, label_world, read_world
from data_prep.nuscenes_tables import read_tables
from data_prep.split_build import build_split
from data_prep.synthetic import WorldError
from data_prep.world import objects
from data_prep.world.ground import GRASS, ROAD, SIDEWALK, Ground, HeightField, Road
from data_prep.world.lidar import HDL_32E
from data_prep.world.motion import Standing
from data_prep.world.objects import Shape
from data_prep.world.parts import Material, box, ellipsoid, frustum
from data_prep.world.recorded_scene import RecordedScene, SceneTask
from data_prep.world.recording import VERSION, record_scene
from data_prep.world.scene import Scene, Thing
from data_prep.world.solids import Solids
from data_prep.world.tables import write_tables
from data_prep.world.truth import SPACING, true_semantics
from pop3d_jax.data.records import RecordSource
from pop3d_jax.geometry import apply_rigid, invert_rigid
from pop3d_jax.nuscenes import LIDARSEG_TO_CLASS
from pop3d_jax.occ3d.accumulated import AccumulatedGroundTruth
from pop3d_jax.occ3d.grid import FREE, OCC3D_VOLUME
from pop3d_jax.occ3d.visibility import cell_indices
from pop3d_jax.voxels import Volume

CAR, TREE, WALL = 17, 30, 28
# Voxels of 0.4 m; the ground, at z = 0, runs through the middle of the lowest layer.
VOLUME = Volume((-4.0, -4.0, -0.2), (4.0, 4.0, 3.0), (20, 20, 8))


def _scene(*things):
    """Level ground with a road of 2 m to each side along x, pavement of 0.8 m, grass; the own car above it all."""
    field = HeightField(np.zeros(1), np.array([[0.01, 0.0]]), np.zeros(1))
    road = Road((0.0, 0.0), 0.0, np.inf, 2.0, 0.8, 1, 2.0, 0)
    ground = Ground(field, (road,), np.full((2, 1), GRASS), 30.0, np.zeros((4, 3)), False)
    numbered = tuple(
        Thing(GRASS + 1 + i, Shape("thing", "", "", raw, True, (1, 1, 1), parts), Standing(x, y, yaw))
        for i, (raw, parts, (x, y, yaw)) in enumerate(things)
    )
    own_car = Thing(99, objects.own_car(), Standing(0.0, 0.0, 0.0))
    return Scene(ground, None, numbered, own_car, np.zeros((2, 4)))


def _truth(*things, volume=VOLUME):
    scene = _scene(*things)
    return true_semantics(scene, Solids(scene), 0.0, volume)


def _ground():
    """Labels of the bare ground: columns of voxels along y, 0.4 m each."""
    expected = np.full(VOLUME.grid_size, FREE, np.uint8)
    across = np.abs(np.arange(20) * 0.4 - 3.8)
    expected[:, :, 0] = np.where(across < 2, 11, np.where(across < 2.8, 13, 14))
    return expected


def _box(low, high):
    low, high = np.array(low), np.array(high)
    return box(tuple((low + high) / 2), tuple(high - low), Material.PAINT, (0, 0, 0))


def test_level_ground_has_one_layer_of_its_surfaces_and_the_own_car_is_not_there():
    np.testing.assert_array_equal(_truth(), _ground())
    assert {ROAD, SIDEWALK, GRASS} == {1, 2, 3}


def test_a_solid_has_its_faces_and_is_free_inside_and_the_ground_below_it_is_hidden():
    # From 0.1 into the voxels, so that every face runs through the middle of voxels.
    low, high = (1.3, -0.9, -0.5), (3.3, 1.1, 1.9)
    expected = _ground()
    first, last = np.floor((np.array(low) + (4, 4, 0.2)) / 0.4 + 1e-9), np.floor((np.array(high) + (4, 4, 0.2)) / 0.4)
    (x0, y0, _), (x1, y1, z1) = first.astype(int), last.astype(int)
    block = np.s_[x0 : x1 + 1, y0 : y1 + 1, : z1 + 1]
    top = expected[block].copy()
    expected[block] = LIDARSEG_TO_CLASS[CAR]
    expected[x0 + 1 : x1, y0 + 1 : y1, :z1] = FREE
    # In the lowest layer the ring of voxels holds ground beside the solid and its side above the ground: 0.3 by 0.4 or
    # 0.1 by 0.4 of ground against 0.2 by 0.4 of the side; the larger area decides.
    found = _truth((CAR, (_box(low, high),), (0.0, 0.0, 0.0)))
    ring = np.ones(top.shape[:2], bool)
    ring[1:-1, 1:-1] = False
    np.testing.assert_array_equal(found[..., 1:], expected[..., 1:])
    assert set(found[block][..., 0][ring]) <= {11, 4}
    assert (found[block][..., 0][~ring] == FREE).all()


def test_touching_solids_have_no_surface_between_them():
    lower, upper = _box((-1.1, -1.1, -1.0), (1.1, 1.1, 1.3)), _box((-1.1, -1.1, 1.3), (1.1, 1.1, 2.3))
    whole = _truth((WALL, (_box((-1.1, -1.1, -1.0), (1.1, 1.1, 2.3)),), (0.0, 0.0, 0.0)))
    np.testing.assert_array_equal(_truth((WALL, (lower, upper), (0.0, 0.0, 0.0))), whole)
    assert whole[10, 10, 3] == FREE


def test_a_turned_thing_turns_its_voxels():
    part = _box((1.3, -0.5, 0.5), (3.3, 0.7, 1.9))
    straight = _truth((CAR, (part,), (0.0, 0.0, 0.0)))
    turned = _truth((CAR, (part,), (0.0, 0.0, np.pi / 2)))
    np.testing.assert_array_equal(turned[..., 1:], np.rot90(straight[..., 1:]))


@pytest.mark.parametrize(
    "part",
    [
        ellipsoid((0.3, -0.2, 1.4), (1.1, 0.8, 0.7), Material.LEAVES, (0, 0, 0)),
        frustum((0.3, -0.2, 0.73), 1.1, 0.5, 1.5, Material.BARK, (0, 0, 0)),
    ],
)
def test_round_parts_occupy_the_voxels_that_have_an_inside_and_an_outside(part):
    found = _truth((TREE, (part,), (0.0, 0.0, 0.0)))[..., 1:] != FREE
    # 11 x 11 x 11 places in every voxel, borders among them.
    steps = [np.linspace(0, 0.4, 11) + low for low in (-4.0, -4.0, 0.2)]
    axes = [(np.arange(n)[:, None] * 0.4 + step).reshape(-1) for n, step in zip((20, 20, 7), steps, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    x, y, z = x - part.centre[0], y - part.centre[1], z - part.centre[2]
    a, b, c = part.dims
    if part.half_extent() is part.dims:
        inside = (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 <= 1
    else:
        inside = (np.abs(z) <= c) & (np.hypot(x, y) <= (a + b) / 2 + (b - a) / (2 * c) * z)
    inside = inside.reshape(20, 11, 20, 11, 7, 11).transpose(0, 2, 4, 1, 3, 5).reshape(20, 20, 7, -1)
    mixed = inside.any(-1) & ~inside.all(-1)
    # Either lattice may miss what is cut off a corner: a few voxels, never one in the thick of it.
    assert mixed.sum() > 50
    assert (mixed != found).mean() < 0.004
    deep = (inside.mean(-1) > 0.05) & (inside.mean(-1) < 0.95)
    assert found[deep].all()


def test_a_finer_spacing_only_adds_voxels_cut_at_a_corner():
    scene = _scene((TREE, (ellipsoid((0.3, -0.2, 1.4), (1.1, 0.8, 0.7), Material.LEAVES, (0, 0, 0)),), (0, 0, 0.3)))
    coarse, fine = (true_semantics(scene, Solids(scene), 0.0, VOLUME, spacing) != FREE for spacing in (0.05, 0.0125))
    assert (fine & ~coarse).sum() < 0.05 * fine.sum()
    assert (coarse & ~fine).sum() <= 2


@pytest.fixture(scope="module")
def noise_free(tmp_path_factory):
    """(recorded scene, its key frames, tables' rows, accumulated ground truth) of sweeps without noise."""
    root = tmp_path_factory.mktemp("noise_free")
    lidar = dataclasses.replace(HDL_32E, range_noise=0.0)
    task = SceneTask(root / "world", 3, 0, "scene-0003", "val", 3, 0.05)
    write_tables(task.root, [record_scene(task, lidar)])
    build_split(task.root, VERSION, "val", root / "records", skip_errors=False, workers=1)
    boxes = write_split_boxes(task.root, VERSION, "val", root / "records")
    accumulated = AccumulatedGroundTruth(RecordSource(root / "records", "val"), boxes)
    recorded = RecordedScene(task, lidar)
    rows = read_tables(task.root, VERSION, "val").scenes[0].key_frames
    return recorded, key_frames_as_recorded(recorded, rows), rows, accumulated


def _near_occupied(points, occupied, reach):
    """Whether a voxel that the cube of half side `reach` around a point meets is occupied."""
    near = np.zeros(len(points), bool)
    for offset in itertools.product((-reach, reach), repeat=3):
        voxels = cell_indices(points + np.array(offset), OCC3D_VOLUME)
        near |= (voxels >= 0) & occupied.reshape(-1)[voxels]
    return near


@pytest.mark.slow
def test_every_accumulated_noise_free_point_lies_within_a_spacing_of_a_truly_occupied_voxel(noise_free):
    """The rule: a point above the ground lies on the surface, so a sample lies within SPACING of it.

    What moved with its box over sloping ground may have come to lie below the ground, where no surface is.
    """
    recorded, frames, rows, accumulated = noise_free
    for frame, row in zip(frames, rows, strict=True):
        occupied = true_semantics(recorded.scene, recorded.solids, frame.time) != FREE
        ego_to_world = recorded.scene.ego_to_world(frame.time)
        count = off = 0
        for points, _ in accumulated.placed_points(row.sample_token):
            inside = (np.abs(points - (0, 0, 2.2)) < (40 - SPACING, 40 - SPACING, 3.2 - SPACING)).all(1)
            world = apply_rigid(ego_to_world, points[inside])
            above = world[:, 2] > recorded.scene.ground.field.height(world[:, 0], world[:, 1]) - 0.01
            points = points[inside][above]
            assert _near_occupied(points, occupied, SPACING).all()
            count += len(points)
            off += (~occupied.reshape(-1)[cell_indices(points, OCC3D_VOLUME)]).sum()
        assert count > 20_000
        # Of the points themselves few lie in voxels of which the surface cuts off a corner.
        assert off < 0.002 * count


def test_labels_and_masks_of_accumulated_noise_free_sweeps_are_the_true_ones(noise_free):
    recorded, frames, rows, accumulated = noise_free
    truth = dense_labels.dense_frame(recorded, frames, 1, rows[1])
    ours = accumulated[rows[1].sample_token]
    both = (truth.semantics != FREE) & (ours.semantics != FREE)
    assert (ours.semantics == truth.semantics)[both].mean() > 0.97
    assert (ours.mask_lidar != truth.mask_lidar).mean() < 1e-3
    assert 0.1 < truth.mask_camera.mean() < 0.9
    # The insides of solids and what lies below the ground is seen by nobody.
    assert not (truth.mask_camera[..., 0] & (truth.semantics[..., 0] == FREE)).all()


@pytest.mark.slow
def test_the_command_writes_occ3ds_layout(small_world, tmp_path):
    assert label_world(small_world, "val", tmp_path / "gts", workers=1) == 2
    samples = json.loads((small_world / VERSION / "sample.json").read_text())
    scenes = {row["token"]: row["name"] for row in json.loads((small_world / VERSION / "scene.json").read_text())}
    expected = {(scenes[row["scene_token"]], row["token"]) for row in samples}
    found = sorted((tmp_path / "gts").glob("*/*/*"))
    assert len(found) == 2
    for path in found:
        assert path.name == "labels.npz"
        assert (path.parent.parent.name, path.parent.name) in expected
        labels = np.load(path)
        assert set(labels.files) == {"semantics", "mask_lidar", "mask_camera"}
        assert {(labels[name].shape, labels[name].dtype) for name in labels.files} == {
            ((200, 200, 16), np.uint8().dtype)
        }
        assert labels["semantics"].max() == FREE
        for mask in ("mask_lidar", "mask_camera"):
            assert set(np.unique(labels[mask])) == {0, 1}


def _copy(world, tmp_path):
    return shutil.copytree(world, tmp_path / "world")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, r"sample \w+ of scene-0003 was not recorded as world.json draws it \(differs: timestamp"),
        ({"keyframes": 3}, "has 2 key frames in its tables, 3 drawn"),
        ({"complete": False}, "is not finished"),
        ({"generator_version": 0}, "was written by generator 0"),
        ({"layout": "pandaset"}, "has the layout pandaset"),
    ],
)
def test_another_world_than_the_recorded_one_is_refused(small_world, tmp_path, change, message):
    world = _copy(small_world, tmp_path)
    content = json.loads((world / "world.json").read_text())
    (world / "world.json").write_text(json.dumps(content | change))
    with pytest.raises(WorldError, match=message):
        label_world(world, "val", tmp_path / "gts", workers=1)
    assert not (tmp_path / "gts").exists()


def test_changed_poses_and_sweeps_are_named(small_world, tmp_path):
    world = _copy(small_world, tmp_path)
    path = world / VERSION / "calibrated_sensor.json"
    rows = json.loads(path.read_text())
    for row in rows:
        row["translation"][0] += 0.001
    path.write_text(json.dumps(rows))
    with pytest.raises(WorldError, match=r"differs: lidar_to_ego, lidar_to_camera\)"):
        label_world(world, "val", tmp_path / "gts", workers=1)
    sweep = next((small_world / "samples" / "LIDAR_TOP").iterdir())
    world = shutil.copytree(small_world, tmp_path / "other")
    for file in (world / "samples" / "LIDAR_TOP").iterdir():
        file.write_bytes(sweep.read_bytes()[:-20])
    with pytest.raises(WorldError, match=r"differs: the sweep samples/LIDAR_TOP/"):
        label_world(world, "val", tmp_path / "gts", workers=1)


def test_a_folder_without_a_world_is_refused(tmp_path):
    with pytest.raises(WorldError, match=r"holds no world.json: write a world with python -m data_prep.synthetic"):
        read_world(tmp_path)
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(WorldError, match="is damaged"):
        read_world(tmp_path)


def test_the_voxel_of_a_place_in_the_world_is_where_the_thing_is(noise_free):
    """Against the recorder: returns of the sweep, not the truth's own geometry, tell where things are."""
    recorded, frames, _, _ = noise_free
    frame = frames[2]
    semantics = true_semantics(recorded.scene, recorded.solids, frame.time)
    points = apply_rigid(
        invert_rigid(recorded.scene.ego_to_world(frame.time)) @ frame.lidar_to_world, frame.sweep.points[:, :3]
    )
    foreign = frame.sweep.number != recorded.scene.own_car.number
    voxels = cell_indices(points[foreign], OCC3D_VOLUME)
    labels = LIDARSEG_TO_CLASS[frame.sweep.lidarseg[foreign]][voxels >= 0]
    assert (semantics.reshape(-1)[voxels[voxels >= 0]] == labels).mean() > 0.96
