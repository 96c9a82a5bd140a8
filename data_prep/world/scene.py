"""A scene: its ground, its weather, the recording car's path, and all things with their places and motions."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from data_prep.world import objects
from data_prep.world.ground import GRASS, ROAD, SIDEWALK, Ground, Road, draw_height_field, draw_tones
from data_prep.world.motion import AlongPath, Motion
from data_prep.world.objects import Shape
from data_prep.world.placement import populate
from data_prep.world.weather import Weather, draw_weather


@dataclass(frozen=True)
class Thing:
    """One thing: `number` names it within the scene (surfaces of the ground have the numbers below)."""

    number: int
    shape: Shape
    motion: Motion


@dataclass(frozen=True)
class Scene:
    """All that sensors can see, as functions of the time in seconds since the first key frame."""

    ground: Ground
    weather: Weather
    things: tuple[Thing, ...]
    own_car: Thing
    sway: Float[np.ndarray, "2 4"]  # pitch and roll: constant, amplitude (radians), angular frequency, phase

    def ego_to_world(self, time: float) -> Float[np.ndarray, "4 4"]:
        """Pose of the recording car at a time in seconds: on the ground, along its slope, swaying a little."""
        x, y, yaw = self.own_car.motion.poses(np.array([time]))[0]
        up = self.ground.field.normal(np.array([x]), np.array([y]))[0]
        forward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        forward -= up * (forward @ up)
        forward /= np.linalg.norm(forward)
        road_frame = np.stack([forward, np.cross(up, forward), up], 1)
        pitch, roll = self.sway[:, 0] + self.sway[:, 1] * np.sin(self.sway[:, 2] * time + self.sway[:, 3])
        c, s = np.cos(pitch), np.sin(pitch)
        about_y = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        c, s = np.cos(roll), np.sin(roll)
        about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        pose = np.eye(4)
        pose[:3, :3] = road_frame @ about_y @ about_x
        pose[:3, 3] = x, y, self.ground.field.height(np.array([x]), np.array([y]))[0]
        return pose


def _draw_roads(rng: np.random.Generator) -> tuple[Road, ...]:
    def road(origin: tuple[float, float], heading: float, radius: float) -> Road:
        lanes = int(rng.integers(1, 4))
        lane_width = rng.uniform(3.2, 3.8)
        return Road(
            origin=origin,
            heading=heading,
            radius=radius,
            half_width=lanes * lane_width + rng.choice([0.4, 2.6]),
            sidewalk=rng.uniform(1.5, 4.5),
            lanes=lanes,
            lane_width=lane_width,
            centre_marking=int(rng.integers(2)),
        )

    def radius() -> float:
        return rng.choice([-1, 1]) * rng.uniform(35, 180) if rng.random() < 0.55 else np.inf

    main = road((0.0, 0.0), rng.uniform(0, 2 * np.pi), radius())
    roads = [main]
    at = rng.uniform(-25, 60)
    for _ in range(int(rng.integers(0, 3))):
        x, y, heading = main.position(np.float64(at), np.float64(0.0))
        crossing_radius = radius() if rng.random() < 0.4 else np.inf
        roads.append(road((float(x), float(y)), float(heading + np.radians(rng.uniform(55, 125))), crossing_radius))
        at += rng.uniform(45, 90)
    return tuple(roads)


def _lane_offset(road: Road, rng: np.random.Generator) -> float:
    return (rng.integers(road.lanes) + 0.5) * road.lane_width


def _lane_path(road: Road, rng: np.random.Generator, length: float) -> tuple[np.ndarray, float]:
    """Along a lane of the road, weaving; returns the points and where on them the car starts."""
    begin = rng.uniform(-30, 10)
    along = np.arange(begin - 10, begin + length * 1.2 + 20, 0.25)
    weave = rng.uniform(0, 0.9) * np.sin(along / rng.uniform(6, 14) + rng.uniform(0, 6))
    x, y, _ = road.position(along, -_lane_offset(road, rng) + weave)
    return np.stack([x, y], 1), 10.0


def _turning_path(main: Road, other: Road, rng: np.random.Generator, length: float) -> tuple[np.ndarray, float]:
    """Along the main road, then a turn into the other one."""
    crossing = main.coordinates(np.array(other.origin[0]), np.array(other.origin[1]))[0]
    way = rng.choice([-1, 1])
    reach = max(main.half_width, other.half_width) * rng.uniform(0.9, 1.3) + 2
    before = np.arange(-length - 20, -reach, 0.25)
    lateral = np.full(before.shape, -_lane_offset(main, rng))
    x0, y0, _ = main.position(crossing + before, lateral)
    after = np.arange(reach, reach + length + 20, 0.25)
    x1, y1, _ = other.position(way * after, np.full(after.shape, -way * _lane_offset(other, rng)))
    start, end = np.array([x0[-1], y0[-1]]), np.array([x1[0], y1[0]])
    into = np.array([x0[-1] - x0[-2], y0[-1] - y0[-2]]) / 0.25
    out = np.array([x1[1] - x1[0], y1[1] - y1[0]]) / 0.25
    span = np.linalg.norm(end - start) * 1.2
    s = np.linspace(0, 1, int(span * 4))[1:-1, None]
    turn = (
        (2 * s**3 - 3 * s**2 + 1) * start
        + (s**3 - 2 * s**2 + s) * span * into
        + (3 * s**2 - 2 * s**3) * end
        + (s**3 - s**2) * span * out
    )
    points = np.concatenate([np.stack([x0, y0], 1), turn, np.stack([x1, y1], 1)])
    turn_begins = 0.25 * len(before)
    return points, turn_begins - rng.uniform(0.1, 0.9) * length + rng.uniform(0, span)


def _oblique_path(main: Road, rng: np.random.Generator, length: float) -> tuple[np.ndarray, float]:
    """A slow arc at any angle to the road, as when pulling out of a yard or turning around."""
    x, y, heading = main.position(np.float64(rng.uniform(-20, 40)), np.float64(rng.uniform(-3, 3)))
    s = np.arange(-8.0, length + 8, 0.25)
    bend = rng.choice([-1, 1]) / rng.uniform(9, 40)
    yaw = heading + rng.uniform(0, 2 * np.pi) + bend * (s - length / 2)
    points = np.stack([np.cumsum(np.cos(yaw)), np.cumsum(np.sin(yaw))], 1) * 0.25
    points += np.array([x, y]) - points[len(s) // 2]
    return points, 8.0


def _draw_path(roads: tuple[Road, ...], rng: np.random.Generator, seconds: float) -> AlongPath:
    kind = rng.random()
    speed = rng.uniform(4, 11)
    if len(roads) > 1 and kind < 0.4:
        speed = rng.uniform(3, 6)
        points, start = _turning_path(roads[0], roads[1], rng, speed * seconds + 4)
    elif kind < 0.6:
        speed = min(rng.uniform(1.5, 4), 14 / max(seconds, 0.5))
        points, start = _oblique_path(roads[0], rng, speed * seconds)
    else:
        points, start = _lane_path(roads[0], rng, speed * seconds)
    return AlongPath(points, start, speed)


def draw_scene(rng: np.random.Generator, keyframes: int) -> Scene:
    """Draws a scene for a recording of `keyframes` key frames, half a second apart."""
    seconds = 0.5 * (keyframes - 1)
    roads = _draw_roads(rng)
    blocks = rng.choice([ROAD, SIDEWALK, GRASS], (2, 7), p=rng.dirichlet([1.0, 1.5, 3.0]))
    field = draw_height_field(rng, rng.uniform(0.05, 0.13))
    dry = bool(rng.random() < 0.25)
    ground = Ground(field, roads, blocks, rng.uniform(18, 45), draw_tones(rng, dry), dry)
    path = _draw_path(roads, rng, seconds)
    placed = populate(rng, ground, path, seconds)
    first = GRASS + 1
    things = tuple(Thing(first + i, shape, motion) for i, (shape, motion) in enumerate(placed))
    own_car = Thing(first + len(things), objects.own_car(), path)
    sway = np.stack(
        [
            rng.normal(0, np.radians(0.5), 2),
            np.radians(rng.uniform(0.1, 0.7, 2)),
            2 * np.pi / rng.uniform(2.0, 6.0, 2),
            rng.uniform(0, 2 * np.pi, 2),
        ],
        1,
    )
    return Scene(ground, draw_weather(rng), things, own_car, sway)
