"""Writes the occupied voxels of many key frames into one store: python -m pop3d_jax.export --workdir W --out grids.zarr

The store is a Zarr v3 group of coordinates, occupancy, features, poses and calibration (docs/feature_grids.md): read
it with `from pop3d_jax import FeatureGrids`, with any Zarr library, or ask it with `pop3d_jax.query --grids`. A stopped
export goes on when its command is given again; several hosts (docs/running.md) each write files of their own. Which
voxels are stored, and how, says the run's `config.export`, unless a flag of the same name says otherwise.
"""

import math
import time

import jax
import numpy as np
from absl import flags, logging

from pop3d_jax.checkpoint import CheckpointError
from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.grids.encoding import PRECISIONS
from pop3d_jax.grids.exporter import export
from pop3d_jax.grids.selection import configured_selection
from pop3d_jax.grids.store import GridStoreError
from pop3d_jax.grids.tables import write_parquet
from pop3d_jax.hosts import join_hosts
from pop3d_jax.inference import Predictor, find_sample
from pop3d_jax.shared_flags import define_records_flags, define_run_flags
from pop3d_jax.teacher import check_text_side
from pop3d_jax.workdir import WorkdirError


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    define_run_flags()
    define_records_flags()
    flags.DEFINE_list("samples", None, "Only these key frames: tokens, or numbers in the split.")
    flags.DEFINE_string("out", None, "Store to write, a local folder or gs://...; a file for --format=parquet.")
    flags.DEFINE_enum("format", "zarr", ["zarr", "parquet"], "zarr, or one Parquet table with a row a voxel.")
    flags.DEFINE_float(
        "threshold",
        None,
        "Voxels of a larger probability of being occupied are stored; the run's config.export.threshold by default.",
    )
    flags.DEFINE_integer(
        "top_k",
        None,
        "At most so many voxels a key frame, the most probable; 0 for no limit; config.export.top_k by default.",
    )
    flags.DEFINE_bool(
        "dense",
        False,
        "All voxels, whatever their probability and the config: --threshold=0 --top_k=0. Large; mind --samples.",
    )
    flags.DEFINE_enum(
        "precision",
        None,
        PRECISIONS,
        "Of the features: float16, int8 with a scale a voxel, or pq; config.export.precision by default.",
    )
    flags.DEFINE_integer(
        "pq_bytes",
        None,
        "Bytes of a feature at --precision=pq; config.export.pq_bytes by default, or where that is 0 a 32nd of the "
        "feature's float16 size, and 8 at least.",
        lower_bound=1,
    )
    flags.DEFINE_bool("overwrite", False, "Delete another store that is at --out.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    with stop_with_message(WorkdirError, CheckpointError, RecordError, GridStoreError, ValueError, OSError):
        if values.dense and values.threshold is not None:
            raise ValueError("--dense stores all voxels: leave out --threshold, or --dense")
        if values.samples == []:
            raise ValueError("--samples is empty: name key frames, or leave it out for all of the split")
        join_hosts()
        predictor = Predictor(values.workdir, values.step)
        config = predictor.config
        split = values.split or config.data.eval_split
        source = RecordSource(values.records or config.data.records, split)
        numbers = [find_sample(source, sample, "--samples") for sample in values.samples or ()] or range(len(source))
        selection = configured_selection(
            config,
            threshold=0.0 if values.dense else values.threshold,
            top_k=0 if values.dense and values.top_k is None else values.top_k,
            precision=values.precision,
            pq_bytes=values.pq_bytes,
        )
        if values.format == "parquet":
            rows = write_parquet(values.out, predictor, source, numbers, selection, overwrite=values.overwrite)
            print(f"{values.out}: {len(numbers)} key frames, {rows:,} voxels")
            return
        check_text_side(config.teacher)  # a store is asked for phrases
        start = time.monotonic()
        store = export(
            predictor,
            source,
            numbers,
            values.out,
            selection,
            split=split,
            text_tower=str(config.teacher.path),
            overwrite=values.overwrite,
        )
        seconds = time.monotonic() - start
    if jax.process_index():
        return
    counts = np.maximum(store.read("voxel_count"), 0)
    row = sum(array.dtype.numpy_dtype.itemsize * math.prod(array.shape[1:]) for array in store.row_arrays().values())
    print(f"{values.out}: {len(counts)} key frames, {counts.sum():,} voxels, {counts.mean():,.0f} a key frame")
    print(f"{counts.mean() * row / 1e3:,.1f} kB a key frame before compression; {seconds:.0f} s")
    logging.info("ask it: python -m pop3d_jax.query --grids %s --text 'a red car'", values.out)


if __name__ == "__main__":
    _define_flags()
    flags.mark_flags_as_required(["workdir", "out"])
    run(main)
