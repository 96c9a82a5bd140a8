"""The build: content, resuming, parallel work, bad input, and the command."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tiny_root import write_tiny_root

from data_prep import nuscenes_tables
from data_prep.build import EXIT_DONE, EXIT_ERROR, EXIT_SKIPPED
from data_prep.check_records import check_records, check_table
from data_prep.keyframes_builder import SceneShard
from data_prep.nuscenes_builder import NuscenesKeyframes
from data_prep.nuscenes_tables import read_tables
from data_prep.sensor_files import read_key_frame
from data_prep.split_build import BuildError, build_split
from data_prep.splits import SplitError, scene_names
from data_prep.table_rows import SourceError
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.data.shards import shard_prefix
from pop3d_jax.nuscenes import CAMERAS, LIDAR

_SCENES = ("scene-0061", "scene-0553")


@pytest.fixture
def root(tmp_path):
    return write_tiny_root(tmp_path / "source", scenes=(*_SCENES, "scene-0103"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "records"


def _build(root, out, split="mini_train", *, skip_errors=False, workers=1):
    return build_split(root.folder, root.version, split, out, skip_errors=skip_errors, workers=workers)


def _flags(root, out, *more):
    where = [f"--source={root.folder}", f"--version={root.version}", "--split=mini_train", f"--out={out}"]
    return [sys.executable, "-m", "data_prep.build", *where, *more]


def _run(command):
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def _shards(out, split="mini_train"):
    return sorted(
        path for path in out.glob(f"{shard_prefix('nuscenes')}-{split}.tfrecord-*") if "incomplete" not in path.name
    )


def _content(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def _times(out):
    return {path.name: path.stat().st_mtime_ns for path in _shards(out)}


def test_records_hold_the_files_as_they_are(root, out):
    index = _build(root, out)
    source = RecordSource(out, "mini_train")
    assert source.sample_tokens == root.samples[:4]
    assert [len(shard.offsets) for shard in index.shards] == [2, 2]
    rows = [row for scene in read_tables(root.folder, root.version, "mini_train").scenes for row in scene.key_frames]
    for number, row in enumerate(rows):
        frame = source[number]
        assert frame.images == [root.file(camera, number).read_bytes() for camera in CAMERAS]
        assert frame.points.tobytes() == root.file(LIDAR, number).read_bytes()
        assert frame.lidarseg.tobytes() == root.label_file(number).read_bytes()
        for field in set(row.__dict__) & {field.name for field in dataclasses.fields(frame)}:
            np.testing.assert_array_equal(getattr(frame, field), getattr(row, field), err_msg=field)


def test_a_root_without_labels_builds(tmp_path, out):
    root = write_tiny_root(tmp_path / "source", scenes=_SCENES[:1], labelled=False)
    _build(root, out)
    assert RecordSource(out, "mini_train")[0].lidarseg.shape == (0,)
    assert check_records(out, None, 1)[0].labelled == 0


def test_a_beam_pipeline_writes_the_same_bytes(root, out, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra: pip install 'pop3d-jax[beam]'")
    _build(root, out)
    command = [*_flags(root, tmp_path / "beam"), "--runner=beam", "--beam_option=--runner=DirectRunner"]
    assert _run(command).returncode == 0
    names = sorted(path.name for path in out.iterdir() if path.is_file())
    assert any(".tfrecord-" in name for name in names)
    assert names == sorted(path.name for path in (tmp_path / "beam").iterdir() if path.is_file())
    for name in names:
        if name not in ("build.json", "build_report.json"):
            assert (out / name).read_bytes() == (tmp_path / "beam" / name).read_bytes(), name


def test_an_error_on_a_beam_worker_names_token_and_file(root, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra: pip install 'pop3d-jax[beam]'")
    path = root.file("CAM_BACK")
    path.unlink()
    done = _run([*_flags(root, tmp_path / "beam"), "--runner=beam"])
    assert done.returncode == 1
    assert path.name in done.stderr


def test_the_records_do_not_depend_on_the_workers(root, out, tmp_path):
    _build(root, out, workers=1)
    _build(root, tmp_path / "other", workers=2)
    assert _content(out) == _content(tmp_path / "other")


def test_splits_share_a_folder(root, out):
    _build(root, out)
    _build(root, out, "mini_val")
    assert len(RecordSource(out, "mini_train")) == 4
    assert RecordSource(out, "mini_val").sample_tokens == root.samples[4:]
    splits = tfds.builder_from_directory(out).info.splits
    assert {name: split.num_examples for name, split in splits.items()} == {"mini_train": 4, "mini_val": 2}
    report = json.loads((out / "build_report.json").read_text())
    assert report["mini_train"]["scenes"] == list(_SCENES)
    assert report["mini_train"]["absent_scenes"] == [n for n in scene_names("mini_train") if n not in _SCENES]
    assert report["mini_val"]["key_frames"] == 2
    checks = check_records(out, None, 1)
    assert [(check.split, check.key_frames, check.problems) for check in checks] == [
        ("mini_train", 4, []),
        ("mini_val", 2, []),
    ]


def test_tfds_reads_the_result(root, out):
    _build(root, out)
    program = (
        "import json, sys, tensorflow_datasets as tfds\n"
        "builder = tfds.builder_from_directory(sys.argv[1])\n"
        "for example in builder.as_dataset(split='mini_train').as_numpy_iterator():\n"
        "    print(json.dumps([example['sample_token'].decode(), example['images'].shape,\n"
        "                      example['lidar_to_camera'].tolist(), example['points'].tolist()]))\n"
    )
    done = _run([sys.executable, "-c", program, out])
    assert done.returncode == 0, done.stderr
    examples = [json.loads(line) for line in done.stdout.splitlines()]
    source = RecordSource(out, "mini_train")
    assert [token for token, *_ in examples] == source.sample_tokens
    for number, (_, shape, lidar_to_camera, points) in enumerate(examples):
        assert shape == [6, 36, 64, 3]
        np.testing.assert_array_equal(lidar_to_camera, source[number].lidar_to_camera)
        np.testing.assert_array_equal(np.float32(points), source[number].points)


def test_the_builder_of_tfds_writes_the_same_shards(root, out, tmp_path):
    _build(root, out)
    scenes = read_tables(root.folder, root.version, "mini_train").scenes
    shards = [SceneShard(str(root.folder), scene, read_key_frame) for scene in scenes]
    NuscenesKeyframes(tmp_path / "tfds", {"mini_train": shards}).download_and_prepare(
        download_dir=tmp_path / "downloads"
    )
    assert [path.read_bytes() for path in _shards(out)] == [path.read_bytes() for path in _shards(tmp_path / "tfds")]


def test_building_needs_no_tensorflow(root, out):
    program = (
        "import sys\n"
        "from data_prep.split_build import build_split\n"
        "build_split(*sys.argv[1:], skip_errors=False, workers=1)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = _run([sys.executable, "-c", program, root.folder, root.version, "mini_train", out])
    assert done.returncode == 0, done.stderr


def test_a_second_build_touches_nothing(root, out, monkeypatch):
    index = _build(root, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(nuscenes_tables, "read_tables", lambda *_: pytest.fail("the tables were read again"))
    assert _build(root, out) == index
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("lost", ["shard", "index of a shard", "index of the split", "cut shard and split index"])
def test_only_what_is_missing_is_built_again(root, out, lost):
    index = _build(root, out)
    content, times = _content(out), _times(out)
    shard = out / index.shards[1].file
    if lost == "shard":
        shard.unlink()
    if lost == "index of a shard":
        (out / "index" / f"{shard.name}.json").unlink()
    if lost != "shard":
        (out / "index_mini_train.json").unlink()
    if lost.startswith("cut"):
        shard.write_bytes(shard.read_bytes()[:-1])
    _build(root, out)
    assert _content(out) == content
    assert _times(out)[index.shards[0].file] == times[index.shards[0].file]


def _children(process):
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes through /proc")
def test_a_killed_build_resumes(tmp_path, out):
    root = write_tiny_root(tmp_path / "source", scenes=scene_names("mini_train")[:5])
    _build(root, tmp_path / "unbroken")

    # The build hangs at an image that nobody writes: that is where it is killed.
    blocked = root.file("CAM_BACK", 6)
    content = blocked.read_bytes()
    blocked.unlink()
    os.mkfifo(blocked)
    process = subprocess.Popen(_flags(root, out, "--workers=2"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((out / "index").glob("*"))) < 4 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    children = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children), "workers outlive the killed build"
    blocked.unlink()
    blocked.write_bytes(content)

    times = _times(out)
    assert len(times) == 4
    with pytest.raises(RecordError, match="no finished split"):
        RecordSource(out, "mini_train")
    done = _run(_flags(root, out, "--workers=2"))
    assert done.returncode == EXIT_DONE, done.stderr
    assert "4 of 5 shards were finished before" in done.stderr
    assert times.items() <= _times(out).items()
    assert _content(out) == _content(tmp_path / "unbroken")


def _cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


def _spoil_point(path, value):
    points = np.fromfile(path, np.float32)
    points[7] = value
    path.write_bytes(points.tobytes())


_DAMAGE = {
    "missing image": (lambda root: root.file("CAM_BACK", 1).unlink(), "sample_data", "CAM_BACK", "does not exist"),
    "image cut in half": (lambda root: _cut(root.file("CAM_BACK", 1), 700), "sample_data", "CAM_BACK", "cut off"),
    "image without its end": (lambda root: _cut(root.file("CAM_BACK", 1), -2), "sample_data", "CAM_BACK", "cut off"),
    "empty image": (lambda root: _cut(root.file("CAM_BACK", 1), 0), "sample_data", "CAM_BACK", "is no JPEG"),
    "image of another size": (
        lambda root: root.change("sample_data", root.key_frame_row("CAM_BACK", 1)["token"], height=40),
        "sample_data", "CAM_BACK", "height and width (36, 64), the table says (40, 64)",
    ),
    "missing sweep": (lambda root: root.file(LIDAR, 1).unlink(), "sample_data", LIDAR, "does not exist"),
    "cut sweep": (lambda root: _cut(root.file(LIDAR, 1), -4), "sample_data", LIDAR, "multiple of 20"),
    "empty sweep": (lambda root: _cut(root.file(LIDAR, 1), 0), "sample_data", LIDAR, "has 0 bytes"),
    "nan": (lambda root: _spoil_point(root.file(LIDAR, 1), np.nan), "sample_data", LIDAR, "the first is 1"),
    "infinity": (lambda root: _spoil_point(root.file(LIDAR, 1), -np.inf), "sample_data", LIDAR, "1 points that"),
    "cut labels": (lambda root: _cut(root.label_file(1), -1), "lidarseg", LIDAR, "labels for"),
    "missing labels": (lambda root: root.label_file(1).unlink(), "lidarseg", LIDAR, "does not exist"),
    "unknown label": (
        lambda root: root.label_file(1).write_bytes(b"\x20" * len(root.label_file(1).read_bytes())),
        "lidarseg", LIDAR, "has label 32",
    ),
    "dangling token": (
        lambda root: root.change("sample_data", root.key_frame_row(LIDAR, 1)["token"], ego_pose_token="nothing"),
        "sample_data", LIDAR, "ego_pose_token nothing",
    ),
    "path outside": (
        lambda root: root.change("sample_data", root.key_frame_row(LIDAR, 1)["token"], filename="../../secret"),
        "sample_data", LIDAR, "lies outside",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _DAMAGE)
def test_damage_stops_or_is_skipped_and_listed(root, out, name):
    damage, table, channel, message = _DAMAGE[name]
    files = {LIDAR: root.file(LIDAR, 1), "CAM_BACK": root.file("CAM_BACK", 1), "labels": root.label_file(1)}
    token = root.key_frame_row(channel, 1)["token"]
    damage(root)
    with pytest.raises(SourceError) as stopped:
        _build(root, out)
    text = str(stopped.value)
    for part in (f"table {table}", token, message):
        assert part in text
    if name not in ("dangling token", "path outside"):
        assert str(files["labels" if table == "lidarseg" else channel]) in text
    with pytest.raises(RecordError):
        RecordSource(out, "mini_train")

    index = _build(root, out, skip_errors=True)
    assert RecordSource(out, "mini_train").sample_tokens == [root.samples[0], *root.samples[2:4]]
    skipped = [{"sample_token": root.samples[1], "error": text}]
    assert [entry for shard in index.shards for entry in shard.skipped] == skipped
    assert json.loads((out / "build_report.json").read_text())["mini_train"]["skipped"] == skipped
    (check,) = check_records(out, "mini_train", 1)
    assert (check.key_frames, check.skipped, check.problems) == (3, 1, [])


def test_a_repaired_key_frame_comes_in_without_skip(root, out, tmp_path):
    _build(root, tmp_path / "unbroken")
    path = root.file("CAM_BACK", 1)
    content = path.read_bytes()
    path.unlink()
    _build(root, out, skip_errors=True)
    times = _times(out)
    assert len(_build(root, out, skip_errors=True).shards[0].skipped) == 1
    with pytest.raises(SourceError, match="does not exist"):
        _build(root, out)
    path.write_bytes(content)
    _build(root, out)
    assert _content(out) == _content(tmp_path / "unbroken")
    assert _times(out).items() - times.items() == {(path.name, path.stat().st_mtime_ns) for path in _shards(out)[:1]}


def test_a_scene_of_damage_alone_leaves_an_empty_shard(root, out):
    for sample in (0, 1):
        root.file(LIDAR, sample).unlink()
    _build(root, out, skip_errors=True)
    assert RecordSource(out, "mini_train").sample_tokens == root.samples[2:4]
    assert not check_records(out, None, 1)[0].problems
    assert tfds.builder_from_directory(out).info.splits["mini_train"].num_examples == 2


def test_another_build_in_the_folder_is_refused(root, out, tmp_path):
    _build(root, out)
    before = _content(out)
    other = write_tiny_root(tmp_path / "other", scenes=_SCENES, key_frames=1)
    with pytest.raises(BuildError, match=rf"{re.escape(str(out))} holds another build \(source_fingerprint .*--out"):
        _build(other, out)
    full = write_tiny_root(tmp_path / "full", scenes=_SCENES[:1], version="v1.0-trainval")
    with pytest.raises(BuildError, match=r"version v1\.0-mini, here v1\.0-trainval"):
        _build(full, out, "train")
    assert _content(out) == before
    path = out / "build.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": "0.1"}))
    with pytest.raises(BuildError, match=r"schema 0\.1"):
        _build(root, out)
    path.write_text("{")
    with pytest.raises(BuildError, match=r"build\.json is damaged"):
        _build(root, out)


def test_a_folder_of_something_else_is_refused(root, out):
    out.mkdir()
    (out / "thesis.tex").write_text("chapter one")
    with pytest.raises(BuildError, match="not empty and holds no records"):
        _build(root, out)
    assert _content(out) == {"thesis.tex": b"chapter one"}


def test_a_split_of_another_version_is_refused(root, out):
    with pytest.raises(SplitError, match=r"v1\.0-mini has no split 'val'"):
        _build(root, out, "val")
    assert not out.exists()


def _flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_check_finds_damage(root, out):
    index = _build(root, out)
    first, second = (out / shard.file for shard in index.shards)
    _flip(first, index.shards[0].offsets[1] + 100)
    (problem_of_file, problem_of_record) = check_records(out, None, 2)[0].problems
    assert problem_of_file == f"{first}: the checksum of the file does not fit"
    assert problem_of_record.startswith(f"{first}, record 1 (sample {root.samples[1]}): the checksum of the record")
    _cut(second, -1)
    assert f"{second}: {index.shards[1].bytes - 1} bytes" in "\n".join(check_records(out, None, 1)[0].problems)
    second.unlink()
    (out / f"{first.name}-old").write_bytes(b"")
    problems = "\n".join(check_records(out, None, 1)[0].problems)
    assert f"{second}: [Errno 2]" in problems
    assert f"{first.name}-old: not in the index" in problems
    info = out / "dataset_info.json"
    info.write_text(info.read_text().replace('"2"', '"3"', 1))
    assert "differ from the index" in "\n".join(check_records(out, None, 1)[0].problems)
    assert check_table(check_records(out, None, 1)).splitlines()[1].split()[:3] == ["mini_train", "2", "4"]
    with pytest.raises(RecordError, match="no finished split 'mini_val'"):
        check_records(out, "mini_val", 1)
    with pytest.raises(RecordError, match="has no finished split"):
        check_records(root.folder, None, 1)


def test_what_check_finds_is_mended_by_building_again(root, out):
    index = _build(root, out)
    content = _content(out)
    _flip(out / index.shards[0].file, 200)
    (out / index.shards[0].file).unlink()
    _build(root, out)
    assert _content(out) == content


def test_the_command(root, out):
    done = _run(_flags(root, out, "--workers=1"))
    assert done.returncode == EXIT_DONE, done.stderr
    assert "mini_train: 4 key frames in 2 shards" in done.stderr
    again = _run(_flags(root, out))
    assert again.returncode == EXIT_DONE
    assert "Nothing to do" in again.stderr
    check = _run([sys.executable, "-m", "data_prep.build", "--check", f"--out={out}", "--workers=1"])
    assert check.returncode == EXIT_DONE
    assert re.search(r"^mini_train +2 +4 ", check.stdout, re.MULTILINE)
    _flip(_shards(out)[0], 200)
    check = _run([sys.executable, "-m", "data_prep.build", "--check", f"--out={out}", "--workers=1"])
    assert check.returncode == EXIT_ERROR
    assert _shards(out)[0].name in check.stderr


def test_the_command_tells_errors_without_a_traceback(root, out):
    root.file(LIDAR, 3).unlink()
    done = _run(_flags(root, out, "--workers=2"))
    assert done.returncode == EXIT_ERROR
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    done = _run(_flags(root, out, "--workers=2", "--on_error=skip"))
    assert done.returncode == EXIT_SKIPPED
    assert f"Skipped sample {root.samples[3]}" in done.stderr
    assert "build_report.json" in done.stderr
    usage = _run([sys.executable, "-m", "data_prep.build", f"--out={out}"])
    assert usage.returncode == EXIT_ERROR
    assert "building needs --source, --version, --split" in usage.stdout + usage.stderr
