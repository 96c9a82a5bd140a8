"""How the features of voxels are written down: float16, int8 with a scale per voxel, or product-quantised.

A code with its scale stands for the vector `scale * direction(code)`; dot products with a phrase need no decoding:
int8 codes multiply as they are, and a product-quantised vector's product is a sum of table entries.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Num, UInt8

Precision = Literal["float16", "int8", "pq"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

# One byte names one of so many entries of a codebook.
CODEBOOK_ENTRIES = 256
_INT8_LARGEST = 127
_ITERATIONS = 20
# Vectors encoded at a time: bounds the memory of the distances.
_ENCODE_ROWS = 16_384


@dataclasses.dataclass(frozen=True)
class EncodedFeatures:
    """Features of voxels as they are stored.

    Attributes:
      codes: float16 vectors, int8 vectors, or uint8 numbers of codebook entries.
      scale: what the codes' vectors are multiplied with; ones for float16.
    """

    codes: Num[np.ndarray, "voxels code"]
    scale: Float16[np.ndarray, " voxels"]


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Entries that product quantisation chooses from.

    Attributes:
      rotation: orthogonal; spreads the variance over the parts.
      entries: of the rotated unit vectors, part by part.
    """

    rotation: Float[np.ndarray, "dim dim"]
    entries: Float[np.ndarray, "parts entries part_dim"]

    @property
    def parts(self) -> int:
        """Bytes of a code."""
        return self.entries.shape[0]


def _unit(features: Float[np.ndarray, "voxels dim"]) -> tuple[np.ndarray, np.ndarray]:
    norm = np.linalg.norm(features.astype(np.float32), axis=-1)
    return features / np.maximum(norm, 1e-12)[:, None], norm


def encode(
    features: Float[np.ndarray, "voxels dim"], precision: Precision, codebook: Codebook | None = None
) -> EncodedFeatures:
    """Writes features down.

    Args:
      features: any length, finite.
      precision: how.
      codebook: for "pq".

    Raises:
      ValueError: an unknown precision, "pq" without a codebook, or features beyond float16.
    """
    norm = np.linalg.norm(features, axis=-1) if len(features) else np.zeros(0)
    largest = np.finfo(np.float16).max
    if not np.all(norm <= largest):
        raise ValueError(f"features must be finite and no longer than {largest:.0f}, float16's largest number")
    if precision == "float16":
        return EncodedFeatures(features.astype(np.float16), np.ones(len(features), np.float16))
    if precision == "int8":
        largest_entry = np.abs(features).max(-1, initial=0.0)
        # Rounded first: codes are made with the very scale that will be read. Not below what float16 can tell from 0.
        scale = np.maximum(largest_entry / _INT8_LARGEST, np.finfo(np.float16).smallest_normal).astype(np.float16)
        codes = np.rint(features / scale[:, None].astype(np.float32))
        return EncodedFeatures(np.clip(codes, -_INT8_LARGEST, _INT8_LARGEST).astype(np.int8), scale)
    if precision == "pq":
        if codebook is None:
            raise ValueError('precision "pq" needs a codebook: see train_codebook')
        unit, norm = _unit(features)
        codes = _nearest_entries(unit @ codebook.rotation, codebook.entries)
        return EncodedFeatures(codes, norm.astype(np.float16))
    raise ValueError(f"precision {precision!r}: choose from {', '.join(PRECISIONS)}")


def decode(encoded: EncodedFeatures, codebook: Codebook | None = None) -> Float[np.ndarray, "voxels dim"]:
    """The vectors that codes stand for, float32."""
    if encoded.codes.dtype == np.uint8:
        if codebook is None:
            raise ValueError("product-quantised codes need their codebook")
        parts = np.arange(codebook.parts)
        rotated = codebook.entries[parts, encoded.codes].reshape(len(encoded.codes), -1)
        vectors = rotated @ codebook.rotation.T
    else:
        vectors = encoded.codes.astype(np.float32)
    return vectors * encoded.scale.astype(np.float32)[:, None]


def train_codebook(features: Float[np.ndarray, "voxels dim"], parts: int, seed: int = 0) -> Codebook:
    """Learns a codebook: principal axes dealt out to parts of like variance, then k-means in each part.

    Source: the parametric solution of Ge et al. 2013, "Optimized Product Quantization".

    Args:
      features: a sample, a few hundred times the entries if possible; their lengths do not matter.
      parts: bytes of a code; must divide the features' dimension.
      seed: of the first entries.

    Raises:
      ValueError: parts do not divide the dimension, or there are fewer vectors than entries.
    """
    voxels, dim = features.shape
    if parts < 1 or dim % parts:
        raise ValueError(f"product quantisation into {parts} parts: must divide the {dim} dimensions of the features")
    if voxels < CODEBOOK_ENTRIES:
        raise ValueError(
            f"a codebook needs at least {CODEBOOK_ENTRIES} voxels to learn from, there are {voxels}: lower "
            "--threshold, or take another --precision"
        )
    unit, _ = _unit(features)
    variance, axes = np.linalg.eigh(unit.T @ unit / voxels)
    rotation = axes[:, _balanced_order(variance, parts)].astype(np.float32)
    rotated = (unit @ rotation).reshape(voxels, parts, -1).swapaxes(0, 1)
    chosen = np.random.default_rng(seed).choice(voxels, CODEBOOK_ENTRIES, replace=False)
    entries = _k_means(jnp.asarray(rotated, jnp.float32), jnp.asarray(rotated[:, chosen], jnp.float32))
    return Codebook(rotation, np.asarray(entries))


def _balanced_order(variance: Float[np.ndarray, " dim"], parts: int) -> np.ndarray:
    """Axes dealt out so that the product of variances is alike in all parts: greedily, the largest first."""
    size = len(variance) // parts
    chosen: list[list[int]] = [[] for _ in range(parts)]
    logarithms = np.zeros(parts)
    for axis in np.argsort(-variance):
        room = [part for part in range(parts) if len(chosen[part]) < size]
        part = min(room, key=lambda part: logarithms[part])
        chosen[part].append(int(axis))
        # The smallest variances are rounding: as small as each other.
        logarithms[part] += np.log(max(variance[axis], 1e-9)) - np.log(1e-9)
    return np.array([axis for axes in chosen for axis in axes])


def _squared_distances(
    vectors: Float[Array, "parts voxels part_dim"], entries: Float[Array, "parts entries part_dim"]
) -> Float[Array, "parts voxels entries"]:
    """Up to each vector's own length."""
    products = jnp.einsum("pvd,ped->pve", vectors, entries, precision="highest")
    return jnp.sum(entries**2, -1)[:, None] - 2.0 * products


@jax.jit
def _k_means(
    vectors: Float[Array, "parts voxels part_dim"], entries: Float[Array, "parts entries part_dim"]
) -> Float[Array, "parts entries part_dim"]:
    """Lloyd's algorithm in each part; an entry that nobody chooses stays where it is."""

    def improve(entries: Array, _: None) -> tuple[Array, None]:
        def of_part(vectors: Array, entries: Array) -> Array:
            nearest = jnp.argmin(_squared_distances(vectors[None], entries[None])[0], axis=-1)
            total = jax.ops.segment_sum(vectors, nearest, CODEBOOK_ENTRIES)
            count = jax.ops.segment_sum(jnp.ones(len(vectors)), nearest, CODEBOOK_ENTRIES)[:, None]
            return jnp.where(count > 0, total / jnp.maximum(count, 1), entries)

        return jax.lax.map(lambda pair: of_part(*pair), (vectors, entries)), None

    return jax.lax.scan(improve, entries, None, length=_ITERATIONS)[0]


@jax.jit
def _nearest_of_chunk(
    rotated: Float[Array, "voxels dim"], entries: Float[Array, "parts entries part_dim"]
) -> UInt8[Array, "voxels parts"]:
    vectors = rotated.reshape(len(rotated), len(entries), -1).swapaxes(0, 1)
    nearest = jax.lax.map(
        lambda pair: jnp.argmin(_squared_distances(pair[0][None], pair[1][None])[0], axis=-1), (vectors, entries)
    )
    return nearest.T.astype(jnp.uint8)


def _nearest_entries(
    rotated: Float[np.ndarray, "voxels dim"], entries: Float[np.ndarray, "parts entries part_dim"]
) -> UInt8[np.ndarray, "voxels parts"]:
    codes = np.empty((len(rotated), len(entries)), np.uint8)
    for start in range(0, len(rotated), _ENCODE_ROWS):
        chunk = rotated[start : start + _ENCODE_ROWS]
        padded = np.zeros((_ENCODE_ROWS, rotated.shape[1]), np.float32)  # one shape, one compilation
        padded[: len(chunk)] = chunk
        codes[start : start + len(chunk)] = np.asarray(_nearest_of_chunk(padded, entries))[: len(chunk)]
    return codes
