"""From features to Occ3D's labels by phrases: what the labels of a network and those of a store have in common."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt8

from pop3d_jax.grids.background import BACKGROUND_PHRASES, rivals_of
from pop3d_jax.metrics import assign_classes, prompt_logits
from pop3d_jax.models.clip import LoadedCLIP
from pop3d_jax.occ3d.grid import FREE, OCC3D_CLASSES, OTHERS
from pop3d_jax.occ3d.prompts import PromptSet

# Of phrases that take no part in a key frame.
_ABSENT = 255
# What the background phrases say, as Occ3D's labels: no class need be ahead of its own names.
BACKGROUND_LABELS = {
    "road": 11,
    "sidewalk": 13,
    "grass": 14,
    "tree": 16,
    "bush": 16,
    "building": 15,
    "wall": 15,
    "fence": 15,
    "car": 4,
    "truck": 10,
    "bus": 3,
    "bicycle": 2,
    "motorcycle": 6,
    "pedestrian": 7,
    "traffic cone": 8,
    "barrier": 1,
    "pole": 15,
    "sky": FREE,
    "object": OTHERS,
}


@dataclasses.dataclass(frozen=True)
class LabelledGrid:
    """Predicted labels of one key frame on Occ3D's grid.

    Attributes:
      sample_token: the key frame.
      queried: the network asked at the voxels' centres; None of a store, which has no network.
      resampled: the network's own voxel that contains the centre.
      unseen: voxels whose centre lies outside the network's volume; both labels are free there.
    """

    sample_token: str
    queried: UInt8[np.ndarray, "200 200 16"] | None
    resampled: UInt8[np.ndarray, "200 200 16"]
    unseen: Bool[np.ndarray, "200 200 16"]


class LabelText(NamedTuple):
    """A set of phrases as arrays.

    phrases: unit vectors; labels: Occ3D's, of each phrase; background: unit vectors of `BACKGROUND_PHRASES`;
    rivals: which of them a phrase must beat to count as present.
    """

    phrases: Float32[Array, "phrases dim"]
    labels: UInt8[Array, " phrases"]
    background: Float32[Array, "background dim"]
    rivals: Bool[Array, "phrases background"]


def label_text(prompts: PromptSet, clip: LoadedCLIP, cache_dir: Any = None) -> LabelText:
    """Embeds phrases and background.

    A phrase's rivals are those of the search (`background.rivals_of`) without the background phrases that name the
    phrase's own class: "sedan" need not be ahead of "car", nor "cone" of "traffic cone".

    Args:
      prompts: the phrases.
      clip: whose text tower the features live with.
      cache_dir: see `text.embed_texts`.
    """
    rivals = np.zeros((len(prompts.phrases), len(BACKGROUND_PHRASES)), bool)
    for row, phrase, label in zip(rivals, prompts.phrases, prompts.labels, strict=True):
        row[rivals_of(phrase, BACKGROUND_PHRASES)] = True
        row[[BACKGROUND_LABELS[other] == label for other in BACKGROUND_PHRASES]] = False
    vectors, background = (
        jnp.asarray(prompts.embed(phrases, clip, cache_dir)) for phrases in (prompts.phrases, BACKGROUND_PHRASES)
    )
    return LabelText(vectors, jnp.asarray(prompts.labels), background, jnp.asarray(rivals))


def check_threshold(absent_threshold: float | None) -> None:
    """Raises ValueError where a threshold is no number."""
    if absent_threshold is not None and math.isnan(absent_threshold):
        raise ValueError("absent_threshold must be a number, or None for no such threshold")


def largest_leads(
    features: Float[Array, "voxels dim"], counted: Bool[Array, " voxels"], text: LabelText
) -> Float32[Array, " phrases"]:
    """By how much each phrase is ahead of its rivals, in cosines, at the voxel where that is most.

    The same as `background.largest_lead` for all phrases at once: minus infinity without voxels, infinity without
    rivals.
    """
    similarity = prompt_logits(features, text.phrases, normalise=True)
    behind = prompt_logits(features, text.background, normalise=True)

    def lead(phrase: tuple[Array, Array]) -> Array:
        similar, rivals = phrase
        ahead = similar - jnp.where(rivals, behind, -jnp.inf).max(-1)
        return jnp.where(counted, ahead, -jnp.inf).max()

    # One phrase at a time: all of them against all of the background would need a number for every triple.
    return jax.lax.map(lead, (similarity.T, text.rivals))


def without_absent(text: LabelText, leads: Float32[Array, " phrases"], threshold: float) -> LabelText:
    """The text with the phrases of absent classes put out of play.

    A class is absent where the largest lead of all of its phrases stays below the threshold. Phrases of label 17 stay:
    they are no class that could be there.
    """
    of_class = jax.ops.segment_max(leads, text.labels.astype(jnp.int32), num_segments=len(OCC3D_CLASSES))
    absent = (of_class[text.labels] < threshold) & (text.labels != FREE)
    return text._replace(labels=jnp.where(absent, jnp.uint8(_ABSENT), text.labels))


def best_labels(features: Float[Array, "*voxels dim"], text: LabelText) -> UInt8[Array, "*voxels"]:
    """The label of each voxel's best phrase (`metrics.assign_classes`, the official product); free where none is in
    play."""
    labels = assign_classes(features, text.phrases, text.labels, dropped_class=_ABSENT)
    return jnp.where(labels == _ABSENT, FREE, labels).astype(jnp.uint8)
