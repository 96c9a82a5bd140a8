"""Makes a page to look at: python -m pop3d_jax.view --grids grids.zarr --sample TOKEN --out scene.html

The page is one HTML file that needs no network: the key frames of the sample's scene as voxels in three dimensions,
coloured by class, by similarity to a phrase, by height or by their features, with the six images, the lidar sweep and
a time slider. It knows the phrases of --text and the background phrases; with --serve the page is served on this
machine instead, and any phrase can be typed into it.
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
from pop3d_jax.viewer.scene import PhraseScorer, default_classifier, read_scene, scene_json
from pop3d_jax.viewer.server import is_loopback, make_server


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    define_phrase_flags()
    define_records_flags()
    flags.DEFINE_integer("key_frames", None, "At most so many of the scene, the nearest in time.", lower_bound=1)
    flags.DEFINE_string("out", "scene.html", "Page to write.")
    flags.DEFINE_string("rrd", None, "Also write a recording for the Rerun viewer here (pip install rerun-sdk).")
    flags.DEFINE_bool("serve", False, "Serve the page instead of writing it: any phrase can be typed.")
    flags.DEFINE_string("host", "127.0.0.1", "With --serve: address to listen on.")
    flags.DEFINE_integer("port", 8000, "With --serve: port, 0 for any.", lower_bound=0, upper_bound=65535)


def main(_: list[str]) -> None:
    values = flags.FLAGS
    phrases = [*(values.text or ()), *values.background]
    with stop_with_message(RecordError, GridStoreError, ValueError, OSError):
        if not all(phrase.strip() for phrase in phrases):
            raise ValueError("--text and --background must not be empty")
        grids = FeatureGrids.open(values.grids, text_tower=values.text_tower)
        attributes = grids.store.attributes
        records = values.records or attributes["config"]["data"]["records"]
        source = RecordSource(records, values.split or attributes["records"]["split"])
        scene, first = read_scene(grids, source, values.sample, key_frames=values.key_frames)
        logging.info("%s: %d key frames", scene.title, len(scene.grids))
        scorer = PhraseScorer(scene, grids, values.background, values.threshold)
        classifier = default_classifier(grids)
        if values.rrd:
            write_recording(values.rrd, scene, values.text or (), grids.clip, classifier)
            logging.info("recording: %s", values.rrd)
        content = scene_json(scene, first, scorer, phrases, classifier)
        if values.serve:
            _serve(render_page(content, live=True), scorer, values.host, values.port)
            return
        page = epath.Path(values.out)
        page.parent.mkdir(parents=True, exist_ok=True)
        size = page.write_text(render_page(content))
    print(f"{page}: {len(scene.grids)} key frames, {size / 1e6:.1f} MB; open it in a browser")


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
