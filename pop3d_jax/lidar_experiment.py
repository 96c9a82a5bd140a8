"""From a configuration of ScaLR to the objects it names: sources, example settings, the network and its first weights.

`pop3d_jax.experiment` is the same for POP-3D.
"""

import dataclasses
from typing import Any

import jax
import ml_collections
from absl import logging
from etils import epath
from flax import nnx

from pop3d_jax.checkpoint import Checkpoints
from pop3d_jax.data.label_subsets import label_subset, listed_records
from pop3d_jax.data.lidar_examples import LidarSettings
from pop3d_jax.data.lidar_pipeline import LidarSource
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.lidar_datasets import LIDAR_DATASETS, LidarDataset
from pop3d_jax.models.parameters import ArrayTree, merge_model, split_model
from pop3d_jax.models.waffleiron import WaffleIron, WaffleIronConfig
from pop3d_jax.models.waffleiron_weights import load_waffleiron
from pop3d_jax.workdir import read_config


@dataclasses.dataclass(frozen=True)
class LidarStudent:
    """The network without its arrays.

    Attributes:
      config: its sizes.
      graph: structure, for `merge_model`.
      abstract_parameters, abstract_statistics: shapes and types of its arrays.
    """

    config: WaffleIronConfig
    graph: nnx.GraphDef
    abstract_parameters: ArrayTree
    abstract_statistics: ArrayTree


def make_lidar_student(config: ml_collections.ConfigDict) -> LidarStudent:
    """Structure of the network; costs no memory.

    Raises:
      ValueError: config.model has a field that the network does not know, or values that do not fit together.
    """
    known = {field.name for field in dataclasses.fields(WaffleIronConfig)}
    unknown = sorted(set(config.model) - known)
    if unknown:
        raise ValueError(f"unknown fields of config.model: {unknown}; known are {sorted(known)}")
    sizes = WaffleIronConfig(**config.model.to_dict())
    abstract = nnx.eval_shape(lambda: WaffleIron(sizes, rngs=nnx.Rngs(0)))
    return LidarStudent(sizes, *split_model(abstract))


def lidar_settings(config: ml_collections.ConfigDict, *, training: bool) -> LidarSettings:
    """How key frames become arrays: `config.points`, and the grids of `config.model`.

    Training never has more than `max_points`, so its arrays need no more rows.

    Raises:
      ValueError: config.points has a field that nobody knows.
    """
    known = {field.name for field in dataclasses.fields(LidarSettings)}
    unknown = sorted(set(config.points) - known)
    if unknown:
        raise ValueError(f"unknown fields of config.points: {unknown}; known are {sorted(known)}")
    settings = LidarSettings(
        grid_shapes=tuple(map(tuple, config.model.grid_shapes)),
        projection_axes=tuple(config.model.projection_axes),
        **config.points.to_dict(),
    )
    if training:
        settings = dataclasses.replace(settings, capacity=min(settings.capacity, settings.max_points))
    return settings


def dataset_named(name: str) -> LidarDataset:
    """A data set by its name in `config.datasets`.

    Raises:
      ValueError: there is none.
    """
    if name not in LIDAR_DATASETS:
        raise ValueError(f"config.datasets has {name!r}; known data sets: {', '.join(sorted(LIDAR_DATASETS))}")
    return LIDAR_DATASETS[name]


def record_source(config: ml_collections.ConfigDict, name: str, split: str) -> RecordSource:
    """The records of a data set: `config.data.records` is a folder with one for each, by its name.

    Raises:
      RecordError: they are not there, or are another data set's.
    """
    source = RecordSource(epath.Path(config.data.records) / name, split)
    if source.dataset != name:
        raise RecordError(
            f"{config.data.records}/{name} holds records of {source.dataset}: build those of {name} into it with "
            f"python -m data_prep.build --dataset {name}"
        )
    return source


def lidar_sources(config: ml_collections.ConfigDict) -> list[LidarSource]:
    """The training data: every data set of the mixture with its weight.

    `config.label_fraction` below 1 leaves that share of the key frames, chosen by `config.label_rule`;
    `config.label_tokens` those named in a file.

    Raises:
      RecordError, ValueError: records are missing; no data set; both a share and a file.
    """
    if not config.datasets:
        raise ValueError('config.datasets is empty: name at least one data set, {"nuscenes": 1.0}')
    fraction, tokens = config.get("label_fraction", 1.0), config.get("label_tokens", "")
    if tokens and fraction != 1.0:
        raise ValueError("give config.label_fraction or config.label_tokens, not both")
    sources = []
    for name, weight in sorted(config.datasets.items()):
        dataset = dataset_named(name)
        records = record_source(config, name, config.data.train_split)
        chosen = None
        if tokens or fraction != 1.0:
            names = records.sample_tokens
            rule = config.get("label_rule", "hash")
            chosen = (
                listed_records(names, tokens) if tokens else label_subset(names, fraction, rule=rule, seed=config.seed)
            )
            logging.info("%s: labels of %d of %d key frames", name, len(chosen), len(records))
        sources.append(LidarSource(records, dataset, weight, chosen))
    return sources


def build_lidar_student(config: ml_collections.ConfigDict) -> tuple[ArrayTree, ArrayTree]:
    """First parameters and statistics: drawn from the experiment's seed, then what `config.initial_weights` says.

    That is a file of official weights, or the workdir of a run of ours; its head is taken only where this network has
    the same.

    Raises:
      CheckpointError, WorkdirError, WeightFileError, ValueError: cannot be read, or of another network.
    """
    student = make_lidar_student(config)
    parameters, statistics = jax.jit(lambda: split_model(WaffleIron(student.config, rngs=nnx.Rngs(config.seed)))[1:])()
    if not config.initial_weights:
        return parameters, statistics
    path = epath.Path(config.initial_weights)
    if path.is_dir():
        return _with_run(path, student, parameters, statistics)
    model = merge_model(student.graph, parameters, statistics)
    load_waffleiron(path, model, with_head=False)
    logging.info("the backbone is that of %s", path)
    return split_model(model)[1:]


def _with_run(
    workdir: epath.Path, student: LidarStudent, parameters: ArrayTree, statistics: ArrayTree
) -> tuple[ArrayTree, ArrayTree]:
    """The backbone of another run; the head stays as it is."""
    theirs = make_lidar_student(read_config(workdir))
    # Not grid_shapes: no array depends on them, and PandaSet is probed on larger grids of the same cells, as official.
    same = ("input_channels", "channels", "depth", "projection_axes", "norm", "activation")
    differing = [
        f"model.{name}: {getattr(theirs.config, name)}, here {getattr(student.config, name)}"
        for name in same
        if getattr(theirs.config, name) != getattr(student.config, name)
    ]
    if differing:
        raise ValueError(f"config.initial_weights={workdir} is of another backbone: {'; '.join(differing)}")

    def backbone(tree: ArrayTree) -> ArrayTree:
        return {name: part for name, part in tree.items() if name != "head"}

    wanted = {"parameters": backbone(parameters), "statistics": backbone(statistics)}
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restored: dict[str, Any] = checkpoints.restore(abstract, place)
    logging.info("the backbone is that of %s, step %d", workdir, checkpoints.latest_step())
    return parameters | restored["parameters"], statistics | restored["statistics"]
