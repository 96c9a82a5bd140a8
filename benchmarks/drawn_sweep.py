"""A sweep that is drawn, for benchmarks that need points where a lidar would have them."""

import numpy as np


def sweep(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A drawn sweep: float32 points [n, 3] in metres and classes [n]."""
    rng = np.random.default_rng(seed)
    azimuth = rng.uniform(0, 2 * np.pi, count)
    elevation = np.radians(rng.choice(np.linspace(-30, 10, 32), count))
    wall = 15 + 25 * (1 + np.sin(3 * azimuth)) + rng.normal(0, 0.3, count)
    ground = np.where(elevation < 0, 1.84 / np.sin(np.maximum(-elevation, 1e-3)), np.inf)
    distance = np.minimum(wall / np.cos(elevation), ground) * rng.normal(1, 0.002, count)
    direction = (np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation))
    return (np.stack(direction, -1) * distance[:, None]).astype(np.float32), rng.integers(0, 17, count, np.uint8)
