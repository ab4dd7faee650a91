"""Drawing one image of the demo data set: a person, as one camera sees them.

A figure is a list of parts, far to near; a part is a polygon in the person's own units (height 1, soles at y = 0,
y pointing down) and the stuff that it is made of. What a part looks like to a modality is said by `Stuff.tones` alone,
so that visible and infrared images differ in brightness and colour and never in structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from engine.data.demo_people import BUILDS, CLOTHS, COLOURS, HAIR_SHADES, HEIGHTS, SKINS, Colour, Garment, Person

WIDTH, HEIGHT = 96, 192
OVERSAMPLING = 2
STOUTNESS = 1.2  # people fill their boxes as they do in cropped footage
LUMINANCE = np.array([0.299, 0.587, 0.114])

CREAM: Colour = (0.96, 0.94, 0.87)
CHARCOAL: Colour = (0.10, 0.10, 0.12)

SKIN_REFLECTANCE, HAIR_REFLECTANCE, LEATHER_REFLECTANCE = 1.0, 0.3, 0.05


@dataclass(frozen=True)
class Stuff:
    """What a part is made of: its looks in both modalities follow from it.

    Attributes:
        colour: RGB in [0, 1].
        reflectance: brightness in the near infrared that the colour does not tell, in [0, 1].
        pattern, period: one of `PATTERNS`, and its pixels per repeat.
    """

    colour: Colour
    reflectance: float
    pattern: str = "plain"
    period: int = 0

    def tones(self, infrared: bool) -> tuple[np.ndarray, np.ndarray]:
        """The base tone and the pattern's second tone, [3] each.

        Dark colours carry a lighter pattern and light ones a darker, in the infrared with the same sign as in the
        visible: real prints are dyes over one cloth, and keep it.
        """
        colour = np.array(self.colour)
        luminance = float(colour @ LUMINANCE)
        lighter = luminance < 0.5
        if not infrared:
            return colour, colour + 0.7 * (np.array(CREAM if lighter else CHARCOAL) - colour)
        brightness = 0.08 + 0.55 * self.reflectance + 0.3 * luminance
        if self.pattern != "plain":  # room for the second tone
            brightness = min(brightness, 0.62) if lighter else max(brightness, 0.42)
        second = brightness + (0.32 if lighter else -0.32)
        return np.full(3, brightness), np.full(3, second)


class Part(NamedTuple):
    """A polygon, [n, 2] in the person's units or, once placed, in pixels of the canvas, and its stuff."""

    polygon: np.ndarray
    stuff: Stuff


class Pose(NamedTuple):
    """How the person stands in one image.

    Attributes:
        view: "front", "back" or "side".
        facing: 1 or -1: to the right or to the left, for side views.
        stride: phase of walking, in [-1, 1].
        swing: phase of the arms, in [-1, 1].
    """

    view: str
    facing: int
    stride: float
    swing: float


@dataclass(frozen=True)
class Camera:
    """A fixed camera: its scene, its light and its faults.

    Attributes:
        wall, ground: colours of the weak background, grey for an infrared camera.
        horizon: where they meet, as a fraction of the image's height.
        views: chances of a front, back and side view.
        gain, cast: brightness and white balance.
        light: strength of the light from the right (negative: from the left).
        scale, squash, tilt: size of the person, vertical foreshortening, radians of roll.
        blur, noise: radius in pixels, standard deviation.
        furniture: left and right edges of doors, posts, trees on the wall, as fractions of the image's width.
    """

    wall: Colour
    ground: Colour
    horizon: float
    views: tuple[float, float, float]
    infrared: bool = False
    gain: float = 1.0
    cast: Colour = (1.0, 1.0, 1.0)
    light: float = 0.0
    scale: float = 1.0
    squash: float = 1.0
    tilt: float = 0.0
    blur: float = 0.4
    noise: float = 0.02
    furniture: tuple[tuple[float, float], ...] = ()


# Weak scenes and gains, as in crops of one installation: stronger ones drown the people when clustering.
CAMERAS = {
    1: Camera((0.56, 0.55, 0.53), (0.50, 0.49, 0.47), 0.72, (0.5, 0.3, 0.2), cast=(1.02, 1.0, 0.98), light=0.06,
              furniture=((0.08, 0.30),)),
    2: Camera((0.53, 0.54, 0.55), (0.48, 0.48, 0.49), 0.66, (0.3, 0.5, 0.2), gain=0.96, cast=(0.99, 1.0, 1.02),
              light=-0.08, squash=0.97, tilt=0.02, blur=0.6, furniture=((0.72, 0.95),)),
    3: Camera((0.47, 0.47, 0.47), (0.42, 0.42, 0.42), 0.66, (0.4, 0.4, 0.2), infrared=True, light=0.04, squash=0.97,
              blur=0.6, noise=0.03, furniture=((0.72, 0.95),)),
    4: Camera((0.55, 0.57, 0.58), (0.50, 0.50, 0.48), 0.58, (0.4, 0.3, 0.3), gain=1.04, light=0.1, scale=0.98,
              tilt=-0.03, blur=0.3, noise=0.015, furniture=((0.15, 0.22), (0.80, 0.86))),
    5: Camera((0.52, 0.53, 0.50), (0.48, 0.47, 0.45), 0.62, (0.4, 0.4, 0.2), gain=0.93,
              cast=(0.99, 1.02, 0.99), light=-0.06, scale=0.96, squash=0.96, blur=0.7, noise=0.025,
              furniture=((0.35, 0.43),)),
    6: Camera((0.44, 0.44, 0.44), (0.46, 0.46, 0.46), 0.60, (0.3, 0.4, 0.3), infrared=True, gain=0.96,
              light=-0.05, scale=0.97, squash=0.96, tilt=0.02, blur=0.7, noise=0.025, furniture=((0.18, 0.25),)),
}  # fmt: skip


def draw(person: Person, camera: Camera, rng: Generator) -> Image.Image:
    """One image, `WIDTH` x `HEIGHT` RGB; an infrared camera's has three equal channels."""
    canvas = _background(camera, rng)
    place = _placement(person, camera, rng)
    pose = Pose(
        view=str(rng.choice(("front", "back", "side"), p=camera.views)),
        facing=1 if rng.random() < 0.5 else -1,
        stride=rng.uniform(-1, 1),
        swing=rng.uniform(-1, 1),
    )
    parts = [Part(place(polygon), stuff) for polygon, stuff in figure(person, pose)]
    foot = place(np.zeros(2))
    _shadow(canvas, place)
    scene = canvas.copy()
    for part in parts:
        _paint(canvas, part, foot, camera.infrared)
    canvas = _shade(canvas, scene, parts, camera.light)
    if rng.random() < 0.12:
        _occlude(canvas, camera, rng)
    return _expose(canvas, camera, rng)


# The figure


def figure(person: Person, pose: Pose) -> list[Part]:
    """The person's parts, far to near."""
    return (_figure_side if pose.view == "side" else _figure_upright)(person, pose)


def stuffs(person: Person) -> dict[str, Stuff]:
    """What the person's parts are made of, by the part's name."""

    def garment(one: Garment) -> Stuff:
        return Stuff(COLOURS[one.colour], CLOTHS[one.cloth], one.pattern, one.period)

    return {
        "skin": Stuff(SKINS[person.skin], SKIN_REFLECTANCE),
        "hair": Stuff(HAIR_SHADES[person.hair_shade], HAIR_REFLECTANCE),
        "upper": garment(person.upper),
        "lower": garment(person.lower),
        "bag": Stuff(COLOURS[person.accent], LEATHER_REFLECTANCE),
        "shoes": Stuff(COLOURS[person.shoes], LEATHER_REFLECTANCE),
        "eye": Stuff((0.1, 0.1, 0.1), 0.0),
    }


def _figure_upright(person: Person, pose: Pose) -> list[Part]:
    """Front and back views; seen from behind, left and right change places."""
    stuff, build = stuffs(person), BUILDS[person.build]
    back = pose.view == "back"
    hand_side = 1 if back else -1  # bags are carried on the person's right
    parts: list[Part] = []

    def add(name: str, polygon: np.ndarray) -> None:
        parts.append(Part(polygon, stuff[name]))

    if person.hair == "long" and not back:
        add("hair", _ellipse(0, -0.885, 0.068, 0.095))
    for side in (-1, 1):
        lift = 0.03 * max(0.0, side * pose.stride)
        ankle = (side * 0.062 * build, -0.045 - lift)
        joints = [(side * 0.047 * build, -0.50), (side * 0.057 * build, -0.27 - lift / 2), ankle]
        _dress_leg(add, person, joints, build)
        add("shoes", _ellipse(ankle[0] + side * 0.006, ankle[1] + 0.024, 0.034, 0.024))
    _dress_hips(add, person, 0.095 * build, 0.13 * build)
    add("upper", _torso(person, 0.118 * build, 0.088 * build, 0.094 * build))
    for side in (-1, 1):
        swing = 0.02 * side * pose.swing
        hand = (side * 0.150 * build + swing, -0.44 + 0.02 * abs(pose.swing))
        joints = [(side * 0.107 * build, -0.795), (side * 0.142 * build, -0.62), hand]
        if person.bag == "hand" and side == hand_side:
            add("bag", _box(hand[0], hand[1] + 0.075, 0.062, 0.062))
        _dress_arm(add, person, joints, build)
    if person.bag == "backpack":
        if back:
            add("bag", _rounded_box(0, -0.685, 0.098, 0.145))
            add("bag", _rounded_box(0, -0.635, 0.070, 0.065))
        else:
            for side in (-1, 1):
                add("bag", _limb([(side * 0.062 * build, -0.835), (side * 0.066 * build, -0.62)], (0.016, 0.014)))
    if person.bag == "shoulder":
        hip = (hand_side * 0.115 * build, -0.49)
        add("bag", _limb([(-hand_side * 0.07 * build, -0.835), (hip[0] * 0.9, hip[1] - 0.04)], (0.012, 0.012)))
        add("bag", _rounded_box(hip[0], hip[1], 0.066, 0.058))
    add("skin", _box(0, -0.85, 0.026, 0.028))
    add("skin", _ellipse(0, -0.925, 0.050, 0.067))
    if back:
        _dress_head_back(add, person)
    else:
        for side in (-1, 1):
            add("eye", _ellipse(side * 0.019, -0.928, 0.006, 0.006))
        _dress_head_front(add, person)
    return parts


def _figure_side(person: Person, pose: Pose) -> list[Part]:
    """The side view, facing right, mirrored when the person faces left."""
    stuff, build = stuffs(person), BUILDS[person.build]
    parts: list[Part] = []

    def add(name: str, polygon: np.ndarray) -> None:
        parts.append(Part(polygon * (pose.facing, 1), stuff[name]))

    def leg(step: float) -> None:
        ankle = (0.13 * step, -0.045 - 0.02 * abs(step))
        _dress_leg(add, person, [(0, -0.50), (0.075 * step + 0.012, -0.27), ankle], build)
        add("shoes", _ellipse(ankle[0] + 0.022, ankle[1] + 0.024, 0.052, 0.022))

    def arm(step: float) -> tuple[float, float]:
        hand = (0.115 * step + 0.03, -0.45 - 0.02 * abs(step))
        _dress_arm(add, person, [(0, -0.79), (0.05 * step - 0.01, -0.62), hand], build)
        return hand

    arm(-pose.swing)
    leg(-pose.stride)
    leg(pose.stride)
    if person.bag == "backpack":
        add("bag", _rounded_box(-0.105 * build, -0.685, 0.062, 0.14))
    _dress_hips(add, person, 0.078 * build, 0.125 * build)
    add("upper", _torso(person, 0.070 * build, 0.076 * build, 0.078 * build))
    if person.bag == "backpack":
        add("bag", _limb([(0.005, -0.835), (0.03 * build, -0.70), (-0.03 * build, -0.62)], (0.016, 0.016, 0.014)))
    hand = arm(pose.swing)
    near_is_right = pose.facing == 1  # the bag's side is the near one
    if person.bag == "hand" and near_is_right:
        add("bag", _box(hand[0], hand[1] + 0.075, 0.068, 0.062))
    if person.bag == "shoulder":
        add("bag", _limb([(0.0, -0.84), (-0.01, -0.53)], (0.012, 0.012)))
        if near_is_right:
            add("bag", _rounded_box(-0.02, -0.49, 0.072, 0.058))
    add("skin", _box(0.008, -0.85, 0.026, 0.028))
    if person.hair == "long":
        add("hair", _ellipse(-0.022, -0.885, 0.056, 0.092))
    add("skin", _ellipse(0.014, -0.925, 0.050, 0.067))
    add("skin", _ellipse(0.064, -0.918, 0.011, 0.012))
    add("eye", _ellipse(0.043, -0.930, 0.006, 0.006))
    _dress_head_side(add, person)
    return parts


Add = Callable[[str, np.ndarray], None]
Point = tuple[float, float]


def _dress_leg(add: Add, person: Person, joints: Sequence[Point], build: float) -> None:
    hip, knee, ankle = joints
    if person.lower.kind == "trousers":
        add("lower", _limb([hip, knee, ankle], (0.056 * build, 0.046 * build, 0.038)))
        return
    add("skin", _limb([hip, knee, ankle], (0.045 * build, 0.034 * build, 0.024)))
    if person.lower.kind == "shorts":
        add("lower", _limb([hip, (knee[0], knee[1] - 0.01)], (0.058 * build, 0.056 * build)))


def _dress_hips(add: Add, person: Person, hip: float, hem: float) -> None:
    if person.lower.kind == "skirt":
        add("lower", np.array([(-hip, -0.56), (hip, -0.56), (hem, -0.25), (-hem, -0.25)]))
    else:
        add("lower", np.array([(-hip, -0.54), (hip, -0.54), (hip, -0.46), (-hip, -0.46)]))


def _dress_arm(add: Add, person: Person, joints: Sequence[Point], build: float) -> None:
    shoulder, elbow, hand = joints
    add("skin", _ellipse(*hand, 0.021, 0.024))
    if person.upper.kind == "shirt":
        add("skin", _limb([shoulder, elbow, hand], (0.03 * build, 0.025 * build, 0.018)))
        half = ((shoulder[0] + 2 * elbow[0]) / 3, (shoulder[1] + 2 * elbow[1]) / 3)
        add("upper", _limb([shoulder, half], (0.036 * build, 0.040 * build)))
    else:
        add("upper", _limb([shoulder, elbow, hand], (0.038 * build, 0.034 * build, 0.028)))


def _dress_head_front(add: Add, person: Person) -> None:
    if person.hair == "cap":
        add("bag", _ellipse(0, -0.945, 0.055, 0.055, half=True))
        add("bag", _box(0, -0.947, 0.060, 0.007))
    elif person.hair != "shaved":
        add("hair", _ellipse(0, -0.945, 0.055, 0.055, half=True))
        if person.hair == "bun":
            add("hair", _ellipse(0, -1.0, 0.026, 0.024))
        if person.hair == "long":
            for side in (-1, 1):
                add("hair", _limb([(side * 0.050, -0.95), (side * 0.056, -0.82)], (0.010, 0.014)))


def _dress_head_back(add: Add, person: Person) -> None:
    if person.hair == "cap":
        add("hair", _ellipse(0, -0.920, 0.051, 0.050))
        add("bag", _ellipse(0, -0.930, 0.055, 0.070, half=True))
    elif person.hair != "shaved":
        add("hair", _ellipse(0, -0.930, 0.055, 0.065))
        if person.hair == "bun":
            add("hair", _ellipse(0, -0.985, 0.028, 0.028))
        if person.hair == "long":
            add("hair", _rounded_box(0, -0.865, 0.066, 0.085))


def _dress_head_side(add: Add, person: Person) -> None:
    if person.hair == "cap":
        add("bag", _ellipse(0.010, -0.945, 0.055, 0.052, half=True))
        add("bag", _box(0.062, -0.948, 0.035, 0.007))
    elif person.hair != "shaved":
        add("hair", _ellipse(0.006, -0.948, 0.055, 0.050, half=True))
        add("hair", _ellipse(-0.020, -0.930, 0.034, 0.055))
        if person.hair == "bun":
            add("hair", _ellipse(-0.052, -0.965, 0.028, 0.028))


def _torso(person: Person, shoulder: float, waist: float, hip: float) -> np.ndarray:
    hem, hem_y = (1.3 * hip, -0.32) if person.upper.kind == "coat" else (1.06 * hip, -0.475)
    right = [(0.4 * shoulder, -0.850), (0.85 * shoulder, -0.835), (shoulder, -0.795), (waist, -0.61), (hem, hem_y)]
    return np.array(right + [(-x, y) for x, y in reversed(right)])


# Shapes


def _ellipse(x: float, y: float, width: float, height: float, half: bool = False) -> np.ndarray:
    """An ellipse of the given half axes, or its upper half."""
    angles = np.linspace(np.pi, (2 if half else 3) * np.pi, 20)
    return np.stack((x + width * np.cos(angles), y + height * np.sin(angles)), 1)


def _box(x: float, y: float, width: float, height: float) -> np.ndarray:
    """A rectangle of the given half sides."""
    return np.array(
        [(x - width, y - height), (x + width, y - height), (x + width, y + height), (x - width, y + height)]
    )


def _rounded_box(x: float, y: float, width: float, height: float) -> np.ndarray:
    """A superellipse: a box with round corners."""
    angles = np.linspace(0, 2 * np.pi, 28)
    wave = np.stack((np.cos(angles), np.sin(angles)), 1)
    return np.array((x, y)) + np.sign(wave) * np.abs(wave) ** 0.45 * (width, height)


def _limb(joints: Sequence[Point], radii: Sequence[float]) -> np.ndarray:
    """The outline of a tapered chain of segments with rounded ends."""
    points = np.array(joints)
    steps = np.diff(points, axis=0)
    steps = steps / np.linalg.norm(steps, axis=1, keepdims=True)
    along = np.concatenate((steps[:1], (steps[:-1] + steps[1:]) / 2, steps[-1:]))
    normals = np.stack((-along[:, 1], along[:, 0]), 1) * np.array(radii)[:, None]
    start, end = points[:1] - steps[:1] * radii[0] * 0.6, points[-1:] + steps[-1:] * radii[-1] * 0.6
    return np.concatenate((start, points + normals, end, (points - normals)[::-1]))


# Pixels


def _placement(person: Person, camera: Camera, rng: Generator) -> Callable[[np.ndarray], np.ndarray]:
    """The map from the person's units to pixels of the oversampled canvas; the detector's box is never exact."""
    size = OVERSAMPLING * 172 * HEIGHTS[person.height] * camera.scale * rng.uniform(0.97, 1.03)
    foot = OVERSAMPLING * np.array((WIDTH / 2 + rng.uniform(-4, 4), HEIGHT - 7 + rng.uniform(-3, 3)))
    tilt = camera.tilt + rng.uniform(-0.02, 0.02)
    turn = np.array(((np.cos(tilt), np.sin(tilt)), (-np.sin(tilt), np.cos(tilt))))
    return lambda points: foot + size * (points * (STOUTNESS, camera.squash)) @ turn


def _pattern(pattern: str, period: float, foot: np.ndarray) -> np.ndarray:
    """Where a pattern has its second tone: [H, W] bool over the canvas, moving with the person."""
    period = period * OVERSAMPLING
    x = np.arange(WIDTH * OVERSAMPLING)[None, :] - foot[0]
    y = np.arange(HEIGHT * OVERSAMPLING)[:, None] - foot[1]
    half_x, half_y = x % period < period / 2, y % period < period / 2
    if pattern == "bands":
        return np.broadcast_to(half_y, (y.shape[0], x.shape[1]))
    if pattern == "stripes":
        return np.broadcast_to(half_x, (y.shape[0], x.shape[1]))
    if pattern == "checks":
        return half_x ^ half_y
    if pattern == "dots":
        return (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (0.33 * period) ** 2
    return np.broadcast_to(y % (4 * period) < 2 * period, (y.shape[0], x.shape[1]))


def _corners(polygon: np.ndarray) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in polygon]


def _ink(tone: np.ndarray, scale: float = 1.0) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in np.rint(255 * np.clip(tone * scale, 0, 1)))
    return red, green, blue


def _paint(canvas: Image.Image, part: Part, foot: np.ndarray, infrared: bool) -> None:
    base, second = part.stuff.tones(infrared)
    corners = _corners(part.polygon)
    brush = ImageDraw.Draw(canvas)
    brush.polygon(corners, fill=_ink(base))
    if part.stuff.pattern != "plain":
        mask = Image.new("L", canvas.size)
        ImageDraw.Draw(mask).polygon(corners, fill=255)
        shape = np.where(_pattern(part.stuff.pattern, part.stuff.period, foot), np.asarray(mask), 0)
        canvas.paste(_ink(second), (0, 0), Image.fromarray(shape.astype(np.uint8)))
    brush.polygon(corners, outline=_ink(base, 0.72))


def _background(camera: Camera, rng: Generator) -> Image.Image:
    """Wall, ground, furniture, all of low contrast: a strong background drowns the people when clustering."""
    size = (WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING)
    wall, ground = (np.array(colour) + rng.uniform(-0.03, 0.03) for colour in (camera.wall, camera.ground))
    canvas = Image.new("RGB", size, _ink(wall))
    brush = ImageDraw.Draw(canvas)
    shift = rng.uniform(-0.15, 0.15)
    horizon = size[1] * (camera.horizon + rng.uniform(-0.04, 0.04))
    for left, right in camera.furniture:
        brush.rectangle(((left + shift) * size[0], 0, (right + shift) * size[0], horizon), fill=_ink(wall, 0.92))
    brush.rectangle((0, horizon, *size), fill=_ink(ground))
    return canvas.filter(ImageFilter.BoxBlur(3))


def _shadow(canvas: Image.Image, place: Callable[[np.ndarray], np.ndarray]) -> None:
    mask = Image.new("L", canvas.size)
    ImageDraw.Draw(mask).polygon(_corners(place(_ellipse(0, 0, 0.16, 0.028))), fill=70)
    canvas.paste((40, 40, 40), (0, 0), mask.filter(ImageFilter.BoxBlur(5)))


def _shade(canvas: Image.Image, scene: Image.Image, parts: Sequence[Part], light: float) -> Image.Image:
    """Darken the figure towards its outline and away from the light, so that it looks round; leave the scene."""
    mask = Image.new("L", canvas.size)
    brush = ImageDraw.Draw(mask)
    for part in parts:
        brush.polygon(_corners(part.polygon), fill=255)
    inside = np.asarray(mask.filter(ImageFilter.BoxBlur(9)), np.float32) / 255
    across = np.linspace(-1, 1, canvas.width, dtype=np.float32)
    shade = (0.72 + 0.28 * inside) * (1 + 2 * light * across)
    shaded = np.asarray(canvas, np.float32) * shade[..., None]
    return Image.composite(Image.fromarray(shaded.clip(0, 255).astype(np.uint8)), scene, mask)


def _occlude(canvas: Image.Image, camera: Camera, rng: Generator) -> None:
    """Something small stands in front: a post at one side, or a low box."""
    width, height = canvas.size
    tone = _ink(np.array(camera.ground), 0.8)
    brush = ImageDraw.Draw(canvas)
    if rng.random() < 0.5:
        left = width * (rng.uniform(0.18, 0.30) if rng.random() < 0.5 else rng.uniform(0.66, 0.78))
        brush.rectangle((left, 0, left + 0.07 * width, height), fill=tone)
    else:
        brush.rectangle((width * 0.1, height * rng.uniform(0.82, 0.9), width * 0.9, height), fill=tone)


def _expose(canvas: Image.Image, camera: Camera, rng: Generator) -> Image.Image:
    """Light, lens and sensor: size, blur, white balance, gain, noise.

    Sums and products only, which every processor rounds alike.
    """
    image = canvas.reduce(OVERSAMPLING).filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.7, 1.3)))
    channel_count = 1 if camera.infrared else 3
    pixels = np.asarray(image, np.float32)[..., :channel_count]
    across = 1 + camera.light * np.linspace(-1, 1, WIDTH, dtype=np.float32)[:, None]
    gain = camera.gain * rng.uniform(0.95, 1.05) * np.array(camera.cast[:channel_count], np.float32)
    noise = rng.standard_normal(pixels.shape, np.float32)
    exposed = np.rint(pixels * across * gain + 255 * camera.noise * noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(exposed, 3 // channel_count, axis=2))
