"""What exported features lose by their precision, and how often a search says rightly that there is nothing to find.

    python -m benchmarks.grid_precision --workdir demo/run --retrieval demo/world/retrieval [--json docs/results]

Each precision on the held-out split: bytes, zero-shot mIoU over the stored voxels that the lidar's ground truth labels,
and mean average precision of the benchmark's phrases over the lidar points in stored voxels. Then phrases that a key
frame has or has not: with a threshold for the margin over the background phrases, chosen on the first half of the key
frames, told on the second.
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.report import Table
from pop3d_jax.data.records import KeyFrame, RecordSource
from pop3d_jax.evaluator import SEMANTIC_CLASSES
from pop3d_jax.grids.encoding import CODEBOOK_ENTRIES, EncodedFeatures, Precision, decode, encode, train_codebook
from pop3d_jax.grids.exporter import export
from pop3d_jax.grids.feature_grids import FeatureGrids
from pop3d_jax.grids.selection import Selection, select
from pop3d_jax.inference import Predictor
from pop3d_jax.metrics import assign_classes, average_precision, confusion_matrix, mean_iou
from pop3d_jax.models.clip import load_clip
from pop3d_jax.nuscenes import CLASS_NAMES, EMPTY
from pop3d_jax.retrieval import Query, embed_queries, read_queries
from pop3d_jax.text import TextClassifier, zero_shot_classifier
from pop3d_jax.voxels import grid_coordinates_float64

_WORKDIR = flags.DEFINE_string("workdir", "demo/run", "trained run")
_RETRIEVAL = flags.DEFINE_string("retrieval", "demo/world/retrieval", "folder of a retrieval benchmark")
_JSON = flags.DEFINE_string("json", None, "folder of grid_precision.json and grid_absent.json")
_LABELS = len(CLASS_NAMES)


@dataclasses.dataclass(frozen=True)
class StoredVoxels:
    """What is stored of a key frame, before its features are written down, and what is known of it.

    Attributes:
      features: float32.
      classes: ground truth of the voxels, EMPTY or above where there is none.
      voxel_of_point: for each point of the sweep its voxel's number, -1 where it is not stored.
      queries: the benchmark's, of this key frame.
    """

    features: np.ndarray
    classes: np.ndarray
    voxel_of_point: np.ndarray
    queries: list[Query]


def stored_voxels(predictor: Predictor, frame: KeyFrame, queries: list[Query]) -> StoredVoxels:
    """Predicts a key frame."""
    coordinates, _, features = select(predictor(frame), Selection())
    volume = predictor.student.volume
    number = np.full(volume.grid_size, -1)
    number[tuple(coordinates.T)] = np.arange(len(coordinates))
    cells = np.floor(grid_coordinates_float64(frame.points[:, :3], volume)).astype(int)
    outside = np.any((frame.points[:, :3] < volume.minimum) | (frame.points[:, :3] >= volume.maximum), axis=-1)
    voxel_of_point = np.where(outside, -1, number[tuple(cells.T)])
    return StoredVoxels(features, predictor.target(frame)[tuple(coordinates.T)], voxel_of_point, queries)


def scores(
    frames: list[StoredVoxels], features: list[np.ndarray], classifier: TextClassifier, text: dict[str, np.ndarray]
) -> tuple[float, float]:
    """Zero-shot mIoU and retrieval mAP, percent."""
    confusion = np.zeros((_LABELS, _LABELS), np.int64)
    assign = jax.jit(lambda x: assign_classes(x, classifier.embeddings, jnp.asarray(classifier.classes)))
    precisions = []
    for frame, vectors in zip(frames, features, strict=True):
        labelled = (frame.classes > 0) & (frame.classes < EMPTY)
        # One shape for all key frames.
        padded = np.zeros((max(map(len, features)), vectors.shape[1]), np.float32)
        padded[: len(vectors)] = vectors
        assigned = np.asarray(assign(padded))[: len(vectors)]
        confusion += np.asarray(confusion_matrix(assigned[labelled], frame.classes[labelled], _LABELS))
        stored = frame.voxel_of_point >= 0
        for query in frame.queries:
            matches = query.matches[stored]
            if matches.any():
                similarity = (vectors @ text[query.phrase])[frame.voxel_of_point[stored]]
                precisions.append(average_precision(similarity, matches))
    return mean_iou(confusion, SEMANTIC_CLASSES).present_mean, 100.0 * float(np.mean(precisions))


def precision_table(predictor: Predictor, frames: list[StoredVoxels], clip, queries: list[Query]) -> Table:
    """Bytes and scores of every precision."""
    classifier, text = zero_shot_classifier(clip), embed_queries(queries, clip)
    plain = [frame.features for frame in frames]
    dim = plain[0].shape[1]
    table = Table(
        "grid_precision",
        ["features", "bytes a voxel", "mIoU", "lost", "retrieval mAP", "lost", "largest error of cosine"],
    )
    reference = scores(frames, plain, classifier, text)
    table.add("float32, not stored", 4 * dim, f"{reference[0]:.2f}", "", f"{reference[1]:.2f}", "", "")
    kinds: list[tuple[str, Precision, int]] = [("float16", "float16", 0), ("int8", "int8", 0)]
    kinds += [(f"pq, {2 * dim // parts}x below float16", "pq", parts) for parts in (dim // 16, dim // 8, dim // 4)]
    for name, precision, parts in kinds:
        codebook = None
        if precision == "pq":
            everything = np.concatenate(plain)
            chosen = np.random.default_rng(0).choice(len(everything), min(len(everything), 100_000), replace=False)
            codebook = train_codebook(everything[chosen], parts)
        encoded = [encode(features, precision, codebook) for features in plain]
        decoded = [decode(one, codebook) for one in encoded]
        result = scores(frames, decoded, classifier, text)
        unit = [x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (plain[0], decoded[0])]
        error = np.abs((unit[0] - unit[1]) @ classifier.embeddings.T).max()
        size = _bytes(encoded[0])
        cells = [
            f"{result[0]:.2f}",
            f"{reference[0] - result[0]:.2f}",
            f"{result[1]:.2f}",
            f"{reference[1] - result[1]:.2f}",
        ]
        table.add(name, size, *cells, f"{error:.4f}")
    return table


def _bytes(encoded: EncodedFeatures) -> int:
    return encoded.codes.dtype.itemsize * encoded.codes.shape[1]


def absent_table(grids: FeatureGrids, queries: list[Query]) -> Table:
    """Precision and recall of "there is none"."""
    phrases = sorted({query.phrase for query in queries})
    there = {(query.sample_token, query.phrase) for query in queries if query.matches.any()}
    hits = grids.search(phrases, top=len(grids))
    first_half = set(grids.sample_tokens[: len(grids) // 2])
    truth = np.array([(hit.sample_token, hit.phrase) not in there for hit in hits])
    chosen_on = np.array([hit.sample_token in first_half for hit in hits])
    margins = np.array([hit.margin for hit in hits])

    def judged(threshold: float, where: np.ndarray) -> tuple[float, float, float]:
        said, absent = margins[where] < threshold, truth[where]
        right = float((said & absent).sum())
        precision, recall = right / max(said.sum(), 1), right / max(absent.sum(), 1)
        return precision, recall, 2 * precision * recall / max(precision + recall, 1e-9)

    thresholds = np.quantile(margins[chosen_on], np.linspace(0.01, 0.99, 99))

    # The lowest score of the two answers, so that "absent" is not said of everything.
    def balanced(threshold: float) -> float:
        said, absent = margins[chosen_on] < threshold, truth[chosen_on]
        return min((said & absent).sum() / absent.sum(), (~said & ~absent).sum() / (~absent).sum())

    best = max(thresholds, key=balanced)
    table = Table(
        "grid_absent", ["answer", "threshold", "precision of absent", "recall of absent", "absent, yet answered"]
    )
    rest = ~chosen_on
    table.add("always the best voxel", "none", "-", "0.00", f"{100 * truth[rest].mean():.0f} %")
    for name, threshold in (("background phrase fits better", 0.0), ("threshold of the other half", float(best))):
        precision, recall, _ = judged(threshold, rest)
        wrong = ((margins[rest] >= threshold) & truth[rest]).sum() / max((margins[rest] >= threshold).sum(), 1)
        table.add(name, f"{threshold:+.3f}", f"{precision:.2f}", f"{recall:.2f}", f"{100 * wrong:.0f} %")
    table.details.update(pairs=int(rest.sum()), absent=int(truth[rest].sum()), phrases=phrases)
    return table


def main(_: list[str]) -> None:
    predictor = Predictor(_WORKDIR.value)
    config = predictor.config
    split = config.data.eval_split
    source = RecordSource(config.data.records, split)
    queries = read_queries(_RETRIEVAL.value, split)
    of_frame = {token: [query for query in queries if query.sample_token == token] for token in source.sample_tokens}
    clip = load_clip(config.teacher.path)
    frames = [stored_voxels(predictor, source[i], of_frame[source.sample_tokens[i]]) for i in range(len(source))]
    assert sum(len(frame.features) for frame in frames) >= CODEBOOK_ENTRIES
    precision_table(predictor, frames, clip, queries).write(_JSON.value)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "grids.zarr"
        export(
            predictor, source, range(len(source)), out, Selection(), split=split, text_tower=str(config.teacher.path)
        )
        absent_table(FeatureGrids.open(out), queries).write(_JSON.value)


if __name__ == "__main__":
    app.run(main)
