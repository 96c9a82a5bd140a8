"""Writes a small synthetic driving world in the on-disk layout of nuScenes, SemanticKITTI or PandaSet.

    python -m data_prep.synthetic --out DIR --scenes 20 --keyframes 8 --seed 0 --image_scale 0.25
    python -m data_prep.synthetic --out DIR --layout semantic_kitti --scenes 4 --keyframes 10 --image_scale 0.5

Scenes with roads, pavements, grass, buildings, trees, vehicles, people, cones and barriers are drawn from the seed and
seen by six cameras and a 32-beam lidar, all by ray tracing of the same surfaces. The files depend on the seed and the
flags alone, not on the number of workers. `data_prep.build --version v1.0-trainval --split train|val` reads them.

The other layouts have sensors of those data sets (`world/kitti_recording.py`, `world/pandaset_recording.py`), ten key
frames a second, labels in the data sets' own ids (`world/label_maps.py`), and are read with --dataset=semantic_kitti,
pandar64 or pandar_gt. Beside the official files they have world.json and the two folders of maps, no captions.

In DIR of the layout nuscenes, beside its tables (version v1.0-trainval, key frames only), samples/, lidarseg/ and
maps/:

world.json            generator version, seed, flags, names of the scenes of both splits; "complete" when all is written
captions.json         one entry for every thing of every scene: scene_name, number (1-based within the scene),
                      instance_token ("" for what nuScenes does not box: ground, buildings, trees, walls, posts),
                      category, lidarseg_index, noun, colour ("" where it has none), caption ("a red car")
segmentation/CAM/STEM.png   uint8, raw lidarseg index of every 4 x 4 pixels of the image STEM.jpg, 255 is the sky
things/CAM/STEM.png         uint16, thing number likewise, 0 is the sky; both have height // 4 rows, width // 4 columns
                            and hold what is at pixel (4i + 2, 4j + 2)
annotations_2d.json   one entry per image: sample_token, scene_name, camera, filename, and objects: number,
                      instance_token, category, lidarseg_index, caption, pixels (visible), box [u0, v0, u1, v1]
retrieval/            retrieval_anns_{train,val}.csv with lines `sample token;split;annotation;points;phrase` and
                      annotations/*.npy, bool per point of the sweep: the layout of POP-3D's retrieval benchmark
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from data_prep import parallel
from data_prep.semantic_kitti_builder import SEQUENCES
from data_prep.splits import scene_names
from data_prep.world.kitti_recording import record_sequence
from data_prep.world.pandaset_recording import record_pandaset_scene
from data_prep.world.recorded_scene import SceneTask
from data_prep.world.recording import record_scene
from data_prep.world.tables import write_tables
from pop3d_jax.commands import run

GENERATOR_VERSION = 1
# A fifth of the scenes is held out, at least one.
_VAL_SHARE = 0.2


_RECORDERS = {
    "nuscenes": record_scene,
    "semantic_kitti": record_sequence,
    "pandaset": record_pandaset_scene,
}


class WorldError(ValueError):
    """The world asked for cannot be written; says which flag to change."""


def _official_names(layout: str) -> dict[str, tuple[str, ...]]:
    if layout == "nuscenes":
        return {"train": scene_names("train"), "val": scene_names("val")}
    if layout == "semantic_kitti":
        return {split: SEQUENCES[split] for split in ("train", "val")}
    # PandaSet's splits follow from where a scene lies, not from its name.
    names = tuple(f"{number:03d}" for number in range(1, 104))
    return {"train": names[:76], "val": names[76:]}


def scenes_of(count: int, layout: str = "nuscenes") -> list[tuple[str, str]]:
    """(name, split) of `count` scenes: names from the official train and val lists, about four to one.

    SemanticKITTI validates on one sequence, so one scene is held out there.

    Raises:
      WorldError: fewer than two scenes, or more than the official lists have.
    """
    val = 1 if layout == "semantic_kitti" else max(1, round(count * _VAL_SHARE))
    names = _official_names(layout)
    if count < 2 or count - val > len(names["train"]) or val > len(names["val"]):
        most = len(names["train"]) + len(names["val"])
        raise WorldError(f"--scenes {count}: a world has 2 to {most} scenes, which take their names from {layout}")
    return [(name, "train") for name in names["train"][: count - val]] + [(name, "val") for name in names["val"][:val]]


def _claim(out: Path, world: dict[str, Any]) -> bool:
    """Whether the folder still needs (more of) this world.

    Raises:
      WorldError: the folder holds something else.
    """
    path = out / "world.json"
    if path.exists():
        found = json.loads(path.read_text())
        complete = found.pop("complete", False)
        if found != world:
            differing = sorted(key for key in found.keys() | world.keys() if found.get(key) != world.get(key))
            raise WorldError(f"--out {out} holds another world (differs in {', '.join(differing)}); name a new folder")
        return not complete
    if out.exists() and any(out.iterdir()):
        raise WorldError(f"--out {out} is not empty and holds no world; name a new folder")
    return True


def _write_world(out: Path, world: dict[str, Any], complete: bool) -> None:
    temporary = out / "world.json.partial"
    temporary.write_text(json.dumps(world | {"complete": complete}, indent=1) + "\n")
    temporary.replace(out / "world.json")


def _check_layout(layout: str) -> None:
    if layout == "pandaset" and importlib.util.find_spec("pandas") is None:
        raise WorldError("--layout pandaset writes pandas tables: pip install 'pop3d-jax[pandaset]'")


def scene_tasks(root: Path, world: dict[str, Any]) -> list[SceneTask]:
    """What makes each scene of a world.

    Args:
      root: the world's folder.
      world: content of its world.json.

    Raises:
      KeyError: a field is missing.
    """
    named = [(name, split) for split in ("train", "val") for name in world[f"{split}_scenes"]]
    drawn = (world["keyframes"], world["image_scale"], world["camera_jitter"])
    return [SceneTask(root, world["seed"], index, name, split, *drawn) for index, (name, split) in enumerate(named)]


def build_world(
    out: Path,
    scenes: int,
    keyframes: int,
    seed: int,
    image_scale: float,
    workers: int,
    camera_jitter: float = 0.0,
    layout: str = "nuscenes",
) -> bool:
    """Writes the world, unless the folder already holds it; returns whether it wrote.

    Raises:
      WorldError: the folder holds something else, or there are not enough scene names.
    """
    named = scenes_of(scenes, layout)
    _check_layout(layout)
    world = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "image_scale": image_scale,
        "camera_jitter": camera_jitter,
        "scenes": scenes,
        "keyframes": keyframes,
        "train_scenes": [name for name, split in named if split == "train"],
        "val_scenes": [name for name, split in named if split == "val"],
    }
    if layout != "nuscenes":  # worlds of nuScenes' layout name none
        world["layout"] = layout
    if not _claim(out, world):
        return False
    out.mkdir(parents=True, exist_ok=True)
    _write_world(out, world, complete=False)
    recorded = parallel.run(_RECORDERS[layout], scene_tasks(out, world), workers, "recording scenes")
    if layout == "nuscenes":
        write_tables(out, recorded)
    _write_world(out, world, complete=True)
    return True


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    flags.DEFINE_string("out", None, "Folder to write the world to; new, empty, or holding the same world.")
    flags.DEFINE_enum("layout", "nuscenes", list(_RECORDERS), "Data set whose layout, sensors and label ids it has.")
    flags.DEFINE_integer(
        "scenes", 20, "Number of scenes, a fifth of them in the val split (semantic_kitti: one).", lower_bound=2
    )
    flags.DEFINE_integer(
        "keyframes", 8, "Key frames of each scene, half a second apart (other layouts: a tenth).", 1, 40
    )
    flags.DEFINE_integer("seed", 0, "Seed of the world.", lower_bound=0)
    flags.DEFINE_float(
        "image_scale", 0.25, "Size of the images as a share of the data set's (nuscenes: 1600 x 900).", 0.02, 1.0
    )
    flags.DEFINE_float(
        "camera_jitter",
        0.0,
        "Degrees by which each scene's cameras are turned at random (one sigma an axis).",
        0.0,
        10.0,
    )
    flags.DEFINE_integer("workers", os.cpu_count(), "Number of processes.", lower_bound=1)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    out = Path(flags.FLAGS.out)
    try:
        wrote = build_world(
            out,
            flags.FLAGS.scenes,
            flags.FLAGS.keyframes,
            flags.FLAGS.seed,
            flags.FLAGS.image_scale,
            flags.FLAGS.workers,
            flags.FLAGS.camera_jitter,
            flags.FLAGS.layout,
        )
    except WorldError as error:
        logging.error("%s", error)
        return 1
    logging.info("%s %s", out, "is written" if wrote else "holds this world already; nothing to do")
    return 0


if __name__ == "__main__":
    _define_flags()
    flags.mark_flag_as_required("out")
    run(main)
