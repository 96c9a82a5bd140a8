"""Which voxels of a key frame are stored, and how: `config.export`, and what a command line changes of it."""

import dataclasses

import ml_collections
import numpy as np
from jaxtyping import Float, Int

from pop3d_jax.grids.encoding import PRECISIONS, Precision
from pop3d_jax.inference import Prediction

# Fewer bytes lose more than a point of retrieval on the demo's features (benchmarks/grid_precision.py).
_LEAST_PQ_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which voxels of a key frame are stored, and how.

    Attributes:
      threshold: probability above which a voxel counts as occupied; the official decision is 0.5. 0 stores all.
      top_k: at most so many, the most probable ones; 0 for all above the threshold.
      precision: of the features.
      pq_bytes: bytes of a product-quantised feature.

    Raises:
      ValueError: a value out of range.
    """

    threshold: float = 0.5
    top_k: int = 0
    precision: Precision = "int8"
    pq_bytes: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"{_named('threshold', self.threshold)} must be at least 0 and below 1")
        if self.top_k < 0:
            raise ValueError(f"{_named('top_k', self.top_k)} must be at least 1, or 0 for all voxels above --threshold")
        if (self.precision == "pq") != (self.pq_bytes > 0):
            raise ValueError(f"{_named('pq_bytes', self.pq_bytes)} belongs to --precision=pq, and is needed there")


def _named(field: str, value: object) -> str:
    return f"--{field}={value} (or config.export.{field})"


def configured_selection(
    config: ml_collections.ConfigDict,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    precision: Precision | None = None,
    pq_bytes: int | None = None,
) -> Selection:
    """The selection of a run's `config.export`, which runs of before that section lack: the defaults, then.

    Args:
      config: of the run.
      threshold, top_k, precision, pq_bytes: in place of the field of that name; None as in the configuration.

    Raises:
      ValueError: a value out of range, or an unknown field.
    """
    section = dict(config.get("export", {}))
    unknown = sorted(set(section) - {field.name for field in dataclasses.fields(Selection)})
    if unknown:
        raise ValueError(f"unknown fields of config.export: {unknown}")
    given = {"threshold": threshold, "top_k": top_k, "precision": precision}
    chosen = section | {name: value for name, value in given.items() if value is not None}
    if chosen.get("precision", PRECISIONS[0]) not in PRECISIONS:
        raise ValueError(f"{_named('precision', chosen['precision'])} must be one of {', '.join(PRECISIONS)}")
    # The configuration's size of a code counts only where codes are stored.
    configured = chosen.pop("pq_bytes", 0)
    if chosen.get("precision") == "pq" and pq_bytes is None:
        pq_bytes = configured or max(config.model.feature_dim // 16, _LEAST_PQ_BYTES)
    return Selection(**chosen, pq_bytes=pq_bytes or 0)


def select(
    prediction: Prediction, selection: Selection
) -> tuple[Int[np.ndarray, "voxels 3"], Float[np.ndarray, " voxels"], Float[np.ndarray, "voxels dim"]]:
    """The voxels that are stored: indices in the order of the grid, probabilities, features."""
    occupancy = prediction.occupancy
    chosen = occupancy.reshape(-1) > selection.threshold
    if selection.threshold == 0.0:
        chosen[:] = True
    flat = np.flatnonzero(chosen)
    if selection.top_k and len(flat) > selection.top_k:
        ranked = np.argsort(-occupancy.reshape(-1)[flat], kind="stable")
        flat = np.sort(flat[ranked[: selection.top_k]])
    coordinates = np.stack(np.unravel_index(flat, occupancy.shape), -1)
    return (
        coordinates,
        occupancy.reshape(-1)[flat],
        prediction.features.reshape(-1, prediction.features.shape[-1])[flat],
    )
