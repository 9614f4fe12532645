"""Scenes of toy objects on a textured table, drawn from a seed with NumPy and Pillow alone.

A scene is looked at from straight above: x to the right, y down, z towards the viewer. Every shape
is a signed distance function, found by sphere tracing along -z (Hart 1996), with a solid texture,
Phong lighting and a cast shadow. The same scene carries the label, the mask and the box of each
object.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from PIL import Image, ImageFilter

SUPERSAMPLE = 2  # rays per pixel and axis
USUAL = 0.85  # share of the objects that have their class's usual colour, and of those with its usual pattern
TILT = 0.7  # radians
PATTERNS = ("plain", "stripes", "spots", "checks", "marble")
VOID = 255  # label of the pixels along an outline, which nobody scores


# ---- shapes: signed distance [N] to points [3, N], each shape at most one unit in radius


Shape = Callable[[ndarray], ndarray]  # signed distance [N] to points [3, N]
Texture = Callable[[ndarray], ndarray]  # colour [3, N] at points [3, N] of a shape's own space


def _ball(p: ndarray) -> ndarray:
    return _length(*p) - 0.8


def _capsule(p: ndarray) -> ndarray:
    return _rod(p, half_length=0.6, radius=0.4)


def _cone(p: ndarray) -> ndarray:
    return _spire(np.hypot(p[0], p[2]), p[1])


def _cross(p: ndarray) -> ndarray:
    small, middle, large = np.sort(np.abs(p), axis=0)
    return np.maximum(np.maximum(large - 0.9, middle - 0.3), small - 0.3)


def _cube(p: ndarray) -> ndarray:
    return np.abs(p).max(axis=0) - 0.57


def _cylinder(p: ndarray) -> ndarray:
    return np.maximum(np.hypot(p[0], p[2]) - 0.5, np.abs(p[1]) - 0.75)


def _dumbbell(p: ndarray) -> ndarray:
    ends = _length(p[0], np.abs(p[1]) - 0.62, p[2]) - 0.38
    return np.minimum(ends, _rod(p, half_length=0.6, radius=0.15))


def _gem(p: ndarray) -> ndarray:
    return (np.abs(p).sum(axis=0) - 1) * 3**-0.5


def _pyramid(p: ndarray) -> ndarray:
    return _spire(np.maximum(np.abs(p[0]), np.abs(p[2])), p[1])


def _ring(p: ndarray) -> ndarray:
    return np.hypot(np.hypot(p[0], p[1]) - 0.68, p[2]) - 0.27


def _stick(p: ndarray) -> ndarray:
    return _rod(p, half_length=0.9, radius=0.09)


def _plank(p: ndarray) -> ndarray:
    return np.maximum(np.maximum(np.abs(p[0]) - 0.19, np.abs(p[1]) - 0.95), np.abs(p[2]) - 0.07)


def _pebble(p: ndarray) -> ndarray:
    return (_length(p[0], 1.4 * p[1], 2 * p[2]) - 0.6) * 0.5


def _rod(p: ndarray, half_length: float, radius: float) -> ndarray:
    return _length(p[0], p[1] - np.clip(p[1], -half_length, half_length), p[2]) - radius


def _spire(across: ndarray, y: ndarray) -> ndarray:
    """What narrows from a base at y = -0.35 to a point at y = 0.9."""
    run, rise = 2 / 5**0.5, 1 / 5**0.5
    return np.maximum(across * run + (y - 0.9) * rise, -0.35 - y)


def _length(x: ndarray, y: ndarray, z: ndarray) -> ndarray:
    return np.sqrt(x * x + y * y + z * z)


SHAPES: dict[str, Shape] = {
    "ball": _ball,
    "capsule": _capsule,
    "cone": _cone,
    "cross": _cross,
    "cube": _cube,
    "cylinder": _cylinder,
    "dumbbell": _dumbbell,
    "gem": _gem,
    "pyramid": _pyramid,
    "ring": _ring,
}
CLASSES = tuple(SHAPES)
_CLUTTER = (_stick, _plank, _pebble)  # lies about and covers objects, and is background


@dataclass(frozen=True)
class Scene:
    """What a seed draws.

    image: [H, W, 3] uint8. owner: [H, W] number of the object seen at each pixel, from 1; 0: none.
    classes: index into CLASSES of each object. shown: share of each object that is in view.
    """

    image: ndarray
    owner: ndarray
    classes: tuple[int, ...]
    shown: tuple[float, ...]

    def boxes(self) -> dict[int, tuple[int, int, int, int]]:
        """First and last column and row of what is seen of each object, as x1, y1, x2, y2 from 0."""
        boxes = {}
        for number in range(1, len(self.classes) + 1):
            rows, columns = np.nonzero(self.owner == number)
            if len(rows):
                boxes[number] = (int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max()))
        return boxes

    def mask(self) -> ndarray:
        """[H, W] uint8: 0 for background, 1 + class of the object, VOID along outlines."""
        labels = np.array([0, *(1 + index for index in self.classes)], np.uint8)[self.owner]
        around = np.pad(self.owner, 1, mode="edge")
        height, width = self.owner.shape
        neighbours = [around[y : y + height, x : x + width] for y, x in ((0, 1), (1, 0), (2, 1), (1, 2))]
        outline = np.any([neighbour != self.owner for neighbour in neighbours], axis=0)
        return np.where(outline, np.uint8(VOID), labels)


def draw_scene(
    seed: tuple[int, ...], size: tuple[int, int], classes: tuple[int, ...], radius: tuple[float, float], clutter: int
) -> Scene:
    """Draw one object of each class index, at random places that overlap little.

    size: height and width in pixels. radius: smallest and largest of an object, as a share of the
    short side. clutter: at most so many things that are no objects, some below and some on top.
    """
    rng = np.random.default_rng(seed)
    canvas = _Canvas(rng, size)
    covering = rng.integers(0, clutter + 1)
    for _ in range(rng.integers(0, clutter + 1)):
        centre, reach = _random_place(rng, size, radius)
        canvas.put(
            _random_clutter(rng), 0, centre, 0.7 * reach, _random_texture(rng, rng.random(), rng.choice(PATTERNS))
        )

    placed: list[tuple[ndarray, float]] = []
    areas = []
    for number, index in enumerate(classes, start=1):
        centre, reach = _free_place(rng, size, radius, placed)
        placed.append((centre, reach))
        hue = (index + rng.normal(scale=0.25)) / len(CLASSES) if rng.random() < USUAL else rng.random()
        pattern = PATTERNS[index % len(PATTERNS)] if rng.random() < USUAL else rng.choice(PATTERNS)
        areas.append(canvas.put(SHAPES[CLASSES[index]], number, centre, reach, _random_texture(rng, hue, pattern)))
    for _ in range(covering):
        centre, reach = _random_place(rng, size, radius)
        if placed and rng.random() < 0.7:  # across an object, often
            target, target_reach = placed[rng.integers(len(placed))]
            centre = target + rng.uniform(-0.8, 0.8, 2) * target_reach
        canvas.put(
            _random_clutter(rng), 0, centre, 0.7 * reach, _random_texture(rng, rng.random(), rng.choice(PATTERNS))
        )

    owner = canvas.owner[::SUPERSAMPLE, ::SUPERSAMPLE]
    seen = [int(np.count_nonzero(canvas.owner == number)) for number in range(1, len(classes) + 1)]
    return Scene(
        canvas.photograph(rng),
        owner,
        tuple(classes),
        tuple(visible / max(area, 1) for visible, area in zip(seen, areas, strict=True)),
    )


def _random_clutter(rng: Generator) -> Shape:
    return _CLUTTER[rng.integers(len(_CLUTTER))]


def _random_place(rng: Generator, size: tuple[int, int], radius: tuple[float, float]) -> tuple[ndarray, float]:
    """Centre (x, y) and radius of something, in pixels; it may stick out a little."""
    height, width = size
    reach = rng.uniform(*radius) * min(size)
    inside = np.minimum(0.75 * reach, 0.45 * min(size))
    return np.array([rng.uniform(inside, width - inside), rng.uniform(inside, height - inside)]), reach


def _free_place(
    rng: Generator, size: tuple[int, int], radius: tuple[float, float], taken: list[tuple[ndarray, float]]
) -> tuple[ndarray, float]:
    """Of 20 random places the first that overlaps others little, or else the freest."""

    def overlap(place: tuple[ndarray, float]) -> float:
        return max(
            (0.75 * (place[1] + reach) - np.linalg.norm(place[0] - centre) for centre, reach in taken), default=0.0
        )

    places = [_random_place(rng, size, radius) for _ in range(20)]
    return min(places, key=lambda place: max(overlap(place), 0.0))


class _Canvas:
    """The picture while things are put on it, one above the other.

    light: [H, W, 3] linear colour; owner: [H, W] as in Scene; both supersampled.
    """

    def __init__(self, rng: Generator, size: tuple[int, int]):
        self.rng = rng
        self.shape = (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE)
        azimuth, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 1.0)
        self.sun = np.array([np.cos(azimuth) * np.sin(tilt), np.sin(azimuth) * np.sin(tilt), np.cos(tilt)], np.float32)
        self.sunlight = np.float32(rng.uniform(0.65, 1.0))
        self.sky = np.float32(rng.uniform(0.25, 0.55))
        self.light = _table(rng, self.shape) * (self.sky + self.sunlight * self.sun[2])
        self.owner = np.zeros(self.shape, np.uint8)

    def put(self, shape: Shape, number: int, centre: ndarray, reach: float, texture: Texture) -> int:
        """Draw a shape on top of everything; returns its whole area in (supersampled) pixels."""
        rng = self.rng
        turn = _random_rotation(rng)
        gloss, shine = np.float32(rng.uniform(0, 0.7)), rng.choice([8, 20, 50])

        reach, (x, y) = reach * SUPERSAMPLE, centre * SUPERSAMPLE
        half = int(np.ceil(reach))
        left, top, side = int(x) - half, int(y) - half, 2 * half + 1
        columns = ((np.arange(side) + left - x) / reach).astype(np.float32)
        rows = ((np.arange(side) + top - y) / reach).astype(np.float32)
        hit, points = _trace(shape, turn, columns, rows)
        silhouette = np.zeros((side, side), bool)
        silhouette.reshape(-1)[hit] = True

        normals = turn.T @ _normals(shape, points)
        facing = np.maximum(self.sun @ normals, 0)
        halfway = self.sun + np.array([0, 0, 1], np.float32)
        glint = np.maximum(halfway / np.linalg.norm(halfway) @ normals, 0) ** shine * gloss
        shade = self.sky * (0.6 + 0.4 * normals[2]) + self.sunlight * facing
        lit = (texture(points) * shade + self.sunlight * glint).T

        self._cast_shadow(silhouette, left, top, reach)
        row, column = hit // side + top, hit % side + left
        inside = (row >= 0) & (row < self.shape[0]) & (column >= 0) & (column < self.shape[1])
        self.light[row[inside], column[inside]] = lit[inside]
        self.owner[row[inside], column[inside]] = number
        return len(hit)

    def _cast_shadow(self, silhouette: ndarray, left: int, top: int, reach: float) -> None:
        """Darken what lies below, away from the sun, with a soft edge."""
        away = -self.sun[:2] / self.sun[2] * 0.45 * reach
        blur = 0.12 * reach
        margin = int(3 * blur) + 1
        shadow = Image.fromarray(np.pad(silhouette, margin).astype(np.uint8) * 255).filter(
            ImageFilter.GaussianBlur(blur)
        )
        shadow = np.asarray(shadow, np.float32) / 255
        left, top = left + int(away[0]) - margin, top + int(away[1]) - margin
        height, width = self.shape
        y0, x0, y1, x1 = (
            max(top, 0),
            max(left, 0),
            min(top + shadow.shape[0], height),
            min(left + shadow.shape[1], width),
        )
        if y0 < y1 and x0 < x1:
            blocked = self.sunlight * self.sun[2] / (self.sky + self.sunlight * self.sun[2])
            self.light[y0:y1, x0:x1] *= 1 - blocked * shadow[y0 - top : y1 - top, x0 - left : x1 - left, None]

    def photograph(self, rng: Generator) -> ndarray:
        """[H, W, 3] uint8: averaged rays, tinted, blurred, noisy."""
        height, width = (side // SUPERSAMPLE for side in self.shape)
        picture = self.light.reshape(height, SUPERSAMPLE, width, SUPERSAMPLE, 3).mean(axis=(1, 3))
        picture = picture * rng.uniform(0.88, 1.12, 3).astype(np.float32) * np.float32(rng.uniform(0.75, 1.15))
        picture = np.clip(picture, 0, 1) ** np.float32(1 / 1.8)
        image = Image.fromarray((255 * picture).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(float(rng.choice([0, 0, 0.5, 0.9])))
        )
        noise = rng.standard_normal(picture.shape, np.float32) * np.float32(255 * rng.uniform(0, 0.025))
        return np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8)


def _trace(shape: Shape, turn: ndarray, columns: ndarray, rows: ndarray) -> tuple[ndarray, ndarray]:
    """Rays along -z that hit a turned shape: their indices in the grid [rows, columns], and where
    they hit, [3, N] in the shape's own space."""
    squared = (rows[:, None] ** 2 + columns[None, :] ** 2).reshape(-1)
    rays = np.flatnonzero(squared < 1)
    depth = np.sqrt(1 - squared[rays])  # the sphere around the shape, where the ray enters
    points = turn @ np.stack((columns[rays % len(columns)], rows[rays // len(columns)], depth))
    left = 2 * depth  # until the ray leaves that sphere
    hits, places = [], []
    for _ in range(32):
        gap = shape(points)
        near = gap < 0.008
        hits.append(rays[near])
        places.append(points[:, near])
        going = np.flatnonzero(~near & (left > gap))
        if not len(going):
            break
        rays, gap = rays[going], gap[going]
        left = left[going] - gap
        points = points[:, going] - turn[:, 2:] * gap
    return np.concatenate(hits), np.concatenate(places, axis=1)


def _normals(shape: Shape, points: ndarray) -> ndarray:
    """[3, N] unit gradients of the distance, from four points of a tetrahedron."""
    corners = np.array([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], np.float32)[..., None]
    gradient = sum(corner * shape(points + 0.01 * corner) for corner in corners)
    return gradient / np.maximum(_length(*gradient), 1e-9)


def _random_rotation(rng: Generator) -> ndarray:
    """[3, 3] float32: any turn in the picture, then some tilt and swing out of it."""
    tilt, swing, turn = rng.uniform(-TILT, TILT), rng.uniform(-TILT, TILT), rng.uniform(0, 2 * np.pi)
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    about_y = np.array([[np.cos(swing), 0, np.sin(swing)], [0, 1, 0], [-np.sin(swing), 0, np.cos(swing)]])
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    return (about_x @ about_y @ about_z).astype(np.float32)


# ---- textures


def _random_colour(rng: Generator, hue: float, saturation: tuple[float, float]) -> ndarray:
    """[3] float32 in linear light, of a hue from 0 to 1 and a saturation within bounds."""
    saturation, brightness = rng.uniform(*saturation), rng.uniform(0.3, 0.95)
    ramp = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return ((brightness * (1 - saturation + saturation * ramp)) ** 1.8).astype(np.float32)


def _random_texture(rng: Generator, hue: float, pattern: str) -> Texture:
    """A solid texture, one of PATTERNS, mostly of one hue (0 to 1)."""
    one, other = (
        _random_colour(rng, hue, (0.3, 0.95))[:, None],
        _random_colour(rng, rng.random(), (0.05, 0.95))[:, None],
    )
    other = one + (other - one) * np.float32(rng.uniform(0.2, 1.0))
    waves = (rng.standard_normal((4, 3)) * rng.uniform(2, 5)).astype(np.float32)
    phases = rng.uniform(0, 2 * np.pi, (4, 1)).astype(np.float32)
    pitch = rng.uniform(5, 10)

    def texture(p: ndarray) -> ndarray:
        cloud = np.sin(waves @ p + phases).mean(axis=0)
        if pattern == "plain":
            share = 0.25 + 0.5 * cloud
        elif pattern == "stripes":
            share = 0.5 + 2 * np.sin(pitch * p[1] + cloud)
        elif pattern == "checks":
            share = 0.5 + 4 * np.sin(pitch * p).prod(axis=0)
        elif pattern == "spots":
            share = 4 * (np.cos(pitch * p).sum(axis=0) - 0.9)
        else:
            share = 0.5 + 0.6 * np.sin(pitch * (p[0] + cloud))
        share = np.clip(share, 0, 1)
        return one * (1 - share) + other * share

    return texture


def _table(rng: Generator, shape: tuple[int, int]) -> ndarray:
    """[H, W, 3] float32 colours of the ground."""
    height, width = shape
    one, other = (_random_colour(rng, rng.random(), (0.05, 0.6)) for _ in range(2))
    other = one + (other - one) * np.float32(rng.uniform(0.1, 0.7))
    kind = rng.choice(["cloth", "boards", "stone", "checks", "stripes", "plain"])
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.1, 0.4) * min(shape)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    along, across = (
        x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)),
        y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle)),
    )
    along, across = along / np.float32(period), across / np.float32(period)
    rough, fine = _noise(rng, shape, 6), _noise(rng, shape, 40)

    if kind == "cloth":
        share = 0.5 + 0.25 * np.sin(8 * along) + 0.25 * np.sin(8 * across) + 0.3 * rough
    elif kind == "boards":
        share = 0.5 + 0.35 * np.sin(9 * across + 6 * rough) + 0.2 * fine - 0.8 * (across % 1 < 0.06)
    elif kind == "stone":
        share = 0.5 + 1.2 * np.abs(rough + 0.5 * fine) - 0.4
    elif kind == "checks":
        share = np.where(np.sin(np.pi * along) * np.sin(np.pi * across) > 0, 0.15, 0.85) + 0.2 * rough
    elif kind == "stripes":
        share = 0.5 + 0.9 * np.sin(np.pi * along + rough)
    else:
        share = 0.5 + 0.6 * rough
    share = np.clip(share, 0, 1)[..., None]
    speckle = 1 + np.float32(rng.uniform(0, 0.15)) * fine[..., None]
    return np.clip((one * (1 - share) + other * share) * speckle, 0, 1)


def _noise(rng: Generator, shape: tuple[int, int], cells: int) -> ndarray:
    """[H, W] float32 smooth noise, about -1 to 1, with so many cells on the short side."""
    rows, columns = (max(2, round(cells * side / min(shape))) for side in shape)
    coarse = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
    return np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))
