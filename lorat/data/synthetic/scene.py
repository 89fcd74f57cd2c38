"""Synthetic scenes: a textured background, a target, its likes, and bars in front."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

WIDTH, HEIGHT = 320, 240
_POINTS = 48


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How hard a video is to track."""

    speeds: tuple[float, float]
    """Slowest and fastest mean speed of a thing, in sides per frame."""
    clutter: tuple[int, int]
    """Fewest things painted on the background, and most plus one."""
    likes: tuple[int, int]
    """Fewest moving things of the target's kind, and most plus one."""


GENTLE = Pace(speeds=(0.01, 0.07), clutter=(1, 5), likes=(1, 3))
BRISK = Pace(speeds=(0.03, 0.14), clutter=(4, 10), likes=(1, 4))


class _Thing:
    """A textured outline on a path through the frame."""

    def __init__(
        self,
        rng: np.random.Generator,
        kind: int,
        palette: np.ndarray,
        side: float,
        speeds: tuple[float, float],
    ) -> None:
        self.texture = _texture(rng, kind, palette, 128)
        self.side = side
        angles = np.arange(_POINTS) * 2 * np.pi / _POINTS
        corners = kind % 4 + 2  # 2 is nearly an ellipse, 5 a star
        self._angles = angles
        self._radius = 1 + (0.05 + 0.08 * (corners > 2)) * np.cos(corners * angles)
        self._wobble = rng.uniform(0.03, 0.09, 3)
        self._wobble_phase = rng.uniform(0, 2 * np.pi, 3)
        self._wobble_speed = rng.uniform(-0.25, 0.25, 3)
        self._aspect = np.exp(rng.uniform(-0.25, 0.25))
        self._turn = rng.uniform(0, 2 * np.pi)
        self._turn_speed = rng.normal(0, 0.04)
        self._growth_phase, self._growth_speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.12)
        self._growth = rng.uniform(0.1, 0.35)
        self._gain_phase, self._gain_speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.02, 0.1)
        margin = 0.6 * side
        self._low = np.array([margin, margin])
        self._high = np.array([WIDTH - margin, HEIGHT - margin])
        self._position = rng.uniform(self._low, self._high)
        heading = rng.uniform(0, 2 * np.pi)
        self._speed = side * rng.uniform(*speeds)
        self._velocity = self._speed * np.array([np.cos(heading), np.sin(heading)])
        self._rng = rng

    def step(self) -> None:
        """Advance by one frame: a wandering heading, reflected at the borders."""
        heading = np.arctan2(self._velocity[1], self._velocity[0]) + self._rng.normal(0, 0.25)
        speed = self._speed * np.exp(self._rng.normal(0, 0.3))
        speed = min(speed, 0.4 * self.side)
        self._velocity = speed * np.array([np.cos(heading), np.sin(heading)])
        self._position = self._position + self._velocity
        outside = (self._position < self._low) | (self._position > self._high)
        inward = np.where(self._position < self._low, 1, -1)
        self._velocity = np.where(outside, inward * np.abs(self._velocity), self._velocity)
        self._position = np.clip(self._position, self._low, self._high)

    def outline(self, t: int) -> np.ndarray:
        """Return the outline (points, 2) in frame pixels."""
        radius = self._radius.copy()
        for k in range(3):
            phase = self._wobble_phase[k] + self._wobble_speed[k] * t
            radius += self._wobble[k] * np.cos((k + 2) * self._angles + phase)
        points = np.stack(
            [radius * np.cos(self._angles) * self._aspect, radius * np.sin(self._angles)], axis=1
        )
        return points @ self._rotation(t).T * (self._scale(t) / 2) + self._position

    def draw(self, canvas: np.ndarray, owner: np.ndarray, label: int, t: int) -> np.ndarray:
        """Draw on the canvas, claim pixels in ``owner``, and return the outline."""
        outline = self.outline(t)
        x1, y1 = np.maximum(np.floor(outline.min(axis=0)).astype(int) - 1, 0)
        x2, y2 = np.ceil(outline.max(axis=0)).astype(int) + 2
        x2, y2 = min(int(x2), WIDTH), min(int(y2), HEIGHT)
        if x1 >= x2 or y1 >= y2:
            return outline
        mask = np.zeros((y2 - y1, x2 - x1), np.uint8)
        fixed_point = np.round((outline - [x1, y1]) * 16).astype(np.int32)
        cv2.fillPoly(mask, [fixed_point], 255, cv2.LINE_AA, 4)
        centre = self.texture.shape[0] / 2
        to_frame = self._rotation(t) * (self._scale(t) / (0.85 * self.texture.shape[0]))
        offset = self._position - [x1, y1] - to_frame @ [centre, centre]
        matrix = np.concatenate([to_frame, offset[:, None]], axis=1)
        skin = cv2.warpAffine(
            self.texture, matrix, (x2 - x1, y2 - y1), borderMode=cv2.BORDER_REFLECT
        )
        gain = 1 + 0.15 * np.sin(self._gain_phase + self._gain_speed * t)
        region = canvas[y1:y2, x1:x2]
        alpha = mask[..., None].astype(np.float32) / 255
        region[:] = np.clip(region * (1 - alpha) + skin * (alpha * gain), 0, 255)
        owner[y1:y2, x1:x2][mask > 127] = label
        return outline

    def _rotation(self, t: int) -> np.ndarray:
        angle = self._turn + self._turn_speed * t
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def _scale(self, t: int) -> float:
        grown = self._growth * np.sin(self._growth_phase + self._growth_speed * t)
        return float(np.clip(self.side * np.exp(grown), 26, 80))


class Scene:
    """Everything of one video; frames must be drawn in order.

    Args:
        rng: all randomness of the video.
        pace: how hard the video is.
    """

    def __init__(self, rng: np.random.Generator, pace: Pace):
        speeds = pace.speeds
        self._rng = rng
        self._background = _texture(rng, int(rng.integers(8)), _palette(rng), 440)
        kind, palette = int(rng.integers(8)), _palette(rng)
        clutter_owner = np.zeros((HEIGHT, WIDTH), np.uint8)
        for _ in range(int(rng.integers(*pace.clutter))):
            thing = _Thing(rng, int(rng.integers(8)), _palette(rng), rng.uniform(20, 60), speeds)
            thing.draw(self._background[100 : 100 + HEIGHT, 80 : 80 + WIDTH], clutter_owner, 1, 0)
        self._target = _Thing(rng, kind, palette, rng.uniform(34, 66), speeds)
        self._others = [
            _Thing(
                rng, kind, np.clip(palette + rng.normal(0, 60, (3, 3)), 0, 255).astype(np.float32),
                self._target.side * rng.uniform(0.8, 1.25), speeds,
            )
            for _ in range(int(rng.integers(*pace.likes)))
        ]  # fmt: skip
        self._num_behind = int(rng.integers(0, len(self._others) + 1))
        self._bars = [_Bar(rng) for _ in range(int(rng.integers(0, 3)))]
        self._pan_phase, self._pan_speed = rng.uniform(0, 6.28, 2), rng.uniform(0.02, 0.1, 2)
        self._zoom_phase = rng.uniform(0, 6.28)
        self._noise = rng.normal(0, rng.uniform(1, 6), (HEIGHT * 2, WIDTH * 2, 1)).astype(
            np.float32
        )
        self._next = 0

    def frame(self, t: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Draw frame t: image, box of the target, visible share."""
        if t > 0:
            for thing in (self._target, *self._others):
                thing.step()
        zoom = 1 + 0.12 * np.sin(self._zoom_phase + 0.05 * t)
        shift = -80 + 60 * np.sin(self._pan_phase + self._pan_speed * t) - 40 * (zoom - 1)
        matrix = np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
        canvas = cv2.warpAffine(
            self._background, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT
        ).astype(np.float32)
        owner = np.zeros((HEIGHT, WIDTH), np.uint8)
        behind, before = self._others[: self._num_behind], self._others[self._num_behind :]
        for thing in behind:
            thing.draw(canvas, owner, 2, t)
        outline = self._target.draw(canvas, owner, 1, t)
        full = int((owner == 1).sum())
        for thing in before:
            thing.draw(canvas, owner, 2, t)
        for bar in self._bars:
            bar.draw(canvas, owner, t)
        visible = int((owner == 1).sum()) / full if full else 0.0
        dy, dx = self._rng.integers(0, (HEIGHT, WIDTH))
        canvas += self._noise[dy : dy + HEIGHT, dx : dx + WIDTH]
        low, high = outline.min(axis=0), outline.max(axis=0)
        box = np.clip([*low, *high], 0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
        return np.clip(canvas, 0, 255).astype(np.uint8), box, visible


class _Bar:
    """A textured bar that sweeps across the frame once, in front of everything."""

    def __init__(self, rng: np.random.Generator):
        self._texture = _texture(rng, int(rng.integers(8)), _palette(rng), HEIGHT)
        self._width = int(rng.integers(12, 30))
        self._start = float(rng.uniform(-260, -30))
        self._speed = float(rng.uniform(4, 12))

    def draw(self, canvas: np.ndarray, owner: np.ndarray, t: int) -> None:
        """Draw the bar at time t."""
        x1 = int(self._start + self._speed * t)
        x2 = min(x1 + self._width, WIDTH)
        x1 = max(x1, 0)
        if x1 < x2:
            canvas[:, x1:x2] = self._texture[:, : x2 - x1]
            owner[:, x1:x2] = 3


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Draw three colours (3, 3)."""
    return rng.uniform(20, 235, (3, 3)).astype(np.float32)


def _texture(rng: np.random.Generator, kind: int, palette: np.ndarray, side: int) -> np.ndarray:
    """Paint a square texture of a kind (0 to 7) in a palette: noise, stripes, dots or checks."""
    ys, xs = np.mgrid[0:side, 0:side].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(14, 40)
    cos, sin = (np.float32(f(angle) * 2 * np.pi / period) for f in (np.cos, np.sin))
    value = np.zeros_like(xs)
    if kind % 4 >= 1:
        value = np.sin(xs * cos + ys * sin)
    if kind % 4 >= 2:
        value *= np.sin(ys * cos - xs * sin)
    value = np.float32(0.6) * (np.sign(value) if kind % 4 == 3 else value)
    for cells, weight in ((3, np.float32(0.7)), (7, np.float32(0.5)), (20, np.float32(0.35))):
        coarse = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        value += cv2.resize(coarse * weight, (side, side), interpolation=cv2.INTER_CUBIC)
    mix = np.clip(value / 2 + np.float32(0.5), 0, 1)[..., None]
    coarse = rng.normal(0, 1, (4, 4)).astype(np.float32)
    second = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)[..., None]
    first = palette[0] * (1 - mix) + palette[1] * mix
    share = np.float32(0.6) * (second > 0.4)
    return (first + share * (palette[2] - first)).astype(np.uint8)
