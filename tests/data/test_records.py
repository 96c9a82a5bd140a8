"""Records: encoding, framing, index, and random access."""

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from pop3d_jax.data import shards
from pop3d_jax.data.records import (
    KeyFrame,
    RecordError,
    RecordSource,
    canonical_record,
    decode_record,
    encode_record,
    record_features,
)


def _key_frame(number, *, points=5, labels=None):
    rng = np.random.default_rng(number)
    return KeyFrame(
        images=[b"\xff\xd8" + rng.bytes(20 + camera) for camera in range(6)],
        intrinsics=rng.normal(size=(6, 3, 3)),
        lidar_to_camera=rng.normal(size=(6, 4, 4)),
        points=rng.normal(size=(points, 5)).astype(np.float32),
        lidarseg=rng.integers(0, 32, points if labels is None else labels, np.uint8),
        lidar_to_ego=rng.normal(size=(4, 4)),
        ego_to_global=rng.normal(size=(4, 4)),
        sample_token=f"sample-{number}",
        scene_token="scene",
        scene_name="scene-0061",
        lidar_token=f"lidar-{number}",
        lidar_file=f"samples/LIDAR_TOP/{number}.pcd.bin",
        camera_tokens=[f"camera-{number}-{camera}" for camera in range(6)],
        camera_files=[f"samples/CAM/{number}-{camera}.jpg" for camera in range(6)],
        camera_timestamps=rng.integers(0, 2**60, 6),
        timestamp=int(rng.integers(0, 2**60)),
    )


def _assert_equal(one, other):
    for field in dataclasses.fields(KeyFrame):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert type(left) is type(right), field.name
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            np.testing.assert_array_equal(left, right, err_msg=field.name)
        else:
            assert left == right, field.name


def _write(folder, counts, split="train"):
    """Shards of these numbers of records, and their index."""
    numbers = iter(range(sum(counts)))
    written = []
    for shard, count in enumerate(counts):
        name = f"{shards.shard_prefix(shards.FIRST_DATASET)}-{split}.tfrecord-{shard:05d}-of-{len(counts):05d}"
        frames = [_key_frame(next(numbers), points=3 + shard) for _ in range(count)]
        written.append(
            shards.write_shard(folder / name, [(frame.sample_token, encode_record(frame)) for frame in frames])
        )
    index = shards.SplitIndex(shards.SCHEMA_VERSION, "v1.0-trainval", "source", split, written)
    shards.write_json(shards.index_path(folder, split), dataclasses.asdict(index))
    return index


@pytest.mark.parametrize(("points", "labels"), [(7, 7), (1, 1), (7, 0)])
def test_a_record_survives_bit_for_bit(points, labels):
    key_frame = _key_frame(3, points=points, labels=labels)
    _assert_equal(decode_record(encode_record(key_frame)), key_frame)


def _with_cameras(key_frame, count):
    per_camera = ("images", "intrinsics", "lidar_to_camera", "camera_tokens", "camera_files", "camera_timestamps")
    return dataclasses.replace(key_frame, **{name: getattr(key_frame, name)[:count] for name in per_camera})


@pytest.mark.parametrize("cameras", [0, 1, 2, 6])
def test_a_record_has_any_number_of_cameras(cameras):
    key_frame = _with_cameras(_key_frame(4), cameras)
    _assert_equal(decode_record(encode_record(key_frame)), key_frame)


def test_six_cameras_are_written_as_when_there_were_no_others():
    """The features as they were while six was fixed in them: the same bytes, read either way."""
    features = tfds.features
    six = {
        "images": features.Sequence(features.Image(shape=(None, None, 3), encoding_format="jpeg"), length=6),
        "intrinsics": features.Tensor(shape=(6, 3, 3), dtype=np.float64, encoding="bytes"),
        "lidar_to_camera": features.Tensor(shape=(6, 4, 4), dtype=np.float64, encoding="bytes"),
        "camera_tokens": features.Sequence(features.Text(), length=6),
        "camera_files": features.Sequence(features.Text(), length=6),
        "camera_timestamps": features.Tensor(shape=(6,), dtype=np.int64),
    }
    before = features.FeaturesDict({**dict(record_features().items()), **six})
    key_frame = _key_frame(5)
    example = {field.name: getattr(key_frame, field.name) for field in dataclasses.fields(key_frame)}
    old = canonical_record(before.serialize_example(example))
    assert old == encode_record(key_frame)
    # Of a record of the time: a change of any byte is a change of the schema.
    assert hashlib.sha256(old).hexdigest() == "4b626e570f7d648909cc240153a3922b44522363c168fc76104114b4c359045b"
    _assert_equal(decode_record(old), key_frame)


def test_records_do_not_depend_on_the_hash_seed():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_records import _key_frame, encode_record\n"
        "import hashlib; print(hashlib.sha256(encode_record(_key_frame(1))).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, "tests/data"],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {hashlib.sha256(encode_record(_key_frame(1))).hexdigest()}
    assert canonical_record(encode_record(_key_frame(1))) == encode_record(_key_frame(1))


def test_what_is_no_record_is_refused():
    with pytest.raises(RecordError, match="not a record of schema"):
        decode_record(b"\xff\xff\xff")
    with pytest.raises(RecordError, match="not a record of schema"):
        decode_record(b"")


@settings(deadline=None, max_examples=50)
@given(data=st.binary(max_size=200), bit=st.integers(0, 2**31))
def test_framing_detects_any_flipped_bit(data, bit):
    framed = shards.frame_record(data)
    assert shards.unframe_record(framed) == data
    damaged = bytearray(framed)
    damaged[bit // 8 % len(framed)] ^= 1 << bit % 8
    with pytest.raises(RecordError):
        shards.unframe_record(bytes(damaged))
    with pytest.raises(RecordError):
        shards.unframe_record(framed[:-1])


def test_framing_is_the_published_format():
    # Known answer: the checksum of CRC-32C's check string, masked as the TFRecord format says.
    crc = 0xE3069283
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    framed = shards.frame_record(b"123456789")
    assert framed[:8] == (9).to_bytes(8, "little")
    assert framed[12:] == b"123456789" + masked.to_bytes(4, "little")


def test_random_access(tmp_path):
    index = _write(tmp_path, [2, 0, 3])
    source = RecordSource(tmp_path, "train")
    assert len(source) == 5
    assert source.sample_tokens == [f"sample-{number}" for number in range(5)]
    for number in (4, 0, 2, -1):
        _assert_equal(source[number], _key_frame(number % 5, points=3 if number % 5 < 2 else 5))
    _assert_equal(source[np.int64(3)], source[3])
    assert decode_record(source.serialized(1)).sample_token == "sample-1"
    with pytest.raises(IndexError):
        source[5]
    assert source.shard_numbers.tolist() == [0, 0, 2, 2, 2]
    assert source.fingerprint == index.fingerprint


def test_a_source_pickles_and_has_a_portable_name(tmp_path):
    _write(tmp_path, [2])
    source = RecordSource(str(tmp_path), "train")
    _assert_equal(pickle.loads(pickle.dumps(source))[1], source[1])
    assert str(tmp_path) not in repr(source)


def test_the_fingerprint_is_of_the_content(tmp_path):
    for name, counts in {"one": [2, 1], "two": [2, 1], "three": [2, 2]}.items():
        (tmp_path / name).mkdir()
        _write(tmp_path / name, counts)
    one, two, three = (RecordSource(tmp_path / name, "train").fingerprint for name in ("one", "two", "three"))
    assert one == two != three


def test_damage_is_named(tmp_path):
    index = _write(tmp_path, [2, 2])
    path = tmp_path / index.shards[1].file
    content = bytearray(path.read_bytes())
    content[index.shards[1].offsets[1] + 50] ^= 1
    path.write_bytes(content)
    source = RecordSource(tmp_path, "train")
    assert source[2].sample_token == "sample-2"
    with pytest.raises(RecordError, match=rf"{index.shards[1].file}, record 3 .*sample-3.*checksum") as error:
        source[3]
    assert "--check" in str(error.value)
    path.write_bytes(content[: index.shards[1].offsets[1] + 20])
    with pytest.raises(RecordError, match=r"record 3 .*should hold"):
        source[3]
    path.unlink()
    with pytest.raises(RecordError, match=rf"{index.shards[1].file}, record 2 .*No such file"):
        source[2]


def test_the_index_names_the_data_set(tmp_path):
    index = _write(tmp_path, [1])
    assert RecordSource(tmp_path, "train").dataset == "nuscenes"
    path = shards.index_path(tmp_path, "train")
    content = json.loads(path.read_text())
    shards.write_json(path, content | {"dataset": "pandar64"})
    assert RecordSource(tmp_path, "train").dataset == "pandar64"
    # Indexes of the time when there was one data set.
    del content["dataset"]
    shards.write_json(path, content)
    source = RecordSource(tmp_path, "train")
    assert source.dataset == "nuscenes"
    assert source.fingerprint == index.fingerprint


def test_unfinished_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(RecordError, match="no records folder"):
        RecordSource(tmp_path / "nowhere", "train")
    _write(tmp_path, [1], split="val")
    with pytest.raises(RecordError, match=r"no finished split 'train' \(it has: val\)"):
        RecordSource(tmp_path, "train")
    path = shards.index_path(tmp_path, "val")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schema": "0.1"}))
    with pytest.raises(RecordError, match=r"index_val\.json has schema 0\.1"):
        RecordSource(tmp_path, "val")
    path.write_text(json.dumps(content)[:-10])
    with pytest.raises(RecordError, match=r"index_val\.json is damaged"):
        RecordSource(tmp_path, "val")


def test_an_interrupted_shard_leaves_nothing_finished(tmp_path):
    def records():
        yield "one", b"one"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        shards.write_shard(tmp_path / "shard", records())
    assert not (tmp_path / "shard").exists()
    assert not shards.shard_index_path(tmp_path / "shard").exists()


def test_reading_needs_no_tensorflow(tmp_path):
    _write(tmp_path, [1])
    program = (
        "import sys\n"
        "from pop3d_jax.data.records import RecordSource\n"
        "assert len(RecordSource(sys.argv[1], 'train')[0].images) == 6\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True)
