"""Asks a trained run for a phrase: python -m pop3d_jax.query --workdir W --text "a red car" --sample 0 --out out.png

Writes a picture: the six images with the best matches ringed, the occupied voxels coloured by similarity from above
and in perspective, and the ground truth beside them where there is one. Prints where the best matches are.
"""

import numpy as np
from absl import flags, logging
from etils import epath
from jaxtyping import Bool, Float

from pop3d_jax.checkpoint import CheckpointError
from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.inference import Predictor, find_sample
from pop3d_jax.models.clip import load_clip
from pop3d_jax.pictures import draw_query, voxel_centres
from pop3d_jax.text import embed_phrases
from pop3d_jax.workdir import WorkdirError


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
    clip = load_clip(config.teacher.path)
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
    scores, centres = similarity[best], voxel_centres(best, volume)
    for place in np.argsort(-scores, kind="stable")[:5]:
        x, y, z = centres[place]
        lines.append(f"{scores[place]:>10.3f}  {x:>8.1f}  {y:>8.1f}  {z:>8.1f}")
    return "\n".join(lines)


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    flags.DEFINE_string("workdir", None, "Folder that pop3d_jax.train wrote.")
    flags.DEFINE_integer("step", None, "Checkpoint to ask; the newest by default.")
    flags.DEFINE_string("text", None, 'The phrase, e.g. "a red car".')
    flags.DEFINE_string("sample", "0", "Sample token, or number of the key frame in the split.")
    flags.DEFINE_string("split", None, "Split of the records; the run's config.data.eval_split by default.")
    flags.DEFINE_string("records", None, "Folder of the records; the run's own by default.")
    flags.DEFINE_string("out", "query.png", "Picture to write.")
    flags.DEFINE_integer("hits", 25, "How many of the best voxels are ringed in the images.")


def main(_: list[str]) -> None:
    with stop_with_message(WorkdirError, CheckpointError, RecordError, ValueError, FileNotFoundError):
        print(
            query(
                flags.FLAGS.workdir,
                flags.FLAGS.text,
                flags.FLAGS.sample,
                flags.FLAGS.out,
                step=flags.FLAGS.step,
                split=flags.FLAGS.split,
                records=flags.FLAGS.records,
                hits=flags.FLAGS.hits,
            )
        )
        logging.info("picture: %s", flags.FLAGS.out)


if __name__ == "__main__":
    _define_flags()
    flags.mark_flags_as_required(["workdir", "text"])
    run(main)
