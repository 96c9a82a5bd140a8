"""What the page shows of some key frames: voxels, classes, phrases, images and lidar sweeps, as JSON.

Arrays travel as base64 of small integers; what has a range of its own carries it ("low", "high" for 0 and 255).
"""

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from pop3d_jax.data.records import KeyFrame, RecordSource
from pop3d_jax.geometry import lidar_to_image
from pop3d_jax.grids.background import BACKGROUND_PHRASES, largest_lead
from pop3d_jax.grids.feature_grids import FeatureGrids, KeyFrameGrid
from pop3d_jax.metrics import class_logits, prompt_logits
from pop3d_jax.nuscenes import CAMERAS, CLASS_COLOURS, CLASS_NAMES, EMPTY, UNLABELLED
from pop3d_jax.text import TextClassifier, embed_phrases, zero_shot_classifier
from pop3d_jax.user_cache import user_text_cache
from pop3d_jax.viewer.colours import SIMILARITY_STOPS, similarity_range

# Wide enough to recognise things, small enough for a scene of forty key frames in one file.
IMAGE_WIDTH = 640
_JPEG_QUALITY = 80
# Lidar coordinates are sent in centimetres, as int16.
_CENTIMETRES = 100.0
_PCA_QUANTILES = (0.02, 0.98)
# Principal components need no more to be known well: 512 numbers of each are 41 MB.
_PCA_VOXELS = 20_000


@dataclasses.dataclass(frozen=True)
class Scene:
    """Key frames of one scene, in the order of time, ready to be shown.

    Attributes:
      title: headline.
      grids: their voxels, those that are shown; unlike the store's, their features have unit length.
      stored: how many voxels the store holds of each.
      key_frames: their records, which hold images and lidar.
    """

    title: str
    grids: list[KeyFrameGrid]
    stored: list[int]
    key_frames: list[KeyFrame]


def read_scene(
    grids: FeatureGrids,
    source: RecordSource,
    sample: str,
    *,
    key_frames: int | None = None,
    max_voxels: int | None = None,
) -> tuple[Scene, int]:
    """The key frames of a sample's scene that the store holds.

    Args:
      grids: the store.
      source: records that hold the images.
      sample: token, or number in the store.
      key_frames: at most so many, those nearest in time to the sample; None for the whole scene.
      max_voxels: at most so many of a key frame, the most probably occupied; None for all. What is said of the scene,
        such as whether a phrase is in it, is said of these.

    Returns:
      The scene, and the place of the sample in it.

    Raises:
      ValueError: the store or the records lack the sample.
    """
    try:
        number = grids.number_of(int(sample) if sample.isdigit() and len(sample) < 10 else sample)
    except KeyError as error:
        raise ValueError(f"--sample={sample}: {error.args[0]}") from error
    name = grids.scene_names[number]
    timestamps = grids.store.read("timestamp")
    chosen = [other for other, scene in enumerate(grids.scene_names) if scene == name]
    if key_frames is not None:
        # The key frame itself first, also where the store holds it twice.
        nearest = sorted(chosen, key=lambda k: (abs(int(timestamps[k]) - int(timestamps[number])), k != number))
        chosen = nearest[:key_frames]
    chosen.sort(key=lambda other: int(timestamps[other]))
    places = {token: place for place, token in enumerate(source.sample_tokens)}
    missing = [grids.sample_tokens[other] for other in chosen if grids.sample_tokens[other] not in places]
    if missing:
        raise ValueError(
            f"the records lack {len(missing)} key frames of {name}, such as {missing[0]}: name those that the grids "
            "were exported from with --records and --split"
        )
    # One by one: of a dense store, only what is shown stays in memory.
    shown = [_prepared(grids[other], max_voxels) for other in chosen]
    stored = [int(grids.counts[other]) for other in chosen]
    records = [source[places[grid.sample_token]] for grid in shown]
    return Scene(name, shown, stored, records), chosen.index(number)


def _prepared(grid: KeyFrameGrid, max_voxels: int | None) -> KeyFrameGrid:
    """The most probable voxels in the order of the store, with features of unit length."""
    kept = np.arange(len(grid.occupancy))
    if max_voxels is not None and len(kept) > max_voxels:
        kept = np.sort(np.argsort(-grid.occupancy, kind="stable")[:max_voxels])
    features = grid.features[kept]
    features /= np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return dataclasses.replace(
        grid, coordinates=grid.coordinates[kept], occupancy=grid.occupancy[kept], features=features
    )


class PhraseScorer:
    """Says how well phrases fit the voxels of a scene, for the page and for the server behind it."""

    def __init__(
        self, scene: Scene, grids: FeatureGrids, background: Sequence[str] = BACKGROUND_PHRASES, threshold: float = 0.0
    ) -> None:
        """Prepares the background's similarities.

        Args:
          scene: whose voxels.
          grids: the store, for its text tower.
          background: what a phrase must beat to count as present, as in `FeatureGrids.search`.
          threshold: by how much.
        """
        self._scene, self._clip, self._threshold = scene, grids.clip, threshold
        self.background = tuple(background)
        self._known: dict[str, np.ndarray] = {}
        self._behind = [np.zeros((len(grid.coordinates), 0), np.float32) for grid in scene.grids]
        if self.background:
            vectors = embed_phrases(self._clip, self.background, cache_dir=user_text_cache())
            self._known = dict(zip(self.background, vectors, strict=True))
            self._behind = [grid.features @ vectors.T for grid in scene.grids]

    def __call__(self, text: str) -> dict[str, Any]:
        """A phrase as the page wants it: similarity of every voxel, colour range, and whether it seems to be there.

        Raises:
          ValueError: an empty phrase.
        """
        vector = self._known[text] if text in self._known else embed_phrases(self._clip, [text])[0]
        similarities = [grid.features @ vector for grid in self._scene.grids]
        everywhere = np.concatenate(similarities)
        low, high = _range(everywhere)
        verdicts = []
        for similarity, behind in zip(similarities, self._behind, strict=True):
            margin, rival = largest_lead(similarity, behind, text, self.background)
            finite = margin if np.isfinite(margin) else None  # JSON has no infinity
            verdicts.append({"margin": finite, "present": margin >= self._threshold, "rival": rival})
        colour_low, colour_high = similarity_range(everywhere)
        return {
            "text": text,
            "low": low,
            "high": high,
            "colour_low": colour_low,
            "colour_high": colour_high,
            "similarity": [_base64(_as_bytes(similarity, low, high)) for similarity in similarities],
            "verdicts": verdicts,
            "threshold": self._threshold,
        }


def scene_json(
    scene: Scene, first: int, scorer: PhraseScorer, phrases: Sequence[str], classifier: TextClassifier
) -> Any:
    """Everything the page shows, as JSON.

    Args:
      scene: the key frames.
      first: which of them is shown first.
      scorer: of this scene.
      phrases: those the page can colour by without asking anybody; repeated ones count once.
      classifier: gives every voxel its class.
    """
    volume = scene.grids[0].volume
    components = _PrincipalComponents([grid.features for grid in scene.grids])
    assigned = [assigned_classes(grid.features, classifier) for grid in scene.grids]
    low, high = _range(np.concatenate([score for _, score in assigned]))
    return {
        "title": scene.title,
        "first": first,
        "volume": {"minimum": volume.minimum, "maximum": volume.maximum, "voxel_size": volume.voxel_size},
        "classes": [
            {"name": name.replace("_", " "), "colour": CLASS_COLOURS[index].tolist()}
            for index, name in enumerate(CLASS_NAMES[:EMPTY])
        ],
        "class_score": {"low": low, "high": high},
        "similarity_colours": SIMILARITY_STOPS,
        "phrases": [scorer(text) for text in dict.fromkeys(phrases)],
        "cameras": [camera.removeprefix("CAM_").replace("_", " ").lower() for camera in CAMERAS],
        "frames": [
            {
                "sample_token": grid.sample_token,
                "timestamp": grid.timestamp,
                "lidar_to_global": (grid.ego_to_global @ grid.lidar_to_ego)[:3].reshape(-1).tolist(),
                "stored_voxels": stored,
                "coordinates": _base64(grid.coordinates),
                "occupancy": _base64(_as_bytes(grid.occupancy, 0.0, 1.0)),
                "class": _base64(classes),
                "class_score": _base64(_as_bytes(score, low, high)),
                "principal": _base64(components(grid.features)),
                "lidar": _base64(_lidar(record)),
                "images": [_image(record, camera) for camera in range(len(CAMERAS))],
            }
            for grid, stored, record, (classes, score) in zip(
                scene.grids, scene.stored, scene.key_frames, assigned, strict=True
            )
        ],
    }


def default_classifier(grids: FeatureGrids) -> TextClassifier:
    """The official zero-shot classes, in the words of the store's text tower."""
    return zero_shot_classifier(grids.clip, cache_dir=user_text_cache())


def _range(values: Float[np.ndarray, " values"]) -> tuple[float, float]:
    """Smallest and largest value, never the same."""
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return low, max(high, low + 1e-6)


def _as_bytes(values: Float[np.ndarray, " values"], low: float, high: float) -> UInt8[np.ndarray, " values"]:
    return np.rint(np.clip((values - low) / (high - low), 0.0, 1.0) * 255.0).astype(np.uint8)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def assigned_classes(
    features: Float[np.ndarray, "voxels dim"], classifier: TextClassifier
) -> tuple[UInt8[np.ndarray, " voxels"], Float[np.ndarray, " voxels"]]:
    """Class 1..16 of every voxel, as the evaluation assigns it, and its cosine with the class's best prompt."""
    if not len(features):
        return np.zeros(0, np.uint8), np.zeros(0, np.float32)
    logits = prompt_logits(jnp.asarray(features), jnp.asarray(classifier.embeddings), normalise=True)
    by_class = np.array(class_logits(logits, jnp.asarray(classifier.classes), EMPTY))
    by_class[:, UNLABELLED] = -np.inf
    return by_class.argmax(-1).astype(np.uint8), by_class.max(-1)


class _PrincipalComponents:
    """The three main directions in which features differ, as red, green and blue."""

    def __init__(self, features: Sequence[Float[np.ndarray, "voxels dim"]]) -> None:
        """Finds them from at most `_PCA_VOXELS` voxels, evenly spread over the key frames' features."""
        step = max(1, -(-sum(map(len, features)) // _PCA_VOXELS))
        sample = np.concatenate([of_frame[::step] for of_frame in features])
        self._mean = sample.mean(0) if len(sample) else np.zeros(sample.shape[1], np.float32)
        sample -= self._mean
        _, axes = np.linalg.eigh(sample.T @ sample)
        # The largest last; and a sign of its own choosing would flicker.
        axes = axes[:, ::-1][:, :3]
        self._axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
        self._ranges = [(0.0, 1.0)] * self._axes.shape[1]
        if len(sample):
            ends = np.quantile(sample @ self._axes, _PCA_QUANTILES, axis=0)
            self._ranges = [(float(low), max(float(high), float(low) + 1e-6)) for low, high in ends.T]

    def __call__(self, features: Float[np.ndarray, "voxels dim"]) -> UInt8[np.ndarray, "voxels 3"]:
        colours = np.zeros((len(features), 3), np.uint8)
        values = features @ self._axes - self._mean @ self._axes
        for channel, (low, high) in enumerate(self._ranges):
            colours[:, channel] = _as_bytes(values[:, channel], low, high)
        return colours


def _lidar(key_frame: KeyFrame) -> np.ndarray:
    limit = np.iinfo(np.int16)
    return np.clip(np.rint(key_frame.points[:, :3] * _CENTIMETRES), limit.min, limit.max).astype("<i2")


def _image(key_frame: KeyFrame, camera: int) -> dict[str, Any]:
    """A camera's image, smaller, and how lidar coordinates project into the size that is sent."""
    image = Image.open(io.BytesIO(key_frame.images[camera])).convert("RGB")
    factor = min(1.0, IMAGE_WIDTH / image.width)
    size = (round(image.width * factor), round(image.height * factor))
    file = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=_JPEG_QUALITY)
    matrix = lidar_to_image(key_frame.intrinsics[camera], key_frame.lidar_to_camera[camera])
    matrix = np.diag([size[0] / image.width, size[1] / image.height, 1.0, 1.0]) @ matrix
    return {
        "jpeg": base64.b64encode(file.getvalue()).decode(),
        "width": size[0],
        "height": size[1],
        "lidar_to_image": matrix[:3].reshape(-1).tolist(),
    }
