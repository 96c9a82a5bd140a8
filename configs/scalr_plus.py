"""ScaLR+, the authors' newer recipe: larger images, drop-path, GELU, a head of two layers, warm-up and cooldown.

Not measured here, and not compared with their code, which was not at hand: what the recipe is described to change is
changed, everything else is configs/scalr.py. The lengths of warm-up and cooldown are ours.

    python -m pop3d_jax.train --config configs/scalr_plus.py --config.data.records=RECORDS --workdir WORKDIR
"""

import ml_collections

from configs import scalr


def get_config(option: str = "768") -> ml_collections.ConfigDict:
    """The recipe; options as in configs/scalr.py."""
    config = scalr.get_config(option)
    config.points.image_hw = (448, 896)
    config.model.drop_path = 0.2
    config.model.activation = "gelu"
    config.model.head = "mlp"
    config.model.head_hidden = 2048
    config.optim.schedule = "warmup_cooldown"
    config.optim.cooldown_steps = 17_500
    return config
