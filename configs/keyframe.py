"""One real key frame, learned by heart: a test of the real geometry, not of generalisation.

The key frame is nuScenes v1.0-mini, scene-0061, first sample (a nuScenes licence is needed for the data). The grid is
the published one, the images are at a quarter of their scale, the teacher is a tiny CLIP. Nothing about places is
learned (`learn_positions = False`): what a voxel holds can only come from the images, through the calibration. With
another key frame's calibration the same network must therefore fail.

Not yet measured: this run has not been carried to its end.

    python -m data_prep.build --source NUSCENES --version v1.0-mini --split mini_train --out keyframe/records
    python -m pop3d_jax.train --config configs/keyframe.py --config.teacher.path=TINY_CLIP --workdir keyframe/run
    python -m pop3d_jax.evaluate --workdir keyframe/run
    python -m pop3d_jax.evaluate --workdir keyframe/run --calibration_of_records OTHER_RECORDS
"""

import ml_collections

from configs import demo


def get_config() -> ml_collections.ConfigDict:
    """The demo's network on the published grid."""
    config = demo.get_config()
    config.batch_size = 1
    config.total_steps = 300

    config.data.records = "keyframe/records"
    config.data.train_split = "mini_train"
    config.data.eval_split = "mini_train"
    config.data.image_hw = (225, 400)
    config.data.teacher_image_hw = (225, 400)
    config.data.photometric = False

    config.model.grid_size = (100, 100, 8)
    config.learn_positions = False

    config.teacher.path = "demo/tiny_clip"
    config.checkpoint_every = 100
    config.eval_every = 100
    config.eval_batch_size = 1
    return config
