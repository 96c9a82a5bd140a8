"""How records lie in files: TFRecord framing, shards, and the index that makes every record reachable.

One index file per split names shard, byte offset, length and sample token of every record: what a true global
shuffle needs, and what plain TFRecords lack.

Layout of a records folder DIR (several splits of one dataset version):

  build.json                                  what was built from what; see `data_prep.build`
  dataset_info.json, features.json            TFDS metadata
  DATASET_keyframes-SPLIT.tfrecord-I-of-N     the shards, one scene or a part of one each
  index_SPLIT.json                            `SplitIndex`, written last: a split without it is unfinished
  index/SHARD.json                            `ShardIndex` of each finished shard, for resuming a build
  build_report.json                           scenes, counts and skipped key frames of each split
"""

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import google_crc32c
from etils import epath

# Increased whenever the fields of the record or of its index change: an old folder is then refused, not misread.
SCHEMA_VERSION = "1.0.0"
# What a folder holds that names no data set: there was no other when the first ones were written.
FIRST_DATASET = "nuscenes"

_LENGTH_BYTES = 12  # uint64 length, uint32 masked checksum of it
_FRAME_BYTES = _LENGTH_BYTES + 4  # and uint32 masked checksum of the data


class RecordError(ValueError):
    """A records folder, index or record that cannot be read; the message names the file and the way out."""


def _masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as the TFRecord format wants it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame_record(serialized: bytes) -> bytes:
    """The record with TFRecord framing: length, checksum of the length, data, checksum of the data."""
    length = struct.pack("<Q", len(serialized))
    return b"".join(
        (
            length,
            struct.pack("<I", _masked_crc(length)),
            serialized,
            struct.pack("<I", _masked_crc(serialized)),
        )
    )


def unframe_record(framed: bytes) -> bytes:
    """The data of one framed record.

    Raises:
      RecordError: too short, or a length or checksum that does not fit.
    """
    if len(framed) < _FRAME_BYTES:
        raise RecordError(f"the record is cut off: {len(framed)} bytes left of it")
    length, length_crc = struct.unpack("<QI", framed[:_LENGTH_BYTES])
    if _masked_crc(framed[:8]) != length_crc:
        raise RecordError("the checksum of the record's length does not fit")
    if length != len(framed) - _FRAME_BYTES:
        raise RecordError(f"the record should hold {length} bytes and holds {len(framed) - _FRAME_BYTES}")
    data = framed[_LENGTH_BYTES:-4]
    if _masked_crc(data) != struct.unpack("<I", framed[-4:])[0]:
        raise RecordError("the checksum of the record's data does not fit")
    return data


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Where the records of one shard lie.

    Attributes:
      file: name of the shard in the records folder.
      bytes: size of the file.
      sha256: of the file.
      offsets: of each record's frame in the file; `lengths` with the framing.
      sample_tokens: of each record.
      skipped: `{"sample_token", "error"}` of each key frame that was left out (`--on_error skip`).
    """

    file: str
    bytes: int
    sha256: str
    offsets: list[int]
    lengths: list[int]
    sample_tokens: list[str]
    skipped: list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class SplitIndex:
    """The index of one split.

    Attributes:
      schema: `SCHEMA_VERSION` at the time of writing.
      version: of the data set, such as "v1.0-trainval"; the data set's name where it publishes no versions.
      source_fingerprint: of the tables it was built from.
      split: such as "train".
      shards: in the order of their numbers.
      dataset: name of the data set in `pop3d_jax.lidar_datasets`; an index that names none is of nuScenes.
    """

    schema: str
    version: str
    source_fingerprint: str
    split: str
    shards: list[ShardIndex]
    dataset: str = FIRST_DATASET

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' checksums: equal where the records are equal, wherever the folder lies."""
        content = [self.schema, self.version, self.split, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()


def shard_prefix(dataset: str) -> str:
    """What the names of a data set's shards start with."""
    return f"{dataset}_keyframes"


def index_path(records_dir: epath.PathLike, split: str) -> epath.Path:
    """Path of a split's index."""
    return epath.Path(records_dir) / f"index_{split}.json"


def read_index(records_dir: epath.PathLike, split: str) -> SplitIndex:
    """Reads the index of a finished split.

    Raises:
      RecordError: no such folder, no finished split of that name, another schema, or a damaged index.
    """
    folder = epath.Path(records_dir)
    path = index_path(folder, split)
    if not path.exists():
        if not folder.exists():
            raise RecordError(f"no records folder {folder}: build it with python -m data_prep.build")
        names = sorted(found.name for found in folder.glob("index_*.json"))
        finished = [name.removeprefix("index_").removesuffix(".json") for name in names]
        raise RecordError(
            f"{folder} has no finished split {split!r} (it has: {', '.join(finished) or 'none'}): "
            f"run python -m data_prep.build --split {split} --out {folder}"
        )
    try:
        content = json.loads(path.read_text())
        schema = content["schema"]
        if schema == SCHEMA_VERSION:
            content["shards"] = [ShardIndex(**shard) for shard in content["shards"]]
            return SplitIndex(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is damaged ({error}): delete it and run data_prep.build again") from error
    raise RecordError(f"{path} has schema {schema}, this program reads {SCHEMA_VERSION}: build into a new folder")


def skipped_tokens(records_dir: epath.PathLike, split: str) -> list[str]:
    """Sample tokens of the key frames that a split's build left out; raises as `read_index`."""
    return [entry["sample_token"] for shard in read_index(records_dir, split).shards for entry in shard.skipped]


def shard_index_path(shard: epath.PathLike) -> epath.Path:
    """Path of the index of a finished shard."""
    shard = epath.Path(shard)
    return shard.parent / "index" / f"{shard.name}.json"


def write_shard(
    shard: epath.PathLike, records: Iterable[tuple[str, bytes]], skipped: list[dict[str, str]] | None = None
) -> ShardIndex:
    """Writes a shard and its index, each of which appears whole or not at all.

    Args:
      shard: path of the file.
      records: sample token and serialized example of each record.
      skipped: as in `ShardIndex`; read after the last record, so it may fill while `records` is iterated.
    """
    shard = epath.Path(shard)
    unfinished = shard.parent / f"{shard.name}.incomplete-{os.getpid()}"
    digest = hashlib.sha256()
    offsets, lengths, tokens, position = [], [], [], 0
    with unfinished.open("wb") as file:
        for token, serialized in records:
            framed = frame_record(serialized)
            file.write(framed)
            digest.update(framed)
            offsets.append(position)
            lengths.append(len(framed))
            tokens.append(token)
            position += len(framed)
    index = ShardIndex(shard.name, position, digest.hexdigest(), offsets, lengths, tokens, skipped or [])
    unfinished.replace(shard)
    shard_index_path(shard).parent.mkdir(exist_ok=True)
    write_json(shard_index_path(shard), dataclasses.asdict(index))
    return index


def write_json(path: epath.PathLike, content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Writes a JSON file that appears whole or not at all."""
    path = epath.Path(path)
    unfinished = path.parent / f"{path.name}.incomplete-{os.getpid()}"
    unfinished.write_text(json.dumps(content, indent=indent) + "\n")
    unfinished.replace(path)
