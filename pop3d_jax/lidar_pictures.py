"""Pictures of one sweep coloured by similarity: in the cameras, from above, in perspective, beside the labels."""

import io

from pop3d_jax.headless import matplotlib, plt  # before all else of matplotlib

# isort: split

import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from PIL import Image

from pop3d_jax.data.point_clouds import pixel_pairs
from pop3d_jax.data.records import KeyFrame
from pop3d_jax.geometry import lidar_to_image
from pop3d_jax.lidar_datasets import LidarDataset
from pop3d_jax.nuscenes import CLASS_COLOURS, IGNORE
from pop3d_jax.pictures import CAMERA_VIEW, HIT_COLOUR, SIMILARITY, draw_car
from pop3d_jax.viewer.colours import similarity_range

_CHOSEN_COLOUR = "#0b5fff"
_UNLABELLED_COLOUR = "#e3e3e3"
# Share of the points that must fit on the view from above; the few farthest would make all others small.
_SHOWN_SHARE = 0.95
# Inches.
_WIDTH, _LEFT, _RIGHT, _GAP = 15.0, 0.6, 0.2, 0.12
_INNER = _WIDTH - _LEFT - _RIGHT
_HEADLINE, _PANEL_TITLE, _PANEL, _LEGEND = 0.75, 0.26, 4.7, 1.0
_HIGHEST_IMAGE = 5.2
# Share of white in the camera images: colours of points need a pale ground.
_PALE = 0.35


def right_and_ahead(key_frame: KeyFrame) -> Float[np.ndarray, "2 2"]:
    """Rows "to the right" and "ahead" in the lidar's x and y: the axis along which the first, front camera looks."""
    look = key_frame.lidar_to_camera[0][2, :2]
    ahead = np.zeros(2)
    axis = int(np.argmax(np.abs(look)))
    ahead[axis] = np.sign(look[axis])
    return np.array([[ahead[1], -ahead[0]], ahead])


def around_the_car(key_frame: KeyFrame) -> list[int]:
    """Cameras in reading order: the front row from left to right, the back row as one sees it turning round."""
    right, ahead = right_and_ahead(key_frame)
    looks = key_frame.lidar_to_camera[:, 2, :2]
    clockwise = np.degrees(np.arctan2(looks @ right, looks @ ahead))
    return np.argsort((clockwise + 90.0) % 360.0, kind="stable").tolist()


def class_colours(dataset: LidarDataset) -> Float[np.ndarray, "classes 3"]:
    if dataset.name == "nuscenes":
        return CLASS_COLOURS[1:17] / 255.0
    return np.array([matplotlib.colormaps["tab20"](index)[:3] for index in range(len(dataset.class_names))])


def _draw_image(
    axes: Axes,
    key_frame: KeyFrame,
    dataset: LidarDataset,
    camera: int,
    colours: Float[np.ndarray, "points 4"],
    hits: Int[np.ndarray, " hits"],
    chosen: int | None,
) -> None:
    image = np.asarray(Image.open(io.BytesIO(key_frame.images[camera])).convert("RGB"))
    pale = np.rint(255 - (255 - image.astype(np.float32)) * (1 - _PALE)).astype(np.uint8)
    axes.imshow(pale, interpolation="bilinear")
    matrix = lidar_to_image(key_frame.intrinsics[camera], key_frame.lidar_to_camera[camera])
    xyz = key_frame.points[:, :3]
    seen, pixels = pixel_pairs(xyz, matrix, image.shape[:2], dataset)
    distance = np.linalg.norm(xyz[seen], axis=-1)
    far_first = np.argsort(-distance, kind="stable")
    axes.scatter(
        *pixels[far_first, ::-1].T,
        s=np.clip(120.0 / np.maximum(distance[far_first], 1.0), 2.5, 14.0),
        c=colours[seen[far_first]],
        linewidths=0,
    )
    ringed = np.isin(seen, hits)
    axes.scatter(
        *pixels[ringed, ::-1].T,
        s=np.clip(900.0 / np.maximum(distance[ringed], 1.0), 24.0, 120.0),
        facecolors="none",
        edgecolors=HIT_COLOUR,
        linewidths=1.1,
    )
    if chosen is not None:
        _mark(axes, pixels[seen == chosen, ::-1])
    axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    name = dataset.cameras[camera].removeprefix("CAM_").removesuffix("_camera").replace("_", " ").lower()
    axes.set_title(name, fontsize=9, pad=3)
    axes.set_axis_off()


def _mark(axes: Axes, place: Float[np.ndarray, "seen 2"] | Int[np.ndarray, "seen 2"]) -> None:
    """The chosen point, where it is seen."""
    axes.scatter(*place.T, s=190, marker="*", color=_CHOSEN_COLOUR, edgecolors="white", linewidths=1.0, zorder=6)


def _draw_above(
    axes: Axes,
    xy: Float[np.ndarray, "points 2"],
    colours: Float[np.ndarray, "points channels"],
    order: Float[np.ndarray, " points"],
    extent: float,
) -> None:
    """Points from above, to the right and ahead of the car, the largest in `order` on top."""
    rising = np.argsort(order, kind="stable")
    axes.scatter(*xy[rising].T, s=5.0, c=colours[rising], linewidths=0)
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
    draw_car(axes)
    axes.set_xlabel("metres to the right", fontsize=8, labelpad=1)
    axes.tick_params(labelsize=8)


def _draw_perspective(
    axes: Axes,
    xy: Float[np.ndarray, "points 2"],
    height: Float[np.ndarray, " points"],
    colours: Float[np.ndarray, "points 4"],
    extent: float,
) -> None:
    axes.scatter(*xy.T, height, s=5.0, c=colours, linewidths=0, depthshade=False)
    floor, ceiling = np.quantile(height, (0.002, 0.998))
    ceiling = max(ceiling, floor + 1.0)
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), zlim=(floor, ceiling))
    axes.set_box_aspect((2 * extent, 2 * extent, 1.6 * (ceiling - floor)), zoom=1.5)
    axes.view_init(**CAMERA_VIEW)
    axes.patch.set_visible(False)
    axes.set_axis_off()


def draw_lidar_query(
    path: epath.PathLike,
    *,
    key_frame: KeyFrame,
    dataset: LidarDataset,
    similarity: Float[np.ndarray, " points"],
    hits: Int[np.ndarray, " hits"],
    chosen: int | None,
    classes: UInt8[np.ndarray, " points"] | None,
    title: str,
    asked: str,
) -> None:
    """Writes the picture that answers a phrase, or a point, in a sweep.

    Args:
      path: PNG to write.
      key_frame: sweep, images and calibration.
      dataset: whose it is.
      similarity: of every point of the sweep with what was asked, a cosine.
      hits: points that are ringed.
      chosen: the point that was asked for, which is marked; None for a phrase.
      classes: of every point, 255 where there is none; None leaves the ground truth out.
      title: headline.
      asked: what the similarity is with, for the colour bar.
    """
    low, high = similarity_range(similarity)
    scale = Normalize(low, max(high, low + 1e-6), clip=True)
    colours = SIMILARITY(scale(similarity))
    # What does not match steps back, so that the images stay readable.
    in_images = np.concatenate([colours[:, :3], 0.25 + 0.75 * np.asarray(scale(similarity))[:, None]], 1)
    xyz = key_frame.points[:, :3]
    xy = xyz[:, :2] @ right_and_ahead(key_frame).T
    extent = float(np.quantile(np.abs(xy).max(1), _SHOWN_SHARE))

    order = around_the_car(key_frame)
    columns = min(3, len(order))
    rows = -(-len(order) // columns)
    with Image.open(io.BytesIO(key_frame.images[order[0]])) as image:  # reads the header only
        aspect = image.width / image.height
    image_width = min((_INNER - (columns - 1) * _GAP) / columns, _HIGHEST_IMAGE * aspect)
    image_height = image_width / aspect
    below = _HEADLINE + rows * (image_height + _PANEL_TITLE) + _PANEL_TITLE
    figure = plt.figure(figsize=(_WIDTH, below + _PANEL + _LEGEND), facecolor="white")

    def place(left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        """From inches of the upper left corner to shares of the figure."""
        whole = figure.get_figheight()
        return left / _WIDTH, 1 - (top + height) / whole, width / _WIDTH, height / whole

    start = _LEFT + (_INNER - columns * image_width - (columns - 1) * _GAP) / 2
    for number, camera in enumerate(order):
        row, column = divmod(number, columns)
        left = start + column * (image_width + _GAP)
        top = _HEADLINE + row * (image_height + _PANEL_TITLE)
        axes = figure.add_axes(place(left, top, image_width, image_height))
        _draw_image(axes, key_frame, dataset, camera, in_images, hits, chosen)

    # Without labels the perspective takes their panel too.
    middle = _INNER - (1 if classes is None else 2) * _PANEL
    above = figure.add_axes(place(_LEFT, below, _PANEL, _PANEL))
    _draw_above(above, xy, colours, similarity, extent)
    above.scatter(*xy[hits].T, s=42, facecolors="none", edgecolors=HIT_COLOUR, linewidths=1.1, zorder=5)
    if chosen is not None:
        _mark(above, xy[[chosen]])
    above.set_ylabel("metres ahead", fontsize=8, labelpad=0)
    above.set_title("the sweep from above, best points ringed", fontsize=10)

    perspective = figure.add_axes(place(_LEFT + _PANEL, below, middle, _PANEL), projection="3d")
    near = (np.abs(xy) <= extent).all(1)
    _draw_perspective(perspective, xy[near], xyz[near, 2], colours[near], extent)
    centre = _LEFT + _PANEL + middle / 2
    figure.text(*place(centre, below - 0.08, 0.0, 0.0)[:2], "in perspective", fontsize=10, ha="center")
    bar = figure.colorbar(
        matplotlib.cm.ScalarMappable(scale, SIMILARITY),
        cax=figure.add_axes(place(centre - 1.6, below + _PANEL + 0.08, 3.2, 0.14)),
        orientation="horizontal",
    )
    bar.set_label(f"cosine of the point's feature and {asked}", fontsize=8)
    bar.ax.tick_params(labelsize=7)

    if classes is not None:
        truth = figure.add_axes(place(_WIDTH - _RIGHT - _PANEL, below, _PANEL, _PANEL))
        _draw_truth(truth, xy, xyz[:, 2], classes, dataset, extent)
    figure.suptitle(title, fontsize=14, fontweight="bold", y=place(0.0, 0.2, 0.0, 0.0)[1])
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80, format="png")
    plt.close(figure)
    path.write_bytes(buffer.getvalue())


def _draw_truth(
    axes: Axes,
    xy: Float[np.ndarray, "points 2"],
    height: Float[np.ndarray, " points"],
    classes: UInt8[np.ndarray, " points"],
    dataset: LidarDataset,
    extent: float,
) -> None:
    colours = np.tile(matplotlib.colors.to_rgb(_UNLABELLED_COLOUR), (len(classes), 1))
    scored = classes != IGNORE
    of_class = class_colours(dataset)
    colours[scored] = of_class[classes[scored]]
    _draw_above(axes, xy, colours, height, extent)
    axes.tick_params(labelleft=False)  # as the view from above beside it
    axes.set_title("ground truth from above (lidar labels)", fontsize=10)
    entries = [(of_class[index], dataset.class_names[index].replace("_", " ")) for index in np.unique(classes[scored])]
    if not scored.all():
        entries.append((_UNLABELLED_COLOUR, "not scored"))
    axes.legend(
        handles=[
            Line2D([], [], linestyle="", marker="o", markersize=5, color=colour, label=name) for colour, name in entries
        ],
        ncols=4,
        fontsize=7,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.075),
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.0,
    )
