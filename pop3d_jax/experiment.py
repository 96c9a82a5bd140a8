"""From an experiment's configuration to the objects it names: volume, example settings, student network."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from flax import nnx

from pop3d_jax.data.pipeline import ExampleSettings, training_batches
from pop3d_jax.data.records import RecordSource
from pop3d_jax.images import network_images
from pop3d_jax.lidar_experiment import LidarStudent
from pop3d_jax.models.batch_norm import calibrate_batch_norm
from pop3d_jax.models.parameters import ArrayTree, merge_model, path_names, split_model
from pop3d_jax.models.pop3d import Pop3D, Pop3DConfig
from pop3d_jax.official_weights import state_dict_to_model
from pop3d_jax.pretrained import load_backbone
from pop3d_jax.torch_files import read_state_dict
from pop3d_jax.voxels import Volume

# How many key frames the calibration of the frozen BatchNorm looks at.
_CALIBRATION_FRAMES = 2


@dataclasses.dataclass(frozen=True)
class Student:
    """The student network without its arrays.

    Attributes:
      config: its sizes.
      graph: structure, for `merge_model`.
      abstract_parameters, abstract_statistics: shapes and types of its arrays.
      volume: where its voxels are: the grid of the outputs, finer than the planes' by `model.upscale`.
      is_frozen: which parameters do not train, by path.
    """

    config: Pop3DConfig
    graph: nnx.GraphDef
    abstract_parameters: ArrayTree
    abstract_statistics: ArrayTree
    volume: Volume
    is_frozen: Callable[[tuple[str, ...]], bool]


def example_settings(config: ml_collections.ConfigDict, *, training: bool, images: bool = True) -> ExampleSettings:
    """How an experiment turns key frames into arrays; only training needs the teacher's images, unless its features are
    cached."""
    data = config.data
    return ExampleSettings(
        image_hw=tuple(data.image_hw),
        teacher_image_hw=tuple(data.teacher_image_hw) if training and not config.teacher.cache else None,
        max_points=data.max_points,
        max_feature_points=data.max_feature_points,
        sample_feature_points=data.sample_feature_points if training else 0,
        volume_flip=training and data.volume_flip,
        volume_rotation=data.volume_rotation if training else 0.0,
        images=images,
    )


def model_config(config: ml_collections.ConfigDict) -> Pop3DConfig:
    """The network's sizes.

    Raises:
      ValueError: config.model has a field that the network does not know.
    """
    known = {field.name for field in dataclasses.fields(Pop3DConfig)}
    unknown = sorted(set(config.model) - known)
    if unknown:
        raise ValueError(f"unknown fields of config.model: {unknown}; known are {sorted(known)}")
    return Pop3DConfig(**config.model.to_dict())


def _is_position(path: tuple[str, ...]) -> bool:
    """What the encoder learns about places as such: the planes' queries and the positional encoding."""
    return path[0] == "encoder" and (path[1].startswith("tpv_embedding") or path[1] == "positional_encoding")


def frozen_by(
    frozen_stages: int, train_batch_norm: bool, learn_positions: bool = True
) -> Callable[[tuple[str, ...]], bool]:
    """Which parameters stay as they are.

    Args:
      frozen_stages: -1 none; 0 the backbone's stem; n also its first n stages (official: 1).
      train_batch_norm: whether scales and biases of BatchNorm train (official: no).
      learn_positions: whether queries and positional encoding train (official: yes).
    """

    def is_frozen(path: tuple[str, ...]) -> bool:
        if path[0] != "backbone":
            return not learn_positions and _is_position(path)
        inside = path[1:]
        is_norm = any(name.startswith("bn") for name in inside) or inside[-3:-1] == ("downsample", "1")
        if is_norm and not train_batch_norm:
            return True
        stage = int(inside[0].removeprefix("layer")) if inside[0].startswith("layer") else 0
        return stage <= frozen_stages

    return is_frozen


def make_student(config: ml_collections.ConfigDict) -> Student:
    """Structure of the student; costs no memory.

    Raises:
      ValueError: the experiment is one of a lidar network, or see `model_config`.
    """
    task = config.get("task", "occupancy")
    if task != "occupancy":
        raise ValueError(
            f"config.task is {task!r}, a lidar network, and this command is for POP-3D's: ask a distillation with "
            "query --lidar or evaluate --lidar --retrieval, judge a segmentation with evaluate_segmentation"
        )
    sizes = model_config(config)
    abstract = nnx.eval_shape(lambda: Pop3D(sizes, rngs=nnx.Rngs(0)))
    graph, parameters, statistics = split_model(abstract)
    grid = tuple(cells * factor for cells, factor in zip(sizes.grid_size, sizes.upscale, strict=True))
    volume = Volume(sizes.volume_minimum, sizes.volume_maximum, grid)
    is_frozen = frozen_by(config.frozen_stages, config.train_batch_norm, config.learn_positions)
    return Student(sizes, graph, parameters, statistics, volume, is_frozen)


def _with_weights(
    config: ml_collections.ConfigDict, graph: nnx.GraphDef, parameters: ArrayTree, statistics: ArrayTree
) -> tuple[ArrayTree, ArrayTree]:
    if config.initial_weights and config.initial_backbone:
        raise ValueError("give config.initial_weights (the whole network) or config.initial_backbone, not both")
    if config.calibrate_batch_norm:
        raise ValueError(
            "config.calibrate_batch_norm would overwrite the statistics of the weight file: set it to False"
        )
    model = merge_model(graph, parameters, statistics)
    if config.initial_weights:
        state_dict_to_model(read_state_dict(config.initial_weights), model)
        logging.info("all weights are those of %s", config.initial_weights)
    else:
        report = load_backbone(read_state_dict(config.initial_backbone), model)
        logging.info(
            "%d entries of backbone and neck are those of %s; not in it: %s; not used: %d entries",
            len(report["loaded"]),
            config.initial_backbone,
            ", ".join(report["initial"]) or "none",
            len(report["unused"]),
        )
    _, parameters, statistics = split_model(model)
    return parameters, statistics


def build_student(
    config: ml_collections.ConfigDict, source: RecordSource, settings: ExampleSettings
) -> tuple[ArrayTree, ArrayTree]:
    """Initial parameters and statistics: drawn from the experiment's seed, then what weight files say.

    Args:
      config: the experiment.
      source, settings: training data, looked at only when `config.calibrate_batch_norm` is set.

    Raises:
      WeightFileError, ValueError: a weight file cannot be read or is of another network.
    """
    sizes = model_config(config)
    graph = make_student(config).graph
    # One compiled program instead of hundreds of small ones.
    parameters, statistics = jax.jit(lambda: split_model(Pop3D(sizes, rngs=nnx.Rngs(config.seed)))[1:])()
    if config.initial_weights or config.initial_backbone:
        parameters, statistics = _with_weights(config, graph, parameters, statistics)
    if not config.learn_positions:
        parameters = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.zeros_like(leaf) if _is_position(path_names(path)) else leaf, parameters
        )
    if config.calibrate_batch_norm:
        logging.info("taking the BatchNorm statistics of the backbone from %d key frames", _CALIBRATION_FRAMES)
        still = dataclasses.replace(settings, teacher_image_hw=None)
        batches = training_batches(source, still, batch_size=1, seed=config.seed)
        images = np.concatenate([next(batches)["images"][0] for _ in range(_CALIBRATION_FRAMES)])
        model = merge_model(graph, parameters, statistics)
        calibrate_batch_norm(model.backbone, network_images(jnp.asarray(images)))
        _, parameters, statistics = split_model(model)
    return parameters, statistics


def restored_parts(student: Student | LidarStudent) -> dict[str, Any]:
    """What inference restores from a checkpoint: parameters and statistics, no optimiser."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        {"parameters": student.abstract_parameters, "statistics": student.abstract_statistics},
    )
