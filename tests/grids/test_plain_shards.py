import json
from collections.abc import Callable

import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.grids.plain_shards import PlainShards

CHUNK, SHARD, ROWS = 4, 12, 30
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


def write_array(folder, values, written, codecs=None):
    """A Zarr array of which only some ranges of rows are written."""
    sharding = {
        "chunk_shape": [CHUNK, *values.shape[1:]],
        "codecs": codecs or [_LITTLE, {"name": "crc32c"}],
        "index_codecs": [_LITTLE, {"name": "crc32c"}],
    }
    metadata = {
        "shape": values.shape,
        "data_type": values.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD, *values.shape[1:]]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}, "metadata": metadata}
    array = ts.open(spec, create=True).result()
    for start, stop in written:
        array[start:stop].write(values[start:stop]).result()
    return array


@pytest.fixture(scope="module", params=["int8", "float16", "float16 without columns"])
def plain_and_zarr(request, tmp_path_factory):
    """A Zarr array of three files, the last one not full, and the direct reader of them."""
    folder = tmp_path_factory.mktemp("array")
    kind, _, flat = request.param.partition(" ")
    values = np.random.default_rng(0).integers(-100, 100, (ROWS,) if flat else (ROWS, 3)).astype(kind)
    array = write_array(folder, values, [(0, ROWS)])
    plain = PlainShards.of(epath.Path(folder))
    assert plain is not None
    return plain, array


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(sorted), max_size=4))
def test_any_rows_are_those_that_zarr_reads(plain_and_zarr, ranges):
    plain, array = plain_and_zarr
    expected = [array[start:stop].read().result() for start, stop in ranges]
    rows = np.full((4 * ROWS, *array.shape[1:]), 77, array.dtype.numpy_dtype)
    plain.read_into([tuple(both) for both in ranges], rows)
    filled = sum(len(part) for part in expected)
    np.testing.assert_array_equal(rows[:filled], np.concatenate([rows[:0], *expected]))
    assert np.all(rows[filled:] == 77)


def test_a_chunk_that_was_never_written_is_named(tmp_path):
    values = np.ones((ROWS, 3), np.int8)
    write_array(tmp_path, values, [(0, 8), (12, ROWS)])
    plain, rows = PlainShards.of(epath.Path(tmp_path)), np.zeros((ROWS, 3), np.int8)
    plain.read_into([(0, 8), (12, 24)], rows)
    assert np.all(rows[:20] == 1)
    with pytest.raises(ValueError, match=r"c/0/0: chunk 2 was never written"):
        plain.read_into([(7, 13)], rows)


def _change(path: tuple, value: object) -> Callable[[dict], None]:
    def change(metadata: dict) -> None:
        *folders, last = path
        for name in folders:
            metadata = metadata[name]
        metadata[last] = value

    return change


_SHARDING = ("codecs", 0, "configuration")


@pytest.mark.parametrize(
    "change",
    [
        _change(("codecs",), [_LITTLE, {"name": "crc32c"}]),
        _change((*_SHARDING, "codecs"), [_LITTLE, {"name": "zstd", "configuration": {"level": 1}}, {"name": "crc32c"}]),
        _change((*_SHARDING, "codecs"), [_LITTLE]),
        _change((*_SHARDING, "codecs", 0), {"name": "bytes", "configuration": {"endian": "big"}}),
        _change((*_SHARDING, "index_codecs"), [_LITTLE]),
        _change((*_SHARDING, "index_location"), "start"),
        _change((*_SHARDING, "chunk_shape"), [CHUNK, 1]),
        _change(("fill_value",), 1),
        _change(("chunk_key_encoding",), {"name": "v2"}),
    ],
)
def test_other_layouts_are_left_to_zarr(tmp_path, change):
    write_array(tmp_path, np.zeros((ROWS, 3), np.int8), [])
    file = tmp_path / "zarr.json"
    metadata = json.loads(file.read_text())
    assert PlainShards.of(epath.Path(tmp_path)) is not None
    change(metadata)
    file.write_text(json.dumps(metadata))
    assert PlainShards.of(epath.Path(tmp_path)) is None
