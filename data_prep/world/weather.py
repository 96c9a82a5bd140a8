"""Sun, sky and haze of a scene."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Weather:
    """Light of a scene; colours are linear factors or 0..255 values.

    `sun` is the unit vector towards the sun; `sun_light` and `sky_light` scale the lit surface's colour; `zenith` and
    `horizon` are the sky's colours; `clouds` 0..1; `haze` is the share of the horizon's colour gained per metre.
    """

    name: str
    sun: Float[np.ndarray, "3"]
    sun_light: Float[np.ndarray, "3"]
    sky_light: Float[np.ndarray, "3"]
    zenith: Float[np.ndarray, "3"]
    horizon: Float[np.ndarray, "3"]
    clouds: float
    haze: float
    cloud_shift: Float[np.ndarray, "2"]


# name, sun light, sky light, zenith, horizon, clouds, sun elevation range in degrees
_KINDS = (
    ("clear", (0.78, 0.74, 0.66), (0.45, 0.48, 0.54), (82, 136, 208), (190, 212, 232), 0.25, (32, 65)),
    ("cloudy", (0.60, 0.58, 0.54), (0.52, 0.54, 0.57), (122, 160, 206), (206, 214, 222), 0.8, (30, 60)),
    ("overcast", (0.0, 0.0, 0.0), (0.86, 0.88, 0.92), (176, 184, 194), (214, 217, 220), 0.5, (40, 60)),
    ("evening", (0.90, 0.70, 0.48), (0.52, 0.52, 0.58), (104, 126, 182), (246, 206, 164), 0.4, (14, 26)),
)


def draw_weather(rng: np.random.Generator) -> Weather:
    """One of four kinds of day, with its sun somewhere in the kind's range of elevation."""
    name, sun_light, sky_light, zenith, horizon, clouds, elevation = _KINDS[
        rng.choice(len(_KINDS), p=[0.4, 0.25, 0.2, 0.15])
    ]
    azimuth, elevation = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(*elevation))
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    gain = rng.uniform(0.9, 1.08)
    return Weather(
        name,
        sun,
        gain * np.array(sun_light),
        gain * np.array(sky_light),
        np.array(zenith, float),
        np.array(horizon, float),
        clouds,
        rng.uniform(0.0008, 0.0025),
        rng.uniform(0, 256, 2),
    )
