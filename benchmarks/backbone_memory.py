"""Time and peak memory of the image part (ResNet and FPN) at full size.

    python -m benchmarks.backbone_memory                    the published network, six images of 928 x 1600
    python -m benchmarks.backbone_memory --gradient --remat --cameras 1
    python -m benchmarks.backbone_memory --width 16 --blocks 1,1,2,1 --height 224 --image_width 400 --gradient

The weights are random: neither time nor memory depends on their values, but the offsets of the deformable
convolutions are drawn, so that sampling positions are as irregular as those of a trained network.
"""

import resource
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from pop3d_jax.models.fpn import FPN
from pop3d_jax.models.resnet import DeformableConv, ResNet

_CAMERAS = flags.DEFINE_integer("cameras", 6, "images in the batch")
_HEIGHT = flags.DEFINE_integer("height", 928, "height of the images")
_IMAGE_WIDTH = flags.DEFINE_integer("image_width", 1600, "width of the images")
_DEPTH = flags.DEFINE_integer("depth", 101, "depth of the ResNet: 50 or 101")
_BLOCKS = flags.DEFINE_list("blocks", None, "blocks of the four stages, instead of those of --depth")
_WIDTH = flags.DEFINE_integer("width", 64, "channels of the stem")
_OUT_CHANNELS = flags.DEFINE_integer("out_channels", 256, "channels of the FPN")
_GRADIENT = flags.DEFINE_bool("gradient", False, "forward and backward instead of forward only")
_REMAT = flags.DEFINE_bool("remat", False, "compute residual blocks again in the backward pass")
_REPEATS = flags.DEFINE_integer("repeats", 2, "timed runs; the fastest counts")


class ImagePart(nnx.Module):
    """Backbone and neck."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        blocks = [int(count) for count in _BLOCKS.value] if _BLOCKS.value else None
        self.img_backbone = ResNet(
            _DEPTH.value, blocks=blocks, width=_WIDTH.value, remat=(_REMAT.value,) * 4, rngs=rngs
        )
        self.img_neck = FPN(self.img_backbone.out_channels, _OUT_CHANNELS.value, 4, rngs=rngs)
        for _, module in nnx.iter_modules(self.img_backbone):
            if isinstance(module, DeformableConv):
                kernel = module.conv_offset.kernel
                kernel[...] = 0.02 * jax.random.normal(rngs.params(), kernel.shape)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """The levels of the pyramid."""
        return self.img_neck(self.img_backbone(images))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    graph, parameters, rest = nnx.split(ImagePart(nnx.Rngs(0)), nnx.Param, ...)
    images = 60 * jax.random.normal(jax.random.key(0), (_CAMERAS.value, _HEIGHT.value, _IMAGE_WIDTH.value, 3))

    def forward(parameters: nnx.State, images: jax.Array) -> tuple[jax.Array, ...]:
        return nnx.merge(graph, parameters, rest)(images)

    def loss(parameters: nnx.State, images: jax.Array) -> jax.Array:
        return sum(jnp.mean(jnp.square(level)) for level in forward(parameters, images))

    function = jax.grad(loss) if _GRADIENT.value else forward
    start = time.perf_counter()
    compiled = jax.jit(function).lower(parameters, images).compile()
    print(f"{'forward and backward' if _GRADIENT.value else 'forward'} of {images.shape} on {jax.devices()[0]}")
    print(f"compilation        {time.perf_counter() - start:8.1f} s")
    times = []
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(compiled(parameters, images))
        times.append(time.perf_counter() - start)
    print(f"fastest run        {min(times):8.3f} s")
    print(f"temporary buffers  {compiled.memory_analysis().temp_size_in_bytes / 1e9:8.3f} GB")
    print(f"peak of process    {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:8.3f} GB resident")


if __name__ == "__main__":
    app.run(main)
