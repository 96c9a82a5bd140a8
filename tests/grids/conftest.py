"""Small stores of random features."""

import numpy as np
import pytest
from random_grids import DIM, KEY_FRAMES, ROWS, attributes_of, random_key_frame

from pop3d_jax.grids.encoding import train_codebook
from pop3d_jax.grids.store import SHARD_KEY_FRAMES, GridStore, describe_arrays


@pytest.fixture
def make_store(tmp_path):
    """`make_store(precision)` writes a store: its path, and features of its key frames."""

    def make(precision="int8", name="grids.zarr", stop_after=KEY_FRAMES):
        generator = np.random.default_rng(0)
        codebook = None
        if precision == "pq":
            codebook = train_codebook(generator.normal(size=(600, DIM)).astype(np.float32), 4)
        key_frames = [random_key_frame(generator, precision, codebook) for _ in range(KEY_FRAMES)]
        shapes = (codebook.rotation.shape, codebook.entries.shape) if codebook else None
        arrays = describe_arrays(KEY_FRAMES, ROWS, 4 if codebook else DIM, precision, shapes)
        store = GridStore.create(tmp_path / name, attributes_of(precision), arrays, ROWS)
        if codebook:
            store.write_codebook(codebook.rotation, codebook.entries)
        for first in range(0, stop_after, SHARD_KEY_FRAMES):
            stored = [arrays for _, arrays in key_frames[first : first + SHARD_KEY_FRAMES]]
            store.write_shard(first, stored, ROWS)
        store.finish()
        return tmp_path / name, key_frames

    return make
