"""The teacher as the training step uses it, against each of its steps done one by one."""

import itertools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pop3d_jax.models.clip import load_clip
from pop3d_jax.models.deeplab import DeepLabV2
from pop3d_jax.models.dinov2 import POSITION_RULES, DINOv2Teacher
from pop3d_jax.models.dinov2_weights import load_dinov2
from pop3d_jax.models.maskclip import MaskCLIP
from pop3d_jax.models.maskclip import normalise as normalise_for_clip
from pop3d_jax.models.maskclip_plus import fitted_hw, normalise, resize_pictures
from pop3d_jax.models.maskclip_plus_weights import load_network, official_shapes
from pop3d_jax.teacher import abstract_teacher, check_text_side, load_teacher, load_text_side, teacher_fingerprint

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


@pytest.mark.slow
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


@pytest.fixture
def dinov2_config(dinov2_folder):
    return ml_collections.ConfigDict(
        {"name": "dinov2", "path": str(dinov2_folder), "variant": "official", "weights": "", "feature": "x_pre_norm"}
    )


@pytest.fixture(scope="module")
def dinov2_scene():
    """Two key frames seen by one camera, on a grid that is not that of the position table."""
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (BATCH, 1, 28, 70, 3)).astype(np.uint8)
    pixels = np.stack([rng.integers(0, side, (BATCH, POINTS)) for side in images.shape[2:4]], -1)
    return images, np.zeros((BATCH, POINTS), np.int32), pixels, ((pixels + 0.5) / [28, 70]).astype(np.float32)


@pytest.mark.parametrize("feature", ["x_pre_norm", "x"])
@pytest.mark.parametrize("rule", sorted(POSITION_RULES))
def test_dinov2_teaches_with_one_camera(dinov2_config, dinov2_scene, rule, feature):
    dinov2_config.variant, dinov2_config.feature = rule, feature
    teacher = load_teacher(dinov2_config)
    found = point_features(teacher, dinov2_scene)
    network = load_dinov2(dinov2_config.path, position_rule=rule)
    assert teacher.feature_dim == network.config.width == found.shape[-1]
    assert teacher.clip is None

    images, _, pixels, _ = dinov2_scene
    read = nnx.jit(lambda model, pictures: model.dense_features(normalise(pictures)))
    grids = np.asarray(read(DINOv2Teacher(network, feature), jnp.asarray(images[:, 0])), np.float64)
    for example, grid in enumerate(grids):
        row, column = (
            pixels[example].T * (np.array(grid.shape[:2]) - 1)[:, None] / (np.array(images.shape[2:4]) - 1)[:, None]
        )
        # Tents around the cells: bilinear with the first and last pixel on the first and last cell.
        vertical, horizontal = (
            np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells)))
            for position, cells in ((row, grid.shape[0]), (column, grid.shape[1]))
        )
        expected = np.einsum("pr,rcd,pc->pd", vertical, grid, horizontal)
        np.testing.assert_allclose(found[example], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_clip_teaches_with_one_camera(teacher_config, scene):
    images, _, pixels, shares = scene
    teacher = load_teacher(teacher_config)
    cameras = np.zeros((BATCH, POINTS), np.int32)
    one = point_features(teacher, (images[:, :1], cameras, pixels, shares))
    np.testing.assert_allclose(one, point_features(teacher, (images, cameras, pixels, shares)), atol=1e-5)


def test_settings_of_dinov2(dinov2_config, dinov2_folder):
    rules = load_teacher(dinov2_config), abstract_teacher(dinov2_config)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), teacher.parameters) for teacher in rules]
    assert shapes[0] == shapes[1]
    assert len(teacher_fingerprint(rules[0])) == 64
    with pytest.raises(ValueError, match=rf"dinov2 \({dinov2_folder}\) .* width 48, .* has 512: set --config.a=48"):
        rules[0].check_width(512, "config.a")
    dinov2_config.variant = "official_config"
    for load in (load_teacher, abstract_teacher):
        with pytest.raises(ValueError, match=r"--config\.teacher\.variant to one of official, transformers"):
            load(dinov2_config)
    dinov2_config.variant, dinov2_config.feature = "official", "x_norm"
    with pytest.raises(ValueError, match="x_pre_norm"):
        load_teacher(dinov2_config)


def test_a_teacher_without_texts_is_named(dinov2_config, teacher_config, dinov2_folder):
    for ask in (check_text_side, load_text_side):
        with pytest.raises(ValueError, match=rf"dinov2 \({dinov2_folder}\) has no text side"):
            ask(dinov2_config)
    check_text_side(teacher_config)
    assert load_text_side(teacher_config).model.vision.config.embedding == load_teacher(teacher_config).feature_dim


@pytest.mark.slow
def test_one_camera_over_a_data_axis(dinov2_config, dinov2_scene, tmp_path):
    """Each of two devices its own key frame: the same features as on one device."""
    program = """
        import sys
        import jax, ml_collections, numpy as np
        from pop3d_jax.sharding import check_batch, make_mesh, replicated, shard_batch
        from pop3d_jax.teacher import load_teacher

        try:
            check_batch(2, 1, make_mesh(1, 2))
        except ValueError as error:
            assert "config.mesh.camera = 2 does not divide the 1 views" in str(error)
        else:
            raise AssertionError("one view over two devices was accepted")
        teacher = load_teacher(ml_collections.ConfigDict(dict(name="dinov2", path=sys.argv[1], variant="official")))
        with np.load(sys.argv[2]) as scene:
            batch = {name: scene[name] for name in ("images", "cameras", "shares")}
        mesh = make_mesh(2, 1)
        parameters = jax.device_put(teacher.parameters, replicated(mesh))
        arrays = shard_batch(batch, mesh)
        with jax.set_mesh(mesh):
            found = jax.jit(teacher.point_features)(parameters, *arrays.values())
        assert {shard.data.shape[0] for shard in found.addressable_shards} == {1}, found.sharding
        np.save(sys.argv[3], np.asarray(found))
    """
    images, cameras, _, shares = dinov2_scene
    np.savez(tmp_path / "scene.npz", images=images, cameras=cameras, shares=shares)
    files = [str(tmp_path / name) for name in ("scene.npz", "found.npy")]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), dinov2_config.path, *files],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    expected = point_features(load_teacher(dinov2_config), dinov2_scene)
    np.testing.assert_allclose(np.load(files[1]), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
