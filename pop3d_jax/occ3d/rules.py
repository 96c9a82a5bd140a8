"""The rules by which Occ3D-nuScenes' voxel scores are computed in practice, each under the name of who uses it.

All start from the same counts, summed over all frames, and take IoU = intersection / union once from the sum. They
differ in the few points that `Rule` has fields for, and these alone move a prediction's score by several points. The
published numbers use the camera mask; which voxels were counted is the caller's choice.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, Integer

from pop3d_jax.occ3d.counts import NUM_LABELS, UNLABELLED_ROW, intersection_over_union, mean_of_defined
from pop3d_jax.occ3d.grid import FREE, OTHER_FLAT, OTHERS

_ALL = tuple(range(FREE))
_WITHOUT_OTHERS = tuple(label for label in _ALL if label not in (OTHERS, OTHER_FLAT))
_BICYCLE, _MOTORCYCLE = 2, 6


@dataclasses.dataclass(frozen=True)
class Rule:
    """How scores are read off the counts.

    Attributes:
      summary: what it does, in a line.
      source: the program whose rule it is.
      classes: what the mean is over.
      only_predicted_counts: a class that is predicted but never in the ground truth counts 0; otherwise it is left out.
      keeps_undefined: a class that is on neither side makes the mean undefined; otherwise it is left out.
      epsilon: added to each class's union, so that a class on neither side counts 0.
      dropped: voxels with this ground truth are not counted at all.
      unlabelled_is_occupied: ground truth outside 0 to 17 is occupied in the binary IoU; otherwise it is left out. The
        IoU of classes leaves it out always.
      prints: what the program itself reports: the score's name there, its name in `RuleScores`, and its unit.
    """

    summary: str
    source: str
    prints: Mapping[str, tuple[str, str]]
    classes: tuple[int, ...] = _ALL
    only_predicted_counts: bool = True
    keeps_undefined: bool = False
    epsilon: float = 0.0
    dropped: tuple[int, ...] = ()
    unlabelled_is_occupied: bool = False


_ROUNDED, _PERCENT, _FRACTION = "percent, two decimals", "percent", "fraction"
_OLD_METRICS = {"only_predicted_counts": False}
_BOTH_IOUS = {"iou_percent_[occupied,free]": ("iou_of_occupied_and_free", _ROUNDED)}

RULES: dict[str, Rule] = {
    "challenge": Rule(
        "17 classes; absent ones left out, ones that are only predicted count 0",
        "CVPR 2023 occupancy challenge, occ_metrics.py; FlashOCC's gives the same numbers",
        {"miou_printed_percent": ("miou", _ROUNDED)},
    ),
    "sparseocc": Rule(
        "17 classes; those without ground truth left out, predicted or not",
        "SparseOcc, loaders/old_metrics.py",
        {"returned_miou_percent": ("miou", _ROUNDED), "returned_iou_percent": ("iou", _ROUNDED)},
        **_OLD_METRICS,
    ),
    "pg_occ": Rule(
        "15 classes, without others and other_flat; those without ground truth left out, predicted or not",
        "PG-Occ, loaders/old_metrics.py",
        {"returned_miou_percent_15_classes": ("miou", _ROUNDED), "returned_iou_percent": ("iou", _ROUNDED)},
        classes=_WITHOUT_OTHERS,
        **_OLD_METRICS,
    ),
    "langocc": Rule(
        "the challenge's mean; ground truth without a label is occupied in the IoU",
        "LangOcc, mmdet3d/datasets/occ_metrics.py",
        {"returned_miou_percent_17_classes": ("miou", _ROUNDED)} | _BOTH_IOUS,
        unlabelled_is_occupied=True,
    ),
    "gaussianflowocc": Rule(
        "15 classes; voxels whose ground truth is others or other_flat are not counted; the rest as langocc",
        "GaussianFlowOcc, mmdet3d/datasets/occ_metrics.py",
        {"returned_miou_percent_15_classes": ("miou", _ROUNDED)} | _BOTH_IOUS,
        classes=_WITHOUT_OTHERS,
        dropped=(OTHERS, OTHER_FLAT),
        unlabelled_is_occupied=True,
    ),
    "gausstr": Rule(
        "the challenge's mean; what never predicts others and other_flat gets 0 for them where they occur",
        "GaussTR, gausstr/evaluation/occ_metric.py",
        {"miou_17": ("miou", _FRACTION), "iou": ("iou", _FRACTION)},
    ),
    "occnerf": Rule(
        "15 classes, without others and other_flat; one absent class and there is no mean",
        "OccNeRF and GaussianOcc, runner.py",
        {"miou_without_others_15": ("miou", _FRACTION)},
        classes=_WITHOUT_OTHERS,
        keeps_undefined=True,
    ),
    "occnerf_13": Rule(
        "13 classes, without bicycle and motorcycle too; one absent class and there is no mean",
        "OccNeRF and GaussianOcc, runner.py, their second mean",
        {"miou_without_empty_13": ("miou", _FRACTION)},
        classes=tuple(label for label in _WITHOUT_OTHERS if label not in (_BICYCLE, _MOTORCYCLE)),
        keeps_undefined=True,
    ),
    "locc": Rule(
        "17 classes; absent ones count 0, since every union is enlarged by 1e-6",
        "LOcc, LightningTools/occ_metrics.py",
        {
            "miou_percent_17": ("miou", _PERCENT),
            "iou_percent": ("iou", _PERCENT),
            "precision": ("precision", _FRACTION),
            "recall": ("recall", _FRACTION),
        },
        epsilon=1e-6,
    ),
}


@dataclasses.dataclass(frozen=True)
class RuleScores:
    """Scores by one rule, in 0..1 and NaN where undefined.

    Attributes:
      rule: its name in `RULES`.
      n_voxels: voxels that the rule counts for its classes.
      per_class: IoU of labels 0 to 17, those that are in no mean too; NaN where the rule leaves one out.
      classes_in_mean: the labels of which `miou` is the mean.
      miou: their mean.
      binary: counts of occupied (0) and free (1) voxels; rows are ground truth.
      iou: of occupied voxels, whatever their class.
      iou_free: of free voxels.
      precision: share of the voxels predicted occupied that are.
      recall: share of the occupied voxels that are predicted so.
      published: what the rule's own program reports, in its units and under the names of `Rule.prints`.
    """

    rule: str
    n_voxels: int
    per_class: Float64[np.ndarray, "18"]
    classes_in_mean: tuple[int, ...]
    miou: float
    binary: Int64[np.ndarray, "2 2"]
    iou: float
    iou_free: float
    precision: float
    recall: float

    @property
    def iou_of_occupied_and_free(self) -> tuple[float, float]:
        """Both binary IoUs."""
        return self.iou, self.iou_free

    @property
    def published(self) -> dict[str, Any]:
        """See the attributes above."""
        return {name: _in_unit(getattr(self, score), unit) for name, (score, unit) in RULES[self.rule].prints.items()}


def score(rule_name: str, confusion: Integer[np.ndarray, "19 18"]) -> RuleScores:
    """Scores by a rule of `RULES` from counts of `confusion_of`, summed over all frames.

    Raises:
      ValueError: there is no rule of this name.
    """
    if rule_name not in RULES:
        raise ValueError(f"there is no rule {rule_name}; there are {', '.join(RULES)}")
    rule = RULES[rule_name]
    counts = np.array(confusion, np.int64)
    counts[list(rule.dropped)] = 0
    labelled = counts[:NUM_LABELS]
    truth, predicted = labelled.sum(1), labelled.sum(0)
    per_class = intersection_over_union(np.diagonal(labelled), truth, predicted, rule.epsilon)
    if not rule.only_predicted_counts:
        per_class[truth == 0] = np.nan
    values = per_class[list(rule.classes)]

    occupied_rows = counts[:FREE].sum(0) + (counts[UNLABELLED_ROW] if rule.unlabelled_is_occupied else 0)
    binary = np.array([[row[:FREE].sum(), row[FREE]] for row in (occupied_rows, counts[FREE])])
    ious = intersection_over_union(np.diagonal(binary), binary.sum(1), binary.sum(0))
    return RuleScores(
        rule=rule_name,
        n_voxels=int(labelled.sum()),
        per_class=per_class,
        classes_in_mean=tuple(c for c, value in zip(rule.classes, values, strict=True) if not np.isnan(value)),
        miou=float(values.mean()) if rule.keeps_undefined else mean_of_defined(values),
        binary=binary,
        iou=float(ious[0]),
        iou_free=float(ious[1]),
        precision=_share(binary[0, 0], binary[:, 0].sum()),
        recall=_share(binary[0, 0], binary[0].sum()),
    )


def _share(part: np.integer, whole: np.integer) -> float:
    return float(part / whole) if whole else float("nan")


def _in_unit(fraction: Any, unit: str) -> Any:
    """A fraction, or some, in a unit of `Rule.prints`."""
    values = np.asarray(fraction)
    percent = np.round(100 * values, 2) if unit == _ROUNDED else 100 * values
    return (values if unit == _FRACTION else percent).tolist()
