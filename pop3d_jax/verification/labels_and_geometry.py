"""Voxels, occupancy and semantic grids, visible points, projections, and the official split lists."""

import hashlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from data_prep.nuscenes_tables import read_tables
from data_prep.splits import SPLITS_OF_VERSION, scene_names
from pop3d_jax import geometry
from pop3d_jax import labels as voxel_labels
from pop3d_jax.data.visibility import visible_pairs
from pop3d_jax.nuscenes import CAMERAS, LIDARSEG_TO_CLASS
from pop3d_jax.verification.checks import Check, absolute, exact, relative
from pop3d_jax.verification.golden_model import GoldenFile, golden_arrays, golden_json
from pop3d_jax.voxels import (
    Volume,
    crossed_by_rays,
    grid_coordinates,
    grid_coordinates_float64,
    in_range,
    voxel_indices,
)

_GRIDS = ("occupancy_tpvformer", "semantic_majority", "semantic_rays", "occupancy_rays", "occupancy_eval")


def labels(golden_file: GoldenFile) -> Iterator[Check]:
    """Every grid of `labels.npz`, exactly, and what the grids are made from."""
    golden = golden_arrays(golden_file("pop3d/labels.npz"))
    limits = (tuple(golden["volume_min"].tolist()), tuple(golden["volume_max"].tolist()))
    volume = Volume(*limits, tuple(golden["grid_size"].tolist()))
    points, classes = golden["points_xyz"], golden["point_label_cls"]
    yield exact("point_label_cls", LIDARSEG_TO_CLASS[golden["point_label_raw"]], classes)
    coordinates = grid_coordinates_float64(points, volume)
    yield exact("grid_ind_float", coordinates, golden["grid_ind_float"])
    on_device = jax.jit(grid_coordinates, static_argnums=1)(jnp.asarray(points), volume)
    tolerance = 3 * float(np.spacing(np.float32(max(volume.grid_size))))
    name = "grid_ind_float, float32 on the device"
    yield absolute(name, np.asarray(on_device), golden["grid_ind_float"], tolerance)
    cells = np.asarray(jax.jit(voxel_indices, static_argnums=1)(jnp.asarray(points), volume))
    yield exact("grid_ind_float, voxels", cells, np.floor(golden["grid_ind_float"]), "points in another voxel")
    inside = np.unpackbits(golden["in_range"])[: len(points)].astype(bool)
    yield exact("in_range", np.asarray(jax.jit(in_range, static_argnums=1)(jnp.asarray(points), volume)), inside)
    yield from _grids(golden, volume)

    pairs, expected = golden["tie_pairs"], golden["tie_grid"]
    fill = jnp.full(expected.shape, int(golden["tie_empty_label"]), jnp.uint8)
    cells, votes = jnp.asarray(pairs[:, :3], jnp.int32), jnp.asarray(pairs[:, 3], jnp.uint8)
    tied = voxel_labels.majority_label(cells, votes, jnp.ones(len(pairs), bool), fill)
    yield exact("tie_grid", np.asarray(tied), expected, "voxels that differ")
    yield from _visible_points(golden, volume)


def projections(golden_file: GoldenFile) -> Iterator[Check]:
    """Calibration and projection of the real key frame, from its tables and sweep to pixels, per camera."""
    source = golden_file("nuscenes/nuscenes_keyframe")
    golden = golden_arrays(golden_file("nuscenes/projection.npz"))
    version = next(source.glob("v1.0-*")).name
    names = {scene["name"] for scene in golden_json(source / version / "scene.json")}
    split = next(split for split in SPLITS_OF_VERSION[version] if names & set(scene_names(split)))
    row = read_tables(source, version, split).scenes[0].key_frames[0]
    points = np.fromfile(source / row.lidar_file, np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
    image_hw = tuple(int(size) for size in golden["image_hw"])
    yield exact("image_hw", np.asarray(row.image_sizes), np.asarray([image_hw] * len(CAMERAS)))
    yield absolute("lidar2ego", row.lidar_to_ego, golden["lidar2ego"], 1e-15)
    official = golden["ego2global_LIDAR_TOP"]
    yield absolute("ego2global_LIDAR_TOP, rotation", row.ego_to_global[:3, :3], official[:3, :3], 1e-15)
    yield relative("ego2global_LIDAR_TOP, translation", row.ego_to_global[:3, 3], official[:3, 3], 1e-15)
    matrices = geometry.lidar_to_image(row.intrinsics, row.lidar_to_camera)
    for camera, matrix, lidar_to_camera in zip(CAMERAS, matrices, row.lidar_to_camera, strict=True):
        # Equal bit for bit where the linear algebra library is the same; another may round the last bit otherwise.
        yield absolute(f"lidar2cam_{camera}", lidar_to_camera, golden[f"lidar2cam_{camera}"], 1e-12)
        yield absolute(f"lidar2img_{camera}", matrix, golden[f"lidar2img_{camera}"], 1e-9)
        uv, depth = geometry.project(points, matrix)
        seen = np.flatnonzero(geometry.visible(uv, depth, image_hw))
        yield exact(f"points64_{camera}", seen, golden[f"points64_{camera}"])
        # The official float32 pipeline rounds the cloud on its way through global coordinates: what lies within a tenth
        # of a pixel of the border, or a millimetre of the least depth, may be seen there and not here.
        official = golden[f"points_{camera}"]
        unclear = np.setxor1d(seen, official)
        last = np.asarray(image_hw[::-1]) - 1.0
        margin = np.minimum(uv[unclear], last - uv[unclear]).min(axis=1, initial=np.inf)
        turned = np.sum((np.abs(margin) > 0.1) & (np.abs(depth[unclear] - 1.0) > 1e-3))
        yield Check(f"points_{camera}", 0.0, float(turned), f"clear points that differ, {len(unclear)} unclear ones do")
        yield exact(f"pixels64_{camera}", np.round(uv[seen][:, ::-1]), golden[f"pixels64_{camera}"])
        yield absolute(f"uv64_{camera}", uv[seen], golden[f"uv64_{camera}"], 1e-9)
        yield absolute(f"depth64_{camera}", depth[seen], golden[f"depth64_{camera}"], 1e-11)
        # The official float32 pipeline rounds the cloud on its way through global coordinates.
        yield absolute(f"uv_{camera}", uv[official], golden[f"uv_{camera}"], 0.1, "pixels")


def split_lists(golden_file: GoldenFile) -> Iterator[Check]:
    """Number, names and order of the scenes of every split, against the devkit's hashes."""
    splits = golden_json(golden_file("nuscenes/devkit_eval.json"))["splits"]
    for split in (split for of_version in SPLITS_OF_VERSION.values() for split in of_version):
        names = scene_names(split)
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        ours, official = (len(names), digest), (splits[split]["count"], splits[split]["sha256_in_devkit_order"])
        yield exact(f"scenes of {split}", np.asarray(ours), np.asarray(official), "count and SHA-256 that differ")


def _grids(golden: dict[str, np.ndarray], volume: Volume) -> Iterator[Check]:
    """The grids, by one compiled function with padded points, as in a training step."""
    empty, ignore, unlabelled = (int(golden[f"{name}_label"]) for name in ("empty", "ignore", "unlabelled"))

    @jax.jit
    def everything(points, classes, mask):
        majority = voxel_labels.semantic_majority(points, classes, mask, volume, empty)
        names = {"ignore_label": ignore, "empty_label": empty, "unlabelled_label": unlabelled}
        crossed = crossed_by_rays(points, mask, volume)
        rays = voxel_labels.semantic_rays(points, classes, mask, volume, crossed=crossed, **names)
        return {
            "occupancy_tpvformer": voxel_labels.occupancy_tpvformer(points, mask, volume),
            "semantic_majority": majority,
            "semantic_rays": rays,
            "occupancy_rays": voxel_labels.occupancy_rays(points, mask, volume, ignore_label=ignore),
            "occupancy_eval": voxel_labels.occupancy_eval(rays, majority, **names),
        }

    count, padding = len(golden["points_xyz"]), ((0, 500), (0, 0))
    points = np.pad(golden["points_xyz"], padding, constant_values=7.0)
    classes = np.pad(golden["point_label_cls"], padding[0], constant_values=3)
    grids = everything(jnp.asarray(points), jnp.asarray(classes), jnp.arange(count + 500) < count)
    for name in _GRIDS:
        yield exact(name, np.asarray(grids[name]), golden[name], "voxels that differ")
    ties = golden["tied_voxel_index"]
    majority, expected = (np.asarray(grid).reshape(-1)[ties] for grid in (grids[_GRIDS[1]], golden[_GRIDS[1]]))
    yield exact("tied_voxel_index", majority, expected, "voxels decided by a tie that differ")


def _visible_points(golden: dict[str, np.ndarray], volume: Volume) -> Iterator[Check]:
    """Pairs of points and cameras, their pixels and grid coordinates."""
    index, camera, pixel = visible_pairs(
        golden["points_xyz"],
        golden["camera_intrinsics"],
        golden["lidar2cam"],
        tuple(golden["image_hw"].tolist()),
        float(golden["projection_min_depth"]),
    )
    yield exact("matching_points", index, golden["matching_points"])
    yield exact("matching_pixels_row_col", pixel, golden["matching_pixels_row_col"])
    counts = np.bincount(camera, minlength=len(golden["camera_names"]))
    yield exact("matching_counts_per_camera", counts, golden["matching_counts_per_camera"])
    coordinates = grid_coordinates_float64(golden["points_xyz"][index], volume).astype(np.float32)
    yield exact("grid_ind_float_features", coordinates, golden["grid_ind_float_features"])
