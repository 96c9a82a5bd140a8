"""Searching a store for phrases: every voxel of every key frame is compared, a block of rows at a time.

Similarity is the cosine between a voxel's feature and a phrase's text vector. For int8 codes it is a product with the
codes as they are, times one number a voxel; for product-quantised codes a sum of table entries. Several phrases, and
phrases that must not fit better, cost one pass.
"""

import concurrent.futures
import math
import os
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, UInt8

from pop3d_jax.grids.encoding import Codebook
from pop3d_jax.grids.store import GridStore

# Rows compared at a time: few enough that their float32 copy stays in a processor's cache, see `_products`.
_CACHE_ROWS = 512
# Bytes of features read and handed to the device at a time.
BLOCK_BYTES = 2**24
# Blocks under way for each processor: reading waits for files and locks.
_BLOCKS_PER_PROCESSOR = 2
# Bytes; XLA's CPU arrays start at multiples of it.
_ALIGNMENT = 64


def runs_of_key_frames(
    counts: Int[np.ndarray, " frames"], block_rows: int
) -> Iterator[tuple[Int[np.ndarray, " some"], int]]:
    """Key frames in runs of at most `block_rows` voxels (or one key frame): their numbers and how many voxels."""
    run: list[int] = []
    filled = 0
    for number in np.flatnonzero(counts > 0):
        if run and filled + counts[number] > block_rows:
            yield np.array(run), filled
            run, filled = [], 0
        run.append(int(number))
        filled += int(counts[number])
    if run:
        yield np.array(run), filled


@jax.jit
def _products(
    codes: Num[Array, "rows code"], factor: Float[Array, " rows"], phrases: Float[Array, "dim phrases"]
) -> Float[Array, "rows phrases"]:
    """Cosines of float16 or int8 codes; converted a little at a time, so that the copy never leaves the cache."""

    def some(chunk: Array) -> Array:
        return jnp.dot(chunk.astype(jnp.float32), phrases, precision="highest")

    chunks = codes.reshape(-1, _CACHE_ROWS, codes.shape[1])
    return jax.lax.map(some, chunks).reshape(len(codes), -1) * factor[:, None]


@jax.jit
def _table_sums(
    codes: UInt8[Array, "rows parts"], tables: Float[Array, "parts entries phrases"]
) -> Float[Array, "rows phrases"]:
    """Cosines of product-quantised codes; one long table a phrase is looked up twice as fast as one for each part."""
    parts, entries, _ = tables.shape
    indices = [codes[:, part].astype(jnp.int32) + part * entries for part in range(parts)]

    def of_phrase(table: Array) -> Array:
        return sum(table.at[index].get(mode="promise_in_bounds") for index in indices)

    return jnp.stack([of_phrase(table) for table in tables.reshape(parts * entries, -1).T], axis=-1)


def phrase_tables(
    phrases: Float[np.ndarray, "phrases dim"], codebook: Codebook
) -> Float[np.ndarray, "parts entries phrases"]:
    """Dot products of every codebook entry with the part of each phrase that it stands for."""
    rotated = (phrases @ codebook.rotation).reshape(len(phrases), codebook.parts, -1)
    return np.einsum("qpd,ped->peq", rotated, codebook.entries).astype(np.float32)


def _aligned_zeros(shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    """Zeros at an address that JAX takes over on a CPU without a copy."""
    size = math.prod(shape) * kind.itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(kind).reshape(shape)


def best_similarities(
    store: GridStore,
    offsets: Int[np.ndarray, " frames"],
    counts: Int[np.ndarray, " frames"],
    phrases: Float[np.ndarray, "phrases dim"],
    others: Float[np.ndarray, "others dim"],
    codebook: Codebook | None = None,
) -> Float[np.ndarray, "frames phrases"]:
    """How well each phrase fits the voxel of each key frame that it fits best: one pass over the store.

    Args:
      store: what is searched.
      offsets, counts: rows of its key frames.
      phrases: unit vectors.
      others: unit vectors; a voxel nearer to one of these than to the phrase is left out for that phrase.
      codebook: of precision "pq".

    Returns:
      Cosines; minus infinity where no voxel was left.
    """
    vectors = np.concatenate([phrases, others]).astype(np.float32)
    tables = None if codebook is None else jnp.asarray(phrase_tables(vectors, codebook))
    columns = jnp.asarray(vectors.T)
    similarity = np.full((len(counts), len(phrases)), -np.inf, np.float32)

    # What a thread reads into, again and again: fresh memory for every block would cost more than comparing it.
    buffers = threading.local()
    features = store.arrays["features"]
    row_bytes = features.dtype.numpy_dtype.itemsize * features.shape[1]
    size = max(BLOCK_BYTES // row_bytes, int(counts.max(initial=0)))
    size = -(-size // _CACHE_ROWS) * _CACHE_ROWS

    def read(name: str, ranges: list[tuple[int, int]]) -> np.ndarray:
        array = store.arrays[name]
        if not hasattr(buffers, name):
            setattr(buffers, name, _aligned_zeros((size, *array.shape[1:]), array.dtype.numpy_dtype))
        rows = getattr(buffers, name)
        store.read_into(name, ranges, rows)
        return rows

    def search(run: tuple[np.ndarray, int]) -> None:
        numbers, filled = run
        ranges = [(int(offsets[number]), int(offsets[number] + counts[number])) for number in numbers]
        codes = read("features", ranges)
        if tables is None:
            norm, scale = (read(name, ranges).astype(np.float32) for name in ("feature_norm", "feature_scale"))
            cosines = np.asarray(_products(codes, scale / np.maximum(norm, 1e-12), columns))
        else:
            cosines = np.asarray(_table_sums(codes, tables))
        cosines = cosines[:filled]
        if len(others):
            strongest = cosines[:, len(phrases) :].max(-1)
            cosines = np.where(cosines < strongest[:, None], -np.inf, cosines)
        starts = np.cumsum(counts[numbers]) - counts[numbers]
        similarity[numbers] = np.maximum.reduceat(cosines[:, : len(phrases)], starts)

    # Blocks on every core: one is read while another is compared.
    with concurrent.futures.ThreadPoolExecutor(_BLOCKS_PER_PROCESSOR * os.cpu_count()) as searchers:
        for done in [searchers.submit(search, run) for run in runs_of_key_frames(counts, size)]:
            done.result()
    return similarity
