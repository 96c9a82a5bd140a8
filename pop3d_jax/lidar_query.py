"""What points of a raw sweep are like a phrase, or like another point: answers of a distilled lidar network.

A network that a CLIP taught (`configs/lidar_clip.py`) speaks the language of its text tower, so phrases can be asked of
a sweep without any image. Every teacher's student can say which points are like a given one, as in the figures of the
ScaLR paper.
"""

import math
from collections.abc import Sequence

import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from pop3d_jax.data.lidar_examples import point_classes
from pop3d_jax.data.records import RecordSource
from pop3d_jax.inference import find_sample
from pop3d_jax.lidar_datasets import LidarDataset
from pop3d_jax.lidar_experiment import dataset_named, record_source
from pop3d_jax.lidar_inference import LidarPredictor
from pop3d_jax.lidar_pictures import draw_lidar_query
from pop3d_jax.teacher import load_text_side
from pop3d_jax.text import embed_phrases

# Metres between two of the best points: else they would all lie on one surface.
HIT_SPACING = 1.0
_LISTED = 5


def cosine_similarity(
    features: Float[np.ndarray, "points dim"], vector: Float[np.ndarray, " dim"]
) -> Float[np.ndarray, " points"]:
    """Cosine of the angle between each feature and the vector; 0 where one of the two is zero."""
    lengths = np.linalg.norm(features, axis=-1) * np.linalg.norm(vector)
    return np.divide(features @ vector, lengths, out=np.zeros(len(features), np.float32), where=lengths > 0)


def best_points(
    points: Float[np.ndarray, "points 3"],
    similarity: Float[np.ndarray, " points"],
    count: int,
    *,
    besides: int | None = None,
) -> Int[np.ndarray, " hits"]:
    """The most similar points, at least `HIT_SPACING` from each other, best first.

    Args:
      points: metres.
      similarity: of each.
      count: how many at most.
      besides: a point near which none is looked for.
    """
    free = np.isfinite(similarity)
    if besides is not None:
        free &= np.linalg.norm(points - points[besides], axis=-1) >= HIT_SPACING
    hits: list[int] = []
    while len(hits) < count and free.any():
        best = int(np.argmax(np.where(free, similarity, -np.inf)))
        hits.append(best)
        free &= np.linalg.norm(points - points[best], axis=-1) >= HIT_SPACING
        free[best] = False
    return np.array(hits, np.int64)


def parse_point(values: Sequence[str]) -> tuple[float, float, float]:
    """The place that --point=x,y,z names.

    Raises:
      ValueError: not three finite numbers.
    """
    try:
        x, y, z = map(float, values)
        if not all(map(math.isfinite, (x, y, z))):
            raise ValueError
    except ValueError:
        raise ValueError(f"--point={','.join(values)} must be three numbers x,y,z: metres in the lidar frame") from None
    return x, y, z


def lidar_query(
    workdir: epath.PathLike,
    sample: str,
    out: epath.PathLike,
    *,
    text: str | None = None,
    point: tuple[float, float, float] | None = None,
    dataset: str | None = None,
    step: int | None = None,
    split: str | None = None,
    records: str | None = None,
    hits: int = 25,
) -> str:
    """Draws which points of a sweep are like a phrase, or like one of them.

    Args:
      workdir: folder of a run of task "distillation".
      sample: token, or number in the split.
      out: PNG to write.
      text: the phrase; or else
      point: metres, lidar frame; the nearest point of the sweep is taken.
      dataset: name of the data set that the sample is of; the run's own, where it has only one.
      step: of the checkpoint; the newest by default.
      split, records: where the sample is; the run's own by default. As in training, `records` has a folder for each
        data set, by its name.
      hits: how many of the best points are ringed.

    Returns:
      A few lines that say where the best points are.

    Raises:
      ValueError: both or none of text and point, an empty phrase, a teacher without texts, a run of another task, an
        unknown sample or data set.
      WorkdirError, CheckpointError, RecordError: nothing to restore or to ask about.
    """
    if (text is None) == (point is None):
        raise ValueError("give --text to ask for a phrase, or --point to ask what is like a point: exactly one of them")
    predictor = LidarPredictor(workdir, step)
    config = predictor.config
    check_distilled(config, workdir)
    clip = None if text is None else load_text_side(config.teacher)
    facts, source = query_source(config, dataset, split, records)
    key_frame = source[find_sample(source, sample)]
    points = key_frame.points[:, :3]

    features = predictor(key_frame, facts)
    chosen = None
    lines = []
    if text is None:
        chosen = int(np.argmin(np.linalg.norm(points - np.asarray(point, np.float32), axis=-1)))
        vector = features[chosen]
        place = ", ".join(f"{value:.1f}" for value in points[chosen])
        distance = float(np.linalg.norm(points[chosen] - np.asarray(point)))
        lines.append(f"nearest point of the sweep: {place}, {distance:.2f} m from --point")
        title, asked = f"what is like the point ({place})", "the marked point"
    else:
        vector = embed_phrases(clip, [text], cache_dir=epath.Path(workdir) / "text_cache")[0]
        title, asked = f"“{text}”", "the phrase"
    similarity = cosine_similarity(features, vector)
    best = best_points(points, similarity, hits, besides=chosen)
    draw_lidar_query(
        out,
        key_frame=key_frame,
        dataset=facts,
        similarity=similarity,
        hits=best,
        chosen=chosen,
        classes=point_classes(key_frame, facts) if len(key_frame.lidarseg) else None,
        title=f"{title} in {key_frame.scene_name}, sample {key_frame.sample_token[:8]}",
        asked=asked,
    )
    lines.append(f"{'cosine':>10}  {'x':>8}  {'y':>8}  {'z':>8}  metres, lidar frame")
    for index in best[:_LISTED]:
        x, y, z = points[index]
        lines.append(f"{similarity[index]:>10.3f}  {x:>8.1f}  {y:>8.1f}  {z:>8.1f}")
    return "\n".join(lines)


def check_distilled(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
    """Raises ValueError where a run's network predicts classes, not a teacher's features."""
    if config.task != "distillation":
        raise ValueError(
            f"{workdir} holds a run of task {config.task!r}, which predicts classes: name the distillation that it "
            "started from"
        )


def query_source(
    config: ml_collections.ConfigDict, dataset: str | None, split: str | None, records: str | None
) -> tuple[LidarDataset, RecordSource]:
    """The data set and the key frames that a run is asked about; see `lidar_query` for the arguments.

    Raises:
      ValueError: no such data set, or several to choose from.
      RecordError: no such records.
    """
    names = sorted(config.datasets)
    if dataset is None and len(names) != 1:
        raise ValueError(f"the run learned from {', '.join(names)}: say with --dataset which one the sample is of")
    facts = dataset_named(dataset or names[0])
    if records:
        config = config.copy_and_resolve_references()
        config.data.records = str(records)
    return facts, record_source(config, facts.name, split or config.data.eval_split)
