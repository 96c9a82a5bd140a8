"""The teacher as the training step uses it, against each of its steps done one by one."""

import itertools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pop3d_jax.models.clip import load_clip
from pop3d_jax.models.deeplab import DeepLabV2
from pop3d_jax.models.maskclip import MaskCLIP
from pop3d_jax.models.maskclip import normalise as normalise_for_clip
from pop3d_jax.models.maskclip_plus import fitted_hw, normalise, resize_pictures
from pop3d_jax.models.maskclip_plus_weights import load_network, official_shapes
from pop3d_jax.teacher import load_teacher

BATCH, VIEWS, POINTS = 2, 2, 30


@pytest.fixture
def teacher_config(tiny_clip_folder):
    return ml_collections.ConfigDict(
        {"name": "maskclip", "path": str(tiny_clip_folder), "variant": "official_config", "weights": ""}
    )


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory, tiny_clip_folder):
    """MaskCLIP+ weights of the smallest network whose features are as wide as the tiny CLIP's texts."""
    width = json.loads((tiny_clip_folder / "config.json").read_text())["projection_dim"]
    return save_network(tmp_path_factory.mktemp("weights") / "maskclip_plus.safetensors", width)


def save_network(path, width):
    network = nnx.eval_shape(lambda: DeepLabV2(stem_channels=4, base_channels=1, aspp_channels=width, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    state = {}
    for key, shape in official_shapes(network).items():
        if len(shape) == 4:  # He et al., so that the features keep their size through the layers
            state[key] = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        else:
            state[key] = rng.uniform(0.8, 1.2, shape) if key.endswith(("weight", "var")) else rng.normal(0, 0.1, shape)
    save_file({key: value.astype(np.float32) for key, value in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def scene():
    """Two key frames of two views, and pixels of them; the last points are padding, as in a batch."""
    rng = np.random.default_rng(1)
    height, width = 18, 32
    coarse = rng.integers(0, 256, (BATCH, VIEWS, 6, 8, 3))
    images = np.repeat(np.repeat(coarse, 3, 2), 4, 3).astype(np.uint8)
    pixels = np.stack([rng.integers(0, side, (BATCH, POINTS)) for side in (height, width)], -1)
    cameras = rng.integers(0, VIEWS, (BATCH, POINTS)).astype(np.int32)
    shares = ((pixels + 0.5) / [height, width]).astype(np.float32)
    shares[:, -3:], cameras[:, -3:], pixels[:, -3:] = 0, 0, 0
    return images, cameras, pixels, shares


def axis_matrix(sizes):
    """Successive bilinear resizes of one axis as a matrix, in float64: positions clamped at the first and last cell."""
    matrix = np.eye(sizes[0])
    for before, after in itertools.pairwise(sizes):
        positions = (np.arange(after) + 0.5) * before / after - 0.5
        matrix = np.stack([np.interp(positions, np.arange(before), column) for column in matrix.T], axis=1)
    return matrix


def point_features(teacher, scene):
    images, cameras, _, shares = scene
    read = jax.jit(teacher.point_features)
    return np.asarray(read(teacher.parameters, *map(jnp.asarray, (images, cameras, shares))))


def test_maskclip_plus_reads_official_features(teacher_config, weights_file, scene):
    teacher_config.name, teacher_config.weights = "maskclip_plus", str(weights_file)
    teacher = load_teacher(teacher_config)
    found = point_features(teacher, scene)
    assert teacher.feature_dim == found.shape[-1]

    images, cameras, pixels, _ = scene
    hw = images.shape[2:4]
    input_hw = fitted_hw(hw)
    network = load_network(weights_file)
    forward = nnx.jit(lambda network, image: network(normalise(resize_pictures(image[None], input_hw)))[0])
    for example in range(BATCH):
        for view in range(VIEWS):
            maps = np.asarray(forward(network, jnp.asarray(images[example, view])), np.float64)
            vertical, horizontal = (
                axis_matrix([cells, between, last])
                for cells, between, last in zip(maps.shape[:2], input_hw, hw, strict=True)
            )
            seen = cameras[example] == view
            row, column = pixels[example, seen].T
            expected = np.einsum("pr,rcd,pc->pd", vertical[row], maps, horizontal[column])
            scale = np.abs(expected).max()
            assert expected.std(0).max() > 1e-3 * scale  # features differ from point to point
            np.testing.assert_allclose(found[example, seen], expected, rtol=0, atol=1e-5 * scale)


def test_maskclip_reads_between_patches(teacher_config, scene):
    teacher = load_teacher(teacher_config)
    found = point_features(teacher, scene)
    clip = load_clip(teacher_config.path).model
    assert teacher.feature_dim == clip.vision.config.embedding == found.shape[-1]

    images, cameras, pixels, _ = scene
    height, width = images.shape[2:4]
    model, patch = MaskCLIP(clip), clip.vision.config.patch_size
    dense = nnx.jit(lambda model, pictures: model.dense_features(normalise_for_clip(pictures)))
    for example in range(BATCH):
        grids = np.asarray(dense(model, jnp.asarray(images[example])), np.float64)
        # The grid covers the padded picture: its resized map is longer than the picture, which is a part of it.
        vertical, horizontal = (axis_matrix([cells, cells * patch]) for cells in grids.shape[1:3])
        assert vertical.shape[0] >= height
        assert horizontal.shape[0] >= width
        row, column = pixels[example].T
        expected = np.einsum("pr,prcd,pc->pd", vertical[row], grids[cameras[example]], horizontal[column])
        np.testing.assert_allclose(found[example], expected, rtol=0, atol=1e-5)


def test_arrays_of_the_teacher_are_an_argument(teacher_config, weights_file, scene):
    """Also the running means and variances: other arrays give other features, without a new program."""
    teacher_config.name, teacher_config.weights = "maskclip_plus", str(weights_file)
    teacher = load_teacher(teacher_config)
    images, cameras, _, shares = (jnp.asarray(array) for array in scene)
    program = jax.jit(teacher.point_features).lower(teacher.parameters, images, cameras, shares)
    held = sum(leaf.size for leaf in jax.tree.leaves(teacher.parameters))
    assert held == sum(array.size for array in load_file(weights_file).values())
    assert len(jax.tree.leaves(program.args_info[0][0])) == len(load_file(weights_file))


def test_settings_that_fit_no_teacher_are_named(teacher_config, tmp_path, tiny_clip_folder):
    teacher_config.name = "dino"
    with pytest.raises(ValueError, match='"maskclip", "maskclip_plus"'):
        load_teacher(teacher_config)
    teacher_config.name = "maskclip_plus"
    with pytest.raises(ValueError, match=r"--config\.teacher\.weights=FILE"):
        load_teacher(teacher_config)
    teacher_config.weights = str(save_network(tmp_path / "other.safetensors", 5))
    with pytest.raises(ValueError, match=r"other\.safetensors has features of width 5(.|\n)*config\.teacher\.path"):
        load_teacher(teacher_config)
