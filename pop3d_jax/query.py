"""Asks for a phrase: in one key frame of a trained run, or in all key frames of exported grids.

    python -m pop3d_jax.query --workdir W --text "a red car" --sample 0 --out out.png
    python -m pop3d_jax.query --lidar --workdir W --text "a red car" --sample 0 --out out.png [--dataset nuscenes]
    python -m pop3d_jax.query --lidar --workdir W --point 4,12,-1 --sample 0 --out out.png
    python -m pop3d_jax.query --grids grids.zarr --text "police car" [--text "bus"] [--without "car"] --top 20

The first writes a picture: the six images with the best matches ringed, the occupied voxels coloured by similarity from
above and in perspective, and the ground truth beside them where there is one, and prints where the best matches are.

With --lidar the run is a distillation of ScaLR: a phrase is answered on the raw sweep by a network that a CLIP taught,
and --point asks any distilled network which points are like the one nearest to x,y,z.

The last ranks the key frames of a store that `pop3d_jax.export` wrote, prints where in each of them the phrase fits
best, and with --out draws the pieces of the images there. A hit that fits a phrase of everyday things better than the
one asked for is marked with a question mark: "there is none" is an answer.
"""

import numpy as np
from absl import flags, logging
from etils import epath
from jaxtyping import Bool, Float

from pop3d_jax.checkpoint import CheckpointError
from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.grids.answers import draw_hits, format_hits
from pop3d_jax.grids.feature_grids import FeatureGrids
from pop3d_jax.grids.store import GridStoreError
from pop3d_jax.inference import Predictor, find_sample
from pop3d_jax.lidar_query import lidar_query, parse_point
from pop3d_jax.pictures import draw_query
from pop3d_jax.shared_flags import define_lidar_flags, define_phrase_flags, define_records_flags, define_run_flags
from pop3d_jax.teacher import load_text_side
from pop3d_jax.text import embed_phrases
from pop3d_jax.voxels import voxel_centres
from pop3d_jax.workdir import WorkdirError

# Flags that only some of the questions have.
_FLAGS_OF_RUNS = ("step", "sample", "hits")
_FLAGS_OF_LIDAR = ("point", "dataset")
_FLAGS_OF_GRIDS = ("top", "without", "background", "threshold", "text_tower")


def best_voxels(
    occupied: Bool[np.ndarray, "x y z"], similarity: Float[np.ndarray, "x y z"], count: int
) -> Bool[np.ndarray, "x y z"]:
    """The `count` occupied voxels (or all, where there are fewer) with the largest similarity."""
    ranked = np.argsort(np.where(occupied, -similarity, np.inf), axis=None, kind="stable")
    best = np.zeros(occupied.size, bool)
    best[ranked[: min(count, int(occupied.sum()))]] = True
    return best.reshape(occupied.shape)


def query(
    workdir: epath.PathLike,
    text: str,
    sample: str,
    out: epath.PathLike,
    *,
    step: int | None = None,
    split: str | None = None,
    records: str | None = None,
    hits: int = 25,
) -> str:
    """Draws the answer to a phrase in one key frame.

    Args:
      workdir: folder of the run.
      text: the phrase.
      sample: token, or number in the split.
      out: PNG to write.
      step: of the checkpoint; the newest by default.
      split, records: where the sample is; the run's own by default.
      hits: how many of the best voxels are ringed.

    Returns:
      A few lines that say where the best matches are.

    Raises:
      ValueError: an empty phrase or an unknown sample.
    """
    predictor = Predictor(workdir, step)
    config = predictor.config
    source = RecordSource(records or config.data.records, split or config.data.eval_split)
    key_frame = source[find_sample(source, sample)]
    clip = load_text_side(config.teacher)
    phrase = embed_phrases(clip, [text], cache_dir=epath.Path(workdir) / "text_cache")[0]

    prediction = predictor(key_frame)
    similarity = prediction.features @ phrase
    best = best_voxels(prediction.occupied, similarity, hits)
    volume = predictor.student.volume
    draw_query(
        out,
        key_frame=key_frame,
        volume=volume,
        occupied=prediction.occupied,
        similarity=similarity,
        hits=best,
        target=predictor.target(key_frame),
        title=f"“{text}” in {key_frame.scene_name}, sample {key_frame.sample_token[:8]}",
    )
    lines = [f"{'similarity':>10}  {'right':>8}  {'ahead':>8}  {'up':>8}  metres from the lidar"]
    scores, centres = similarity[best], voxel_centres(np.argwhere(best), volume)
    for place in np.argsort(-scores, kind="stable")[:5]:
        x, y, z = centres[place]
        lines.append(f"{scores[place]:>10.3f}  {x:>8.1f}  {y:>8.1f}  {z:>8.1f}")
    return "\n".join(lines)


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    define_run_flags()
    define_records_flags()
    define_lidar_flags()
    define_phrase_flags()
    flags.DEFINE_string("out", None, "Picture to write; query.png by default, none with --grids.")
    flags.DEFINE_integer("hits", 25, "How many of the best voxels or points are ringed in the images.", lower_bound=1)
    flags.DEFINE_list("point", None, "With --lidar: x,y,z, metres in the lidar frame; what is like the nearest point?")
    flags.DEFINE_integer("top", 20, "With --grids: key frames a phrase.", lower_bound=1)
    flags.DEFINE_multi_string("without", [], "With --grids: voxels nearer to this phrase do not count.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    with stop_with_message(WorkdirError, CheckpointError, RecordError, GridStoreError, ValueError, OSError):
        _check(values)
        if values.grids:
            _search(values)
            return
        out = values.out or "query.png"
        asked = {name: values[name].value for name in ("step", "split", "records", "hits")}
        if values.lidar:
            question = {"text": values.text[0]} if values.text else {"point": parse_point(values.point)}
            print(lidar_query(values.workdir, values.sample, out, dataset=values.dataset, **question, **asked))
        else:
            print(query(values.workdir, values.text[0], values.sample, out, **asked))
        logging.info("picture: %s", out)


def _check(values: flags.FlagValues) -> None:
    """Raises ValueError where flags do not go together."""
    if bool(values.workdir) == bool(values.grids):
        raise ValueError("give --workdir to ask a trained run, or --grids to ask exported grids")
    if values.lidar and values.grids:
        raise ValueError("--lidar asks a trained run: give its --workdir in place of --grids")
    if values.lidar and bool(values.text) == bool(values.point):
        raise ValueError("--lidar needs --text, a phrase, or --point, x,y,z in metres: exactly one of them")
    if not values.lidar:
        for name in _FLAGS_OF_LIDAR:
            if values[name].present:
                raise ValueError(f"--{name} says nothing without --lidar: leave it out, or ask a lidar network")
        if not values.text:
            raise ValueError('give --text, the phrase to ask for, such as --text "a red car"')
    if values.workdir and len(values.text or ()) > 1:
        raise ValueError("several --text need --grids")
    asked, others = ("grids", _FLAGS_OF_RUNS) if values.grids else ("workdir", _FLAGS_OF_GRIDS)
    for name in others:
        if values[name].present:
            raise ValueError(f"--{name} says nothing with --{asked}: leave it out")


def _search(values: flags.FlagValues) -> None:
    grids = FeatureGrids.open(values.grids, text_tower=values.text_tower)
    hits = grids.search(
        values.text, values.top, without=values.without, background=values.background, threshold=values.threshold
    )
    print(format_hits(hits))
    if values.out:
        attributes = grids.store.attributes
        records = values.records or attributes["config"]["data"]["records"]
        draw_hits(values.out, hits, RecordSource(records, values.split or attributes["records"]["split"]))
        logging.info("picture: %s", values.out)


if __name__ == "__main__":
    _define_flags()
    run(main)
