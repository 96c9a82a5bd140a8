"""The cameras: rays through pixels, traced, textured, lit by sun and sky, hazed."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_prep.world.parts import EDGES, Material
from data_prep.world.scene import Scene
from data_prep.world.sight import look
from data_prep.world.solids import PosedSolids, Solids
from data_prep.world.textures import ground_colours, part_colours, smooth_noise
from data_prep.world.trace import NOTHING, trace_solids, windows_of

FAR = 160.0
_CLIP = 0.1
# The sun's map of depths: half size in metres and texels across.
_SHADOW_REACH, _SHADOW_TEXELS = 56.0, 640
# Its rays start this far above the car, metres.
_ABOVE = 80.0
_GLOSSY = np.zeros(len(Material), np.float32)
_GLOSSY[[Material.PAINT, Material.CAR_BODY, Material.CAB, Material.BUS_BODY, Material.CABIN]] = 0.22
_GLOSSY[Material.GLASS_FRONT] = 0.35


@dataclass(frozen=True)
class Picture:
    """What one camera saw: RGB, and per pixel the thing's number (0 sky) and the raw lidarseg index (255 sky)."""

    image: UInt8[np.ndarray, "height width 3"]
    number: Int[np.ndarray, "height width"]
    lidarseg: UInt8[np.ndarray, "height width"]
    distance: Float[np.ndarray, "height width"]


@dataclass(frozen=True)
class SunMap:
    """Distances from a plane towards the sun to the first surface, on a grid around a place in the world."""

    axes: Float[np.ndarray, "3 3"]  # rows: the grid's columns' and rows' directions, and towards the sun
    centre: Float[np.ndarray, "3"]
    depth: Float[np.ndarray, "texels texels"]


def sun_map(scene: Scene, solids: Solids, time: float) -> SunMap | None:
    """Traces the scene from the sun at a time in seconds; None under an overcast sky."""
    sun = scene.weather.sun
    if not scene.weather.sun_light.any():
        return None
    right = np.array([-sun[1], sun[0], 0.0]) / np.hypot(sun[0], sun[1])
    axes = np.stack([right, np.cross(sun, right), sun])
    centre = scene.ego_to_world(time)[:3, 3]
    posed = solids.at(time, centre)
    step = 2 * _SHADOW_REACH / _SHADOW_TEXELS
    at = ((np.arange(_SHADOW_TEXELS) + 0.5) * step - _SHADOW_REACH).astype(np.float32)
    frame = axes.astype(np.float32)
    origins = frame[0][:, None, None] * at[None, None] + frame[1][:, None, None] * at[None, :, None]
    origins += (_ABOVE * frame[2])[:, None, None]
    directions = np.broadcast_to(-frame[2][:, None, None], origins.shape)
    seen = posed.corners @ frame[:2].T
    low, high = seen.min(1), seen.max(1)
    first = np.floor((low + _SHADOW_REACH) / step).astype(np.int64)
    last = np.ceil((high + _SHADOW_REACH) / step).astype(np.int64) + 1
    bounds = np.stack([first[:, 1], last[:, 1], first[:, 0], last[:, 0]], 1)
    windows = windows_of(np.ones(len(bounds), bool), bounds, (_SHADOW_TEXELS, _SHADOW_TEXELS))
    hits = trace_solids(solids, posed, windows, origins, directions, 2 * _ABOVE)
    return SunMap(axes, centre, hits.distance)


def _sunlit(
    sun: SunMap | None, points: Float[np.ndarray, "n 3"], origin: Float[np.ndarray, "3"]
) -> Float[np.ndarray, " n"]:
    """Share of sunlight at points relative to an origin; soft by averaging four texels of the sun's map."""
    if sun is None:
        return np.zeros(len(points), np.float32)
    local = points @ sun.axes.T.astype(np.float32) + (sun.axes @ (origin - sun.centre)).astype(np.float32)
    texel = (local[:, :2] + _SHADOW_REACH) * np.float32(_SHADOW_TEXELS / (2 * _SHADOW_REACH)) - 0.5
    inside = (np.abs(local[:, :2]) < _SHADOW_REACH - 1).all(1)
    depth = _ABOVE - local[:, 2] - 0.12
    base = np.floor(np.where(inside[:, None], texel, 0)).astype(np.int64)
    share = np.where(inside[:, None], texel, 0) - base
    lit = np.zeros(len(points), np.float32)
    for dr, dc in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = np.where(dc, share[:, 0], 1 - share[:, 0]) * np.where(dr, share[:, 1], 1 - share[:, 1])
        lit += weight * (sun.depth[base[:, 1] + dr, base[:, 0] + dc] > depth)
    return np.where(inside, lit, 1).astype(np.float32)


def _camera_windows(
    posed: PosedSolids, rotation: Float[np.ndarray, "3 3"], intrinsics: Float[np.ndarray, "3 3"], shape: tuple[int, int]
) -> Int[np.ndarray, "windows 5"]:
    """Pixel rectangles around the parts: their boxes cut by a plane just before the camera, then projected."""
    corners = posed.corners @ rotation
    starts, ends = corners[:, EDGES[:, 0]], corners[:, EDGES[:, 1]]
    fall = ends[..., 2] - starts[..., 2]
    share = (_CLIP - starts[..., 2]) / np.where(fall == 0, 1, fall)
    crossing = (share > 0) & (share < 1) & (fall != 0)
    cut = starts + np.clip(share, 0, 1)[..., None] * (ends - starts)
    points = np.concatenate([corners, cut], 1)
    valid = np.concatenate([corners[..., 2] >= _CLIP, crossing], 1)
    depth = np.maximum(points[..., 2], _CLIP)
    u = intrinsics[0, 0] * points[..., 0] / depth + intrinsics[0, 2]
    v = intrinsics[1, 1] * points[..., 1] / depth + intrinsics[1, 2]
    bounds = []
    for value, limit in ((v, shape[0]), (u, shape[1])):
        bounds.append(np.clip(np.where(valid, value, np.inf).min(1) - 1, -1, limit))
        bounds.append(np.clip(np.where(valid, value, -np.inf).max(1) + 2, 0, limit))
    near = valid.any(1) & (np.where(valid, depth, np.inf).min(1) < FAR)
    return windows_of(near, np.stack(bounds, 1).astype(np.int64), shape)


def _sky(scene: Scene, d: Float[np.ndarray, "3 n"]) -> Float[np.ndarray, "n 3"]:
    weather = scene.weather
    up = np.clip(d[2], 0, 1)
    colour = weather.horizon + np.sqrt(up)[:, None] * (weather.zenith - weather.horizon)
    plane = 14 / (up + 0.12)
    shift = weather.cloud_shift
    puff = smooth_noise(d[0] * plane + shift[0], d[1] * plane + shift[1])
    puff = puff + 0.5 * smooth_noise(d[0] * plane * 3 + shift[1], d[1] * plane * 3)
    cloud = np.clip((puff - 1.2 + 1.6 * weather.clouds) * 0.6, 0, 0.9) * np.clip(up * 6, 0, 1)
    colour += cloud[:, None] * (weather.horizon * 0.3 + 178 - colour)
    glow = np.clip(weather.sun @ d, 0, 1) ** 60
    return colour + (70 * glow)[:, None] * np.minimum(weather.sun_light, 1)


def _soften(image: Float[np.ndarray, "h w 3"], part: Int[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 3"]:
    """Smooths the stairs along outlines: pixels at a border of two parts take a weighted mean of their neighbours."""
    edge = np.zeros(part.shape, bool)
    for axis in (0, 1):
        differs = np.diff(part, axis=axis) != 0
        pad = [(0, 0), (0, 0)]
        pad[axis] = (0, 1)
        edge |= np.pad(differs, pad)
        pad[axis] = (1, 0)
        edge |= np.pad(differs, pad)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows, columns = np.nonzero(edge)
    mean = np.zeros((len(rows), 3), np.float32)
    for dr, weight_row in ((0, 1), (1, 2), (2, 1)):
        for dc, weight_column in ((0, 1), (1, 2), (2, 1)):
            mean += weight_row * weight_column / 16 * padded[rows + dr, columns + dc]
    image = image.copy()
    image[rows, columns] = mean
    return image


def take_picture(
    scene: Scene,
    solids: Solids,
    sun: SunMap | None,
    time: float,
    camera_to_world: Float[np.ndarray, "4 4"],
    intrinsics: Float[np.ndarray, "3 3"],
    shape: tuple[int, int],
) -> Picture:
    """Renders one camera.

    Args:
      scene, solids, sun: the world and its shadows.
      time: when the shutter opens, seconds since the first key frame.
      camera_to_world: pose of the camera at that time.
      intrinsics: in pixels; pixel centres lie at whole numbers.
      shape: (height, width) of the image.
    """
    rotation, origin = camera_to_world[:3, :3], camera_to_world[:3, 3]
    posed = solids.at(time, origin)
    v, u = np.mgrid[: shape[0], : shape[1]]
    rays = np.stack(
        [(u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1], np.ones(shape)]
    )
    stretch = np.linalg.norm(rays, axis=0)
    directions = np.einsum("ij,jhw->ihw", rotation, rays / stretch).astype(np.float32)
    windows = _camera_windows(posed, rotation.astype(np.float32), intrinsics, shape)
    own = len(scene.things)
    windows = windows[solids.part_thing[windows[:, 0]] != own]
    sight = look(scene, solids, posed, windows, origin, directions, FAR)

    part, distance, normal = sight.part, sight.distance, sight.normal
    d = directions.reshape(3, -1)
    colour = np.zeros((part.size, 3), np.float32)
    gloss = np.zeros(part.size, np.float32)
    pixel = distance / np.float32(intrinsics[0, 0])
    x, y = sight.soil_place.T
    colour[sight.soil] = ground_colours(scene.ground, x, y, pixel[sight.soil])
    index = part[sight.solid]
    material = solids.part_material[index]
    colour[sight.solid] = part_colours(
        material, solids.part_colour[index], sight.local, solids.part_half[index], sight.face, pixel[sight.solid]
    )
    gloss[sight.solid] = _GLOSSY[material]

    lit = np.flatnonzero(part != NOTHING)
    n, ray = normal[lit], d[:, lit].T
    points = distance[lit, None] * ray
    facing = np.maximum(n @ scene.weather.sun.astype(np.float32), 0)
    sunny = facing * _sunlit(sun, points + np.float32(0.15) * n, origin)  # off the surface, or its own texels shade it
    ambient = 0.72 + 0.28 * n[:, 2]
    light = sunny[:, None] * scene.weather.sun_light + ambient[:, None] * scene.weather.sky_light
    mirrored = ray - 2 * (n * ray).sum(1, keepdims=True) * n
    sheen = gloss[lit] * np.clip(mirrored[:, 2] * 2 + 0.1, 0, 1)
    shade = colour[lit] * light
    shade += sheen[:, None] * (scene.weather.horizon * 0.85 - shade)
    haze = 1 - np.exp(-scene.weather.haze * distance[lit])
    colour[lit] = shade + haze[:, None] * (scene.weather.horizon - shade)
    sky = np.flatnonzero(part == NOTHING)
    colour[sky] = _sky(scene, d[:, sky])
    image = _soften(np.clip(colour, 0, 255).reshape(*shape, 3), part.reshape(shape))
    return Picture(
        np.clip(np.round(image), 0, 255).astype(np.uint8),
        sight.number.reshape(shape),
        sight.lidarseg.reshape(shape),
        distance.reshape(shape),
    )


def sensor_pose(scene: Scene, time: float, sensor_to_ego: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """Pose of a sensor in the world at a time in seconds."""
    return scene.ego_to_world(time) @ sensor_to_ego
