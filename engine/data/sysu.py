"""SYSU-MM01: `<root>/cam{1..6}/{identity:04d}/{number:04d}.jpg`, split files in `<root>/exp` (Wu et al., ICCV 2017)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from engine.data import layout
from engine.data.dataset import Dataset, Images, Protocol
from engine.errors import UserError
from engine.pair import Pair

CAMERAS = Pair(vis=(1, 2, 4, 5), ir=(3, 6))
SEARCHES = {"all": (1, 2, 4, 5), "indoor": (1, 2)}
SHOTS = {"single-shot": 1, "multi-shot": 10}
OFFICIAL: Mapping[str, Mapping[str, int]] = {
    "test": {
        "training identities": 395,
        "visible training images": 22258,
        "infrared training images": 11909,
        "test identities": 96,
        "infrared queries": 3803,
        "all single-shot gallery": 301,
        "indoor single-shot gallery": 112,
    },
    "val": {"training identities": 296, "test identities": 99},
}


def read(
    root: str | Path,
    *,
    split: Literal["test", "val"] = "test",
    gallery: Literal["agw", "official"] = "agw",
    counts: Mapping[str, Mapping[str, int]] = OFFICIAL,
) -> Dataset:
    """Read SYSU-MM01 or anything in its layout.

    Protocols, ten galleries each, infrared queries of cameras 3 and 6: "all single-shot" (the main one), "all
    multi-shot", "indoor single-shot", "indoor multi-shot". All keep the data set's rule "sysu": a query of camera 3
    never sees gallery camera 2.

    Args:
        root: folder with cam1 to cam6 and exp.
        split: "test" trains on the train and val identities and scores the test ones; "val" trains on the train
            identities and scores the val ones.
        gallery: "agw" draws as public code does (`layout.choose_random`); "official" reads exp/rand_perm_cam.mat.
        counts: per split, what a complete data set holds; a warning names every number that differs.

    Raises:
        UserError: a folder or split file is missing, unreadable, empty or malformed, or identities are both trained on
            and scored.
    """
    root = layout.existing_root(root, "a folder with cam1 to cam6 and exp", "exp/train_id.txt")
    splits = {name: layout.read_ids(root / "exp" / f"{name}_id.txt") for name in ("train", "val", "test")}
    train_ids = splits["train"] + (splits["val"] if split == "test" else [])
    shared = sorted(set(train_ids) & set(splits[split]))
    if shared:
        listed = layout.some([str(identity) for identity in shared])
        raise UserError(f"{root / 'exp'}: identities both trained on and scored: {listed}; restore the split files")
    train = CAMERAS.map(lambda cameras: _list(root, train_ids, cameras))
    test = CAMERAS.map(lambda cameras: _list(root, splits[split], cameras))
    protocols = tuple(_protocol(root, test, search, shots, gallery) for search in SEARCHES for shots in SHOTS)
    found = {
        "training identities": len({*train.vis.ids, *train.ir.ids}),
        "visible training images": len(train.vis),
        "infrared training images": len(train.ir),
        "test identities": len({*test.vis.ids, *test.ir.ids}),
        "infrared queries": len(test.ir),
        **{f"{protocol.name} gallery": len(protocol.trials[0].gallery) for protocol in protocols},
    }
    counted = layout.check_counts(f"SYSU-MM01 in {root}", found, counts[split])
    layout.check_matches(f"SYSU-MM01 in {root}", test.vis, test.ir)
    return Dataset("SYSU-MM01", train, test, protocols, counted)


def _list(root: Path, identities: Sequence[int], cameras: Sequence[int]) -> Images:
    """Images of some identities; an identity that a camera never saw has no folder there."""
    for camera in cameras:
        layout.existing(root / f"cam{camera}", f"the images of camera {camera}")
    rows = [
        (path, identity, camera)
        for identity in sorted(identities)
        for camera in cameras
        if (folder := root / f"cam{camera}" / f"{identity:04d}").is_dir()
        for path in layout.list_images(folder)
    ]
    if not rows:
        folders = ", ".join(f"cam{camera}" for camera in cameras)
        raise UserError(f"{root}: no image of {len(identities)} identities in {folders}; check exp/*_id.txt")
    return layout.collect(rows)


def _protocol(root: Path, test: Pair[Images], search: str, shots: str, gallery: str) -> Protocol:
    count = SHOTS[shots]
    begin = layout.choose_random(count) if gallery == "agw" else _choose_official(root, test.vis, count)
    galleries = layout.draw_galleries(test.vis, SEARCHES[search], begin)
    queries = [layout.everything(test.ir)] * len(galleries)
    return Protocol(f"{search} {shots}", "ir", layout.trials(queries, galleries), "sysu")


def _choose_official(root: Path, images: Images, shot_count: int) -> Callable[[int], layout.Choose]:
    """The first images of the authors' permutations: cell (camera, identity) holds a row of image numbers per trial."""
    file = root / "exp" / "rand_perm_cam.mat"
    permutations = _load_permutations(file)

    def choose(trial: int, identity: int, camera: int, rows: layout.Rows) -> layout.Rows:
        by_number = {Path(images.paths[row]).stem.lstrip("0"): row for row in rows}
        try:
            numbers = np.atleast_2d(permutations[camera - 1][identity - 1])[trial][:shot_count]
            return [by_number[str(int(number))] for number in numbers]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file}: trial {trial}, camera {camera}, identity {identity} does not fit the images ({error!r}); "
                "restore the file and the images, or set data.gallery to 'agw'"
            ) from error

    return lambda trial: partial(choose, trial)


def _load_permutations(file: Path) -> list[np.ndarray]:
    """Per camera, an object array with one [trials, images] array of image numbers per identity."""
    from scipy.io import loadmat  # half a second to import, and few need it

    remedy = "take it from the authors' evaluation code, or set data.gallery to 'agw'"
    layout.existing(file, "the authors' gallery permutations", remedy)
    try:
        cells = loadmat(str(file))["rand_perm_cam"].reshape(-1)
        return [cells[camera].reshape(-1) for camera in range(6)]
    except Exception as error:  # loadmat raises anything from struct.error to MatReadError on a damaged file
        raise UserError(f"{file} is not rand_perm_cam.mat of SYSU-MM01 ({error!r}); {remedy}") from error
