"""DINOv2 against transformers' own network, its two kinds of weight files, and ScaLR's way of reading it."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pop3d_jax.models.dinov2 import POSITION_RULES, DINOv2, DINOv2Config, DINOv2Teacher, sample_upsampled
from pop3d_jax.models.dinov2_weights import PUBLISHED, abstract_dinov2, load_dinov2, network_config, places
from pop3d_jax.models.hugging_face import to_published
from pop3d_jax.models.maskclip_plus import IMAGENET_MEAN, IMAGENET_STD
from pop3d_jax.torch_files import write_state_dict

# Compiled.
run = nnx.jit(lambda network, images: network(images))


@pytest.fixture(scope="module")
def folder(golden_file) -> Path:
    return golden_file("clip/tiny_dinov2")


@pytest.fixture(scope="module")
def network(folder) -> DINOv2:
    return load_dinov2(folder)


@pytest.fixture
def copy(tmp_path, folder) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "dinov2"))


def pictures(seed, batch, height, width):
    return np.random.default_rng(seed).normal(size=(batch, height, width, 3)).astype(np.float32)


SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mlp_ratio": 3,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("settings", [{}, {"use_swiglu_ffn": True, "qkv_bias": False}], ids=["mlp", "swiglu"])
def test_equal_to_transformers(tmp_path, registers, settings):
    torch = pytest.importorskip("torch")
    import transformers

    if registers:
        config = transformers.Dinov2WithRegistersConfig(**SMALL, **settings, num_register_tokens=registers)
        theirs = transformers.Dinov2WithRegistersModel(config)
    else:
        config = transformers.Dinov2Config(**SMALL, **settings)
        theirs = transformers.Dinov2Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as made, scales are ones and biases zeros, and would hide a wrong place
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.eval().save_pretrained(tmp_path)
    ours = load_dinov2(tmp_path, position_rule="transformers")
    # Own size, enlarged and reduced positions.
    for height, width in ((16, 16), (12, 32), (24, 8)):
        images = pictures(height, 2, height, width)
        with torch.no_grad():
            found = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
        output = run(ours, jnp.asarray(images))
        for stage, expected in zip((output.embeddings, *output.layers), found.hidden_states, strict=True):
            np.testing.assert_allclose(stage, expected.numpy(), atol=1e-5)
        np.testing.assert_allclose(output.normed, found.last_hidden_state.numpy(), atol=2e-5)


def test_registers_follow_the_same_rule_by_both_names():
    """The original code, too, resizes the positions of networks with registers to the size, antialiased."""
    config = DINOv2Config(width=8, layers=0, heads=1, mlp_width=8, image_size=16, patch_size=4, registers=2)
    tables = [DINOv2(config, rule, rngs=nnx.Rngs(0)).positions((2, 7)) for rule in POSITION_RULES]
    np.testing.assert_array_equal(*tables)
    plain = [
        DINOv2(DINOv2Config(**(vars(config) | {"registers": 0})), rule, rngs=nnx.Rngs(0)).positions((2, 7))
        for rule in POSITION_RULES
    ]
    assert np.abs(plain[0] - plain[1]).max() > 1e-3


def original_state(network: DINOv2) -> dict[str, np.ndarray]:
    """The weights as the original code names and stores them."""
    parts: dict[str, list[np.ndarray]] = {}
    parameters = dict(nnx.to_flat_state(nnx.state(network, nnx.Param)))
    for path, place in sorted(places(network, original=True).items(), key=lambda item: item[1].part):
        parts.setdefault(place.key, []).append(to_published(np.asarray(parameters[path][...]), path))
    state = {key: np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for key, arrays in parts.items()}
    return state | {"mask_token": np.zeros((1, network.config.width), np.float32)}


def chunked(state: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    return {
        re.sub(r"^blocks\.(\d+)\.", lambda block: f"blocks.{int(block[1]) // size}.{block[1]}.", key): array
        for key, array in state.items()
    }


def assert_same_weights(found: DINOv2, expected: DINOv2):
    found, expected = (dict(nnx.to_flat_state(nnx.state(network))) for network in (found, expected))
    assert found.keys() == expected.keys()
    for path, parameter in expected.items():
        np.testing.assert_array_equal(found[path][...], parameter[...], err_msg=str(path))


def test_names_and_order_of_the_original_code(golden_file, folder, network):
    info = json.loads(golden_file("clip/tiny_dinov2_info.json").read_text())
    state = original_state(network)
    assert {key: list(array.shape) for key, array in state.items()} == info["official_state_dict"]
    # Query, key and value lie one after the other in the original's one tensor.
    stored = load_file(folder / "model.safetensors")
    prefix = "encoder.layer.0.attention.attention"
    rows = [stored[f"{prefix}.{name}.weight"] for name in ("query", "key", "value")]
    np.testing.assert_array_equal(state["blocks.0.attn.qkv.weight"], np.concatenate(rows))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("chunk", [0, 2], ids=["whole", "chunked"])
def test_original_checkpoint(tmp_path, folder, network, suffix, chunk):
    if suffix == "pth":
        pytest.importorskip("torch")
    state = original_state(network)
    file = tmp_path / f"dinov2_pretrain.{suffix}"
    write_state_dict(file, chunked(state, chunk) if chunk else state)
    found = load_dinov2(folder, weights=file)
    assert_same_weights(found, network)
    assert found.config == network.config


def test_sizes_told_from_an_original_checkpoint(tmp_path, folder, network):
    config = DINOv2Config(
        width=128, layers=3, heads=2, mlp_width=24, image_size=12, patch_size=4, registers=2, swiglu=True
    )
    made = DINOv2(config, rngs=nnx.Rngs(0))
    file = tmp_path / "giant.safetensors"
    write_state_dict(file, original_state(made))
    found = load_dinov2(weights=file)
    assert found.config == config == abstract_dinov2("", weights=file).config
    assert_same_weights(found, made)

    if network.config.width % 64:
        write_state_dict(file, original_state(network))
        with pytest.raises(ValueError, match=r"how many heads .*--config\.teacher\.path"):
            load_dinov2(weights=file)
    save_file(load_file(folder / "model.safetensors"), file)
    with pytest.raises(ValueError, match=r"giant\.safetensors is no checkpoint of the original DINOv2.*cls_token"):
        load_dinov2(weights=file)


def test_original_names_are_checked_strictly(tmp_path, folder, network):
    """The official loading would leave all of this out in silence."""
    state = original_state(network)
    state["blocks.1.ls1.weight"] = state.pop("blocks.1.ls1.gamma")
    del state["norm.bias"]
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"][:-1]
    file = tmp_path / "wrong.safetensors"
    write_state_dict(file, state)
    with pytest.raises(ValueError, match=r"wrong\.safetensors: the tensors are not") as error:
        load_dinov2(folder, weights=file)
    message = str(error.value)
    missing, message = message.split("1 unknown")
    unknown, misshapen = message.split("1 misshapen")
    assert "2 missing" in missing
    assert "blocks.1.ls1.gamma" in missing
    assert "norm.bias" in missing
    assert "blocks.1.ls1.weight" in unknown
    assert "blocks.0.attn.qkv.weight" in misshapen

    state = original_state(network)
    write_state_dict(file, state | {"blocks.0.1.norm1.bias": state["blocks.1.norm1.bias"]})
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.bias twice"):
        load_dinov2(folder, weights=file)


def test_folder_names_are_checked_strictly(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["encoder.layer.0.layer_scale1.gamma"] = tensors.pop("encoder.layer.0.layer_scale1.lambda1")
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing:\s+encoder.*lambda1\s+1 unknown:\s+encoder.*gamma"):
        load_dinov2(copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"import Dinov2Model; .*save_pretrained"):
        load_dinov2(copy)


def test_folders_and_names_that_are_no_dinov2(copy, tiny_clip_folder):
    with pytest.raises(ValueError, match=r"is no DINOv2: .* 'clip'"):
        load_dinov2(tiny_clip_folder)
    with pytest.raises(FileNotFoundError, match="facebook/dinov2-large"):
        abstract_dinov2("openai/clip-vit-base-patch16")
    with pytest.raises(ValueError, match="official"):
        load_dinov2(copy, position_rule="half")
    config = json.loads((copy / "config.json").read_text())
    for change, words in (({"num_channels": 4}, "4 channels"), ({"image_size": [28, 42]}, "image_size is")):
        (copy / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=words):
            load_dinov2(copy)


def test_mask_token_is_not_needed(copy, network):
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("embeddings.mask_token")
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, copy / "model.safetensors")
    assert_same_weights(load_dinov2(copy), network)


@pytest.mark.slow
def test_published_sizes():
    import transformers

    giant = transformers.Dinov2WithRegistersConfig(
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        use_swiglu_ffn=True,
        image_size=518,
        patch_size=14,
    )
    assert PUBLISHED["facebook/dinov2-with-registers-giant"] == network_config(giant, "giant")

    # Millions, as in the table of the original repository.
    counts = {}
    for name, millions in (("small", 21), ("with-registers-small", 21), ("base", 86)):
        network = abstract_dinov2(f"facebook/dinov2-{name}")
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network)))
        assert counts[name] == pytest.approx(millions * 1e6, rel=0.06)
    assert counts["with-registers-small"] - counts["small"] == 4 * 384


def upsampled(grid, height, width):
    """The whole map, bilinear with align_corners=True, in float64."""
    rows, columns = grid.shape[:2]
    vertical, horizontal = (
        np.stack([np.interp(np.linspace(0, cells - 1, side), np.arange(cells), unit) for unit in np.eye(cells)], 1)
        for cells, side in ((rows, height), (columns, width))
    )
    return np.einsum("hr,rcd,wc->hwd", vertical, grid.astype(np.float64), horizontal)


@pytest.mark.parametrize("grid_hw", [(16, 32), (3, 1), (2, 5)])
def test_sampling_is_the_upsampled_map_at_the_pixel(grid_hw):
    height, width = 14 * grid_hw[0], 14 * grid_hw[1]
    grids = np.random.default_rng(0).normal(size=(2, *grid_hw, 3)).astype(np.float32)
    maps = np.stack([upsampled(grid, height, width) for grid in grids])
    np.testing.assert_allclose(maps[:, 0, -1], grids[:, 0, -1], atol=1e-12)  # corners are the corner cells

    picture, row, column = (index.ravel() for index in np.indices((2, height, width)))
    for inside in (0.5, 0.1, 0.9):  # wherever in the pixel, the pixel is read
        pixel = ((np.stack([row, column], 1) + inside) / [height, width]).astype(np.float32)
        found = sample_upsampled(jnp.asarray(grids), (height, width), jnp.asarray(picture), jnp.asarray(pixel))
        np.testing.assert_allclose(found, maps.reshape(-1, 3), atol=3e-5)  # positions are float32


@pytest.mark.parametrize("feature", ["x_pre_norm", "x"])
def test_features_at_pixels_of_pictures(network, feature):
    rng = np.random.default_rng(0)
    patch = network.config.patch_size
    height, width = 3 * patch, 2 * patch
    images = rng.integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    normalised = (images - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    output = run(network, jnp.asarray(normalised, jnp.float32))
    tokens = np.asarray({"x_pre_norm": output.layers[-1], "x": output.normed}[feature])
    maps = [upsampled(grid[1:].reshape(3, 2, -1), height, width) for grid in tokens]

    picture = rng.integers(0, 2, 50).astype(np.int32)
    row, column = rng.integers(0, height, 50), rng.integers(0, width, 50)
    shares = ((np.stack([row, column], 1) + 0.5) / [height, width]).astype(np.float32)
    teacher = DINOv2Teacher(network, feature)
    found = nnx.jit(lambda teacher, *args: teacher.features_at(*args))(
        teacher, jnp.asarray(images), jnp.asarray(picture), jnp.asarray(shares)
    )
    expected = np.stack([maps[p][r, c] for p, r, c in zip(picture, row, column, strict=True)])
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_pictures_and_features_that_do_not_fit(network):
    patch = network.config.patch_size
    images = jnp.zeros((1, 3 * patch, 2 * patch + 1, 3), jnp.uint8)
    nothing = jnp.zeros(0, jnp.int32), jnp.zeros((0, 2))
    with pytest.raises(ValueError, match=rf"teacher_image_hw=\({3 * patch}, {2 * patch}\)"):
        DINOv2Teacher(network).features_at(images, *nothing)
    with pytest.raises(ValueError, match="x_pre_norm"):
        DINOv2Teacher(network, "x_norm")


def test_registers_are_no_patches():
    config = DINOv2Config(width=8, layers=1, heads=2, mlp_width=8, image_size=8, patch_size=4, registers=3)
    network = DINOv2(config, rngs=nnx.Rngs(0))
    images = jnp.asarray(pictures(0, 1, 8, 12))
    features = DINOv2Teacher(network).dense_features(images)
    np.testing.assert_allclose(features.reshape(6, 8), run(network, images).layers[-1][0, 4:], atol=1e-6)
