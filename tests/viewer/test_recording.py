import sys

import numpy as np
import pytest

from pop3d_jax import FeatureGrids
from pop3d_jax.data.records import RecordSource
from pop3d_jax.nuscenes import CAMERAS
from pop3d_jax.text import TextClassifier, embed_phrases
from pop3d_jax.viewer.recording import write_recording
from pop3d_jax.viewer.scene import assigned_classes, read_scene


def recorded(path):
    """Of each entity, its logged rows in the order of time: the components by name."""
    chunk = pytest.importorskip("rerun.chunk", reason="needs the extra: pip install rerun-sdk")
    entities = {}
    for part in chunk.RrdReader(path).stream():
        entities.setdefault(part.entity_path, []).extend(part.to_record_batch().to_pylist())
    for rows in entities.values():
        rows.sort(key=lambda row: row.get("sample_time") or 0)
    return entities


def test_a_recording_holds_voxels_phrases_sweep_and_cameras(small_grids, tmp_path):
    pytest.importorskip("rerun", reason="needs the extra: pip install rerun-sdk")
    grids = FeatureGrids.open(small_grids)
    source = RecordSource(grids.store.attributes["config"]["data"]["records"], "train")
    scene, _ = read_scene(grids, source, "0")
    dim = scene.grids[0].features.shape[1]
    classifier = TextClassifier(np.eye(2, dim, dtype=np.float32), np.array([4, 16], np.uint8), ("car", "tree"))
    out = tmp_path / "new" / "scene.rrd"
    write_recording(out, scene, ["car"], grids.clip, classifier)
    entities = recorded(out)
    names = ["voxels/class", "voxels/car", "sweep", *CAMERAS, *(f"{camera}/image" for camera in CAMERAS)]
    assert {f"/lidar/{name}" for name in names} <= set(entities)
    (vector,) = embed_phrases(grids.clip, ["car"])
    low, high = np.quantile(np.concatenate([grid.features @ vector for grid in scene.grids]), (0.5, 0.998))
    for place, (grid, key_frame) in enumerate(zip(scene.grids, scene.key_frames, strict=True)):
        by_class, by_phrase, sweep = (entities[f"/lidar/{name}"][place] for name in names[:3])
        for row in (by_class, by_phrase, sweep):
            assert np.datetime64(row["sample_time"], "us") == np.datetime64(grid.timestamp, "us")
        for row in (by_class, by_phrase):
            assert len(row["Boxes3D:centers"]) == len(grid.coordinates) > 0
            np.testing.assert_allclose(row["Boxes3D:centers"], grid.centres, rtol=1e-6)
            sizes = np.broadcast_to(grid.volume.voxel_size, (len(grid.coordinates), 3))
            np.testing.assert_allclose(2 * np.array(row["Boxes3D:half_sizes"]), sizes, rtol=1e-6)
        assert by_class["Boxes3D:class_ids"] == assigned_classes(grid.features, classifier)[0].tolist()
        red, _, blue, opaque = np.array(by_phrase["Boxes3D:colors"], ">u4").view(np.uint8).reshape(-1, 4).T.astype(int)
        share = (grid.features @ vector - low) / (high - low)
        assert (red - blue)[share <= 0].max(initial=-12) <= -10  # the bluish grey of the first stop
        assert (red - blue)[share > 0.5].min(initial=200) > 100
        assert (opaque == 255).all()
        np.testing.assert_allclose(sweep["Points3D:positions"], key_frame.points[:, :3], rtol=1e-6)


def test_without_rerun_the_way_out_is_named(monkeypatch, tmp_path, small_grids):
    monkeypatch.setitem(sys.modules, "rerun", None)
    grids = FeatureGrids.open(small_grids)
    source = RecordSource(grids.store.attributes["config"]["data"]["records"], "train")
    scene, _ = read_scene(grids, source, "0", key_frames=1)
    classifier = TextClassifier(np.eye(1, 16, dtype=np.float32), np.array([4], np.uint8), ("car",))
    with pytest.raises(ValueError, match="pip install rerun-sdk"):
        write_recording(tmp_path / "scene.rrd", scene, [], grids.clip, classifier)
