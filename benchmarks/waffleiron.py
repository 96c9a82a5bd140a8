"""Time and memory of WaffleIron: forward pass and training step (AdamW included) on this machine.

    python -m benchmarks.waffleiron
    python -m benchmarks.waffleiron --sizes 48x256 --points 20000 --json docs/results

Weights and clouds are random: points lie as uniformly in the cells as numbers are drawn, a worse case for memory access
than a real sweep, and neighbours are any points.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from benchmarks.measure import compiled_for, timed
from benchmarks.report import Table
from pop3d_jax.models.parameters import merge_model, split_model
from pop3d_jax.models.waffleiron import WaffleIron, WaffleIronConfig
from pop3d_jax.traced_cost import traced_cost

_SIZES = flags.DEFINE_list("sizes", ["6x256", "12x256", "6x768"], "networks, as DEPTHxCHANNELS")
_POINTS = flags.DEFINE_integer("points", 5000, "points of a cloud")
_BATCH = flags.DEFINE_integer("batch", 1, "clouds")
_NEIGHBORS = flags.DEFINE_integer("neighbors", 16, "neighbours of a point, besides itself")
_REMAT = flags.DEFINE_list("remat", ["none", "all"], "what the training step computes again, as config.model.remat")
_REPEATS = flags.DEFINE_integer("repeats", 3, "timed runs; one before does not count")
_DTYPE = flags.DEFINE_enum("compute_dtype", "float32", ["float32", "bfloat16"], "type of the computation")
_JSON = flags.DEFINE_string("json", None, "folder for the results as JSON")

_COLUMNS = ["network", "parameters", "points", "pass", "remat", "median", "temporaries", "matrix FLOPs"]


def random_clouds(config: WaffleIronConfig) -> dict[str, jax.Array]:
    """Inputs of the network's call."""
    rng = np.random.default_rng(0)
    clouds, points = _BATCH.value, _POINTS.value
    neighbors = rng.integers(0, points, (clouds, points, _NEIGHBORS.value + 1))
    neighbors[..., 0] = np.arange(points)
    cells = [rng.integers(0, rows * columns, (clouds, points)) for rows, columns in config.grid_shapes]
    return {
        "point_features": jnp.asarray(rng.standard_normal((clouds, points, config.input_channels)), jnp.float32),
        "neighbors": jnp.asarray(neighbors, jnp.int32),
        "cells": jnp.asarray(np.stack(cells, axis=1), jnp.int32),
        "point_mask": jnp.ones((clouds, points), bool),
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    table = Table("waffleiron", _COLUMNS)
    for size in _SIZES.value:
        depth, channels = (int(number) for number in size.split("x"))
        for remat in _REMAT.value:
            config = WaffleIronConfig(depth=depth, channels=channels, remat=remat, compute_dtype=_DTYPE.value)
            graph, parameters, running = split_model(WaffleIron(config, rngs=nnx.Rngs(0)))
            optimizer = optax.adamw(2e-3, weight_decay=0.03)
            clouds = random_clouds(config)

            def forward(parameters, running, clouds, graph=graph):
                return merge_model(graph, parameters, running)(**clouds)

            def step(parameters, running, optimizer_state, clouds, graph=graph, optimizer=optimizer):
                def loss(parameters):
                    model = merge_model(graph, parameters, running)
                    out = model(**clouds, training=True)
                    return jnp.mean(out**2), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

                gradients, new_running = jax.grad(loss, has_aux=True)(parameters)
                updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
                return optax.apply_updates(parameters, updates), new_running, optimizer_state

            passes = {"training step": (step, (parameters, running, optimizer.init(parameters), clouds))}
            if remat == _REMAT.value[0]:  # nothing is computed again in a forward pass
                passes = {"forward": (forward, (parameters, running, clouds))} | passes
            count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
            for name, (function, arguments) in passes.items():
                program = compiled_for(function, arguments)
                seconds = [timed(program, arguments) for _ in range(_REPEATS.value + 1)][1:]
                table.add(
                    f"WI-{size.replace('x', '-')}",
                    f"{count / 1e6:.1f} M",
                    f"{_BATCH.value} x {_POINTS.value}",
                    name,
                    remat if name == "training step" else "",
                    f"{statistics.median(seconds):.2f} s",
                    f"{program.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB",
                    f"{traced_cost(function, *arguments).flops / 1e9:.0f} G",
                )
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)
