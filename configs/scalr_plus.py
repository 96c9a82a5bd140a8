"""ScaLR+, the authors' newer recipe: larger images, drop-path, GELU, a head of two layers, warm-up and cooldown.

Facts of the authors' configuration and schedule at github.com/valeoai/ScaLR, commit 7cf02a2. Cost and score: not
measured here. Their teacher is timm's vit_large_patch14_dinov2.lvd142m, the same weights as facebook/dinov2-large.

    python -m pop3d_jax.train --config configs/scalr_plus.py --config.data.records=RECORDS --workdir WORKDIR
"""

import ml_collections

from configs import scalr


def get_config(option: str = "768") -> ml_collections.ConfigDict:
    """The recipe; options as in configs/scalr.py."""
    config = scalr.get_config(option)
    config.epochs = 65.0
    config.points.image_hw = (448, 896)
    config.model.drop_path = 0.2
    config.model.activation = "gelu"
    config.model.head = "mlp"
    config.model.head_hidden = 2048
    config.optim.schedule = "warmup_cooldown"
    config.optim.warmup_steps = 0  # in epochs:
    config.optim.warmup_epochs = 1.0
    config.optim.cooldown_epochs = 2.0
    config.optim.timescale_epochs = 0.45
    return config
