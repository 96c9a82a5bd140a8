"""A lidar network that understands phrases: MaskCLIP (CLIP ViT-B/16) distilled into WaffleIron WI-48-768, nuScenes.

ScaLR's recipe with a teacher that has a text side, in place of DINOv2. Cost: not measured here. Score: not measured
here; we know of no published one of this combination. The file of MaskCLIP+ that POP-3D learns from is the
other choice: --config.teacher.name=maskclip_plus --config.teacher.weights=FILE.

    python -m data_prep.build --dataset nuscenes --source NUSCENES --version v1.0-trainval --split train \\
        --out RECORDS/nuscenes
    python -m data_prep.build --dataset nuscenes --source NUSCENES --version v1.0-trainval --split val \\
        --out RECORDS/nuscenes
    python -m pop3d_jax.train --config configs/lidar_clip.py --config.data.records=RECORDS --workdir LIDAR_CLIP

Ask it for a phrase on a raw sweep, and what is like a point of it:

    python -m pop3d_jax.query --lidar --workdir LIDAR_CLIP --sample 0 --text "a red car" --out lidar.png
    python -m pop3d_jax.query --lidar --workdir LIDAR_CLIP --sample 0 --point 4,12,-1 --out point.png

Beside POP-3D's answer, which sees the images and fills a volume, for the same sample and phrase:

    python -m pop3d_jax.train --config configs/pop3d_nuscenes.py --config.data.records=RECORDS/nuscenes --workdir POP3D
    python -m pop3d_jax.query --workdir POP3D --sample 0 --text "a red car" --out pop3d.png

Both teachers speak for CLIP ViT-B/16, so the phrase is the same vector; the lidar's colours are cosines, POP-3D's dot
products.
"""

import ml_collections

from configs import scalr


def get_config() -> ml_collections.ConfigDict:
    """The published distillation with another teacher, on one data set."""
    config = scalr.get_config("nuscenes")
    config.model.output_channels = 512  # CLIP ViT-B/16's embedding

    config.teacher.name = "maskclip"
    config.teacher.path = "openai/clip-vit-base-patch16"
    config.teacher.variant = "official_config"  # as POP-3D's, so that answers can be compared
    return config
