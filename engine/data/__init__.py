"""Data sets: readers of the public layouts, decoded images in a cache, augmentation on the device, batch sampling."""

from __future__ import annotations

from engine.config import Data, Source
from engine.data import folder, llcm, regdb, sysu, unified
from engine.data.dataset import Dataset
from engine.errors import UserError


def read(settings: Data) -> Dataset:
    """The data set that the settings name, joined with those of `data.also`.

    Raises:
        UserError: one is missing, damaged or incomplete; the message names the path and what was expected there. Or two
            share images.
    """
    first = _read(settings)
    others = [_read_other(place, source) for place, source in settings.sources.items() if source is not settings]
    return unified.join([first, *others]) if others else first


def _read_other(place: str, source: Source) -> Dataset:
    """A data set of `data.also`; errors name its own settings where readers speak of data.root or data.gallery."""
    try:
        return _read(source)
    except UserError as error:
        raise UserError(f"{place} ({source.name}): {error}".replace(" data.", f" {place}.")) from error


def _read(settings: Source) -> Dataset:
    match settings.name:
        case "sysu":
            return sysu.read(settings.root, split=settings.split, gallery=settings.gallery)
        case "regdb":
            return regdb.read(settings.root, trial=settings.trial)
        case "llcm":
            return llcm.read(settings.root)
        case "folder":
            return folder.read(settings.root, query=settings.query)
        case "demo":
            from engine.data import demo  # only it needs the generator

            return demo.read(settings.root, split=settings.split)
