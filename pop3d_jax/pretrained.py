"""What a training starts from when it does not start from nothing.

The published run takes its backbone, and what fits of its neck, from FCOS3D (`r101_dcn_fcos3d_pretrain.pth`: a
monocular detector of mmdetection3d, Wang et al. 2021); `load_from` of `config/_base_/schedule.py` of POP-3D.
"""

import re
from collections.abc import Mapping

import numpy as np

from pop3d_jax.models.pop3d import Pop3D
from pop3d_jax.official_weights import model_to_state_dict, official_shapes, state_dict_to_model

# mmdetection3d's own names, and those of files already renamed for multi-camera networks.
_PARTS = (
    (re.compile(r"^(?:img_)?backbone\."), "img_backbone."),
    (re.compile(r"^(?:img_)?neck\."), "img_neck."),
)


def load_backbone(state_dict: Mapping[str, np.ndarray], model: Pop3D) -> dict[str, list[str]]:
    """Fills the backbone and what fits of the neck, in place.

    The backbone must be there as a whole. Of the neck, levels that the file lacks keep their initial values, and
    levels that only the file has are left out, as the official loading (`strict=False`) does. Heads are ignored.

    Args:
      state_dict: a detector's weights, under mmdetection3d's names.
      model: the student.

    Returns:
      Official names: "loaded"; "initial", of backbone and neck without a place in the file; "unused" ones of the file.

    Raises:
      ValueError: unknown, missing or misshapen backbone entries, or misshapen neck entries, all listed.
    """
    shapes = official_shapes(model)
    found: dict[str, np.ndarray] = {}
    unused, problems = [], []
    misshapen = set()
    for key, value in state_dict.items():
        renamed = next((part.sub(name, key) for part, name in _PARTS if part.match(key)), None)
        if renamed is None or (renamed not in shapes and renamed.startswith("img_neck.")):
            unused.append(key)
        elif renamed not in shapes:
            problems.append(f"unknown: {key}")
        elif value.shape != shapes[renamed]:
            misshapen.add(renamed)
            problems.append(f"shape of {key}: {value.shape}, the model needs {shapes[renamed]}")
        else:
            found[renamed] = value
    wanted = [key for key in shapes if key.startswith(("img_backbone.", "img_neck."))]
    initial = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    problems += [f"missing: {key}" for key in initial if key.startswith("img_backbone.") and key not in misshapen]
    if problems:
        raise ValueError(
            f"these weights are not of this backbone ({len(problems)} problems; check config.model.backbone_depth):\n  "
            + "\n  ".join(problems)
        )
    state_dict_to_model(model_to_state_dict(model) | found, model)
    return {"loaded": sorted(found), "initial": initial, "unused": unused}
