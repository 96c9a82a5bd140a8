"""POP-3D as a task: six images and a sweep in, occupancy and the teacher's features out."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding

from pop3d_jax.abstract_programs import (
    AbstractProgram,
    abstract_batch,
    abstract_state,
    blank_key_frame,
    on_every_device,
)
from pop3d_jax.data.pipeline import evaluation_batches, make_example, training_batches
from pop3d_jax.data.records import RecordSource
from pop3d_jax.data.teacher_cache import TeacherCache
from pop3d_jax.evaluator import Evaluator, headline
from pop3d_jax.experiment import build_student, example_settings, make_student
from pop3d_jax.grids.selection import configured_selection
from pop3d_jax.images import network_images
from pop3d_jax.models.parameters import merge_model
from pop3d_jax.nuscenes import CAMERAS
from pop3d_jax.program import number_of_steps, training_program
from pop3d_jax.schedules import make_schedule
from pop3d_jax.sharding import partition_spec, replicated
from pop3d_jax.step import State, initial_state
from pop3d_jax.tasks.task import Task
from pop3d_jax.teacher import Teacher, abstract_teacher, check_text_side, load_teacher, teacher_fingerprint


def occupancy_task(config: ml_collections.ConfigDict, workdir: epath.Path, mesh: Mesh) -> Task:
    """Loads the teacher and prepares the step.

    Args:
      config: an experiment such as configs/pop3d_nuscenes.py.
      workdir: of the run; keeps text vectors.
      mesh: devices.

    Raises:
      RecordError, WeightFileError, FileNotFoundError, ValueError: see the messages.
    """
    configured_selection(config)  # refused now, not when the run is to be exported
    if config.eval_every:  # before the first step, not at the first evaluation
        check_text_side(config.teacher, "set --config.eval_every=0 to train without evaluation")
    source = RecordSource(config.data.records, config.data.train_split)
    settings = example_settings(config, training=True)
    total_steps = number_of_steps(config, len(source))
    teacher = load_teacher(config.teacher)
    cache = _teacher_cache(config, teacher, source)
    program = training_program(config, teacher, total_steps, mesh)

    def make_state() -> State:
        parameters, statistics = jax.device_get(build_student(config, source, settings))
        return jax.device_put(initial_state(parameters, statistics, program.optimizer), program.shardings)

    def batches(first_step: int):
        return training_batches(
            source,
            settings,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=first_step,
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=config.data.workers,
            cache=cache,
        )

    evaluator: list[Evaluator] = []

    def evaluate(state: State) -> dict[str, float]:
        if not evaluator:  # made at the first use: it embeds the classes' prompts
            evaluator.append(Evaluator(program.student, teacher.clip, mesh, text_cache=workdir / "text_cache"))
        held_out = RecordSource(config.data.records, config.data.eval_split)
        results = evaluator[0].run(
            state["parameters"],
            state["statistics"],
            evaluation_batches(
                held_out,
                example_settings(config, training=False),
                batch_size=config.eval_batch_size,
                host=jax.process_index(),
                hosts=jax.process_count(),
                workers=config.data.workers,
            ),
            -(-len(held_out) // config.eval_batch_size),
        )
        return headline(results)

    return Task(
        key_frames=len(source),
        total_steps=total_steps,
        fingerprints={config.data.train_split: source.fingerprint},
        step=program.step,
        # With a cache the teacher only names the text space; its arrays stay off the devices.
        constants={} if cache else jax.device_put(teacher.parameters, replicated(mesh)),
        abstract_state=program.abstract_state,
        shardings=program.shardings,
        make_state=make_state,
        batches=batches,
        host_arrays=("record_index",),
        sample_tokens=lambda arrays: [source.sample_tokens[index] for index in arrays["record_index"]],
        capacities={
            "points_left_out": "config.data.max_points",
            "feature_points_left_out": "config.data.max_feature_points",
        },
        learning_rate=make_schedule(config.optim, config.optim.learning_rate, total_steps),
        terms=("cross_entropy", "lovasz", "feature"),
        evaluate=evaluate,
    )


def abstract_training(config: ml_collections.ConfigDict, mesh: Mesh, steps: int) -> AbstractProgram:
    """The training step, with the teacher in it or, where the configuration names a cache, its features.

    Raises:
      FileNotFoundError, ValueError: see `abstract_teacher` and `training_program`.
    """
    teacher = abstract_teacher(config.teacher)
    program = training_program(config, teacher, steps, mesh)
    batch = _abstract_batch(config, mesh, training=True)
    if config.teacher.cache:
        shape = (config.batch_size, config.data.max_feature_points, teacher.feature_dim)
        place = NamedSharding(mesh, partition_spec("batch"))
        batch["feature_targets"] = jax.ShapeDtypeStruct(shape, jnp.float16, sharding=place)
    constants = {} if config.teacher.cache else on_every_device(teacher.parameters, mesh)
    return AbstractProgram("training step", program.step, (abstract_state(program), batch, constants))


def abstract_inference(config: ml_collections.ConfigDict, mesh: Mesh) -> AbstractProgram:
    """Occupancy and the features of every voxel from images."""
    student = make_student(config)

    def predict(parameters: Any, statistics: Any, images: jax.Array, lidar_to_image: jax.Array) -> Any:
        output = merge_model(student.graph, parameters, statistics)(network_images(images), lidar_to_image)
        return output.occupancy_logits, output.voxel_features

    batch = _abstract_batch(config, mesh, training=False)
    arguments = (
        *on_every_device((student.abstract_parameters, student.abstract_statistics), mesh),
        batch["images"],
        batch["lidar_to_image"],
    )
    function = jax.jit(predict, out_shardings=NamedSharding(mesh, partition_spec("batch")))
    return AbstractProgram("inference step", function, arguments)


def describe_sizes(config: ml_collections.ConfigDict) -> str:
    """Images and grid."""
    image, grid = ("x".join(map(str, sizes)) for sizes in (config.data.image_hw, config.model.grid_size))
    return f"images {image}, grid {grid}"


def _abstract_batch(config: ml_collections.ConfigDict, mesh: Mesh, *, training: bool) -> dict:
    example = make_example(blank_key_frame(len(CAMERAS)), example_settings(config, training=training), None)
    return abstract_batch(example, config.batch_size, mesh)


def _teacher_cache(config: ml_collections.ConfigDict, teacher: Teacher, source: RecordSource) -> TeacherCache | None:
    """The features that the configuration names, checked to be this teacher's; None where it runs in the step."""
    if not config.teacher.cache:
        return None
    cache = TeacherCache(config.teacher.cache, config.data.train_split, source.fingerprint)
    same_settings = all(
        cache.index.teacher.get(name) == value
        for name, value in (
            ("name", config.teacher.name),
            ("variant", config.teacher.variant),
            ("feature", config.teacher.get("feature")),
            ("image_hw", list(config.data.teacher_image_hw)),
        )
    )
    if not same_settings or cache.index.teacher_fingerprint != teacher_fingerprint(teacher):
        raise ValueError(
            f"the features in {config.teacher.cache} are of another teacher ({cache.index.teacher}) than "
            f"{config.teacher.path}, variant {config.teacher.variant}, at {config.data.teacher_image_hw}: make "
            "them again with data_prep.teacher_features, into another folder"
        )
    logging.info("the teacher's features are those of %s", config.teacher.cache)
    return cache
