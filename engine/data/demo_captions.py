"""What captioners would say of the demo's people: true but for a set rate of errors, and without colours in infrared.

A caption is told from what was seen, one `Thing` after another; caption and paraphrase of an image tell the same, errors
included, as a paraphrase that is made from the caption's text does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from numpy.random import Generator

from engine.data.demo_drawing import stuffs
from engine.data.demo_people import BAGS, COLOURS, HAIR_SHADES, HAIRS, LOWERS, PATTERNS, UPPERS, Person

ERROR_RATE = 0.1  # of the things that a caption could name, the part that it gets wrong or leaves out

KINDS: dict[str, Sequence[str]] = {
    "hair": HAIRS,
    "upper": UPPERS,
    "lower": LOWERS,
    "shoes": ("shoes",),
    "bag": [bag for bag in BAGS if bag != "none"],
}
SHADES = ("dark", "light", "")

# Words, with the room for adjectives; the second of each is the less usual.
WORDS = {
    "short": ("short {} hair", "{} hair cut short"),
    "long": ("long {} hair", "{} hair down to the shoulders"),
    "bun": ("{} hair in a bun", "{} hair tied up"),
    "shaved": ("a shaved head", "a bald head"),
    "cap": ("a {} cap", "a {} baseball cap"),
    "shirt": ("a {} t-shirt", "a {} shirt with short sleeves"),
    "jumper": ("a {} jumper", "a {} sweater"),
    "coat": ("a {} coat", "a long {} jacket"),
    "trousers": ("{} trousers", "{} pants"),
    "shorts": ("{} shorts", "short {} trousers"),
    "skirt": ("a {} skirt", "a {} knee-length skirt"),
    "shoes": ("{} shoes", "{} footwear"),
    "backpack": ("a {} backpack", "a {} rucksack"),
    "shoulder": ("a {} shoulder bag", "a {} bag over the shoulder"),
    "hand": ("a {} handbag", "a {} bag in the hand"),
}
PATTERN_WORDS = {
    "plain": ("",),
    "bands": ("horizontally striped", "banded"),
    "stripes": ("striped", "vertically striped"),
    "checks": ("checked", "plaid"),
    "dots": ("dotted", "spotted"),
    "blocks": ("two-tone", "block-patterned"),
}
TONE_WORDS = {
    "sky": ("sky blue", "light blue"),
    "navy": ("navy blue", "dark blue"),
    "violet": ("violet", "purple"),
    "teal": ("teal", "blue-green"),
    "light": ("light", "bright"),
}

DRESS = ("upper", "lower", "shoes")
TEMPLATES: Sequence[tuple[str, Sequence[tuple[str, Sequence[str]]]]] = (
    ("a person", (("with", ("hair",)), ("wearing", DRESS), ("carrying", ("bag",)))),
    ("someone", (("in", DRESS), ("with", ("hair", "bag")))),
    ("a pedestrian", (("carrying", ("bag",)), ("dressed in", DRESS), ("having", ("hair",)))),
    ("the person", (("wears", DRESS), ("has", ("hair", "bag")))),
)

T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """A thing that a captioner names.

    Attributes:
        kind: one of `WORDS`.
        tone: a colour of `demo_people`, or one of `SHADES` in the infrared; "" = not told.
        pattern: one of `PATTERNS`.
    """

    kind: str
    tone: str
    pattern: str = "plain"


def describe(person: Person, infrared: bool, rng: Generator) -> tuple[str, str]:
    """A caption of `person` and a paraphrase of it, by two templates."""
    seen = misread(truth(person, infrared), infrared, rng)
    first, second = rng.permutation(len(TEMPLATES))[:2]
    return tell(seen, int(first), rng), tell(seen, int(second), rng)


def truth(person: Person, infrared: bool) -> dict[str, Thing]:
    """What there is to see: hair, upper, lower, shoes, and bag if there is one."""
    looks = stuffs(person)

    def tone(part: str, colour: str) -> str:
        if not infrared:
            return colour
        brightness = looks[part].tones(infrared=True)[0][0]
        return "dark" if brightness < 0.4 else "light" if brightness > 0.6 else ""

    hair = {"cap": tone("bag", person.accent), "shaved": ""}.get(person.hair, tone("hair", person.hair_shade))
    things = {
        "hair": Thing(person.hair, hair),
        "upper": Thing(person.upper.kind, tone("upper", person.upper.colour), person.upper.pattern),
        "lower": Thing(person.lower.kind, tone("lower", person.lower.colour), person.lower.pattern),
        "shoes": Thing("shoes", tone("shoes", person.shoes)),
        "bag": Thing(person.bag, tone("bag", person.accent)),
    }
    return {part: thing for part, thing in things.items() if thing.kind != "none"}


def misread(things: Mapping[str, Thing], infrared: bool, rng: Generator) -> dict[str, Thing]:
    """`things` with each one, at `ERROR_RATE`, left out or of a wrong kind, tone or pattern."""
    seen: dict[str, Thing] = {}
    for part, thing in things.items():
        found = _mistake(part, thing, infrared, rng) if rng.random() < ERROR_RATE else thing
        if found is not None:
            seen[part] = found
    return seen


def tell(things: Mapping[str, Thing], template: int, rng: Generator) -> str:
    """`things` in words, by one of `TEMPLATES`."""
    subject, clauses = TEMPLATES[template]
    told = []
    for lead, parts in clauses:
        named = [_name(things[part], rng) for part in parts if part in things]
        if named:
            *before, last = named
            told.append(f"{lead} {', '.join(before)} and {last}" if before else f"{lead} {last}")
    return f"{subject} {', '.join(told)}".strip()


def _mistake(part: str, thing: Thing, infrared: bool, rng: Generator) -> Thing | None:
    def other(options: Sequence[T], right: T) -> list[T]:
        """One of the other options, or none where there is none."""
        wrong = [option for option in options if option != right]
        return [wrong[int(rng.integers(len(wrong)))]] if wrong else []

    tones: Sequence[str] = SHADES if infrared else list(HAIR_SHADES if part == "hair" else COLOURS)
    mistakes: list[Thing | None] = [None]
    mistakes += [replace(thing, kind=kind) for kind in other(KINDS[part], thing.kind)]
    if thing.kind != "shaved":
        mistakes += [replace(thing, tone=tone) for tone in other(tones, thing.tone)]
    if part in ("upper", "lower"):
        mistakes += [replace(thing, pattern=pattern) for pattern in other(PATTERNS, thing.pattern)]
    return mistakes[int(rng.integers(len(mistakes)))]


def _name(thing: Thing, rng: Generator) -> str:
    def one(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    adjectives = f"{one(TONE_WORDS.get(thing.tone, (thing.tone,)))} {one(PATTERN_WORDS[thing.pattern])}"
    name = " ".join(one(WORDS[thing.kind]).format(adjectives).split())
    return re.sub(r"^a (?=[aeiou])", "an ", name)
