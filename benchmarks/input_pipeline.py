"""Key frames a second and core from records to arrays, the share of JPEG decoding, and the cores that one chip needs.

    python -m benchmarks.input_pipeline --records RECORDS --split train

By default at the published size, 900 x 1600 for student and teacher: with records of nuScenes nothing is resized. The
demo's records (the default ones) hold smaller images, which are enlarged: give records of real ones for figures to
quote.
Processor time of one process, so that other work on the machine does not count; medians of --key_frames key frames.
"""

import time

import numpy as np
from absl import app, flags

from benchmarks.report import Table
from pop3d_jax.data.pipeline import ExampleSettings, decode_image, make_example
from pop3d_jax.data.records import RecordSource

_RECORDS = flags.DEFINE_string("records", "demo/records", "records folder; `make demo` makes the default one")
_SPLIT = flags.DEFINE_string("split", "train", "split of the records")
_HEIGHT = flags.DEFINE_integer("height", 900, "image height after resizing")
_WIDTH = flags.DEFINE_integer("width", 1600, "image width after resizing")
_KEY_FRAMES = flags.DEFINE_integer("key_frames", 20, "how many are timed")
_STEP_SECONDS = flags.DEFINE_list(
    "step_seconds", ["0.25", "0.5", "1"], "assumed times of a step of one key frame a chip"
)
_JSON = flags.DEFINE_string("json", None, "folder of input_pipeline.json")


def main(_: list[str]) -> None:
    source = RecordSource(_RECORDS.value, _SPLIT.value)
    hw = (_HEIGHT.value, _WIDTH.value)
    settings = ExampleSettings(hw, hw, max_points=36_864, max_feature_points=40_000)
    whole, decoding, reading, size = [], [], [], 0
    # The first one warms caches up and is not counted.
    for index in range(_KEY_FRAMES.value + 1):
        start = time.process_time()
        key_frame = source[index % len(source)]
        reading.append(time.process_time() - start)
        example = make_example(key_frame, settings, np.random.default_rng(index))
        whole.append(time.process_time() - start)
        start = time.process_time()
        for jpeg in key_frame.images:
            decode_image(jpeg, hw, key_frame.sample_token)
        decoding.append(time.process_time() - start)
        size = sum(array.nbytes for array in example.values())
    seconds, decode, read = (float(np.median(values[1:])) for values in (whole, decoding, reading))
    _, full_hw = decode_image(source[0].images[0], hw, "the first key frame")
    table = Table("input_pipeline", ["records to arrays", f"six images of {hw[0]} x {hw[1]}"])
    table.add("images in the records", f"{full_hw[0]} x {full_hw[1]}")
    table.add("key frames a second and core", f"{1 / seconds:.1f}")
    table.add("of that JPEG decoding", f"{100 * decode / seconds:.0f} %")
    table.add("of that reading the record", f"{100 * read / seconds:.1f} %")
    table.add("bytes handed to the device a key frame", f"{size / 1e6:.1f} MB")
    for step in map(float, _STEP_SECONDS.value):
        table.add(
            f"cores for one chip with steps of {step:g} s, batching and transfer apart",
            f"{seconds / step:.2f}",
        )
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)
