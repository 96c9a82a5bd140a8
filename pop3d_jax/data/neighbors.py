"""The nearest neighbours of every point of a cloud, for WaffleIron's embedding.

Two implementations of one function, both exact: SciPy's k-d tree in the workers of the pipeline, and a search over all
pairs in the step, which a chip does in dense arithmetic. `benchmarks/neighbors.py` states what each costs.

Row 0 is the point itself. Among points at the same distance the search over all pairs takes those of lower index
first; the k-d tree leaves their order open. A cloud of fewer points than neighbours names the point itself in
their stead: in the embedding, whose neighbours are differences to the point followed by a maximum, that is a neighbour
at distance zero. (The official code stops there.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32
from scipy.spatial import cKDTree

IMPLEMENTATIONS = ("kd_tree", "all_pairs")

# How many more candidates than neighbours the float32 distances select; float64's order decides among them.
_SPARE = 8


def nearest_neighbors(
    xyz: Float32[Array | np.ndarray, "points 3"],
    point_mask: Bool[Array | np.ndarray, " points"],
    count: int,
    *,
    implementation: str,
    block: int = 512,
) -> Int32[Array | np.ndarray, "points neighbors"]:
    """Indices of the `count` nearest neighbours of each point, behind the point itself.

    Args:
      xyz: metres.
      point_mask: False for padding, which stands behind the points; it is nobody's neighbour.
      count: neighbours without the point itself; fewer than there are rows.
      implementation: "kd_tree" (NumPy, in a worker) or "all_pairs" (JAX, may be jitted and mapped over a batch).
      block: points whose distances to all others "all_pairs" holds at a time.

    Returns:
      count + 1 indices a point; padding names the last row, as official collation does.

    Raises:
      ValueError: an unknown implementation, or not more rows than neighbours.
    """
    if count >= len(xyz):
        raise ValueError(f"{count} neighbours in a cloud of {len(xyz)} rows: give it more rows, or ask for fewer")
    if implementation == "kd_tree":
        return _kd_tree(np.asarray(xyz), np.asarray(point_mask), count)
    if implementation == "all_pairs":
        return _all_pairs(jnp.asarray(xyz), jnp.asarray(point_mask), count, block)
    raise ValueError(f"neighbours by {implementation!r}; known implementations: {', '.join(IMPLEMENTATIONS)}")


def _kd_tree(
    xyz: Float32[np.ndarray, "points 3"], point_mask: Bool[np.ndarray, " points"], count: int
) -> Int32[np.ndarray, "points neighbors"]:
    neighbors = np.full((len(xyz), count + 1), len(xyz) - 1, np.int32)
    kept = xyz[point_mask]
    if not len(kept):
        return neighbors
    own = np.arange(len(kept))[:, None]
    found = cKDTree(kept).query(kept, k=np.arange(1, count + 2))[1]
    found = np.where(found == len(kept), own, found)  # SciPy's word for no such neighbour
    # Where points coincide the tree may name another first, or leave the point itself out.
    found = np.concatenate([own, found], 1)
    behind = found == own
    behind[:, 0] = False
    order = np.argsort(behind, axis=1, kind="stable")[:, : count + 1]
    neighbors[: len(kept)] = np.take_along_axis(found, order, 1)
    return neighbors


@functools.partial(jax.jit, static_argnames=("count", "block"))
def _all_pairs(
    xyz: Float32[Array, "points 3"], point_mask: Bool[Array, " points"], count: int, block: int
) -> Int32[Array, "points neighbors"]:
    points = len(xyz)
    candidates = min(count + 1 + _SPARE, points)

    def of_block(rows: Int32[Array, " block"]) -> Int32[Array, "block neighbors"]:
        rows = jnp.minimum(rows, points - 1)
        centres = xyz[rows]
        # Differences first: |a|^2 - 2 a.b + |b|^2 cancels, and loses what lies nearest.
        squared = sum(jnp.square(centres[:, axis, None] - xyz[None, :, axis]) for axis in range(3))
        squared = jnp.where(point_mask, squared, jnp.inf)
        squared = squared.at[jnp.arange(len(rows)), rows].set(-1.0)
        coarse, near = lax.top_k(-squared, candidates)
        high, low = _squared_distance(centres[:, None], xyz[near])
        own = near == rows[:, None]
        high = jnp.where(own, -1.0, jnp.where(jnp.isinf(coarse), jnp.inf, high))
        high, _, near = lax.sort((high, low, near), dimension=1, num_keys=3)
        return jnp.where(jnp.isinf(high), rows[:, None], near)[:, : count + 1]

    blocks = -(-points // block)
    rows = jnp.arange(blocks * block, dtype=jnp.int32).reshape(blocks, block)
    neighbors = lax.map(of_block, rows).reshape(-1, count + 1)[:points]
    return jnp.where(point_mask[:, None], neighbors, points - 1)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b and what float32 rounds off it (Knuth)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def _squared_distance(
    a: Float32[Array, "block 1 3"], b: Float32[Array, "block candidates 3"]
) -> tuple[Float32[Array, "block candidates"], Float32[Array, "block candidates"]]:
    """Squared distance as a sum of two float32, of some 44 bits: enough to order as float64 does.

    Every product but the smallest is exact in float32, so it does not matter whether a compiler fuses it with a sum.
    """
    difference, error = _two_sum(a, -b)
    coarse = lax.bitcast_convert_type(
        lax.bitcast_convert_type(difference, jnp.uint32) & jnp.uint32(0xFFFFF000), jnp.float32
    )
    fine = difference - coarse
    high = jnp.zeros(difference.shape[:-1], jnp.float32)
    low = jnp.zeros_like(high)
    for axis in range(3):
        c, f, d, e = (x[..., axis] for x in (coarse, fine, difference, error))
        for term in (c * c, 2 * c * f, f * f, 2 * d * e):
            high, rest = _two_sum(high, term)
            low = low + rest
    return _two_sum(high, low)
