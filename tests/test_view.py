"""The page in a real browser, made by the command from a trained run's grids."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pop3d_jax import FeatureGrids
from pop3d_jax.geometry import lidar_to_image, project, visible
from pop3d_jax.metrics import assign_classes
from pop3d_jax.nuscenes import CAMERAS, CLASS_NAMES
from pop3d_jax.text import embed_phrases
from pop3d_jax.viewer.page import render_page
from pop3d_jax.viewer.scene import default_classifier
from pop3d_jax.voxels import voxel_centres

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r requirements-dev.txt")

_PROJECT = Path(__file__).resolve().parent.parent
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MARKUP = "<img src=x onerror='window.injected=1'></script><script>window.injected=1</script>"
_PHRASES = ("a red car", "a tree", _MARKUP)


def view(*flags):
    return subprocess.run(
        [sys.executable, "-m", "pop3d_jax.view", *map(str, flags)],
        cwd=_PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = next(filter(None, map(shutil.which, _BROWSERS)), None)
        if found is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt-get install chromium, or python -m playwright install chromium")
        # Software rendering: the same pictures with and without a graphics card. Containers run it as root.
        arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        chromium = started.chromium.launch(executable_path=found, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Opens an address without a network: the page, and what went wrong in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")

    def opened(address, offline=True):
        context.set_offline(offline)
        page = context.new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda line: line.type == "error" and page.problems.append(line.text))
        page.goto(address)
        page.wait_for_function("() => window.sceneView !== undefined")
        return page

    yield opened
    context.close()


@pytest.fixture(scope="module")
def scene_file(small_grids, tmp_path_factory):
    out = tmp_path_factory.mktemp("view") / "scene.html"
    done = view(f"--grids={small_grids}", *(f"--text={phrase}" for phrase in _PHRASES), f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"scene.html: 2 key frames, \d\.\d MB", done.stdout)
    return out


@pytest.fixture
def page(open_page, scene_file):
    page = open_page(scene_file.as_uri())
    yield page
    assert page.problems == []


@pytest.fixture(scope="module")
def sparse_file(small_grids, tmp_path_factory):
    """A page whose grid has gaps: the store holds all voxels."""
    out = tmp_path_factory.mktemp("sparse") / "scene.html"
    done = view(f"--grids={small_grids}", "--max_voxels=150", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"300 of \d+ voxels shown", done.stderr)
    return out


@pytest.fixture
def sparse_page(open_page, sparse_file):
    page = open_page(sparse_file.as_uri())
    yield page
    assert page.problems == []


def coordinates_of(page):
    return np.reshape(page.evaluate("Array.from(window.sceneView.view.frame.coordinates)"), (-1, 3))


@pytest.fixture(scope="module")
def grids(small_grids):
    return FeatureGrids.open(small_grids)


@pytest.fixture(scope="module")
def shown(grids):
    """The key frame that the page opens with."""
    return grids[0]


@pytest.fixture(scope="module")
def classes(grids, shown):
    """Name of each voxel's class."""
    classifier = default_classifier(grids)
    assigned = assign_classes(*map(jnp.asarray, (shown.features, classifier.embeddings, classifier.classes)))
    return [CLASS_NAMES[index].replace("_", " ") for index in np.asarray(assigned)]


def similarities(grids, shown, phrase):
    return shown.features @ embed_phrases(grids.clip, [phrase])[0] / np.linalg.norm(shown.features, axis=-1)


def visible_voxel(page):
    """A voxel that the mouse reaches at its own centre, and that place."""
    found = page.evaluate(
        """() => {
          const { view } = window.sceneView;
          for (let voxel = 0; voxel < view.frame.count; voxel++) {
            const { x, y } = view.place(voxel);
            const inside = document.elementFromPoint(x, y) === view.canvas;
            if (inside && view.pick(x, y) === voxel) return [voxel, x, y];
          }
        }"""
    )
    assert found, "no voxel can be reached"
    return found


def colours_of_canvas(page):
    picture = np.asarray(Image.open(io.BytesIO(page.locator("#voxels").screenshot())).convert("RGB"))
    return np.unique(picture.reshape(-1, 3), axis=0)


def test_it_draws(page, shown):
    assert page.locator(".left-out").count() == 0
    assert page.locator("#count").inner_text() == f"{len(shown.coordinates)} voxels"
    assert page.locator("#token").inner_text() == shown.sample_token
    with_voxels = len(colours_of_canvas(page))
    page.locator("#show-voxels").uncheck()
    page.wait_for_function("() => !window.sceneView.view.pending")
    assert with_voxels > 3 * len(colours_of_canvas(page)) > 0
    for image in page.locator("#images img").all():
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 160


def test_a_click_names_the_voxel_and_rings_it_in_the_images(page, grids, shown, classes):
    voxel, x, y = visible_voxel(page)
    page.mouse.click(x, y)
    facts = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True))
    assert facts["class"] == classes[voxel]
    assert facts["voxel"] == ", ".join(map(str, shown.coordinates[voxel]))
    assert float(facts["“a red car”"]) == pytest.approx(similarities(grids, shown, "a red car")[voxel], abs=0.01)
    centre = shown.centres[voxel]
    assert facts["distance"] == f"{np.linalg.norm(centre):.1f} m"
    world = shown.ego_to_global @ shown.lidar_to_ego @ np.append(centre, 1.0)
    np.testing.assert_allclose([float(value) for value in facts["global x, y"].split(", ")], world[:2], atol=0.06)

    order = ("FRONT_LEFT", "FRONT", "FRONT_RIGHT", "BACK_RIGHT", "BACK", "BACK_LEFT")
    for camera, strip in zip(order, page.locator("#images svg").all(), strict=True):
        number = CAMERAS.index(f"CAM_{camera}")
        matrix = lidar_to_image(shown.intrinsics[number], shown.lidar_to_camera[number])
        pixel, depth = project(centre[None], matrix)
        rings = strip.locator("circle.selected")
        if visible(pixel, depth, (90, 160))[0]:
            drawn = [float(rings.get_attribute(name)) for name in ("cx", "cy")]
            np.testing.assert_allclose(drawn, pixel[0], atol=0.01)
        else:
            assert rings.count() == 0


def test_a_phrase_colours_the_voxels_and_lists_the_best(page, grids, shown):
    page.locator("#phrase").fill("a tree")
    page.locator("#ask button").click()
    assert page.locator("#mode").input_value() == "similarity"
    expected = similarities(grids, shown, "a tree")
    hits = {hit.sample_token: hit for hit in grids.search("a tree", top=len(grids))}
    hit = hits[shown.sample_token]
    first = page.locator(".hits button").first
    assert float(first.inner_text().split()[0]) == pytest.approx(expected.max(), abs=0.005)
    verdict = page.locator("#answer p")
    assert ("seems to be here" in verdict.inner_text()) == hit.present
    assert f" is {hit.margin:+.3f}." in verdict.inner_text()
    first.click()
    # Eight bits tell as much apart.
    selected = page.evaluate("window.sceneView.state.selected")
    assert expected[selected] >= expected.max() - 1.01 * (expected.max() - expected.min()) / 255
    voxels, colours = page.evaluate(
        """() => {
          const { faces, voxels } = window.sceneView.view;
          return [Array.from(faces.voxels), Array.from(voxels.geometry.attributes.shade.array)];
        }"""
    )
    red, _, blue, _ = np.reshape(colours, (-1, 16))[:, :4].T
    good, bad = (np.isin(voxels, np.argsort(expected)[part]) for part in (slice(-2, None), slice(2)))
    assert (red[good] > blue[good] + 25).all()
    assert (np.abs(red[bad] - blue[bad]) < 35).all()
    page.locator("#phrase").fill("a zebra on skates")
    page.locator("#phrase").press("Enter")
    assert "--serve" in page.locator("#message").inner_text()


def test_the_faces_are_those_between_a_voxel_and_none(sparse_page, shown):
    """Every face that can be seen is there, once, in its place and turned outwards."""
    coordinates = coordinates_of(sparse_page)
    centres = voxel_centres(coordinates, shown.volume)
    filled = np.zeros(np.add(shown.volume.grid_size, 2), bool)
    filled[tuple(coordinates.T + 1)] = True
    expected = set()
    for axis in range(3):
        for sign in (-1, 1):
            beside = coordinates + 1
            beside[:, axis] += sign
            for voxel in np.flatnonzero(~filled[tuple(beside.T)]):
                expected.add((int(voxel), axis, sign))
    voxels, positions = sparse_page.evaluate(
        "(({ faces }) => [Array.from(faces.voxels), Array.from(faces.positions)])(window.sceneView.view)"
    )
    assert 0 < len(voxels) == len(expected) < 6 * len(coordinates)
    size = np.array(shown.volume.voxel_size)
    found = set()
    for voxel, corners in zip(voxels, np.reshape(positions, (-1, 4, 3)), strict=True):
        offset = (corners.mean(0) - centres[voxel]) / size
        axis = int(np.argmax(np.abs(offset)))
        np.testing.assert_allclose(np.abs(offset), np.eye(3)[axis] / 2, atol=1e-4)
        np.testing.assert_allclose(np.ptp(corners, axis=0), np.where(np.arange(3) == axis, 0.0, size), atol=1e-4)
        sign = int(np.sign(offset[axis]))
        assert np.sign(np.cross(corners[1] - corners[0], corners[2] - corners[1])[axis]) == sign
        found.add((voxel, axis, sign))
    assert found == expected


def test_only_fronts_are_drawn(sparse_page):
    """From anywhere, the faces handed to the graphics card are just those whose front looks at the camera."""
    for position in ((60.0, -70.0, 40.0), (-3.3, 4.4, 0.1), (0.0, 80.0, -20.0)):
        drawn, positions = sparse_page.evaluate(
            """(position) => {
              const { view } = window.sceneView;
              view.camera.position.set(...position);
              view.render();
              const drawn = view.voxels.geometry.groups.map(({ start, count }) => [start / 6, (start + count) / 6]);
              return [drawn, Array.from(view.faces.positions)];
            }""",
            position,
        )
        corners = np.reshape(positions, (-1, 4, 3))
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 1])
        front = ((position - corners[:, 0]) * normals).sum(-1) > 0
        handed = np.zeros(len(corners), bool)
        for start, stop in drawn:
            handed[start:stop] = True
        np.testing.assert_array_equal(handed, front)
        assert 0 < front.sum() < len(front)


def test_the_voxel_under_the_mouse_is_the_first_on_its_ray(sparse_page, shown):
    """Against a test of every voxel, from outside, from low above the ground and from among the voxels."""
    centres = voxel_centres(coordinates_of(sparse_page), shown.volume)
    minimum = centres - np.divide(shown.volume.voxel_size, 2)
    maximum = centres + np.divide(shown.volume.voxel_size, 2)
    hits = 0
    for position in (None, (70.0, 5.0, 4.0), (0.1, 0.2, 0.3)):
        picked = sparse_page.evaluate(
            """(position) => {
              const { view } = window.sceneView;
              if (position) view.camera.position.set(...position);
              view.camera.lookAt(view.controls.target);
              view.render();
              const area = view.canvas.getBoundingClientRect();
              const found = [];
              for (let i = 0; i < 20; i++) for (let j = 0; j < 20; j++) {
                const [x, y] = [(i + 0.37) / 20, (j + 0.41) / 20];
                const far = view.marker.position.clone().set(2 * x - 1, 1 - 2 * y, 0.5).unproject(view.camera);
                const voxel = view.pick(area.left + x * area.width, area.top + y * area.height);
                found.push([voxel, ...view.camera.position.toArray(), ...far.toArray()]);
              }
              return found;
            }""",
            position,
        )
        for voxel, *ends in picked:
            start, end = np.reshape(ends, (2, 3))
            borders = np.stack([minimum - start, maximum - start]) / (end - start)
            enters, leaves = borders.min(0).max(-1), borders.max(0).min(-1)
            met = np.where((enters < leaves) & (enters > 0), enters, np.inf)
            if voxel < 0:
                assert np.isinf(met).all()
            else:
                assert met[voxel] == pytest.approx(met.min(), rel=1e-6)
                hits += 1
    assert hits > 100


def test_a_page_left_open_draws_nothing(page):
    page.wait_for_function("() => !window.sceneView.view.pending && window.sceneView.view.rest === null")
    drawn = page.evaluate("window.sceneView.view.drawn")
    for _ in range(10):
        page.evaluate("() => new Promise(requestAnimationFrame)")
    assert page.evaluate("window.sceneView.view.drawn") == drawn > 0
    page.locator("#reset").click()
    page.wait_for_function("drawn => window.sceneView.view.drawn > drawn", arg=drawn)


def test_what_is_left_out_is_said(sparse_page, shown):
    for mode in ("class", "height", "features"):
        sparse_page.locator("#mode").select_option(mode)
        expected = f"150 of {len(shown.coordinates)} voxels shown, the most probable (--max_voxels)."
        assert sparse_page.locator("#legend .left-out").inner_text() == expected


@pytest.mark.slow
def test_the_ending_decides_what_is_written(small_grids, tmp_path, scene_file):
    pytest.importorskip("rerun", reason="needs the extra: pip install rerun-sdk")
    done = view(f"--grids={small_grids}", "--text=a tree", f"--out={tmp_path / 'scene.rrd'}")
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["scene.rrd"]
    assert "rerun" in done.stdout
    assert (tmp_path / "scene.rrd").read_bytes()[:4] == b"RRF2"
    done = view(f"--grids={small_grids}", f"--out={tmp_path / 'scene.png'}")
    assert done.returncode != 0
    assert "must end in .html" in done.stderr


def test_every_way_to_colour_has_a_legend(page, shown):
    counts = [int(number.replace(",", "")) for number in page.locator(".number").all_inner_texts()]
    assert sum(counts) == len(shown.coordinates)
    page.locator("#mode").select_option("height")
    minimum, maximum = shown.volume.minimum[2], shown.volume.maximum[2]
    assert page.locator("#legend").inner_text().split("\n")[:2] == [f"{minimum:.1f} m", f"{maximum:.1f} m"]
    page.locator("#mode").select_option("features")
    assert "Red, green and blue" in page.locator("#legend").inner_text()


def test_the_mouse_over_a_voxel_shows_its_class(page, classes):
    voxel, x, y = visible_voxel(page)
    page.mouse.move(x, y)
    page.locator("#tip").wait_for(state="visible")
    assert page.locator("#tip").inner_text().startswith(classes[voxel])


def test_what_is_said_of_a_voxel_goes_when_the_voxel_does(page):
    _, x, y = visible_voxel(page)
    tip = page.locator("#tip")
    next_frame = "slider => { slider.value = 1; slider.dispatchEvent(new Event('input')); }"
    for change in (lambda: page.mouse.wheel(0, 100), lambda: page.locator("#time").evaluate(next_frame)):
        page.mouse.move(x, y)
        page.mouse.move(x + 1, y)
        tip.wait_for(state="visible")
        change()
        tip.wait_for(state="hidden")
        page.evaluate("window.sceneView.showFrame(window.sceneView.data.first); window.sceneView.view.resetCamera()")


def test_a_browser_without_webgl_is_told_so(browser, scene_file):
    context = browser.new_context()
    page = context.new_page()
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.goto(scene_file.as_uri())
    page.locator(".no-view").wait_for()
    assert "which this browser does not offer" in page.locator(".no-view").inner_text()
    context.close()


def test_the_last_question_is_answered_whatever_the_order_of_the_answers(open_page, scene_file, tmp_path):
    (data,) = re.findall(r'id="scene-data">(.*?)</script>', scene_file.read_text())
    scene = json.loads(data)
    known = scene["phrases"].pop(0)
    (tmp_path / "scene.html").write_text(render_page(scene, live=True))
    page = open_page((tmp_path / "scene.html").as_uri())
    # Answers are given by hand, the last question's first.
    page.evaluate(
        """() => {
          window.waiting = [];
          window.fetch = (address) => new Promise((answer) => window.waiting.push([address, answer]));
        }"""
    )
    asked = ["first", "second", "first"]
    for text in asked:
        page.locator("#phrase").fill(text)
        page.locator("#phrase").press("Enter")
    page.wait_for_function("window.waiting.length === 3")
    for number in (2, 1, 0):
        page.evaluate(
            "([number, phrase]) => window.waiting[number][1](new Response(JSON.stringify(phrase)))",
            [number, known | {"text": asked[number]}],
        )
        page.wait_for_function("text => window.sceneView.data.phrase(text) !== undefined", arg=asked[number])
    page.evaluate("() => new Promise((done) => setTimeout(done))")
    assert page.evaluate("window.sceneView.state.phrase.text") == "first"
    chips = page.locator("#phrases button").all_inner_texts()
    assert chips.count("first") == chips.count("second") == 1


def test_time_moves_to_the_next_key_frame(page, grids, shown):
    page.locator("#show-voxels").uncheck()
    page.locator("#time").evaluate("slider => { slider.value = 1; slider.dispatchEvent(new Event('input')); }")
    (other,) = {
        token
        for token, name in zip(grids.sample_tokens, grids.scene_names, strict=True)
        if name == shown.scene_name
    } - {shown.sample_token}  # fmt: skip
    assert page.locator("#token").inner_text() == other
    assert page.locator("#when").inner_text() == "2 of 2, 0.5 s"
    assert page.evaluate("window.sceneView.view.voxels.visible") is False


def test_dark_and_screenshot(page, shown):
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    with page.expect_download() as download:
        page.locator("#screenshot").click()
    assert download.value.suggested_filename == f"{shown.sample_token}.png"
    assert np.asarray(Image.open(download.value.path()).convert("RGB")).std() > 5


def test_markup_in_a_phrase_stays_text(page):
    page.locator("#phrases button", has_text="onerror").click()
    assert _MARKUP in page.locator("#answer p").inner_text()
    assert _MARKUP in page.locator("#legend").inner_text()
    assert page.locator("#answer img").count() == 0
    assert page.evaluate("window.injected") is None


def test_markup_in_names_stays_text(open_page, scene_file, tmp_path):
    (data,) = re.findall(r'id="scene-data">(.*?)</script>', scene_file.read_text())
    scene = json.loads(data)
    scene["title"] = scene["frames"][0]["sample_token"] = scene["phrases"][0]["text"] = _MARKUP
    scene["phrases"][0]["verdicts"][0] = {"margin": -1.0, "present": False, "rival": _MARKUP}
    for kind in scene["classes"]:
        kind["name"] = _MARKUP
    (tmp_path / "scene.html").write_text(render_page(scene))
    page = open_page((tmp_path / "scene.html").as_uri())
    page.locator(".hits button").first.click()
    _, x, y = visible_voxel(page)
    page.mouse.move(x, y)
    page.locator("#tip").wait_for(state="visible")
    for place in ("#title", "#token", "#legend", "#answer p", "#tip", "dl"):
        assert _MARKUP in page.locator(place).inner_text()
    assert page.locator("img").count() == page.locator("#images img").count() == 6
    assert page.evaluate("window.injected") is None
    assert page.problems == []


def test_no_script_but_the_pages_own_runs(open_page, scene_file, tmp_path):
    scripts = "<script>window.injected=1</script><script src='data:text/javascript,window.injected=1'></script>"
    (tmp_path / "scene.html").write_text(scene_file.read_text().replace("<footer", f"{scripts}<footer"))
    page = open_page((tmp_path / "scene.html").as_uri())
    assert page.evaluate("window.injected") is None
    assert len(page.problems) == 2
    assert all("Content Security Policy" in problem for problem in page.problems)


@pytest.mark.slow
def test_any_phrase_can_be_typed_into_a_served_page(open_page, grids, shown):
    process = subprocess.Popen(
        [sys.executable, "-m", "pop3d_jax.view", f"--grids={grids.store.path}", "--serve", "--port=0"],
        cwd=_PROJECT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    try:
        address = process.stdout.readline().split()[0]
        page = open_page(address, offline=False)
        for phrase in ("a yellow bicycle", _MARKUP):
            page.locator("#phrase").fill(phrase)
            page.locator("#phrase").press("Enter")
            page.locator("#phrases button", has_text=phrase).wait_for()
            best = float(page.locator(".hits button").first.inner_text().split()[0])
            assert best == pytest.approx(similarities(grids, shown, phrase).max(), abs=0.005)
        assert page.evaluate("window.injected") is None
        assert page.problems == []
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.slow
def test_what_is_wrong_is_said_in_a_line(small_grids, tmp_path):
    (tmp_path / "folder.html").mkdir()
    for flags, words in (
        ([f"--grids={tmp_path}"], "holds no feature grids"),
        ([f"--grids={small_grids}", "--sample=99"], "--sample=99"),
        ([f"--grids={small_grids}", "--text="], "error: --text and --background must not be empty"),
        ([f"--grids={small_grids}", "--split=val"], "--records and --split"),
        ([f"--grids={small_grids}", f"--records={tmp_path}"], str(tmp_path)),
        ([f"--grids={small_grids}", f"--out={tmp_path / 'folder.html'}"], "Is a directory"),
    ):
        done = view(f"--out={tmp_path / 'scene.html'}", *flags)
        assert done.returncode == 1, (flags, done.stderr)
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert "USAGE" not in done.stdout + done.stderr
    assert not (tmp_path / "scene.html").exists()
