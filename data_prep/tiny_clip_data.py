"""What the tiny CLIP sees: pictures of the synthetic world, the kind of thing at every cell, and crops of things."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Int16, UInt8
from PIL import Image

from pop3d_jax.progress import progress

# Cells of the world's maps, in JPEG pixels; each holds what is at its pixel (2, 2).
_CELL = 4
_NOTHING = -1
# Crops: at least so many pixels a side and so many visible, and a margin of the box's size around it.
_MIN_SIDE, _MIN_PIXELS, _MARGIN = 10, 80, 0.15
_CROPS_PER_PICTURE = 4
# Ranges of the random light; a tint may not make red of yellow.
_BRIGHTNESS, _CONTRAST, _TINT = (0.7, 1.3), (0.8, 1.2), (0.95, 1.05)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Training pictures, all in memory.

    images: RGB, 0..255; kinds: kind of thing at every cell, -1 for the sky; cell_pixels: (row, column) of every
    cell's pixel as shares of the picture; crops and crop_kinds: things cut out, with their kind.
    """

    images: UInt8[np.ndarray, "pictures height width 3"]
    kinds: Int16[np.ndarray, "pictures cells"]
    cell_pixels: Float[np.ndarray, "cells 2"]
    crops: UInt8[np.ndarray, "crops side side 3"]
    crop_kinds: Int16[np.ndarray, " crops"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures with some of their cells, and crops. `picture` and `pixel` say where each cell is."""

    images: UInt8[np.ndarray, "pictures height width 3"]
    picture: Int[np.ndarray, " cells"]
    pixel: Float[np.ndarray, "cells 2"]
    cell_kinds: Int16[np.ndarray, " cells"]
    crops: UInt8[np.ndarray, "crops side side 3"]
    crop_kinds: Int16[np.ndarray, " crops"]


def read_pictures(
    world: Path,
    numbers: dict[str, dict[int, int]],
    *,
    image_hw: tuple[int, int],
    crop_side: int,
    max_pictures: int,
    random: np.random.Generator,
) -> Pictures:
    """Reads pictures of some scenes.

    Args:
      world: a folder written by `data_prep.synthetic`.
      numbers: per scene, the kind of every thing number (see `read_kinds`); other scenes are left out.
      image_hw: what pictures are resized to.
      crop_side: what crops are resized to, pixels.
      max_pictures: a random choice where there are more.
      random: makes that choice and the one of crops.

    Raises:
      FileNotFoundError: a picture or a map is missing.
      ValueError: no pictures of these scenes, or pictures of several sizes.
    """
    entries = [e for e in json.loads((world / "annotations_2d.json").read_text()) if e["scene_name"] in numbers]
    if not entries:
        raise ValueError(f"{world / 'annotations_2d.json'} has no picture of the scenes {', '.join(numbers)}")
    chosen = np.sort(random.permutation(len(entries))[:max_pictures])
    images, kinds, crops, crop_kinds, sizes = [], [], [], [], set()
    for index in progress(chosen, len(chosen), "reading pictures"):
        entry = entries[index]
        numbered = numbers[entry["scene_name"]]
        with Image.open(world / entry["filename"]) as opened:
            image = opened.convert("RGB")
        sizes.add(image.size)
        # The same filter as the input pipeline's.
        images.append(np.asarray(image.resize(image_hw[::-1], Image.Resampling.BILINEAR)))
        things = Path(entry["filename"])
        with Image.open(world / "things" / things.parent.name / f"{things.stem}.png") as opened:
            numbers_here = np.asarray(opened).astype(np.int64)
        table = np.full(max(int(numbers_here.max()), *numbered) + 1, _NOTHING, np.int16)
        table[list(numbered)] = list(numbered.values())
        kinds.append(table[numbers_here].reshape(-1))
        grid_hw = numbers_here.shape
        for thing in _worth_cropping(entry["objects"], random):
            crops.append(np.asarray(_crop(image, thing["box"], crop_side)))
            crop_kinds.append(numbered[thing["number"]])
    if len(sizes) > 1:
        raise ValueError(f"{world}: pictures of several sizes: {sorted(sizes)}")
    (width, height), (rows, columns) = sizes.pop(), grid_hw
    row = (_CELL * np.arange(rows) + _CELL // 2 + 0.5) / height
    column = (_CELL * np.arange(columns) + _CELL // 2 + 0.5) / width
    pixels = np.stack(np.meshgrid(row, column, indexing="ij"), axis=-1).reshape(-1, 2)
    if not crops:
        raise ValueError(f"{world}: no thing is large enough to be cut out; make the world at a larger image scale")
    return Pictures(
        np.stack(images),
        np.stack(kinds),
        pixels.astype(np.float32),
        np.stack(crops),
        np.array(crop_kinds, np.int16),
    )


def draw_batch(pictures: Pictures, sizes: tuple[int, int, int], random: np.random.Generator) -> Batch:
    """A random batch in random light; half of the pictures and crops mirrored.

    Cells are drawn by the inverse square root of how common their kind is in the picture, else roads and walls
    would be all that is learnt.

    Args:
      pictures: to draw from.
      sizes: pictures, cells of each, and crops.
      random: source of all choices.
    """
    count, cells, crops = sizes
    chosen = random.integers(len(pictures.images), size=count)
    mirrored = random.random(count) < 0.5
    images, pixels, kinds = [], [], []
    for index, mirror in zip(chosen, mirrored, strict=True):
        here = pictures.kinds[index]
        weight = 1 / np.sqrt(np.bincount(here + 1, minlength=1)[here + 1])
        weight[here == _NOTHING] = 0
        if not weight.any():  # nothing but sky: any cell will do, it is true of nothing
            weight[:] = 1
        drawn = random.choice(len(here), cells, p=weight / weight.sum())
        pixel = pictures.cell_pixels[drawn]
        image = _relit(pictures.images[index], random)
        images.append(image[:, ::-1] if mirror else image)
        pixels.append(np.abs(np.array([0, 1], np.float32) - pixel) if mirror else pixel)
        kinds.append(here[drawn])
    cut = random.integers(len(pictures.crops), size=crops)
    turned = pictures.crops[cut]
    turned[: crops // 2] = turned[: crops // 2, :, ::-1]
    return Batch(
        np.stack(images),
        np.repeat(np.arange(count, dtype=np.int32), cells),
        np.concatenate(pixels),
        np.concatenate(kinds),
        turned,
        pictures.crop_kinds[cut],
    )


def _relit(
    image: UInt8[np.ndarray, "height width 3"], random: np.random.Generator
) -> UInt8[np.ndarray, "height width 3"]:
    """Another brightness, contrast and tint: the few scenes have few kinds of weather."""
    gain = random.uniform(*_BRIGHTNESS) * random.uniform(*_TINT, 3)
    changed = (image - 128.0) * random.uniform(*_CONTRAST) + 128.0
    return np.clip(changed * gain, 0, 255).astype(np.uint8)


def _worth_cropping(things: Sequence[dict], random: np.random.Generator) -> list[dict]:
    large = []
    for thing in things:
        left, top, right, bottom = thing["box"]
        if min(right - left, bottom - top) >= _MIN_SIDE and thing["pixels"] >= _MIN_PIXELS:
            large.append(thing)
    return [large[i] for i in random.permutation(len(large))[:_CROPS_PER_PICTURE]]


def _crop(image: Image.Image, box: Sequence[float], side: int) -> Image.Image:
    """The box with a margin, as a square about its middle (edges of the picture repeat as black)."""
    left, top, right, bottom = box
    half = (0.5 + _MARGIN) * max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    square = (round(x - half), round(y - half), round(x + half), round(y + half))
    return image.crop(square).resize((side, side), Image.Resampling.BILINEAR)
