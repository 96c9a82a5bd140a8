"""Fills a scene: buildings, parked and moving vehicles, people, work zones, trees and street furniture.

Every thing is tried at drawn places and refused where it would overlap another one, a road it does not belong on, or
the recording car's path.
"""

from collections.abc import Callable

import numpy as np

from data_prep.world import objects
from data_prep.world.ground import GRASS, ROAD, Ground, Road
from data_prep.world.motion import AlongLane, AlongPath, Footprints, Motion, Standing
from data_prep.world.objects import Shape

# Things further than this from the recording car's path are left out, metres.
_REACH = 75.0

Placed = list[tuple[Shape, Motion]]


class _Site:
    """The half-filled scene: what is placed, and the checks for the next thing."""

    def __init__(self, rng: np.random.Generator, ground: Ground, path: AlongPath, seconds: float):
        self.rng, self.ground = rng, ground
        self.footprints = Footprints(np.arange(-0.25, seconds + 0.5, 0.25))
        self.footprints.add(path, (2.7, 1.25))
        self.path = path.poses(np.arange(0.0, seconds + 0.5, 0.5))[:, :2]
        self.placed: Placed = []

    def near(self, x: float, y: float) -> bool:
        return bool(np.hypot(*(self.path - (x, y)).T).min() < _REACH)

    def beside_roads(self, x: np.ndarray, y: np.ndarray, clearance: float) -> bool:
        """Whether all positions keep `clearance` metres from every carriageway."""
        return all(
            bool((np.abs(road.coordinates(x, y)[1]) > road.half_width + clearance).all()) for road in self.ground.roads
        )

    def try_place(self, shape: Shape, motion: Motion, margin: float = 0.25) -> bool:
        """Places the thing if there is room; its box's half length and half width are the footprint."""
        width, length, _ = shape.size
        half = (length / 2, width / 2)
        if shape.noun == "tree":
            half = (0.4, 0.4)  # a crown may reach over a roof or a pavement, the trunk may not
        if not self.footprints.free(motion, half, margin):
            return False
        self.footprints.add(motion, half)
        self.placed.append((shape, motion))
        return True

    def span(self, road: Road) -> tuple[float, float]:
        along, _ = road.coordinates(self.path[:, 0], self.path[:, 1])
        return float(along.min() - _REACH), float(along.max() + _REACH)


def _standing(road: Road, along: float, lateral: float, turn: float = 0.0) -> Standing:
    x, y, heading = road.position(np.float64(along), np.float64(lateral))
    return Standing(float(x), float(y), float(heading + turn))


def _buildings(site: _Site, road: Road, side: int) -> None:
    rng = site.rng
    along, end = site.span(road)
    density = rng.uniform(0.35, 1.0)
    setback_mean = rng.uniform(0.5, 14)
    along += rng.uniform(0, 15)
    while along < end:
        length, depth = rng.uniform(7, 26), rng.uniform(7, 15)
        setback = setback_mean * rng.uniform(0.5, 1.6)
        if rng.random() < density:
            lateral = side * (road.half_width + road.sidewalk + setback + depth / 2)
            motion = _standing(road, along + length / 2, lateral, rng.normal(0, 0.06) + (np.pi if side < 0 else 0))
            c, s = np.cos(motion.yaw), np.sin(motion.yaw)
            u, v = np.meshgrid(np.linspace(-length / 2, length / 2, 9), np.linspace(-depth / 2, depth / 2, 5))
            x, y = motion.x + c * u - s * v, motion.y + s * u + c * v
            if site.near(motion.x, motion.y) and site.beside_roads(x, y, 1.0):
                site.try_place(objects.building(rng, length, depth), motion, margin=1.0)
            along += length + rng.choice([0.8, rng.uniform(2, 18)])
        else:
            along += rng.uniform(8, 30)


def _street_side(site: _Site, road: Road, side: int) -> None:
    """Lamp posts, trees along the kerb, walls and hedges behind the pavement, a bus shelter."""
    rng = site.rng
    begin, end = site.span(road)
    turn = 0.0 if side < 0 else np.pi  # the lamp's arm and the shelter's open side face the road

    def row(spacing: tuple[float, float], lateral: float, make: Callable[[], Shape], jitter: float) -> None:
        along = begin + rng.uniform(0, spacing[1])
        while along < end:
            motion = _standing(road, along, side * (lateral + rng.normal(0, jitter)), turn)
            if site.near(motion.x, motion.y) and site.beside_roads(np.array(motion.x), np.array(motion.y), 0.3):
                site.try_place(make(), motion)
            along += rng.uniform(*spacing)

    kerb = road.half_width + 0.7
    row((22, 34), kerb, lambda: objects.lamp_post(rng), 0.05)
    if rng.random() < 0.6:
        row((7, 16), kerb + 0.2, lambda: objects.tree(rng), 0.1)
    if rng.random() < 0.4:
        row((60, 120), kerb + 0.9, objects.bus_shelter, 0.05)
    behind = road.half_width + road.sidewalk
    if rng.random() < 0.5:
        row((5, 16), behind + 1.0, lambda: objects.hedge(rng), 0.2)
    if rng.random() < 0.35:
        row((10, 30), behind + 0.6, lambda: objects.wall(rng, rng.uniform(5, 14)), 0.05)


def _greenery(site: _Site, count: int) -> None:
    rng = site.rng
    for _ in range(count):
        x, y = site.path[rng.integers(len(site.path))] + rng.uniform(-55, 55, 2)
        surface, _, _ = site.ground.surface(np.array([x]), np.array([y]))
        if surface[0] == GRASS:
            shape = objects.tree(rng) if rng.random() < 0.6 else objects.hedge(rng)
            site.try_place(shape, Standing(x, y, rng.uniform(0, 2 * np.pi)), margin=0.6)


def _vehicle(rng: np.random.Generator, road: Road) -> Shape:
    kind = rng.random()
    if kind < 0.74 or road.lane_width < 3.1:
        return objects.car(rng)
    return objects.truck(rng) if kind < 0.88 else objects.bus(rng)


def _traffic(site: _Site, road: Road) -> None:
    rng = site.rng
    begin, end = site.span(road)
    spacing = rng.uniform(14, 40)
    for direction in (-1, 1):
        for lane in range(road.lanes):
            speed = rng.uniform(3, 12) if rng.random() < 0.8 else 0.0
            along = begin + rng.uniform(0, spacing)
            while along < end:
                lateral = -direction * (lane + 0.5) * road.lane_width + rng.normal(0, 0.15)
                shape = _vehicle(rng, road)
                site.try_place(shape, AlongLane(road, along, lateral, direction, speed), margin=0.6)
                along += shape.size[1] + 2 + rng.exponential(spacing)


def _parked(site: _Site, road: Road, side: int) -> None:
    rng = site.rng
    spare = road.half_width - road.lanes * road.lane_width
    share = rng.uniform(0.1, 0.85)
    if spare < 2.0:
        return
    along, end = site.span(road)
    while along < end:
        shape = objects.car(rng) if rng.random() < 0.88 else objects.truck(rng)
        if rng.random() < share:
            lateral = side * (road.half_width - 1.25 + rng.normal(0, 0.1))
            turn = (np.pi if side > 0 else 0.0) + rng.normal(0, 0.04)
            motion = _standing(road, along + shape.size[1] / 2, lateral, turn)
            others = [other for other in site.ground.roads if other is not road]
            x, y = np.array(motion.x), np.array(motion.y)
            if all(np.abs(other.coordinates(x, y)[1]) > other.half_width + 5 for other in others):
                site.try_place(shape, motion, margin=0.3)
        along += shape.size[1] + rng.uniform(0.9, 2.5)


def _yards(site: _Site) -> None:
    """Cars in rows on the paved yards beside the roads."""
    rng = site.rng
    turn, stride = rng.uniform(0, np.pi), rng.uniform(2.7, 3.4)
    for _ in range(12):
        x, y = site.path[rng.integers(len(site.path))] + rng.uniform(-45, 45, 2)
        step = stride * np.array([-np.sin(turn), np.cos(turn)])
        for k in range(int(rng.integers(2, 7))):
            px, py = np.array([x, y]) + k * step
            surface, _, _ = site.ground.surface(np.array([px]), np.array([py]))
            if surface[0] == ROAD and site.beside_roads(np.array(px), np.array(py), 3.5):
                site.try_place(objects.car(rng), Standing(px, py, turn + rng.choice([0, np.pi])))


def _people(site: _Site, count: int) -> None:
    rng = site.rng
    for _ in range(count):
        road = site.ground.roads[rng.integers(len(site.ground.roads))]
        begin, end = site.span(road)
        reach = road.half_width + road.sidewalk
        if rng.random() < 0.8:
            lateral = rng.choice([-1, 1]) * rng.uniform(road.half_width + 0.6, reach)
        else:
            lateral = rng.uniform(-reach, reach)
        speed = rng.uniform(0.7, 1.6) if rng.random() < 0.7 else 0.0
        motion = AlongLane(road, rng.uniform(begin + 25, end - 25), lateral, int(rng.choice([-1, 1])), speed)
        site.try_place(objects.pedestrian(rng), motion)


def _work_zones(site: _Site, count: int) -> None:
    """Rows of cones and of barriers at slants on and beside the roads."""
    rng = site.rng
    for _ in range(count):
        road = site.ground.roads[rng.integers(len(site.ground.roads))]
        along, _ = road.coordinates(site.path[:, 0], site.path[:, 1])
        along = rng.uniform(along.min() - 22, along.max() + 28)
        lateral = rng.choice([-1, 1]) * rng.uniform(0.3, 1.05) * road.half_width
        slant = rng.normal(0, 0.35)
        cones = rng.random() < 0.5
        stride = rng.uniform(1.2, 3.0) if cones else 2.45
        for k in range(int(rng.integers(4, 10) if cones else rng.integers(3, 7))):
            shape = objects.traffic_cone(rng) if cones else objects.barrier(rng)
            step = k * stride
            turn = slant + np.pi / 2  # a barrier's long side is its y axis
            motion = _standing(road, along + step * np.cos(slant), lateral + step * np.sin(slant), turn)
            site.try_place(shape, motion, margin=0.05)


def populate(rng: np.random.Generator, ground: Ground, path: AlongPath, seconds: float) -> Placed:
    """Draws all things of a scene that lasts `seconds`; the recording car follows `path`."""
    site = _Site(rng, ground, path, seconds)
    stretch = 1 + seconds * path.speed / 60  # a longer drive passes more things
    _work_zones(site, int(rng.integers(2, 6) * stretch))
    for road in ground.roads:
        for side in (-1, 1):
            _buildings(site, road, side)
    for road in ground.roads:
        _traffic(site, road)
        for side in (-1, 1):
            _parked(site, road, side)
            _street_side(site, road, side)
    _yards(site)
    _people(site, int(rng.integers(14, 40) * stretch))
    _greenery(site, int(rng.integers(20, 70) * stretch))
    return site.placed
