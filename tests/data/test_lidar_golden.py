"""Real scans through the pipeline's functions: the official numbers of ScaLR's data sets.

Inputs and numbers derive from nuScenes and KITTI: they are not in the repository, and the tests are skipped where
POP3D_GOLDEN_DIR names no folder that has them.
"""

import dataclasses
import hashlib
import io
import json

import numpy as np
import pytest
from lidar_frames import noise_frame
from PIL import Image

from pop3d_jax.data import point_clouds
from pop3d_jax.data.lidar_examples import LidarSettings, make_distillation_example, make_segmentation_example
from pop3d_jax.geometry import lidar_to_camera, lidar_to_image, rigid_transform
from pop3d_jax.lidar_datasets import NUSCENES

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden(golden_file):
    with np.load(golden_file("scalr/preprocess.npz")) as arrays:
        return dict(arrays), json.loads(golden_file("scalr/preprocess_info.json").read_text())


@pytest.fixture(scope="module")
def inputs(golden, golden_file):
    """Content of each input file, by the name in the golden set; found by its checksum."""
    _, info = golden
    names = {digest: name for name, digest in info["inputs_sha256"].items()}
    found = {}
    for folder in ("nuscenes/nuscenes_keyframe", "nuscenes/kitti_frame"):
        for path in golden_file(folder).rglob("*"):
            if path.suffix in (".bin", ".jpg", ".png"):
                content = path.read_bytes()
                found[names.get(hashlib.sha256(content).hexdigest())] = content
    missing = [name for name in names.values() if name not in found and not name.endswith(".pkl")]
    if missing:
        pytest.skip(f"the golden set has no input file with the checksum of {', '.join(missing)}")
    return found


def settings_of(info, frame):
    """The settings of the golden set, with room for every point of the sweep."""
    given = info["settings"]
    field_of_view = tuple(tuple(float(bound) for bound in corner) for corner in given["fov_xyz"])
    return LidarSettings(
        capacity=len(frame.points) + 1,
        raw_capacity=len(frame.points) + 1,
        voxel_size=given["voxel_size"],
        field_of_view=field_of_view,
        projection_axes=tuple(given["dim_proj"]),
        grid_shapes=tuple(map(tuple, given["grids_shape"])),
        neighbors=given["num_neighbors"],
        image_hw=tuple(given["image_size_hw"]),
        labelled=False,
    )


def nuscenes(info, inputs):
    """The data set as the golden set describes it, and its key frame."""
    given, calibration = info["settings"], info["calibration"]["nuscenes"]
    mean, std = info["intensity_normalisation"]["nuscenes"]
    dataset = dataclasses.replace(
        NUSCENES,
        cameras=tuple(given["cameras"]),
        intensity_mean=mean,
        intensity_std=std,
        min_depth=given["min_camera_depth_nuscenes"],
    )

    def transform(record):
        return rigid_transform(np.array(record["rotation"]), np.array(record["translation"]))

    lidar = calibration["point"]
    at_lidar = transform(lidar["cs_record"]), transform(lidar["poserecord"])
    to_camera = [
        lidar_to_camera(
            *at_lidar, transform(calibration[camera]["cs_record"]), transform(calibration[camera]["poserecord"])
        )
        for camera in dataset.cameras
    ]
    return dataset, dataclasses.replace(
        noise_frame(0),
        images=[inputs[calibration[camera]["filename"]] for camera in dataset.cameras],
        intrinsics=np.array([calibration[camera]["cs_record"]["camera_intrinsic"] for camera in dataset.cameras]),
        lidar_to_camera=np.stack(to_camera),
        points=np.frombuffer(inputs[lidar["filename"]], np.float32).reshape(-1, 5),
        lidarseg=np.zeros(0, np.uint8),
        camera_timestamps=np.zeros(len(dataset.cameras), np.int64),
    )


def kitti(info, inputs):
    calibration = info["calibration"]["kitti"]
    mean, std = info["intensity_normalisation"]["semantic_kitti"]
    dataset = dataclasses.replace(
        NUSCENES,
        name="semantic_kitti",
        cameras=("image_2",),
        intensity_mean=mean,
        intensity_std=std,
        min_depth=info["settings"]["min_lidar_x_kitti"],
        depth_of="lidar_x",
    )
    projection, rectified = np.array(calibration["P2"]), np.eye(4)
    rectified[:3] = calibration["Tr_3x4"]
    shifted = np.eye(4)
    shifted[:3, 3] = np.linalg.solve(projection[:, :3], projection[:, 3])
    names = [name for name in inputs if name and not name.startswith("n0")]
    (sweep,), (picture,) = ([name for name in names if name.endswith(suffix)] for suffix in (".bin", ".png"))
    points = np.frombuffer(inputs[sweep], np.float32).reshape(-1, 4)
    return dataset, dataclasses.replace(
        noise_frame(0),
        images=[inputs[picture]],
        intrinsics=projection[None, :, :3],
        lidar_to_camera=(shifted @ rectified)[None],
        points=np.concatenate([points, np.zeros_like(points[:, :1])], 1),
        lidarseg=np.zeros(0, np.uint8),
        camera_timestamps=np.zeros(1, np.int64),
    )


FRAMES = {"nuscenes": nuscenes, "kitti": kitti}


def assert_same_network_input(example, arrays, prefix):
    """Features to float32's rounding, cells and neighbours exactly."""
    kept = example["point_mask"]
    expected = arrays[f"{prefix}/feat"][0]
    np.testing.assert_allclose(example["point_features"][kept].T, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(example["cells"][:, kept], arrays[f"{prefix}/cell_ind"][0])
    np.testing.assert_array_equal(example["neighbors"][kept].T, arrays[f"{prefix}/neighbors_emb"][0])


@pytest.mark.parametrize("name", FRAMES)
def test_evaluation_sweeps_are_exact(golden, inputs, name):
    arrays, info = golden
    dataset, frame = FRAMES[name](info, inputs)
    example = make_segmentation_example(frame, dataset, settings_of(info, frame), None)
    assert example["points_left_out"] == example["raw_points_left_out"] == 0
    assert_same_network_input(example, arrays, f"{name}/val")
    np.testing.assert_array_equal(example["nearest_kept"][example["raw_mask"]], arrays[f"{name}/val/upsample"])
    counts = info[f"{name}_val_counts"]
    assert len(frame.points) == counts["raw"]
    assert len(point_clouds.thin(frame.points[:, :3], settings_of(info, frame).voxel_size)) == counts["after_voxel"]
    assert example["point_mask"].sum() == counts["after_crop"]


@pytest.mark.parametrize("name", FRAMES)
def test_distillation_pairs_are_the_official_ones(golden, inputs, name):
    arrays, info = golden
    dataset, frame = FRAMES[name](info, inputs)
    settings = settings_of(info, frame)
    for camera, camera_name in enumerate(dataset.cameras):
        prefix = f"{name}/pretrain/{camera_name}"
        example = make_distillation_example(frame, dataset, settings, None, camera=camera)
        # The same points see the camera, in the same order.
        assert_same_network_input(example, arrays, prefix)
        shown = example["feature_pixels"][example["point_mask"]] * settings.image_hw - 0.5
        changed = (np.rint(shown) != arrays[f"{prefix}/pairing_images"][:, 1:]).any(1).sum()
        # The official code of nuScenes rounds after each of four transforms; the golden set counts what that moves.
        moved = info["images"][prefix]
        assert changed <= moved.get("points_whose_224x448_pixel_changes_with_float64_transforms", 0)

        source = arrays[f"{prefix}/voxel_source_index"].astype(np.int64)
        matrix = lidar_to_image(frame.intrinsics[camera], frame.lidar_to_camera[camera])
        full_hw = tuple(moved["decoded_uint8_shape"][:2])
        seen, pixels = point_clouds.pixel_pairs(frame.points[source, :3], matrix, full_hw, dataset)
        np.testing.assert_array_equal(seen, np.arange(len(source)))
        changed = (pixels != arrays[f"{prefix}/pixels_full_resolution"]).any(1).sum()
        assert changed <= moved.get("points_whose_full_resolution_pixel_changes_with_float64_transforms", 0)


@pytest.mark.parametrize("name", FRAMES)
def test_resized_images_are_the_official_ones(golden, inputs, name):
    arrays, info = golden
    dataset, frame = FRAMES[name](info, inputs)
    settings = settings_of(info, frame)
    stride = info["settings"]["image_stride_of_stored_pictures"]
    for camera_name, content in zip(dataset.cameras, frame.images, strict=True):
        prefix = f"{name}/pretrain/{camera_name}"
        image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        if hashlib.sha256(image.tobytes()).hexdigest() != info["images"][prefix]["decoded_uint8_sha256"]:
            pytest.skip("the JPEG decoder of this machine gives other pixels than that of the golden set")
        for antialias, stored in ((True, "image_antialias"), (False, "image_no_antialias")):
            resized = point_clouds.resize_image(image, settings.image_hw, antialias=antialias) / 255
            expected = arrays[f"{prefix}/{stored}_stride{stride}"]
            # With antialiasing torchvision rounds its weights to float32, Pillow does not.
            tolerance = 2e-5 if antialias else 1e-6
            np.testing.assert_allclose(resized[::stride, ::stride].transpose(2, 0, 1), expected, atol=tolerance)


def test_the_points_nearest_to_a_centre(golden, inputs):
    arrays, info = golden
    _, frame = nuscenes(info, inputs)
    given = info["settings"]
    xyz = frame.points[point_clouds.thin(frame.points[:, :3], given["voxel_size"]), :3]
    kept = point_clouds.nearest(xyz, np.array(given["limit_center"]), given["limit_num_points"])
    np.testing.assert_array_equal(kept, arrays[given["limit_array"]])
