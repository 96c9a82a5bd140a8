"""What a teacher costs on one key frame: online in seconds, from a cache in seconds and bytes, both extrapolated.

    python -m benchmarks.teacher --records RECORDS --split mini_train --name maskclip_plus

The networks have their published sizes and random weights (those of the authors could not be had): neither time nor
float16 bytes depend on the weights. The official layout of features takes 45.3 MB a key frame, 1.55 TB in all.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.report import Table
from configs.pop3d_nuscenes import get_config
from data_prep.teacher_features import feature_function
from pop3d_jax.data.records import RecordSource
from pop3d_jax.data.teacher_cache import DTYPES, decode_features, encode_features
from pop3d_jax.teacher import Teacher, abstract_teacher

_RECORDS = flags.DEFINE_string("records", "demo/records", "folder of the records; by default those of `make demo`")
_SPLIT = flags.DEFINE_string("split", "val", "split of the records; its first key frame is taken")
_NAME = flags.DEFINE_enum("name", "maskclip", ["maskclip", "maskclip_plus"], "teacher")
_REPEATS = flags.DEFINE_integer("repeats", 1, "timed runs; the median counts")
_JSON = flags.DEFINE_string("json", None, "folder of teacher_NAME.json")
_KEY_FRAMES = 34_149


def random_teacher(teacher: Teacher) -> Teacher:
    """A teacher of these shapes whose weights are noise of a size that keeps activations finite."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1])
        return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), leaf.dtype)

    return dataclasses.replace(teacher, parameters=jax.tree.map(draw, teacher.parameters))


def median_seconds(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median of `repeats` calls, after one that compiles, and what the last one returned."""
    result = run()
    seconds = []
    for _ in range(repeats):
        start = time.monotonic()
        result = run()
        seconds.append(time.monotonic() - start)
    return float(np.median(seconds)), result


def main(_: list[str]) -> None:
    config = get_config()
    config.data.records, config.teacher.name = _RECORDS.value, _NAME.value
    config.data.max_feature_points = config.data.max_points
    source = RecordSource(_RECORDS.value, _SPLIT.value)
    compute = feature_function(config, random_teacher(abstract_teacher(config.teacher)))
    online, features = median_seconds(lambda: compute(source[0]), _REPEATS.value)
    dim = features.shape[1]
    table = Table(
        f"teacher_{_NAME.value}", [_NAME.value, "seconds a key frame", "a key frame", f"{_KEY_FRAMES:,} of them"]
    )
    table.add(f"online, {features.shape[0]:,} visible pairs of {dim} features", f"{online:.1f} s", "", "")
    for dtype in DTYPES:
        record = encode_features(source.sample_tokens[0], features, dtype)
        decode = functools.partial(decode_features, record, dtype, dim)
        seconds, _ = median_seconds(decode, max(_REPEATS.value, 5))
        total = f"{len(record) * _KEY_FRAMES / 1e12:.2f} TB"
        table.add(f"from a {dtype} cache", f"{seconds:.4f} s", f"{len(record) / 1e6:.2f} MB", total)
    table.add("official layout (its README)", "", "45.3 MB", "1.55 TB")
    table.write(_JSON.value)


if __name__ == "__main__":
    app.run(main)
