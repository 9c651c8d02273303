"""Rendered images of the phantom clinic: one kind per specialty, one visible finding each.

Every renderer takes a finding's index and a generator and returns uint8 ``[112, 112, 3]``. Position, side,
size, contrast and noise vary; only the finding carries information.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SIZE = 112
Plane = NDArray[np.float64]
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)


def _ellipse(
    cx: float, cy: float, rx: float, ry: float, soft: float = 1.5, angle: float = 0.0
) -> Plane:
    """A filled ellipse with a soft edge, in [0, 1]; radii and softness in pixels."""
    dx, dy = _X - cx, _Y - cy
    c, s = np.cos(angle), np.sin(angle)
    u, v = (c * dx + s * dy) / rx, (-s * dx + c * dy) / ry
    distance = (np.sqrt(u * u + v * v) - 1.0) * min(rx, ry)
    return 1.0 / (1.0 + np.exp(np.clip(distance / soft, -40, 40)))


def _ring(cx: float, cy: float, r: float, width: float) -> Plane:
    distance = np.abs(np.hypot(_X - cx, _Y - cy) - r)
    return np.exp(-((distance / width) ** 2))


def _box(x0: float, x1: float, y0: float, y1: float, soft: float = 1.5) -> Plane:
    def edge(z: Plane) -> Plane:
        return 1.0 / (1.0 + np.exp(np.clip(-z / soft, -40, 40)))

    return edge(_X - x0) * edge(x1 - _X) * edge(_Y - y0) * edge(y1 - _Y)


def _grain(rng: np.random.Generator, amount: float) -> Plane:
    coarse = rng.normal(0, amount, (SIZE // 4, SIZE // 4)).repeat(4, 0).repeat(4, 1)
    return coarse + rng.normal(0, amount, (SIZE, SIZE))


def _grey(plane: Plane, rng: np.random.Generator) -> NDArray[np.uint8]:
    plane = plane * rng.uniform(0.9, 1.1) + rng.uniform(-0.03, 0.03) + _grain(rng, 0.02)
    grey = np.clip(plane * 255, 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def chest_film(finding: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Frontal film: opacity, blunted angle, enlarged heart, or apical cavity."""
    side = rng.choice([-1, 1])
    shift = rng.uniform(-3, 3)
    lung_x = {s: 56 + s * 24 + shift for s in (-1, 1)}
    film = 0.55 * _ellipse(56 + shift, 60, 52, 54)
    for s in (-1, 1):
        film -= 0.42 * _ellipse(lung_x[s], 54, 18, 38)
    width = 27 if finding == 2 else 12
    film += 0.38 * _ellipse(60 + shift, 72, width + rng.uniform(-1, 2), 16)
    x = lung_x[side]
    if finding == 0:
        film += 0.5 * _ellipse(x + rng.uniform(-3, 3), rng.uniform(46, 66), 11, 12, soft=3)
    elif finding == 1:
        film += 0.5 * _box(x - 19, x + 19, rng.uniform(72, 77), 96, soft=2)
    elif finding == 3:
        film += 0.6 * _ring(x + rng.uniform(-2, 2), rng.uniform(26, 32), 7, 2.2)
    return _grey(film, rng)


def growth_plate(finding: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Long bone of a child: wide plate, frayed metaphysis, periosteal line, or buckled cortex."""
    cx = 56 + rng.uniform(-6, 6)
    plate = rng.uniform(74, 80)
    gap = 9.0 if finding == 0 else 2.5
    film = 0.25 * _ellipse(56, 60, 44, 70)
    film += 0.5 * _box(cx - 13, cx + 13, -5, plate - gap)
    film += 0.5 * _box(cx - 16, cx + 16, plate - 14, plate - gap)
    film += 0.5 * _ellipse(cx, plate + gap + 13, 20, 12)
    film -= 0.18 * _box(cx - 7, cx + 7, -5, plate - 22)
    side = rng.choice([-1, 1])
    if finding == 1:
        for x in map(float, np.arange(cx - 20, cx + 21, 5.0)):
            film -= 0.55 * _ellipse(x + rng.uniform(-1, 1), plate - gap - 6, 1.6, 8)
    elif finding == 2:
        x = cx + side * 21
        film += 0.6 * _box(x - 1.6, x + 1.6, 12, plate - 18, soft=0.8)
    elif finding == 3:
        film += 0.55 * _ellipse(cx + side * 15, rng.uniform(34, 50), 8, 7)
    return _grey(film, rng)


def axial_brain(finding: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Axial slice: bright crescent, dark wedge, wide ventricles, or ring lesion."""
    side = rng.choice([-1, 1])
    cx, cy = 56 + rng.uniform(-2, 2), 56 + rng.uniform(-2, 2)
    skull, brain = _ellipse(cx, cy, 44, 52), _ellipse(cx, cy, 39, 47)
    scan = 0.9 * (skull - brain) + 0.42 * brain
    ventricle = 13 if finding == 2 else 5
    for s in (-1, 1):
        scan -= 0.3 * _ellipse(cx + s * (3 + ventricle * 0.7), cy - 2, ventricle, ventricle * 1.7)
    x, y = cx + side * 21, cy + rng.uniform(-14, 14)
    if finding == 0:
        crescent = brain * (1 - _ellipse(cx - side * 9, cy, 39, 47))
        scan += 0.45 * crescent
    elif finding == 1:
        wedge = (np.abs(_Y - y) < np.abs(_X - cx) * 0.55) & ((_X - cx) * side > 8)
        scan -= 0.3 * wedge * brain
    elif finding == 3:
        scan += 0.5 * _ring(x, y, 9, 2.4) - 0.2 * _ellipse(x, y, 6, 6)
    return _grey(scan, rng)


def skin_lesion(finding: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Clinical photograph: dark patch, pearly nodule, scaly plaque, or crusted ulcer."""
    tone = np.array([0.86, 0.68, 0.56]) * rng.uniform(0.88, 1.08)
    photo = np.ones((SIZE, SIZE, 3)) * tone
    cx, cy = 56 + rng.uniform(-10, 10), 56 + rng.uniform(-10, 10)

    def paint(mask: Plane, colour: tuple[float, float, float]) -> None:
        photo[:] = photo * (1 - mask[:, :, None]) + np.array(colour) * mask[:, :, None]

    if finding == 0:
        for _ in range(4):
            dx, dy = rng.uniform(-13, 13, 2)
            paint(
                0.9 * _ellipse(cx + dx, cy + dy, 13, 9, angle=rng.uniform(0, 3)), (0.18, 0.1, 0.08)
            )
    elif finding == 1:
        paint(0.9 * _ellipse(cx, cy, 21, 19, soft=4), (0.97, 0.86, 0.85))
        paint(_ellipse(cx - 7, cy - 7, 4, 4), (1.0, 1.0, 1.0))
    elif finding == 2:
        paint(0.8 * _ellipse(cx, cy, 27, 23, soft=2), (0.82, 0.36, 0.36))
        for _ in range(26):
            dx, dy = rng.uniform(-18, 18, 2)
            paint(
                0.85 * _box(cx + dx - 3, cx + dx + 3, cy + dy - 1.5, cy + dy + 1.5, 0.6),
                (0.96, 0.94, 0.9),
            )
    else:
        paint(0.95 * _ellipse(cx, cy, 22, 22), (0.78, 0.6, 0.2))
        paint(0.95 * _ellipse(cx, cy, 13, 13), (0.5, 0.05, 0.08))
    photo += _grain(rng, 0.015)[:, :, None]
    return np.clip(photo * 255, 0, 255).astype(np.uint8)


RENDERERS: dict[str, Callable[[int, np.random.Generator], NDArray[np.uint8]]] = {
    "adult_medicine": chest_film,
    "pediatrics": growth_plate,
    "brain_senses": axial_brain,
    "oncology_surgery": skin_lesion,
}
