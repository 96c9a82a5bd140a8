"""From the grey of what does not match a phrase to the red of what does: one definition for pages and pictures."""

import numpy as np
from jaxtyping import Float, UInt8

# Evenly spaced from low to high.
SIMILARITY_STOPS = ("#d9dde3", "#c9ced6", "#f4d58d", "#f08a24", "#c1121f", "#780000")
# Half of what is there is grey; the few best voxels set the other end.
_QUANTILES = (0.5, 0.998)


def similarity_range(similarity: Float[np.ndarray, " voxels"]) -> tuple[float, float]:
    """The similarities that get the first and the last colour: (0, 1) where there is no voxel."""
    if not similarity.size:
        return 0.0, 1.0
    low, high = np.quantile(similarity, _QUANTILES)
    return float(low), float(high)


def similarity_colours(
    similarity: Float[np.ndarray, " voxels"], low: float, high: float
) -> UInt8[np.ndarray, "voxels 3"]:
    """Red, green and blue of every voxel: the stops, and in between what lies between them."""
    stops = np.array([list(bytes.fromhex(stop[1:])) for stop in SIMILARITY_STOPS], np.float64)
    place = np.clip((similarity - low) / max(high - low, 1e-6), 0.0, 1.0) * (len(stops) - 1)
    channels = [np.interp(place, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)
