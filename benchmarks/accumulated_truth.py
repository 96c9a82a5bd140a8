"""How good ground truth from accumulated sweeps is: against the true dense labels of a synthetic world.

    python -m benchmarks.accumulated_truth [--scenes 4 --keyframes 10 --seed 0] [--json docs/results]

A world is drawn and recorded with tiny images (cameras see by geometry alone), its true labels are made
(`data_prep.dense_labels`), and ground truth is accumulated from its records and boxes. Sums over all key frames.
Seconds are processor time, so that other work on the machine does not count.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from jaxtyping import Bool, Int64

from benchmarks.report import Table
from data_prep.boxes import write_split_boxes
from data_prep.dense_labels import dense_frame, key_frames_as_recorded, read_world
from data_prep.nuscenes_tables import read_tables
from data_prep.split_build import build_split
from data_prep.synthetic import build_world
from data_prep.world.recorded_scene import RecordedScene
from data_prep.world.recording import VERSION
from data_prep.world.truth import SPACING, true_semantics
from pop3d_jax.data.records import RecordSource
from pop3d_jax.occ3d.accumulated import AccumulatedGroundTruth
from pop3d_jax.occ3d.counts import confusion_of
from pop3d_jax.occ3d.grid import FREE, Occ3DFrame

_SCENES = flags.DEFINE_integer("scenes", 4, "Scenes.", lower_bound=2)
_KEYFRAMES = flags.DEFINE_integer("keyframes", 10, "Key frames of each, half a second apart.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the world.")
_JSON = flags.DEFINE_string("json", None, "Folder of accumulated_truth.json.")

_IMAGE_SCALE = 0.05
_SPLIT = "train"
_LABELS = FREE + 1


def masks_of(truth: Occ3DFrame, accumulated: Occ3DFrame) -> dict[str, Bool[np.ndarray, "x y z"]]:
    """The voxels that are compared, by the words of the table."""
    return {
        "accumulated: lidar": accumulated.mask_lidar,
        "accumulated: camera": accumulated.mask_camera,
        "true: lidar": truth.mask_lidar,
        "true: camera": truth.mask_camera,
        "true: camera and lidar": truth.mask_camera & truth.mask_lidar,
    }


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


def _row(counts: Int64[np.ndarray, "18 18"]) -> list[str]:
    """Share occupied, IoU, precision and recall of occupancy, mIoU, and labels right where both are occupied."""
    true, other, both = counts[:FREE].sum(), counts[:, :FREE].sum(), counts[:FREE, :FREE]
    hit = both.sum()
    diagonal = np.diag(counts)[:FREE]
    union = counts.sum(1)[:FREE] + counts.sum(0)[:FREE] - diagonal
    of_class = diagonal[union > 0] / union[union > 0]
    return [
        f"{counts.sum():,}",
        _percent(true, counts.sum()),
        _percent(hit, true + other - hit),
        _percent(hit, other),
        _percent(hit, true),
        f"{100 * of_class.mean():.1f} % ({len(of_class)} classes)",
        _percent(diagonal.sum(), hit),
    ]


def main(_: list[str]) -> None:
    counts: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {"true": [], "accumulated": []}
    finer = np.zeros(3, np.int64)
    with tempfile.TemporaryDirectory() as folder:
        world, records = Path(folder) / "world", Path(folder) / "records"
        build_world(world, _SCENES.value + 1, _KEYFRAMES.value, _SEED.value, _IMAGE_SCALE, workers=1)
        build_split(world, VERSION, _SPLIT, records, skip_errors=False, workers=1)
        boxes = write_split_boxes(world, VERSION, _SPLIT, records)
        accumulated = AccumulatedGroundTruth(RecordSource(records, _SPLIT), boxes)
        tasks = {task.name: task for task in read_world(world)}
        for scene in read_tables(world, VERSION, _SPLIT).scenes:
            recorded = RecordedScene(tasks[scene.scene_name])
            frames = key_frames_as_recorded(recorded, scene.key_frames)
            for number, row in enumerate(scene.key_frames):
                marks = [time.process_time()]
                truth = dense_frame(recorded, frames, number, row)
                marks.append(time.process_time())
                ours = accumulated[row.sample_token]
                marks.append(time.process_time())
                for name, spent in zip(seconds, np.diff(marks), strict=True):
                    seconds[name].append(float(spent))
                for name, mask in masks_of(truth, ours).items():
                    counts[name] = counts.get(name, 0) + confusion_of(truth.semantics, ours.semantics, mask)[:_LABELS]
            fine = true_semantics(recorded.scene, recorded.solids, frames[-1].time, spacing=SPACING / 2)
            changed = (fine != FREE) != (truth.semantics != FREE)
            relabelled = (fine != truth.semantics) & ~changed
            finer += ((fine != FREE).sum(), changed.sum(), relabelled.sum())
    table = Table(
        "accumulated_truth",
        ["mask", "voxels", "truly occupied", "IoU", "precision", "recall", "mIoU", "right labels where both occupied"],
        key_frames=len(seconds["true"]),
        median_processor_seconds={name: round(statistics.median(values), 2) for name, values in seconds.items()},
        half_spacing={
            "occupied": int(finer[0]),
            "occupancy_changed": int(finer[1]),
            "label_changed": int(finer[2]),
            "key_frames": _SCENES.value,
        },
    )
    for name, of_mask in counts.items():
        table.add(name, *_row(of_mask))
    print(table.details)
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)
