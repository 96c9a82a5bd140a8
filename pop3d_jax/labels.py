"""The occupancy and semantic grids that training and evaluation compare with, made from lidar points.

Lidar frame, metres; grids are uint8, indexed [x, y, z]. All functions run inside a jitted step for one sample
(use `jax.vmap` for a batch); points of padding carry False in the mask; volumes and labels are static. Voxels
are the official ones bit for bit, see `pop3d_jax.voxels`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from pop3d_jax.nuscenes import EMPTY, IGNORE, UNLABELLED
from pop3d_jax.voxels import Volume, contains_point, crossed_by_rays, in_range, voxel_indices

FREE, OCCUPIED = 0, 1


def majority_label(
    indices: Int32[Array, "points 3"],
    labels: UInt8[Array, " points"],
    mask: Bool[Array, " points"],
    fill: UInt8[Array, "x y z"],
) -> UInt8[Array, "x y z"]:
    """The most frequent label of the points in each voxel; ties go to the lowest label (`nb_process_label`).

    Args:
      indices: voxel of each point.
      fill: the labels of voxels without a point.

    Counts are exact up to 2**23 points in a voxel (the official counters overflow at 65536).
    """
    voxels = fill.size
    flat = (indices[:, 0] * fill.shape[1] + indices[:, 1]) * fill.shape[2] + indices[:, 2]
    # Points of one voxel and label become neighbours; a point's place in its run counts it, the last counts
    # all.
    key = jnp.sort(jnp.where(mask, flat, voxels) * 256 + labels.astype(jnp.int32))
    place = jnp.arange(key.shape[0], dtype=jnp.int32)
    starts = (place == 0) | (key != jnp.roll(key, 1))
    count = place - jax.lax.cummax(jnp.where(starts, place, 0)) + 1
    score = count * 256 + (255 - (key & 255))
    best = jnp.zeros(voxels, jnp.int32).at[key >> 8].max(score, mode="drop").reshape(fill.shape)
    return jnp.where(best > 0, (255 - (best & 255)).astype(jnp.uint8), fill)


def occupancy_tpvformer(
    points: Float32[Array, "points 3"], mask: Bool[Array, " points"], volume: Volume
) -> UInt8[Array, "x y z"]:
    """The training target: 1 where a point lies, else 0 (`prepare_gt_occupancy_tpvformer`, class-agnostic).

    As official, unobserved voxels count as free, nothing is ignored, and points outside count in the border
    voxels.
    """
    return contains_point(points, mask, volume).astype(jnp.uint8)


def semantic_majority(
    points: Float32[Array, "points 3"],
    classes: UInt8[Array, " points"],
    mask: Bool[Array, " points"],
    volume: Volume,
    empty_label: int = EMPTY,
) -> UInt8[Array, "x y z"]:
    """Majority class of all points, also those clipped into the border; `empty_label` where there is none."""
    fill = jnp.full(volume.grid_size, empty_label, jnp.uint8)
    return majority_label(voxel_indices(points, volume), classes, mask, fill)


def semantic_rays(
    points: Float32[Array, "points 3"],
    classes: UInt8[Array, " points"],
    mask: Bool[Array, " points"],
    volume: Volume,
    *,
    crossed: Bool[Array, "x y z"] | None = None,
    empty_label: int = EMPTY,
    ignore_label: int = IGNORE,
    unlabelled_label: int = UNLABELLED,
) -> UInt8[Array, "x y z"]:
    """The semantic evaluation target (`prepare_gt_occupancy_also` on the class labels).

    Majority class of the points inside the volume, with `unlabelled_label` counted as `ignore_label` (which
    may win); else `empty_label` where a ray passed; else `ignore_label`.

    Args:
      crossed: the result of `crossed_by_rays` when the caller has it already.
    """
    crossed = crossed_by_rays(points, mask, volume) if crossed is None else crossed
    fill = jnp.where(crossed, jnp.uint8(empty_label), jnp.uint8(ignore_label))
    classes = jnp.where(classes == unlabelled_label, jnp.uint8(ignore_label), classes)
    return majority_label(voxel_indices(points, volume), classes, mask & in_range(points, volume), fill)


def occupancy_rays(
    points: Float32[Array, "points 3"],
    mask: Bool[Array, " points"],
    volume: Volume,
    *,
    crossed: Bool[Array, "x y z"] | None = None,
    ignore_label: int = IGNORE,
) -> UInt8[Array, "x y z"]:
    """Class-agnostic: 1 where a point inside the volume lies, 0 where a ray passed, else `ignore_label`."""
    crossed = crossed_by_rays(points, mask, volume) if crossed is None else crossed
    unoccupied = jnp.where(crossed, jnp.uint8(FREE), jnp.uint8(ignore_label))
    return jnp.where(contains_point(points, mask & in_range(points, volume), volume), jnp.uint8(OCCUPIED), unoccupied)


def occupancy_eval(
    semantic_rays: UInt8[Array, "x y z"],
    semantic_majority: UInt8[Array, "x y z"],
    *,
    empty_label: int = EMPTY,
    ignore_label: int = IGNORE,
    unlabelled_label: int = UNLABELLED,
) -> UInt8[Array, "x y z"]:
    """Target of the official occupancy IoU over all voxels (`eval.py`, `vox_agn_all`).

    0 where `semantic_rays` is empty; 1 where it has a class or the majority of all points is unlabelled (so
    unlabelled voxels count as occupied); `ignore_label` elsewhere.
    """
    occupied = (semantic_rays != ignore_label) | (semantic_majority == unlabelled_label)
    target = jnp.where(occupied, jnp.uint8(OCCUPIED), jnp.uint8(ignore_label))
    return jnp.where(semantic_rays == empty_label, jnp.uint8(FREE), target)


def evaluation_labels(
    points: Float32[Array, "points 3"],
    classes: UInt8[Array, " points"],
    mask: Bool[Array, " points"],
    volume: Volume,
) -> dict[str, UInt8[Array, "x y z"]]:
    """All grids that evaluation compares with, rays traced once, with the labels of `pop3d_jax.nuscenes`.

    Returns:
      `semantic_majority`, `semantic_rays`, `occupancy_rays` and `occupancy_eval`, as the functions of these
      names.
    """
    crossed = crossed_by_rays(points, mask, volume)
    majority = semantic_majority(points, classes, mask, volume)
    rays = semantic_rays(points, classes, mask, volume, crossed=crossed)
    return {
        "semantic_majority": majority,
        "semantic_rays": rays,
        "occupancy_rays": occupancy_rays(points, mask, volume, crossed=crossed),
        "occupancy_eval": occupancy_eval(rays, majority),
    }
