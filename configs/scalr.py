"""ScaLR's distillation as published (CVPR 2024): DINOv2 ViT-L/14 into WaffleIron WI-48-768, four data sets.

Cost as published: 25 epochs of 55,100 sweeps at batch 8, 172,175 steps. Not measured here.
Score as published by its authors for the distilled backbone, linear probing: 67.8 mIoU on nuScenes, 55.8 on
SemanticKITTI, 37.9 on Pandar64, 34.5 on PandarGT. Not measured here: it needs the data sets and DINOv2's weights.

    python -m data_prep.build --dataset nuscenes --source NUSCENES --version v1.0-trainval --split train \\
        --out RECORDS/nuscenes
    python -m data_prep.build --dataset semantic_kitti --source KITTI --split train --out RECORDS/semantic_kitti
    python -m data_prep.build --dataset pandar64 --source PANDASET --split train --out RECORDS/pandar64
    python -m data_prep.build --dataset pandar_gt --source PANDASET --split train --out RECORDS/pandar_gt
    python -m pop3d_jax.train --config configs/scalr.py --config.data.records=RECORDS --workdir WORKDIR

The three pillars of the paper are fields: the backbone's size (model.channels, model.depth), the teacher (teacher.name,
teacher.path) and the mixture (datasets; equal weights are the official plain concatenation). By name:

    --config configs/scalr.py:nuscenes     nuScenes alone
    --config configs/scalr.py:256          WI-48-256; also 384, 512
"""

import ml_collections

_DATASETS = ("nuscenes", "semantic_kitti", "pandar64", "pandar_gt")
_CHANNELS = ("256", "384", "512", "768")


def get_config(option: str = "768") -> ml_collections.ConfigDict:
    """The published experiment.

    Args:
      option: a number of channels, or the only data set.
    """
    if option not in (*_DATASETS, *_CHANNELS):
        raise ValueError(f"unknown option {option!r}: choose one of {(*_CHANNELS, *_DATASETS)}")
    config = ml_collections.ConfigDict()
    config.task = "distillation"
    config.seed = 0
    config.batch_size = 8
    config.epochs = 25.0
    config.total_steps = 0  # above 0 it takes the place of epochs
    # Data set: weight. All equal: every record of the union once an epoch, as official.
    config.datasets = ml_collections.ConfigDict({name: 1.0 for name in _DATASETS if option in (name, *_CHANNELS)})

    config.data = ml_collections.ConfigDict()
    config.data.records = "records"  # a folder for each data set below it, by its name
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.workers = 8

    config.points = ml_collections.ConfigDict()  # pop3d_jax.data.lidar_examples.LidarSettings
    config.points.capacity = 20_000
    config.points.raw_capacity = 40_960
    config.points.max_points = 20_000
    config.points.voxel_size = 0.1
    config.points.field_of_view = ((-64.0, -64.0, -8.0), (64.0, 64.0, 8.0))
    config.points.neighbors = 16
    config.points.neighbor_search = "kd_tree"  # in the workers; "all_pairs": in the step
    config.points.image_hw = (224, 448)
    config.points.antialias = False  # as torchvision did when the weights were published

    config.model = ml_collections.ConfigDict()  # pop3d_jax.models.waffleiron.WaffleIronConfig
    config.model.channels = int(option) if option in _CHANNELS else 768
    config.model.depth = 48
    config.model.grid_shapes = ((256, 256), (256, 32), (256, 32))
    config.model.projection_axes = (2, 1, 0)
    config.model.output_channels = 1024
    config.model.norm = "layernorm"
    config.model.activation = "relu"
    config.model.head = "linear"
    config.model.drop_path = 0.0
    config.model.remat = "all"  # of the embedding and each block; or "none"
    config.model.compute_dtype = "float32"
    config.initial_weights = ""  # a workdir of ours, or an official file, to start the backbone from

    config.teacher = ml_collections.ConfigDict()
    config.teacher.name = "dinov2"  # or "maskclip", "maskclip_plus"
    config.teacher.path = "facebook/dinov2-large"  # a hub name or a local Hugging Face folder
    config.teacher.variant = "official"  # position embedding as the official code samples it, or "transformers"
    config.teacher.weights = ""

    config.optim = ml_collections.ConfigDict()
    config.optim.name = "adamw"
    config.optim.schedule = "warmup_cosine"
    config.optim.learning_rate = 2e-3
    config.optim.weight_decay = 0.03  # of everything, norms and biases too, as official
    config.optim.betas = (0.9, 0.999)
    config.optim.epsilon = 1e-8
    config.optim.clip_norm = 0.0
    config.optim.layer_decay = 0.0
    config.optim.warmup_steps = 3500
    config.optim.final_learning_rate = 1e-5

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1
    config.mesh.camera = 1
    config.mesh.shard_optimizer = False

    config.log_every = 50
    config.checkpoint_every = 1000
    config.keep_checkpoints = 2
    config.eval_every = 0  # distillation has nothing to judge: probe it
    config.eval_batch_size = 8
    return config
