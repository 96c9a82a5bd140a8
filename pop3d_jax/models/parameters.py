"""Between NNX modules and plain trees of arrays.

Training, optimisation and checkpoints see nested dictionaries of arrays; modules exist where a function is traced.
"""

from typing import Any

import jax
from flax import nnx

ArrayTree = dict[str | int, Any]


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, ArrayTree, ArrayTree]:
    """Structure, parameters and fixed statistics (the frozen BatchNorm's running means and variances) of a model."""
    graph, parameters, statistics = nnx.split(model, nnx.Param, ...)
    return graph, nnx.to_pure_dict(parameters), nnx.to_pure_dict(statistics)


def merge_model(graph: nnx.GraphDef, parameters: ArrayTree, statistics: ArrayTree) -> Any:
    """The inverse of `split_model`; works on traced arrays too."""
    return nnx.merge(
        graph,
        nnx.State(jax.tree.map(nnx.Param, parameters)),
        nnx.State(jax.tree.map(nnx.BatchStat, statistics)),
    )


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a `tree_map_with_path` path as plain strings."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
