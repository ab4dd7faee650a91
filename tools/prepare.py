"""Check a downloaded data set, and decode its images into the cache, so that training begins at once.

python tools/prepare.py --cfg sysu.yaml --set data.root=/data/SYSU-MM01

Prints what was found beside the official counts, every image that is missing or cannot be read, and how many images have captions
where there are caption files. Nothing is copied or renamed, and nothing is written but the cache (`data.cache`).

Exit code: 0 = complete; 1 = it can be trained on, but counts differ from the official ones or captions are missing; 2 = it cannot,
as where the method needs those captions.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine import config, data, report
from engine.config import Config
from engine.data import captions, layout
from engine.data.cache import Unreadable
from engine.data.dataset import Dataset, Images
from engine.errors import UserError, command, run_tool
from engine.evaluate import decode_part
from engine.features import NAMES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="NAME", required=True, help="the configuration whose data set is prepared")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one setting")
    arguments = parser.parse_args()
    settings = config.load(arguments.cfg, arguments.set)
    dataset = data.read(settings.data)
    print(f"{dataset.name} in {', '.join(source.root for source in settings.data.sources.values())}\n")
    print(f"{count_table(dataset)}\n")
    uncaptioned = describe_captions(dataset, settings)
    lacking = [*differences(dataset), *uncaptioned]
    broken = decode(dataset, settings)
    if broken:
        print("\ncannot be read:", *broken, sep="\n  ")
        raise UserError(f"{len(broken)} images cannot be read; replace or remove them")
    if lacking:
        print("\nnot complete:", *lacking, sep="\n  ")
    if uncaptioned and needs_captions(settings):
        raise UserError(
            f"{settings.method.name} cannot be trained without these captions; make them by {command('caption')}, or where "
            f"single ones lack, set {settings.method.name}.missing_caption to 'empty'"
        )
    changes = "".join(f" --set {shlex.quote(change)}" for change in arguments.set)
    print(f"\n{'can be trained on' if lacking else 'ready'}: {command('train')} --cfg {arguments.cfg}{changes}")
    return 1 if lacking else 0


def parts(dataset: Dataset) -> dict[str, Images]:
    """The images by what they are called on the progress bar and in the cache."""
    found = {"training": dataset.train} | ({"test": dataset.test} if dataset.test else {})
    return {f"{word} {part}": images[modality] for part, images in found.items() for modality, word in NAMES.items()}


def count_table(dataset: Dataset) -> str:
    """What was counted by the reader, and of parts that it did not count, the images."""
    counts = dict(dataset.counts) or {f"{name} images": (len(images), None) for name, images in parts(dataset).items()}
    rows = [
        [
            name,
            f"{found:,}",
            "" if official is None else f"{official:,}",
            "" if official in (None, found) else "differs",
        ]
        for name, (found, official) in counts.items()
    ]
    return report.markdown([["", "found", "official", ""], *rows])


def differences(dataset: Dataset) -> list[str]:
    """Counts that are not the official ones, in words."""
    return [
        f"{name}: {found:,} instead of {official:,}"
        for name, (found, official) in dataset.counts.items()
        if official not in (None, found)
    ]


def describe_captions(dataset: Dataset, settings: Config) -> list[str]:
    """Print how many images have captions, if there are any; returns what is lacking.

    Raises:
        UserError: a caption file is damaged.
    """
    read = getattr(settings.settings, "captions", None)  # the method's own files
    root = Path(os.path.abspath(Path(settings.data.root).expanduser()))
    lacking = []
    for modality, word in NAMES.items():
        file = captions.place((read or captions.FILES)[modality], root)
        if not file.is_file():
            if read:
                lacking.append(
                    f"{file}: not there, and {settings.method.name} reads captions; see {command('caption')} --help"
                )
            continue
        texts = captions.load(file, root)
        for name, images in parts(dataset).items():
            if not name.startswith(word):
                continue
            bare = [path for path in images.paths if not all(texts.get(os.path.abspath(path), ("", "")))]
            print(f"captions: {len(images) - len(bare):,} of {len(images):,} {name} images ({file.name})")
            if bare:
                lacking.append(f"{file}: no caption or no paraphrase of {layout.some(bare)} {name} images")
    return lacking


def needs_captions(settings: Config) -> bool:
    """Whether the method refuses to train where captions are missing."""
    own = settings.settings
    if not hasattr(own, "captions") or not own.vspf.enabled:
        return False
    root = Path(os.path.abspath(Path(settings.data.root).expanduser()))
    return own.missing_caption == "error" or not all(captions.place(file, root).is_file() for file in own.captions)


def decode(dataset: Dataset, settings: Config) -> Sequence[str]:
    """Decode all images, and print where they are; returns a line for each that cannot be read."""
    broken: list[str] = []
    for name, images in parts(dataset).items():
        try:
            pixels = decode_part(images, settings, name)
        except Unreadable as error:
            broken += error.files
        else:
            assert isinstance(pixels, np.memmap)
            print(f"decoded: {len(pixels):,} {name} images, {pixels.nbytes / 1e6:,.1f} MB in {pixels.filename}")
    return broken


if __name__ == "__main__":
    run_tool(main)
