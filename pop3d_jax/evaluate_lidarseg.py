"""Judges a run's labels of lidar points as the nuScenes devkit does: python -m pop3d_jax.evaluate_lidarseg --workdir W

Every point of every sweep gets one of the 16 classes by the zero-shot protocol. With --submission DIR the labels are
also written in the layout of the nuScenes lidarseg challenge (DIR/lidarseg/SPLIT/TOKEN_lidarseg.bin and
DIR/SPLIT/submission.json): zip the two folders. Splits without labels, such as test, are only written.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from pop3d_jax.checkpoint import CheckpointError
from pop3d_jax.commands import run, stop_with_message, write_report
from pop3d_jax.data.pipeline import evaluation_batches
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.evaluator import TrainedRun, load_run
from pop3d_jax.experiment import example_settings
from pop3d_jax.hosts import join_hosts
from pop3d_jax.images import network_images
from pop3d_jax.lidarseg import CLASSES, LidarsegError, devkit_scores, write_submission_meta, write_sweep
from pop3d_jax.metrics import assign_classes, confusion_matrix
from pop3d_jax.models.parameters import ArrayTree, merge_model
from pop3d_jax.nuscenes import UNLABELLED
from pop3d_jax.progress import progress
from pop3d_jax.sharding import replicated, shard_batch
from pop3d_jax.shared_flags import define_evaluation_flags, define_records_flags, define_report_flags, define_run_flags
from pop3d_jax.teacher import load_text_side
from pop3d_jax.text import zero_shot_classifier
from pop3d_jax.voxels import grid_coordinates
from pop3d_jax.workdir import WorkdirError

_INPUTS = ("images", "lidar_to_image", "points", "point_labels", "point_mask", "valid", "has_labels")


def evaluate_lidarseg(
    workdir: epath.PathLike,
    *,
    step: int | None = None,
    split: str | None = None,
    records: str | None = None,
    submission: epath.PathLike | None = None,
    submission_split: str | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Labels the points of a split, counts, and writes them where asked to.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; the newest by default.
      split, records: what to label; the run's own by default.
      submission: folder to write the labels to, or None.
      submission_split: name of the split in the submission; `split` by default.
      batch_size: key frames at a time; the run's by default.

    Returns:
      Ready for JSON: `mean_iou`, `frequency_weighted_iou` and `per_class` in percent (None where the devkit has
      NaN), the confusion matrix (rows are targets), and how many key frames were seen and how many have labels.

    Raises:
      LidarsegError: a sweep has more points than `config.data.max_points`.
    """
    trained = load_run(workdir, step)
    config = trained.config
    batch_size = batch_size or config.eval_batch_size
    split = split or config.data.eval_split
    source = RecordSource(records or config.data.records, split)
    classifier = zero_shot_classifier(load_text_side(config.teacher), cache_dir=epath.Path(workdir) / "text_cache")
    text = jax.device_put((classifier.embeddings, classifier.classes), replicated(trained.mesh))
    batches = evaluation_batches(
        source,
        example_settings(config, training=False),
        batch_size=batch_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=config.data.workers,
    )
    label = jax.jit(functools.partial(_label_points, trained), out_shardings=replicated(trained.mesh))
    name_in_submission = submission_split or split
    writes = submission is not None and jax.process_index() == 0
    if writes:
        write_submission_meta(submission, name_in_submission)

    confusion = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    frames = labelled = 0
    # The record's index comes back with the labels: with several hosts a batch also holds what the others read.
    for batch in progress(batches, -(-len(source) // batch_size), "labelling points"):
        arrays = {name: batch[name] for name in _INPUTS} | {
            name: batch[name].astype(np.int32) for name in ("record_index", "points_left_out")
        }
        device_batch = shard_batch(arrays, trained.mesh)
        with jax.set_mesh(trained.mesh):
            seen = jax.tree.map(np.asarray, label(trained.parameters, trained.statistics, text, device_batch))
        confusion += seen["confusion"]
        frames += int(seen["valid"].sum())
        labelled += int((seen["valid"] & seen["has_labels"]).sum())
        if writes:
            for row in np.flatnonzero(seen["valid"]):
                key_frame = source[seen["record_index"][row]]
                if seen["points_left_out"][row]:
                    raise LidarsegError(
                        f"sample {key_frame.sample_token}: {seen['points_left_out'][row]} of {len(key_frame.points)} "
                        f"points do not fit into config.data.max_points = {config.data.max_points} of the run: a "
                        "submission needs all; raise it in the run's config.json"
                    )
                count = len(key_frame.points)
                classes = seen["classes"][row, :count]
                write_sweep(submission, name_in_submission, key_frame.lidar_token, classes, count)
    scores = devkit_scores(confusion)
    return {
        "workdir": str(workdir),
        "step": trained.step,
        "split": split,
        "frames": frames,
        "frames_with_labels": labelled,
        "mean_iou": _percent(scores.mean_iou),
        "frequency_weighted_iou": _percent(scores.frequency_weighted_iou),
        "per_class": {
            name: _percent(float(value)) for name, value in zip(CLASSES[1:], scores.per_class[1:], strict=True)
        },
        "confusion": confusion.tolist(),
        "submission": None if submission is None else str(submission),
    }


def _label_points(
    trained: TrainedRun, parameters: ArrayTree, statistics: ArrayTree, text: tuple, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Class of every point, and the counts where there are labels."""
    model = merge_model(trained.student.graph, parameters, statistics)
    coordinates = grid_coordinates(batch["points"], trained.student.volume)
    output = model(
        network_images(batch["images"]), batch["lidar_to_image"], feature_points=coordinates, voxel_features=False
    )
    classes = assign_classes(output.point_features, *text)
    counted = batch["point_mask"] & (batch["valid"] & batch["has_labels"])[:, None]
    confusion = confusion_matrix(batch["point_labels"].astype(jnp.int32), classes, len(CLASSES), UNLABELLED, counted)
    told = {name: batch[name] for name in ("valid", "has_labels", "record_index", "points_left_out")}
    return {"confusion": confusion, "classes": classes.astype(jnp.uint8)} | told


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else 100.0 * value


def format_table(report: dict[str, Any]) -> str:
    """The report as a person reads it."""

    def number(value: float | None) -> str:
        return f"{'-':>10}" if value is None else f"{value:>10.2f}"

    lines = [
        f"{report['workdir']}, step {report['step']}, split {report['split']}: {report['frames']} key frames, "
        f"{report['frames_with_labels']} with labels",
        "",
        f"{'nuScenes devkit, lidar points (percent)':<44}",
        f"{'mIoU':<44}{number(report['mean_iou'])}",
        f"{'frequency-weighted IoU':<44}{number(report['frequency_weighted_iou'])}",
        "",
        *(f"{name:<44}{number(value)}" for name, value in report["per_class"].items()),
        "-: neither a target nor predicted, not in the mean; a class that is only predicted scores 0.",
    ]
    if report["submission"]:
        lines.append(f"submission: {report['submission']}")
    return "\n".join(lines)


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    define_run_flags()
    define_records_flags()
    define_evaluation_flags()
    define_report_flags()
    flags.DEFINE_string("submission", None, "Also write the labels to this folder in the challenge's layout.")
    flags.DEFINE_string(
        "submission_split", None, "Name of the split in the submission (test, val, mini_val); --split by default."
    )


def main(_: list[str]) -> None:
    with stop_with_message(WorkdirError, CheckpointError, RecordError, LidarsegError, ValueError, FileNotFoundError):
        join_hosts()
        report = evaluate_lidarseg(
            flags.FLAGS.workdir,
            step=flags.FLAGS.step,
            split=flags.FLAGS.split,
            records=flags.FLAGS.records,
            submission=flags.FLAGS.submission,
            submission_split=flags.FLAGS.submission_split,
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
