"""Flags that several commands have, each in the same words. A command defines its own beside them."""

import math

from absl import flags

from pop3d_jax.grids.background import BACKGROUND_PHRASES


def define_run_flags() -> None:
    """Which trained run: --workdir, --step."""
    flags.DEFINE_string("workdir", None, "Folder that pop3d_jax.train wrote.")
    flags.DEFINE_integer("step", None, "Checkpoint to take; the newest by default.")


def define_records_flags() -> None:
    """Which key frames: --records, --split."""
    flags.DEFINE_string("records", None, "Folder of the records; those of the run, or of the grids, by default.")
    flags.DEFINE_string(
        "split", None, "Split of the records; the run's config.data.eval_split, or that of the grids, by default."
    )


def define_lidar_flags() -> None:
    """Whether the run is one of a lidar network: --lidar, --dataset."""
    flags.DEFINE_bool("lidar", False, "Ask the lidar network of a distillation about the points of raw sweeps.")
    flags.DEFINE_string("dataset", None, "With --lidar: data set asked about; the run's, where it has only one.")


def define_evaluation_flags() -> None:
    """How a run is evaluated: --batch_size."""
    flags.DEFINE_integer(
        "batch_size", None, "Key frames at a time; the run's config.eval_batch_size by default.", lower_bound=1
    )


def define_report_flags() -> None:
    """Where numbers go: --out."""
    flags.DEFINE_string("out", None, "Also write the numbers to this JSON file.")


def define_phrase_flags() -> None:
    """Which store is asked what: --grids, --sample, --text, --background, --threshold, --text_tower."""
    flags.DEFINE_string("grids", None, "Store that pop3d_jax.export wrote.")
    flags.DEFINE_string("sample", "0", "Sample token, or number of the key frame in the split or the store.")
    flags.DEFINE_multi_string("text", None, "A phrase, such as 'a red car'.")
    flags.DEFINE_multi_string(
        "background", list(BACKGROUND_PHRASES), "What else there may be in the grids: what a phrase must beat."
    )
    flags.DEFINE_float("threshold", 0.0, "By how much a phrase must beat the background to count as present.")
    flags.register_validator("threshold", lambda value: not math.isnan(value), "must be a number")
    flags.DEFINE_string("text_tower", None, "CLIP folder or hub name for the grids' phrases; the run's by default.")
