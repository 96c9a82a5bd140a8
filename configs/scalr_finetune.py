"""ScaLR's fine-tuning as published: the whole network, rates that fall from the head down to the embedding.

Score as published, all labels: 78.4 mIoU on nuScenes (78.7 from scratch), 65.8 on SemanticKITTI, 48.3 on Pandar64, 41.1
on PandarGT. Not measured here.

    python -m pop3d_jax.train --config configs/scalr_finetune.py:nuscenes --config.data.records=RECORDS \\
        --config.initial_weights=WORKDIR_OR_FILE --workdir FINETUNED

With few labels: configs/scalr_finetune.py:nuscenes,1 (percent; also 10). The official lists of nuScenes are not part of
this project: ours are drawn by a rule (pop3d_jax.data.label_subsets); --config.label_tokens names a list. The 1 % of
SemanticKITTI is every hundredth sweep, as official.
"""

import ml_collections

from configs import scalr_probe

_FULL_EPOCHS = {"nuscenes": (25.0, 2.0), "semantic_kitti": (10.0, 1.0)}


def get_config(options: str = "nuscenes,100") -> ml_collections.ConfigDict:
    """Fine-tuning on one data set with a percentage of its labels."""
    dataset, _, percent = options.partition(",")
    if percent not in ("", "1", "10", "100"):
        raise ValueError(f"unknown percentage {percent!r} of labels: choose 1, 10 or 100")
    config = scalr_probe.get_config(dataset)
    config.train_backbone = True
    config.label_fraction = float(percent or 100) / 100
    few = config.label_fraction < 1
    if (dataset, percent) == ("semantic_kitti", "1"):
        config.label_rule = "every"  # the official one hundredth
    if dataset == "pandar_gt":  # probed 128 m far, fine-tuned 96 m, as official
        config.points.field_of_view = ((-96.0, -96.0, -8.0), (96.0, 96.0, 8.0))
        config.model.grid_shapes = ((384, 384), (384, 32), (384, 32))
    # What the official files do with all labels of PandaSet was not at hand: as with nuScenes.
    config.epochs, config.optim.warmup_epochs = (45.0, 4.0) if few else _FULL_EPOCHS.get(dataset, (25.0, 2.0))
    config.model.drop_path = 0.2
    config.optim.learning_rate = 2e-3
    config.optim.final_learning_rate = 0.0
    config.optim.weight_decay = 0.0
    config.optim.layer_decay = 0.95 if few else 0.99
    return config
