"""Occ3D-nuScenes' evaluation: counts of voxels, every rule's scores, rays, RayIoU, the rays' origins.

Undefined scores must be undefined on both sides: both become -1, which no score is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped, UInt8

from pop3d_jax.geometry import rigid_transform
from pop3d_jax.occ3d.counts import NUM_LABELS, confusion_of
from pop3d_jax.occ3d.grid import FREE, OCC3D_CLASSES, OCC3D_VOLUME
from pop3d_jax.occ3d.origins import lidar_origins
from pop3d_jax.occ3d.ray_iou import RayCounts, count_cast_rays, ray_iou
from pop3d_jax.occ3d.rays import cast_rays, ray_directions
from pop3d_jax.occ3d.rules import RuleScores, score
from pop3d_jax.verification.checks import Check, absolute, exact
from pop3d_jax.verification.golden_model import GoldenFile, golden_arrays, golden_json
from pop3d_jax.voxels import Volume

_RATIOS = 1e-6
# The golden set's own suggestion, metres.
_DISTANCES = 1e-4
# Places are rounded to float32 on their way, at most 39 m and the lidar's offset from the ego's origin.
_ORIGINS = float(np.spacing(np.float32(40.0)))
_PROTOCOL = "occ3d/protocol.json"

# Golden evaluators, and the rules that they are.
_EVALUATORS = {
    "official_challenge": "challenge",
    "sparseocc_old_metrics": "sparseocc",
    "pg_occ": "pg_occ",
    "langocc": "langocc",
    "gaussianflowocc_without_others": "gaussianflowocc",
    "gausstr": "gausstr",
    "locc": "locc",
    "independent_recount": "challenge",
}
# What the golden files say besides what the programs print.
_MORE: dict[str, Callable[[RuleScores], Any]] = {
    "miou_17": lambda scores: scores.miou,
    "miou_15_unrounded": lambda scores: scores.miou,
    "n_classes_in_mean": lambda scores: len(scores.classes_in_mean),
    "n_voxels": lambda scores: scores.n_voxels,
    "binary_confusion_[gt][pred]_0occ_1free": lambda scores: scores.binary,
    "binary_iou_occupied": lambda scores: scores.iou,
    "iou_occupied": lambda scores: scores.iou,
    "per_class_iou_percent": lambda scores: 100 * scores.per_class[:-1],
}


def protocol(golden_file: GoldenFile) -> Iterator[Check]:
    """Labels and place of the grid."""
    facts = golden_json(golden_file(_PROTOCOL))
    yield exact("classes", np.asarray(OCC3D_CLASSES), np.asarray(list(facts["classes"].values())), "names that differ")
    official = np.asarray([facts["free_class"], *facts["grid"]["shape_xyz"]])
    yield exact("free, shape of the grid", np.asarray([FREE, *OCC3D_VOLUME.grid_size]), official)
    limits = np.asarray([*OCC3D_VOLUME.minimum, *OCC3D_VOLUME.maximum])
    yield exact("limits of the grid", limits, np.asarray(facts["grid"]["range_m"]), "metres that differ")


def tiny_voxels(golden_file: GoldenFile) -> Iterator[Check]:
    """Counts and scores of a grid that can be checked by hand, with and without ground truth 255."""
    arrays, facts = golden_arrays(golden_file("occ3d/tiny.npz")), golden_json(golden_file("occ3d/tiny.json"))
    for part in (name for name in facts if name.startswith("results")):
        truth = arrays["semantics" + part.removeprefix("results").removeprefix("_gt")]
        for mask, official in facts[part].items():
            seen = np.ones(truth.shape, bool) if mask == "none" else arrays[f"mask_{mask}"].astype(bool)
            confusion = confusion_of(truth, arrays["pred"], seen)
            name = f"confusion_{part}_{mask}"
            yield exact(name, confusion[:NUM_LABELS], arrays[name], "counts that differ")
            yield from _scores(f"{part}, mask {mask}", confusion, official)


def voxels(golden_file: GoldenFile) -> Iterator[Check]:
    """Counts and scores over several frames, and of each alone, of both predictions under every mask."""
    arrays = golden_arrays(golden_file("occ3d/occ_metrics.npz"))
    facts = golden_json(golden_file("occ3d/occ_metrics.json"))
    truth = arrays["semantics"]
    for name, masks in facts["results"].items():
        predicted = arrays[name] if name in arrays else _without_others(arrays["pred"])
        for mask, official in masks.items():
            seen = np.ones(truth.shape, bool) if mask == "none" else _unpacked(arrays[f"mask_{mask}"], truth.shape)
            frames = np.stack([confusion_of(*frame) for frame in zip(truth, predicted, seen, strict=True)])
            key = f"confusion_{name}_{mask}"
            yield exact(key, frames.sum(0)[:NUM_LABELS], arrays[key], "counts that differ")
            alone = f"{key}_per_frame"
            yield exact(alone, frames[:, :NUM_LABELS], arrays[alone], "counts that differ")
            yield from _scores(f"{name}, mask {mask}", frames.sum(0), official)
            for number, (confusion, fact) in enumerate(zip(frames, official["per_frame"], strict=True)):
                yield _score(f"{name}, mask {mask}, frame {number} alone", score("challenge", confusion), fact)


def tiny_rays(golden_file: GoldenFile) -> Iterator[Check]:
    """Rays through a grid that can be checked by hand."""
    arrays, facts = golden_arrays(golden_file("occ3d/tiny.npz")), golden_json(golden_file("occ3d/tiny.json"))["rays"]
    volume = _volume(golden_file, arrays["ray_gt"].shape)
    cast = []
    for name in ("ray_gt", "ray_pred"):
        found = cast_rays(arrays[name], arrays["ray_origins_m"], arrays["ray_dirs"], volume)
        # The golden ones are in one row, origin by origin.
        flat = [each.reshape(-1) for each in found]
        yield from _same_rays(name, flat, arrays[f"{name}_label"], arrays[f"{name}_dist"])
        cast += flat
    official = facts["rayiou_per_threshold_per_class"]
    counts = count_cast_rays(*cast, thresholds=_thresholds(official))
    yield exact("tiny: valid rays", np.asarray(counts.predicted.sum()), np.asarray(facts["n_valid"]))
    scores = ray_iou(counts)
    yield _numbers("tiny: rayiou_per_threshold_per_class", scores.per_class, list(official.values()))
    means = [scores.ray_iou, *scores.per_threshold]
    yield _numbers("tiny: RayIoU", means, [facts["rayiou"], *facts["mean_per_threshold"].values()])


def rays(golden_file: GoldenFile) -> Iterator[Check]:
    """All rays of some frames, from ordinary and from unusual origins; RayIoU of all frames and of each alone."""
    arrays, facts = golden_arrays(golden_file("occ3d/ray_iou.npz")), golden_json(golden_file("occ3d/ray_iou.json"))
    volume = _volume(golden_file, arrays["semantics"].shape[1:])
    directions = arrays["ray_dirs"]
    yield exact("ray_dirs", ray_directions(), directions, "numbers that differ")
    thresholds = _thresholds(facts["per_class_iou"])
    frames: list[RayCounts] = []
    for number, fact in enumerate(facts["per_frame"]):
        cast = []
        for side, grids in (("gt", arrays["semantics"]), ("pred", arrays["pred"])):
            found = cast_rays(grids[number], arrays[f"lidar_origins_frame{number}"], directions, volume)
            name = f"frame{number}_{side}"
            yield from _same_rays(name, found, arrays[f"{name}_label"], arrays[f"{name}_dist"])
            cast += found
        frames.append(count_cast_rays(*cast, thresholds=thresholds))
        sizes = np.asarray([cast[0].shape[0], cast[0].size, frames[-1].predicted.sum()])
        official = np.asarray([fact[key] for key in ("n_origins", "n_rays", "n_valid_rays")])
        yield exact(f"frame {number} alone: origins, rays, valid rays", sizes, official)
        yield _ray_scores(f"frame {number} alone: RayIoU", frames[-1], fact)
    counts = sum(frames[1:], frames[0])
    for key, ours in (("gt", counts.ground_truth), ("pred", counts.predicted), ("tp", counts.true_positive)):
        yield exact(f"{key}_cnt", ours, arrays[f"{key}_cnt"], "counts that differ")
    yield _ray_scores("RayIoU", counts, facts["official"])
    yield _numbers("RayIoU, per_class_iou", ray_iou(counts).per_class, list(facts["per_class_iou"].values()))

    some = directions[arrays["edge_ray_index"]]
    found = cast_rays(arrays["semantics"][0], arrays["edge_origins"], some, volume)
    yield from _same_rays("edge", found, arrays["edge_label"], arrays["edge_dist"])


def origins(golden_file: GoldenFile) -> Iterator[Check]:
    """Origins of the rays from the poses of whole scenes."""
    arrays = golden_arrays(golden_file("occ3d/ray_iou.npz"))
    lidar_to_ego, ego_to_global = _poses(arrays, "lidar2ego"), _poses(arrays, "ego2global")
    scenes = arrays["pose_scene"]
    found = []
    for number, scene in enumerate(scenes):
        same = np.flatnonzero(scenes == scene)
        reference = int(np.searchsorted(same, number))
        found.append(lidar_origins(lidar_to_ego[same], ego_to_global[same], reference))
    yield exact("origins_per_keyframe", np.asarray([len(each) for each in found]), arrays["origins_per_keyframe"])
    for name in arrays:
        if name.startswith("origins_keyframe_"):
            ours = found[int(name.removeprefix("origins_keyframe_"))]
            yield absolute(name, ours, arrays[name], _ORIGINS, "metres")
    for frame, number in enumerate(arrays["frame_keyframe_index"]):
        name = f"lidar_origins_frame{frame}"
        yield absolute(name, found[number], arrays[name], _ORIGINS, "metres")


def _scores(where: str, confusion: Int64[np.ndarray, "19 18"], official: Mapping[str, Any]) -> Iterator[Check]:
    """Each evaluator's numbers under one mask."""
    for evaluator, rule in _EVALUATORS.items():
        yield _score(f"{where}: {evaluator}", score(rule, confusion), official[evaluator])
    published = score("occnerf", confusion).published | score("occnerf_13", confusion).published
    fact = official["occnerf_gaussianocc"]
    yield _numbers(f"{where}: occnerf_gaussianocc", [published[key] for key in fact], list(fact.values()))


def _score(name: str, scores: RuleScores, official: Mapping[str, Any]) -> Check:
    """All numbers that one evaluator gives; KeyError for one that is not known."""
    published = scores.published
    ours: list[Any] = []
    for key, value in official.items():
        if key == "per_class_iou":
            # With free or without it.
            ours.append(scores.per_class[: len(value)])
        else:
            ours.append(published[key] if key in published else _MORE[key](scores))
    return _numbers(name, ours, list(official.values()), ", ".join(official))


def _ray_scores(name: str, counts: RayCounts, official: Mapping[str, float]) -> Check:
    scores = ray_iou(counts)
    thresholds = [f"RayIoU@{threshold:g}" for threshold in counts.thresholds]
    ours = [scores.ray_iou, *scores.per_threshold]
    return _numbers(name, ours, [official[key] for key in ("RayIoU", *thresholds)])


def _same_rays(
    name: str,
    found: Sequence[Shaped[np.ndarray, "..."]],
    labels: UInt8[np.ndarray, "..."],
    distances: Shaped[np.ndarray, "..."],
) -> Iterator[Check]:
    yield exact(f"{name}_label", found[0], labels, "rays that differ")
    yield absolute(f"{name}_dist", found[1], distances, _DISTANCES, "metres")


def _numbers(name: str, ours: Any, official: Any, note: str = "") -> Check:
    """Compares numbers in nested lists, undefined ones with undefined ones."""
    return absolute(name, _flat(ours), _flat(official), _RATIOS, note)


def _flat(values: Any) -> Float64[np.ndarray, " values"]:
    if isinstance(values, list | tuple):
        return np.concatenate([_flat(value) for value in values])
    # JSON's null becomes NaN.
    return np.nan_to_num(np.asarray(values, np.float64).reshape(-1), nan=-1.0)


def _without_others(predicted: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """The golden set's second prediction, of a method that knows neither others (now manmade) nor other_flat (now
    driveable surface)."""
    labels = np.arange(256, dtype=np.uint8)
    labels[0], labels[12] = 15, 11
    return labels[predicted]


def _unpacked(packed: UInt8[np.ndarray, "frames bytes"], shape: Sequence[int]) -> Bool[np.ndarray, "..."]:
    return np.unpackbits(packed, axis=1)[:, : int(np.prod(shape[1:]))].reshape(shape).astype(bool)


def _volume(golden_file: GoldenFile, size: Sequence[int]) -> Volume:
    """A grid of this size whose lower corner and voxels are the protocol's."""
    grid = golden_json(golden_file(_PROTOCOL))["grid"]
    corner = tuple(map(float, grid["range_m"][:3]))
    upper = tuple(start + cells * grid["voxel_m"] for start, cells in zip(corner, size, strict=True))
    return Volume(corner, upper, tuple(size))


def _thresholds(by_threshold: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(map(float, by_threshold))


def _poses(arrays: Mapping[str, np.ndarray], name: str) -> Float64[np.ndarray, "n 4 4"]:
    rows = zip(arrays[f"pose_{name}_rotation_wxyz"], arrays[f"pose_{name}_translation"], strict=True)
    return np.stack([rigid_transform(*row) for row in rows])
