"""Verification of a records folder: counts, checksums, and that every record decodes."""

import dataclasses
import hashlib
import json

import numpy as np
from etils import epath

from data_prep import parallel
from data_prep.sensor_files import image_size
from pop3d_jax.data.records import KeyFrame, decode_record
from pop3d_jax.data.shards import RecordError, ShardIndex, read_index, shard_prefix, unframe_record
from pop3d_jax.lidar_datasets import LIDAR_DATASETS


@dataclasses.dataclass(frozen=True)
class SplitCheck:
    """What a split holds and what is wrong with it.

    Attributes:
      problems: one line each, naming shard and record; empty where all is well.
    """

    split: str
    shards: int
    key_frames: int
    points: int
    labelled: int
    bytes: int
    skipped: int
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class _ShardCheck:
    points: int
    labelled: int
    problems: list[str]


def check_records(records_dir: epath.PathLike, split: str | None, workers: int) -> list[SplitCheck]:
    """Verifies a split of a records folder, or all that it has.

    Args:
      records_dir: the folder.
      split: None for all.
      workers: number of processes.

    Raises:
      RecordError: no such folder or split, or no split at all.
    """
    folder = epath.Path(records_dir)
    splits = [split] if split else sorted(path.stem.removeprefix("index_") for path in folder.glob("index_*.json"))
    if not splits:
        raise RecordError(f"{folder} has no finished split (see --out)")
    return [_check_split(folder, name, workers) for name in splits]


def _check_split(folder: epath.Path, split: str, workers: int) -> SplitCheck:
    index = read_index(folder, split)
    work = [(str(folder), index.dataset, shard) for shard in index.shards]
    checks = parallel.run(_check_shard, work, workers, f"checking {split}")
    problems = [problem for check in checks for problem in check.problems]
    problems += _check_metadata(folder, split, index.shards)
    indexed = {shard.file for shard in index.shards}
    strays = sorted(path.name for path in folder.glob(f"{shard_prefix(index.dataset)}-{split}.tfrecord-*"))
    problems += [f"{folder / name}: not in the index, delete it" for name in strays if name not in indexed]
    tokens = [token for shard in index.shards for token in shard.sample_tokens]
    if len(set(tokens)) != len(tokens):
        problems.append(f"{folder}: {len(tokens) - len(set(tokens))} sample tokens of {split} occur twice")
    return SplitCheck(
        split=split,
        shards=len(index.shards),
        key_frames=len(tokens),
        points=sum(check.points for check in checks),
        labelled=sum(check.labelled for check in checks),
        bytes=sum(shard.bytes for shard in index.shards),
        skipped=sum(len(shard.skipped) for shard in index.shards),
        problems=problems,
    )


def _check_metadata(folder: epath.Path, split: str, shards: list[ShardIndex]) -> list[str]:
    """TFDS must see as many records as the index does."""
    path = folder / "dataset_info.json"
    try:
        described = {entry["name"]: entry for entry in json.loads(path.read_text())["splits"]}
        lengths = [int(length) for length in described[split]["shardLengths"]]
    except (OSError, ValueError, KeyError) as error:
        return [f"{path}: cannot be read or has no split {split} ({error!r})"]
    if lengths != [len(shard.offsets) for shard in shards]:
        return [f"{path}: its numbers of records a shard differ from the index"]
    return []


def _check_shard(work: tuple[str, str, ShardIndex]) -> _ShardCheck:
    folder, dataset, shard = work
    path = epath.Path(folder) / shard.file
    try:
        content = path.read_bytes()
    except OSError as error:
        return _ShardCheck(0, 0, [f"{path}: {error}"])
    problems = []
    if len(content) != shard.bytes:
        problems.append(f"{path}: {len(content)} bytes, the index says {shard.bytes}")
    elif hashlib.sha256(content).hexdigest() != shard.sha256:
        problems.append(f"{path}: the checksum of the file does not fit")
    if not len(shard.offsets) == len(shard.lengths) == len(shard.sample_tokens):
        return _ShardCheck(0, 0, [*problems, f"{path}: its index names offsets, lengths and tokens unequal in number"])
    points = labelled = 0
    for number, (offset, length) in enumerate(zip(shard.offsets, shard.lengths, strict=True)):
        try:
            key_frame = decode_record(unframe_record(content[offset : offset + length]))
            _check_key_frame(key_frame, shard.sample_tokens[number], dataset)
        except ValueError as error:
            problems.append(f"{path}, record {number} (sample {shard.sample_tokens[number]}): {error}")
        else:
            points += len(key_frame.points)
            labelled += len(key_frame.lidarseg) > 0
    return _ShardCheck(points, labelled, problems)


def _check_key_frame(key_frame: KeyFrame, sample_token: str, dataset: str) -> None:
    """Raises ValueError where a record decodes to something that cannot be a key frame."""
    if key_frame.sample_token != sample_token:
        raise ValueError(f"holds sample {key_frame.sample_token}")
    for name in ("intrinsics", "lidar_to_camera", "lidar_to_ego", "ego_to_global", "points"):
        if not np.isfinite(getattr(key_frame, name)).all():
            raise ValueError(f"{name} is not finite")
    if len(key_frame.lidarseg) not in (0, len(key_frame.points)):
        raise ValueError(f"{len(key_frame.lidarseg)} labels for {len(key_frame.points)} points")
    facts = LIDAR_DATASETS[dataset]
    if len(key_frame.lidarseg) and key_frame.lidarseg.max() >= len(facts.raw_to_class):
        raise ValueError(
            f"label {key_frame.lidarseg.max()}, but {dataset} has {len(facts.raw_to_class)} raw categories"
        )
    counts = {len(key_frame.images), len(key_frame.intrinsics), len(key_frame.lidar_to_camera), len(facts.cameras)}
    if len(counts) != 1:
        raise ValueError(f"images, calibration and the cameras of {dataset} differ in number: {sorted(counts)}")
    for file, image in zip(key_frame.camera_files, key_frame.images, strict=True):
        try:
            image_size(image)
        except ValueError as error:
            raise ValueError(f"image {file} {error}") from error


def check_table(checks: list[SplitCheck]) -> str:
    """The result as a table for people."""
    header = ("split", "shards", "key frames", "points each", "with labels", "MiB", "skipped", "problems")
    lines = [header] + [
        (
            check.split,
            str(check.shards),
            str(check.key_frames),
            f"{check.points / max(1, check.key_frames):.0f}",
            str(check.labelled),
            f"{check.bytes / 2**20:.1f}",
            str(check.skipped),
            str(len(check.problems)),
        )
        for check in checks
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (zip(line, widths, strict=True) for line in lines)
    )
