"""ScaLR made small, on the synthetic world in three layouts, with the tiny CLIP of the demo as teacher.

make demo-scalr
"""

import ml_collections

from configs import scalr


def get_config(option: str = "768") -> ml_collections.ConfigDict:
    """A distillation small enough for two processor cores; the option is a data set, or all of them."""
    config = scalr.get_config(option)
    config.batch_size = 2
    config.total_steps = 600

    config.data.records = "demo_scalr/records"
    config.data.workers = 0
    config.points.capacity = 4096
    config.points.max_points = 4096
    config.points.voxel_size = 0.2
    config.points.field_of_view = ((-48.0, -48.0, -6.0), (48.0, 48.0, 6.0))
    config.points.neighbors = 8
    config.points.image_hw = (144, 256)

    config.model.channels = 64
    config.model.depth = 6
    config.model.grid_shapes = ((64, 64), (64, 8), (64, 8))
    config.model.output_channels = 64
    config.model.remat = "none"

    config.teacher.name = "maskclip"
    config.teacher.path = "demo_scalr/tiny_clip"
    config.teacher.variant = "clip_consistent"

    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 50
    config.log_every = 50
    config.checkpoint_every = 600
    config.eval_batch_size = 2
    return config
