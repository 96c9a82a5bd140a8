"""What each camera image shows: coarse maps of categories and things, and boxes of visible things."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.world.ground import GRASS
from data_prep.world.render import Picture

# A cell of the maps is this many pixels of the image in both directions.
CELL = 4
_FEWEST_PIXELS = 12


def write_maps(root: Path, channel: str, stem: str, picture: Picture) -> None:
    """Writes segmentation/CHANNEL/STEM.png (raw lidarseg index, 255 sky) and things/CHANNEL/STEM.png (number, 16 bit).

    A map has height // 4 rows and width // 4 columns; each cell holds what is in the middle of its 4 x 4 pixels.
    """
    height, width = picture.number.shape
    cells = np.s_[CELL // 2 : height // CELL * CELL : CELL, CELL // 2 : width // CELL * CELL : CELL]
    for folder, values in (
        ("segmentation", picture.lidarseg[cells]),
        ("things", picture.number[cells].astype(np.uint16)),
    ):
        path = root / folder / channel / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(values)).save(path)


def visible_objects(picture: Picture, captions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Things with at least 12 visible pixels: their names, pixel counts and boxes [u0, v0, u1, v1], ends exclusive.

    Args:
      picture: one camera's view.
      captions: the scene's entries of captions.json; the entry of number n is at n - 1.
    """
    numbers = picture.number.reshape(-1)
    order = np.argsort(numbers, kind="stable")
    found, first, count = np.unique(numbers[order], return_index=True, return_counts=True)
    v, u = np.divmod(order, picture.number.shape[1])
    low_u, high_u = np.minimum.reduceat(u, first), np.maximum.reduceat(u, first)
    low_v, high_v = np.minimum.reduceat(v, first), np.maximum.reduceat(v, first)
    objects = []
    for k, number in enumerate(found.tolist()):
        if number <= GRASS or count[k] < _FEWEST_PIXELS:
            continue
        entry = captions[number - 1]
        objects.append(
            {key: entry[key] for key in ("number", "instance_token", "category", "lidarseg_index", "caption")}
            | {
                "pixels": int(count[k]),
                "box": [int(low_u[k]), int(low_v[k]), int(high_u[k]) + 1, int(high_v[k]) + 1],
            }
        )
    return objects
