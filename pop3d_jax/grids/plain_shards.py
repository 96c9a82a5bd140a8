"""Rows read straight from the files of a Zarr array whose chunks are stored as they are, each with its checksum.

A search reads every feature of a store. Handed over by a general Zarr library they cost several times what comparing
them costs; read with `preadv` into the array that is compared they do not. Only local files can be read so.

Source: Zarr v3's `sharding_indexed` codec. A file is a shard, chunks in any order and then an index: for each chunk its
offset and its bytes, both all ones where there is none, and the index's own checksum.
"""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
from etils import epath

_CHECKSUM_BYTES = 4
_MISSING = 2**64 - 1
_BYTES_CODECS = ({"name": "bytes"}, {"name": "bytes", "configuration": {"endian": "little"}})


class PlainShards:
    """The files of one array."""

    def __init__(
        self, folder: epath.Path, shard_rows: int, chunk_rows: int, row_shape: Sequence[int], kind: str
    ) -> None:
        self._folder, self._shard_rows, self._chunk_rows = folder, shard_rows, chunk_rows
        self._row_bytes = np.dtype(kind).itemsize * math.prod(row_shape)
        # Chunks are split along rows only: the other numbers of a file's name are zeros.
        self._rest_of_name = ["0"] * len(row_shape)

    @classmethod
    def of(cls, folder: epath.Path) -> "PlainShards | None":
        """The files of the array in a local folder; None if its chunks are made otherwise, so that Zarr must read them.

        Raises:
          OSError: there is no zarr.json.
        """
        metadata = json.loads((folder / "zarr.json").read_text())
        if [codec["name"] for codec in metadata["codecs"]] != ["sharding_indexed"]:
            return None
        sharding = metadata["codecs"][0]["configuration"]
        shape, shard = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        as_expected = (
            _only_checked(sharding["codecs"])
            and _only_checked(sharding["index_codecs"])
            and sharding.get("index_location", "end") == "end"
            and metadata["chunk_key_encoding"]["name"] == "default"
            and shard[1:] == sharding["chunk_shape"][1:] == shape[1:]
            and metadata["fill_value"] == 0
        )
        if not as_expected:
            return None
        return cls(folder, shard[0], sharding["chunk_shape"][0], shape[1:], metadata["data_type"])

    def read_into(self, ranges: Sequence[tuple[int, int]], rows: np.ndarray) -> None:
        """Several ranges of rows, one after the other; every chunk that is touched is checked.

        Args:
          ranges: first row of each, and the one after its last.
          rows: contiguous, filled from its start.

        Raises:
          ValueError: a chunk or an index is damaged, or the chunk was never written.
          OSError: a file is missing or cannot be read.
        """
        target = rows.reshape(-1).view(np.uint8)
        begin = 0
        with contextlib.ExitStack() as files:
            opened: dict[int, _Shard] = {}
            for start, stop in ranges:
                while start < stop:
                    number, row = divmod(start, self._shard_rows)
                    if number not in opened:
                        opened[number] = files.enter_context(self._open(number))
                    chunk, skipped = divmod(row, self._chunk_rows)
                    count = min(stop - start, self._chunk_rows - skipped)
                    end = begin + count * self._row_bytes
                    opened[number].read_into(chunk, skipped * self._row_bytes, target[begin:end])
                    start, begin = start + count, end

    def _open(self, number: int) -> "_Shard":
        path = self._folder.joinpath("c", str(number), *self._rest_of_name)
        return _Shard(path, self._shard_rows // self._chunk_rows, self._chunk_rows * self._row_bytes)


class _Shard:
    """One open file."""

    def __init__(self, path: epath.Path, chunks: int, chunk_bytes: int) -> None:
        self._path, self._chunk_bytes = path, chunk_bytes
        self._file = os.open(path, os.O_RDONLY)
        try:
            self._index = np.empty((chunks, 2), "<u8")
            place = os.fstat(self._file).st_size - self._index.nbytes - _CHECKSUM_BYTES
            if place < 0 or not self._read_checked([self._index.reshape(-1).view(np.uint8)], place):
                raise ValueError(f"{path}: its index is damaged")
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "_Shard":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read_into(self, chunk: int, skipped: int, target: np.ndarray) -> None:
        """Bytes of a chunk, from `skipped` on; the others are read too, for the checksum."""
        offset, size = map(int, self._index[chunk])
        if offset == size == _MISSING:
            raise ValueError(f"{self._path}: chunk {chunk} was never written")
        before = np.empty(skipped, np.uint8)
        after = np.empty(self._chunk_bytes - skipped - len(target), np.uint8)
        if size != self._chunk_bytes + _CHECKSUM_BYTES or not self._read_checked([before, target, after], offset):
            raise ValueError(f"{self._path}: chunk {chunk}, bytes {offset} to {offset + size}, is damaged")

    def _read_checked(self, pieces: list[np.ndarray], offset: int) -> bool:
        """Fills the pieces with what stands at `offset`; whether the checksum behind it is theirs."""
        checksum = np.empty(1, "<u4")
        expected = sum(piece.nbytes for piece in pieces) + _CHECKSUM_BYTES
        if os.preadv(self._file, [*pieces, checksum], offset) != expected:
            return False
        found = 0
        for piece in pieces:
            found = google_crc32c.extend(found, piece)
        return found == int(checksum[0])


def _only_checked(codecs: list[dict[str, Any]]) -> bool:
    """Whether bytes are stored as they are, with a CRC-32C behind them."""
    return len(codecs) == 2 and codecs[0] in _BYTES_CODECS and codecs[1] == {"name": "crc32c"}
