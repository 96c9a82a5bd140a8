"""Annotations of language-driven retrieval in the published benchmark's layout: which points a phrase means."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

FEWEST_POINTS = 20
# Said in full, with their colour, and by their noun alone.
_COLOURED = {"car", "truck", "bus", "pedestrian", "building"}


def phrases(
    captions: list[dict[str, Any]], number: Int[np.ndarray, " points"]
) -> dict[str, Bool[np.ndarray, " points"]]:
    """Phrases that mean at least 20 points of a sweep, and which points those are.

    Args:
      captions: the scene's entries of captions.json; the entry of number n is at n - 1.
      number: thing number of every point of the sweep.
    """
    meant: dict[str, list[int]] = {}
    for entry in captions:
        says = {entry["caption"]}
        if entry["noun"] in _COLOURED:
            says.add(f"a {entry['noun']}")
        for phrase in says:
            meant.setdefault(phrase, []).append(entry["number"])
    result = {}
    for phrase in sorted(meant):
        matches = np.isin(number, meant[phrase])
        if matches.sum() >= FEWEST_POINTS:
            result[phrase] = matches
    return result


def write_matches(path: Path, matches: Bool[np.ndarray, " points"]) -> None:
    """Writes the matches as .npy, bool per point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, matches)
