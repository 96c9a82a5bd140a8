"""Labels on Occ3D's grid from an exported store of grids."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, UInt8

from pop3d_jax.grids.feature_grids import FeatureGrids, KeyFrameGrid
from pop3d_jax.occ3d.centres import place_centres
from pop3d_jax.occ3d.grid import FREE, OCC3D_VOLUME
from pop3d_jax.occ3d.phrase_labels import (
    LabelledGrid,
    best_labels,
    check_threshold,
    label_text,
    largest_leads,
    without_absent,
)
from pop3d_jax.occ3d.prompts import PromptSet
from pop3d_jax.user_cache import user_text_cache

# Rows that are labelled at a time, so that one shape is compiled.
_ROWS = 8_192


class StoreLabels:
    """Labels of the key frames of a store.

    The voxels that the export selected are occupied, the others free. A store of all voxels (`--dense`, threshold 0)
    selected nothing: there the voxels above a probability of one half are occupied, which is the official decision but
    for float16, in which the probability is stored. Features are as the store keeps them, rounded to float16 or less:
    a voxel whose two best phrases are as near as that may have another label than from the network itself.

    Attributes:
      grids: the store.
      sample_tokens: of its key frames.
      prompts: the phrases.
    """

    def __init__(
        self,
        path: epath.PathLike,
        prompts: PromptSet,
        text_tower: str | None = None,
        absent_threshold: float | None = None,
    ):
        """Opens a store and embeds the phrases.

        Args:
          path: local folder or gs://.
          prompts: what the classes are asked with.
          text_tower: CLIP folder or hub name; by default the one that the model was trained with.
          absent_threshold: see `StudentLabels`; over the store's occupied voxels.

        Raises:
          GridStoreError: there is no store, it is not finished, or its text tower cannot be loaded.
          ValueError: the threshold is not a number.
        """
        check_threshold(absent_threshold)
        self.grids = FeatureGrids.open(path, text_tower=text_tower)
        self.sample_tokens = self.grids.sample_tokens
        self.prompts = prompts
        self._absent_threshold = absent_threshold
        self._stores_all = self.grids.store.attributes["selection"]["threshold"] == 0.0
        self._text = label_text(prompts, self.grids.clip, user_text_cache())
        self._leads, self._labels = jax.jit(largest_leads), jax.jit(best_labels)

    def many(self, tokens: Sequence[str]) -> Iterator[LabelledGrid]:
        """Labels key frames; `queried` is None, since a store has no network to ask.

        Raises:
          KeyError: the store has no such key frame.
        """
        for token in tokens:
            frame = self.grids[token]
            placed = place_centres(frame.lidar_to_ego, self.grids.volume)
            unseen = placed.unseen.reshape(OCC3D_VOLUME.grid_size)
            yield LabelledGrid(token, None, placed.resampled(self._grid(frame)), unseen)

    def _grid(self, frame: KeyFrameGrid) -> UInt8[np.ndarray, "x y z"]:
        """Labels of the network's voxels."""
        occupied = frame.occupancy > 0.5 if self._stores_all else np.ones(len(frame.occupancy), bool)
        coordinates, features = frame.coordinates[occupied], frame.features[occupied]
        text = self._text
        if self._absent_threshold is not None:
            leads = jnp.full(len(text.labels), -jnp.inf)
            for chunk, counted in _chunks(features):
                leads = jnp.maximum(leads, self._leads(chunk, counted, text))
            text = without_absent(text, leads, self._absent_threshold)
        grid = np.full(self.grids.volume.grid_size, FREE, np.uint8)
        labels = [np.asarray(self._labels(chunk, text))[counted] for chunk, counted in _chunks(features)]
        grid[tuple(coordinates.T)] = np.concatenate([*labels, np.empty(0, np.uint8)])
        return grid


def _chunks(
    features: Float[np.ndarray, "voxels dim"],
) -> Iterator[tuple[Float[np.ndarray, "rows dim"], Bool[np.ndarray, " rows"]]]:
    """Features in pieces of one length, and which of their rows are no filling."""
    for start in range(0, len(features), _ROWS):
        chunk = features[start : start + _ROWS]
        filling = _ROWS - len(chunk)
        yield np.pad(chunk, ((0, filling), (0, 0))), np.arange(_ROWS) < len(chunk)
