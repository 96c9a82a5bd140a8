"""Fog, snow and wet ground: what the formulas say, and what no weather may do to a sweep."""

import itertools

import numpy as np
import pytest
from scipy.constants import speed_of_light
from scipy.integrate import quad

from pop3d_jax import weather

UNLABELLED = 255


def sweep(count=4000, seed=0, height=1.8):
    """Rays of even elevations: the ground where they meet it within 60 m, else a wall at 60 m. Column 4 is beam."""
    rng = np.random.default_rng(seed)
    azimuth, beam = rng.uniform(-np.pi, np.pi, count), rng.integers(0, 32, count)
    elevation = np.radians(-30 + 40 * beam / 31)
    distance = np.where(elevation < 0, np.minimum(height / np.sin(np.maximum(-elevation, 1e-3)), 60.0), 60.0)
    direction = [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    xyz = np.stack(direction, 1) * distance[:, None]
    ground = (elevation < 0) & (distance < 59)
    intensity = np.where(ground, 60 * np.sin(np.abs(elevation)), 20) * rng.uniform(0.5, 1.5, count)
    points = np.concatenate([xyz, intensity[:, None], beam[:, None]], 1).astype(np.float32)
    return points, np.where(ground, 10, 14).astype(np.uint8), ground


def assert_on_their_rays(before, after):
    """Ranges may only shrink, directions not change."""
    old, new = (np.linalg.norm(points[:, :3].astype(float), axis=1) for points in (before, after))
    assert np.all(new <= old * (1 + 1e-6))
    assert np.all(new > 0)
    cosine = np.sum(before[:, :3].astype(float) * after[:, :3], 1) / (old * new)
    np.testing.assert_allclose(cosine, 1.0, atol=1e-6)


def echo_integral(target, attenuation):
    def received(time):
        place = target - speed_of_light * time / 2
        share = np.clip((place - 0.9) / 0.1, 0, 1)
        return np.sin(np.pi * time / 40e-9) ** 2 * share * np.exp(-2 * attenuation * place) / max(place, 1e-3) ** 2

    seen_from = [2 * (target - place) / speed_of_light for place in (1.0, 0.9)]
    return quad(received, 0, 40e-9, points=[t for t in seen_from if 0 < t < 40e-9], limit=200, epsabs=0)[0]


@pytest.mark.parametrize("attenuation", [0.0, 0.06])
def test_the_echo_of_fog_is_the_largest_integral_before_the_target(attenuation):
    distances, integrals = weather.fog_echo(attenuation)
    targets = np.arange(20, 81) / 10
    exact = np.array([echo_integral(target, attenuation) for target in targets])
    np.testing.assert_allclose(integrals[20:81], np.maximum.accumulate(exact), rtol=1e-3)
    peak = targets[np.argmax(exact)]
    assert abs(distances[-1] - (peak - speed_of_light * 10e-9)) < 0.15
    assert np.all(np.diff(integrals) >= 0)


def run_fog(backscatter, attenuation=0.03, seed=1, scale=1.0):
    points, labels, _ = sweep()
    points[:, 3] *= scale / 255
    rng = np.random.default_rng(seed)
    settings = {"max_intensity": scale, "unlabelled": UNLABELLED, "rng": rng}
    return points, labels, *weather.fog(points, labels, attenuation=attenuation, backscatter=backscatter, **settings)


def test_thicker_fog_takes_more_points_and_all_stay_on_their_rays():
    foggy = []
    for backscatter in (0.008, 0.05, 0.2):
        points, labels, found, found_labels = run_fog(backscatter, scale=255.0)
        assert_on_their_rays(points, found)
        moved = found_labels == UNLABELLED
        foggy.append(moved.sum())
        np.testing.assert_array_equal(found[~moved, :3], points[~moved, :3])
        np.testing.assert_array_equal(found_labels[~moved], labels[~moved])
        assert np.all(found[~moved, 3] <= points[~moved, 3])
        assert np.linalg.norm(found[moved, :3], axis=1).max() < 12  # fog is heard from near by
        assert found[:, 3].min() >= 0
        assert found[:, 3].max() <= 255
        np.testing.assert_array_equal(found[:, 4], points[:, 4])
    assert 0 < foggy[0] < foggy[1] < foggy[2]


def test_targets_fade_with_twice_the_way_and_clear_air_changes_nothing():
    points, _, found, found_labels = run_fog(1e-9, attenuation=0.005, scale=255.0)
    distance = np.linalg.norm(points[:, :3], axis=1)
    expected = points[:, 3] * np.exp(-0.01 * distance)
    np.testing.assert_allclose(found[:, 3], expected, atol=0.51)  # rounded to whole steps
    assert not np.any(found_labels == UNLABELLED)


def test_fog_is_the_same_whatever_the_unit_of_intensities():
    _, _, bytes_, byte_labels = run_fog(0.05, scale=255.0)
    _, _, shares, share_labels = run_fog(0.05, scale=1.0)
    assert np.mean(byte_labels == share_labels) > 0.999  # rounding may turn a point
    same = byte_labels == share_labels
    np.testing.assert_allclose(shares[same, 3] * 255, bytes_[same, 3], atol=1.01)
    assert shares[:, 3].max() <= 1.0


def test_water_takes_light_by_fresnel():
    vertical = weather.wet_transmittance(np.array([0.0]), np.array([0.1]))[0]
    reflected = ((1.33 - 1.0003) / (1.33 + 1.0003)) ** 2
    np.testing.assert_allclose(vertical, (1 - reflected) ** 2 * 0.1 / (1 - 0.1 * reflected), rtol=1e-12)
    angles = np.radians([0, 30, 60, 80, 89])
    transmitted = weather.wet_transmittance(angles, np.full(5, 0.1))
    assert np.all(transmitted < 0.1)
    brewster = weather.wet_transmittance(np.array([np.arctan(1.33 / 1.0003)]), np.array([0.1]))[0]
    np.testing.assert_allclose(brewster, 0.1, rtol=1e-12)  # one polarisation enters and leaves whole
    assert transmitted[-1] < 0.5 * transmitted[-2] < transmitted[0]


def test_a_wetter_road_is_darker_and_loses_more_points_and_nothing_else_changes():
    points, labels, ground = sweep()
    lost = []
    for height, noise in ((0.0002, 0.2), (0.001, 0.3), (0.0012, 0.7)):
        found, found_labels = weather.wet_ground(
            points, labels, ground=ground, water_height=height, noise_floor=noise, max_intensity=255.0
        )
        lost.append(len(points) - len(found))
        np.testing.assert_array_equal(found[found_labels == 14], points[~ground])
        kept = {tuple(point): intensity for point, intensity in zip(points[:, :3], points[:, 3], strict=True)}
        assert all(kept[tuple(point[:3])] >= point[3] >= 0 for point in found)
    assert lost[0] <= lost[1] < lost[2] < ground.sum()


def test_too_little_ground_stays_dry():
    points, labels, ground = sweep()
    ground[np.flatnonzero(ground)[99:]] = False
    settings = {"water_height": 0.0012, "noise_floor": 0.7, "max_intensity": 255.0}
    found, found_labels = weather.wet_ground(points, labels, ground=ground, **settings)
    np.testing.assert_array_equal(found, points)
    np.testing.assert_array_equal(found_labels, labels)


def test_flakes_cover_the_area_that_falls():
    for rate, velocity in ((0.5, 2.0), (1.0, 1.6), (2.5, 1.6)):
        density, diameter = weather.flakes(rate, velocity)
        rng = np.random.default_rng(0)
        balls = rng.exponential(diameter, 400_000)
        disks = np.pi * ((balls / 2) ** 2 - (balls * rng.uniform(-0.5, 0.5, len(balls))) ** 2)
        np.testing.assert_allclose(density * disks.mean(), rate / (3.6e6 * 0.1 * velocity), rtol=2e-2)


def run_snow(rate, velocity, seed=1):
    points, labels, ground = sweep()
    settings = {"max_intensity": 255.0, "unlabelled": UNLABELLED, "rng": np.random.default_rng(seed)}
    points[:, 4] = np.arange(len(points))  # to know them again
    found, found_labels = weather.snow(
        points, labels, ground=ground, snowfall_rate=rate, terminal_velocity=velocity, **settings
    )
    return points[found[:, 4].astype(int)], labels[found[:, 4].astype(int)], found, found_labels


def test_more_snow_makes_more_flakes_and_hides_more_and_all_stay_on_their_rays():
    counts = np.zeros((3, 3))  # severities; flakes, lost points, dimming
    for severity, seed in itertools.product(range(3), range(5)):
        rate, velocity = ((0.5, 2.0), (1.0, 1.6), (2.5, 1.6))[severity]
        points, labels, found, found_labels = run_snow(rate, velocity, seed)
        assert_on_their_rays(points, found)
        moved = found_labels == UNLABELLED
        counts[severity] += moved.sum(), 4000 - len(points), np.mean(points[~moved, 3] - found[~moved, 3])
        np.testing.assert_array_equal(found[~moved, :3], points[~moved, :3])
        np.testing.assert_array_equal(found_labels[~moved], labels[~moved])
        assert found[:, 3].min() >= 0
        assert found[:, 3].max() <= 255
    flaky, lost, dimmed = counts.T
    assert 0 < flaky[0] < flaky[1] < flaky[2]
    assert 0 < lost[0] < lost[2]
    assert np.all(np.diff(flaky + lost) > 0)
    assert 0 < dimmed[0] < dimmed[1] < dimmed[2]


def test_without_ground_snow_hides_no_point():
    points, labels, ground = sweep()
    settings = {"max_intensity": 255.0, "unlabelled": UNLABELLED, "rng": np.random.default_rng(0)}
    found, _ = weather.snow(
        points, labels, ground=np.zeros_like(ground), snowfall_rate=2.5, terminal_velocity=1.6, **settings
    )
    assert len(found) == len(points)
