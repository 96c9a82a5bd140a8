"""The demo: the published architecture made small, on the synthetic world, with the tiny CLIP as teacher.

Cost: 1200 steps on two cores, 7 min 36 s (0.38 s a step); all of `make demo` took 13 min 31 s, installation included.
Score on 40 held-out scenes of the synthetic world: occupancy IoU over all voxels 27.69, 1.34 times that of the best
constant grid (observed voxels only: 34.12, 1.02 times); zero-shot mIoU at occupied voxels 28.43, 7.5 times that of
shuffled class words.

    make demo
"""

import ml_collections

from configs import pop3d_nuscenes


def get_config() -> ml_collections.ConfigDict:
    """A network small enough for two processor cores."""
    config = pop3d_nuscenes.get_config()
    config.batch_size = 1
    config.total_steps = 1200

    config.data.records = "demo/records"
    config.data.image_hw = (144, 256)
    config.data.teacher_image_hw = (144, 256)  # what the tiny CLIP was trained at
    config.data.max_feature_points = 8192
    config.data.sample_feature_points = 8192
    config.data.workers = 0
    config.data.photometric = False
    config.data.volume_flip = True  # few scenes: without these two they are learned by heart
    config.data.volume_rotation = 15.0
    config.data.swap_channels = False  # the demo's phrases name colours

    config.model.backbone_depth = 50
    config.model.backbone_blocks = (1, 1, 2, 1)
    config.model.backbone_width = 16
    config.model.grid_size = (50, 50, 8)
    config.model.embed_dims = 48
    config.model.num_heads = 2
    config.model.num_layers = 2
    config.model.cross_attention_anchors = (4, 8, 8)
    config.model.cross_attention_points = (4, 8, 8)
    config.model.feedforward_dims = 96
    config.model.hidden_dims = 96
    config.model.out_dims = 96
    config.model.feature_dim = 64
    config.model.feature_hidden_dims = 128
    config.model.feature_out_dims = 128
    config.model.dropout = 0.0
    config.model.grid_mask = False
    config.model.remat = "none"

    # No pretrained backbone here: everything trains, from calibrated statistics.
    config.calibrate_batch_norm = True
    config.frozen_stages = -1
    config.train_batch_norm = True

    config.teacher.path = "demo/tiny_clip"
    config.teacher.variant = "clip_consistent"

    config.loss.class_weights = (1.0, 5.0)  # few steps: the rare occupied voxels get more say
    config.optim.name = "muon"  # from scratch and in so few steps, worth about twice the steps of AdamW
    config.optim.learning_rate = 3e-3
    config.optim.backbone_multiplier = 1.0
    config.optim.warmup_steps = 50
    config.optim.warmup_start = 1e-5

    config.log_every = 20
    config.checkpoint_every = 240
    config.eval_every = 0  # `make demo` evaluates right after
    config.eval_batch_size = 2
    return config
