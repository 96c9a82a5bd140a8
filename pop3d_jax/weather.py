"""What fog, falling snow and a wet road do to a lidar sweep: physics of single points, with all parameters explicit.

Points are in the lidar's frame, so that a point's ray begins at the origin. The severities of a benchmark are in
`pop3d_jax.corruptions`. Where a function is simpler than the simulation of the paper that it cites, it says so. All
intensities are computed on the scale 0..255 of the papers' sensors.
"""

import functools

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from scipy.constants import speed_of_light

_BYTE = 255.0
# Half-power width of the pulse, seconds, and the differential reflectivity of a hard target (Hahner et al., ICCV 2021).
_FOG_PULSE = 20e-9
_HARD_TARGET = 1e-6 / np.pi
# Metres: the receiver sees nothing of the beam before the first range, all of it from the second (ibid.).
_RECEIVER_RANGES = (0.9, 1.0)
_FOG_RANGE, _FOG_STEP = 200.0, 0.1
# Largest displacement of an echo of fog along its ray, metres, before the factor that it becomes (ibid.).
_FOG_NOISE = 10.0
# Refractive indices (Hahner et al., CVPR 2022), and the power that the sensor has over that of a road's echo (ibid.).
_AIR, _WATER = 1.0003, 1.33
_POWER_FACTOR = 15.0
_PAVEMENT_DEPTH = 0.0012
# Ground points below which no line of intensities is fitted.
_FEWEST_GROUND_POINTS = 100
# Snow (ibid.): reflectivity of a flake, opening of the beam in radians, largest diameter and density (g/cm3).
_FLAKE_REFLECTIVITY, _BEAM_DIVERGENCE, _LARGEST_FLAKE, _SNOW_DENSITY = 0.9, 3e-3, 0.02, 0.1
_SNOW_RANGE = 120.0
# Share of the weakest ground echoes that is noise, and the percentile that counts as the weakest.
_SNOW_NOISE_FLOOR, _WEAKEST_PERCENT = 0.7, 1.0

# Points may have vanished.
Sweep = tuple[Float32[np.ndarray, "left columns"], UInt8[np.ndarray, " left"]]


def receiver_share(ranges: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Share of the beam that the receiver sees at a range, in metres: 0 close by, then 1."""
    start, end = _RECEIVER_RANGES
    return np.clip((ranges - start) / (end - start), 0.0, 1.0)


@functools.lru_cache(maxsize=16)
def fog_echo(attenuation: float) -> tuple[Float[np.ndarray, " ranges"], Float[np.ndarray, " ranges"]]:
    """The strongest echo of fog alone before a target, for targets at 0, 0.1 .. 200 m.

    The integral of Hahner et al. (ICCV 2021), equation 12, for which their code reads tables:
    I(R) = int_0^2tau sin^2(pi t / 2 tau) share(s) exp(-2 alpha s) / s^2 dt, s = R - c t / 2.

    Args:
      attenuation: alpha, 1/m.

    Returns:
      Where the echo seems to come from, in metres, and the integral's largest value up to the target.
    """
    targets = np.arange(0, _FOG_RANGE + _FOG_STEP / 2, _FOG_STEP)
    times = np.linspace(0, 2 * _FOG_PULSE, 601)
    ranges = np.maximum(targets[:, None] - speed_of_light * times / 2, 1e-3)
    pulse = np.sin(np.pi * times / (2 * _FOG_PULSE)) ** 2
    received = pulse * receiver_share(ranges) * np.exp(-2 * attenuation * ranges) / ranges**2
    power = np.trapezoid(received, times, axis=1)
    largest = np.maximum.accumulate(power)
    place = np.maximum.accumulate(np.where(power >= largest, np.arange(len(power)), 0))
    # The pulse's middle reaches the fog half its length before its end.
    return targets[place] - speed_of_light * _FOG_PULSE / 2, largest


def fog(
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " points"],
    *,
    attenuation: float,
    backscatter: float,
    max_intensity: float,
    unlabelled: int,
    rng: np.random.Generator,
) -> Sweep:
    """Fog after Hahner et al. (ICCV 2021): echoes get weaker, and those weaker than the fog's own move to it.

    Differs from the authors' code: an echo of fog never lies behind the target or the sensor (theirs may, for targets
    nearer than the noise), and its intensity is limited (Robo3D's is not).

    Args:
      points: x, y, z, intensity, more columns.
      attenuation: alpha, 1/m.
      backscatter: beta, 1/sr: how much light fog sends back.
      max_intensity: largest value of the intensities.
      unlabelled: label of the echoes of fog.
    """
    points, labels = points.copy(), labels.copy()
    target = np.linalg.norm(points[:, :3].astype(np.float64), axis=1)
    intensity = points[:, 3].astype(np.float64) * (_BYTE / max_intensity)
    distances, integrals = fog_echo(attenuation)
    place = np.minimum(np.round(target / _FOG_STEP), len(distances) - 1).astype(np.int64)
    hard = np.round(intensity * np.exp(-2 * attenuation * target))
    soft = np.minimum(intensity * target**2 * (backscatter / _HARD_TARGET) * integrals[place], _BYTE)
    width = np.minimum(_FOG_NOISE, target / 2)
    factor = target / np.maximum(target + width * rng.uniform(-1, 1, len(target)), 1e-6)
    distance = distances[place]
    foggy = (soft > hard) & (distance > 0) & (distance < target)
    moved = np.minimum(distance * factor, target) / np.maximum(target, 1e-6)
    points[:, :3] *= np.where(foggy, moved, 1.0)[:, None].astype(np.float32)
    points[:, 3] = np.where(foggy, soft, np.minimum(hard, intensity)) * (max_intensity / _BYTE)
    labels[foggy] = unlabelled
    return points, labels


def wet_transmittance(
    angle: Float[np.ndarray, " points"], reflectivity: Float[np.ndarray, " points"]
) -> Float[np.ndarray, " points"]:
    """Share of the light that comes back from a diffuse ground below water, by Fresnel's equations for power.

    Light enters the water, is reflected by the ground, and leaves, with all reflections at the surface from below; of
    the two polarisations the brighter one counts, as Hahner et al. (CVPR 2022) have it.

    Args:
      angle: of incidence, from the vertical, radians.
      reflectivity: of the dry ground, in 0..1.
    """
    inside = np.arcsin(np.sin(angle) * _AIR / _WATER)
    outer, inner = np.cos(angle), np.cos(inside)
    results = []
    for first, second in ((_AIR, _WATER), (_WATER, _AIR)):
        amplitude = (first * outer - second * inner) / (first * outer + second * inner)
        reflected = amplitude**2
        results.append((1 - reflected) ** 2 * reflectivity / (1 - reflectivity * reflected))
    return np.maximum(*results)


def _incidence(points: Float[np.ndarray, "points columns"]) -> tuple[np.ndarray, np.ndarray]:
    """Range of points, and cosine of their rays' angle to the vertical of flat ground."""
    ranges = np.maximum(np.linalg.norm(points[:, :3].astype(np.float64), axis=1), 1e-6)
    return ranges, np.clip(-points[:, 2] / ranges, 1e-3, 1.0)


def _road_line(
    points: Float[np.ndarray, "points columns"],
    intensity: Float[np.ndarray, " points"],
    ground: Bool[np.ndarray, " points"],
) -> tuple[float, float] | None:
    """Slope and offset over range of the ground's intensity over its cosine; None for too little ground."""
    if ground.sum() < _FEWEST_GROUND_POINTS:
        return None
    ranges, cosine = _incidence(points[ground])
    slope, offset = np.polyfit(ranges, intensity[ground] / cosine, 1)
    return float(slope), float(offset)


def wet_ground(
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " points"],
    *,
    ground: Bool[np.ndarray, " points"],
    water_height: float,
    noise_floor: float,
    max_intensity: float,
) -> Sweep:
    """A wet road after Hahner et al. (CVPR 2022): the ground's echoes get weaker, and those below the noise vanish.

    The sensor's power over range is a line fitted to the ground's intensities, the noise a share of it, as in Robo3D's
    nuScenes-C (there a fallback). Differs from the authors' code: the light from below the water is not divided by the
    angle of incidence, and Fresnel's equations are those for power. Fewer than 100 ground points: nothing changes.

    Args:
      points: x, y, z, intensity, more columns; z is up, and the ground is flat.
      ground: which points are ground.
      water_height: metres; 0.0012 fills the pavement's profile.
      noise_floor: share of the line below which no echo is seen.
      max_intensity: largest value of the intensities.
    """
    intensity = points[:, 3].astype(np.float64) * (_BYTE / max_intensity)
    line = _road_line(points, intensity, ground)
    if line is None:
        return points.copy(), labels.copy()
    ranges, cosine = _incidence(points[ground])
    usual = np.maximum(line[0] * ranges + line[1], 1e-6)
    power = _POWER_FACTOR * usual
    reflectivity = intensity[ground] / cosine / power
    below_water = wet_transmittance(np.arccos(cosine), np.clip(reflectivity, 0.05, 1.0))
    filled = min(water_height / _PAVEMENT_DEPTH, 1.0)
    wet = power * cosine * ((1 - filled) * reflectivity + filled * below_water)
    wet = np.clip(wet, 0.0, intensity[ground])
    seen = np.ones(len(points), bool)
    seen[ground] = wet > noise_floor * usual * cosine
    points = points.copy()
    points[ground, 3] = wet * (max_intensity / _BYTE)
    return points[seen], labels[seen]


def flakes(snowfall_rate: float, terminal_velocity: float) -> tuple[float, float]:
    """Flakes in a plane (Hahner et al., CVPR 2022): their number per square metre and their mean diameter in metres.

    Diameters are exponentially distributed with the rate of Gunn and Marshall (1958). In a plane a flake is a disk at
    a random height of its ball; the disks cover the share of the area that snow takes of the volume.

    Args:
      snowfall_rate: mm of water per hour.
      terminal_velocity: of the flakes, m/s.
    """
    rain_rate = (snowfall_rate / (487 * _SNOW_DENSITY * 0.003 * terminal_velocity)) ** 1.5
    diameter = 0.01 / (25.5 * rain_rate**-0.48)
    covered = snowfall_rate / (3.6e6 * _SNOW_DENSITY * terminal_velocity)
    # Mean area of a disk: pi * E[D^2] / 6, with E[D^2] = 2 mean^2.
    return covered / (np.pi * diameter**2 / 3), diameter


def snow(
    points: Float32[np.ndarray, "points columns"],
    labels: UInt8[np.ndarray, " points"],
    *,
    ground: Bool[np.ndarray, " points"],
    snowfall_rate: float,
    terminal_velocity: float,
    max_intensity: float,
    unlabelled: int,
    rng: np.random.Generator,
) -> Sweep:
    """Falling snow after Hahner et al. (CVPR 2022): flakes in a beam hide its target, or are the stronger echo.

    A flake at range s that fills a share f of the beam echoes with 0.9 * 255 * f / s^2, the target with what the flakes
    leave of the beam. The stronger one is the point. A target that snow has weakened below the noise vanishes: noise is
    0.7 of the weakest echoes of the road at its range.

    Differs from the authors' code: flakes are drawn for each beam on its own instead of from stored maps of a plane,
    so that neighbouring beams share none; echoes are peaks and do not add up; the calibration of one sensor's channels
    is left out; the weakest echoes are a percentile relative to the fitted line, not the minima of bins of range;
    points that no flake has touched stay.

    Args:
      points: x, y, z, intensity, more columns.
      ground: which points are ground, for the noise; where there are fewer than 100, nothing vanishes.
      snowfall_rate, terminal_velocity: see `flakes`.
      max_intensity: largest value of the intensities.
      unlabelled: label of the flakes.
    """
    points, labels = points.copy(), labels.copy()
    target, cosine = _incidence(points)
    intensity = points[:, 3].astype(np.float64) * (_BYTE / max_intensity)
    line = _road_line(points, intensity, ground)
    density, diameter = flakes(snowfall_rate, terminal_velocity)
    # The beam is a wedge: flakes in it grow in number with the square of the range, and lie mostly far away.
    reach = np.minimum(target, _SNOW_RANGE)
    beam = np.repeat(np.arange(len(points)), rng.poisson(density * _BEAM_DIVERGENCE * reach**2 / 2))
    distance = np.maximum(reach[beam] * np.sqrt(rng.random(len(beam))), 1e-3)
    largest = -np.expm1(-_LARGEST_FLAKE / diameter)
    size = -diameter * np.log1p(-largest * rng.random(len(beam)))
    disk = size * np.sqrt(1 - rng.random(len(beam)) ** 2)
    share = np.minimum(disk / (_BEAM_DIVERGENCE * distance), 1.0)
    hidden = np.minimum(np.bincount(beam, share, len(points)), 1.0)
    echo = _FLAKE_REFLECTIVITY * _BYTE * share * receiver_share(distance) / distance**2
    # The strongest flake of each beam: the last one of its run, sorted by echo.
    order = np.lexsort((echo, beam))
    last = order[np.flatnonzero(np.append(beam[order][1:] != beam[order][:-1], True))] if len(order) else order
    strongest, nearest = np.zeros(len(points)), np.zeros(len(points))
    strongest[beam[last]], nearest[beam[last]] = np.minimum(echo[last], _BYTE), distance[last]
    left = intensity * (1 - hidden)
    flaky = strongest > left
    points[:, :3] *= np.where(flaky, nearest / target, 1.0)[:, None].astype(np.float32)
    points[:, 3] = np.where(flaky, strongest, left) * (max_intensity / _BYTE)
    seen = np.ones(len(points), bool)
    if line is not None:
        usual = np.maximum(line[0] * target[ground] + line[1], 1e-6) * cosine[ground]
        weakest = np.percentile(intensity[ground] / usual, _WEAKEST_PERCENT)
        noise_over_range = np.polyfit(target[ground], _SNOW_NOISE_FLOOR * weakest * usual, 2)
        # Beyond the farthest ground the parabola means nothing.
        noise = np.polyval(noise_over_range, np.minimum(target, target[ground].max()))
        seen = flaky | (hidden == 0) | (left > noise)
    labels[flaky] = unlabelled
    return points[seen], labels[seen]
