"""Colours of surfaces: procedural textures of parts and of the ground, before light falls on them.

Every function works on all pixels of one material at once; positions are in metres, colours 0..255 float32.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Float, Int

from data_prep.world.ground import SIDEWALK, Ground
from data_prep.world.parts import Material

_TILE = 256

Pixels = Float[np.ndarray, " n"]
Colours = Float[np.ndarray, "n 3"]


@cache
def _noise_tile() -> Float[np.ndarray, "256 256"]:
    """A periodic tile of noise of several octaves, zero mean, unit deviation."""
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft2(rng.standard_normal((_TILE, _TILE)))
    fy, fx = np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None]
    tile = np.fft.irfft2(spectrum / np.maximum(np.hypot(fx, fy), 4 / _TILE) ** 0.9, s=(_TILE, _TILE))
    return ((tile - tile.mean()) / tile.std()).astype(np.float32)


def noise(u: Pixels, v: Pixels) -> Pixels:
    """Noise at positions counted in texels of about one noise grain."""
    row, column = np.floor(v).astype(np.int64) % _TILE, np.floor(u).astype(np.int64) % _TILE
    return _noise_tile()[row, column]


def smooth_noise(u: Pixels, v: Pixels) -> Pixels:
    """The same noise, interpolated between texels."""
    row, column = np.floor(v), np.floor(u)
    fv, fu = v - row, u - column
    r0, c0 = row.astype(np.int64) % _TILE, column.astype(np.int64) % _TILE
    r1, c1 = (r0 + 1) % _TILE, (c0 + 1) % _TILE
    tile = _noise_tile()
    return (1 - fv) * ((1 - fu) * tile[r0, c0] + fu * tile[r0, c1]) + fv * ((1 - fu) * tile[r1, c0] + fu * tile[r1, c1])


def _line(offset: Pixels, half_width: float, blur: Pixels) -> Pixels:
    """Share of a pixel of size `blur` that a line of this half width covers, at a distance from the line's middle."""
    return np.clip((half_width - np.abs(offset)) / np.maximum(blur, 1e-3) + 0.5, 0, 1) * np.minimum(
        1, 2 * half_width / np.maximum(blur, 1e-3)
    )


def _mix(base: Colours, other, share: Pixels) -> Colours:
    return base + share[:, None] * (np.asarray(other, np.float32) - base)


def _periodic(x: Pixels, period: float) -> Pixels:
    """Signed distance to the nearest multiple of the period."""
    return x - period * np.round(x / period)


def ground_colours(ground: Ground, x: Pixels, y: Pixels, pixel: Pixels) -> Colours:
    """Colours of ground positions.

    Args:
      x, y: in the world, metres.
      pixel: the size of a pixel on the ground across the ray, metres.
    """
    surface, along, lateral = ground.surface(x, y)
    fine = noise(x * 9, y * 9) * np.clip(0.12 / np.maximum(pixel, 1e-3), 0, 1)
    coarse = smooth_noise(x * 0.8, y * 0.8)
    grain = np.array([0, 0.05, 0.03, 0.16], np.float32)[surface]
    patches = np.array([0, 0.06, 0.04, 0.14], np.float32)[surface]
    colour = ground.tones[surface] * (1 + grain * fine + patches * coarse)[:, None]
    colour = _pavement(colour, surface, x, y, pixel)
    crossing = np.zeros(len(x), bool)
    if len(ground.roads) > 1:
        on_road = np.stack([np.abs(l) < r.half_width for l, r in zip(lateral, ground.roads, strict=True)])
        crossing = on_road.sum(0) > 1
    for road, s, beside in zip(ground.roads, along, lateral, strict=True):
        across = np.abs(beside)
        on = (across < road.half_width) & ~crossing
        reach = road.lanes * road.lane_width
        paint = np.zeros_like(x)
        dashed = (s % 9.0) < 4.0
        for lane in range(1, road.lanes):
            paint = np.maximum(paint, _line(across - lane * road.lane_width, 0.09, pixel) * dashed)
        paint = np.maximum(paint, _line(across - (reach - 0.1), 0.08, pixel))
        for other, other_lateral in zip(ground.roads, lateral, strict=True):
            if other is not road:
                before = np.abs(other_lateral) - other.half_width - other.sidewalk
                zebra = (before > -2.6) & (before < 0.6) & (_periodic(beside, 1.2) > 0)
                paint = np.where((before > -3.2) & (before < 1.4), 0.85 * zebra, paint)
        colour = np.where(on[:, None], _mix(colour, (232, 232, 226), paint), colour)
        if road.centre_marking == 0:
            centre = _line(beside, 0.09, pixel) * dashed
            colour = np.where(on[:, None], _mix(colour, (232, 232, 226), centre), colour)
        else:
            centre = np.maximum(_line(beside - 0.16, 0.07, pixel), _line(beside + 0.16, 0.07, pixel))
            colour = np.where(on[:, None], _mix(colour, (226, 178, 48), centre), colour)
        kerb = _line(across - road.half_width - 0.12, 0.14, pixel) * (surface == SIDEWALK)
        colour = _mix(colour, (206, 204, 198), kerb)
    return colour.astype(np.float32)


def _pavement(colour: Colours, surface: Int[np.ndarray, " n"], x: Pixels, y: Pixels, pixel: Pixels) -> Colours:
    joints = np.maximum(_line(_periodic(x, 1.0), 0.03, pixel), _line(_periodic(y, 1.0), 0.03, pixel))
    return _mix(colour, (112, 100, 92), 0.8 * joints * (surface == SIDEWALK))


def _body(colour, q, p, half, face, pixel):
    front, back = face == 1, face == 0
    lamp = (np.abs(q[:, 1]) > 0.58) & (np.abs(q[:, 1]) < 0.94) & (q[:, 2] > 0.1) & (q[:, 2] < 0.7)
    grille = (np.abs(q[:, 1]) < 0.45) & (np.abs(q[:, 2] + 0.1) < 0.3)
    colour = _mix(colour, (30, 30, 34), 0.85 * (front & grille))
    colour = _mix(colour, (250, 248, 226), (front & lamp).astype(np.float32))
    colour = _mix(colour, (214, 10, 14), (back & lamp).astype(np.float32))
    colour = _mix(
        colour, (226, 226, 218), (back & (np.abs(q[:, 1]) < 0.28) & (np.abs(q[:, 2]) < 0.25)).astype(np.float32)
    )
    sill = (q[:, 2] < -0.72).astype(np.float32)
    doors = _line(p[:, 0] - 0.25, 0.02, pixel) * ((face == 2) | (face == 3))
    return _mix(_mix(colour, (36, 36, 38), 0.8 * sill), (20, 20, 22), 0.5 * doors)


def _cabin(colour, q, p, half, face, pixel):
    side = (face == 2) | (face == 3)
    edge = np.where(side, np.abs(q[:, 0]) > 0.88, np.abs(q[:, 1]) > 0.9) | (np.abs(q[:, 2]) > 0.86)
    pillar = side & (np.abs(p[:, 0] + 0.05) < 0.06)
    glass = (face < 4) & ~edge & ~pillar
    return _mix(colour, (40, 52, 64), glass.astype(np.float32))


def _cab(colour, q, p, half, face, pixel):
    front, side = face == 1, (face == 2) | (face == 3)
    glass = (front & (np.abs(q[:, 1]) < 0.88) & (q[:, 2] > 0.12) & (q[:, 2] < 0.82)) | (
        side & (q[:, 0] > -0.2) & (q[:, 0] < 0.8) & (q[:, 2] > 0.15) & (q[:, 2] < 0.8)
    )
    colour = _mix(colour, (38, 50, 62), glass.astype(np.float32))
    lamp = front & (np.abs(q[:, 1]) > 0.6) & (np.abs(q[:, 2] + 0.62) < 0.14)
    return _mix(colour, (250, 248, 226), lamp.astype(np.float32))


def _bus(colour, q, p, half, face, pixel):
    side, ends = (face == 2) | (face == 3), face < 2
    pane = np.abs(_periodic(p[:, 0], 1.5)) < 0.68
    glass = (side & pane & (np.abs(q[:, 0]) < 0.95) & (q[:, 2] > 0.0) & (q[:, 2] < 0.66)) | (
        ends & (np.abs(q[:, 1]) < 0.88) & (q[:, 2] > -0.1) & (q[:, 2] < 0.66)
    )
    colour = _mix(colour, (34, 44, 54), glass.astype(np.float32))
    stripe = side & (np.abs(q[:, 2] + 0.22) < 0.05)
    colour = _mix(colour, (244, 244, 238), stripe.astype(np.float32))
    sign = (face == 1) & (np.abs(q[:, 1]) < 0.7) & (q[:, 2] > 0.74) & (q[:, 2] < 0.92)
    colour = _mix(colour, (252, 176, 40), sign.astype(np.float32))
    lamp = ends & (np.abs(q[:, 1]) > 0.66) & (np.abs(q[:, 2] + 0.6) < 0.1)
    lamp_colour = np.where((face == 1)[:, None], np.float32([250, 248, 226]), np.float32([214, 10, 14]))
    return _mix(colour, lamp_colour, lamp.astype(np.float32))


def _tyre(colour, q, p, half, face, pixel):
    hub = (np.hypot(p[:, 0], p[:, 1]) < 0.62 * half[:, 0]).astype(np.float32)
    return _mix(colour, (140, 142, 146), hub * 0.9)


def _blotches(p: Float[np.ndarray, "n 3"], grains: float) -> Pixels:
    """Noise in three dimensions: the mean of one pattern seen along each axis."""
    x, y, z = (p * np.float32(grains)).T
    return (smooth_noise(x, y) + smooth_noise(y + 71, z) + smooth_noise(z + 37, x + 113)) / np.float32(1.7)


def _leaves(colour, q, p, half, face, pixel):
    fade = np.clip(0.3 / np.maximum(pixel * 7, 1e-3), 0.3, 1)
    light = 1 + 0.36 * _blotches(p, 13) * fade + 0.2 * _blotches(p, 2.3) + 0.2 * np.clip(q[:, 2], -1, 1)
    return colour * np.maximum(light, 0.25)[:, None]


def _bark(colour, q, p, half, face, pixel):
    return colour * (1 + 0.18 * noise(np.arctan2(p[:, 1], p[:, 0]) * 6, p[:, 2] * 3))[:, None]


def _cone(colour, q, p, half, face, pixel):
    return _mix(colour, (250, 250, 248), (np.abs(q[:, 2] - 0.05) < 0.28).astype(np.float32))


def _barrier(colour, q, p, half, face, pixel):
    slanted = ((p[:, 1] + p[:, 2]) % 0.8) < 0.4
    return _mix(colour, (246, 246, 242), slanted.astype(np.float32))


def _wall_coordinates(p, face):
    """Along the wall, and up; roofs and floors have no windows."""
    return np.where(face < 2, p[:, 1], p[:, 0])


def _facade(pitch: float, width: float, low: float, high: float, pane, frame):
    """A facade with windows `width` of every `pitch` metres, from `low` to `high` of every storey of 3.3 m."""

    def paint(colour, q, p, half, face, pixel):
        u = _wall_coordinates(p, face)
        extent = np.where(face < 2, half[:, 1], half[:, 0])
        height = p[:, 2] + half[:, 2] - 4.0
        storey = (height % 3.3) / 3.3
        in_storey = (storey > low) & (storey < high) & (height > 0) & (height < 2 * half[:, 2] - 4.2)
        offset = np.abs(_periodic(u - pitch / 2, pitch))
        window = in_storey & (offset < width / 2) & (face < 4) & (np.abs(u) < extent - 0.4)
        rim = (offset < width / 2 + 0.12) & (storey > low - 0.05) & (storey < high + 0.05) & (face < 4)
        lit = noise(np.floor(u / pitch) * 3.3, np.floor(height / 3.3) * 5.1)
        glass = np.asarray(pane, np.float32) * (1 + 0.16 * lit)[:, None]
        colour = _mix(
            colour, frame, 0.7 * (rim & (height > 0) & (height < 2 * half[:, 2] - 4.2) & (np.abs(u) < extent - 0.2))
        )
        return np.where(window[:, None], glass, colour)

    return paint


_BRICK_WINDOWS = _facade(2.6, 1.2, 0.28, 0.78, (62, 78, 96), (226, 222, 212))
_CONCRETE_WINDOWS = _facade(3.2, 2.3, 0.3, 0.76, (70, 88, 106), (150, 146, 138))
_PLASTER_WINDOWS = _facade(3.4, 1.3, 0.28, 0.8, (58, 72, 88), (150, 104, 74))


def _brick(colour, q, p, half, face, pixel):
    u, v = _wall_coordinates(p, face), p[:, 2]
    fade = np.clip(0.05 / np.maximum(pixel, 1e-3), 0, 1)
    joints = np.maximum(_line(_periodic(v, 0.25), 0.025, pixel), 0)
    stones = noise(u * 4, v * 8)
    colour = colour * (1 + 0.10 * stones * (0.3 + 0.7 * fade))[:, None]
    return _BRICK_WINDOWS(_mix(colour, (206, 196, 182), 0.5 * joints), q, p, half, face, pixel)


def _concrete(colour, q, p, half, face, pixel):
    u, v = _wall_coordinates(p, face), p[:, 2]
    panels = np.maximum(_line(_periodic(v, 3.3), 0.05, pixel), _line(_periodic(u, 6.4), 0.04, pixel))
    stains = smooth_noise(u * 0.5, v * 0.3)
    colour = colour * (1 + 0.05 * stains)[:, None]
    return _CONCRETE_WINDOWS(_mix(colour, (110, 108, 104), panels), q, p, half, face, pixel)


def _glass_front(colour, q, p, half, face, pixel):
    u, v = _wall_coordinates(p, face), p[:, 2]
    bars = np.maximum(_line(_periodic(u, 1.6), 0.06, pixel), _line(_periodic(v, 1.65), 0.06, pixel))
    panes = noise(np.floor(u / 1.6) * 3.7, np.floor(v / 1.65) * 2.9)
    colour = colour * (1 + 0.13 * panes)[:, None]
    return _mix(colour, (196, 204, 208), bars * (face < 4))


def _plaster(colour, q, p, half, face, pixel):
    tall = half[:, 2] > 3.4  # walls and cargo boxes have no windows
    colour = colour * (1 + 0.03 * _blotches(p, 0.7))[:, None]
    return np.where(tall[:, None], _PLASTER_WINDOWS(colour, q, p, half, face, pixel), colour)


def _roof(colour, q, p, half, face, pixel):
    return colour * (1 + 0.12 * noise(p[:, 0] * 4, p[:, 1] * 4 + p[:, 2] * 4))[:, None]


_TEXTURES: dict[Material, Callable] = {
    Material.CAR_BODY: _body,
    Material.CABIN: _cabin,
    Material.CAB: _cab,
    Material.BUS_BODY: _bus,
    Material.TYRE: _tyre,
    Material.LEAVES: _leaves,
    Material.BARK: _bark,
    Material.CONE: _cone,
    Material.BARRIER: _barrier,
    Material.BRICK: _brick,
    Material.CONCRETE: _concrete,
    Material.GLASS_FRONT: _glass_front,
    Material.PLASTER: _plaster,
    Material.ROOF: _roof,
}


def part_colours(
    material: Int[np.ndarray, " n"],
    colour: Colours,
    local: Float[np.ndarray, "n 3"],
    half: Float[np.ndarray, "n 3"],
    face: Int[np.ndarray, " n"],
    pixel: Pixels,
) -> Colours:
    """Colours of positions on parts.

    Args:
      material: numbers of `Material`.
      colour: the parts' own colours.
      local, face: as `trace.surface_normals` returns them; `half` the half sizes of the parts, metres.
      pixel: the size of a pixel across the ray, metres.
    """
    result = colour.copy()
    for kind, paint in _TEXTURES.items():
        at = np.flatnonzero(material == kind)
        if at.size:
            p, h = local[at], half[at]
            result[at] = paint(colour[at], p / h, p, h, face[at], pixel[at])
    return result
