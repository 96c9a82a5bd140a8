"""Key frames a second and core from records to arrays, and the share of JPEG decoding in it.

python -m benchmarks.input_pipeline --records RECORDS --split train [--height 900 --width 1600]
"""

import json
import time

import numpy as np
from absl import flags

from pop3d_jax.commands import run
from pop3d_jax.data.pipeline import ExampleSettings, decode_image, make_example
from pop3d_jax.data.records import RecordSource


def main(_: list[str]) -> None:
    values = flags.FLAGS
    source = RecordSource(values.records, values.split)
    hw = (values.height, values.width)
    settings = ExampleSettings(hw, hw, max_points=36_864, max_feature_points=40_000, photometric=values.photometric)
    whole, decoding = [], []
    for index in range(values.key_frames + 1):
        rng = np.random.default_rng(index)
        start = time.perf_counter()
        key_frame = source[index % len(source)]
        make_example(key_frame, settings, rng)
        whole.append(time.perf_counter() - start)
        start = time.perf_counter()
        for jpeg in key_frame.images:
            decode_image(jpeg, hw, key_frame.sample_token)
        decoding.append(time.perf_counter() - start)
    # The first one warms caches up and is not counted.
    seconds, decode = float(np.median(whole[1:])), float(np.median(decoding[1:]))
    print(
        json.dumps(
            {
                "image_hw": hw,
                "photometric": values.photometric,
                "key_frames_per_second_and_core": round(1.0 / seconds, 2),
                "seconds_per_key_frame_median": round(seconds, 4),
                "decode_share": round(decode / seconds, 3),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    flags.DEFINE_string("records", "demo/records", "Records folder; `make demo` makes the default one.")
    flags.DEFINE_string("split", "train", "Split of the records.")
    flags.DEFINE_integer("height", 900, "Image height after resizing.")
    flags.DEFINE_integer("width", 1600, "Image width after resizing.")
    flags.DEFINE_bool("photometric", True, "With photometric distortion, as in training.")
    flags.DEFINE_integer("key_frames", 10, "How many key frames are timed.")
    run(main)
