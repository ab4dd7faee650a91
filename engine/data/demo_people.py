"""Who is in the demo data set: the attributes of an identity, and how identities are drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

Colour = tuple[float, float, float]

SKINS: dict[str, Colour] = {"fair": (0.93, 0.76, 0.66), "tan": (0.80, 0.58, 0.44), "dark": (0.47, 0.31, 0.23)}
HAIR_SHADES: dict[str, Colour] = {
    "black": (0.10, 0.09, 0.10),
    "brown": (0.36, 0.22, 0.13),
    "blond": (0.82, 0.66, 0.36),
    "grey": (0.62, 0.62, 0.64),
}
COLOURS: dict[str, Colour] = {
    "red": (0.75, 0.16, 0.18),
    "orange": (0.90, 0.51, 0.16),
    "yellow": (0.91, 0.80, 0.28),
    "green": (0.19, 0.52, 0.29),
    "teal": (0.16, 0.58, 0.60),
    "sky": (0.47, 0.71, 0.90),
    "navy": (0.14, 0.20, 0.43),
    "violet": (0.47, 0.27, 0.58),
    "pink": (0.91, 0.58, 0.68),
    "brown": (0.42, 0.28, 0.19),
    "white": (0.90, 0.89, 0.86),
    "grey": (0.52, 0.53, 0.55),
    "black": (0.13, 0.13, 0.15),
}

HEIGHTS = {"short": 0.88, "medium": 0.94, "tall": 1.0}
BUILDS = {"slim": 0.84, "medium": 1.0, "broad": 1.2}
HAIRS = ("short", "long", "bun", "shaved", "cap")
UPPERS = ("shirt", "jumper", "coat")
LOWERS = ("trousers", "shorts", "skirt")
BAGS = ("none", "backpack", "shoulder", "hand")
PATTERNS = ("plain", "bands", "stripes", "checks", "dots", "blocks")
PERIODS = (9, 12, 16, 20)  # of a pattern, in pixels of an image of 192 rows
CLOTHS = {"wool": 0.15, "denim": 0.40, "cotton": 0.65, "nylon": 0.90}  # near-infrared reflectance

LEAST_DIFFERENCE = 3  # structural attributes in which every two identities differ, at least


@dataclass(frozen=True)
class Garment:
    """One piece of clothing."""

    kind: str
    colour: str
    cloth: str
    pattern: str
    period: int


@dataclass(frozen=True)
class Person:
    """Everything that is the same in all images of one identity."""

    height: str
    build: str
    skin: str
    hair: str
    hair_shade: str
    upper: Garment
    lower: Garment
    bag: str
    accent: str  # colour of bag and cap
    shoes: str


def people(count: int, version: int) -> list[Person]:
    """The first `count` identities, every two of them `LEAST_DIFFERENCE` structural attributes apart."""
    chosen: list[Person] = []
    for pid in range(1, count + 1):
        attempts = (_random_person(np.random.default_rng((version, pid, attempt))) for attempt in itertools.count())
        chosen.append(next(person for person in attempts if all(_differ(person, other) for other in chosen)))
    return chosen


def structure(person: Person) -> tuple[Any, ...]:
    """The attributes that both modalities show: all but the colours."""

    def of(garment: Garment) -> tuple[Any, ...]:
        return garment.kind, garment.cloth, garment.pattern, garment.period

    return person.height, person.build, person.hair, *of(person.upper), *of(person.lower), person.bag


def _random_person(rng: Generator) -> Person:
    def one(options: Iterable[Any]) -> Any:
        listed = list(options)
        return listed[int(rng.integers(len(listed)))]

    def garment(kinds: Sequence[str]) -> Garment:
        kind, colour, cloth, pattern, period = (one(o) for o in (kinds, COLOURS, CLOTHS, PATTERNS, PERIODS))
        return Garment(kind, colour, cloth, pattern, 0 if pattern == "plain" else period)

    return Person(
        height=one(HEIGHTS),
        build=one(BUILDS),
        skin=one(SKINS),
        hair=one(HAIRS),
        hair_shade=one(HAIR_SHADES),
        upper=garment(UPPERS),
        lower=garment(LOWERS),
        bag=one(BAGS),
        accent=one(COLOURS),
        shoes=one(COLOURS),
    )


def _differ(person: Person, other: Person) -> bool:
    return sum(a != b for a, b in zip(structure(person), structure(other), strict=True)) >= LEAST_DIFFERENCE
