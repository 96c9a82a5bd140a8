"""One comparison with a golden array, and the ways in which two arrays are compared."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Shaped


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of one comparison.

    Attributes:
      name: of the golden array, or of what is compared.
      tolerance: largest difference that passes.
      difference: largest difference that was found; infinite where the shapes differ.
      note: how it is measured where it is not the absolute difference, and where it is largest.
    """

    name: str
    tolerance: float
    difference: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; an undefined difference is not."""
        return self.difference <= self.tolerance


def absolute(
    name: str, ours: Shaped[np.ndarray, "..."], official: Shaped[np.ndarray, "..."], tolerance: float, note: str = ""
) -> Check:
    """Compares by the largest absolute difference."""
    if ours.shape != official.shape:
        return _misshapen(name, ours, official, tolerance)
    return Check(name, float(tolerance), float(np.max(_distances(ours, official), initial=0.0)), note)


def relative(
    name: str,
    ours: Shaped[np.ndarray, "..."],
    official: Shaped[np.ndarray, "..."],
    tolerance: float,
    floor: float = 0.0,
) -> Check:
    """Compares by the largest difference relative to the official element's size plus `floor`.

    With a floor this is NumPy's `allclose` of rtol = tolerance and atol = tolerance * floor.
    """
    if ours.shape != official.shape:
        return _misshapen(name, ours, official, tolerance)
    distances = _distances(ours, official)
    sizes = np.abs(official.astype(np.float64)) + floor
    with np.errstate(divide="ignore"):
        quotients = np.divide(distances, sizes, out=np.zeros_like(distances), where=distances != 0)
    note = f"relative to |x| + {floor:.1e}" if floor else "relative"
    return Check(name, float(tolerance), float(np.max(quotients, initial=0.0)), note)


def relative_norm(
    name: str, ours: Shaped[np.ndarray, "..."], official: Shaped[np.ndarray, "..."], tolerance: float
) -> Check:
    """Compares by the L2 norm of the difference over that of the official array."""
    if ours.shape != official.shape:
        return _misshapen(name, ours, official, tolerance)
    difference, size = np.linalg.norm(_distances(ours, official)), np.linalg.norm(official.astype(np.float64))
    quotient = difference / size if size else np.where(difference == 0, 0.0, np.inf)
    return Check(name, float(tolerance), float(quotient), "L2 norm, relative")


def exact(name: str, ours: Shaped[np.ndarray, "..."], official: Shaped[np.ndarray, "..."], note: str = "") -> Check:
    """Counts the elements that differ; none may."""
    if ours.shape != official.shape:
        return _misshapen(name, ours, official, 0.0)
    return Check(name, 0.0, float(np.sum(ours != official)), note or "elements that differ")


def exact_where_clear(
    name: str, ours: Shaped[np.ndarray, "..."], official: Shaped[np.ndarray, "..."], clear: Bool[np.ndarray, "..."]
) -> Check:
    """Counts the choices that differ, without those that rounding may turn.

    Args:
      clear: elements whose best two candidates are further apart than rounding can move them. Where they are less
        than 99 % of all, the exception would hide an error, and every element counts.
    """
    if ours.shape != official.shape:
        return _misshapen(name, ours, official, 0.0)
    counted = clear if clear.mean() > 0.99 else np.ones_like(clear)
    note = f"elements that differ, of the {counted.mean():.2%} with a clear choice"
    return exact(name, ours[counted], official[counted], note)


def _distances(ours: Shaped[np.ndarray, "..."], official: Shaped[np.ndarray, "..."]) -> np.ndarray:
    """Absolute differences in float64; NaN, which passes no tolerance, where either is undefined."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(ours.astype(np.float64) - official.astype(np.float64)))


def _misshapen(
    name: str, ours: Shaped[np.ndarray, "..."], official: Shaped[np.ndarray, "..."], tolerance: float
) -> Check:
    return Check(name, float(tolerance), float("inf"), f"shape {ours.shape}, official {official.shape}")
