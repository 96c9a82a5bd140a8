"""Size of the page and how fast it draws, in headless Chromium that renders in software: no graphics card takes part.

    python -m benchmarks.viewer --grids grids.zarr [--records RECORDS --split SPLIT] [--json docs/results]

The voxels of a stored key frame are replaced by random ones, as many as asked for. Images and sweep are those of the
first key frame of --records, the store's own by default. Needs Playwright and Chromium (requirements-dev.txt).
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags
from playwright.sync_api import sync_playwright

from benchmarks.report import Table
from pop3d_jax import FeatureGrids
from pop3d_jax.data.records import RecordSource
from pop3d_jax.grids.feature_grids import BACKGROUND_PHRASES
from pop3d_jax.viewer.page import render_page
from pop3d_jax.viewer.scene import PhraseScorer, Scene, default_classifier, scene_json

_GRIDS = flags.DEFINE_string("grids", None, "store that pop3d_jax.export wrote", required=True)
_RECORDS = flags.DEFINE_string("records", None, "records of the images and the sweep")
_SPLIT = flags.DEFINE_string("split", None, "their split")
_VOXELS = flags.DEFINE_list("voxels", ["1000", "4000", "10000", "20000"], "numbers of voxels")
_FRAMES = flags.DEFINE_integer("frames", 60, "pictures drawn while the view turns")
_JSON = flags.DEFINE_string("json", None, "folder of viewer.json")
# That of the nuScenes configurations.
_GRID_SIZE = (100, 100, 8)
# Turns the view a little for every picture; reading a pixel waits until it is drawn.
_TURN = """([pictures, draw]) => {
  const { view } = window.sceneView;
  const gl = view.renderer.getContext();
  const pixel = new Uint8Array(4);
  const start = performance.now();
  for (let i = 0; i < pictures; i++) {
    view.camera.position.applyAxisAngle(view.camera.up, (2 * Math.PI) / pictures);
    view.camera.lookAt(view.controls.target);
    view[draw]();
    gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, pixel);
  }
  return (performance.now() - start) / pictures;
}"""
_RECOLOUR = """() => {
  const start = performance.now();
  const mode = document.getElementById("mode");
  mode.value = "similarity";
  mode.dispatchEvent(new Event("change"));
  return performance.now() - start;
}"""
_PICK = """() => {
  const { view } = window.sceneView;
  const area = view.canvas.getBoundingClientRect();
  const start = performance.now();
  for (let i = 0; i < 200; i++) view.pick(area.left + area.width * (0.3 + 0.002 * i), area.top + area.height / 2);
  return (performance.now() - start) / 200;
}"""


def scene_of_size(grids: FeatureGrids, source: RecordSource, voxels: int) -> Scene:
    """A key frame with random voxels: most of them near the ground, as in streets."""
    generator = np.random.default_rng(0)
    volume = dataclasses.replace(grids.volume, grid_size=_GRID_SIZE)
    grid, shape = dataclasses.replace(grids[0], volume=volume), np.array(_GRID_SIZE)
    cells = generator.permutation(shape.prod())[: 4 * voxels]
    coordinates = np.stack(np.unravel_index(cells, shape), -1)
    coordinates = coordinates[np.argsort(coordinates[:, 2], kind="stable")][:voxels].astype(np.uint8)
    features = generator.normal(size=(len(coordinates), grid.features.shape[1])).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    occupancy = generator.random(len(coordinates)).astype(np.float32)
    changed = dataclasses.replace(grid, coordinates=coordinates, features=features, occupancy=occupancy)
    return Scene("random voxels", [changed], [len(coordinates)], [source[0]])


def main(_: list[str]) -> None:
    grids = FeatureGrids.open(_GRIDS.value)
    attributes = grids.store.attributes
    source = RecordSource(
        _RECORDS.value or attributes["config"]["data"]["records"], _SPLIT.value or attributes["records"]["split"]
    )
    classifier = default_classifier(grids)
    table = Table(
        "viewer",
        [
            "voxels",
            "lidar points",
            "page",
            "of it the key frame",
            "faces",
            "a picture that moves",
            "one at rest",
            "new colours",
            "hover",
        ],
    )
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"],
        )
        empty = len(render_page({}))
        for voxels in map(int, _VOXELS.value):
            scene = scene_of_size(grids, source, voxels)
            content = scene_json(scene, 0, PhraseScorer(scene, grids), BACKGROUND_PHRASES, classifier)
            path = Path(folder) / f"{voxels}.html"
            path.write_text(render_page(content))
            size = path.stat().st_size
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(path.as_uri())
            page.wait_for_function("() => window.sceneView !== undefined")
            page.evaluate(_TURN, [5, "render"])
            milliseconds = page.evaluate(_TURN, [_FRAMES.value, "render"])
            faces = page.evaluate("window.sceneView.view.faces.voxels.length")
            shown = len(scene.grids[0].coordinates)
            table.add(
                f"{shown:,}",
                f"{len(scene.key_frames[0].points):,}",
                f"{size / 1e6:.2f} MB",
                f"{(size - empty) / 1e6:.2f} MB",
                f"{faces:,}",
                f"{milliseconds:.0f} ms, {1000 / milliseconds:.0f} a second",
                f"{page.evaluate(_TURN, [5, 'renderSmooth']):.0f} ms",
                f"{page.evaluate(_RECOLOUR):.0f} ms",
                f"{page.evaluate(_PICK):.2f} ms",
            )
            page.close()
        browser.close()
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)
