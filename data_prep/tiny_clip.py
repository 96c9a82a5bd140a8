"""Trains a tiny CLIP on a synthetic world: the teacher of the demo where no real CLIP can be downloaded.

    python -m data_prep.tiny_clip --world demo/world --out demo/tiny_clip

It learns from pictures and captions of the world's training scenes, then is judged by the official 16-class
zero-shot protocol at the lidar points of the world's validation scenes (zero_shot.json). The folder is in Hugging
Face format; `load_clip` and `transformers` read it. It stands in for CLIP and is not one: it knows this world only.
"""

import sys
import time
from pathlib import Path

from absl import flags

from data_prep.table_rows import SourceError
from data_prep.tiny_clip_build import make_tiny_clip
from data_prep.tiny_clip_evaluation import report
from data_prep.tiny_clip_training import Schedule
from pop3d_jax import commands


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    flags.DEFINE_string("world", None, "Folder written by data_prep.synthetic.", required=True)
    flags.DEFINE_string("out", None, "Folder for the tiny CLIP, in Hugging Face format.", required=True)
    flags.DEFINE_integer(
        "steps", 1000, "Training steps of the image tower; 1000 are meant for two minutes on two cores.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "Seed of the weights and of every random choice.")
    flags.DEFINE_list(
        "image_size", ["144", "256"],
        "Height and width to which whole pictures are resized. Use the teacher at this size: what its patches mean "
        "depends on it.",
    )  # fmt: skip
    flags.DEFINE_integer("max_pictures", 1200, "Most training pictures to read.", lower_bound=1)
    flags.DEFINE_integer("max_key_frames", 40, "Most held-out key frames to judge on.", lower_bound=1)


def main(_: list[str]) -> None:
    world, out = Path(flags.FLAGS.world), Path(flags.FLAGS.out)
    if not (world / "world.json").is_file():
        sys.exit(f"error: --world {world} has no world.json: make it with python -m data_prep.synthetic --out {world}")
    try:
        height, width = map(int, flags.FLAGS.image_size)
    except ValueError:
        sys.exit(f"error: --image_size {','.join(flags.FLAGS.image_size)} must be height,width in pixels")
    start = time.monotonic()
    with commands.stop_with_message(SourceError, FileNotFoundError, FloatingPointError, ValueError):
        _, result = make_tiny_clip(
            world,
            out,
            schedule=Schedule(steps=flags.FLAGS.steps, seed=flags.FLAGS.seed),
            image_hw=(height, width),
            max_pictures=flags.FLAGS.max_pictures,
            max_key_frames=flags.FLAGS.max_key_frames,
        )
    print("zero-shot at the lidar points of held-out scenes (the bound of what a student can learn):")
    print(report(result))
    print(f"tiny CLIP in {out}, made in {time.monotonic() - start:.0f} s; a stand-in, not CLIP")


if __name__ == "__main__":
    _define_flags()
    commands.run(main)
