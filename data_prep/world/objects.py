"""The things of the world and their shapes: vehicles, people, cones, barriers, trees, buildings, walls, poles."""

from dataclasses import dataclass

import numpy as np

from data_prep.world.parts import (
    Colour,
    Hexahedron,
    Material,
    Round,
    box,
    ellipsoid,
    frustum,
    tapered,
    wheel,
)

CAR_COLOURS: dict[str, Colour] = {
    "red": (198, 26, 30),
    "blue": (28, 70, 200),
    "white": (238, 238, 236),
    "black": (24, 24, 28),
    "yellow": (244, 196, 20),
    "green": (20, 128, 66),
    "silver": (168, 174, 182),
}
BUS_COLOURS = {name: CAR_COLOURS[name] for name in ("red", "yellow", "green", "blue")}
CLOTHES_COLOURS = {
    "red": (206, 40, 44),
    "blue": (44, 80, 196),
    "white": (236, 234, 228),
    "black": (34, 34, 40),
    "yellow": (240, 200, 50),
    "green": (40, 140, 80),
}
_DARK_GLASS = (44, 56, 70)
_STEEL = (120, 124, 130)


@dataclass(frozen=True)
class Shape:
    """What a thing looks like.

    `size` is (width, length, height) of its box in metres, nuScenes' order; `lidarseg_index` its raw category.
    `boxed` things are annotated with boxes, as movable things are in nuScenes; `caption` and `noun` describe it.
    """

    noun: str
    colour: str
    caption: str
    lidarseg_index: int
    boxed: bool
    size: tuple[float, float, float]
    parts: tuple[Hexahedron | Round, ...]


def _pick(rng: np.random.Generator, colours: dict[str, Colour]) -> tuple[str, Colour]:
    name = list(colours)[rng.integers(len(colours))]
    return name, colours[name]


def _wheels(length: float, width: float, radius: float, at: tuple[float, ...]) -> list[Round]:
    return [wheel((x * length, side * (width / 2 - 0.11), radius), radius, 0.26) for x in at for side in (-1, 1)]


def car(rng: np.random.Generator) -> Shape:
    """A saloon, hatchback or van in one of seven colours."""
    name, colour = _pick(rng, CAR_COLOURS)
    style = rng.integers(3)
    length = (4.7, 4.0, 4.9)[style] * rng.uniform(0.95, 1.06)
    width = (1.84, 1.76, 1.95)[style] * rng.uniform(0.97, 1.04)
    height = (1.46, 1.52, 1.95)[style] * rng.uniform(0.97, 1.04)
    waist = height * (0.58, 0.58, 0.52)[style]
    cabin_length = length * (0.58, 0.66, 0.86)[style]
    cabin_at = length * (-0.04, -0.12, -0.05)[style]
    roof = (cabin_length * (0.62, 0.7, 0.82)[style], width * 0.76)
    body = tapered(
        (0, 0, 0.22), (length * 0.97, width), (length, width * 0.96), waist - 0.22, Material.CAR_BODY, colour
    )
    cabin = tapered(
        (cabin_at, 0, waist), (cabin_length, width * 0.94), roof, height - waist, Material.CABIN, colour, -0.12
    )
    parts = (body, cabin, *_wheels(length, width, 0.33, (-0.31, 0.31)))
    return Shape("car", name, f"a {name} car", 17, True, (width, length, height), parts)


def truck(rng: np.random.Generator) -> Shape:
    """A lorry: coloured cab and a box body in another tone."""
    name, colour = _pick(rng, CAR_COLOURS)
    length, width, height = rng.uniform(6.6, 9.0), rng.uniform(2.3, 2.5), rng.uniform(2.9, 3.5)
    cab_length = 1.9
    cab = tapered(
        (length / 2 - cab_length / 2, 0, 0.5),
        (cab_length, width),
        (cab_length * 0.9, width * 0.96),
        height * 0.76 - 0.5,
        Material.CAB,
        colour,
        -0.08,
    )
    load_length = length - cab_length - 0.2
    load = box(
        (-length / 2 + load_length / 2, 0, (height + 0.85) / 2),
        (load_length, width, height - 0.85),
        Material.PLASTER,
        colour if rng.random() < 0.7 else (214, 212, 206),
    )
    chassis = box((-0.2, 0, 0.68), (length * 0.94, width * 0.6, 0.35), Material.METAL, (52, 52, 56))
    parts = (cab, load, chassis, *_wheels(length, width, 0.48, (-0.36, -0.22, 0.36)))
    return Shape("truck", name, f"a {name} truck", 23, True, (width, length, height), parts)


def bus(rng: np.random.Generator) -> Shape:
    """A rigid city bus with a band of windows."""
    name, colour = _pick(rng, BUS_COLOURS)
    length, width, height = rng.uniform(10.0, 12.2), 2.55, rng.uniform(3.0, 3.4)
    body = box((0, 0, (height + 0.35) / 2), (length, width, height - 0.35), Material.BUS_BODY, colour)
    parts = (body, *_wheels(length, width, 0.48, (-0.27, 0.3)))
    return Shape("bus", name, f"a {name} bus", 16, True, (width, length, height), parts)


def pedestrian(rng: np.random.Generator) -> Shape:
    """An adult: legs, coat, arms and head."""
    name, colour = _pick(rng, CLOTHES_COLOURS)
    height = rng.uniform(1.58, 1.9)
    trousers = ((40, 44, 66), (60, 54, 50), (30, 30, 34))[rng.integers(3)]
    stride = rng.uniform(0.05, 0.22)
    hip, neck = height * 0.46, height * 0.84
    parts = (
        frustum((stride, 0.1, 0), 0.085, 0.1, hip, Material.CLOTH, trousers),
        frustum((-stride, -0.1, 0), 0.085, 0.1, hip, Material.CLOTH, trousers),
        frustum((0, 0, hip - 0.06), 0.22, 0.19, neck - hip + 0.06, Material.CLOTH, colour),
        frustum((stride * 0.6, -0.27, hip), 0.06, 0.07, neck - hip - 0.06, Material.CLOTH, colour),
        frustum((-stride * 0.6, 0.27, hip), 0.06, 0.07, neck - hip - 0.06, Material.CLOTH, colour),
        ellipsoid((0, 0, height * 0.92), (0.12, 0.11, height * 0.08), Material.SKIN, (196, 150, 122)),
    )
    return Shape("pedestrian", name, f"a pedestrian in {name}", 2, True, (0.66, 0.6, height), parts)


def traffic_cone(rng: np.random.Generator) -> Shape:
    """An orange cone with white bands on a black foot."""
    height = rng.uniform(0.75, 1.0)
    parts = (
        box((0, 0, 0.03), (0.46, 0.46, 0.06), Material.METAL, (40, 40, 40)),
        frustum((0, 0, 0.05), 0.2, 0.035, height - 0.05, Material.CONE, (255, 92, 10)),
    )
    return Shape("traffic cone", "orange", "a traffic cone", 12, True, (0.46, 0.46, height), parts)


def barrier(rng: np.random.Generator) -> Shape:
    """A plastic road barrier with slanted red and white stripes."""
    length, height = rng.uniform(1.9, 2.3), rng.uniform(0.95, 1.1)
    parts = (
        tapered((0, 0, 0), (0.6, length), (0.46, length), 0.3, Material.METAL, (150, 150, 150)),
        tapered((0, 0, 0.3), (0.3, length), (0.2, length), height - 0.3, Material.BARRIER, (206, 36, 30)),
    )
    return Shape("barrier", "red", "a red and white barrier", 9, True, (length, 0.6, height), parts)


def tree(rng: np.random.Generator) -> Shape:
    """A broad-leaved or conical tree."""
    leaf = ((34, 92, 36), (46, 104, 30), (26, 78, 46), (72, 112, 30))[rng.integers(4)]
    trunk = rng.uniform(1.9, 3.0)
    bark = (88, 66, 48)
    if rng.random() < 0.3:
        height, radius = rng.uniform(5.0, 10.0), rng.uniform(1.3, 2.2)
        base = trunk * 0.4
        parts = (
            frustum((0, 0, -0.5), 0.18, 0.15, base + 0.8, Material.BARK, bark),
            frustum((0, 0, base), radius, 0.5 * radius, height * 0.45, Material.LEAVES, leaf),
            frustum((0, 0, base + height * 0.35), radius * 0.75, 0.05, height * 0.65, Material.LEAVES, leaf),
        )
        return Shape("tree", "green", "a tree", 30, False, (2 * radius, 2 * radius, base + height), parts)
    radius = rng.uniform(1.5, 2.7)
    crown = [
        ellipsoid(
            (radius * 0.5 * np.cos(angle), radius * 0.5 * np.sin(angle), trunk + radius * rng.uniform(0.5, 1.0)),
            (radius * rng.uniform(0.6, 0.75),) * 2 + (radius * rng.uniform(0.55, 0.75),),
            Material.LEAVES,
            leaf,
        )
        for angle in np.arange(3) * 2.1 + rng.uniform(0, 6)
    ]
    crown.append(ellipsoid((0, 0, trunk + radius * 1.2), (radius * 0.65,) * 3, Material.LEAVES, leaf))
    trunk_part = frustum((0, 0, -0.5), 0.2, 0.15, trunk + radius, Material.BARK, bark)
    size = (2 * radius, 2 * radius, trunk + 2 * radius)
    return Shape("tree", "green", "a tree", 30, False, size, (trunk_part, *crown))


def hedge(rng: np.random.Generator) -> Shape:
    """A cut hedge or a round bush."""
    leaf = ((40, 96, 40), (56, 108, 36))[rng.integers(2)]
    if rng.random() < 0.5:
        length, height = rng.uniform(3, 7), rng.uniform(0.9, 1.7)
        part = box((0, 0, height / 2 - 0.2), (length, 0.9, height + 0.4), Material.LEAVES, leaf)
        return Shape("hedge", "green", "a green hedge", 30, False, (0.9, length, height), (part,))
    radius, height = rng.uniform(0.6, 1.2), rng.uniform(0.8, 1.6)
    part = ellipsoid((0, 0, height * 0.35), (radius, radius, height * 0.65), Material.LEAVES, leaf)
    return Shape("bush", "green", "a green bush", 30, False, (2 * radius, 2 * radius, height), (part,))


_FACADES: tuple[tuple[str, Material, tuple[Colour, ...]], ...] = (
    ("brick", Material.BRICK, ((158, 78, 60), (140, 66, 54), (176, 102, 74))),
    ("concrete", Material.CONCRETE, ((186, 180, 168), (168, 164, 160), (206, 190, 160))),
    ("glass", Material.GLASS_FRONT, ((84, 124, 150), (96, 140, 146))),
    ("white", Material.PLASTER, ((226, 222, 212), (232, 214, 190))),
)


def building(rng: np.random.Generator, length: float, depth: float) -> Shape:
    """A brick, concrete, glass or plastered building of one to eight storeys with its front along x."""
    kind = rng.integers(len(_FACADES))
    name, material, tones = _FACADES[kind]
    tone = tones[rng.integers(len(tones))]
    storeys = int(rng.integers(1, 8) if length > 11 else rng.integers(1, 3))
    height = 3.3 * storeys + rng.uniform(0.3, 1.2)
    body = box((0, 0, height / 2 - 2), (length, depth, height + 4), material, tone)
    if storeys <= 2 and name in ("brick", "white") and rng.random() < 0.8:
        roof = tapered(
            (0, 0, height), (length + 0.8, depth + 0.8), (length * 0.8, 0.2), depth * 0.32, Material.ROOF, (122, 62, 48)
        )
    else:
        roof = box((0, 0, height + 0.2), (length + 0.3, depth + 0.3, 0.5), Material.ROOF, (112, 110, 108))
    size = (depth, length, height)
    return Shape("building", name, f"a {name} building", 28, False, size, (body, roof))


def wall(rng: np.random.Generator, length: float) -> Shape:
    """A garden wall along x."""
    name, _, tones = _FACADES[(0, 3)[rng.integers(2)]]
    height = rng.uniform(1.2, 2.4)
    part = box((0, 0, height / 2 - 1), (length, 0.3, height + 2), Material.PLASTER, tones[0])
    return Shape("wall", name, f"a {name} wall", 28, False, (0.3, length, height), (part,))


def lamp_post(rng: np.random.Generator) -> Shape:
    """A street lamp whose arm reaches over the carriageway (towards +y)."""
    height = rng.uniform(5.5, 8.0)
    parts = (
        frustum((0, 0, -0.5), 0.13, 0.08, height + 0.5, Material.METAL, _STEEL),
        box((0, 0.9, height), (0.12, 1.9, 0.1), Material.METAL, _STEEL),
        box((0, 1.8, height - 0.05), (0.3, 0.7, 0.14), Material.METAL, (210, 210, 200)),
    )
    return Shape("lamp post", "grey", "a lamp post", 28, False, (0.3, 0.3, height), parts)


def bus_shelter() -> Shape:
    """A bus shelter: glass back and roof on two posts."""
    parts = (
        box((0, -0.7, 1.25), (4.0, 0.1, 2.3), Material.PLASTER, _DARK_GLASS),
        box((0, -0.1, 2.5), (4.4, 1.7, 0.14), Material.METAL, _STEEL),
        box((-1.95, 0.5, 1.2), (0.12, 0.12, 2.5), Material.METAL, _STEEL),
        box((1.95, 0.5, 1.2), (0.12, 0.12, 2.5), Material.METAL, _STEEL),
    )
    return Shape("bus shelter", "grey", "a bus shelter", 28, False, (1.7, 4.4, 2.57), parts)


def own_car() -> Shape:
    """The recording car as its own lidar sees it; no camera does."""
    colour = CAR_COLOURS["white"]
    parts = (
        box((1.4, 0, 0.62), (4.1, 1.73, 0.7), Material.PAINT, colour),
        tapered((0.9, 0, 0.97), (2.8, 1.6), (1.7, 1.3), 0.55, Material.CABIN, colour),
    )
    return Shape("own car", "white", "the recording car", 31, False, (1.73, 4.1, 1.52), parts)
