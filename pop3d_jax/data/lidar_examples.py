"""One key frame to the arrays of ScaLR: for distillation from one camera, for segmentation, for evaluation."""

import dataclasses

import numpy as np
from jaxtyping import Float32, UInt8

from pop3d_jax.data.batches import Batch, pad, spread
from pop3d_jax.data.neighbors import IMPLEMENTATIONS, nearest_neighbors
from pop3d_jax.data.pipeline import decode_image
from pop3d_jax.data.point_augment import augment_distillation, augment_downstream, draw_point_augmentation
from pop3d_jax.data.point_clouds import (
    FieldOfView,
    grid_cells,
    in_field_of_view,
    nearest,
    nearest_kept,
    pixel_pairs,
    point_features,
    resize_image,
    resized_pixels,
    thin,
)
from pop3d_jax.data.records import KeyFrame, RecordError
from pop3d_jax.geometry import lidar_to_image
from pop3d_jax.lidar_datasets import LidarDataset
from pop3d_jax.nuscenes import IGNORE

_FULL_SCALE = (10**5, 10**5)


@dataclasses.dataclass(frozen=True)
class LidarSettings:
    """How one key frame becomes arrays of fixed shape. The defaults are those of ScaLR's published configurations.

    Attributes:
      capacity: rows of the arrays of points. Points beyond it are left out and counted.
      raw_capacity: rows of the arrays of the whole sweep, in evaluation.
      max_points: in training, the nearest so many to a random point are kept: an official rule, not a loss.
      voxel_size: metres; one point of each voxel is kept. 0 keeps all.
      field_of_view: smallest and largest corner, metres, of the box that the network sees.
      projection_axes: the axis that each 2D grid leaves out.
      grid_shapes: rows and columns of each 2D grid.
      neighbors: how many nearest neighbours a point has, itself apart.
      neighbor_search: "kd_tree" puts `neighbors` into the batch; "all_pairs" puts `points` there instead, and the step
        calls `nearest_neighbors`.
      image_hw: height and width of the teacher's image, whatever the camera's aspect ratio.
      antialias: whether the image is resized with antialiasing, see `point_clouds.resize_image`.
      labelled: False takes sweeps without labels for segmentation, to predict only: all their points are ignored.
    """

    capacity: int = 20_000
    raw_capacity: int = 40_960
    max_points: int = 20_000
    voxel_size: float = 0.1
    field_of_view: FieldOfView = ((-64.0, -64.0, -8.0), (64.0, 64.0, 8.0))
    projection_axes: tuple[int, ...] = (2, 1, 0)
    grid_shapes: tuple[tuple[int, int], ...] = ((256, 256), (256, 32), (256, 32))
    neighbors: int = 16
    neighbor_search: str = "kd_tree"
    image_hw: tuple[int, int] = (224, 448)
    antialias: bool = False
    labelled: bool = True

    def __post_init__(self) -> None:
        if self.neighbor_search not in IMPLEMENTATIONS:
            raise ValueError(
                f"neighbor_search is {self.neighbor_search!r}; known implementations: {', '.join(IMPLEMENTATIONS)}"
            )
        if len(self.projection_axes) != len(self.grid_shapes):
            raise ValueError(f"{len(self.projection_axes)} projection_axes and {len(self.grid_shapes)} grid_shapes")


def make_distillation_example(
    key_frame: KeyFrame,
    dataset: LidarDataset,
    settings: LidarSettings,
    rng: np.random.Generator | None,
    *,
    camera: int | None = None,
) -> Batch:
    """What one random camera of a key frame sees, and the points it sees it at.

    Args:
      key_frame: the record.
      dataset: whose it is.
      settings: sizes, capacities and rules.
      rng: source of all draws; None takes the first point of each voxel, all of them, and augments nothing.
      camera: index of the camera; drawn by default.

    Returns:
      point_features [n, 5] float32, as `point_clouds.FEATURES` names them; cells [axes, n] int32; point_mask [n];
      neighbors [n, k + 1] int32, or points [n, 3] float32 where the step searches; images [1, h, w, 3] uint8 RGB;
      feature_cameras [n] int32, all 0; feature_pixels [n, 2] float32, (row, column) of the pixel's centre as shares of
      the image; feature_mask [n], which is point_mask; points_left_out, how many did not fit. A camera that sees no
      point gives an example of which every row is masked.

    Raises:
      ValueError: an image cannot be decoded, or a coordinate is not finite; names the sample.
      RecordError: the record has other cameras than the data set.
      TypeError: neither `rng` nor `camera`.
    """
    if len(key_frame.images) != len(dataset.cameras):
        raise RecordError(
            f"sample {key_frame.sample_token} has {len(key_frame.images)} images, data set {dataset.name} has the "
            f"cameras {', '.join(dataset.cameras)}: are these records of another data set?"
        )
    if camera is None:
        if rng is None:
            raise TypeError("without a generator the camera must be given")
        camera = int(rng.integers(len(dataset.cameras)))
    name = f"sample {key_frame.sample_token}, {dataset.cameras[camera]}"
    image, full_hw = decode_image(key_frame.images[camera], _FULL_SCALE, name)

    recorded = key_frame.points[:, :3]
    kept = _thinned(key_frame, recorded, settings, rng)
    matrix = lidar_to_image(key_frame.intrinsics[camera], key_frame.lidar_to_camera[camera])
    seen, pixels = pixel_pairs(recorded[kept], matrix, full_hw, dataset)
    kept, pixels = kept[seen], resized_pixels(pixels, full_hw, settings.image_hw)
    xyz = _placed(recorded[kept], dataset)
    if rng is not None:
        order = _near_a_random_point(xyz, settings, rng)
        kept, pixels = kept[order], pixels[order]
        xyz = augment_distillation(xyz[order], draw_point_augmentation(rng))
    inside = np.flatnonzero(in_field_of_view(xyz, settings.field_of_view))
    chosen = inside[spread(len(inside), settings.capacity)]
    features = point_features(xyz[chosen], key_frame.points[kept[chosen], 3], dataset)

    arrays = _network_input(xyz[chosen], features, settings)
    centres = ((pixels + 0.5) / np.asarray(settings.image_hw)).astype(np.float32)
    resized = resize_image(image, settings.image_hw, antialias=settings.antialias)
    return arrays | {
        "images": np.rint(resized).astype(np.uint8)[None],
        "feature_cameras": np.zeros(settings.capacity, np.int32),
        "feature_pixels": pad(centres, chosen, settings.capacity),
        "feature_mask": arrays["point_mask"],
        "points_left_out": np.asarray(len(inside) - len(chosen), np.int32),
    }


def make_segmentation_example(
    key_frame: KeyFrame, dataset: LidarDataset, settings: LidarSettings, rng: np.random.Generator | None
) -> Batch:
    """A whole sweep and its labels.

    Args:
      key_frame, dataset, settings: as `make_distillation_example`.
      rng: source of all draws; None for evaluation, which takes the first point of each voxel, has no limit but the
        capacity, and augments nothing.

    Returns:
      point_features, cells, point_mask, neighbors or points, points_left_out: as `make_distillation_example`;
      point_labels [n] uint8, 255 where nothing is scored. For evaluation also nearest_kept [raw] int32, the row that
      each point of the sweep takes its prediction from, raw_labels [raw] uint8, raw_mask [raw], and
      raw_points_left_out: how many points of the sweep did not fit.

    Raises:
      RecordError: no labels, another number of them than points, or one that the data set does not know; names the
        sample.
      ValueError: a coordinate is not finite; names the sample.
    """
    labels = (
        point_classes(key_frame, dataset) if settings.labelled else np.full(len(key_frame.points), IGNORE, np.uint8)
    )
    every = _placed(key_frame.points[:, :3], dataset)
    kept = _thinned(key_frame, every, settings, rng)
    if rng is not None:
        kept = kept[_near_a_random_point(every[kept], settings, rng)]
    xyz = every[kept]
    features = point_features(xyz, key_frame.points[kept, 3], dataset)
    if rng is not None:
        xyz, features = augment_downstream(xyz, features, draw_point_augmentation(rng))
    inside = np.flatnonzero(in_field_of_view(xyz, settings.field_of_view))
    chosen = inside[spread(len(inside), settings.capacity)]

    arrays = _network_input(xyz[chosen], features[chosen], settings)
    arrays["point_labels"] = pad(labels[kept], chosen, settings.capacity, IGNORE)
    arrays["points_left_out"] = np.asarray(len(inside) - len(chosen), np.int32)
    if rng is None:
        raw = spread(len(every), settings.raw_capacity)
        arrays["nearest_kept"] = pad(nearest_kept(every[raw], xyz[chosen]), np.arange(len(raw)), settings.raw_capacity)
        arrays["raw_labels"] = pad(labels, raw, settings.raw_capacity, IGNORE)
        arrays["raw_mask"] = np.arange(settings.raw_capacity) < len(raw)
        arrays["raw_points_left_out"] = np.asarray(len(every) - len(raw), np.int32)
    return arrays


def point_classes(key_frame: KeyFrame, dataset: LidarDataset) -> UInt8[np.ndarray, " points"]:
    """Class of each point, 255 where it is not scored.

    Raises:
      RecordError: as `make_segmentation_example`.
    """
    raw, points = key_frame.lidarseg, len(key_frame.points)
    if not len(raw):
        raise RecordError(
            f"sample {key_frame.sample_token} of {dataset.name} has no point labels: segmentation needs a split with "
            "labels; build the records with the data set's label files, or predict only (labelled=False)"
        )
    if len(raw) != points:
        raise RecordError(
            f"sample {key_frame.sample_token} of {dataset.name} has {points} points and {len(raw)} labels: its label "
            "file belongs to another sweep or is cut off; mend it and build the records again"
        )
    unknown = raw[raw >= len(dataset.raw_to_class)]
    if len(unknown):
        raise RecordError(
            f"sample {key_frame.sample_token} has the label {int(unknown[0])} at {len(unknown)} points; {dataset.name} "
            f"has labels below {len(dataset.raw_to_class)}: are these records of another data set?"
        )
    return dataset.raw_to_class[raw]


def _placed(xyz: Float32[np.ndarray, "points 3"], dataset: LidarDataset) -> Float32[np.ndarray, "points 3"]:
    """The coordinates that the network sees; those of the record are what the calibration holds for."""
    return xyz + np.array([0, 0, dataset.z_shift], np.float32)


def _thinned(
    key_frame: KeyFrame, xyz: np.ndarray, settings: LidarSettings, rng: np.random.Generator | None
) -> np.ndarray:
    try:
        return thin(xyz, settings.voxel_size, rng)
    except ValueError as error:
        raise ValueError(
            f"sample {key_frame.sample_token}: {error}; its sweep is damaged, mend it and build the records again"
        ) from error


def _near_a_random_point(xyz: np.ndarray, settings: LidarSettings, rng: np.random.Generator) -> np.ndarray:
    if not len(xyz):
        return np.arange(0)
    return nearest(xyz, xyz[rng.integers(len(xyz))], settings.max_points)


def _network_input(
    xyz: Float32[np.ndarray, "points 3"], features: Float32[np.ndarray, "points 5"], settings: LidarSettings
) -> Batch:
    """The arrays that every network of point clouds reads, padded as official: features 0, cell 0, last neighbour."""
    every = np.arange(len(xyz))
    points = pad(xyz, every, settings.capacity)
    point_mask = np.arange(settings.capacity) < len(xyz)
    cells = grid_cells(xyz, settings.field_of_view, settings.projection_axes, settings.grid_shapes)
    arrays = {
        "point_features": pad(features, every, settings.capacity),
        "cells": np.ascontiguousarray(pad(cells.T, every, settings.capacity).T),
        "point_mask": point_mask,
    }
    if settings.neighbor_search == "all_pairs":
        return arrays | {"points": points}
    found = nearest_neighbors(points, point_mask, settings.neighbors, implementation=settings.neighbor_search)
    return arrays | {"neighbors": found}
