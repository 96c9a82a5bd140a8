"""Pictures of one key frame: six images, voxels from above and in perspective, ground truth beside them."""

import io

from pop3d_jax.headless import matplotlib, plt  # before all else of matplotlib

# isort: split

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Patch
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from PIL import Image

from pop3d_jax.data.records import KeyFrame
from pop3d_jax.geometry import lidar_to_image, project, visible
from pop3d_jax.nuscenes import CAMERAS, CLASS_COLOURS, CLASS_NAMES, EMPTY
from pop3d_jax.viewer.colours import SIMILARITY_STOPS, similarity_range
from pop3d_jax.voxels import Volume, voxel_centres

# As the cameras look around the car: the front row from left to right, the back row as one sees it turning round.
_IMAGE_ORDER = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_RIGHT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
)
SIMILARITY = LinearSegmentedColormap.from_list("similarity", SIMILARITY_STOPS)
HIT_COLOUR = "#ff1744"
CAMERA_VIEW = {"elev": 38, "azim": -105}
# Faces of a unit cube: corner offsets of the five that can be seen from above, and how much light each gets.
_FACES = np.array(
    [
        [[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]],
        [[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]],
        [[0, 1, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1]],
        [[0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]],
    ],
    np.float64,
)
_NEIGHBOURS = np.array([[0, 0, 1], [0, -1, 0], [0, 1, 0], [-1, 0, 0], [1, 0, 0]])
_LIGHT = np.array([1.0, 0.82, 0.70, 0.76, 0.88])


def _exposed_faces(occupied: Bool[np.ndarray, "x y z"]) -> tuple[np.ndarray, np.ndarray]:
    """Faces without an occupied neighbour: index of the voxel in C order of the occupied ones, and of the face."""
    cells = np.argwhere(occupied)
    padded = np.pad(occupied, 1)
    beside = cells[:, None] + 1 + _NEIGHBOURS[None]
    return np.nonzero(~padded[tuple(np.moveaxis(beside, -1, 0))])


def _draw_perspective(
    axes: Axes, occupied: Bool[np.ndarray, "x y z"], colours: Float[np.ndarray, "voxels 3"], volume: Volume
) -> None:
    voxel, face = _exposed_faces(occupied)
    corners = np.argwhere(occupied)[voxel][:, None] + _FACES[face]
    polygons = corners * volume.voxel_size + volume.minimum
    shaded = colours[voxel] * _LIGHT[face][:, None]
    axes.add_collection3d(Poly3DCollection(polygons, facecolors=shaded, edgecolors="none", antialiased=False))
    extent = np.subtract(volume.maximum, volume.minimum)
    axes.set(
        xlim=(volume.minimum[0], volume.maximum[0]),
        ylim=(volume.minimum[1], volume.maximum[1]),
        zlim=(volume.minimum[2], volume.maximum[2]),
    )
    axes.set_box_aspect(extent * (1, 1, 1.6), zoom=1.55)
    axes.view_init(**CAMERA_VIEW)
    axes.set_axis_off()


def draw_car(axes: Axes) -> None:
    """The car itself from above: 1.8 m by 4.5 m around the lidar, pointing forward, which is up."""
    axes.add_patch(plt.Polygon([(-0.9, -2.8), (0.9, -2.8), (0.9, 1.0), (0, 2.2), (-0.9, 1.0)], color="#222222"))


def _draw_above(axes: Axes, image: Float[np.ndarray, "x y 4"], volume: Volume) -> None:
    """`image` by cell; x to the right, y (forward) up."""
    axes.imshow(
        image.transpose(1, 0, 2),
        origin="lower",
        extent=(volume.minimum[0], volume.maximum[0], volume.minimum[1], volume.maximum[1]),
        interpolation="nearest",
    )
    draw_car(axes)
    axes.set_xlabel("metres to the right", fontsize=8)
    axes.set_ylabel("metres ahead", fontsize=8, labelpad=0)
    axes.tick_params(labelsize=8)


def _highest(
    occupied: Bool[np.ndarray, "x y z"],
    colours: Float[np.ndarray, "voxels 3"],
    order: Float[np.ndarray, " voxels"],
) -> Float[np.ndarray, "x y 4"]:
    """For each column, the colour of its voxel that is largest in `order`; transparent where there is none."""
    cells = np.argwhere(occupied)
    rising = np.argsort(order, kind="stable")
    image = np.zeros((*occupied.shape[:2], 4))
    image[cells[rising, 0], cells[rising, 1]] = np.concatenate([colours[rising], np.ones((len(rising), 1))], axis=1)
    return image


def _draw_images(axes: list[Axes], key_frame: KeyFrame, hits: Float[np.ndarray, "voxels 3"]) -> None:
    for axis, camera in zip(axes, _IMAGE_ORDER, strict=True):
        index = CAMERAS.index(camera)
        image = np.asarray(Image.open(io.BytesIO(key_frame.images[index])).convert("RGB"))
        axis.imshow(image)
        matrix = lidar_to_image(key_frame.intrinsics[index], key_frame.lidar_to_camera[index])
        uv, depth = project(hits, matrix)
        seen = visible(uv, depth, image.shape[:2])
        axis.scatter(
            uv[seen, 0],
            uv[seen, 1],
            s=np.clip(900.0 / depth[seen] ** 1.2, 8.0, 160.0),
            facecolors="none",
            edgecolors=HIT_COLOUR,
            linewidths=1.1,
        )
        axis.set_title(camera.removeprefix("CAM_").replace("_", " ").lower(), fontsize=9, pad=3)
        axis.set_axis_off()


def draw_query(
    path: epath.PathLike,
    *,
    key_frame: KeyFrame,
    volume: Volume,
    occupied: Bool[np.ndarray, "x y z"],
    similarity: Float[np.ndarray, "x y z"],
    hits: Bool[np.ndarray, "x y z"],
    target: UInt8[np.ndarray, "x y z"] | None,
    title: str,
) -> None:
    """Writes the picture that answers a phrase.

    Args:
      path: PNG to write.
      key_frame: images and calibration.
      volume: where the voxels are.
      occupied: predicted occupancy.
      similarity: of every voxel with the phrase.
      hits: the voxels ringed in the images.
      target: classes 0..16, 17 free, 255 unseen; None leaves the ground truth out.
      title: headline.
    """
    values = similarity[occupied]
    # Half of what is there is grey; the few best voxels set the other end of the scale.
    low, high = similarity_range(values)
    scale = Normalize(low, max(high, low + 1e-6), clip=True)
    colours = SIMILARITY(scale(values))[:, :3] if values.size else np.zeros((0, 3))

    columns = 2 if target is None else 4
    figure = plt.figure(figsize=(15, 10.4), facecolor="white")
    grid = figure.add_gridspec(
        2, 1, height_ratios=(1.35, 1), hspace=0.1, left=0.045, right=0.985, top=0.93, bottom=0.06
    )
    images = grid[0].subgridspec(2, 3, wspace=0.02, hspace=0.10)
    _draw_images(
        [figure.add_subplot(images[index]) for index in range(6)], key_frame, voxel_centres(np.argwhere(hits), volume)
    )
    below = grid[1].subgridspec(1, columns, wspace=0.12, width_ratios=(1, 1.25) * (columns // 2))

    above = figure.add_subplot(below[0])
    _draw_above(above, _highest(occupied, colours, values), volume)
    above.set_title("prediction from above", fontsize=10)
    perspective = figure.add_subplot(below[1], projection="3d")
    _draw_perspective(perspective, occupied, colours, volume)
    perspective.set_title("prediction in perspective", fontsize=10)
    bar = figure.colorbar(
        matplotlib.cm.ScalarMappable(scale, SIMILARITY),
        ax=perspective,
        orientation="horizontal",
        shrink=0.6,
        pad=0.02,
    )
    bar.set_label("similarity with the phrase (dot product)", fontsize=8)
    bar.ax.tick_params(labelsize=7)

    if target is not None:
        solid = (target > 0) & (target < EMPTY)
        classes = target[solid]
        class_colours = CLASS_COLOURS[classes] / 255.0
        truth_above = figure.add_subplot(below[2])
        _draw_above(truth_above, _highest(solid, class_colours, np.argwhere(solid)[:, 2].astype(float)), volume)
        truth_above.set_title("ground truth from above (lidar)", fontsize=10)
        truth = figure.add_subplot(below[3], projection="3d")
        _draw_perspective(truth, solid, class_colours, volume)
        truth.set_title("ground truth in perspective", fontsize=10)
        truth.legend(
            handles=[
                Patch(color=CLASS_COLOURS[index] / 255.0, label=CLASS_NAMES[index].replace("_", " "))
                for index in np.unique(classes)
            ],
            ncols=4,
            fontsize=7,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.02),
            frameon=False,
        )
    figure.suptitle(title, fontsize=14, fontweight="bold")
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80, format="png")
    plt.close(figure)
    path.write_bytes(buffer.getvalue())
