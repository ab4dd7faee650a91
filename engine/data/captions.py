"""What the images show, in words: caption files, one per modality.

The layout is the one in which the field passes captions around, a JSON object

    {"<image path relative to the data set's root>": {"description": "...", "aug_description": "..."}}

with a caption and a paraphrase of it. `tools/caption.py` writes such files; training only reads them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import checkpoint
from engine.data import layout
from engine.data.dataset import Images
from engine.errors import UserError, command
from engine.pair import Pair

FILES = Pair(vis="captions_vis.json", ir="captions_ir.json")
"""Where a data set's captions are looked for in its root, unless told otherwise."""


@dataclass(frozen=True)
class Captions:
    """The captions of one modality, in the order of its images.

    Attributes:
        description: N captions.
        paraphrase: N captions that say the same in other words.
    """

    description: list[str]
    paraphrase: list[str]

    def __len__(self) -> int:
        return len(self.description)


def read(
    images: Pair[Images],
    root: str | os.PathLike[str],
    files: Pair[str] | Pair[Path] = FILES,
    missing: Literal["error", "empty"] = "error",
) -> Pair[Captions]:
    """The captions of `images`.

    A file may hold captions of more images, as of test images when `images` are those to train on. Those of files that
    do not exist are counted in a warning.

    Args:
        images: the images to be described, of one data set or of several.
        root: the folder that paths in the files are relative to; also where `files` are that are bare names.
        files: caption files.
        missing: what is done about images without a caption or a paraphrase. "error" refuses. "empty" warns and lets
            the one stand in for the other, or the empty text for both.

    Raises:
        UserError: a file is missing, damaged or of another layout, or captions are missing and `missing` is "error".
    """
    if missing not in ("error", "empty"):
        raise UserError(f"firm.missing_caption must be 'error' or 'empty', got {missing!r}")
    root = Path(os.path.abspath(Path(root).expanduser()))
    return images.map(lambda side, file: _align(side, root, place(file, root), missing), files)


def load(file: Path, root: Path) -> dict[str, tuple[str, str]]:
    """All captions of a file: absolute path of the image -> (caption, paraphrase), "" for what is not there.

    Paths in the file may be written with "./", a slash or the root's own name before them, or with backslashes. Of an
    image that is there twice, the last one counts.

    Raises:
        UserError: the file is missing, not JSON, or of another layout.
    """
    what = 'a JSON object {"<image path>": {"description": "...", "aug_description": "..."}}'
    if not file.is_file():
        raise UserError(
            f"{file} not found: expected captions of the images in {root}, {what}; put the file there, name "
            f"another one in firm.captions, or make it: {command('caption')} --help"
        )
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}): expected {what}; copy or make it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a JSON {type(content).__name__}: expected {what}; copy or make it again")
    wrong = [key for key, entry in content.items() if not _is_entry(entry)]
    if wrong:
        raise UserError(f"{file}: {layout.some(wrong)} of {len(content)} entries are not as in {what}; correct them")
    nested = (root / root.name).exists()
    return {
        _absolute(key, root, nested): (_tidy(entry.get("description", "")), _tidy(entry.get("aug_description", "")))
        for key, entry in content.items()
    }


def save(file: Path, root: Path, captions: Mapping[str, tuple[str, str]]) -> None:
    """Write a caption file, whole or not at all; `captions` are as `load` returns them.

    Raises:
        UserError: the folder is full or cannot be written to.
    """
    content = {
        os.path.relpath(path, root): {"description": description, "aug_description": paraphrase}
        for path, (description, paraphrase) in captions.items()
    }
    remedy = "make room or choose another folder"
    checkpoint.write(file, json.dumps(content, indent=1, ensure_ascii=False).encode(), remedy)


def place(file: str | Path, root: Path) -> Path:
    """A bare name is a file in the root; anything else is a path like any other."""
    path = os.path.expanduser(file)
    return root / path if os.path.basename(path) == path else Path(path)


def _align(images: Images, root: Path, file: Path, missing: str) -> Captions:
    found = load(file, root)
    paths = [os.path.abspath(path) for path in images.paths]
    rows = [found.get(path, ("", "")) for path in paths]
    gone = [os.path.relpath(path, root) for path in found.keys() - set(paths) if not os.path.exists(path)]
    if gone:
        warnings.warn(f"{file}: captions of images that do not exist: {layout.some(sorted(gone))}", stacklevel=4)
    lacking = [os.path.relpath(path, root) for path, row in zip(paths, rows, strict=True) if not all(row)]
    if lacking:
        problem = (
            f"{file}: no description or no aug_description for {layout.some(lacking)} of {len(paths)} images in {root}"
        )
        if missing == "error":
            raise UserError(
                f"{problem}; add them by {command('caption')}, or set firm.missing_caption to 'empty' to go on without"
            )
        warnings.warn(problem, stacklevel=4)
    return Captions([one or other for one, other in rows], [other or one for one, other in rows])


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name, ""), str) for name in ("description", "aug_description")
    )


def _tidy(text: str) -> str:
    """One line of text that can be encoded: JSON may hold half a surrogate pair."""
    return " ".join(text.encode(errors="replace").decode().split())


def _absolute(key: str, root: Path, nested: bool) -> str:
    """The image that a key means; `nested` says that the root has a subfolder of its own name."""
    path = os.path.normpath(key.replace("\\", "/"))
    if os.path.isabs(path) and not Path(path).is_relative_to(root):
        path = path.lstrip("/")
    first, _, rest = path.partition("/")
    return os.path.normpath(root / (rest if first == root.name and rest and not nested else path))
