"""Rigid transforms and pinhole projection between the frames of a driving rig.

Frames (metres): lidar x right, y forward, z up; ego x forward, y left, z up; camera x right, y down, z
forward.
Everything here runs on the host in float64: nuScenes passes through global coordinates of a thousand metres,
where float32 rounds by a tenth of a millimetre.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64


def quaternion_to_rotation(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3 3"]:
    """Rotation matrix of a quaternion (w, x, y, z), which is normalised first.

    Raises:
      ValueError: the quaternion is zero or not finite.
    """
    quaternion = np.asarray(quaternion, np.float64)
    norm = np.linalg.norm(quaternion)
    if not np.isfinite(norm) or norm == 0.0:
        raise ValueError(f"not a rotation: quaternion {quaternion.tolist()}")
    if abs(1.0 - norm * norm) >= 1e-14:
        quaternion = quaternion / norm
    w, x, y, z = quaternion
    # Product of the matrices of q v and v q*: of the usual forms the one that rounds like the devkit's.
    left = np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])
    right = np.array([[w, -x, -y, -z], [x, w, z, -y], [y, -z, w, x], [z, y, -x, w]])
    return (left @ right.T)[1:, 1:]


def rotation_to_quaternion(rotation: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "4"]:
    """Unit quaternion (w, x, y, z), w >= 0, of a rotation: leading eigenvector of Bar-Itzhack's matrix."""
    r = np.asarray(rotation, np.float64)
    k = np.array(
        [
            [r[0, 0] + r[1, 1] + r[2, 2], 0, 0, 0],
            [r[2, 1] - r[1, 2], r[0, 0] - r[1, 1] - r[2, 2], 0, 0],
            [r[0, 2] - r[2, 0], r[1, 0] + r[0, 1], r[1, 1] - r[0, 0] - r[2, 2], 0],
            [r[1, 0] - r[0, 1], r[2, 0] + r[0, 2], r[2, 1] + r[1, 2], r[2, 2] - r[0, 0] - r[1, 1]],
        ]
    )
    quaternion = np.linalg.eigh(k)[1][:, -1]  # eigh reads the lower triangle only
    return -quaternion if quaternion[0] < 0 else quaternion


def rigid_transform(rotation: Float[np.ndarray, "4"], translation: Float[np.ndarray, "3"]) -> Float[np.ndarray, "4 4"]:
    """4x4 transform of a table row: quaternion (w, x, y, z) and translation in metres."""
    transform = np.eye(4)
    transform[:3, :3] = quaternion_to_rotation(rotation)
    transform[:3, 3] = translation
    return transform


def apply_rigid(
    transform: Float[np.ndarray, "4 4"], points: Float[np.ndarray, "points 3"]
) -> Float64[np.ndarray, "points 3"]:
    """Points in another frame, column by column: the threads of a matrix product cost more than three columns are."""
    x, y, z = points.astype(np.float64).T
    return np.stack([a * x + b * y + c * z + d for a, b, c, d in transform[:3]], -1)


def invert_rigid(transform: Float[np.ndarray, "*batch 4 4"]) -> Float[np.ndarray, "*batch 4 4"]:
    """Inverse of a rigid transform by its transpose: exact where a general inverse rounds."""
    inverse = np.zeros_like(transform)
    rotation = np.swapaxes(transform[..., :3, :3], -1, -2)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -(rotation @ transform[..., :3, 3, None])[..., 0]
    inverse[..., 3, 3] = 1.0
    return inverse


def lidar_to_camera(
    lidar_to_ego: Float[np.ndarray, "4 4"],
    lidar_ego_to_global: Float[np.ndarray, "4 4"],
    camera_to_ego: Float[np.ndarray, "4 4"],
    camera_ego_to_global: Float[np.ndarray, "4 4"],
) -> Float[np.ndarray, "4 4"]:
    """Lidar to ego (lidar time) to global to ego (camera time) to camera.

    Two ego poses, because the sensors are read up to 43 ms apart and the car moves up to 0.4 m in that time.
    The order of operations is that of the official info files and loaders (row vectors, camera_to_lidar
    first, then its inverse), so that the result equals theirs bit for bit.
    """

    def parts(transform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return transform[:3, :3], transform[:3, 3]

    ego_rotation, ego_translation = parts(lidar_to_ego)
    global_rotation, global_translation = parts(lidar_ego_to_global)
    camera_rotation, camera_translation = parts(camera_to_ego)
    camera_global_rotation, camera_global_translation = parts(camera_ego_to_global)
    ego_inverse = np.linalg.inv(ego_rotation).T
    global_to_lidar = np.linalg.inv(global_rotation).T @ ego_inverse
    rotation = ((camera_rotation.T @ camera_global_rotation.T) @ global_to_lidar).T
    translation = (camera_translation @ camera_global_rotation.T + camera_global_translation) @ global_to_lidar
    translation -= global_translation @ global_to_lidar + ego_translation @ ego_inverse

    transform = np.eye(4)
    transform[:3, :3] = np.linalg.inv(rotation)
    transform[:3, 3] = -(translation @ transform[:3, :3].T)
    return transform


def lidar_to_image(
    intrinsics: Float[np.ndarray, "*batch 3 3"], lidar_to_camera: Float[np.ndarray, "*batch 4 4"]
) -> Float[np.ndarray, "*batch 4 4"]:
    """Padded intrinsics times lidar_to_camera: (x, y, z, 1) in metres to (u * depth, v * depth, depth, 1)."""
    padded = np.zeros_like(lidar_to_camera)
    padded[..., :3, :3] = intrinsics
    padded[..., 3, 3] = 1.0
    return padded @ lidar_to_camera


def project(
    points: Float[np.ndarray, "points 3"], lidar_to_image: Float[np.ndarray, "4 4"]
) -> tuple[Float[np.ndarray, "points 2"], Float[np.ndarray, " points"]]:
    """Pinhole projection.

    Args:
      points: in metres, lidar frame.
      lidar_to_image: as `lidar_to_image()` returns it.

    Returns:
      (u, v) in pixels, u to the right and v down, and the depth in metres. Points in the camera plane get
      infinite or undefined pixels; select by depth (see `visible`).
    """
    homogeneous = np.asarray(points, np.float64) @ lidar_to_image[:3, :3].T + lidar_to_image[:3, 3]
    depth = homogeneous[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        uv = homogeneous[:, :2] / depth[:, None]
    return uv, depth


def visible(
    uv: Float[np.ndarray, "points 2"],
    depth: Float[np.ndarray, " points"],
    image_hw: tuple[int, int],
    min_depth: float = 1.0,
) -> Bool[np.ndarray, " points"]:
    """Points that POP-3D counts as seen: depth > min_depth, 0 < u < width - 1, 0 < v < height - 1 (strict).

    No test of occlusion, as official (`generate_projections_nuscenes.py`).
    """
    height, width = image_hw
    u, v = uv[:, 0], uv[:, 1]
    return (depth > min_depth) & (u > 0) & (u < width - 1) & (v > 0) & (v < height - 1)
