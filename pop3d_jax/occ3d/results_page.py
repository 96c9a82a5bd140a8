"""A page of results from the reports of `evaluate_occupancy`: every number beside the protocol that made it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from pop3d_jax.occ3d.grid import MASKS
from pop3d_jax.occ3d.report import RAYIOU, spread, summary_of

_NEEDED = ("method", "ground_truth", "frames", "partial", "missing", "scores", "command", "prompts")

_HEAD = (
    "Percent. Made by `python -m pop3d_jax.occupancy_results`; not to be edited. Labels: `queried`, the network's",
    "planes read at Occ3D's voxel centres; `resampled`, its own grid looked up there; `files`, as given. A dash: there",
    "is no mean, because a class of the rule's list is absent, or the rule knows no masks.",
)

_SPREAD_TITLE = "What the choice of rule and mask alone makes of one and the same prediction, RayIoU left out:"
_SPREAD_HEAD = (["method", "labels", "key frames", "lowest", "by", "highest", "by", "ratio"], ["---"] * 8)


class ReportError(Exception):
    """A file is no report of `evaluate_occupancy`; names it."""


def read_reports(folder: epath.PathLike) -> dict[str, dict[str, Any]]:
    """All reports of a folder by their file's name, in the order of the names.

    Raises:
      ReportError: no such folder, no reports in it, or a file that is none.
    """
    folder = epath.Path(folder)
    paths = sorted(folder.glob("*.json"), key=lambda path: path.name) if folder.is_dir() else []
    if not paths:
        raise ReportError(f"{folder} holds no .json files: write some with pop3d_jax.evaluate_occupancy --out")
    reports = {}
    for path in paths:
        try:
            report = json.loads(path.read_text())
            missing = [name for name in _NEEDED if name not in report]
        except (ValueError, TypeError) as error:
            raise ReportError(f"{path} is damaged ({error}): write it again with --out") from error
        if not missing and not _can_be_shown(report):
            missing = ["scores as this version writes them"]
        if missing:
            raise ReportError(f"{path} is no report of pop3d_jax.evaluate_occupancy: it has no {', '.join(missing)}")
        reports[path.name] = report
    return reports


def _can_be_shown(report: Mapping[str, Any]) -> bool:
    """Whether the page can be made of it."""
    try:
        rules = [summary_of(rule) for rule in _rules({"": report})]
        return bool(rules and list(_rows([report])) and _spreads([report]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def results_page(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The page as Markdown: a table for each ground truth, the spread by protocol, rules, and commands."""
    lines = ["# Results", "", *_HEAD, ""]
    for truth in dict.fromkeys(report["ground_truth"] for report in reports.values()):
        chosen = [report for report in reports.values() if report["ground_truth"] == truth]
        lines += [f"## Against {truth}", "", *_table(list(_rows(chosen))), ""]
        for report in (report for report in chosen if report["partial"]):
            lines += [f"**PARTIAL**, {report['method']}: missing are {'; '.join(report['missing'])}", ""]
        spreads = _spreads(chosen)
        if len(spreads) > len(_SPREAD_HEAD):
            lines += [_SPREAD_TITLE, "", *spreads, ""]
    lines += [
        "## Rules",
        "",
        *(f"- `{rule}`: {summary_of(rule)}" for rule in _rules(reports)),
        "",
        "## Commands",
        "",
    ]
    lines += [f"- {name}: `{report['command']}`" for name, report in reports.items()]
    return "\n".join(lines) + "\n"


def _rules(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = (row for report in reports.values() for rows in report["scores"].values() for row in rows)
    return list(dict.fromkeys(row["rule"] for row in rows))


def _frames(report: Mapping[str, Any]) -> str:
    of_split = f" of {report['split']}" if report.get("split") else ""
    partial = " **PARTIAL**" if report["partial"] else ""
    return f"{report['frames']}{of_split}{partial}"


def _rows(reports: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """A row for each report, set of labels and rule; rules of the same numbers share one."""
    for report in reports:
        prompts = report["prompts"]["name"] if report["prompts"] else "-"
        if report.get("absent_threshold") is not None:
            prompts += f", absent below {report['absent_threshold']:g}"
        for labels, rows in report["scores"].items():
            same: dict[tuple[str, ...], list[str]] = {}
            for rule in dict.fromkeys(row["rule"] for row in rows):
                same.setdefault(_numbers([row for row in rows if row["rule"] == rule]), []).append(rule)
            for numbers, rules in same.items():
                yield [report["method"], labels, _frames(report), prompts, ", ".join(rules), *numbers]


def _numbers(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What a row of the table says of one rule."""
    by_mask = {row["mask"]: row for row in rows}
    cells = [_number(by_mask.get(mask), name) for name in ("miou", "iou") for mask in MASKS]
    mean = "mIoU"
    if rows[0]["rule"] == RAYIOU:
        pairs = zip(rows[0]["thresholds_m"], rows[0]["per_threshold"], strict=True)
        mean = "RayIoU; " + ", ".join(f"{value:.2f} at {threshold:g} m" for threshold, value in pairs)
    return mean, str(len(rows[0]["classes"])), *cells


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    means, ious = ([f"{name}, mask {mask}" for mask in MASKS] for name in ("mean", "IoU"))
    head = ["method", "labels", "key frames", "prompts", "rules", "mean", "classes", *means, *ious]
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(row: Mapping[str, Any] | None, name: str) -> str:
    return "-" if row is None or row[name] is None else f"{row[name]:.2f}"


def _spreads(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [_line(cells) for cells in _SPREAD_HEAD]
    for report in reports:
        for labels, rows in report["scores"].items():
            ends = spread([row for row in rows if row["rule"] != RAYIOU])
            if ends is None:
                continue
            low, high = ends
            ratio = f"{high['miou'] / low['miou']:.2f}" if low["miou"] else "-"
            places = [f"{row['rule']}, mask {row['mask']}" for row in ends]
            means = [f"{row['miou']:.2f}" for row in ends]
            lines.append(
                _line([report["method"], labels, _frames(report), means[0], places[0], means[1], places[1], ratio])
            )
    return lines
