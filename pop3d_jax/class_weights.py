"""Weights of the occupancy classes by their frequency in the records: the ENet rule, 1 / log(1.02 + share).

    python -m pop3d_jax.class_weights --config configs/pop3d_nuscenes.py --config.data.records=RECORDS

Official: `train.py`, `--compute-weights` (Paszke et al. 2016, section 5.2). The released recipe trains unweighted.
Prints the flag that gives the weights to a training, where config.json keeps them; --out writes the counts too.
"""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float, Int
from ml_collections import config_flags

from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.data.pipeline import evaluation_batches
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.experiment import example_settings, make_student
from pop3d_jax.labels import FREE, OCCUPIED, occupancy_tpvformer
from pop3d_jax.progress import progress

_BATCH = 8


def enet_weights(counts: Int[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    """1 / log(1.02 + share) of each class.

    Raises:
      ValueError: nothing was counted.
    """
    if counts.sum() == 0:
        raise ValueError("no voxels were counted: the split has no key frames")
    return 1.0 / np.log(1.02 + counts / counts.sum())


def count_voxels(config: ml_collections.ConfigDict, source: RecordSource) -> Int[np.ndarray, "2"]:
    """Free and occupied voxels of the training target over all key frames."""
    settings = example_settings(config, training=False, images=False)
    volume = make_student(config).volume
    targets = jax.jit(jax.vmap(lambda points, mask: occupancy_tpvformer(points, mask, volume)))
    counts = np.zeros(2, np.int64)
    batches = evaluation_batches(source, settings, batch_size=_BATCH)
    for batch in progress(batches, -(-len(source) // _BATCH), "counting voxels"):
        grids = np.asarray(targets(jnp.asarray(batch["points"]), jnp.asarray(batch["point_mask"])))[batch["valid"]]
        occupied = int((grids == OCCUPIED).sum())
        counts += np.array([grids.size - occupied, occupied])[[FREE, OCCUPIED]]
    return counts


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    config_flags.DEFINE_config_file("config", "configs/pop3d_nuscenes.py", "Experiment: its records, split and grid.")
    flags.DEFINE_string("out", None, "JSON file for counts and weights.")


def main(_: list[str]) -> None:
    config = flags.FLAGS.config
    with stop_with_message(RecordError, ValueError, FileNotFoundError):
        source = RecordSource(config.data.records, config.data.train_split)
        counts = count_voxels(config, source)
        weights = enet_weights(counts)
    if flags.FLAGS.out:
        epath.Path(flags.FLAGS.out).write_text(
            json.dumps(
                {
                    "rule": "1 / log(1.02 + share)",
                    "free_voxels": int(counts[FREE]),
                    "occupied_voxels": int(counts[OCCUPIED]),
                    "class_weights": weights.tolist(),
                    "key_frames": len(source),
                    "records_fingerprint": source.fingerprint,
                },
                indent=2,
            )
        )
    print(f"{counts[FREE]} free and {counts[OCCUPIED]} occupied voxels in {len(source)} key frames")
    print(f"--config.loss.class_weights='({weights[FREE]:.6f}, {weights[OCCUPIED]:.6f})'")


if __name__ == "__main__":
    _define_flags()
    run(main)
