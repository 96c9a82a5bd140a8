"""What it costs to ask the network at Occ3D's voxel centres, against its own grid alone.

    python -m benchmarks.occ3d_labels [--repeats 5] [--json docs/results]

The heads of the published size (planes of 100 x 100 x 8 voxels and 256 numbers, features of 512) with random weights,
whose bias is set so that a given share of the network's own voxels is occupied; planes are smooth noise, phrases
random vectors, as many as POP-3D's sub-prompts. Backbone and encoder, the same for both, are not in it. One round
calls all of them, one after the other; the ratio is that of the medians. Memory is the compiler's count of temporaries.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks.measure import compiled_for, medians_in_turns
from benchmarks.report import Table
from pop3d_jax.grids.background import BACKGROUND_PHRASES
from pop3d_jax.models.heads import TPVHeads
from pop3d_jax.models.pop3d import Pop3DConfig
from pop3d_jax.models.tpv import TPVPlanes
from pop3d_jax.occ3d.centres import place_centres
from pop3d_jax.occ3d.grid import FREE
from pop3d_jax.occ3d.phrase_labels import LabelText
from pop3d_jax.occ3d.prompts import prompt_set
from pop3d_jax.occ3d.student_labels import grid_labels, labels_at
from pop3d_jax.ops.grid_sample import resize_bilinear
from pop3d_jax.voxels import Volume

_REPEATS = flags.DEFINE_integer("repeats", 5, "timed rounds; one before does not count")
_OCCUPIED = flags.DEFINE_list("occupied", ["0.02", "0.1"], "shares of the network's voxels that are occupied")
_JSON = flags.DEFINE_string("json", None, "folder of occ3d_labels.json")

# The lidar's mounting of the drawn car: 0.9 m before the ego frame's origin, 1.8 m above it.
_LIDAR_TO_EGO = np.array([[0.0, 1.0, 0.0, 0.9], [-1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.8], [0.0, 0.0, 0.0, 1.0]])


def published_heads(config: Pop3DConfig) -> TPVHeads:
    """Heads with random weights."""
    return TPVHeads(
        config.grid_size,
        config.upscale,
        embed_dims=config.embed_dims,
        occupancy_classes=config.occupancy_classes,
        hidden_dims=config.hidden_dims,
        out_dims=config.out_dims,
        decoder_layers=config.decoder_layers,
        feature_dim=config.feature_dim,
        feature_hidden_dims=config.feature_hidden_dims,
        feature_out_dims=config.feature_out_dims,
        feature_decoder_layers=config.feature_decoder_layers,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )


def occupy(heads: TPVHeads, planes: TPVPlanes, share: float) -> None:
    """Sets the bias so that this share of the voxels is occupied."""
    logits = np.asarray(nnx.jit(lambda heads: heads(planes, voxel_features=False).occupancy_logits)(heads))
    shift = float(np.quantile(logits[..., 0] - logits[..., 1], share))
    heads.occupancy.classifier.bias[...] += jnp.array([-shift, 0.0])


def random_text(dim: int) -> LabelText:
    """As many phrases as the `pop3d` list has."""
    labels = prompt_set("pop3d").labels
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(len(labels) + len(BACKGROUND_PHRASES), dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    rivals = np.ones((len(labels), len(BACKGROUND_PHRASES)), bool)
    phrases, background = np.split(vectors, [len(labels)])
    return LabelText(*map(jnp.asarray, (phrases, labels, background, rivals)))


def main(_: list[str]) -> None:
    config = Pop3DConfig()
    heads = published_heads(config)
    x, y, z = config.grid_size
    generator = np.random.default_rng(0)
    # Noise of a few voxels' size: noise from voxel to voxel would cancel out between the voxels' centres.
    planes = TPVPlanes(
        *(
            resize_bilinear(
                jnp.asarray(generator.normal(size=(1, -(-h // 4), -(-w // 4), config.embed_dims)), jnp.float32), (h, w)
            )
            for h, w in ((y, x), (z, y), (x, z))
        )
    )
    placed = place_centres(_LIDAR_TO_EGO, Volume(config.volume_minimum, config.volume_maximum, config.grid_size))
    text = random_text(config.feature_dim)
    graph = nnx.graphdef(heads)
    programs = {
        "own grid alone": lambda state, *rest: grid_labels(nnx.merge(graph, state), rest[0], rest[-1], None),
        "Occ3D's centres": lambda state, *rest: labels_at(nnx.merge(graph, state), *rest, None),
        "Occ3D's centres, absent classes left out": lambda state, *rest: labels_at(nnx.merge(graph, state), *rest, 0.0),
    }
    table = Table(
        "occ3d_labels",
        ["own voxels occupied", "asked", "of Occ3D's voxels occupied", "median", "to own grid", "temporaries"],
    )
    compiled: dict[str, jax.stages.Compiled] = {}
    for share in map(float, _OCCUPIED.value):
        occupy(heads, planes, share)
        arguments = (nnx.state(heads), planes, jnp.asarray(placed.cells), jnp.asarray(placed.unseen), text)
        for name, program in programs.items():
            compiled.setdefault(name, compiled_for(program, arguments))
        seconds = medians_in_turns([(program, arguments) for program in compiled.values()], _REPEATS.value)
        for (name, program), median in zip(compiled.items(), seconds, strict=True):
            found = np.asarray(program(*arguments))
            table.add(
                f"{100 * share:g} %",
                name,
                "" if name == "own grid alone" else f"{100 * (found != FREE).mean():.1f} %",
                f"{median:.2f} s",
                f"{median / seconds[0]:.2f}",
                f"{program.memory_analysis().temp_size_in_bytes / 1e6:.0f} MB",
            )
    table.details.update(centres=len(placed.cells), unseen=int(placed.unseen.sum()), phrases=len(text.labels))
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)
