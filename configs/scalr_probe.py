"""ScaLR's linear probing as published: the frozen backbone, BatchNorm and a linear head that starts from zero.

Cost as published: 20 epochs of 28,130 sweeps at batch 8. Not measured here. Scores: configs/scalr.py.

    python -m pop3d_jax.train --config configs/scalr_probe.py:nuscenes --config.data.records=RECORDS \\
        --config.initial_weights=WORKDIR_OR_FILE --workdir PROBE

One data set by name: nuscenes, semantic_kitti, pandar64, pandar_gt. The last two see twice as far, as official.
"""

import ml_collections

from configs import scalr
from pop3d_jax.lidar_datasets import LIDAR_DATASETS


def get_config(dataset: str = "nuscenes") -> ml_collections.ConfigDict:
    """Probing on one data set."""
    if dataset not in LIDAR_DATASETS:
        raise ValueError(f"unknown data set {dataset!r}: choose one of {tuple(LIDAR_DATASETS)}")
    config = scalr.get_config(dataset)
    config.task = "segmentation"
    config.train_backbone = False
    config.label_fraction = 1.0  # share of the key frames whose labels are used
    config.label_rule = "hash"  # how they are chosen: pop3d_jax.data.label_subsets
    config.label_tokens = ""  # or a file of sample tokens, one a line
    pandaset = dataset.startswith("pandar")
    config.epochs = 50.0 if pandaset else 20.0
    if pandaset:
        config.points.field_of_view = ((-128.0, -128.0, -8.0), (128.0, 128.0, 8.0))
        config.model.grid_shapes = ((512, 512), (512, 32), (512, 32))
    config.points.raw_capacity = 204_800 if pandaset else 131_072 if dataset == "semantic_kitti" else 40_960
    # Training keeps the nearest max_points; evaluation takes all that are left after thinning.
    config.points.capacity = config.points.raw_capacity
    config.model.output_channels = len(LIDAR_DATASETS[dataset].class_names)
    config.model.head = "probe"
    config.loss = ml_collections.ConfigDict({"lovasz": 1.0})
    config.optim.learning_rate = 1e-3
    config.optim.weight_decay = 0.003
    config.optim.warmup_steps = 0  # in epochs:
    config.optim.warmup_epochs = 2.0
    config.eval_every = 3516
    del config.teacher
    return config
