"""Whether a phrase is there at all: how far it is ahead of phrases that say what else there may be."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

# What a phrase must beat to count as present: words for everything that streets have.
BACKGROUND_PHRASES = (
    "road",
    "sidewalk",
    "grass",
    "tree",
    "bush",
    "building",
    "wall",
    "fence",
    "car",
    "truck",
    "bus",
    "bicycle",
    "motorcycle",
    "pedestrian",
    "traffic cone",
    "barrier",
    "pole",
    "sky",
    "object",
)


def rivals_of(phrase: str, background: Sequence[str]) -> list[int]:
    """Which background phrases a phrase must beat: all but those made of its own words, as "car" of "a red car"."""
    words = set(phrase.lower().split())
    return [index for index, other in enumerate(background) if not set(other.lower().split()) <= words]


def largest_lead(
    similarity: Float[np.ndarray, " voxels"],
    behind: Float[np.ndarray, "voxels background"],
    phrase: str,
    background: Sequence[str],
) -> tuple[float, str]:
    """By how much a phrase is nearer to a voxel than the nearest background phrase, where that is most.

    Args:
      similarity: cosines of the voxels with the phrase.
      behind: with each background phrase.
      phrase: the words; its own are no background, see `rivals_of`.
      background: the words of each.

    Returns:
      The lead, and the background phrase it was won over: minus infinity and "" without voxels, infinity and ""
      where nothing has to be beaten.
    """
    rivals = rivals_of(phrase, background)
    if not len(similarity):
        return float("-inf"), ""
    if not rivals:
        return float("inf"), ""
    lead = similarity - behind[:, rivals].max(-1)
    most = int(np.argmax(lead))
    return float(lead[most]), background[rivals[int(np.argmax(behind[most, rivals]))]]
