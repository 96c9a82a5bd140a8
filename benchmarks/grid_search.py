"""Searching a store of many key frames: seconds and resident memory, int8 and product-quantised.

    python -m benchmarks.grid_search [--key_frames 6000] [--voxels 4000] [--dim 512] [--folder F] [--json docs/results]

Makes a store of random features of the published width (12.3 GB at int8, kept in --folder and used again), reads it
once, so that the file is in the page cache, and then times whole searches, each in a process of its own: opening, one
pass over all voxels, ranking. Text vectors are random, too: the text tower's time is not in it.
"""

import multiprocessing
import resource
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.report import Table

_KEY_FRAMES = flags.DEFINE_integer("key_frames", 6000, "of the store")
_VOXELS = flags.DEFINE_integer("voxels", 4000, "of a key frame, on average")
_DIM = flags.DEFINE_integer("dim", 512, "of a feature")
_FOLDER = flags.DEFINE_string("folder", "/tmp/pop3d_grid_search", "where the stores are made")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed searches of each")
_PHRASES = flags.DEFINE_integer("phrases", 1, "phrases of a search")
_JSON = flags.DEFINE_string("json", None, "folder of grid_search.json")


def make_store(path: Path, key_frames: int, voxels: int, dim: int, precision: str) -> None:
    """A store of random directions; a block of them, turned over and over, so that making it costs little."""
    from pop3d_jax.grids.encoding import encode, train_codebook
    from pop3d_jax.grids.layout import SHARD_KEY_FRAMES, describe_arrays, rows_per_key_frame
    from pop3d_jax.grids.store import GridStore

    generator = np.random.default_rng(0)
    pool = generator.normal(size=(2 * voxels, dim)).astype(np.float32)
    codebook = train_codebook(pool, dim // 16) if precision == "pq" else None
    encoded = encode(pool, precision, codebook)
    norm = np.linalg.norm(pool, axis=-1).astype(np.float16)
    shapes = (codebook.rotation.shape, codebook.entries.shape) if codebook else None
    rows = rows_per_key_frame(80_000)
    arrays = describe_arrays(key_frames, rows, encoded.codes.shape[1], precision, shapes)
    geometry = {"grid_size": [100, 100, 8], "volume_minimum": [-51.2, -51.2, -5.0], "volume_maximum": [51.2, 51.2, 3.0]}
    attributes = {
        "precision": precision,
        "feature_dim": dim,
        "geometry": geometry,
        "text_tower": "",
        "sample_tokens": [f"{number:032x}" for number in range(key_frames)],
    }
    store = GridStore.create(path, attributes, arrays, rows)
    if codebook:
        store.write_codebook(codebook.rotation, codebook.entries)
    still = {
        "timestamp": np.int64(0),
        "scene_name": np.zeros(64, np.uint8),
        "image_hw": np.full((6, 2), (900, 1600), np.int32),
        "lidar_to_ego": np.eye(4),
        "ego_to_global": np.eye(4),
        "lidar_to_camera": np.zeros((6, 4, 4)),
        "intrinsics": np.zeros((6, 3, 3)),
    }
    written = store.written()
    for first in range(0, key_frames, SHARD_KEY_FRAMES):
        count = min(SHARD_KEY_FRAMES, key_frames - first)
        if written[first : first + count].all():
            continue
        frames = []
        for _ in range(count):
            size = int(generator.integers(voxels * 3 // 4, voxels * 5 // 4))
            start = int(generator.integers(0, 2 * voxels - size))
            part = slice(start, start + size)
            frames.append(
                still
                | {
                    "coordinates": np.zeros((size, 3), np.uint8),
                    "occupancy": np.ones(size, np.float16),
                    "features": encoded.codes[part],
                    "feature_scale": encoded.scale[part],
                    "feature_norm": norm[part],
                }
            )
        store.write_shard(first, frames, rows)
    store.finish()


def timed(path: str, phrases: int, dim: int, results: multiprocessing.Queue) -> None:
    """One search, with its peak memory, into the queue."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from pop3d_jax.grids.feature_grids import FeatureGrids
    from pop3d_jax.grids.search import best_similarities

    vectors = np.random.default_rng(1).normal(size=(phrases, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    grids = FeatureGrids.open(path)
    few = np.where(np.arange(len(grids)) < 16, grids.counts, 0)
    best_similarities(grids.store, grids.offsets, few, vectors, vectors[:0], grids.codebook)  # compiled
    start = time.perf_counter()
    grids = FeatureGrids.open(path)
    best = best_similarities(grids.store, grids.offsets, grids.counts, vectors, vectors[:0], grids.codebook)
    order = np.argsort(-best[:, 0])[:20]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put((seconds, peak, int(order[0])))


def main(_: list[str]) -> None:
    table = Table(
        "grid_search",
        [
            "precision",
            "key frames",
            "voxels",
            "features",
            "phrases",
            "first pass",
            "median of later ones",
            "peak memory",
        ],
    )
    context = multiprocessing.get_context("spawn")
    for precision in ("int8", "pq"):
        path = Path(_FOLDER.value) / f"{precision}_{_KEY_FRAMES.value}x{_VOXELS.value}x{_DIM.value}.zarr"
        make_store(path, _KEY_FRAMES.value, _VOXELS.value, _DIM.value, precision)
        runs = []
        for _ in range(_REPEATS.value + 1):
            results = context.Queue()
            process = context.Process(target=timed, args=(str(path), _PHRASES.value, _DIM.value, results))
            process.start()
            runs.append(results.get(timeout=600))
            process.join()
        seconds, peak = np.array([run[:2] for run in runs]).T
        size = sum(file.stat().st_size for file in (path / "features").rglob("*") if file.is_file())
        from pop3d_jax.grids.feature_grids import FeatureGrids

        voxels = int(FeatureGrids.open(path).counts.sum())
        table.add(
            precision,
            _KEY_FRAMES.value,
            f"{voxels / 1e6:.1f} M",
            f"{size / 1e9:.2f} GB",
            _PHRASES.value,
            f"{seconds[0]:.2f} s",
            f"{np.median(seconds[1:]):.2f} s",
            f"{max(peak) / 1e9:.2f} GB",
        )
        table.details[precision] = {"seconds": seconds.tolist(), "peak_bytes": peak.tolist(), "voxels": voxels}
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)
