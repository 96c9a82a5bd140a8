"""The export command, from a trained run to hits, with real processes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pop3d_jax import FeatureGrids
from pop3d_jax.data.records import RecordSource
from pop3d_jax.grids.exporter import export
from pop3d_jax.grids.layout import SHARD_KEY_FRAMES
from pop3d_jax.grids.selection import Selection, select
from pop3d_jax.grids.store import GridStore
from pop3d_jax.grids.tables import write_parquet
from pop3d_jax.inference import Predictor, find_sample

_PROJECT = Path(__file__).resolve().parent.parent


# Five files of key frames out of the four that there are, again and again.
MANY_SAMPLES = "--samples=" + ",".join(str(number % 4) for number in range(5 * SHARD_KEY_FRAMES - 1))


def command(module, *flags, **environment):
    return subprocess.run(
        [sys.executable, "-m", f"pop3d_jax.{module}", *map(str, flags)],
        cwd=_PROJECT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_same_stores(expected, found):
    whole, again = GridStore.open(expected), GridStore.open(found)
    assert again.attributes == whole.attributes
    for name in whole.arrays:
        if name not in whole.row_arrays():
            np.testing.assert_array_equal(again.read(name), whole.read(name))
    for start, count in zip(whole.read("voxel_offset"), whole.read("voxel_count"), strict=True):
        for name in whole.row_arrays():
            rows = int(start), int(start + count)
            np.testing.assert_array_equal(again.read(name, *rows), whole.read(name, *rows))


@pytest.fixture(scope="module")
def exported(small_run, tmp_path_factory):
    """Grids of the training split: all voxels of four key frames, float16."""
    out = tmp_path_factory.mktemp("exported") / "grids.zarr"
    done = command(
        "export", f"--workdir={small_run}", "--split=train", f"--out={out}", "--dense", "--precision=float16"
    )
    assert done.returncode == 0, done.stderr
    assert "4 key frames, 1,920 voxels, 480 a key frame" in done.stdout
    return out


def test_grids_hold_what_the_network_predicts(small_run, exported):
    grids = FeatureGrids.open(exported)
    predictor = Predictor(small_run)
    source = RecordSource(predictor.config.data.records, "train")
    assert grids.sample_tokens == source.sample_tokens
    assert grids.volume == predictor.student.volume
    for number in range(len(source)):
        frame, grid = source[number], grids[number]
        prediction = predictor(frame)
        at = tuple(grid.coordinates.T)
        np.testing.assert_allclose(grid.occupancy, prediction.occupancy[at], atol=1e-3)
        np.testing.assert_allclose(grid.features, prediction.features[at], atol=2e-3, rtol=2e-3)
        assert grid.scene_name == frame.scene_name
        assert grid.timestamp == frame.timestamp
        np.testing.assert_array_equal(grid.lidar_to_camera, frame.lidar_to_camera)
        np.testing.assert_array_equal(grid.ego_to_global, frame.ego_to_global)


@pytest.mark.slow
def test_a_phrase_is_looked_up_in_all_key_frames(exported, tmp_path):
    done = command(
        "query", f"--grids={exported}", "--text=a red car", "--text=a tree", "--top=3", f"--out={tmp_path / 'hits.png'}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scene-") == 6
    assert "“a tree”" in done.stdout
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_export_that_was_killed_goes_on(small_run, exported, tmp_path):
    """Another process has written the store's metadata and died; the next one writes the same store as in one go."""
    out = tmp_path / "grids.zarr"
    flags = [f"--workdir={small_run}", "--split=train", f"--out={out}", "--dense", "--precision=float16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pop3d_jax.export", *flags], cwd=_PROJECT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (out / "intrinsics" / "zarr.json").exists():  # the last array
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    asked = command("query", f"--grids={out}", "--text=a red car", f"--out={tmp_path / 'hits.png'}")
    assert asked.returncode == 1
    assert "is half written: 0 of 4 key frames. Give the command of its export again" in asked.stderr
    done = command("export", *flags)
    assert done.returncode == 0, done.stderr
    assert_same_stores(exported, out)
    nothing_to_do = command("export", *flags)
    assert "1 of 1 files are already there" in nothing_to_do.stderr


def start_pair(*flags):
    """Two processes that export as one program."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "pop3d_jax.export", *flags],
            cwd=_PROJECT,
            env=os.environ | variables | {"JAX_PROCESS_ID": str(index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


@pytest.mark.slow
def test_two_hosts_write_the_store_of_one_and_go_on_when_one_was_killed(small_run, tmp_path):
    flags = [f"--workdir={small_run}", "--split=train", "--dense", "--precision=pq", "--pq_bytes=4", MANY_SAMPLES]
    alone = command("export", f"--out={tmp_path / 'alone.zarr'}", *flags)
    assert alone.returncode == 0, alone.stderr

    out = tmp_path / "pair.zarr"
    pair = start_pair(f"--out={out}", *flags)
    deadline = time.monotonic() + 200
    while not (out / "voxel_count" / "c" / "1").exists():
        assert [process.poll() for process in pair] == [None, None]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    pair[1].send_signal(signal.SIGKILL)
    pair[1].communicate()
    # The other one writes its own files, and then waits in vain: it fails, or is ended by whoever watches it.
    try:
        pair[0].communicate(timeout=60)
        assert pair[0].returncode != 0
    except subprocess.TimeoutExpired:
        pair[0].kill()
        pair[0].communicate()
    before = GridStore.open(out)
    assert before.written().any()
    assert not before.written().all()
    assert not before.attributes["complete"]

    pair = start_pair(f"--out={out}", *flags)
    logs = [process.communicate(timeout=200)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], logs
    assert "1 of 2 files are already there" in logs[1]
    assert_same_stores(tmp_path / "alone.zarr", out)


@pytest.mark.parametrize(
    ("flags", "differing"), [(["--precision=int8"], "precision, selection"), (["--step=6", "--dense"], "model")]
)
def test_a_store_made_otherwise_stays(small_run, exported, flags, differing):
    flags = [f"--workdir={small_run}", "--split=train", f"--out={exported}", "--precision=float16", *flags]
    before = sorted((file, file.stat().st_mtime_ns) for file in exported.rglob("*"))
    done = command("export", *flags)
    assert done.returncode == 1
    assert f"made otherwise ({differing} differ): nothing was changed" in done.stderr
    assert "--overwrite to delete them" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted((file, file.stat().st_mtime_ns) for file in exported.rglob("*")) == before


@pytest.mark.slow
def test_overwrite_replaces_a_store_of_another_model(small_run, exported, tmp_path):
    out = tmp_path / "grids.zarr"
    shutil.copytree(exported, out)
    done = command("export", f"--workdir={small_run}", "--split=train", f"--out={out}", "--step=6", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert GridStore.open(out).attributes["model"]["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        # A real failing write: this process may not write files above a limit.
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))", "not written: .*give the same command again"),
        ("usage = shutil.disk_usage('/'); shutil.disk_usage = lambda _: usage._replace(free=2**20)", "not enough disk"),
    ],
)
def test_no_room_is_named(small_run, exported, tmp_path, trouble, words):
    out = tmp_path / "grids.zarr"
    flags = [f"--workdir={small_run}", "--split=train", f"--out={out}", "--dense", "--precision=float16"]
    program = f"import resource, runpy, shutil\n{trouble}\nrunpy.run_module('pop3d_jax.export', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program, *flags], cwd=_PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.search(f"error: .*grids.zarr, key frames 0 to 3: {words}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not GridStore.open(out).written().any()
    again = command("export", *flags)
    assert again.returncode == 0, again.stderr
    assert_same_stores(exported, out)


def test_wrong_requests_are_named(small_run, tmp_path):
    predictor = Predictor(small_run)
    source = RecordSource(predictor.config.data.records, "train")
    with pytest.raises(
        ValueError, match="--samples=none is neither a sample token of the split nor a number from 0 to 3"
    ):
        find_sample(source, "none", "--samples")
    odd = Selection(precision="pq", pq_bytes=5)
    with pytest.raises(ValueError, match="--pq_bytes=5 must divide the 16 dimensions"):
        export(predictor, source, range(4), tmp_path / "grids.zarr", odd, split="train", text_tower="nowhere")
    with pytest.raises(ValueError, match=r"add --precision=float16"):
        write_parquet(tmp_path / "voxels.parquet", predictor, source, range(4), Selection())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run_with(small_run, tmp_path):
    """`run_with(section)`: the small run with another `config.export`, or without the section (None)."""

    def make(section):
        run = tmp_path / "run"
        run.mkdir()
        (run / "checkpoints").symlink_to(small_run / "checkpoints")
        config = json.loads((small_run / "config.json").read_text())
        del config["export"]
        (run / "config.json").write_text(json.dumps(config | ({} if section is None else {"export": section})))
        return run

    return make


@pytest.mark.parametrize(
    ("section", "flags", "expected"),
    [
        pytest.param(
            {"threshold": 0.0, "top_k": 9, "precision": "float16"},
            [],
            Selection(0.0, 9, "float16"),
            marks=pytest.mark.slow,
        ),
        ({"top_k": 9}, ["--dense", "--precision=float16"], Selection(0.0, 0, "float16")),
        pytest.param(None, ["--top_k=7"], Selection(0.5, 7, "int8"), marks=pytest.mark.slow),
    ],
)
def test_the_run_says_which_voxels_unless_a_flag_does(run_with, tmp_path, section, flags, expected):
    out = tmp_path / "grids.zarr"
    done = command("export", f"--workdir={run_with(section)}", "--split=train", f"--out={out}", *flags)
    assert done.returncode == 0, done.stderr
    attributes = GridStore.open(out).attributes
    assert attributes["selection"] == dataclasses.asdict(expected)
    assert FeatureGrids.open(out).counts.max() <= (expected.top_k or 480)


@pytest.mark.slow
def test_wrong_flags_are_a_line(small_run, tmp_path):
    (tmp_path / "file").touch()
    for flags, words in (
        (["--top_k=-4"], "--top_k=-4 (or config.export.top_k) must be at least 1"),
        (["--dense", "--threshold=0.3"], "leave out --threshold, or --dense"),
        (["--samples="], "--samples is empty"),
        ([f"--out={tmp_path / 'file'}"], f"{tmp_path / 'file'} is a file: choose another --out"),
        ([f"--out={tmp_path / 'file' / 'grids.zarr'}"], "cannot be made"),
        (["all"], "not a flag: all"),
    ):
        done = command("export", f"--workdir={small_run}", f"--out={tmp_path / 'grids.zarr'}", *flags)
        assert done.returncode == 1, (flags, done.stderr)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert [words in line for line in errors] == [True], done.stderr
        assert "Traceback" not in done.stderr
        assert "USAGE" not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_questions_that_cannot_be_asked_are_a_line(small_run, exported, tmp_path):
    for flags, words in (
        ([f"--grids={exported}", "--text="], "none of them empty"),
        (
            [f"--grids={exported}", "--text=a", "red", "car"],
            "not a flag: red car; a value that holds spaces needs quotes",
        ),
        ([f"--grids={exported}", "--text=x", "--sample=1"], "--sample says nothing with --grids"),
        ([f"--workdir={small_run}", "--text=x", "--without=y"], "--without says nothing with --workdir"),
        ([f"--workdir={small_run}", "--text=x", "--text=y"], "several --text need --grids"),
        (["--text=x"], "give --workdir to ask a trained run, or --grids"),
        ([f"--workdir={small_run}"], "give --text, the phrase to ask for"),
        ([f"--workdir={small_run}", "--text=x", "--point=1,2,3"], "--point says nothing without --lidar"),
        ([f"--workdir={small_run}", "--lidar"], "--lidar needs --text, a phrase, or --point"),
        ([f"--workdir={small_run}", "--lidar", "--text=x", "--point=1,2,3"], "exactly one of them"),
        ([f"--grids={exported}", "--lidar", "--text=x"], "--lidar asks a trained run"),
        ([f"--grids={exported}", "--text=x", f"--text_tower={tmp_path}"], "name it with --text_tower"),
    ):
        done = command("query", *flags)
        assert done.returncode == 1, (flags, done.stderr)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert [words in line for line in errors] == [True], done.stderr
        assert "Traceback" not in done.stderr
        assert "USAGE" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_table_for_table_people(small_run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra: pip install 'pop3d-jax[parquet]'")
    out = tmp_path / "voxels.parquet"
    flags = [
        f"--workdir={small_run}",
        "--format=parquet",
        "--precision=float16",
        f"--out={out}",
        "--top_k=50",
        "--dense",
    ]
    done = command("export", *flags)
    assert done.returncode == 0, done.stderr
    table = parquet.read_table(out)
    predictor = Predictor(small_run)
    source = RecordSource(predictor.config.data.records, "val")
    assert table.num_rows == 50 * len(source)
    coordinates, occupancy, features = select(predictor(source[0]), Selection(0.0, 50))
    first = table.slice(0, 50).to_pydict()
    assert set(first["sample_token"]) == {source.sample_tokens[0]}
    np.testing.assert_array_equal(np.stack([first[axis] for axis in "xyz"], -1), coordinates)
    np.testing.assert_allclose(first["occupancy"], occupancy, atol=1e-3)
    np.testing.assert_allclose(np.array(first["feature"]), features, atol=2e-3, rtol=2e-3)
    again = command("export", *flags)
    assert again.returncode == 1
    assert "exists: choose another --out, or --overwrite" in again.stderr
