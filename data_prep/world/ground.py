"""The ground of a scene: a wavy height field, roads on it, and what its surface is made of."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

# Surfaces, by the number that the thing maps and the captions give them.
ROAD, SIDEWALK, GRASS = 1, 2, 3
SURFACE_LIDARSEG = np.array([255, 24, 26, 27], np.uint8)

# Ray and ground count as met when they are this close, metres; grazing rays take many steps to get there.
_SETTLED, _MOST_STEPS = 2e-3, 100


@dataclass(frozen=True)
class HeightField:
    """Height of the ground in metres: a sum of long sine waves.

    `amplitude` [waves] in metres, `wave_vector` [waves, 2] in radians per metre, `phase` [waves].
    """

    amplitude: Float[np.ndarray, " waves"]
    wave_vector: Float[np.ndarray, "waves 2"]
    phase: Float[np.ndarray, " waves"]

    def height(self, x: Float[np.ndarray, "*n"], y: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
        """Height in metres at the positions x, y, in their precision."""
        total = np.zeros_like(x)
        for a, (kx, ky), phase in zip(self.amplitude, self.wave_vector, self.phase, strict=True):
            total += x.dtype.type(a) * np.sin(x.dtype.type(kx) * x + x.dtype.type(ky) * y + x.dtype.type(phase))
        return total

    def normal(self, x: Float[np.ndarray, "*n"], y: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n 3"]:
        """Upward unit normal at the positions x, y."""
        slope_x, slope_y = np.zeros_like(x), np.zeros_like(x)
        for a, (kx, ky), phase in zip(self.amplitude, self.wave_vector, self.phase, strict=True):
            change = x.dtype.type(a) * np.cos(x.dtype.type(kx) * x + x.dtype.type(ky) * y + x.dtype.type(phase))
            slope_x += x.dtype.type(kx) * change
            slope_y += x.dtype.type(ky) * change
        normal = np.stack([-slope_x, -slope_y, np.ones_like(x)], -1)
        return normal / np.linalg.norm(normal, axis=-1, keepdims=True)

    def steepest(self) -> float:
        """A bound of the slope, metres per metre."""
        return float(np.sum(np.abs(self.amplitude) * np.linalg.norm(self.wave_vector, axis=1)))


def trace_ground(
    field: HeightField,
    origins: Float[np.ndarray, "3 #n"],
    directions: Float[np.ndarray, "3 n"],
    far: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """Distance in metres at which rays first meet the ground; infinite where that is beyond `far`.

    Steps that the steepest slope makes safe never pass the first crossing; Newton's steps then close the gap.
    """
    steepest = field.steepest()
    distance = np.full(directions.shape[1], np.inf, np.float32)
    level = np.hypot(directions[0], directions[1])
    fall = steepest * level - directions[2]
    # A ray that rises faster than the steepest slope leaves the ground for good.
    rays = np.flatnonzero(fall > 1e-4)
    d, o = directions[:, rays], np.broadcast_to(origins, directions.shape)[:, rays]
    fall, limit = fall[rays], far[rays]
    t = np.zeros(rays.size, np.float32)
    active = np.arange(rays.size)
    for step in range(_MOST_STEPS):
        if step % 5 == 0:  # copies cost more than a few steps of settled rays
            a_d, a_o, a_fall = d[:, active], o[:, active], fall[active]
        gap = a_o[2] + t[active] * a_d[2] - field.height(a_o[0] + t[active] * a_d[0], a_o[1] + t[active] * a_d[1])
        t[active] += gap / a_fall
        if step % 5 == 4:
            active = active[(gap > _SETTLED) & (t[active] < limit[active])]
            if not active.size:
                break
    near = t < limit
    rays, d, o, limit, t = rays[near], d[:, near], o[:, near], limit[near], t[near]
    for _ in range(2):
        x, y = o[0] + t * d[0], o[1] + t * d[1]
        gap = o[2] + t * d[2] - field.height(x, y)
        normal = field.normal(x, y)
        descent = -(normal[:, 0] * d[0] + normal[:, 1] * d[1] + normal[:, 2] * d[2]) / normal[:, 2]
        t += np.where(descent > 1e-3, gap / np.maximum(descent, 1e-3), 0)
    x, y = o[0] + t * d[0], o[1] + t * d[1]
    gap = np.abs(o[2] + t * d[2] - field.height(x, y))
    good = (gap < 0.01) & (t > 0) & (t < limit)
    distance[rays[good]] = t[good]
    return distance


@dataclass(frozen=True)
class Road:
    """A road whose centre line is a bend with straight ends, in a frame of its own.

    In that frame (origin `origin`, x axis at `heading` radians) the centre line is y = f(x) with curvature
    1 / `radius` at x = 0 (signed; infinite for a straight road) and a slope of at most 1.
    Widths in metres; `half_width` is the carriageway's, parking lanes included.
    """

    origin: tuple[float, float]
    heading: float
    radius: float
    half_width: float
    sidewalk: float
    lanes: int
    lane_width: float
    centre_marking: int  # 0 dashed white, 1 solid yellow

    def _centre_line(self, x):
        if np.isinf(self.radius):
            return np.zeros_like(x), np.zeros_like(x)
        scale = x.dtype.type(abs(self.radius))
        root = np.sqrt(1 + (x / scale) ** 2)
        sign = x.dtype.type(np.sign(self.radius))
        return sign * scale * (root - 1), sign * x / scale / root

    def coordinates(
        self, x: Float[np.ndarray, "*n"], y: Float[np.ndarray, "*n"]
    ) -> tuple[Float[np.ndarray, "*n"], Float[np.ndarray, "*n"]]:
        """(along, lateral) in metres of world positions; lateral is positive to the left of the centre line."""
        kind = x.dtype.type
        c, s = kind(np.cos(self.heading)), kind(np.sin(self.heading))
        dx, dy = x - kind(self.origin[0]), y - kind(self.origin[1])
        along, across = c * dx + s * dy, c * dy - s * dx
        line, slope = self._centre_line(along)
        return along, (across - line) / np.sqrt(1 + slope * slope)

    def position(
        self, along: Float[np.ndarray, "*n"], lateral: Float[np.ndarray, "*n"]
    ) -> tuple[Float[np.ndarray, "*n"], Float[np.ndarray, "*n"], Float[np.ndarray, "*n"]]:
        """(x, y, heading) in the world of places on the road; exact on the centre line, close beside it."""
        line, slope = self._centre_line(np.asarray(along, np.float64))
        norm = np.sqrt(1 + slope * slope)
        px, py = along - lateral * slope / norm, line + lateral / norm
        c, s = np.cos(self.heading), np.sin(self.heading)
        return self.origin[0] + c * px - s * py, self.origin[1] + s * px + c * py, self.heading + np.arctan(slope)


@dataclass(frozen=True)
class Ground:
    """Height field, roads and the use of the land beside them.

    `blocks` [2, blocks] holds a surface number for stretches of `block_length` metres along the main road, on its
    right (row 0) and left (row 1) side. `tones` are base colours (0..255) by surface number; `dry` is the
    grass's state.
    """

    field: HeightField
    roads: tuple[Road, ...]
    blocks: Int[np.ndarray, "2 blocks"]
    block_length: float
    tones: Float[np.ndarray, "4 3"]
    dry: bool

    def surface(
        self, x: Float[np.ndarray, "*n"], y: Float[np.ndarray, "*n"]
    ) -> tuple[Int[np.ndarray, "*n"], Float[np.ndarray, " roads *n"], Float[np.ndarray, " roads *n"]]:
        """Surface numbers at world positions, and (along, lateral) for every road."""
        coordinates = [road.coordinates(x, y) for road in self.roads]
        along, lateral = np.stack([c[0] for c in coordinates]), np.stack([c[1] for c in coordinates])
        count = self.blocks.shape[1]
        block = np.floor(along[0] / x.dtype.type(self.block_length)).astype(np.int64) % count
        surface = self.blocks[(lateral[0] > 0).astype(np.int64), block]
        for road, beside in zip(self.roads, lateral, strict=True):
            surface = np.where(np.abs(beside) < road.half_width + road.sidewalk, SIDEWALK, surface)
        for road, beside in zip(self.roads, lateral, strict=True):
            surface = np.where(np.abs(beside) < road.half_width, ROAD, surface)
        return surface.astype(np.int32), along, lateral


def draw_height_field(rng: np.random.Generator, roughness: float) -> HeightField:
    """A height field of four waves, 70 to 240 m long, whose steepest slopes sum to about `roughness`."""
    wavelength = rng.uniform(70, 240, 4)
    direction = rng.uniform(0, 2 * np.pi, 4)
    wave_vector = (2 * np.pi / wavelength)[:, None] * np.stack([np.cos(direction), np.sin(direction)], 1)
    share = rng.uniform(0.3, 1.0, 4)
    slope = roughness * share / share.sum()
    return HeightField(slope * wavelength / (2 * np.pi), wave_vector, rng.uniform(0, 2 * np.pi, 4))


def draw_tones(rng: np.random.Generator, dry: bool) -> Float[np.ndarray, "4 3"]:
    """Base colours of road, pavement and grass of a scene, by surface number."""
    tones = np.zeros((4, 3), np.float32)
    tones[ROAD] = rng.uniform(74, 108) * np.array([0.97, 0.98, 1.04])
    tones[SIDEWALK] = ((196, 180, 164), (206, 196, 184), (190, 160, 142))[rng.integers(3)]
    tones[GRASS] = (178, 160, 88) if dry else ((108, 152, 54), (124, 158, 62), (92, 142, 58))[rng.integers(3)]
    return tones
