"""Trains and evaluates the same small experiment on several meshes of simulated devices: for `test_meshes.py`.

python tests/mesh_worker.py CONFIG.json OUT.npz CHECKPOINTS
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from pop3d_jax.checkpoint import Checkpoints
from pop3d_jax.data.pipeline import evaluation_batches, training_batches
from pop3d_jax.data.records import RecordSource
from pop3d_jax.evaluator import Evaluator
from pop3d_jax.experiment import build_student, example_settings
from pop3d_jax.images import draw_photometric, network_images
from pop3d_jax.program import training_program
from pop3d_jax.sharding import make_mesh, replicated, shard_batch
from pop3d_jax.step import initial_state
from pop3d_jax.teacher import load_teacher
from pop3d_jax.workdir import config_from_json

STEPS = 5
MOVED_AT = 2


def parse(meshes: str) -> list[tuple[int, int]]:
    return [tuple(int(size) for size in mesh.split("x")) for mesh in meshes.split(",")]


@jax.jit
def distorted(images):
    """Network input as the training step makes it with photometric distortion."""
    return network_images(images, draw_photometric(jax.random.key(0), images.shape[:2]))


def main(config_file: str, out: str, checkpoint_folder: str, meshes: str, moved: str = "") -> None:
    config = config_from_json(Path(config_file).read_text())
    source = RecordSource(config.data.records, "train")
    settings = example_settings(config, training=True)
    teacher = load_teacher(config.teacher)
    stream = training_batches(source, settings, batch_size=config.batch_size, seed=config.seed)
    batches = [next(stream) for _ in range(STEPS)]
    parameters, statistics = jax.device_get(build_student(config, source, settings))
    held_out = RecordSource(config.data.records, "val")
    arrays: dict[str, np.ndarray] = {}

    def prepared(mesh):
        return training_program(config, teacher, STEPS, mesh)

    def run(program, mesh, state, steps):
        losses = []
        whole_teacher = jax.device_put(teacher.parameters, replicated(mesh))
        for batch in steps:
            names = ("record_index", "points_left_out", "feature_points_left_out")
            sharded = shard_batch({k: v for k, v in batch.items() if k not in names}, mesh)
            with jax.set_mesh(mesh):
                state, metrics = program.step(state, sharded, whole_teacher)
            losses.append(float(metrics["total"]))
        return state, losses

    for shape in parse(meshes):
        name = "x".join(map(str, shape))
        mesh = make_mesh(*shape, jax.devices()[: shape[0] * shape[1]])
        config.mesh.shard_optimizer = shape != (1, 1)
        program = prepared(mesh)
        start = jax.device_put(initial_state(parameters, statistics, program.optimizer), program.shardings)
        state, losses = run(program, mesh, start, batches)
        arrays[f"{name}/losses"] = np.array(losses)
        with jax.set_mesh(mesh):
            images = distorted(shard_batch({"images": batches[0]["images"]}, mesh)["images"])
        arrays[f"{name}/distorted"] = np.asarray(images)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state["parameters"]):
            arrays[f"{name}/parameters{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
        moments = [leaf for leaf in jax.tree.leaves(state["optimizer"]) if leaf.size >= 2**14]
        shares = [leaf.addressable_shards[0].data.size / leaf.size for leaf in moments]
        arrays[f"{name}/largest_share_of_optimizer"] = np.array(max(shares))
        results = Evaluator(program.student, teacher.clip, mesh).run(
            # The same parameters on every mesh, so that only the evaluation may differ.
            *jax.device_put((parameters, statistics), replicated(mesh)),
            evaluation_batches(held_out, example_settings(config, training=False), batch_size=8),
            -(-len(held_out) // 8),
        )
        for field in ("occupancy", "voxels_all", "points"):
            arrays[f"{name}/confusion_{field}"] = getattr(results, field)

    if moved:
        config.mesh.shard_optimizer = True
        first, second = (make_mesh(*shape, jax.devices()[: shape[0] * shape[1]]) for shape in parse(moved))
        program = prepared(first)
        start = jax.device_put(initial_state(parameters, statistics, program.optimizer), program.shardings)
        state, losses = run(program, first, start, batches[:MOVED_AT])
        checkpoints = Checkpoints(checkpoint_folder)
        checkpoints.save(MOVED_AT, state, json.loads(config.to_json()))
        checkpoints.wait()
        program = prepared(second)
        state = checkpoints.restore(program.abstract_state, program.shardings)
        _, rest = run(program, second, state, batches[MOVED_AT:])
        arrays["moved/losses"] = np.array(losses + rest)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
