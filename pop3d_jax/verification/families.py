"""All families of comparisons, and running them over a golden set."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from pop3d_jax.verification import (
    dinov2,
    full_size,
    labels_and_geometry,
    maskclip_plus,
    metrics,
    network,
    occ3d,
    operations,
    scalr_steps,
    scalr_training,
    teachers_and_text,
    training,
    waffleiron,
)
from pop3d_jax.verification.checks import Check
from pop3d_jax.verification.golden_model import GoldenFile, MissingGoldenFileError, golden_set

# The one that takes minutes and gigabytes.
FULL_SIZE = "full_size"

# A family may have several parts; what is missing or broken for one leaves the others alone.
FAMILIES: tuple[tuple[str, Callable[[GoldenFile], Iterator[Check]]], ...] = (
    ("operations", operations.attention),
    ("operations", operations.deformable_convolutions),
    ("operations", operations.sampling),
    ("operations", operations.losses),
    ("operations", operations.encoder_parts),
    ("operations", operations.bottleneck),
    ("operations", operations.grid_masks),
    ("operations", operations.aggregator),
    ("network", network.tiny_network),
    ("network", network.state_dicts),
    ("training", training.training),
    ("schedule", training.learning_rates),
    ("labels", labels_and_geometry.labels),
    ("projection", labels_and_geometry.projections),
    ("splits", labels_and_geometry.split_lists),
    ("metrics", metrics.mean_ious),
    ("metrics", metrics.assignment),
    ("retrieval", metrics.retrieval),
    ("devkit", metrics.devkit),
    ("clip", teachers_and_text.vision_tower),
    ("clip", teachers_and_text.text_tower),
    ("maskclip", teachers_and_text.maskclip),
    ("text", teachers_and_text.prompt_ensemble),
    ("maskclip_plus", maskclip_plus.tiny_network),
    ("maskclip_plus", maskclip_plus.full_width),
    ("waffleiron", waffleiron.layers),
    ("waffleiron", waffleiron.outputs),
    ("waffleiron", waffleiron.a_cloud_alone),
    ("waffleiron", waffleiron.projections),
    ("scalr_training", scalr_training.segmentation_losses),
    ("scalr_training", scalr_training.distances),
    ("scalr_training", scalr_training.learning_rates),
    ("scalr_training", scalr_training.layer_decay),
    ("scalr_training", scalr_training.scores),
    ("scalr_training", scalr_steps.distillation),
    ("scalr_training", scalr_steps.probing),
    ("dinov2", dinov2.stages),
    ("dinov2", dinov2.teacher),
    ("occ3d", occ3d.protocol),
    ("occ3d", occ3d.tiny_voxels),
    ("occ3d", occ3d.voxels),
    ("occ3d", occ3d.tiny_rays),
    ("occ3d", occ3d.rays),
    ("occ3d", occ3d.origins),
    (FULL_SIZE, full_size.full_size),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one part of a family found.

    Attributes:
      family: its name.
      checks: the comparisons, in the order of the computation.
      missing: name of a golden file that the set does not have, for which the part was left out; "" if it has all.
    """

    family: str
    checks: tuple[Check, ...] = ()
    missing: str = ""


def compare(folder: Path, only: str = "", full_size_too: bool = False) -> Iterator[Part]:
    """Compares the package with a golden set, one part after the other.

    Args:
      folder: the golden set; its `reference_weights.py` files are executed.
      only: families whose name contains this; all by default.
      full_size_too: also the network of the published size.

    Raises:
      ValueError: no such folder, or no family of this name.
    """
    if not folder.is_dir():
        raise ValueError(f"--golden {folder}: there is no such folder")
    names = list(dict.fromkeys(name for name, _ in FAMILIES))
    if not any(only in name for name in names):
        raise ValueError(f"--only {only}: no family's name contains this; there are {', '.join(names)}")
    golden_file = golden_set(folder)
    for family, comparisons in FAMILIES:
        if only in family and (full_size_too or family != FULL_SIZE):
            yield run_part(family, comparisons, golden_file)


def run_part(family: str, comparisons: Callable[[GoldenFile], Iterator[Check]], golden_file: GoldenFile) -> Part:
    """Runs one part of `FAMILIES`; whatever it raises is a failed check of its own."""
    checks = []
    try:
        checks.extend(comparisons(golden_file))
    except MissingGoldenFileError as error:
        return Part(family, tuple(checks), error.name)
    except Exception as error:  # a damaged file or an array that is not there fails its part, and hides no other
        name = f"{comparisons.__name__}: not finished"
        message = " ".join(f"{type(error).__name__}: {error}".split())
        checks.append(Check(name, 0.0, float("inf"), message))
    return Part(family, tuple(checks))
