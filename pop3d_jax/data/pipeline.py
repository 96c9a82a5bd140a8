"""Batches from records: one pure function from (seed, step) to a batch, for any number of workers and hosts.

The global order is a shuffle of all records per epoch, drawn from the seed alone. Host h of H takes the elements
h, h + H, h + 2H, ... of it, so that the hosts together hold what one host would. Element i of the order draws its
turn and its sample of points from (seed, i); what the device draws, photometric distortion and GridMask, follows from
(seed, step). The position of the pipeline is therefore one integer, the step.

No TensorFlow in here: worker processes start quickly and stay small.
"""

import dataclasses
import io
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from pop3d_jax.data.augment import draw_volume_turn
from pop3d_jax.data.batches import EPOCHS, Batch, iterate, local_batch_size, pad, spread
from pop3d_jax.data.records import KeyFrame, RecordSource
from pop3d_jax.data.shards import FIRST_DATASET
from pop3d_jax.data.teacher_cache import TeacherCache
from pop3d_jax.data.visibility import visible_pairs
from pop3d_jax.geometry import lidar_to_image
from pop3d_jax.nuscenes import CAMERAS, LIDARSEG_TO_CLASS


@dataclasses.dataclass(frozen=True)
class ExampleSettings:
    """How one key frame becomes arrays of fixed shape.

    Attributes:
      image_hw: height and width the six images are resized to; 900 x 1600 leaves nuScenes' alone.
      teacher_image_hw: size of the images for the teacher, or None when there is no teacher; the same as `image_hw`
        gives both the same array.
      max_points: capacity for lidar points; a sweep of nuScenes has about 34,700.
      max_feature_points: capacity for (point, camera) pairs that the teacher supervises.
      sample_feature_points: above 0, this many of those pairs are drawn at random each time (training only): a
        cheaper step, not a loss of data, since every epoch draws others. 0 takes all.
      volume_flip: whether the volume is mirrored at random left-right and front-back (training). Points and
        calibration change together, the images stay: what lies where changes, how it looks does not.
      volume_rotation: degrees up to which the volume is turned about the lidar's z axis at random (training).
      images: False leaves images out altogether (statistics over points and labels only).
    """

    image_hw: tuple[int, int]
    teacher_image_hw: tuple[int, int] | None
    max_points: int
    max_feature_points: int
    sample_feature_points: int = 0
    volume_flip: bool = False
    volume_rotation: float = 0.0
    images: bool = True


def decode_image(
    data: bytes, at_least_hw: tuple[int, int], name: str
) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[int, int]]:
    """Decodes a JPEG or PNG to RGB, a JPEG at a reduced scale where that still gives `at_least_hw` (scaled DCT).

    Returns:
      The pixels, and the height and width of the file at its full scale.

    Raises:
      ValueError: the bytes are no whole image; `name` tells whose.
    """
    try:
        image = Image.open(io.BytesIO(data))
        full_hw = (image.height, image.width)
        image.draft("RGB", (at_least_hw[1], at_least_hw[0]))
        return np.asarray(image.convert("RGB")), full_hw
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"the image of {name} cannot be decoded ({error}): the records are damaged, "
            "check them with `python -m data_prep.build --check` and build them again"
        ) from error


def _resize(image: UInt8[np.ndarray, "h w 3"], hw: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
    if image.shape[:2] == hw:
        return image
    return np.asarray(Image.fromarray(image).resize((hw[1], hw[0]), Image.Resampling.BILINEAR))


def _images(key_frame: KeyFrame, settings: ExampleSettings) -> tuple[Batch, list]:
    """The six images, each decoded once."""
    height, width = settings.image_hw
    apart = settings.teacher_image_hw not in (None, settings.image_hw)
    at_least = tuple(max(sides) for sides in zip(settings.image_hw, settings.teacher_image_hw or (0, 0), strict=True))
    arrays = {"images": np.empty((len(key_frame.images), height, width, 3), np.uint8)}
    if apart:
        arrays["teacher_images"] = np.empty((len(key_frame.images), *settings.teacher_image_hw, 3), np.uint8)
    sizes = []
    for number, (jpeg, camera) in enumerate(zip(key_frame.images, CAMERAS, strict=True)):
        pixels, full_hw = decode_image(jpeg, at_least, f"sample {key_frame.sample_token}, {camera}")
        arrays["images"][number] = _resize(pixels, settings.image_hw)
        if apart:
            arrays["teacher_images"][number] = _resize(pixels, settings.teacher_image_hw)
        sizes.append(full_hw)
    return arrays, sizes


def image_sizes(key_frame: KeyFrame) -> list[tuple[int, int]]:
    """(height, width) of the stored images."""
    sizes = []
    for jpeg in key_frame.images:
        with Image.open(io.BytesIO(jpeg)) as image:  # reads the header only
            sizes.append((image.height, image.width))
    return sizes


def make_example(
    key_frame: KeyFrame,
    settings: ExampleSettings,
    rng: np.random.Generator | None,
    cached_features: Float[np.ndarray, "pairs dim"] | None = None,
) -> Batch:
    """Arrays of one key frame.

    Args:
      key_frame: the record.
      settings: sizes and capacities.
      rng: source of the volume's turn and of the sample of feature points, where the settings ask for them; None for
        evaluation.
      cached_features: what the teacher says at all visible pairs, from a `TeacherCache`.

    Returns:
      images [6, H, W, 3] uint8 RGB (`network_images` makes network input of them); teacher_images [6, h, w, 3] likewise
      where the teacher sees another size; lidar_to_image [6, 4, 4] float32 for the resized images; points [n, 3]
      float32 metres (lidar frame), point_labels [n] uint8 (classes 0..16; 0 where the dataset has none), point_mask
      [n]; feature_points [m, 3], feature_cameras [m] int32, feature_pixels [m, 2]
      float32 (row, column of the pixel's centre as fractions of the image), feature_mask [m], and, from a cache,
      feature_targets [m, dim]; has_labels, and points_left_out / feature_points_left_out: how many did not fit into
      the capacities.

    Raises:
      ValueError: an image cannot be decoded, there are not six, or the cached features are not of this key frame.
    """
    if len(key_frame.images) != len(CAMERAS):
        raise ValueError(
            f"sample {key_frame.sample_token} ({key_frame.lidar_file}) has {len(key_frame.images)} images, POP-3D "
            f"needs nuScenes' {len(CAMERAS)}: give records that were built with --dataset=nuscenes"
        )
    if settings.images:
        arrays, sizes = _images(key_frame, settings)
    else:
        arrays, sizes = {}, image_sizes(key_frame)
    if len(set(sizes)) != 1:
        raise ValueError(f"sample {key_frame.sample_token}: the six images differ in size: {sizes}")
    full_hw = sizes[0]
    scale = np.diag([settings.image_hw[1] / full_hw[1], settings.image_hw[0] / full_hw[0], 1.0])
    xyz = key_frame.points[:, :3]
    turn = np.eye(4)
    if rng is not None and (settings.volume_flip or settings.volume_rotation):
        turn = draw_volume_turn(rng, flip=settings.volume_flip, degrees=settings.volume_rotation)
    matrices = lidar_to_image(scale @ key_frame.intrinsics, key_frame.lidar_to_camera)
    arrays["lidar_to_image"] = (matrices @ np.linalg.inv(turn)).astype(np.float32)
    turned = (xyz @ turn[:3, :3].T).astype(np.float32) if (turn != np.eye(4)).any() else xyz

    labelled = len(key_frame.lidarseg) > 0
    classes = LIDARSEG_TO_CLASS[key_frame.lidarseg] if labelled else np.zeros(len(xyz), np.uint8)
    keep = spread(len(xyz), settings.max_points)
    arrays["points"] = pad(turned, keep, settings.max_points)
    arrays["point_labels"] = pad(classes, keep, settings.max_points)
    arrays["point_mask"] = np.arange(settings.max_points) < len(keep)

    index, camera, pixel = visible_pairs(xyz, key_frame.intrinsics, key_frame.lidar_to_camera, full_hw)
    pairs = np.arange(len(index))
    if rng is not None and 0 < settings.sample_feature_points < len(index):
        pairs = rng.choice(len(index), settings.sample_feature_points, replace=False, shuffle=False)
    wanted = len(pairs)
    pairs = pairs[spread(wanted, settings.max_feature_points)]
    centres = ((pixel + 0.5) / np.asarray(full_hw)).astype(np.float32)
    arrays["feature_points"] = pad(turned[index], pairs, settings.max_feature_points)
    arrays["feature_point_labels"] = pad(classes[index], pairs, settings.max_feature_points)
    arrays["feature_cameras"] = pad(camera.astype(np.int32), pairs, settings.max_feature_points)
    arrays["feature_pixels"] = pad(centres, pairs, settings.max_feature_points)
    arrays["feature_mask"] = np.arange(settings.max_feature_points) < len(pairs)
    if cached_features is not None:
        if len(cached_features) != len(index):
            raise ValueError(
                f"sample {key_frame.sample_token} has {len(index)} visible pairs and {len(cached_features)} cached "
                "teacher features: make the cache again with data_prep.teacher_features"
            )
        arrays["feature_targets"] = pad(cached_features, pairs, settings.max_feature_points)

    arrays["has_labels"] = np.asarray(labelled)
    arrays["points_left_out"] = np.asarray(len(xyz) - len(keep), np.int32)
    arrays["feature_points_left_out"] = np.asarray(wanted - len(pairs), np.int32)
    return arrays


class _LoadTraining(grain.transforms.RandomMap):
    """Element of the global order (a record's index) to its example; `rng` depends on (seed, position) only."""

    def __init__(self, source: RecordSource, settings: ExampleSettings, cache: TeacherCache | None):
        self._source = source
        self._settings = settings
        self._cache = cache

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        cached = None if self._cache is None else self._cache[int(element)]
        example = make_example(self._source[int(element)], self._settings, rng, cached)
        return example | {"record_index": np.asarray(element, np.int64)}


class _LoadEvaluation(grain.transforms.Map):
    """Position to example; positions behind the last record repeat it, marked as not valid."""

    def __init__(self, source: RecordSource, settings: ExampleSettings):
        self._source = source
        self._settings = settings

    def map(self, element: int) -> Batch:
        index = min(int(element), len(self._source) - 1)
        example = make_example(self._source[index], self._settings, None)
        return example | {
            "record_index": np.asarray(index, np.int64),
            "valid": np.asarray(element < len(self._source)),
        }


def require_nuscenes(source: RecordSource) -> None:
    """Raises ValueError for records of another data set: cameras, frames and label map in here are nuScenes'."""
    if source.dataset != FIRST_DATASET:
        raise ValueError(
            f"{source!r} are of data set {source.dataset}, POP-3D reads six cameras and the labels of nuScenes: give "
            "records that were built with --dataset=nuscenes"
        )


def training_batches(
    source: RecordSource,
    settings: ExampleSettings,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    cache: TeacherCache | None = None,
) -> Iterator[Batch]:
    """Endless training batches from `start_step` on, each a function of (seed, step) alone.

    Args:
      source: the records.
      settings: sizes, capacities and augmentation.
      batch_size: global batch size, over all hosts.
      seed: of the shuffle and the augmentation.
      start_step: step of the first batch returned.
      host: index of this host.
      hosts: number of hosts; this one gets batch_size / hosts examples a step.
      workers: decoding processes; 0 decodes in a thread of this process.
      cache: teacher features of these records, where the teacher does not run in the step.

    Yields:
      Dictionaries of `make_example`'s arrays, stacked, and `record_index` [batch].

    Raises:
      ValueError: no records, records of another data set, or the batch does not divide among the hosts.
    """
    require_nuscenes(source)
    local = local_batch_size(batch_size, host, hosts)
    if len(source) == 0:
        raise ValueError("the split has no records: build it with `python -m data_prep.build`")
    dataset = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat(EPOCHS)
        .random_map(_LoadTraining(source, settings, cache))
        .slice(slice(host, None, hosts))
        .batch(local)
        .slice(slice(start_step, None))
    )
    return iterate(dataset, workers)


def evaluation_batches(
    source: RecordSource,
    settings: ExampleSettings,
    *,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Every record once, in order; the last batch is filled up with examples whose `valid` is False.

    Args and errors as in `training_batches`.
    """
    require_nuscenes(source)
    local = local_batch_size(batch_size, host, hosts)
    padded = -(-len(source) // batch_size) * batch_size
    dataset = (
        grain.MapDataset.range(padded)
        .map(_LoadEvaluation(source, settings))
        .slice(slice(host, None, hosts))
        .batch(local)
    )
    return iterate(dataset, workers)
