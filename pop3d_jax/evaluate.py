"""Evaluates a trained run: python -m pop3d_jax.evaluate --workdir WORKDIR [--split val] [--out results.json]

Prints occupancy IoU and zero-shot mIoU, per class, on the run's held-out split, and the official script's own table
(val_miou_vox_clip_all, ...). With --baselines, predictors that do not look at the images or shuffle the words stand
beside them; with --retrieval FOLDER, phrases are looked up as well; --upscale 2 judges the same parameters on a grid
twice as fine. `pop3d_jax.evaluate_retrieval` scores the published retrieval benchmark, `pop3d_jax.evaluate_lidarseg`
writes a submission to the nuScenes lidarseg challenge. With --lidar the run is a distillation of ScaLR, and the phrases
of --retrieval FOLDER are looked up in raw sweeps.
"""

from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from etils import epath

from pop3d_jax.baselines import constant_grid_iou, shuffled_prompts_miou
from pop3d_jax.checkpoint import CheckpointError
from pop3d_jax.commands import run, stop_with_message, write_report
from pop3d_jax.data.pipeline import evaluation_batches, make_example
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.evaluator import (
    ALL_CLASSES,
    SEMANTIC_CLASSES,
    Evaluator,
    Results,
    headline,
    load_run,
    official_table,
)
from pop3d_jax.experiment import example_settings
from pop3d_jax.hosts import join_hosts
from pop3d_jax.lidar_retrieval import score_phrases
from pop3d_jax.metrics import mean_iou
from pop3d_jax.nuscenes import CLASS_NAMES, UNLABELLED
from pop3d_jax.retrieval import PhraseScore, Retrieval, RetrievalError, embed_queries, read_queries
from pop3d_jax.shared_flags import (
    define_evaluation_flags,
    define_lidar_flags,
    define_records_flags,
    define_report_flags,
    define_run_flags,
)
from pop3d_jax.teacher import load_text_side
from pop3d_jax.text import read_text_classifier
from pop3d_jax.torch_files import WeightFileError
from pop3d_jax.workdir import WorkdirError

_SHUFFLES = 5
# Flags that only POP-3D's runs have, and only lidar networks'.
_FLAGS_OF_VOLUMES = (
    "baselines",
    "calibration_of_records",
    "calibration_split",
    "upscale",
    "batch_size",
    "text_weights",
)
_FLAGS_OF_LIDAR = ("dataset",)


def evaluate(
    workdir: epath.PathLike,
    *,
    step: int | None = None,
    split: str | None = None,
    records: str | None = None,
    baselines: bool = False,
    retrieval_dir: str | None = None,
    calibration: RecordSource | None = None,
    upscale: Sequence[int] | None = None,
    batch_size: int | None = None,
    text_weights: epath.PathLike | None = None,
) -> dict:
    """Evaluates a checkpoint.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; the newest by default.
      split, records: what to evaluate on; the run's own by default.
      baselines: also score the baselines.
      retrieval_dir: also score the phrases of this benchmark folder.
      calibration: records whose first key frame's calibration is given to the network in place of the right one.
      upscale: factors along x, y, z: the same parameters on a finer grid, see `load_run`; targets are made on it too.
      batch_size: key frames at a time over all hosts; `config.eval_batch_size` by default. A finer grid needs memory.
      text_weights: the authors' `zeroshot_weights.pth` instead of the text tower's own classifier.

    Returns:
      Everything the table shows, ready for JSON: scores in percent, per-class IoU, counts.
    """
    workdir = epath.Path(workdir)
    trained = load_run(workdir, step, upscale)
    config, student = trained.config, trained.student
    split = split or config.data.eval_split
    records = records or config.data.records
    batch_size = batch_size or config.eval_batch_size
    source = RecordSource(records, split)
    settings = example_settings(config, training=False)

    text_cache = workdir / "text_cache"
    classifier = read_text_classifier(text_weights, config.model.feature_dim) if text_weights else None
    evaluator = Evaluator(student, load_text_side(config.teacher), trained.mesh, text_cache, classifier)
    retrieval = None
    if retrieval_dir:
        queries = read_queries(retrieval_dir, split)
        retrieval = Retrieval(queries, source.sample_tokens, embed_queries(queries, evaluator.clip, text_cache))
    batches = evaluation_batches(
        source,
        settings,
        batch_size=batch_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=config.data.workers,
    )
    if calibration is not None:
        other = make_example(calibration[0], settings, None)["lidar_to_image"]
        batches = (batch | {"lidar_to_image": np.stack([other] * len(batch["valid"]))} for batch in batches)
    results = evaluator.run(
        trained.parameters,
        trained.statistics,
        batches,
        -(-len(source) // batch_size),
        retrieval,
    )
    report = {
        "workdir": str(workdir),
        "step": trained.step,
        "split": split,
        "frames": results.frames,
        "grid_size": list(student.volume.grid_size),
        "calibration": "of another key frame" if calibration is not None else "right",
        "scores": headline(results),
        "official": official_table(results),
        "per_class_iou": _per_class(results),
        "confusion_voxels_all": results.voxels_all.tolist(),
        "confusion_occupancy": results.occupancy.tolist(),
    }
    if baselines:
        plain = example_settings(config, training=False, images=False)
        train = RecordSource(config.data.records, config.data.train_split)
        shuffled = shuffled_prompts_miou(results.voxels_occupied, _SHUFFLES)
        constant = constant_grid_iou(train, source, plain, student.volume)
        report["baselines"] = {
            "occupancy_iou_best_constant_grid": 100.0 * constant["observed"],
            "occupancy_iou_all_voxels_best_constant_grid": 100.0 * constant["all"],
            "miou_voxels_occupied_shuffled_prompts": float(np.mean(shuffled)),
            "miou_voxels_occupied_each_shuffle": shuffled,
        }
    if retrieval is not None:
        report |= _phrases(retrieval)
    return report


def evaluate_lidar(
    workdir: epath.PathLike,
    retrieval_dir: str,
    *,
    dataset: str | None = None,
    step: int | None = None,
    split: str | None = None,
    records: str | None = None,
) -> dict:
    """Scores the phrases of a benchmark folder on a distilled lidar network; see `lidar_retrieval.score_phrases`."""
    retrieval, predictor, frames = score_phrases(
        workdir, retrieval_dir, dataset=dataset, step=step, split=split, records=records
    )
    return {
        "workdir": str(workdir),
        "step": predictor.step,
        "split": split or predictor.config.data.eval_split,
        "frames": frames,
    } | _phrases(retrieval)


def _phrases(retrieval: Retrieval) -> dict:
    """Scores of phrases in percent."""
    rows = [
        {
            "phrase": row.phrase,
            "average_precision": 100.0 * row.average_precision,
            "matching_share": 100.0 * row.matching_share,
            "frames": row.frames,
        }
        for row in retrieval.table()
    ]
    return {"retrieval": rows, "retrieval_undefined": retrieval.undefined}


def _per_class(results: Results) -> dict[str, dict[str, float | None]]:
    """IoU in percent of each class that occurs as a target; None where it does not."""

    def by_name(
        confusion: np.ndarray, classes: tuple[int, ...], ignore_label: int | None = None
    ) -> dict[str, float | None]:
        scores = mean_iou(confusion, classes, ignore_label)
        return {
            CLASS_NAMES[index]: value if present else None
            for index, value, present in zip(classes, scores.per_class, scores.present, strict=True)
        }

    return {
        "voxels_all": by_name(results.voxels_all, ALL_CLASSES),
        "voxels_occupied": by_name(results.voxels_occupied, SEMANTIC_CLASSES),
        "points": by_name(results.points, SEMANTIC_CLASSES, UNLABELLED),
    }


def format_table(report: dict) -> str:
    """The report as a person reads it."""
    head = f"{report['workdir']}, step {report['step']}, split {report['split']}: {report['frames']} key frames"
    if "scores" not in report:
        return "\n".join([head, *_phrase_lines(report)])
    scores, baselines = report["scores"], report.get("baselines", {})
    lines = [
        head,
        f"grid: {' x '.join(map(str, report['grid_size']))} voxels",
        *(["calibration: of another key frame"] if report["calibration"] != "right" else []),
        "",
        f"{'score (percent)':<44}{'this run':>10}{'baseline':>10}{'ratio':>8}",
    ]

    def row(name: str, value: float, baseline: float | None = None, note: str = "") -> None:
        beside = f"{baseline:>10.2f}{value / baseline:>8.2f}" if baseline else f"{'-':>10}{'-':>8}"
        lines.append(f"{name:<44}{value:>10.2f}{beside}  {note}".rstrip())

    row(
        "occupancy IoU, observed voxels",
        scores["occupancy_iou"],
        baselines.get("occupancy_iou_best_constant_grid"),
        "best constant grid" if baselines else "",
    )
    row(
        "occupancy IoU, all voxels (unobserved free)",
        scores["occupancy_iou_all_voxels"],
        baselines.get("occupancy_iou_all_voxels_best_constant_grid"),
        "best constant grid" if baselines else "",
    )
    row(
        "zero-shot mIoU, occupied voxels",
        scores["miou_voxels_occupied"],
        baselines.get("miou_voxels_occupied_shuffled_prompts"),
        f"class prompts shuffled, mean of {_SHUFFLES}" if baselines else "",
    )
    row("zero-shot mIoU, all observed voxels", scores["miou_voxels_all"])
    row("zero-shot mIoU, lidar points", scores["miou_points"])
    row("zero-shot mIoU, lidar points, devkit", scores["miou_points_devkit"])
    lines.append("Means are over the classes that occur; the devkit's also over classes that are only predicted (0).")

    lines += ["", f"{'names of the official script (percent)':<44}{'official':>10}{'plain':>10}{'classes':>10}"]
    for name, score in report["official"].items():
        plain = f"{'-':>10}" if score["present_mean"] is None else f"{score['present_mean']:>10.2f}"
        present = f"{score['classes_present']}/{score['classes']}"
        lines.append(f"{name:<44}{score['official_mean']:>10.2f}{plain}{present:>10}  {score['meaning']}")
    lines.append("official: mean in which a class that never occurs as a target counts as 100; plain: without these.")

    classes = report["per_class_iou"]
    lines += ["", f"{'IoU per class (percent)':<24}{'all voxels':>12}{'occupied':>12}{'points':>12}"]
    for name in classes["voxels_all"]:
        values = [classes[kind].get(name) for kind in ("voxels_all", "voxels_occupied", "points")]
        if any(value is not None for value in values):
            lines.append(f"{name:<24}" + "".join(f"{'-':>12}" if v is None else f"{v:>12.2f}" for v in values))
    if "retrieval" in report:
        lines += _phrase_lines(report)
    return "\n".join(lines)


def _phrase_lines(report: dict) -> list[str]:
    """The table of phrases."""
    lines = ["", f"{'phrase (percent)':<24}{'AP':>12}{'share':>12}{'AP / share':>12}{'frames':>8}"]
    for entry in report["retrieval"]:
        scored = PhraseScore(entry["phrase"], entry["average_precision"], entry["matching_share"], entry["frames"])
        lines.append(
            f"{scored.phrase:<24}{scored.average_precision:>12.2f}{scored.matching_share:>12.2f}"
            f"{scored.average_precision / scored.matching_share:>12.2f}{scored.frames:>8}"
        )
    frames = [entry["frames"] for entry in report["retrieval"]]
    if frames:
        mean = np.average([entry["average_precision"] for entry in report["retrieval"]], weights=frames)
        share = np.average([entry["matching_share"] for entry in report["retrieval"]], weights=frames)
        lines.append(f"{'all, mean of queries':<24}{mean:>12.2f}{share:>12.2f}{mean / share:>12.2f}{sum(frames):>8}")
    lines.append("AP: average precision over all points of the sweep; share: of points that match the phrase.")
    if report["retrieval_undefined"]:
        lines.append(f"left out: {report['retrieval_undefined']} queries that no point matches")
    return lines


def parse_upscale(values: Sequence[str] | None) -> tuple[int, int, int] | None:
    """The factors along x, y, z of `--upscale 2` or `--upscale 2,2,1`; None where the flag is not given.

    Raises:
      ValueError: not one or three whole numbers of at least 1.
    """
    if not values:
        return None
    if len(values) not in (1, 3) or not all(value.strip().isdigit() and int(value) > 0 for value in values):
        raise ValueError(f"--upscale={','.join(values)} must be one factor or three (x,y,z), each at least 1")
    factors = tuple(int(value) for value in values)
    return factors * 3 if len(factors) == 1 else factors


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    define_run_flags()
    define_records_flags()
    define_lidar_flags()
    define_evaluation_flags()
    define_report_flags()
    flags.DEFINE_bool("baselines", False, "Also score the best constant grid and shuffled class prompts.")
    flags.DEFINE_string(
        "calibration_of_records",
        None,
        "Give the network the calibration of the first key frame in this records folder instead of the right one: "
        "a network that uses its calibration must fail.",
    )
    flags.DEFINE_string("calibration_split", "val", "Split of --calibration_of_records.")
    flags.DEFINE_string("text_weights", None, "The authors' zeroshot_weights.pth, in place of our own prompts.")
    flags.DEFINE_string("retrieval", None, "Folder of a retrieval benchmark (retrieval_anns_SPLIT.csv).")
    flags.DEFINE_list(
        "upscale",
        None,
        "Evaluate on a finer grid: a factor, or three (x,y,z), by which the planes are scaled up, as the official "
        "TPVAggregator does. The parameters stay the same.",
    )


def _check(values: flags.FlagValues) -> None:
    """Raises ValueError where flags do not go together."""
    if values.lidar and not values.retrieval:
        raise ValueError("--lidar needs --retrieval, the folder of phrases that are looked up in raw sweeps")
    for name in _FLAGS_OF_VOLUMES if values.lidar else _FLAGS_OF_LIDAR:
        if values[name].present:
            raise ValueError(f"--{name} says nothing {'with' if values.lidar else 'without'} --lidar: leave it out")


def main(_: list[str]) -> None:
    with stop_with_message(
        WorkdirError, CheckpointError, RecordError, RetrievalError, WeightFileError, ValueError, FileNotFoundError
    ):
        join_hosts()
        values = flags.FLAGS
        _check(values)
        asked = {name: values[name].value for name in ("step", "split", "records")}
        if values.lidar:
            report = evaluate_lidar(values.workdir, values.retrieval, dataset=values.dataset, **asked)
        else:
            report = evaluate(
                values.workdir,
                **asked,
                baselines=values.baselines,
                retrieval_dir=values.retrieval,
                calibration=RecordSource(values.calibration_of_records, values.calibration_split)
                if values.calibration_of_records
                else None,
                upscale=parse_upscale(values.upscale),
                batch_size=values.batch_size,
                text_weights=values.text_weights,
            )
        if jax.process_index():  # every host has the same numbers: one of them tells
            return
        print(format_table(report))
        write_report(report, values.out)


if __name__ == "__main__":
    _define_flags()
    flags.mark_flags_as_required(["workdir"])
    run(main)
