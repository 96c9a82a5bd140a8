"""Reading exported grids: one key frame, or a search over all of them.

    from pop3d_jax import FeatureGrids

    grids = FeatureGrids.open("grids.zarr")
    hits = grids.search("red car", top=20)

Phrases go through the text tower that the exported model was trained with, unless another one is named.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Float64, UInt8

from pop3d_jax.geometry import lidar_to_image, project
from pop3d_jax.grids.background import BACKGROUND_PHRASES, largest_lead
from pop3d_jax.grids.encoding import Codebook, EncodedFeatures, decode
from pop3d_jax.grids.search import best_similarities
from pop3d_jax.grids.store import GridStore, GridStoreError
from pop3d_jax.models.clip import LoadedCLIP, load_clip
from pop3d_jax.nuscenes import CAMERAS
from pop3d_jax.text import embed_phrases
from pop3d_jax.user_cache import user_text_cache
from pop3d_jax.voxels import Volume, voxel_centres

# Public, see docs/api.md: what is opened, what it returns and what it raises.
__all__ = ["BACKGROUND_PHRASES", "FeatureGrids", "GridStoreError", "Hit", "KeyFrameGrid", "Volume"]


@dataclasses.dataclass(frozen=True)
class KeyFrameGrid:
    """The stored voxels of one key frame.

    Attributes:
      sample_token, scene_name: which.
      timestamp: microseconds.
      coordinates: voxel indices (x, y, z).
      occupancy: probability of being occupied.
      features: in the text encoder's space, not normalised.
      volume: what the coordinates mean.
      lidar_to_ego, ego_to_global: poses at lidar time.
      lidar_to_camera, intrinsics: of the six cameras, pixels of the stored images.
    """

    sample_token: str
    scene_name: str
    timestamp: int
    coordinates: UInt8[np.ndarray, "voxels 3"]
    occupancy: Float[np.ndarray, " voxels"]
    features: Float[np.ndarray, "voxels dim"]
    volume: Volume
    lidar_to_ego: Float64[np.ndarray, "4 4"]
    ego_to_global: Float64[np.ndarray, "4 4"]
    lidar_to_camera: Float64[np.ndarray, "6 4 4"]
    intrinsics: Float64[np.ndarray, "6 3 3"]

    @property
    def centres(self) -> Float64[np.ndarray, "voxels 3"]:
        """Voxel centres, metres, lidar frame."""
        return voxel_centres(self.coordinates, self.volume)


@dataclasses.dataclass(frozen=True)
class Hit:
    """Where a phrase fits best in one key frame.

    Attributes:
      phrase: what was asked.
      sample_token, scene_name: the key frame.
      similarity: cosine between the voxel's feature and the phrase.
      margin: how much nearer a voxel is to the phrase than to the nearest background phrase: of the key frame's voxel
        where that is most, which may be another one, but none that `without` leaves out. Below the search's threshold
        the phrase counts as absent.
      background: that phrase.
      present: whether the margin reaches the threshold.
      voxel: indices (x, y, z).
      lidar, ego, world: centre of the voxel in metres in the lidar's, the car's and the global frame.
      distance: from the lidar, metres.
      camera: name of the camera that sees it nearest to its image's centre, or None.
      pixel: (u, v) there, pixels of the stored image, or None.
    """

    phrase: str
    sample_token: str
    scene_name: str
    similarity: float
    margin: float
    background: str
    present: bool
    voxel: tuple[int, int, int]
    lidar: tuple[float, float, float]
    ego: tuple[float, float, float]
    world: tuple[float, float, float]
    distance: float
    camera: str | None
    pixel: tuple[float, float] | None


class FeatureGrids:
    """A store of exported grids, opened for reading; arrays are read when they are asked for.

    `len(grids)` is the number of key frames; `grids[number]` and `grids["TOKEN"]` are `KeyFrameGrid`s, and raise
    KeyError where there is no such key frame. Made by `open`.

    Attributes:
      store: the arrays as they are written.
      volume: what voxel coordinates mean.
      precision: of the features, "float16", "int8" or "pq".
      sample_tokens, scene_names: of the key frames, in their order.
      counts, offsets: how many voxels each key frame has, and the row of its first.
    """

    def __init__(self, store: GridStore, text_tower: str | None = None) -> None:
        self.store = store
        attributes = store.attributes
        geometry = attributes["geometry"]
        self.volume = Volume(
            tuple(geometry["volume_minimum"]), tuple(geometry["volume_maximum"]), tuple(geometry["grid_size"])
        )
        self.precision: str = attributes["precision"]
        self.sample_tokens: list[str] = attributes["sample_tokens"]
        self.scene_names = [bytes(name).rstrip(b"\0").decode() for name in store.read("scene_name")]
        self.counts = np.maximum(store.read("voxel_count"), 0)
        self.offsets = store.read("voxel_offset")
        self._text_tower = text_tower or attributes["text_tower"]

    @classmethod
    def open(cls, path: epath.PathLike, *, text_tower: str | None = None) -> "FeatureGrids":
        """Opens a store.

        Args:
          path: local folder or gs://.
          text_tower: CLIP folder or hub name for phrases; by default the one that the model was trained with.

        Raises:
          GridStoreError: there is no store, or it is not finished.
        """
        store = GridStore.open(path)
        written = store.written()
        if not written.all():
            raise GridStoreError(
                f"{path} is half written: {int(written.sum())} of {len(written)} key frames. Give the command of its "
                "export again: it goes on where it stopped."
            )
        return cls(store, text_tower)

    def __len__(self) -> int:
        return len(self.sample_tokens)

    def __getitem__(self, sample: int | str) -> KeyFrameGrid:
        """The voxels of a key frame, by its number or its token.

        Raises:
          KeyError: there is no such key frame.
        """
        number = self.number_of(sample)
        start, stop = self._rows(number)
        pose = {
            name: self.store.read(name, number, number + 1)[0]
            for name in ("lidar_to_ego", "ego_to_global", "lidar_to_camera", "intrinsics")
        }
        return KeyFrameGrid(
            self.sample_tokens[number],
            self.scene_names[number],
            int(self.store.read("timestamp", number, number + 1)[0]),
            self.store.read("coordinates", start, stop),
            self.store.read("occupancy", start, stop).astype(np.float32),
            self._features(number),
            self.volume,
            **pose,
        )

    def number_of(self, sample: int | str) -> int:
        """The place of a key frame in the store.

        Raises:
          KeyError: there is no such key frame.
        """
        if isinstance(sample, str):
            if sample in self._numbers:
                return self._numbers[sample]
            raise KeyError(f"{sample} is not a key frame of {self.store.path}")
        if not 0 <= sample < len(self):
            raise KeyError(f"{self.store.path} has key frames 0 to {len(self) - 1}, not {sample}")
        return sample

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.sample_tokens)}

    @functools.cached_property
    def codebook(self) -> Codebook | None:
        """What product-quantised codes mean; None at other precisions."""
        if self.precision != "pq":
            return None
        return Codebook(self.store.read("codebook_rotation"), self.store.read("codebook_entries"))

    @functools.cached_property
    def clip(self) -> LoadedCLIP:
        """The text tower.

        Raises:
          GridStoreError: it cannot be loaded.
        """
        try:
            return load_clip(self._text_tower)
        except (OSError, ValueError) as error:
            raise GridStoreError(
                f"the text tower {self._text_tower} of {self.store.path} cannot be loaded ({error}): name it with "
                "--text_tower, or FeatureGrids.open(..., text_tower=FOLDER)"
            ) from error

    def _rows(self, number: int) -> tuple[int, int]:
        start = int(self.offsets[number])
        return start, start + int(self.counts[number])

    def _features(self, number: int) -> Float[np.ndarray, "voxels dim"]:
        """Features of a key frame's voxels, float32."""
        codes, scale = (self.store.read(name, *self._rows(number)) for name in ("features", "feature_scale"))
        return decode(EncodedFeatures(codes, scale), self.codebook)

    def search(
        self,
        text: str | Sequence[str],
        top: int = 20,
        *,
        without: Sequence[str] = (),
        background: Sequence[str] = BACKGROUND_PHRASES,
        threshold: float = 0.0,
    ) -> list[Hit]:
        """Where phrases fit best, over all key frames: at most one hit for each phrase and key frame.

        Args:
          text: a phrase, or several, which cost one pass.
          top: hits for each phrase.
          without: a voxel that is nearer to one of these phrases than to the one asked for is left out: it is no hit,
            and does not make the phrase present. A key frame of which no voxel is left has no hit.
          background: phrases that say what else there may be; those made of words of the phrase asked for are left
            out, as "car" for "a red car".
          threshold: margin over the background from which on a hit counts as present.

        Returns:
          The hits of the first phrase, best first, then those of the second, ...

        Raises:
          ValueError: an empty phrase, or top below 1.
          GridStoreError: the text tower is missing, or a chunk is damaged.
        """
        phrases = [text] if isinstance(text, str) else list(text)
        if top < 1:
            raise ValueError(f"top = {top} must be at least 1")
        asked, others = np.split(embed_phrases(self.clip, [*phrases, *without]), [len(phrases)])
        behind = asked[:0]
        if background:
            behind = embed_phrases(self.clip, background, cache_dir=user_text_cache())
        best = best_similarities(self.store, self.offsets, self.counts, asked, others, self.codebook)
        hits = []
        for column, phrase in enumerate(phrases):
            order = np.argsort(-best[:, column], kind="stable")
            for number in map(int, order[np.isfinite(best[order, column])][:top]):
                directions = self._directions(number)
                similarity = directions @ asked[column]
                rows = np.arange(len(similarity))
                if len(others):
                    rows = np.flatnonzero(similarity >= (directions @ others.T).max(-1))
                if not len(rows):  # the pass over the store, which rounds otherwise, had left a voxel that is no nearer
                    continue
                margin, rival = largest_lead(similarity[rows], directions[rows] @ behind.T, phrase, background)
                best_row = int(self.offsets[number]) + int(rows[np.argmax(similarity[rows])])
                hits.append(
                    Hit(
                        phrase,
                        similarity=float(best[number, column]),
                        margin=margin,
                        background=rival,
                        present=margin >= threshold,
                        **self._place(number, best_row),
                    )
                )
        return hits

    def _directions(self, number: int) -> Float[np.ndarray, "voxels dim"]:
        """Features of a key frame's voxels at unit length."""
        features = self._features(number)
        return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)

    def _place(self, number: int, row: int) -> dict[str, Any]:
        """Where a row's voxel is, as `Hit` tells it."""
        coordinates = self.store.read("coordinates", row, row + 1)
        lidar = voxel_centres(coordinates, self.volume)[0]
        ego = self.store.read("lidar_to_ego", number, number + 1)[0] @ np.append(lidar, 1.0)
        world = self.store.read("ego_to_global", number, number + 1)[0] @ ego
        camera, pixel = self._seen_by(number, lidar)
        return {
            "sample_token": self.sample_tokens[number],
            "scene_name": self.scene_names[number],
            "voxel": tuple(map(int, coordinates[0])),
            "lidar": tuple(map(float, lidar)),
            "ego": tuple(map(float, ego[:3])),
            "world": tuple(map(float, world[:3])),
            "distance": float(np.linalg.norm(lidar)),
            "camera": camera,
            "pixel": pixel,
        }

    def _seen_by(self, number: int, point: Float64[np.ndarray, "3"]) -> tuple[str | None, tuple[float, float] | None]:
        """The camera whose image has the point nearest to its centre."""
        intrinsics = self.store.read("intrinsics", number, number + 1)[0]
        transforms = lidar_to_image(intrinsics, self.store.read("lidar_to_camera", number, number + 1)[0])
        sizes = self.store.read("image_hw", number, number + 1)[0]
        seen = []
        for camera, transform, (height, width) in zip(CAMERAS, transforms, sizes, strict=True):
            ((u, v),), (depth,) = project(point[None], transform)
            if depth > 0 and 0 <= u < width and 0 <= v < height:
                seen.append((abs(u - width / 2), camera, (float(u), float(v))))
        return min(seen)[1:] if seen else (None, None)
