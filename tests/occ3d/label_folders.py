"""Folders of ground truth and predictions as Occ3D and other methods write them, for tests."""

import numpy as np

from pop3d_jax.occ3d.grid import FREE, OCC3D_VOLUME

SHAPE = OCC3D_VOLUME.grid_size


def random_labels(seed, share_free=0.9):
    """Labels of a key frame, mostly free."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, FREE, SHAPE).astype(np.uint8)
    labels[random.random(SHAPE) < share_free] = FREE
    return labels


def random_mask(seed):
    return (np.random.default_rng(seed).random(SHAPE) < 0.5).astype(np.uint8)


def write_truth(folder, scene, token, semantics=None, **changes):
    """`labels.npz` of a key frame; changes replace arrays, None leaves one out."""
    seed = sum(token.encode())
    arrays = {
        "semantics": random_labels(seed) if semantics is None else semantics,
        "mask_lidar": random_mask(seed + 1),
        "mask_camera": random_mask(seed + 2),
    } | changes
    path = folder / scene / token / "labels.npz"
    path.parent.mkdir(parents=True)
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    return path
