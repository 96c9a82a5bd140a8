import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from random_grids import DIM, KEY_FRAMES, ROWS, attributes_of, write_store

from pop3d_jax.grids.encoding import decode, encode
from pop3d_jax.grids.feature_grids import FeatureGrids
from pop3d_jax.grids.layout import SHARD_KEY_FRAMES, describe_arrays
from pop3d_jax.grids.store import GridStore, GridStoreError

_PROJECT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def make_store(tmp_path):
    return functools.partial(write_store, tmp_path)


@pytest.mark.parametrize("precision", ["float16", "int8", "pq"])
def test_what_is_written_is_read(make_store, precision):
    path, key_frames = make_store(precision)
    grids = FeatureGrids.open(path)
    assert len(grids) == KEY_FRAMES
    assert sum(len(features) for features, _ in key_frames) == grids.counts.sum() > 100
    for number, (features, arrays) in enumerate(key_frames):
        grid = grids[f"{number:032x}"]
        np.testing.assert_array_equal(grid.coordinates, arrays["coordinates"])
        np.testing.assert_array_equal(grid.occupancy, arrays["occupancy"])
        np.testing.assert_array_equal(
            grid.features, decode(encode(features, precision, grids.codebook), grids.codebook)
        )
        np.testing.assert_array_equal(grid.ego_to_global, arrays["ego_to_global"])
        assert grid.timestamp == arrays["timestamp"]
        assert grid.scene_name == "scene-0001"
        np.testing.assert_allclose(grid.centres, arrays["coordinates"] * 2.0 - 49.0)


def test_the_lines_of_the_documentation_read_it_with_zarr(make_store):
    zarr = pytest.importorskip("zarr")
    path, key_frames = make_store("int8")
    text = (_PROJECT / "docs" / "feature_grids.md").read_text()
    block = text.split("```python\nimport zarr")[1].split("```")[0]
    lines = "import zarr" + block
    assert len([line for line in lines.splitlines() if line.strip()]) <= 7  # the import and six
    names = {}
    exec(lines.replace("grids.zarr", str(path)).replace("TOKEN", f"{7:032x}"), names)
    features, arrays = key_frames[7]
    np.testing.assert_array_equal(names["coordinates"], arrays["coordinates"])
    np.testing.assert_array_equal(names["features"], decode(encode(features, "int8")))
    assert zarr.open_group(path, mode="r").attrs["complete"] is True


def test_a_half_written_store_says_so_and_goes_on(make_store):
    path, key_frames = make_store(stop_after=SHARD_KEY_FRAMES)
    with pytest.raises(GridStoreError, match=f"half written: {SHARD_KEY_FRAMES} of {KEY_FRAMES} key frames"):
        FeatureGrids.open(path)
    arrays = describe_arrays(KEY_FRAMES, ROWS, DIM, "int8", None)
    store = GridStore.create(path, attributes_of("int8"), arrays, ROWS)
    assert store.written().sum() == SHARD_KEY_FRAMES
    assert not store.finish()
    for first in range(SHARD_KEY_FRAMES, KEY_FRAMES, SHARD_KEY_FRAMES):
        store.write_shard(first, [stored for _, stored in key_frames[first : first + SHARD_KEY_FRAMES]], ROWS)
    assert store.finish()
    np.testing.assert_array_equal(FeatureGrids.open(path)[18].coordinates, key_frames[18][1]["coordinates"])


def test_a_store_of_another_model_stays(make_store, tmp_path):
    path, key_frames = make_store()
    arrays = describe_arrays(KEY_FRAMES, ROWS, DIM, "int8", None)
    other = attributes_of("int8") | {"model": "another"}
    with pytest.raises(GridStoreError, match=r"made otherwise \(model differ\).*nothing was changed.*--overwrite"):
        GridStore.create(path, other, arrays, ROWS)
    np.testing.assert_array_equal(FeatureGrids.open(path)[3].coordinates, key_frames[3][1]["coordinates"])
    store = GridStore.create(path, other, arrays, ROWS, overwrite=True)
    assert not store.written().any()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("words")
    for overwrite in (False, True):
        with pytest.raises(GridStoreError, match=r"no store of feature grids|not a store of feature grids"):
            GridStore.create(tmp_path / "precious", other, arrays, ROWS, overwrite=overwrite)
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "words"


def test_damage_is_noticed(make_store):
    path, _ = make_store()
    file = path / "features" / "c" / "0" / "0"
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    grids = FeatureGrids.open(path)
    with pytest.raises(GridStoreError, match=r"features, rows .* cannot be read"):
        _ = grids[0]
    (path / "zarr.json").write_text("{")
    with pytest.raises(GridStoreError, match="is damaged"):
        FeatureGrids.open(path)


def test_what_is_no_store_is_named(tmp_path, make_store):
    with pytest.raises(GridStoreError, match="holds no feature grids"):
        FeatureGrids.open(tmp_path / "nowhere")
    path, _ = make_store()
    group = json.loads((path / "zarr.json").read_text())
    group["attributes"]["format_version"] = 99
    (path / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(GridStoreError, match="version 99; this program reads"):
        FeatureGrids.open(path)
    group["attributes"]["format_version"] = 1
    (path / "zarr.json").write_text(json.dumps(group))
    shutil.rmtree(path / "occupancy")
    with pytest.raises(GridStoreError, match="occupancy cannot be opened"):
        FeatureGrids.open(path)


def test_a_full_disk_is_named_before_anything_is_written(make_store, monkeypatch):
    path, key_frames = make_store(stop_after=SHARD_KEY_FRAMES)
    arrays = describe_arrays(KEY_FRAMES, ROWS, DIM, "int8", None)
    store = GridStore.create(path, attributes_of("int8"), arrays, ROWS)
    usage = shutil.disk_usage(path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(GridStoreError, match=r"key frames 8 to 15: not enough disk: .* 1 MiB free"):
        store.write_shard(8, [stored for _, stored in key_frames[8:16]], ROWS)
    assert store.written().sum() == SHARD_KEY_FRAMES


def test_a_quota_is_named(make_store, tmp_path):
    """A real failing write: the process may not write files above a limit."""
    path, _ = make_store(stop_after=SHARD_KEY_FRAMES)
    program = f"""
        import resource, signal
        import numpy as np
        from pop3d_jax.grids.store import GridStore, GridStoreError
        from pop3d_jax.grids.layout import describe_arrays
        from random_grids import *
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        arrays = describe_arrays(KEY_FRAMES, ROWS, DIM, "int8", None)
        store = GridStore.create({str(path)!r}, attributes_of("int8"), arrays, ROWS)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        frame = random_key_frame(np.random.default_rng(3), "int8")[1]
        try:
            store.write_shard(8, [frame] * 8, ROWS)
        except GridStoreError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(_PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "key frames 8 to 15: not written" in done.stdout
    assert "give the same command again" in done.stdout
    assert GridStore.open(path).written().sum() == SHARD_KEY_FRAMES
