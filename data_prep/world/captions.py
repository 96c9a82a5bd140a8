"""What everything in a scene is called."""

from collections.abc import Callable
from typing import Any

from data_prep.world.ground import GRASS, ROAD, SIDEWALK, SURFACE_LIDARSEG
from data_prep.world.scene import Scene, Thing
from pop3d_jax.nuscenes import LIDARSEG_CATEGORIES


def scene_captions(scene: Scene, scene_name: str, instance_token: Callable[[Thing], str]) -> list[dict[str, Any]]:
    """Entries of captions.json for a scene: the surfaces of the ground, then every thing, in order of their numbers.

    Each has scene_name, number, instance_token (empty for what nuScenes does not box), category, lidarseg_index,
    noun, colour (empty where it has none) and caption.
    """
    grass = "dry" if scene.ground.dry else "green"
    named = [
        (ROAD, "", int(SURFACE_LIDARSEG[ROAD]), "road", "", "a road"),
        (SIDEWALK, "", int(SURFACE_LIDARSEG[SIDEWALK]), "sidewalk", "", "a sidewalk"),
        (GRASS, "", int(SURFACE_LIDARSEG[GRASS]), "grass", grass, f"{grass} grass"),
    ]
    for thing in scene.things:
        shape = thing.shape
        named.append(
            (thing.number, instance_token(thing), shape.lidarseg_index, shape.noun, shape.colour, shape.caption)
        )
    return [
        {
            "scene_name": scene_name,
            "number": number,
            "instance_token": instance,
            "category": LIDARSEG_CATEGORIES[index],
            "lidarseg_index": index,
            "noun": noun,
            "colour": colour,
            "caption": caption,
        }
        for number, instance, index, noun, colour, caption in named
    ]
