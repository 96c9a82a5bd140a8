import dataclasses
import io
import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_root import IMAGE_HW, write_tiny_root

from data_prep.split_build import build_split
from pop3d_jax.data import pipeline
from pop3d_jax.data.records import RecordSource
from pop3d_jax.geometry import lidar_to_image, project
from pop3d_jax.nuscenes import LIDARSEG_TO_CLASS

SETTINGS = pipeline.ExampleSettings(
    image_hw=IMAGE_HW, teacher_image_hw=(18, 32), max_points=400, max_feature_points=900
)
# Everything that a training draws on the host.
DRAWN = dataclasses.replace(SETTINGS, sample_feature_points=50, volume_flip=True, volume_rotation=10.0)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Eight key frames of noise."""
    folder = tmp_path_factory.mktemp("records")
    root = write_tiny_root(folder / "root", scenes=("scene-0061", "scene-0553"), key_frames=4)
    build_split(root.folder, root.version, "mini_train", folder / "records", skip_errors=False, workers=1)
    return folder / "records"


@pytest.fixture(scope="module")
def source(records):
    source = RecordSource(records, "mini_train")
    assert len(source) == 8
    return source


def first(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_the_shapes_are_those_of_the_settings(source):
    (batch,) = first(pipeline.training_batches(source, SETTINGS, batch_size=2, seed=0), 1)
    assert batch["images"].shape == (2, 6, *IMAGE_HW, 3)
    assert batch["images"].dtype == np.uint8
    assert batch["teacher_images"].shape == (2, 6, 18, 32, 3)
    assert batch["teacher_images"].dtype == np.uint8
    assert batch["lidar_to_image"].shape == (2, 6, 4, 4)
    assert batch["points"].shape == (2, 400, 3)
    assert batch["feature_points"].shape == (2, 900, 3)


def test_every_epoch_is_a_shuffle_of_all_records(source):
    batches = first(pipeline.training_batches(source, SETTINGS, batch_size=2, seed=3), 12)
    order = np.concatenate([batch["record_index"] for batch in batches]).reshape(3, 8)
    assert all(sorted(epoch) == list(range(8)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 3
    other = first(pipeline.training_batches(source, SETTINGS, batch_size=2, seed=4), 12)
    assert not np.array_equal(order.ravel(), np.concatenate([batch["record_index"] for batch in other]))


def test_resuming_at_a_step_gives_its_batch_bit_for_bit(source):
    unbroken = first(pipeline.training_batches(source, DRAWN, batch_size=2, seed=5), 7)
    for start in (1, 4, 6):
        (resumed,) = first(pipeline.training_batches(source, DRAWN, batch_size=2, seed=5, start_step=start), 1)
        assert_equal(resumed, unbroken[start])


def test_hosts_together_hold_what_one_host_would(source):
    for hosts in (2, 4):
        one = first(pipeline.training_batches(source, DRAWN, batch_size=4, seed=6), 5)
        parts = [
            first(pipeline.training_batches(source, DRAWN, batch_size=4, seed=6, host=host, hosts=hosts), 5)
            for host in range(hosts)
        ]
        for step, whole in enumerate(one):
            for host in range(hosts):
                assert_equal(parts[host][step], {name: array[host::hosts] for name, array in whole.items()})


_RESTARTED = """
import hashlib, itertools, sys
import numpy as np
from pop3d_jax.data.pipeline import ExampleSettings, training_batches
from pop3d_jax.data.records import RecordSource

if __name__ == "__main__":
    records, workers = sys.argv[1], int(sys.argv[2])
    settings = ExampleSettings((36, 64), (18, 32), 400, 900, 50, volume_flip=True, volume_rotation=10.0)
    batches = training_batches(
        RecordSource(records, "mini_train"), settings, batch_size=2, seed=7, start_step=3, workers=workers
    )
    for batch in itertools.islice(batches, 3):
        digest = hashlib.sha256()
        for name in sorted(batch):
            digest.update(name.encode() + np.ascontiguousarray(batch[name]).tobytes())
        print(digest.hexdigest(), flush=True)
    assert "tensorflow" not in sys.modules
"""


def test_a_restart_with_any_number_of_workers_gives_the_same_batches(records, source, tmp_path):
    script = tmp_path / "restarted.py"
    script.write_text(_RESTARTED)
    digests = []
    for workers in (0, 1, 2):
        finished = subprocess.run(
            [sys.executable, script, records, str(workers)],
            capture_output=True,
            text=True,
            check=False,
            env={"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"},
        )
        assert finished.returncode == 0, finished.stderr
        digests.append(finished.stdout.split())
    assert len(digests[0]) == 3
    assert len(set(digests[0])) == 3
    assert digests[0] == digests[1] == digests[2]


def test_evaluation_reads_every_record_once_and_marks_the_filling(source):
    settings = dataclasses.replace(SETTINGS, teacher_image_hw=None)
    batches = list(pipeline.evaluation_batches(source, settings, batch_size=3))
    assert "teacher_images" not in batches[0]
    index = np.concatenate([batch["record_index"] for batch in batches])
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert len(index) == 9
    assert index[valid].tolist() == list(range(8))


def test_a_batch_that_does_not_divide_among_hosts_is_refused(source):
    with pytest.raises(ValueError, match="does not divide among 2 hosts"):
        pipeline.training_batches(source, SETTINGS, batch_size=3, seed=0, hosts=2)
    with pytest.raises(ValueError, match="host 2 of 2"):
        pipeline.training_batches(source, SETTINGS, batch_size=4, seed=0, host=2, hosts=2)


def test_images_are_decoded_once_for_student_and_teacher(source, monkeypatch):
    key_frame = source[0]
    decoded = []
    decode = pipeline.decode_image
    monkeypatch.setattr(pipeline, "decode_image", lambda *arguments: decoded.append(arguments) or decode(*arguments))
    example = pipeline.make_example(key_frame, SETTINGS, None)
    assert len(decoded) == 6
    rgb = np.asarray(Image.open(io.BytesIO(key_frame.images[2])))
    np.testing.assert_array_equal(example["images"][2], rgb)
    # Where both see the same size, there is one array for both.
    same = pipeline.make_example(key_frame, dataclasses.replace(SETTINGS, teacher_image_hw=IMAGE_HW), None)
    assert "teacher_images" not in same
    np.testing.assert_array_equal(same["images"], example["images"])


def test_resized_images_come_with_matching_matrices(source):
    key_frame = source[0]
    half = dataclasses.replace(SETTINGS, image_hw=(18, 32))
    example = pipeline.make_example(key_frame, half, None)
    point = np.array([[1.0, 2.0, 3.0]])
    for camera in range(6):
        full = lidar_to_image(key_frame.intrinsics[camera], key_frame.lidar_to_camera[camera])
        expected, depth = project(point, full)
        uv, depth_again = project(point, example["lidar_to_image"][camera].astype(np.float64))
        np.testing.assert_allclose(uv, expected / 2, rtol=1e-4)
        np.testing.assert_allclose(depth_again, depth, rtol=1e-4)


def test_points_keep_their_order_and_labels(source):
    key_frame = source[0]
    example = pipeline.make_example(key_frame, SETTINGS, np.random.default_rng(0))
    count = len(key_frame.points)
    assert example["point_mask"].sum() == count
    np.testing.assert_array_equal(example["points"][:count], key_frame.points[:, :3])
    np.testing.assert_array_equal(example["point_labels"][:count], LIDARSEG_TO_CLASS[key_frame.lidarseg])
    assert not example["points"][count:].any()


def test_points_beyond_the_capacity_are_counted(source):
    key_frame = source[0]
    small = dataclasses.replace(SETTINGS, max_points=10, max_feature_points=3)
    example = pipeline.make_example(key_frame, small, np.random.default_rng(0))
    full = pipeline.make_example(key_frame, SETTINGS, np.random.default_rng(0))
    assert example["points_left_out"] == len(key_frame.points) - 10
    assert example["feature_points_left_out"] == max(int(full["feature_mask"].sum()) - 3, 0)
    assert full["points_left_out"] == 0


def test_a_damaged_image_names_its_sample_and_camera(source):
    key_frame = source[0]
    images = list(key_frame.images)
    images[1] = images[1][: len(images[1]) // 2]
    damaged = dataclasses.replace(key_frame, images=images)
    with pytest.raises(ValueError, match=f"sample {key_frame.sample_token}, CAM_FRONT_RIGHT"):
        pipeline.make_example(damaged, SETTINGS, np.random.default_rng(0))


def test_a_turned_volume_looks_the_same_to_the_cameras(source):
    still = SETTINGS
    turned = dataclasses.replace(still, volume_flip=True, volume_rotation=20.0)
    # Evaluation never turns, whatever the settings say.
    assert_equal(pipeline.make_example(source[0], turned, None), pipeline.make_example(source[0], still, None))
    seen = set()
    for seed in range(16):
        rng = np.random.default_rng(seed)
        plain, other = pipeline.make_example(source[0], still, rng), pipeline.make_example(source[0], turned, rng)
        for name in set(plain) - {"points", "feature_points", "lidar_to_image"}:
            np.testing.assert_array_equal(plain[name], other[name], err_msg=name)
        for camera in range(6):
            chosen = plain["feature_mask"] & (plain["feature_cameras"] == camera)
            for example in (plain, other):
                uv, depth = project(
                    example["feature_points"][chosen].astype(np.float64),
                    example["lidar_to_image"][camera].astype(np.float64),
                )
                example["projected"] = np.column_stack([uv, depth])
            np.testing.assert_allclose(other["projected"], plain["projected"], rtol=1e-4, atol=2e-3)
        # Heights and distances from the lidar stay; the angle is below the bound after the mirroring.
        points, moved = (example["points"][example["point_mask"]] for example in (plain, other))
        np.testing.assert_array_equal(moved[:, 2], points[:, 2])
        np.testing.assert_allclose(np.hypot(*moved[:, :2].T), np.hypot(*points[:, :2].T), rtol=1e-5)
        turn = np.linalg.lstsq(points[:, :2], moved[:, :2], rcond=None)[0].T
        signs = tuple(np.sign(np.diag(turn)).astype(int))
        seen.add(signs)
        assert abs(turn[0, 1]) <= np.sin(np.radians(20.0)) + 1e-4
    assert len(seen) == 4


def test_pngs_are_decoded():
    pixels = np.random.default_rng(0).integers(0, 256, (*IMAGE_HW, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    found, full_hw = pipeline.decode_image(file.getvalue(), (1, 1), "a test")
    np.testing.assert_array_equal(found, pixels)  # a PNG has no reduced scales
    assert full_hw == IMAGE_HW
    with pytest.raises(ValueError, match="the image of a test cannot be decoded"):
        pipeline.decode_image(file.getvalue()[:60], (1, 1), "a test")


def test_records_of_other_data_sets_are_refused(source, monkeypatch):
    key_frame = source[0]
    one = dataclasses.replace(key_frame, images=key_frame.images[:1])
    with pytest.raises(ValueError, match=rf"{key_frame.sample_token} .* has 1 images, POP-3D needs nuScenes' 6"):
        pipeline.make_example(one, SETTINGS, None)
    # Six cameras are not enough: PandaSet has them too, and other labels.
    monkeypatch.setattr(source, "_dataset", "pandar64")
    with pytest.raises(ValueError, match="are of data set pandar64, POP-3D reads six cameras"):
        pipeline.training_batches(source, SETTINGS, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="are of data set pandar64, POP-3D reads six cameras"):
        pipeline.evaluation_batches(source, SETTINGS, batch_size=1)
