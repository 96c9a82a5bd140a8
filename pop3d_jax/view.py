"""Makes a page to look at: python -m pop3d_jax.view --grids grids.zarr --sample TOKEN --out scene.html

The page is one HTML file that needs no network: the key frames of the sample's scene as voxels in three dimensions,
coloured by class, by similarity to a phrase, by height or by their features, with the six images, the lidar sweep and
a time slider. It knows the phrases of --text and the background phrases; with --serve the page is served on this
machine instead, and any phrase can be typed into it. Where --out ends in .rrd, a recording for the Rerun viewer is
written instead.
"""

from absl import flags, logging
from etils import epath

from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.data.records import RecordError, RecordSource
from pop3d_jax.grids.feature_grids import FeatureGrids
from pop3d_jax.grids.store import GridStoreError
from pop3d_jax.shared_flags import define_phrase_flags, define_records_flags
from pop3d_jax.viewer.page import render_page
from pop3d_jax.viewer.recording import write_recording
from pop3d_jax.viewer.scene import PhraseScorer, Scene, default_classifier, read_scene, scene_json
from pop3d_jax.viewer.server import is_loopback, make_server

_PAGE, _RECORDING = ".html", ".rrd"


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    define_phrase_flags()
    define_records_flags()
    flags.DEFINE_integer("key_frames", None, "At most so many of the scene, the nearest in time.", lower_bound=1)
    flags.DEFINE_integer(
        "max_voxels", 20_000, "At most so many voxels of a key frame, the most probably occupied.", lower_bound=1
    )
    flags.DEFINE_string(
        "out",
        "scene.html",
        "What to write: a page (.html), or a recording for the Rerun viewer (.rrd, needs pip install rerun-sdk).",
    )
    flags.DEFINE_bool("serve", False, "Serve the page and write nothing: any phrase can be typed.")
    flags.DEFINE_string("host", "127.0.0.1", "With --serve: address to listen on.")
    flags.DEFINE_integer("port", 8000, "With --serve: port, 0 for any.", lower_bound=0, upper_bound=65535)


def main(_: list[str]) -> None:
    values = flags.FLAGS
    asked = values.text or ()
    phrases = [*asked, *values.background]
    with stop_with_message(RecordError, GridStoreError, ValueError, OSError):
        if not all(phrase.strip() for phrase in phrases):
            raise ValueError("--text and --background must not be empty")
        if epath.Path(values.out).suffix not in (_PAGE, _RECORDING):
            raise ValueError(f"--out={values.out} must end in {_PAGE} for a page or {_RECORDING} for a recording")
        grids = FeatureGrids.open(values.grids, text_tower=values.text_tower)
        attributes = grids.store.attributes
        records = values.records or attributes["config"]["data"]["records"]
        source = RecordSource(records, values.split or attributes["records"]["split"])
        scene, first = read_scene(
            grids, source, values.sample, key_frames=values.key_frames, max_voxels=values.max_voxels
        )
        logging.info("%s: %d key frames", scene.title, len(scene.grids))
        _say_what_is_left_out(scene)
        out = epath.Path(values.out)
        classifier = default_classifier(grids)
        if out.suffix == _RECORDING and not values.serve:
            write_recording(out, scene, asked, grids.clip, classifier)
            print(f"{out}: {len(scene.grids)} key frames; open it with: rerun {out}")
            return
        scorer = PhraseScorer(scene, grids, values.background, values.threshold)
        content = scene_json(scene, first, scorer, phrases, classifier)
        if values.serve:
            _serve(render_page(content, live=True), scorer, values.host, values.port)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        size = out.write_text(render_page(content))
    print(f"{out}: {len(scene.grids)} key frames, {size / 1e6:.1f} MB; open it in a browser")


def _say_what_is_left_out(scene: Scene) -> None:
    shown, stored = (sum(counts) for counts in ([len(grid.coordinates) for grid in scene.grids], scene.stored))
    if shown < stored:
        logging.warning(
            "%s of %s voxels shown, the most probable of each key frame: --max_voxels=%d", f"{shown:,}", f"{stored:,}",
            flags.FLAGS.max_voxels,
        )  # fmt: skip


def _serve(page: str, scorer: PhraseScorer, host: str, port: int) -> None:
    server = make_server(page, scorer, host, port)
    if not is_loopback(host):
        logging.warning("--host=%s: whoever reaches this machine can see the page and ask it", host)
    print(f"http://{host}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


if __name__ == "__main__":
    _define_flags()
    flags.mark_flags_as_required(["grids"])
    run(main)
