"""Average precision of phrases over the points of raw sweeps, answered by a distilled lidar network."""

import numpy as np
from etils import epath

from pop3d_jax.lidar_inference import LidarPredictor
from pop3d_jax.lidar_query import check_distilled, query_source
from pop3d_jax.progress import progress
from pop3d_jax.retrieval import Retrieval, embed_queries, read_queries
from pop3d_jax.teacher import load_text_side


def score_phrases(
    workdir: epath.PathLike,
    retrieval_dir: epath.PathLike,
    *,
    dataset: str | None = None,
    step: int | None = None,
    split: str | None = None,
    records: str | None = None,
) -> tuple[Retrieval, LidarPredictor, int]:
    """Ranks all points of every sweep by their cosine with each phrase.

    Args:
      workdir: folder of a run of task "distillation", whose teacher has a text side.
      retrieval_dir: as `read_queries` takes it; queries of the split.
      dataset, step, split, records: as `lidar_query.lidar_query`.

    Returns:
      What was gathered, the network, and the number of key frames.

    Raises:
      RetrievalError, RecordError, WorkdirError, CheckpointError, ValueError: see `Retrieval` and `lidar_query`.
    """
    predictor = LidarPredictor(workdir, step)
    check_distilled(predictor.config, workdir)
    clip = load_text_side(predictor.config.teacher)
    facts, source = query_source(predictor.config, dataset, split, records)
    queries = read_queries(retrieval_dir, split or predictor.config.data.eval_split)
    retrieval = Retrieval(
        queries, source.sample_tokens, embed_queries(queries, clip, epath.Path(workdir) / "text_cache")
    )
    asked = {query.sample_token for query in queries}
    for index, token in progress(enumerate(source.sample_tokens), len(source), "key frames"):
        if token not in asked:
            continue
        features = predictor(source[index], facts)
        unit = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
        every = np.ones((1, len(unit)), bool)
        retrieval.add(unit[None], every, np.array([True]), np.array([index]), np.array([0]))
    return retrieval, predictor, len(source)
