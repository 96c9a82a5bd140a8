"""How good a teacher is: its zero-shot accuracy and its retrieval at the lidar points of held-out scenes.

That is a bound of what a student can learn from it.
"""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from data_prep.nuscenes_tables import read_tables
from data_prep.sensor_files import read_key_frame
from pop3d_jax.data.records import KeyFrame
from pop3d_jax.data.visibility import visible_pairs
from pop3d_jax.metrics import assign_classes, average_precision, confusion_matrix, mean_iou
from pop3d_jax.models.clip import LoadedCLIP
from pop3d_jax.models.maskclip import MaskCLIP, normalise, sample_at_points
from pop3d_jax.nuscenes import CLASS_NAMES, LIDARSEG_TO_CLASS, UNLABELLED
from pop3d_jax.progress import progress
from pop3d_jax.retrieval import read_queries
from pop3d_jax.text import embed_phrases, zero_shot_classifier

_CLASSES = tuple(range(1, 17))
_POINTS_STEP = 16384


def evaluate_teacher(
    clip: LoadedCLIP, world: Path, *, split: str, image_hw: tuple[int, int], max_key_frames: int
) -> dict[str, Any]:
    """Judges MaskCLIP features at the points that a camera sees, by the official 16-class zero-shot protocol.

    Args:
      clip: the teacher.
      world: a folder in nuScenes' layout with a `retrieval` folder (`data_prep.synthetic`).
      split: of version v1.0-trainval.
      image_hw: what pictures are resized to for the teacher.
      max_key_frames: that many, evenly spread, where there are more.

    Returns:
      JSON-ready: `accuracy` (share of points), `class_accuracy` and `class_iou` (per class that occurs, 0..1),
      `mean_class_accuracy`, `mean_iou`, `points`, `key_frames`, and `phrases`: average precision beside the share of
      matching points, means over key frames.

    Raises:
      SourceError: tables or files of the world are missing or damaged.
    """
    rows = [row for scene in read_tables(world, "v1.0-trainval", split).scenes for row in scene.key_frames]
    if len(rows) > max_key_frames:
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, max_key_frames).round().astype(int)]
    classifier = zero_shot_classifier(clip)
    queries = read_queries(world / "retrieval", split) if (world / "retrieval").is_dir() else []
    wanted = sorted({query.phrase for query in queries})
    phrases = dict(zip(wanted, embed_phrases(clip, wanted), strict=True)) if wanted else {}

    graph, state = nnx.split(MaskCLIP(clip.model, "clip_consistent"))
    text, prompt_classes = jnp.asarray(classifier.embeddings), jnp.asarray(classifier.classes)

    @jax.jit
    def judge(
        images: Array, camera: Array, pixel: Array, target: Array
    ) -> tuple[Float[Array, "points dim"], Int[Array, "classes classes"]]:
        grid = nnx.merge(graph, state).dense_features(normalise(images))
        features = sample_at_points(grid, camera, pixel)
        assigned = assign_classes(features, text, prompt_classes)
        return features, confusion_matrix(target, assigned, len(CLASS_NAMES), ignore_label=UNLABELLED)

    confusion = np.zeros((len(CLASS_NAMES), len(CLASS_NAMES)), np.int64)
    scores: dict[str, list[tuple[float, float]]] = {phrase: [] for phrase in phrases}
    for row in progress(rows, len(rows), f"judging the teacher on {split}"):
        frame = read_key_frame(world, row)
        index, camera, pixel = visible_pairs(
            frame.points[:, :3].astype(np.float64), frame.intrinsics, frame.lidar_to_camera, row.image_sizes[0]
        )
        share = ((pixel + 0.5) / np.array(row.image_sizes[0])).astype(np.float32)
        target = LIDARSEG_TO_CLASS[frame.lidarseg[index]]
        # Padded, so that key frames share a compilation; padding has no label and is not counted.
        room = (0, -len(index) % _POINTS_STEP)
        features, counts = judge(
            _images(frame, image_hw), np.pad(camera.astype(np.int32), room), np.pad(share, (room, (0, 0))),
            np.pad(target, room, constant_values=UNLABELLED),
        )  # fmt: skip
        features = np.asarray(features)[: len(index)]
        confusion += np.asarray(counts)
        for query in queries:
            if query.sample_token == row.sample_token and query.matches[index].any():
                matches = query.matches[index]
                score = average_precision(features @ phrases[query.phrase], matches)
                scores[query.phrase].append((score, float(matches.mean())))
    return _summary(confusion, scores, len(rows))


def report(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [f"{'class':>24} accuracy   IoU"]
    for name, accuracy in result["class_accuracy"].items():
        lines.append(f"{name:>24} {accuracy:8.3f} {result['class_iou'][name]:5.3f}")
    lines.append(f"{'mean over classes':>24} {result['mean_class_accuracy']:8.3f} {result['mean_iou']:5.3f}")
    lines.append(f"{'all points':>24} {result['accuracy']:8.3f}   ({result['points']} points)")
    if result["phrases"]:
        lines.append(f"{'phrase':>24} precision share of points")
        for phrase, row in result["phrases"].items():
            lines.append(f"{phrase:>24} {row['average_precision']:8.3f}  {row['matching_share']:.4f}")
    return "\n".join(lines)


def _images(frame: KeyFrame, image_hw: tuple[int, int]) -> UInt8[np.ndarray, "cameras height width 3"]:
    images = []
    for jpeg in frame.images:
        with Image.open(io.BytesIO(jpeg)) as image:
            resized = image.convert("RGB").resize(image_hw[::-1], Image.Resampling.BILINEAR)
            images.append(np.asarray(resized))
    return np.stack(images)


def _summary(confusion: np.ndarray, scores: dict[str, list[tuple[float, float]]], key_frames: int) -> dict[str, Any]:
    present = [label for label in _CLASSES if confusion[label].any()]
    iou = mean_iou(confusion, present)
    correct = {CLASS_NAMES[k]: float(confusion[k, k] / confusion[k].sum()) for k in present}
    return {
        "key_frames": key_frames,
        "points": int(confusion.sum()),
        "accuracy": float(np.trace(confusion) / confusion.sum()),
        "mean_class_accuracy": float(np.mean(list(correct.values()))),
        "mean_iou": iou.present_mean / 100,
        "class_accuracy": correct,
        "class_iou": {CLASS_NAMES[k]: value / 100 for k, value in zip(present, iou.per_class, strict=True)},
        "phrases": {
            phrase: {"average_precision": float(mean[0]), "matching_share": float(mean[1]), "key_frames": len(found)}
            for phrase, found in sorted(scores.items())
            if found
            for mean in [np.mean(found, axis=0)]
        },
    }
