"""How things move: standing still, along a lane, or along a path; and which ones would collide."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from data_prep.world.ground import Road


@dataclass(frozen=True)
class Standing:
    """A thing that stays at x, y (metres) with its front towards `yaw` (radians)."""

    x: float
    y: float
    yaw: float
    speed: float = 0.0

    def poses(self, times: Float[np.ndarray, " times"]) -> Float[np.ndarray, "times 3"]:
        """(x, y, yaw) at times in seconds."""
        return np.tile([self.x, self.y, self.yaw], (len(times), 1))


@dataclass(frozen=True)
class AlongLane:
    """A thing that keeps its lateral place on a road; `direction` +1 or -1 along it, `speed` in m/s."""

    road: Road
    start: float
    lateral: float
    direction: int
    speed: float

    def poses(self, times: Float[np.ndarray, " times"]) -> Float[np.ndarray, "times 3"]:
        """(x, y, yaw) at times in seconds."""
        along = self.start + self.direction * self.speed * times
        x, y, heading = self.road.position(along, np.full(len(times), self.lateral))
        return np.stack([x, y, heading + (np.pi if self.direction < 0 else 0.0)], 1)


class AlongPath:
    """A thing that follows a polyline, `start` metres from its beginning at time 0, at `speed` m/s."""

    def __init__(self, points: Float[np.ndarray, "points 2"], start: float, speed: float):
        self._points = points
        steps = np.hypot(*np.diff(points, axis=0).T)
        self._length = np.concatenate([[0.0], np.cumsum(steps)])
        tangent = np.gradient(points, axis=0)
        self._yaw = np.unwrap(np.arctan2(tangent[:, 1], tangent[:, 0]))
        self._start, self.speed = start, speed

    def poses(self, times: Float[np.ndarray, " times"]) -> Float[np.ndarray, "times 3"]:
        """(x, y, yaw) at times in seconds."""
        s = self._start + self.speed * times
        columns = (self._points[:, 0], self._points[:, 1], self._yaw)
        return np.stack([np.interp(s, self._length, column) for column in columns], 1)


Motion = Standing | AlongLane | AlongPath


def _to_frame(points: Float[np.ndarray, "... 2"], poses: Float[np.ndarray, "... 3"]) -> Float[np.ndarray, "... 2"]:
    c, s = np.cos(poses[..., 2]), np.sin(poses[..., 2])
    d = points - poses[..., :2]
    return np.stack([c * d[..., 0] + s * d[..., 1], c * d[..., 1] - s * d[..., 0]], -1)


def _grid(half: tuple[float, float], spacing: float) -> Float[np.ndarray, "probes 2"]:
    axes = [np.linspace(-h, h, max(2, int(np.ceil(2 * h / spacing)) + 1)) for h in half]
    return np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)


class Footprints:
    """The rectangles that accepted things cover at a few times, to refuse things that would overlap them."""

    def __init__(self, times: Float[np.ndarray, " times"]):
        self.times = times
        self._poses = np.zeros((0, len(times), 3))
        self._half = np.zeros((0, 2))

    def free(self, motion: Motion, half: tuple[float, float], margin: float) -> bool:
        """Whether a thing with half length and half width `half` keeps `margin` metres from all accepted ones."""
        if not len(self._half):
            return True
        poses = motion.poses(self.times)
        reach = np.hypot(*half) + np.hypot(*self._half.T) + margin
        gap = np.hypot(*np.moveaxis(self._poses[..., :2] - poses[None, :, :2], -1, 0))
        near = (gap < reach[:, None]).any(1)
        if not near.any():
            return True
        return not self._overlaps(poses, half, self._poses[near], self._half[near], margin).any()

    def _overlaps(
        self,
        poses: Float[np.ndarray, "times 3"],
        half: tuple[float, float],
        others: Float[np.ndarray, "n times 3"],
        other_half: Float[np.ndarray, "n 2"],
        margin: float,
    ) -> Bool[np.ndarray, " n"]:
        # Points of the new rectangle in the others' frames, then the others' corners in the new one's frame.
        probes = _grid(half, 0.8)
        c, s = np.cos(poses[:, 2:]), np.sin(poses[:, 2:])
        world = np.stack(
            [poses[:, :1] + c * probes[:, 0] - s * probes[:, 1], poses[:, 1:2] + s * probes[:, 0] + c * probes[:, 1]],
            -1,
        )
        local = np.abs(_to_frame(world[None], others[:, :, None]))
        inside = (local < other_half[:, None, None] + margin).all(-1).any((1, 2))
        signs = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1), (0, 0)])
        corners = signs * other_half[:, None]
        c, s = np.cos(others[..., 2:]), np.sin(others[..., 2:])
        world = np.stack(
            [
                others[..., :1] + c * corners[:, None, :, 0] - s * corners[:, None, :, 1],
                others[..., 1:2] + s * corners[:, None, :, 0] + c * corners[:, None, :, 1],
            ],
            -1,
        )
        local = np.abs(_to_frame(world, poses[None, :, None]))
        return inside | (local < np.array(half) + margin).all(-1).any((1, 2))

    def add(self, motion: Motion, half: tuple[float, float]) -> None:
        """Takes the room of a thing with half length and half width `half`, metres."""
        self._poses = np.concatenate([self._poses, motion.poses(self.times)[None]])
        self._half = np.concatenate([self._half, [half]])
