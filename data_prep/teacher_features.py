"""Runs the teacher once over all records and keeps what it says at the lidar points.

    python -m data_prep.teacher_features --config configs/pop3d_nuscenes.py --config.data.records=RECORDS \\
        --split train --out CACHE --dtype int8
    python -m pop3d_jax.train --config configs/pop3d_nuscenes.py --config.teacher.cache=CACHE ...

Worth its bytes where the teacher is slow (MaskCLIP+) and the training long; otherwise let it run inside the step. The
same command goes on where it was stopped; a second run with nothing to do says so. Prints bytes a key
frame, what they come to on nuScenes, and the seconds of the run.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags, logging
from etils import epath
from jaxtyping import Float
from ml_collections import config_flags

from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.data.pipeline import make_example, require_nuscenes
from pop3d_jax.data.records import KeyFrame, RecordError, RecordSource
from pop3d_jax.data.shards import ShardIndex, read_index, shard_index_path, write_json, write_shard
from pop3d_jax.data.teacher_cache import DTYPES, TeacherCacheIndex, cache_index_path, encode_features
from pop3d_jax.experiment import example_settings
from pop3d_jax.progress import progress
from pop3d_jax.teacher import Teacher, load_teacher, teacher_fingerprint
from pop3d_jax.torch_files import WeightFileError

# Key frames of nuScenes: trainval, and what the official layout of features takes for one of them.
_NUSCENES_KEY_FRAMES = 34_149
_OFFICIAL_BYTES = 45.3e6


def feature_function(
    config: ml_collections.ConfigDict, teacher: Teacher
) -> Callable[[KeyFrame], Float[np.ndarray, "pairs dim"]]:
    """A function from a key frame to the teacher's features of all its visible (point, camera) pairs."""
    online = dataclasses.replace(
        example_settings(config, training=True),
        teacher_image_hw=tuple(config.data.teacher_image_hw),
        # All pairs, where a training may be content with a part of them.
        max_feature_points=max(config.data.max_feature_points, config.data.max_points),
        sample_feature_points=0,
    )
    compiled = jax.jit(teacher.point_features)
    parameters = jax.device_put(teacher.parameters)

    def features(key_frame: KeyFrame) -> Float[np.ndarray, "pairs dim"]:
        example = make_example(key_frame, online, None)
        if example["feature_points_left_out"]:
            raise ValueError(
                f"sample {key_frame.sample_token} has {example['feature_points_left_out']} visible pairs more than "
                "config.data.max_points: raise it"
            )
        images = example.get("teacher_images", example["images"])
        seen = (images, example["feature_cameras"], example["feature_pixels"])
        found = compiled(parameters, *(jnp.asarray(array)[None] for array in seen))
        return np.asarray(found[0], np.float32)[example["feature_mask"]]

    return features


def build_cache(config: ml_collections.ConfigDict, split: str, out: epath.PathLike, dtype: str) -> TeacherCacheIndex:
    """Writes the features of one split; goes on where it was stopped.

    Args:
      config: the experiment: records, teacher, image size.
      split: of the records.
      out: folder of the cache; several splits and no two teachers fit into one.
      dtype: "float16" or "int8".

    Raises:
      RecordError: no such records, or a record that cannot be read.
      ValueError: the folder holds features of other records or of another teacher, the records are not of nuScenes, or
        see `load_teacher`.
    """
    folder = epath.Path(out)
    records = read_index(config.data.records, split)
    source = RecordSource(config.data.records, split)
    require_nuscenes(source)
    teacher = load_teacher(config.teacher)
    settings = {k: v for k, v in config.teacher.to_dict().items() if k != "cache"}
    settings["image_hw"] = list(config.data.teacher_image_hw)
    wanted = TeacherCacheIndex(
        split, source.fingerprint, settings, teacher_fingerprint(teacher), dtype, teacher.feature_dim, []
    )
    _claim(folder, wanted)
    names = [
        f"teacher_features-{split}.tfrecord-{number:05d}-of-{len(records.shards):05d}"
        for number in range(len(records.shards))
    ]
    finished = [_finished(folder / name) for name in names]
    if all(finished) and cache_index_path(folder, split).exists():
        logging.info("Nothing to do: %s has all teacher features of %s.", folder, split)
        return dataclasses.replace(wanted, shards=finished)

    compute = feature_function(config, teacher)
    bounds = np.cumsum([0, *(len(shard.offsets) for shard in records.shards)])
    spans = [range(*bounds[number : number + 2]) for number in range(len(names))]
    missing = [index for span, done in zip(spans, finished, strict=True) if done is None for index in span]
    # One bar over all shards: each writer takes the next key frames from it.
    queue = progress(missing, len(missing), "teacher features")

    def encoded(count: int) -> Iterator[tuple[str, bytes]]:
        for index in itertools.islice(queue, count):
            key_frame = source[index]
            yield key_frame.sample_token, encode_features(key_frame.sample_token, compute(key_frame), dtype)

    shards = [
        done or write_shard(folder / name, encoded(len(span)))
        for name, span, done in zip(names, spans, finished, strict=True)
    ]
    index = dataclasses.replace(wanted, shards=shards)
    write_json(cache_index_path(folder, split), dataclasses.asdict(index))
    return index


def _claim(folder: epath.Path, wanted: TeacherCacheIndex) -> None:
    """Makes the folder one for this teacher, or checks that it is."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "teacher": wanted.teacher,
        "teacher_fingerprint": wanted.teacher_fingerprint,
        "dtype": wanted.dtype,
        "records_fingerprints": {wanted.split: wanted.records_fingerprint},
    }
    path = folder / "teacher.json"
    if path.exists():
        found = json.loads(path.read_text())
        different = [name for name in ("teacher_fingerprint", "dtype") if found[name] != identity[name]]
        settings = ("name", "variant", "feature", "image_hw")
        different += [name for name in settings if found["teacher"].get(name) != identity["teacher"].get(name)]
        if found["records_fingerprints"].get(wanted.split, wanted.records_fingerprint) != wanted.records_fingerprint:
            different.append("records")
        if different:
            raise ValueError(f"{folder} holds other teacher features (differing: {different}): give another --out")
        identity["records_fingerprints"] |= found["records_fingerprints"]
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no teacher features: give another --out")
    write_json(path, identity, indent=2)


def _finished(shard: epath.Path) -> ShardIndex | None:
    if not shard.exists() or not shard_index_path(shard).exists():
        return None
    index = ShardIndex(**json.loads(shard_index_path(shard).read_text()))
    return index if shard.stat().length == index.bytes else None


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    config_flags.DEFINE_config_file("config", None, "Experiment: records, teacher and its image size.")
    flags.DEFINE_string("split", "train", "Split of the records.")
    flags.DEFINE_string("out", None, "Folder of the cache, local or gs://.")
    flags.DEFINE_enum("dtype", "float16", DTYPES, "How a number is kept; int8 has one scale a point.")


def main(_: list[str]) -> None:
    given = flags.FLAGS
    start = time.monotonic()
    with stop_with_message(RecordError, WeightFileError, ValueError, FileNotFoundError):
        index = build_cache(given.config, given.split, given.out, given.dtype)
    frames = sum(len(shard.offsets) for shard in index.shards)
    size = sum(shard.bytes for shard in index.shards) / max(frames, 1)
    print(
        f"{frames} key frames, {size / 1e6:.2f} MB each, this run took {time.monotonic() - start:.0f} s; for the "
        f"{_NUSCENES_KEY_FRAMES} key frames of nuScenes that is {size * _NUSCENES_KEY_FRAMES / 1e9:.0f} GB "
        f"(the official layout: {_OFFICIAL_BYTES / 1e6:.1f} MB a key frame, "
        f"{_OFFICIAL_BYTES * _NUSCENES_KEY_FRAMES / 1e12:.2f} TB)"
    )


if __name__ == "__main__":
    _define_flags()
    flags.mark_flags_as_required(["config", "out"])
    run(main)
