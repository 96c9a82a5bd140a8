"""Single operations against `ops.npz`: sampling, deformable operations, heads, losses, encoder parts, grid masks."""

import itertools
from collections.abc import Iterator
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pop3d_jax.data.augment import grid_mask
from pop3d_jax.losses import cross_entropy, lovasz_softmax
from pop3d_jax.models.batch_norm import EPSILON
from pop3d_jax.models.heads import TPVHeads
from pop3d_jax.models.resnet import Bottleneck
from pop3d_jax.models.tpv import FeedForward, PositionalEncoding, TPVPlanes
from pop3d_jax.models.tpv_geometry import PLANES, cell_centres, plane_shapes, reference_points, sample_points
from pop3d_jax.ops import deformable_attention as attention_ops
from pop3d_jax.ops.deformable_attention import deformable_attention
from pop3d_jax.ops.deformable_conv import Implementation, deformable_conv2d
from pop3d_jax.ops.grid_sample import grid_sample, resize_bilinear
from pop3d_jax.verification.checks import Check, absolute, exact, relative
from pop3d_jax.verification.golden_model import GoldenFile, filled_module, golden_arrays, reference_weights

_OPS = "pop3d/ops.npz"


def attention(golden_file: GoldenFile) -> Iterator[Check]:
    """Multi-scale deformable attention and its gradients, in every implementation."""
    official = golden_arrays(golden_file(_OPS), "msda_")
    shapes = tuple((int(h), int(w)) for h, w in official["spatial_shapes"])
    arguments = [jnp.asarray(official[name]) for name in ("value", "sampling_locations", "attention_weights")]
    for implementation in get_args(attention_ops.Implementation):

        def attend(values, locations, weights, implementation=implementation):
            return deformable_attention(values, shapes, locations, weights, implementation=implementation)

        output, pullback = jax.vjp(jax.jit(attend), *arguments)
        gradients = pullback(jnp.asarray(official["grad_output"]).reshape(output.shape))
        expected = official["output"]
        output = np.asarray(output).reshape(expected.shape)
        yield absolute(f"msda_output, {implementation}", output, expected, 2e-6 * _size(expected))
        for name, gradient in zip(("grad_value", "grad_locations", "grad_weights"), gradients, strict=True):
            # A location gradient is a difference of neighbours times the map's width; errors scale with it.
            tolerance = 2e-6 * _size(official[name])
            yield absolute(f"msda_{name}, {implementation}", np.asarray(gradient), official[name], tolerance)


def deformable_convolutions(golden_file: GoldenFile) -> Iterator[Check]:
    """Modulated deformable convolutions with their predicted offsets, and all gradients, in every implementation."""
    golden = golden_arrays(golden_file(_OPS), "dcn_")
    names = sorted(key.removesuffix("_stride") for key in golden if key.endswith("_stride"))
    for name, implementation in itertools.product(names, get_args(Implementation)):
        stride, padding, dilation = (int(golden[f"{name}_{part}"]) for part in ("stride", "padding", "dilation"))

        settings = {"stride": stride, "padding": padding, "dilation": dilation, "implementation": implementation}

        def convolve(x, kernel, offset_kernel, offset_bias, settings=settings):
            stride, padding, dilation, _ = settings.values()
            predicted = offset_bias + jax.lax.conv_general_dilated(
                x,
                offset_kernel,
                (stride, stride),
                ((padding, padding),) * 2,
                rhs_dilation=(dilation, dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            taps = predicted.shape[-1] // 3
            offset = predicted[..., : 2 * taps].reshape(*predicted.shape[:3], taps, 2)
            mask = jax.nn.sigmoid(predicted[..., 2 * taps :])
            return deformable_conv2d(x, offset, mask, kernel, **settings), predicted

        inputs = (
            _channels_last(golden[f"{name}_input"]),
            _kernel(golden[f"{name}_weight"]),
            _kernel(golden[f"{name}_conv_offset_weight"]),
            jnp.asarray(golden[f"{name}_conv_offset_bias"]),
        )
        output, pullback, predicted = jax.vjp(jax.jit(convolve), *inputs, has_aux=True)
        gradients = pullback(_channels_last(golden[f"{name}_grad_output"]))
        outputs = {"conv_offset_output": _channels_first(predicted), "output": _channels_first(output)}
        backward = {
            "grad_input": _channels_first(gradients[0]),
            "grad_weight": _official_kernel(gradients[1]),
            "grad_conv_offset_weight": _official_kernel(gradients[2]),
            "grad_conv_offset_bias": np.asarray(gradients[3]),
        }
        # The official gradients agree with a float64 implementation within 7e-5 (README of the golden data).
        for arrays, tolerance in ((outputs, 1e-5), (backward, 7e-5)):
            for array, ours in arrays.items():
                expected = golden[f"{name}_{array}"]
                # Sums of many terms cancel: elements are judged by the size of the whole array, too.
                size = float(np.sqrt(np.mean(expected.astype(np.float64) ** 2)))
                yield relative(f"dcn_{name}_{array}, {implementation}", ours, expected, tolerance, size)


def sampling(golden_file: GoldenFile) -> Iterator[Check]:
    """Bilinear sampling with gradients, and bilinear resizing."""
    golden = golden_arrays(golden_file(_OPS))
    features, grid = _channels_last(golden["grid_sample_input"]), jnp.asarray(golden["grid_sample_grid_xy"])
    output, pullback = jax.vjp(jax.jit(grid_sample), features, grid)
    expected = golden["grid_sample_output"]
    yield absolute("grid_sample_output", _channels_first(output), expected, 2e-6 * _size(expected))
    to_features, to_grid = pullback(_channels_last(golden["grid_sample_grad_output"]))
    expected = golden["grid_sample_grad_input"]
    yield absolute("grid_sample_grad_input", _channels_first(to_features), expected, 5e-6 * _size(expected))
    expected = golden["grid_sample_grad_grid"]
    tolerance = 1e-5 * _size(expected)
    yield absolute("grid_sample_grad_grid", np.asarray(to_grid), expected, tolerance)
    for height, width in golden["interp_output_sizes"].tolist():
        name = f"interp_output_{height}x{width}"
        resized = resize_bilinear(_channels_last(golden["interp_input"]), (height, width))
        yield absolute(name, _channels_first(resized), golden[name], 2e-6 * _size(golden["interp_input"]))


def aggregator(golden_file: GoldenFile) -> Iterator[Check]:
    """The heads on planes that are upscaled, with points and without."""
    official = golden_arrays(golden_file(_OPS), "agg2_")
    (h, w, z), (scale_h, scale_w, scale_z) = (official[name].tolist() for name in ("hwz", "scale_hwz"))
    weights = reference_weights(golden_file)
    heads = filled_module(
        lambda: TPVHeads(
            (w, h, z),
            (scale_w, scale_h, scale_z),
            embed_dims=int(official["in_dims"]),
            occupancy_classes=int(official["nbr_classes"]),
            hidden_dims=int(official["hidden_dims"]),
            out_dims=int(official["out_dims"]),
            decoder_layers=int(official["dec_layers_occupancy"]),
            feature_dim=int(official["feature_dim"]),
            feature_hidden_dims=int(official["hidden_dims_ft"]),
            feature_out_dims=int(official["out_dims_ft"]),
            feature_decoder_layers=int(official["dec_layers_features"]),
            dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        ),
        ("heads",),
        weights.reference_weight,
    )
    planes = TPVPlanes(
        *(
            jnp.asarray(official[f"plane_{plane}"]).reshape(1, *shape, -1)
            for plane, shape in zip(PLANES, plane_shapes((w, h, z)), strict=True)
        )
    )
    points = jnp.asarray(official["points"])
    graph, state = nnx.split(heads)
    output = jax.jit(lambda state, planes, points: nnx.merge(graph, state)(planes, points, points))(
        state, planes, points
    )
    arrays = {
        "voxel_logits": _channels_first(output.occupancy_logits),
        "point_logits": _channels_first(output.point_occupancy_logits)[..., None, None],
        "voxel_features": _channels_first(output.voxel_features),
        "point_features": np.asarray(output.point_features),
    }
    for name, ours in arrays.items():
        yield absolute(f"agg2_{name}", ours, official[name], 5e-6 * _size(official[name]))
    logits = jax.jit(lambda state, planes: nnx.merge(graph, state)(planes, voxel_features=False).occupancy_logits)(
        state, planes
    )
    name = "voxel_logits_no_points"
    yield absolute(f"agg2_{name}", _channels_first(logits), official[name], 5e-6 * _size(official[name]))


def losses(golden_file: GoldenFile) -> Iterator[Check]:
    """Lovász-softmax and cross-entropy with their gradients."""
    golden = golden_arrays(golden_file(_OPS))
    ignore = int(golden["ignore_label"])

    def lovasz_of_logits(logits, labels):
        return lovasz_softmax(jax.nn.softmax(logits), labels, ignore)

    for prefix in _lovasz_cases(golden):
        expected = golden[f"{prefix}_grad_logits"]
        logits = _channels_last(golden["lovasz_logits"][:, : expected.shape[1]])
        labels = jnp.asarray(golden[f"{prefix}_labels"].astype(np.int32))
        loss, gradient = jax.jit(jax.value_and_grad(lovasz_of_logits))(logits, labels)
        yield _loss(f"{prefix}_loss", loss, golden)
        yield _gradient(f"{prefix}_grad_logits", gradient, golden)
    labels = jnp.asarray(golden["lovasz_labels"].astype(np.int32))
    gradient = jax.jit(jax.grad(lovasz_softmax), static_argnums=2)(
        _channels_last(golden["lovasz_probas"]), labels, ignore
    )
    yield _gradient("lovasz_grad_probas", gradient, golden)
    logits = _channels_last(golden["lovasz_logits"])
    for name, weights in (("weighted", jnp.asarray(golden["ce_weight"])), ("plain", None)):
        loss, gradient = jax.jit(jax.value_and_grad(cross_entropy), static_argnums=3)(logits, labels, weights, ignore)
        yield _loss(f"ce_loss_{name}", loss, golden)
        yield _gradient(f"ce_grad_logits_{name}", gradient, golden)


def encoder_parts(golden_file: GoldenFile) -> Iterator[Check]:
    """Anchors and their projections, the positional encoding, the feed-forward layer."""
    ops = golden_arrays(golden_file(_OPS))
    h, w, z = ops["refpts_hwz"].tolist()
    volume = tuple(float(v) for v in ops["refpts_pc_range"])
    extent = tuple(b - a for a, b in zip(volume[:3], volume[3:], strict=True))
    image_hw = tuple(ops["refpts_image_hw"].tolist())
    lidar_to_image = jnp.asarray(ops["refpts_lidar2img"], jnp.float32)[None]
    references = reference_points((w, h, z), extent, tuple(ops["refpts_num_points_in_pillar"].tolist()))
    for plane, shape, reference in zip(PLANES, plane_shapes((w, h, z)), references, strict=True):
        ours = np.asarray(reference).swapaxes(0, 1)[None]
        yield absolute(f"refpts_ref_3d_{plane}", ours, ops[f"refpts_ref_3d_{plane}"], 1e-7)
        ours = np.asarray(cell_centres(shape))[None, :, None]
        yield absolute(f"refpts_ref_2d_{plane}", ours, ops[f"refpts_ref_2d_{plane}"], 1e-7)
        uv, visible = sample_points(reference, volume[:3], volume[3:], lidar_to_image, image_hw)
        mask = ops[f"refpts_mask_{plane}"][:, 0]
        yield exact(f"refpts_mask_{plane}", np.asarray(visible[0]), mask)
        # Shares of the image: 2e-6 is 0.003 pixels of 1600. Behind the camera the numbers mean nothing.
        expected = ops[f"refpts_cam_{plane}"][:, 0][mask]
        yield absolute(f"refpts_cam_{plane}", np.asarray(uv[0])[mask], expected, 2e-6, "where visible")

    row, column = ops["lpe_row_embed"], ops["lpe_col_embed"]
    encoding = PositionalEncoding((len(row), len(column)), 2 * row.shape[1], rngs=nnx.Rngs(0))
    encoding.row_embed[...], encoding.col_embed[...] = jnp.asarray(row), jnp.asarray(column)
    expected = np.moveaxis(ops["lpe_output"], 1, -1)
    yield exact(
        "lpe_output", np.broadcast_to(np.asarray(encoding()).reshape(expected.shape[1:]), expected.shape), expected
    )

    hidden, dims = ops["ffn_layers.0.0.weight"].shape
    ffn = FeedForward(dims, hidden, dropout_rate=0.0, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for layer, name in ((ffn.expand, "0.0"), (ffn.contract, "1")):
        layer.kernel[...] = jnp.asarray(ops[f"ffn_layers.{name}.weight"].T)
        layer.bias[...] = jnp.asarray(ops[f"ffn_layers.{name}.bias"])
    expected = ops["ffn_output"]
    # Sums of `hidden` terms.
    tolerance = 1e-6 * np.sqrt(hidden) * _size(expected)
    yield absolute("ffn_output", np.asarray(ffn(jnp.asarray(ops["ffn_input"]), None)), expected, tolerance)


def bottleneck(golden_file: GoldenFile) -> Iterator[Check]:
    """A residual block with a deformable convolution."""
    golden = golden_arrays(golden_file(_OPS), "bottleneck_")
    yield exact("bottleneck_batch_norm_epsilon", np.asarray(EPSILON), golden["batch_norm_epsilon"])
    middle, channels = golden["conv1.weight"].shape[:2]
    block = filled_module(
        lambda: Bottleneck(channels, middle, stride=int(golden["stride"]), deformable=True, rngs=nnx.Rngs(0)),
        ("backbone",),
        lambda key, _: golden[key.removeprefix("img_backbone.")],
    )
    graph, state = nnx.split(block)
    output = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, _channels_last(golden["input"]))
    # rtol 1e-5 and atol 5e-6.
    yield relative("bottleneck_output", _channels_first(output), golden["output"], 1e-5, 0.5)


def grid_masks(golden_file: GoldenFile) -> Iterator[Check]:
    """Grid masks of drawn periods and offsets."""
    golden = golden_arrays(golden_file(_OPS), "gridmask")
    ratio = float(golden["_ratio"])
    for seed in golden["_seeds"].tolist():
        expected = golden[f"{seed}_mask"]
        mask = grid_mask(jnp.asarray(golden[f"{seed}_d_sth_stw"]), *expected.shape, ratio=ratio)
        yield exact(f"gridmask{seed}_mask", np.asarray(mask), expected)


def _lovasz_cases(golden: dict[str, np.ndarray]) -> list[str]:
    ending = "_grad_logits"
    return sorted(name.removesuffix(ending) for name in golden if name.startswith("lovasz") and name.endswith(ending))


def _loss(name: str, loss: jax.Array, golden: dict[str, np.ndarray]) -> Check:
    # Losses of a few hundred float32 terms, summed in another order.
    return relative(name, np.asarray(loss), golden[name], 5e-6)


def _gradient(name: str, gradient: jax.Array, golden: dict[str, np.ndarray]) -> Check:
    # rtol 1e-4, and atol 2e-6 of the largest element. The official differences of neighbouring Jaccard losses are exact
    # to float32's spacing below 1, however small the gradients of many voxels become.
    floor = 0.02 * float(np.abs(golden[name]).max())
    if name.startswith("lovasz"):
        floor = max(floor, 1.2e-7 / 1e-4)
    return relative(name, _channels_first(gradient), golden[name], 1e-4, floor)


def _size(array: np.ndarray) -> float:
    """What absolute tolerances grow with: the largest element, where that is above 1."""
    return max(1.0, float(np.abs(array).max()))


def _channels_last(array: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(array, 1, -1))


def _channels_first(array: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -1, 1)


def _kernel(array: np.ndarray) -> jax.Array:
    return jnp.asarray(np.transpose(array, (2, 3, 1, 0)))


def _official_kernel(array: jax.Array) -> np.ndarray:
    return np.transpose(np.asarray(array), (3, 2, 0, 1))
