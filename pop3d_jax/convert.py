"""Between official weights and our runs, strictly: every key has its place, or there is an error.

    python -m pop3d_jax.convert --from_torch pop3d_weights.pth --out WORKDIR
    python -m pop3d_jax.convert --to_torch weights.safetensors --workdir WORKDIR

The second takes runs of ScaLR's tasks too; their training starts from an official file by config.initial_weights, so
the first is not needed there. Files that end in .safetensors need no PyTorch, all others do (pip install torch).
Weights of a network of other sizes need its experiment: --config configs/x.py --config.model.embed_dims=128.
"""

import json
from collections.abc import Mapping

import ml_collections
import numpy as np
from absl import flags
from etils import epath
from flax import nnx
from ml_collections import config_flags

from pop3d_jax.checkpoint import CheckpointError, Checkpoints
from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.experiment import make_student, restored_parts
from pop3d_jax.lidar_experiment import make_lidar_student
from pop3d_jax.models.parameters import merge_model, split_model
from pop3d_jax.models.pop3d import Pop3D
from pop3d_jax.models.waffleiron_weights import waffleiron_to_state_dict
from pop3d_jax.official_weights import model_to_state_dict, state_dict_to_model
from pop3d_jax.optim import make_optimizer, parameter_groups
from pop3d_jax.sharding import make_mesh, replicated
from pop3d_jax.step import initial_state
from pop3d_jax.torch_files import WeightFileError, read_state_dict, write_state_dict
from pop3d_jax.workdir import WorkdirError, prepare, read_config, write_manifest


def weights_to_workdir(
    state_dict: Mapping[str, np.ndarray], config: ml_collections.ConfigDict, workdir: epath.PathLike, source: str
) -> None:
    """Writes official weights as a run of step 0: `evaluate`, `query` and `train` take the folder.

    Args:
      state_dict: under official names.
      config: the experiment that the network belongs to; training goes on with its schedule from the beginning.
      workdir: a new folder.
      source: where the weights come from, for the manifest.

    Raises:
      ValueError: the weights are not of the config's network; nothing is written then.
      WorkdirError: the folder holds a run already.
    """
    workdir = epath.Path(workdir)
    if config.get("task", "occupancy") != "occupancy":
        raise ValueError(
            f"config.task = {config.task!r}: official weights of a lidar network are where training starts from, "
            "--config.initial_weights=FILE"
        )
    if (workdir / "checkpoints").exists():
        raise WorkdirError(f"{workdir} holds checkpoints already: give --out a new folder")
    student = make_student(config)
    model = nnx.eval_shape(lambda: Pop3D(student.config, rngs=nnx.Rngs(0)))
    state_dict_to_model(state_dict, model)
    _, parameters, statistics = split_model(model)
    groups = parameter_groups(parameters, student.is_frozen)
    # The schedule's length does not touch the optimiser's first state.
    optimizer = make_optimizer(config.optim, 1, groups)
    prepare(workdir, config)
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(0, initial_state(parameters, statistics, optimizer), json.loads(config.to_json()))
    checkpoints.close()
    write_manifest(workdir, seed=config.seed, data={"weights": source}, step=0)


def workdir_to_weights(workdir: epath.PathLike, step: int | None = None) -> dict[str, np.ndarray]:
    """The weights of a run's checkpoint (the newest by default) under official names: POP-3D's, or WaffleIron's.

    Raises:
      WorkdirError, CheckpointError: nothing to read.
    """
    config = read_config(workdir)
    is_lidar = config.get("task", "occupancy") != "occupancy"
    student = make_lidar_student(config) if is_lidar else make_student(config)
    checkpoints = Checkpoints(epath.Path(workdir) / "checkpoints", read_only=True)
    restored = checkpoints.restore(restored_parts(student), replicated(make_mesh()), step)
    model = merge_model(student.graph, restored["parameters"], restored["statistics"])
    return waffleiron_to_state_dict(model) if is_lidar else model_to_state_dict(model)


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    flags.DEFINE_string("from_torch", None, "Official weights to read: .pth or .safetensors.")
    flags.DEFINE_string("out", None, "With --from_torch: new folder of a run for evaluate, query and train.")
    config_flags.DEFINE_config_file(
        "config", "configs/pop3d_nuscenes.py", "With --from_torch: the experiment of these weights."
    )
    flags.DEFINE_string("to_torch", None, "File of official names to write: .pth or .safetensors.")
    flags.DEFINE_string("workdir", None, "With --to_torch: folder of the run to read.")
    flags.DEFINE_integer("step", None, "With --to_torch: which checkpoint; the newest by default.")


def main(_: list[str]) -> None:
    given = flags.FLAGS
    with stop_with_message(WeightFileError, WorkdirError, CheckpointError, ValueError, FileNotFoundError):
        if given.from_torch and given.out and not given.to_torch:
            state = read_state_dict(given.from_torch)
            weights_to_workdir(state, given.config, given.out, given.from_torch)
            print(f"{len(state)} entries of {given.from_torch} are checkpoint 0 of the run {given.out}")
        elif given.to_torch and given.workdir and not given.from_torch:
            state = workdir_to_weights(given.workdir, given.step)
            write_state_dict(given.to_torch, state)
            print(f"{len(state)} entries of {given.workdir} are in {given.to_torch}")
        else:
            raise ValueError(
                "give either --from_torch FILE --out FOLDER or --to_torch FILE --workdir FOLDER; see --help"
            )


if __name__ == "__main__":
    _define_flags()
    run(main)
