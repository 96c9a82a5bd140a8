"""The build of one split: which shards are missing, writing them in parallel, and what describes the result."""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Sequence

from absl import logging
from etils import epath

from data_prep import beam, parallel
from data_prep.key_frame_rows import SplitKeyFrames
from data_prep.keyframes_builder import KeyframesBuilder, SceneShard, shard_path, write_metadata
from data_prep.layouts import layout_of
from data_prep.table_rows import SourceError
from pop3d_jax.data.shards import (
    FIRST_DATASET,
    SCHEMA_VERSION,
    ShardIndex,
    SplitIndex,
    index_path,
    read_index,
    shard_index_path,
    shard_prefix,
    write_json,
)


class BuildError(ValueError):
    """A build that cannot be done as asked; the message says what to do."""


def build_split(
    source: epath.PathLike,
    version: str | None,
    split: str,
    out: epath.PathLike,
    *,
    dataset: str = FIRST_DATASET,
    skip_errors: bool,
    workers: int,
    beam_options: Sequence[str] | None = None,
) -> SplitIndex:
    """Builds one split.

    Args:
      source: root of the data set.
      version: such as "v1.0-mini"; None for a data set without versions.
      split: such as "mini_train".
      out: records folder.
      dataset: one of `layouts.DATASETS`.
      skip_errors: leave out key frames that cannot be read. They are listed in the index and in
        build_report.json; a later build without this option tries them again.
      workers: number of processes; the records do not depend on it.
      beam_options: build as an Apache Beam pipeline with these options instead; the records are the same.

    Returns:
      The index of the finished split.

    Raises:
      SourceError: something is wrong in the data set.
      BuildError: `out` holds another build, or something else.
      SplitError: a split that the version does not have.
    """
    layout = layout_of(dataset, version, split)
    fingerprint = layout.fingerprint(source)
    folder = epath.Path(out)
    _claim(folder, dataset, layout.version, fingerprint)
    finished = _finished_index(folder, split, skip_errors)
    if finished is not None:
        logging.info("Nothing to do: %s has all of %s.", folder, split)
        return finished

    start = time.monotonic()
    tables = layout.read_split(source, split)
    count = sum(len(scene.key_frames) + len(scene.broken) for scene in tables.scenes)
    scene_names = list(dict.fromkeys(scene.scene_name for scene in tables.scenes))
    logging.info(
        "Tables read in %.1f s: %d key frames in %d scenes of %s%s.",
        time.monotonic() - start,
        count,
        len(scene_names),
        split,
        f"; {len(tables.absent_scenes)} scenes are not in this folder" if tables.absent_scenes else "",
    )
    if not skip_errors:
        for scene in tables.scenes:
            for _, error in scene.broken:
                raise SourceError(error)
    index_path(folder, split).unlink(missing_ok=True)
    for path in folder.glob(f"{shard_prefix(dataset)}-{split}.tfrecord-*.incomplete-*"):
        path.unlink()

    shards = [SceneShard(os.fspath(source), scene, layout.read_key_frame) for scene in tables.scenes]
    paths = [shard_path(folder, dataset, split, number, len(shards)) for number in range(len(shards))]
    indexes = {path: _finished_shard(path, skip_errors) for path in paths}
    work = [(shard, path) for shard, path in zip(shards, paths, strict=True) if indexes[path] is None]
    if len(work) < len(shards):
        logging.info("Going on: %d of %d shards were finished before.", len(shards) - len(work), len(shards))
    write = functools.partial(_write_shard, skip_errors=skip_errors)
    if beam_options is None:
        written = parallel.run(write, work, workers, f"building {split}")
    else:
        beam.run(write, work, beam_options, f"building {split}")
        # Workers may be other machines: what they wrote is read back.
        written = [_finished_shard(path, skip_errors) for _, path in work]
        if None in written:
            raise BuildError(f"{work[written.index(None)][1]} was not written though the pipeline ended: see its log")
    indexes.update({path: index for (_, path), index in zip(work, written, strict=True)})
    index = SplitIndex(SCHEMA_VERSION, layout.version, fingerprint, split, list(indexes.values()), dataset)
    return _finish(folder, layout.builder, index, tables)


def _write_shard(work: tuple[SceneShard, epath.Path], *, skip_errors: bool) -> ShardIndex:
    shard, path = work
    return shard.write(path, skip_errors=skip_errors)


def _claim(folder: epath.Path, dataset: str, version: str, fingerprint: str) -> None:
    """Makes the folder one for this build, or checks that it is."""
    path = folder / "build.json"
    identity = {
        "schema": SCHEMA_VERSION,
        "dataset": dataset,
        "version": version,
        "source_fingerprint": fingerprint,
    }
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise BuildError(f"{folder} is not empty and holds no records: give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, identity, indent=2)
        return
    try:
        found = {"dataset": FIRST_DATASET} | json.loads(path.read_text())
    except ValueError as error:
        raise BuildError(f"{path} is damaged ({error}): give another --out") from error
    different = [name for name in identity if found.get(name) != identity[name]]
    if different:
        detail = "; ".join(f"{name} {found.get(name)}, here {identity[name]}" for name in different)
        raise BuildError(f"{folder} holds another build ({detail}): give another --out, or delete it")


def _finished_index(folder: epath.Path, split: str, skip_errors: bool) -> SplitIndex | None:
    if not index_path(folder, split).exists():
        return None
    index = read_index(folder, split)
    present = {path.name for path in folder.iterdir()}
    if any(shard.file not in present or (shard.skipped and not skip_errors) for shard in index.shards):
        return None
    return index


def _finished_shard(path: epath.Path, skip_errors: bool) -> ShardIndex | None:
    if not path.exists() or not shard_index_path(path).exists():
        return None
    index = ShardIndex(**json.loads(shard_index_path(path).read_text()))
    if path.stat().length != index.bytes or (index.skipped and not skip_errors):
        return None
    return index


def _finish(
    folder: epath.Path, builder: type[KeyframesBuilder], index: SplitIndex, tables: SplitKeyFrames
) -> SplitIndex:
    """Writes what describes the split; its index last, as that is the sign that all is done."""
    others = {path.stem.removeprefix("index_") for path in folder.glob("index_*.json")} - {index.split}
    write_metadata(folder, builder, [read_index(folder, name) for name in sorted(others)] + [index])

    path = folder / "build_report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report[index.split] = {
        "dataset": index.dataset,
        "version": index.version,
        "fingerprint": index.fingerprint,
        "scenes": list(dict.fromkeys(scene.scene_name for scene in tables.scenes)),
        "absent_scenes": tables.absent_scenes,
        "key_frames": sum(len(shard.offsets) for shard in index.shards),
        "labelled": tables.labelled,
        "bytes": sum(shard.bytes for shard in index.shards),
        "skipped": [entry for shard in index.shards for entry in shard.skipped],
    }
    write_json(path, report, indent=2)
    write_json(index_path(folder, index.split), dataclasses.asdict(index))
    return index
