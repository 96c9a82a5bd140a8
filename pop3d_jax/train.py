"""Trains POP-3D: python -m pop3d_jax.train --config configs/demo.py --workdir WORKDIR

Any field of the configuration can be given on the command line: --config.optim.learning_rate=1e-4
The same command resumes a run that was stopped: it goes on from the newest checkpoint with the numbers that an
unbroken run would have had. WORKDIR holds config.json, manifest.json, metrics.jsonl, tensorboard/, checkpoints/.
"""

import collections
import json
import math
import sys
import time
from collections.abc import Callable, Sequence

import jax
import ml_collections
from absl import flags, logging
from etils import epath
from flax import nnx
from ml_collections import config_flags

from pop3d_jax import workdir as workdirs
from pop3d_jax.checkpoint import CheckpointError, Checkpoints
from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.data.pipeline import ExampleSettings, evaluation_batches, training_batches
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.data.teacher_cache import TeacherCache
from pop3d_jax.evaluator import Evaluator, headline
from pop3d_jax.experiment import build_student, example_settings
from pop3d_jax.grids.selection import configured_selection
from pop3d_jax.hosts import STOPPED_STATUS, StopRequest, join_hosts
from pop3d_jax.optim import cosine_with_warmup
from pop3d_jax.program import number_of_steps, training_program
from pop3d_jax.progress import progress
from pop3d_jax.sharding import make_mesh, replicated, shard_batch
from pop3d_jax.step import initial_state
from pop3d_jax.teacher import Teacher, load_teacher, teacher_fingerprint
from pop3d_jax.torch_files import WeightFileError


class StoppedError(Exception):
    """Training was told to stop and has saved its state; the message names the checkpoint."""


class NonFiniteLossError(Exception):
    """The loss is NaN or infinite; the message names the step, its sample tokens and the last good checkpoint."""


def train(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    stop_after: int | None = None,
    *,
    profile_steps: range = range(0),
    should_stop: Callable[[int], bool] = lambda step: False,
) -> dict[str, float]:
    """Trains, or goes on training, until the configured number of steps.

    Args:
      config: the experiment.
      workdir: folder of the run.
      stop_after: stop early, when this many steps are done.
      profile_steps: a trace of these steps goes to `profile/` in the workdir (TensorBoard and Perfetto read it).
      should_stop: asked after every step whether to save and stop, see `StopRequest.at`.

    Returns:
      The metrics of the last step logged.

    Raises:
      StoppedError: `should_stop` said so; the state is saved.
      NonFiniteLossError: the loss is no longer finite.
      WorkdirError, CheckpointError, RecordError, ValueError: see the messages.
    """
    workdir = epath.Path(workdir)
    configured_selection(config)  # refused now, not when the run is to be exported

    # ------------------------------------------------------------------------------------------ data
    mesh = make_mesh(config.mesh.data, config.mesh.camera)
    source = RecordSource(config.data.records, config.data.train_split)
    total_steps = number_of_steps(config, len(source))
    last_step = min(total_steps, stop_after or total_steps)
    settings: ExampleSettings = example_settings(config, training=True)
    logging.info(
        "%d key frames, batch %d, %d steps (%.1f epochs), mesh %s",
        len(source),
        config.batch_size,
        total_steps,
        total_steps * config.batch_size / len(source),
        dict(mesh.shape),
    )

    # ------------------------------------------------------------------------------ teacher, program
    teacher = load_teacher(config.teacher)
    cache = _teacher_cache(config, teacher, source)
    # With a cache the teacher only names the text space; its arrays stay off the devices.
    teacher_parameters = {} if cache else jax.device_put(teacher.parameters, replicated(mesh))
    program = training_program(config, teacher, total_steps, mesh)
    student = program.student
    schedule = cosine_with_warmup(
        config.optim.learning_rate,
        total_steps=total_steps,
        warmup_steps=config.optim.warmup_steps,
        warmup_start=config.optim.warmup_start,
        final=config.optim.final_learning_rate,
    )

    # ----------------------------------------------------------------------------------------- state
    workdirs.prepare(workdir, config)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
    first_step = checkpoints.latest_step()
    if first_step is not None:
        logging.info("resuming from the checkpoint of step %d", first_step)
        state = checkpoints.restore(program.abstract_state, program.shardings)
    else:
        first_step = 0
        parameters, statistics = jax.device_get(build_student(config, source, settings))
        state = jax.device_put(initial_state(parameters, statistics, program.optimizer), program.shardings)
    count = sum(leaf.size for leaf in jax.tree.leaves(state["parameters"]))
    logging.info("%.2f million parameters", count / 1e6)
    workdirs.write_manifest(
        workdir,
        seed=config.seed,
        data={config.data.train_split: source.fingerprint},
        step=first_step,
    )

    # ------------------------------------------------------------------------------------- the input
    evaluator = None
    batches = training_batches(
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
    writer = workdirs.MetricWriter(workdir, first_step)
    # Metrics are read one step late, so that the device never waits for the host.
    pending: collections.deque = collections.deque()
    logged: dict[str, float] = {}
    left_out = 0

    def check_finite() -> dict[str, float]:
        step, metrics, indices = pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(values["total"]) or not math.isfinite(values["gradient_norm"]):
            tokens = [source.sample_tokens[index] for index in indices]
            checkpoints.wait()
            good = checkpoints.latest_step()
            raise NonFiniteLossError(
                f"the loss of step {step} is not finite: {values}\n  sample tokens of the batch: {tokens}\n"
                f"  last good checkpoint: {'none' if good is None else f'{checkpoints.directory}/{good}'}\n"
                "Lower --config.optim.learning_rate or look at these samples, then start the command again."
            )
        return values

    # ------------------------------------------------------------------------------------------ loop
    clock, clock_step = time.monotonic(), first_step
    for step in progress(range(first_step, last_step), last_step - first_step, "training"):
        if step in profile_steps and step == max(profile_steps.start, first_step):
            jax.profiler.start_trace(str(workdir / "profile"))
        batch = next(batches)
        indices = batch.pop("record_index")
        left_out += int(batch.pop("points_left_out").sum() + batch.pop("feature_points_left_out").sum())
        device_batch = shard_batch(batch, mesh)
        with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
            state, metrics = program.step(state, device_batch, teacher_parameters)
        pending.append((step, metrics, indices))
        if len(pending) > 1:
            check_finite()
        done = step + 1
        stopping = should_stop(step) and done < last_step
        if step in profile_steps and done in (profile_steps.stop, last_step):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            logging.info("trace of steps %d to %d: %s", profile_steps.start, step, workdir / "profile")

        if done % config.log_every == 0 or done == last_step:
            logged = check_finite()
            seconds = (time.monotonic() - clock) / (done - clock_step)
            clock, clock_step = time.monotonic(), done
            values = {f"train/{name}": value for name, value in logged.items()} | {
                "train/learning_rate": float(schedule(step)),
                "train/seconds_per_step": seconds,
                "train/points_left_out": left_out,
            }
            writer.write(done, values)
            logging.info(
                "step %d: loss %.4f (cross entropy %.4f, lovasz %.4f, feature %.5f), %.2f s a step",
                done,
                *(logged[name] for name in ("total", "cross_entropy", "lovasz", "feature")),
                seconds,
            )
        if config.eval_every and (done % config.eval_every == 0 or done == last_step):
            evaluator = evaluator or Evaluator(student, teacher.clip, mesh, workdir / "text_cache")
            eval_source = RecordSource(config.data.records, config.data.eval_split)
            results = evaluator.run(
                state["parameters"],
                state["statistics"],
                evaluation_batches(
                    eval_source,
                    example_settings(config, training=False),
                    batch_size=config.eval_batch_size,
                    host=jax.process_index(),
                    hosts=jax.process_count(),
                    workers=config.data.workers,
                ),
                -(-len(eval_source) // config.eval_batch_size),
            )
            scores = headline(results)
            writer.write(done, {f"eval/{name}": value for name, value in scores.items()})
            logging.info("step %d: %s", done, ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            clock, clock_step = time.monotonic(), done
        if done % config.checkpoint_every == 0 or done == last_step or stopping:
            if pending:
                check_finite()  # what is not finite is not saved
            checkpoints.save(done, state, json.loads(config.to_json()))
        if stopping:
            checkpoints.close()
            writer.close()
            raise StoppedError(
                f"told to stop: {checkpoints.directory}/{done} is saved, the same command goes on from there"
            )

    # ------------------------------------------------------------------------------------------- end
    checkpoints.close()
    writer.close()
    if left_out:
        logging.warning(
            "%d points did not fit into the capacities and were left out: raise config.data.max_points or "
            "config.data.max_feature_points",
            left_out,
        )
    logging.info("checkpoint: %s/%d", checkpoints.directory, last_step)
    return logged


def _teacher_cache(config: ml_collections.ConfigDict, teacher: Teacher, source: RecordSource) -> TeacherCache | None:
    """The features that the configuration names, checked to be this teacher's; None where it runs in the step."""
    if not config.teacher.cache:
        return None
    cache = TeacherCache(config.teacher.cache, config.data.train_split, source.fingerprint)
    same_settings = all(
        cache.index.teacher[name] == value
        for name, value in (
            ("name", config.teacher.name),
            ("variant", config.teacher.variant),
            ("image_hw", list(config.data.teacher_image_hw)),
        )
    )
    if not same_settings or cache.index.teacher_fingerprint != teacher_fingerprint(teacher):
        raise ValueError(
            f"the features in {config.teacher.cache} are of another teacher ({cache.index.teacher}) than "
            f"{config.teacher.path}, variant {config.teacher.variant}, at {config.data.teacher_image_hw}: make "
            "them again with data_prep.teacher_features, into another folder"
        )
    return cache


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    config_flags.DEFINE_config_file("config", None, "Experiment file, e.g. configs/demo.py.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://.")
    flags.DEFINE_integer(
        "stop_after",
        None,
        "Stop (with a checkpoint) when this many steps are done; the schedule stays that of the config.",
    )
    flags.DEFINE_list(
        "profile_steps",
        None,
        "First step and the one behind the last, for example 10,13: a trace of them goes to profile/ in the workdir.",
    )
    flags.DEFINE_bool(
        "compile_only",
        False,
        "Compile the training and the inference step for --topology and print what each chip needs; nothing is read or "
        "run, and --workdir is not needed. Exit status 1 where it does not fit.",
    )
    flags.DEFINE_string("topology", "v5e:2x2", "TPU to compile for: v5e:4x4, v5p:2x2x2, v6e:16x16, ...")


def main(_: list[str]) -> None:
    nnx.use_eager_sharding(False)
    with stop_with_message(
        NonFiniteLossError,
        workdirs.WorkdirError,
        CheckpointError,
        RecordError,
        WeightFileError,
        ValueError,
        FileNotFoundError,
    ):
        if flags.FLAGS.compile_only:
            _compile_only(flags.FLAGS.config, flags.FLAGS.topology)
        else:
            if not flags.FLAGS.workdir:
                raise ValueError("give the folder of the run with --workdir")
            join_hosts()
            if jax.process_count() > 1:
                logging.info("process %d of %d", jax.process_index(), jax.process_count())
            profile_steps = parse_profile_steps(flags.FLAGS.profile_steps)
            try:
                with StopRequest() as stop:
                    train(
                        flags.FLAGS.config,
                        flags.FLAGS.workdir,
                        flags.FLAGS.stop_after,
                        profile_steps=profile_steps,
                        should_stop=stop.at,
                    )
            except StoppedError as stopped:
                logging.info("%s", stopped)
                sys.exit(STOPPED_STATUS)


def parse_profile_steps(values: Sequence[str] | None) -> range:
    """The steps of `--profile_steps 10,13`: 10, 11 and 12.

    Raises:
      ValueError: not two whole numbers in order.
    """
    if not values:
        return range(0)
    if len(values) != 2 or not all(value.strip().isdigit() for value in values) or int(values[0]) >= int(values[1]):
        raise ValueError(
            f"--profile_steps={','.join(values)} must be the first step and the one behind the last: 10,13"
        )
    return range(*map(int, values))


def _compile_only(config: ml_collections.ConfigDict, topology: str) -> None:
    # The compiler needs no device; with libtpu installed JAX would look for one.
    jax.config.update("jax_platforms", "cpu")
    from pop3d_jax import compile_report

    programs = compile_report.compile_programs(config, topology)
    print(compile_report.format_report(programs, topology, config))
    if not compile_report.fits(programs, topology):
        sys.exit(1)


if __name__ == "__main__":
    _define_flags()
    flags.mark_flags_as_required(["config"])
    run(main)
