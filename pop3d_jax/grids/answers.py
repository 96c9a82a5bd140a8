"""A search's hits as a person reads them: a table, and the pieces of camera images that they lie in."""

import collections
import io
from collections.abc import Sequence

from pop3d_jax.headless import plt  # before all else of matplotlib

# isort: split

import numpy as np
from etils import epath
from PIL import Image

from pop3d_jax.data.records import RecordSource
from pop3d_jax.grids.feature_grids import Hit
from pop3d_jax.nuscenes import CAMERAS

_COLUMNS = 5
# Half the side of a crop, as a share of the image's height.
_CROP = 0.3


def format_hits(hits: Sequence[Hit]) -> str:
    """A table: rank, scores, key frame, where in the lidar's frame and in the world, and the camera that sees it."""
    lines = []
    for phrase in dict.fromkeys(hit.phrase for hit in hits):
        of_phrase = [hit for hit in hits if hit.phrase == phrase]
        present = sum(hit.present for hit in of_phrase)
        lines.append(f"“{phrase}”: {present} of the {len(of_phrase)} best key frames have it")
        lines.append(
            f"{'':>4} {'similar':>8} {'margin':>7} {'nearest other':<14} {'scene':<12} {'sample':<32} "
            f"{'right':>6} {'ahead':>6} {'up':>5} {'metres':>6} {'global x, y':>16}  camera"
        )
        for rank, hit in enumerate(of_phrase, 1):
            x, y, z = hit.lidar
            camera = "-" if hit.camera is None else f"{hit.camera} ({hit.pixel[0]:.0f}, {hit.pixel[1]:.0f})"
            lines.append(
                f"{rank:>3}{' ' if hit.present else '?'} {hit.similarity:>8.3f} {hit.margin:>+7.3f} "
                f"{hit.background:<14} {hit.scene_name:<12} {hit.sample_token:<32} {x:>6.1f} {y:>6.1f} {z:>5.1f} "
                f"{hit.distance:>6.1f} {hit.world[0]:>8.1f}{hit.world[1]:>8.1f}  {camera}"
            )
        lines.append("")
    lines.append("margin: similarity less that of the background phrase that fits best; ? below the threshold: absent.")
    return "\n".join(lines)


def draw_hits(out: epath.PathLike, hits: Sequence[Hit], source: RecordSource) -> None:
    """Writes a picture of the crops around hits, in their order.

    Args:
      out: PNG to write.
      hits: of one search.
      source: records that hold their images.

    Raises:
      ValueError: no hits, or the records lack one of their key frames.
    """
    if not hits:
        raise ValueError("there are no hits to draw")
    numbers = {token: number for number, token in enumerate(source.sample_tokens)}
    missing = [hit.sample_token for hit in hits if hit.sample_token not in numbers]
    if missing:
        raise ValueError(
            f"the records lack {len(missing)} key frames of the grids, such as {missing[0]}: see --records"
        )
    rows = -(-len(hits) // _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(3 * _COLUMNS, 3.35 * rows), squeeze=False, facecolor="white")
    for axis in axes.flat:
        axis.set_axis_off()
    ranks: collections.Counter[str] = collections.Counter()
    for hit, axis in zip(hits, axes.flat, strict=False):
        ranks[hit.phrase] += 1
        rank = ranks[hit.phrase]
        doubt = "" if hit.present else "?"
        axis.set_title(
            f"{rank}{doubt}  {hit.phrase}  {hit.similarity:.2f} ({hit.margin:+.2f})\n{hit.scene_name}, "
            f"{hit.distance:.0f} m, {(hit.camera or 'no camera').removeprefix('CAM_').replace('_', ' ').lower()}",
            fontsize=8,
        )
        if hit.camera is None:
            continue
        jpeg = source[numbers[hit.sample_token]].images[CAMERAS.index(hit.camera)]
        image = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        u, v = hit.pixel
        axis.imshow(image)
        axis.scatter([u], [v], s=240, facecolors="none", edgecolors="#ff1744", linewidths=1.5)
        half = _CROP * image.shape[0]
        left = np.clip(u - half, 0, image.shape[1] - 2 * half)
        top = np.clip(v - half, 0, image.shape[0] - 2 * half)
        axis.set_xlim(left, left + 2 * half)
        axis.set_ylim(top + 2 * half, top)
    figure.tight_layout()
    path = epath.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)
