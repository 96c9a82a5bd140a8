"""The same scene as a recording for the Rerun viewer: an extra, `pip install rerun-sdk`."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from pop3d_jax.data.records import KeyFrame
from pop3d_jax.geometry import invert_rigid
from pop3d_jax.models.clip import LoadedCLIP
from pop3d_jax.nuscenes import CAMERAS, CLASS_COLOURS, CLASS_NAMES, EMPTY
from pop3d_jax.text import TextClassifier, embed_phrases
from pop3d_jax.viewer.colours import similarity_colours, similarity_range
from pop3d_jax.viewer.scene import Scene, assigned_classes

_TIMELINE = "sample_time"


def write_recording(
    path: epath.PathLike, scene: Scene, phrases: Sequence[str], clip: LoadedCLIP, classifier: TextClassifier
) -> None:
    """Writes a `.rrd` file: voxels by class and by phrase, the sweep, the six cameras, along the time of the samples.

    Args:
      path: local file.
      scene: the key frames.
      phrases: a layer of voxels for each, in the colours of the page.
      clip: its text tower embeds them.
      classifier: gives every voxel its class.

    Raises:
      ValueError: rerun-sdk is not installed.
    """
    try:
        import rerun as rr
    except ImportError as error:
        raise ValueError("a recording (.rrd) needs the Rerun library: pip install rerun-sdk") from error
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recording = rr.RecordingStream("pop3d_jax", recording_id=scene.title)
    recording.save(str(path))
    classes = [rr.AnnotationInfo(id=i, label=CLASS_NAMES[i], color=CLASS_COLOURS[i].tolist()) for i in range(EMPTY)]
    recording.log("lidar", rr.AnnotationContext(classes), static=True)
    recording.log("lidar", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
    vectors = embed_phrases(clip, phrases) if phrases else np.zeros((0, 0), np.float32)
    similarities = [[grid.features @ vector for grid in scene.grids] for vector in vectors]
    ranges = [similarity_range(np.concatenate(of_phrase)) for of_phrase in similarities]
    for number, (grid, key_frame) in enumerate(zip(scene.grids, scene.key_frames, strict=True)):
        recording.set_time(_TIMELINE, timestamp=np.datetime64(grid.timestamp, "us"))
        half = np.broadcast_to(np.divide(grid.volume.voxel_size, 2.0), (len(grid.coordinates), 3))
        boxes = {"centers": grid.centres, "half_sizes": half, "fill_mode": "solid"}
        by_class, _ = assigned_classes(grid.features, classifier)
        recording.log("lidar/voxels/class", rr.Boxes3D(**boxes, class_ids=by_class, show_labels=False))
        for phrase, of_phrase, (low, high) in zip(phrases, similarities, ranges, strict=True):
            recording.log(
                f"lidar/voxels/{rr.escape_entity_path_part(phrase)}",
                rr.Boxes3D(**boxes, colors=similarity_colours(of_phrase[number], low, high)),
            )
        recording.log("lidar/sweep", rr.Points3D(key_frame.points[:, :3], radii=0.03))
        _log_cameras(rr, recording, key_frame)
    recording.flush()
    recording.disconnect()


def _log_cameras(rr: object, recording: object, key_frame: KeyFrame) -> None:
    for index, camera in enumerate(CAMERAS):
        camera_to_lidar = invert_rigid(key_frame.lidar_to_camera[index])
        name = f"lidar/{camera}"
        recording.log(name, rr.Transform3D(translation=camera_to_lidar[:3, 3], mat3x3=camera_to_lidar[:3, :3]))
        recording.log(f"{name}/image", rr.Pinhole(image_from_camera=key_frame.intrinsics[index]))
        recording.log(f"{name}/image", rr.EncodedImage(contents=key_frame.images[index], media_type="image/jpeg"))
