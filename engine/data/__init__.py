"""Data sets: readers of the public layouts, decoded images in a cache, augmentation on the device, batch sampling."""

from __future__ import annotations

from engine.config import Data
from engine.data import folder, llcm, regdb, sysu
from engine.data.dataset import Dataset


def read(settings: Data) -> Dataset:
    """The data set that the settings name.

    Raises:
        UserError: it is missing, damaged or incomplete; the message names the path and what was expected there.
    """
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
