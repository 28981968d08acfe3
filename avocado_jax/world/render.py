"""Render a script: anti-aliased shapes on a patterned background, with camera moves."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from avocado_jax.world.font import draw_text
from avocado_jax.world.script import LEVELS, Event, Script
from avocado_jax.world.vocabulary import IMPACT, PLACES, SIZES

INK = {
    "red": (222, 38, 38),
    "blue": (38, 88, 235),
    "green": (36, 165, 66),
    "yellow": (250, 218, 30),
    "orange": (250, 135, 20),
    "purple": (140, 50, 190),
    "pink": (255, 140, 195),
    "brown": (120, 70, 35),
}
GROUND = {
    "white": (250, 250, 250),
    "gray": (150, 152, 156),
    "black": (18, 18, 20),
    "cream": (250, 238, 205),
    "navy": (16, 26, 84),
}
GROWTH = {"grow": 1.55, "shrink": 0.6}  # factor of the radius in a "resize" event
_OUTSIDE = {"left": (-0.2, None), "right": (1.2, None), "top": (None, -0.2), "bottom": (None, 1.2)}


class Pose(NamedTuple):
    """The state of a shape: center as a share of the frame, radius as a share of its height, angle in radians."""

    x: float
    y: float
    radius: float
    angle: float
    color: str
    mouth: float  # how far the mouth is open, 0..1; below 0: no mouth


class View(NamedTuple):
    """The view of the camera: center as a share of the frame, and magnification."""

    x: float = 0.5
    y: float = 0.5
    zoom: float = 1.0


def frame_times(script: Script, fps: float) -> np.ndarray:
    """The times of the frames of a clip at `fps` in seconds, float64 [T], from 0."""
    return np.arange(int(script.duration * fps + 1e-6)) / fps


def render(script: Script, times: Iterable[float] | None = None) -> Iterator[np.ndarray]:
    """Yield the frames at the given times, uint8 [H, W, 3]; `times` None: all frames of the clip.

    Frames are rendered lazily. A frame depends only on its time.
    """
    level = LEVELS[script.level]
    height, width = level.size
    acts = [[e for e in _parts(script) if k in (e.actor, e.other)] for k in range(len(script.actors))]
    for t in frame_times(script, level.fps) if times is None else times:
        scene = next((s for s in reversed(script.scenes) if s.start <= t), script.scenes[0])
        view = _view(script, t)
        frame = _ground(scene.backdrop, scene.pattern, height, width, view).copy()
        outline = (20, 20, 20) if sum(GROUND[scene.backdrop]) > 360 else (255, 255, 255)
        for k, actor in enumerate(script.actors):
            pose = _pose(script, k, acts[k], t) if script.scenes[actor.scene] == scene else None
            if pose:
                _draw(frame, pose, SHAPE_DISTANCES[actor.shape], outline, view)
        for event in script.events:
            if event.kind == "text" and event.start <= t < event.end:
                draw_text(frame, event.get("word"), 0.09 if event.get("where") == "top" else 0.91)
        yield frame


def _parts(script: Script) -> Iterator[Event]:
    for event in script.events:
        yield from event.parts or (event,)


def _smooth(u: float) -> float:
    u = min(max(u, 0.0), 1.0)
    return u * u * (3 - 2 * u)


def _view(script: Script, t: float) -> View:
    """The view at time t. Each camera move returns to the default view."""
    for event in script.events:
        if event.kind == "camera" and event.start <= t < event.end:
            away = _smooth(2 * min(t - event.start, event.end - t) / (event.end - event.start))
            match event.get("camera"):
                case "pan left":
                    return View(x=0.5 - 0.25 * away)
                case "pan right":
                    return View(x=0.5 + 0.25 * away)
                case "zoom in":
                    return View(zoom=1 + 0.6 * away)
                case "zoom out":
                    return View(zoom=1 - 0.4 * away)
    return View()


def _pose(script: Script, who: int, acts: list[Event], t: float) -> Pose | None:
    """The pose of shape `who` at time t, after its earlier events (`acts`, in order); None if it is not on stage."""
    actor = script.actors[who]
    x = y = None
    radius, angle, color, mouth = SIZES[actor.size], 0.0, actor.color, -1.0
    for event in acts:
        if event.start > t:
            break
        u = (t - event.start) / max(event.end - event.start, 1e-9)
        now, s = u < 1, _smooth(u)
        match event.kind:
            case "present":
                x, y = PLACES[event.get("place")]
            case "enter" | "leave" | "move":
                to = PLACES.get(event.get("place"), (x, y))
                out = _OUTSIDE.get(event.get("side"), (None, None))
                beyond = [edge if edge is not None else at for edge, at in zip(out, to, strict=True)]
                if event.kind == "enter":
                    x, y = beyond
                if event.kind == "leave":
                    to = beyond
                    if not now:
                        return None
                x, y = x + (to[0] - x) * s, y + (to[1] - y) * s
            case "jump" if now:
                y -= 0.13 * abs(np.sin(2 * np.pi * u))
            case "spin" if now:
                angle = 2 * np.pi * s * (-1 if event.get("turn") == "counterclockwise" else 1)
            case "recolor":
                color = event.get("color")
            case "resize":
                radius *= 1 + (GROWTH[event.get("resize")] - 1) * s
            case "say" if now:
                mouth = 0.5 - 0.5 * np.cos(2 * np.pi * 4.3 * (t - event.start))
            case "collide" if now:
                x, y = _collide(script, who, event, u, (x, y), radius)
    return Pose(x, y, radius, angle, color, mouth) if x is not None else None


def _collide(script: Script, who: int, event: Event, u: float, at, radius: float) -> tuple[float, float]:
    """The position of a colliding shape: `actor` moves to `other` and back, and `other` recoils slightly."""
    partner = event.other if who == event.actor else event.actor
    acts = [e for e in _parts(script) if partner in (e.actor, e.other) and e is not event]
    met = _pose(script, partner, acts, event.start)
    height, width = LEVELS[script.level].size
    way = np.array([(met.x - at[0]) * width / height, met.y - at[1]])  # in heights
    distance = max(float(np.hypot(*way)), 1e-6)
    if who == event.actor:
        run = u / IMPACT if u < IMPACT else 1 - _smooth((u - IMPACT) / (1 - IMPACT))
        way *= run**2 * max(distance - 0.85 * (radius + met.radius), 0) / distance
    else:
        way *= -0.05 * np.sin(np.pi * max(u - IMPACT, 0) / (1 - IMPACT)) / distance
    return at[0] + way[0] * height / width, at[1] + way[1]


@lru_cache(maxsize=4)  # the view rarely changes
def _ground(backdrop: str, pattern: str, height: int, width: int, view: View) -> np.ndarray:
    """The background, uint8 [H, W, 3]."""
    y = ((np.arange(height) + 0.5) / height - 0.5) / view.zoom + view.y
    x = (((np.arange(width) + 0.5) / width - 0.5) / view.zoom + view.x) * width / height
    y, x = y[:, None], x[None, :]
    match pattern:
        case "plain":
            mark = np.zeros((height, width))
        case "striped":
            mark = np.broadcast_to((np.sin(2 * np.pi * 5 * (x + y)) > 0), (height, width))
        case "dotted":
            mark = np.hypot((x * 7) % 1 - 0.5, (y * 7) % 1 - 0.5) < 0.2
        case "checkered":
            mark = ((x * 6) // 1 + (y * 6) // 1) % 2
    color = np.array(GROUND[backdrop], np.float32)
    other = color + (32 if color.sum() < 360 else -32)
    ground = color + (other - color) * np.asarray(mark, np.float32)[..., None]
    return ground.clip(0, 255).astype(np.uint8)


def _draw(frame: np.ndarray, pose: Pose, distance: Callable, outline: tuple, view: View) -> None:
    """Draw a shape into the frame [H, W, 3], in place."""
    height, width = frame.shape[:2]
    center_x = ((pose.x - view.x) * view.zoom + 0.5) * width
    center_y = ((pose.y - view.y) * view.zoom + 0.5) * height
    radius = pose.radius * view.zoom * height
    reach = radius * 1.45 + 2
    top, bottom = max(int(center_y - reach), 0), min(int(center_y + reach) + 1, height)
    left, right = max(int(center_x - reach), 0), min(int(center_x + reach) + 1, width)
    if top >= bottom or left >= right:
        return
    y = ((np.arange(top, bottom) + 0.5 - center_y) / radius)[:, None]
    x = ((np.arange(left, right) + 0.5 - center_x) / radius)[None, :]
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    edge = distance(cos * x + sin * y, cos * y - sin * x) * radius  # signed distance in pixels
    line = max(1.2, 0.07 * radius)
    patch = frame[top:bottom, left:right]
    layers = [(edge - line, outline), (edge, INK[pose.color])]
    if pose.mouth >= 0:
        lips = (np.hypot(x / 0.5, (y - 0.1) / (0.12 + 0.3 * pose.mouth)) - 1) * radius * 0.3
        layers += [(lips - line, (255, 255, 255)), (lips, (10, 10, 10))]
    for pixels, color in layers:
        cover = np.clip(0.5 - pixels, 0, 1).astype(np.float32)[..., None]
        patch[...] = patch + (np.array(color, np.float32) - patch) * cover + 0.5


def _star(points: int, inner: float, turn: float = 0.0) -> Callable:
    """The distance function of a star with outer corners at radius 1 and inner corners at `inner`, or of a polygon."""
    half = np.pi / points
    tip, dent = np.array([1.0, 0.0]), inner * np.array([np.cos(half), np.sin(half)])
    edge = (dent - tip) / np.hypot(*(dent - tip))

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        r, around = np.hypot(x, y), np.arctan2(x, -y) + turn
        folded = np.abs((around + half) % (2 * half) - half)
        return edge[1] * (r * np.cos(folded) - tip[0]) - edge[0] * r * np.sin(folded)

    return distance


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    y = y - 0.1
    a, b, half = (x - y) * 0.7071, (-x - y) * 0.7071, 0.56
    square = np.maximum(np.abs(a), np.abs(b)) - half
    lobes = np.minimum(np.hypot(a - half, b), np.hypot(a, b - half)) - half
    return np.minimum(square, lobes)


SHAPE_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.88,
    "triangle": _star(3, 0.5),
    "star": _star(5, 0.42),
    "diamond": lambda x, y: (np.abs(x) / 0.62 + np.abs(y) / 1.1 - 1) * 0.54,
    "hexagon": _star(6, 0.866, np.pi / 6),
    "heart": _heart,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.74) - 0.26,
}
"""Signed distance functions by shape, positive outside, for unit radius; x to the right, y down."""
