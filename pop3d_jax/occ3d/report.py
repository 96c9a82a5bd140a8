"""Scores of one prediction as numbers for JSON, and as a person reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from pop3d_jax.occ3d.grid import OCC3D_CLASSES
from pop3d_jax.occ3d.ray_iou import THRESHOLDS, ray_iou
from pop3d_jax.occ3d.rules import RULES, score
from pop3d_jax.occ3d.tally import Tally

RAYIOU = "rayiou"
# Every rule that a score may be asked by.
RULE_NAMES = (*RULES, RAYIOU)
_RAYIOU_SUMMARY = "rays from at most eight places of the scene, no mask; mean over 17 classes at 1, 2 and 4 m"


def rows_of(tally: Tally, rules: Sequence[str], masks: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for each rule and mask, in percent; RayIoU, which knows no mask, has one entry."""
    rows = []
    for rule in rules:
        if rule == RAYIOU:
            rows.append(_ray_row(tally))
            continue
        for mask in masks:
            scores = score(rule, tally.confusion[mask])
            rows.append(
                {
                    "rule": rule,
                    "mask": mask,
                    "classes": [OCC3D_CLASSES[label] for label in RULES[rule].classes],
                    "classes_in_mean": len(scores.classes_in_mean),
                    "miou": 100.0 * scores.miou,
                    "iou": 100.0 * scores.iou,
                    "per_class_iou": _by_name(scores.per_class),
                    "voxels": scores.n_voxels,
                    "unseen_percent": _share(tally.unseen[mask], int(tally.confusion[mask].sum())),
                }
            )
    return rows


def _share(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def _ray_row(tally: Tally) -> dict[str, Any]:
    scores = ray_iou(tally.rays)
    per_class = scores.per_class
    return {
        "rule": RAYIOU,
        "mask": "none",
        "classes": list(OCC3D_CLASSES[:-1]),
        "classes_in_mean": int(np.isfinite(per_class).any(0).sum()),
        "miou": 100.0 * scores.ray_iou,
        "iou": None,
        "thresholds_m": list(THRESHOLDS),
        "per_threshold": [100.0 * value for value in scores.per_threshold],
        # A class that no ray meets is undefined at every threshold.
        "per_class_iou": _by_name(per_class.mean(0)),
        "rays": int(tally.rays.predicted.sum()),
        "unseen_percent": _share(tally.unseen["none"], int(tally.confusion["none"].sum())),
    }


def _by_name(values: Float64[np.ndarray, " classes"]) -> dict[str, float | None]:
    names = OCC3D_CLASSES[: len(values)]
    return {name: None if np.isnan(v) else 100.0 * float(v) for name, v in zip(names, values, strict=True)}


def summary_of(rule: str) -> str:
    """What a rule does, in a line."""
    return _RAYIOU_SUMMARY if rule == RAYIOU else RULES[rule].summary


def spread(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The lowest and the highest mean of one prediction; None where fewer than two are known."""
    known = [row for row in rows if row["miou"] is not None and not np.isnan(row["miou"])]
    if len(known) < 2:
        return None
    return min(known, key=lambda row: row["miou"]), max(known, key=lambda row: row["miou"])


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a person reads it: what was scored against what, then one table for each set of labels."""
    lines = _head(report)
    for name, rows in report["scores"].items():
        lines += ["", f"labels: {report['labels'][name]}"]
        lines += _one_rule(rows) if _is_one_rule(rows) else _all_rules(rows)
    lines += _legend(next(iter(report["scores"].values())))
    if report["partial"]:
        lines += ["", _partial_line(report)]
    return "\n".join(lines)


def _is_one_rule(rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({row["rule"] for row in rows}) == 1


def _legend(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the rules of a table are; a table of one rule says so itself."""
    if _is_one_rule(rows):
        return []
    undefined = [row["rule"] for row in rows if row["miou"] is None or np.isnan(row["miou"])]
    note = ["-: there is no mean, since a class of the rule's list is absent"] if undefined else []
    return ["", *note, *(f"{rule}: {summary_of(rule)}" for rule in dict.fromkeys(row["rule"] for row in rows))]


def _partial_line(report: Mapping[str, Any]) -> str:
    return f"PARTIAL, {report['frames']} key frames only: missing are {'; '.join(report['missing'])}"


def _head(report: Mapping[str, Any]) -> list[str]:
    frames = f"{report['frames']} key frames of {report['scenes']} scenes"
    if report["split"]:
        frames += f", split {report['split']}"
    lines = [
        f"{report['method']}: {report['predictions']}",
        f"against {report['ground_truth']}, {frames}",
    ]
    if report["partial"]:
        lines.append(_partial_line(report))
    if report["predictions_left_out"]:
        lines.append(f"left out: {report['predictions_left_out']} more key frames that are predicted")
    prompts = report["prompts"]
    if prompts:
        templates = "each in the templates of the zero-shot protocol" if prompts["templates"] else "as they stand"
        absent = report["absent_threshold"]
        lines.append(
            f"prompts: {prompts['name']} ({prompts['source']}), {len(prompts['phrases'])} phrases, {templates}"
        )
        lines.append(f"absent classes: {'not looked for' if absent is None else f'below a lead of {absent:g}'}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.2f}"


def _classes(row: Mapping[str, Any]) -> str:
    """How many of its classes a mean is of; none where it is not defined."""
    return f"{row['classes_in_mean'] if _number(row['miou']) != '-' else 0}/{len(row['classes'])}"


def _unseen_line(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    unseen = {row["mask"]: row["unseen_percent"] for row in rows if row.get("unseen_percent")}
    if not unseen:
        return []
    shares = ", ".join(f"{share:.2f} % (mask {mask})" for mask, share in unseen.items())
    return [f"outside the network's volume, counted as free: {shares} of the voxels"]


def _one_rule(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A rule under one mask or several: the means, then every class."""
    (rule,) = {row["rule"] for row in rows}
    lines = [f"rule {rule}: {summary_of(rule)}", *_unseen_line(rows), ""]
    lines.append(f"{'percent, mask:':<24}" + "".join(f"{row['mask']:>12}" for row in rows))
    name = "RayIoU" if rule == RAYIOU else "mIoU"
    lines.append(f"{name:<24}" + "".join(f"{_number(row['miou']):>12}" for row in rows))
    for row in rows:
        if rule == RAYIOU:
            pairs = zip(row["thresholds_m"], row["per_threshold"], strict=True)
            lines += [f"{f'RayIoU@{threshold:g} m':<24}{_number(value):>12}" for threshold, value in pairs]
    if rule != RAYIOU:
        lines.append(f"{'IoU, occupied or free':<24}" + "".join(f"{_number(row['iou']):>12}" for row in rows))
    counts = "".join(_classes(row).rjust(12) for row in rows)
    lines.append(f"{'classes in the mean':<24}" + counts)
    for class_name in rows[0]["per_class_iou"]:
        values = "".join(f"{_number(row['per_class_iou'][class_name]):>12}" for row in rows)
        beside = "" if class_name in rows[0]["classes"] else "  not in the mean"
        lines.append(f"  {class_name:<22}{values}{beside}")
    return lines


def _all_rules(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rules below each other, masks beside each other."""
    masks = list(dict.fromkeys(row["mask"] for row in rows if row["rule"] != RAYIOU))
    by_place = {(row["rule"], row["mask"]): row for row in rows}
    heads = "".join(f"{mask:>10}" for mask in masks)
    lines = [*_unseen_line(rows), "", f"{'':<24}{'mIoU (percent), mask':<{10 * len(masks)}}   IoU, mask"]
    lines.append(f"{'rule':<16}{'classes':>8}{heads}  |{heads}")
    for rule in dict.fromkeys(row["rule"] for row in rows):
        if rule == RAYIOU:
            continue
        of_rule = [by_place[rule, mask] for mask in masks]
        means, ious = ("".join(f"{_number(row[name]):>10}" for row in of_rule) for name in ("miou", "iou"))
        lines.append(f"{rule:<16}{len(of_rule[0]['classes']):>8}{means}  |{ious}")
    for row in (row for row in rows if row["rule"] == RAYIOU):
        at = ", ".join(
            f"@{threshold:g} m {_number(value)}"
            for threshold, value in zip(row["thresholds_m"], row["per_threshold"], strict=True)
        )
        lines.append(f"{RAYIOU:<16}{len(row['classes']):>8}  {_number(row['miou'])} ({at}), no mask")
    ends = spread([row for row in rows if row["rule"] != RAYIOU])
    if ends:
        low, high = ends
        lines.append(
            f"the same prediction: {low['miou']:.2f} by {low['rule']} (mask {low['mask']}) to {high['miou']:.2f} by "
            f"{high['rule']} (mask {high['mask']})"
        )
    return lines
