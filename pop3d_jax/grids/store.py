"""The store of exported grids: a Zarr v3 group, read by any Zarr library, written by several hosts at once.

A key frame has a fixed range of rows, far more than it needs; rows without a voxel are never written and take no room.
So every writer knows its rows beforehand, and `voxel_offset` and `voxel_count` say which rows hold voxels. A file holds
the rows of a few key frames ("shard"); it is written once, whole, by the host that owns these key frames, and their
counts come last: a store that was stopped half-way goes on where the counts are missing. Chunks carry checksums.

The arrays themselves: `pop3d_jax.grids.layout`, and docs/feature_grids.md.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from pop3d_jax.grids.layout import CHUNK_ROWS, NOT_WRITTEN, ROW_ARRAYS, array_metadata, describe_arrays
from pop3d_jax.grids.plain_shards import PlainShards

FORMAT = "pop3d_jax.feature_grids"
FORMAT_VERSION = 1
# Room that must stay free on a local disk beside what is about to be written.
_SPARE_BYTES = 64 * 2**20


class GridStoreError(Exception):
    """The store cannot be read or written; the message says what to do."""


def _kvstore(path: epath.Path, name: str) -> dict[str, Any] | str:
    text = os.fspath(path / name)
    return f"{text}/" if "://" in text else {"driver": "file", "path": os.path.abspath(text) + "/"}


class GridStore:
    """Arrays and attributes of a store. `FeatureGrids` is the comfortable way to read one."""

    def __init__(self, path: epath.PathLike, attributes: dict[str, Any], arrays: Mapping[str, ts.TensorStore]) -> None:
        self.path, self.attributes, self.arrays = epath.Path(path), attributes, arrays
        is_local = "://" not in os.fspath(self.path)
        shards = {name: PlainShards.of(self.path / name) for name in ROW_ARRAYS} if is_local else {}
        self._plain_shards = {name: files for name, files in shards.items() if files}

    @property
    def key_frames(self) -> int:
        """Key frames that the store is made for, written or not."""
        return self.arrays["voxel_count"].shape[0]

    @classmethod
    def create(
        cls,
        path: epath.PathLike,
        attributes: dict[str, Any],
        arrays: dict[str, tuple[str, tuple[int, ...], bool]],
        rows: int,
        *,
        overwrite: bool = False,
    ) -> "GridStore":
        """A new store, or the one that is there, if it was begun with the same attributes.

        Args:
          path: local folder or gs://.
          attributes: of the group; "complete" is added.
          arrays: from `describe_arrays`.
          rows: reserved for each key frame.
          overwrite: delete whatever store is there.

        Raises:
          GridStoreError: the path cannot be made, or holds something else, or a store of another model, selection or
            split.
        """
        path = epath.Path(path)
        if path.exists() and not path.is_dir():
            raise GridStoreError(f"{path} is a file: choose another --out, a folder")
        group = path / "zarr.json"
        attributes = json.loads(json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION} | attributes))
        if path.exists() and overwrite:
            if any(path.iterdir()) and _read_group(path).get("format") != FORMAT:
                raise GridStoreError(f"{path} is not a store of feature grids: --overwrite does not delete it")
            path.rmtree()
        if path.exists() and any(path.iterdir()):
            _same_or_error(path, _read_group(path), attributes)
        else:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise GridStoreError(f"{path} cannot be made ({error}): choose another --out") from error
            _write_group(group, attributes | {"complete": False})
        opened = {}
        for name, (kind, shape, ragged) in arrays.items():
            spec = {
                "driver": "zarr3",
                "kvstore": _kvstore(path, name),
                "metadata": array_metadata(name, kind, shape, ragged, rows),
                # Zeros are written too: a file that is missing was lost.
                "store_data_equal_to_fill_value": True,
            }
            opened[name] = _opened(spec, path, name, create=True, open=True)
        return cls(path, _read_group(path), opened)

    @classmethod
    def open(cls, path: epath.PathLike) -> "GridStore":
        """A store to read.

        Raises:
          GridStoreError: there is none, or it is of another version.
        """
        path = epath.Path(path)
        if not (path / "zarr.json").exists():
            raise GridStoreError(f"{path} holds no feature grids (no zarr.json): make them with pop3d_jax.export")
        attributes = _read_group(path)
        if attributes.get("format") != FORMAT or attributes.get("format_version") != FORMAT_VERSION:
            raise GridStoreError(
                f"{path}: format {attributes.get('format')!r}, version {attributes.get('format_version')!r}; "
                f"this program reads {FORMAT!r}, version {FORMAT_VERSION}"
            )
        names = list(describe_arrays(1, CHUNK_ROWS, 1, attributes["precision"], None))
        names += ["codebook_rotation", "codebook_entries"] if attributes["precision"] == "pq" else []
        opened = {
            name: _opened(
                {
                    "driver": "zarr3",
                    "kvstore": _kvstore(path, name),
                    # Which key frames are written is told by what is missing of these two; elsewhere it was lost.
                    "fill_missing_data_reads": name in ("voxel_count", "voxel_offset"),
                },
                path,
                name,
                open=True,
                read=True,
            )
            for name in names
        }
        return cls(path, attributes, opened)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """Rows start..stop of an array.

        Raises:
          GridStoreError: a chunk is damaged.
        """
        try:
            return self.arrays[name][slice(start, stop)].read().result()
        except (ValueError, OSError) as error:
            raise GridStoreError(f"{self.path}/{name}, rows {start} to {stop}, cannot be read: {error}") from error

    def read_into(self, name: str, ranges: Sequence[tuple[int, int]], rows: np.ndarray) -> None:
        """Several ranges of rows, one after the other into an array that may be used again: nothing is allocated.

        Raises:
          GridStoreError: a chunk is damaged.
        """
        try:
            if name in self._plain_shards:
                self._plain_shards[name].read_into(ranges, rows)
                return
            array, target, begin = self.arrays[name], ts.array(rows), 0
            waiting = []
            for start, stop in ranges:
                end = begin + stop - start
                waiting.append(target[begin:end].write(array[start:stop]))
                begin = end
            for future in waiting:
                future.result()
        except (ValueError, OSError) as error:
            first, last = ranges[0][0], ranges[-1][1]
            raise GridStoreError(f"{self.path}/{name}, rows {first} to {last}, cannot be read: {error}") from error

    def row_arrays(self) -> dict[str, ts.TensorStore]:
        """Those that have a row for every voxel."""
        return {name: self.arrays[name] for name in ROW_ARRAYS}

    def written(self) -> np.ndarray:
        """Which key frames are written."""
        return self.read("voxel_count") != NOT_WRITTEN

    def write_shard(self, first: int, key_frames: Sequence[Mapping[str, np.ndarray]], rows: int) -> None:
        """Writes the key frames of one file, from key frame `first` on, counts last.

        Args:
          first: number of the first key frame, a multiple of SHARD_KEY_FRAMES.
          key_frames: name -> array of each; arrays with rows for voxels in the order of their voxels.
          rows: reserved for each key frame.

        Raises:
          GridStoreError: no room, or the write failed; what was finished before is kept.
        """
        where = f"{self.path}, key frames {first} to {first + len(key_frames) - 1}"
        self._check_room(sum(array.nbytes for key_frame in key_frames for array in key_frame.values()), where)
        try:
            for name, array in self.arrays.items():
                if name in ("voxel_count", "voxel_offset") or name.startswith("codebook"):
                    continue
                with ts.Transaction() as transaction:
                    target = array.with_transaction(transaction)
                    for number, key_frame in enumerate(key_frames, first):
                        values = key_frame[name]
                        if name not in ROW_ARRAYS:
                            target[number].write(values).result()
                        elif len(values):
                            target[number * rows : number * rows + len(values)].write(values).result()
            numbers = np.arange(first, first + len(key_frames))
            self.arrays["voxel_offset"][numbers[0] : numbers[-1] + 1].write(numbers * rows).result()
            counts = np.array([len(key_frame["coordinates"]) for key_frame in key_frames], np.int32)
            self.arrays["voxel_count"][numbers[0] : numbers[-1] + 1].write(counts).result()
        except (ValueError, OSError) as error:
            raise GridStoreError(
                f"{where}: not written: {error}. What was finished before is kept: mend the cause (room? quota? "
                "permission?) and give the same command again."
            ) from error

    def write_codebook(self, rotation: np.ndarray, entries: np.ndarray) -> None:
        """Writes the codebook of precision "pq"."""
        self.arrays["codebook_rotation"].write(rotation).result()
        self.arrays["codebook_entries"].write(entries).result()

    def has_codebook(self) -> bool:
        """Whether `write_codebook` was done."""
        return bool(np.any(self.read("codebook_entries")))

    def finish(self) -> bool:
        """Marks the store complete if every key frame is written; whether it is."""
        if not self.written().all():
            return False
        self.attributes["complete"] = True
        _write_group(self.path / "zarr.json", self.attributes)
        return True

    def _check_room(self, needed: int, where: str) -> None:
        if "://" in os.fspath(self.path):
            return
        free = shutil.disk_usage(self.path).free
        if free < needed + _SPARE_BYTES:
            raise GridStoreError(
                f"{where}: not enough disk: {needed / 2**20:.0f} MiB to write, {free / 2**20:.0f} MiB free. Nothing "
                "was lost: free some, and give the same command again."
            )


def _opened(spec: dict[str, Any], path: epath.Path, name: str, **how: bool) -> ts.TensorStore:
    # Nothing is kept in memory: a store may be far larger than it.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    try:
        return ts.open(spec, context=context, **how).result()
    except (ValueError, OSError) as error:
        raise GridStoreError(
            f"{path}/{name} cannot be opened: {error}. Is the store half written, or half copied? Give the command of "
            "its export again, or copy it again."
        ) from error


def _read_group(path: epath.Path) -> dict[str, Any]:
    """Attributes of the group; none where there is no readable zarr.json."""
    group = path / "zarr.json"
    if not group.exists():
        return {}
    try:
        return json.loads(group.read_text()).get("attributes", {})
    except json.JSONDecodeError as error:
        raise GridStoreError(f"{group} is damaged: {error}. Delete the store, or copy it again.") from error


def _write_group(group: epath.Path, attributes: dict[str, Any]) -> None:
    document = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes})
    half = group.parent / f"zarr.json.{os.getpid()}"  # whoever reads finds the old one or the new one
    half.write_text(document)
    half.replace(group)


def _same_or_error(path: epath.Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before.get("format") != FORMAT:
        raise GridStoreError(f"{path} exists and is no store of feature grids: choose another --out")
    # Where a run lies and how it was reached say nothing about its numbers.
    differing = [key for key in now if key not in ("created_by",) and before.get(key) != now[key]]
    if differing:
        raise GridStoreError(
            f"{path} holds grids made otherwise ({', '.join(differing)} differ): nothing was changed. Choose another "
            "--out, or --overwrite to delete them."
        )
