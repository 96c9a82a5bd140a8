"""The cameras that the network's benchmarks look through: what a camera sees decides how much the encoder has to do."""

import numpy as np

# Yaw of the cameras in degrees, clockwise from straight ahead, and their horizontal field of view.
_RIG = ((0, 70), (55, 70), (-55, 70), (180, 110), (-110, 70), (110, 70))


def camera_rig(height: int, width: int) -> np.ndarray:
    """lidar_to_image [camera, 4, 4] of cameras at the lidar's place, 0.3 m below it."""
    matrices = np.zeros((len(_RIG), 4, 4), np.float32)
    for matrix, (yaw, field) in zip(matrices, np.radians(_RIG), strict=True):
        focal = width / 2 / np.tan(field / 2)
        intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        rotation = np.array([[np.cos(yaw), -np.sin(yaw), 0], [0, 0, -1], [np.sin(yaw), np.cos(yaw), 0]])
        matrix[:3, :3] = intrinsics @ rotation
        matrix[:3, 3] = intrinsics @ np.array([0.0, -0.3, 0.0])
        matrix[3, 3] = 1.0
    return matrices
