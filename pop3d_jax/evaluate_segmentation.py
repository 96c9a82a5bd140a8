"""Judges a run of lidar segmentation: python -m pop3d_jax.evaluate_segmentation --workdir W [--out results.json]

For runs of configs/scalr_probe.py and configs/scalr_finetune.py. Prints mIoU, accuracies and the IoU of each class over
all points of the split's sweeps. --dataset names another data set of the same classes: how much is lost from one lidar
to the other. --corruptions judges corrupted sweeps as well (`pop3d_jax.corruptions`) and tells the mean resilience rate
(mRR); with --baseline, the results file of another run, also the mean corruption error (mCE).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from absl import flags, logging
from etils import epath

from pop3d_jax.checkpoint import CheckpointError, Checkpoints
from pop3d_jax.commands import run, stop_with_message, write_report
from pop3d_jax.corruptions import CORRUPTIONS, SEVERITIES
from pop3d_jax.data.corrupted_key_frames import CorruptedKeyFrames
from pop3d_jax.data.records import RecordError
from pop3d_jax.hosts import join_hosts
from pop3d_jax.lidar_datasets import LIDAR_DATASETS
from pop3d_jax.lidar_experiment import make_lidar_student
from pop3d_jax.robustness import read_baseline, robustness_scores
from pop3d_jax.segmentation_evaluator import CapacityError, SegmentationEvaluator, SegmentationResults
from pop3d_jax.sharding import make_mesh, replicated
from pop3d_jax.shared_flags import define_evaluation_flags, define_records_flags, define_report_flags, define_run_flags
from pop3d_jax.workdir import WorkdirError, read_config

# What two results must have in common to be compared.
_SAME = ("dataset", "split", "records_fingerprint", "seed")


def evaluate_segmentation(
    workdir: epath.PathLike,
    *,
    step: int | None = None,
    split: str | None = None,
    dataset: str | None = None,
    records: str | None = None,
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = SEVERITIES,
    baseline: epath.PathLike | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Judges a checkpoint.

    Args:
      workdir: folder of the run, of task "segmentation".
      step: of the checkpoint; the newest by default.
      split: of the records; the run's `config.data.eval_split` by default.
      dataset: data set to judge it on; the one it was trained on by default.
      records: folder that holds a folder of records for each data set; the run's by default.
      corruptions: names of `CORRUPTIONS`; none by default.
      severities: of each corruption.
      baseline: JSON file that this command wrote for another run, which mCE is relative to.
      seed: of the corruptions.
      batch_size: key frames at a time over all hosts; the run's `config.eval_batch_size` by default.

    Returns:
      Everything the table shows, ready for JSON: scores in percent (None where there is none), counts of the clean
      sweeps (rows are targets), and, with corruptions, their scores and `robustness`.

    Raises:
      ValueError: a run of another task, classes that differ, a split without labels, or a baseline that cannot be
        compared; the message names the flag.
      CapacityError: a sweep has more points than the run's arrays.
      RecordError, CheckpointError, WorkdirError, FileNotFoundError: see the messages.
    """
    config = read_config(workdir)
    _check_task(config, workdir)
    name = _dataset_to_judge(config, workdir, dataset)
    if records:
        config.data.records = str(records)
    if batch_size:
        config.eval_batch_size = batch_size
    split = split or config.data.eval_split
    corruptions, severities = tuple(dict.fromkeys(corruptions)), tuple(sorted(set(severities)))
    if baseline and not corruptions:
        raise ValueError(f"--baseline={baseline} compares corrupted sweeps: name some, such as --corruptions=all")

    mesh = make_mesh(config.mesh.data, config.mesh.camera)
    student = make_lidar_student(config)
    evaluator = SegmentationEvaluator(student, config, mesh, name, split)
    if len(evaluator.key_frames) and not len(evaluator.key_frames[0].lidarseg):
        raise ValueError(
            f"--split={split}: the sweeps of {name} have no labels there; give a split that has them, or build its "
            "records with the data set's label files"
        )
    report = {
        "workdir": str(workdir),
        "dataset": name,
        "trained_on": sorted(config.datasets),
        "split": split,
        "records_fingerprint": evaluator.key_frames.fingerprint,
        "seed": seed,
    }
    # Read before hours of evaluation, not after.
    same = {key: report[key] for key in _SAME}
    theirs = read_baseline(baseline, same, corruptions, severities) if baseline else None

    checkpoints = Checkpoints(epath.Path(workdir) / "checkpoints", read_only=True)
    report["step"] = checkpoints.latest_step() if step is None else step
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        {"parameters": student.abstract_parameters, "statistics": student.abstract_statistics},
    )
    state = checkpoints.restore(abstract, replicated(mesh), step)

    def judge(key_frames: CorruptedKeyFrames | None = None) -> SegmentationResults:
        try:
            return evaluator.run(state["parameters"], state["statistics"], key_frames)
        except CapacityError as error:
            raise CapacityError(f"{error}; the file is {epath.Path(workdir) / 'config.json'}") from error

    clean = judge()
    report |= {"frames": clean.key_frames} | _scores(clean, name) | {"confusion": clean.confusion.tolist()}
    if not corruptions:
        return report
    if not clean.scores.mean_iou > 0:
        raise ValueError(
            f"--corruptions: the mIoU of {workdir} without any is {100 * clean.scores.mean_iou}, nothing can be lost "
            "of it; train the run further, or leave the flag out"
        )
    shares: dict[str, list[float]] = {}
    report["corruptions"] = {}
    for corruption in corruptions:
        shares[corruption], report["corruptions"][corruption] = [], {}
        for severity in severities:
            key_frames = CorruptedKeyFrames(evaluator.key_frames, evaluator.dataset, corruption, severity, seed)
            result = judge(key_frames)
            logging.info("%s, severity %d: mIoU %.2f", corruption, severity, 100 * result.scores.mean_iou)
            shares[corruption].append(result.scores.mean_iou)
            report["corruptions"][corruption][str(severity)] = _scores(result, name)
    robustness = robustness_scores(shares, clean.scores.mean_iou, theirs, str(baseline) if baseline else None)
    report["robustness"] = {
        "baseline": robustness.baseline,
        "corruption_error": {corruption: _percent(value) for corruption, value in robustness.corruption_error.items()},
        "resilience_rate": {corruption: _percent(value) for corruption, value in robustness.resilience_rate.items()},
        "mean_corruption_error": _percent(robustness.mean_corruption_error),
        "mean_resilience_rate": _percent(robustness.mean_resilience_rate),
    }
    return report


def _check_task(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
    task = config.get("task", "occupancy")
    if task == "segmentation":
        return
    way_out = f"judge it with python -m pop3d_jax.evaluate --workdir {workdir}"
    if task == "distillation":
        way_out = f"probe it first: {_probing(sorted(config.datasets)[0], workdir)}"
    raise ValueError(f"--workdir={workdir} is a run of task {task!r}, not of segmentation: {way_out}")


def _probing(name: str, workdir: epath.PathLike) -> str:
    return (
        f"python -m pop3d_jax.train --config configs/scalr_probe.py:{name} --config.initial_weights={workdir} "
        "--config.data.records=RECORDS --workdir PROBE"
    )


def _dataset_to_judge(config: ml_collections.ConfigDict, workdir: epath.PathLike, name: str | None) -> str:
    trained = sorted(config.datasets)
    if name is None and len(trained) > 1:
        raise ValueError(f"{workdir} was trained on {', '.join(trained)}: name one of them with --dataset")
    name = name or trained[0]
    if name not in LIDAR_DATASETS:
        raise ValueError(f"--dataset={name}: known data sets are {', '.join(sorted(LIDAR_DATASETS))}")
    theirs, ours = LIDAR_DATASETS[trained[0]].class_names, LIDAR_DATASETS[name].class_names
    if theirs != ours:
        raise ValueError(
            f"--dataset={name} has other classes ({len(ours)}) than {trained[0]} ({len(theirs)}), which {workdir} was "
            f"trained on: probe on that data set, {_probing(name, workdir)}"
        )
    return name


def _scores(results: SegmentationResults, name: str) -> dict[str, Any]:
    scores, names = results.scores, LIDAR_DATASETS[name].class_names
    return {
        "mean_iou": _percent(scores.mean_iou),
        "accuracy": _percent(scores.accuracy),
        "mean_accuracy": _percent(scores.mean_accuracy),
        "per_class": {key: _percent(float(value)) for key, value in zip(names, scores.per_class, strict=True)},
        "per_class_accuracy": {
            key: _percent(float(value)) for key, value in zip(names, scores.per_class_accuracy, strict=True)
        },
    }


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else 100.0 * value


def format_table(report: dict[str, Any]) -> str:
    """The report as a person reads it."""

    def number(value: float | None) -> str:
        return f"{'-':>12}" if value is None else f"{value:>12.2f}"

    lines = [
        f"{report['workdir']}, step {report['step']}",
        f"{report['dataset']}, split {report['split']}: {report['frames']} key frames",
        *([f"trained on {', '.join(report['trained_on'])}"] if report["dataset"] not in report["trained_on"] else []),
        "",
        "all points of the sweeps (percent)",
        f"{'mIoU':<24}{number(report['mean_iou'])}",
        f"{'accuracy':<24}{number(report['accuracy'])}",
        f"{'mean class accuracy':<24}{number(report['mean_accuracy'])}",
        "",
        f"{'class':<24}{'IoU':>12}{'accuracy':>12}",
    ]
    for name, iou in report["per_class"].items():
        lines.append(f"{name:<24}{number(iou)}{number(report['per_class_accuracy'][name])}")
    lines.append("-: neither a target nor predicted (IoU), no target (accuracy): not in the mean.")
    if "corruptions" not in report:
        return "\n".join(lines)

    robustness = report["robustness"]
    severities = list(next(iter(report["corruptions"].values())))
    columns = "".join(f"{f'severity {severity}':>12}" for severity in severities)
    lines += ["", f"{'mIoU (percent)':<24}{columns}{'CE':>12}{'RR':>12}"]
    for name, of_severities in report["corruptions"].items():
        mean_ious = "".join(number(of_severities[severity]["mean_iou"]) for severity in severities)
        error = number(robustness["corruption_error"].get(name))
        lines.append(f"{name:<24}{mean_ious}{error}{number(robustness['resilience_rate'][name])}")
    means = number(robustness["mean_corruption_error"]) + number(robustness["mean_resilience_rate"])
    lines.append(f"{'mCE, mRR':<24}{'':>{12 * len(severities)}}{means}")
    lines.append("RR: mean mIoU over that of clean sweeps, more is better.")
    if robustness["baseline"]:
        lines.append(f"CE: errors over those of {robustness['baseline']}, less is better.")
    else:
        lines.append("CE needs --baseline, the results of another run with the same corruptions.")
    return "\n".join(lines)


def parse_corruptions(values: Sequence[str] | None) -> tuple[str, ...]:
    """The corruptions of `--corruptions=all` or `--corruptions=fog,snow`; none where the flag is not given.

    Raises:
      ValueError: there is no such corruption.
    """
    names = tuple(CORRUPTIONS) if values == ["all"] else tuple(values or ())
    for name in names:
        if name not in CORRUPTIONS:
            raise ValueError(f"--corruptions={name}: choose among {', '.join(CORRUPTIONS)}, or all")
    return names


def parse_severities(values: Sequence[str]) -> tuple[int, ...]:
    """The severities of `--severities=1,3`.

    Raises:
      ValueError: none, or one that does not exist.
    """
    known = {str(severity): severity for severity in SEVERITIES}
    if not values or any(value not in known for value in values):
        raise ValueError(f"--severities={','.join(values)}: choose among 1 (light), 2 (moderate) and 3 (heavy)")
    return tuple(known[value] for value in values)


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    define_run_flags()
    define_records_flags()
    define_evaluation_flags()
    define_report_flags()
    flags.DEFINE_string("dataset", None, "Data set to judge the run on; the one it was trained on by default.")
    flags.DEFINE_list("corruptions", None, f"Judge corrupted sweeps too: all, or some of {', '.join(CORRUPTIONS)}.")
    flags.DEFINE_list("severities", ["1", "2", "3"], "Severities of the corruptions.")
    flags.DEFINE_string("baseline", None, "Results of another run, as --out wrote them: mCE is relative to it.")
    flags.DEFINE_integer("seed", 0, "Of the corruptions; results of different seeds are not compared.")


def main(_: list[str]) -> None:
    with stop_with_message(WorkdirError, CheckpointError, RecordError, ValueError, FileNotFoundError):
        corruptions = parse_corruptions(flags.FLAGS.corruptions)
        severities = parse_severities(flags.FLAGS.severities)
        join_hosts()
        report = evaluate_segmentation(
            flags.FLAGS.workdir,
            step=flags.FLAGS.step,
            split=flags.FLAGS.split,
            dataset=flags.FLAGS.dataset,
            records=flags.FLAGS.records,
            corruptions=corruptions,
            severities=severities,
            baseline=flags.FLAGS.baseline,
            seed=flags.FLAGS.seed,
            batch_size=flags.FLAGS.batch_size,
        )
        if jax.process_index():  # every host has the same numbers: one of them tells
            return
        print(format_table(report))
        write_report(report, flags.FLAGS.out)


if __name__ == "__main__":
    _define_flags()
    flags.mark_flags_as_required(["workdir"])
    run(main)
