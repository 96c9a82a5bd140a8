import sys

import numpy as np
import pytest

from pop3d_jax import FeatureGrids
from pop3d_jax.data.records import RecordSource
from pop3d_jax.nuscenes import CAMERAS
from pop3d_jax.text import TextClassifier
from pop3d_jax.viewer.recording import write_recording
from pop3d_jax.viewer.scene import read_scene


def test_a_recording_holds_voxels_phrases_sweep_and_cameras(small_grids, tmp_path):
    pytest.importorskip("rerun", reason="needs the extra: pip install rerun-sdk")
    grids = FeatureGrids.open(small_grids)
    source = RecordSource(grids.store.attributes["config"]["data"]["records"], "train")
    scene, _ = read_scene(grids, source, "0")
    dim = scene.directions[0].shape[1]
    classifier = TextClassifier(np.eye(2, dim, dtype=np.float32), np.array([4, 16], np.uint8), ("car", "tree"))
    out = tmp_path / "new" / "scene.rrd"
    write_recording(out, scene, ["car"], grids.clip, classifier)
    recorded = out.read_bytes()
    entities = ["voxels/class", "voxels/car", "sweep", *CAMERAS, *(f"{camera}/image" for camera in CAMERAS)]
    assert [name for name in entities if f"/lidar/{name}".encode() not in recorded] == []


def test_without_rerun_the_way_out_is_named(monkeypatch, tmp_path, small_grids):
    monkeypatch.setitem(sys.modules, "rerun", None)
    grids = FeatureGrids.open(small_grids)
    source = RecordSource(grids.store.attributes["config"]["data"]["records"], "train")
    scene, _ = read_scene(grids, source, "0", key_frames=1)
    classifier = TextClassifier(np.eye(1, 16, dtype=np.float32), np.array([4], np.uint8), ("car",))
    with pytest.raises(ValueError, match="pip install rerun-sdk"):
        write_recording(tmp_path / "scene.rrd", scene, [], grids.clip, classifier)
