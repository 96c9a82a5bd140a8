"""Writes the occupied voxels of many key frames into one store: python -m pop3d_jax.export --workdir W --out grids.zarr

The store is a Zarr v3 group of coordinates, occupancy, features, poses and calibration (docs/feature_grids.md): read
it with `from pop3d_jax import FeatureGrids`, with any Zarr library, or ask it with `pop3d_jax.query --grids`. A stopped
export goes on when its command is given again; several hosts (docs/running.md) each write files of their own.
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
from pop3d_jax.grids.exporter import Selection, export
from pop3d_jax.grids.store import GridStoreError
from pop3d_jax.grids.tables import write_parquet
from pop3d_jax.hosts import join_hosts
from pop3d_jax.inference import Predictor, find_sample
from pop3d_jax.teacher import check_text_side
from pop3d_jax.workdir import WorkdirError

# Fewer bytes lose more than a point of retrieval on the demo's features (benchmarks/grid_precision.py).
_LEAST_PQ_BYTES = 8


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    flags.DEFINE_string("workdir", None, "Folder that pop3d_jax.train wrote.")
    flags.DEFINE_integer("step", None, "Checkpoint to export from; the newest by default.")
    flags.DEFINE_string("records", None, "Folder of the records; the run's own by default.")
    flags.DEFINE_string("split", None, "Split of the records; the run's config.data.eval_split by default.")
    flags.DEFINE_list("samples", None, "Only these key frames: tokens, or numbers in the split.")
    flags.DEFINE_string("out", None, "Store to write, a local folder or gs://...; a file for --format=parquet.")
    flags.DEFINE_enum("format", "zarr", ["zarr", "parquet"], "zarr, or one Parquet table with a row a voxel.")
    flags.DEFINE_float("threshold", 0.5, "Voxels of a larger probability of being occupied are stored.")
    flags.DEFINE_integer("top_k", 0, "At most so many voxels a key frame, the most probable; 0 for no limit.")
    flags.DEFINE_bool("dense", False, "All voxels, whatever their probability: --threshold=0. Large; mind --samples.")
    flags.DEFINE_enum("precision", "int8", PRECISIONS, "Of the features: float16, int8 with a scale a voxel, or pq.")
    flags.DEFINE_integer(
        "pq_bytes",
        None,
        "Bytes of a feature at --precision=pq; by default a 32nd of its float16 size, and 8 at least.",
        lower_bound=1,
    )
    flags.DEFINE_bool("overwrite", False, "Delete another store that is at --out.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    with stop_with_message(
        WorkdirError, CheckpointError, RecordError, GridStoreError, ValueError, FileNotFoundError, FileExistsError
    ):
        join_hosts()
        predictor = Predictor(values.workdir, values.step)
        config = predictor.config
        split = values.split or config.data.eval_split
        source = RecordSource(values.records or config.data.records, split)
        numbers = [find_sample(source, sample, "--samples") for sample in values.samples or ()] or range(len(source))
        pq_bytes = values.pq_bytes or 0
        if values.precision == "pq" and not pq_bytes:
            pq_bytes = max(config.model.feature_dim // 16, _LEAST_PQ_BYTES)
        selection = Selection(0.0 if values.dense else values.threshold, values.top_k, values.precision, pq_bytes)
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
