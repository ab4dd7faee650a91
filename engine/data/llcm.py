"""LLCM: `<root>/{vis,nir,test_vis,test_nir}`, split files in `<root>/idx` (Zhang and Wang, CVPR 2023).

Training images are listed in idx/train_vis.txt and idx/train_nir.txt, lines `relative/path label`, the camera in the name
(`0001_c01_s185535_f7010_vis.jpg`). Test images lie in `test_vis/cam{1..9}/{identity:04d}/` and `test_nir/cam{1..9}/...`
(there is no near-infrared camera 3), their identities in idx/test_id.txt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from engine.data import layout
from engine.data.dataset import Dataset, Images, Protocol
from engine.errors import UserError
from engine.pair import Pair

NAMES = Pair(vis="vis", ir="nir")
CAMERAS = Pair(vis=(1, 2, 3, 4, 5, 6, 7, 8, 9), ir=(1, 2, 4, 5, 6, 7, 8, 9))
OFFICIAL = {
    "training identities": 713,
    "visible training images": 16946,
    "infrared training images": 13975,
    "test identities": 351,
}
_CAMERA = re.compile(r"_c(\d{1,9})(?!\d)")


def read(root: str | Path) -> Dataset:
    """Read LLCM.

    Protocols, ten seeded trials each, one image per (identity, camera) drawn as `layout.choose_random` does; all keep
    the rule "llcm": gallery images of the query's identity and camera are removed.

    - "infrared to visible" (the main one): all infrared images query a drawn visible gallery.
    - "visible to infrared (paper)": all visible images query a drawn infrared gallery.
    - "visible to infrared (official-script)": as the authors' script scores it, transposed: the drawn infrared images
      query all visible ones.

    Raises:
        UserError: a folder or split file is missing, unreadable, empty or malformed, or listed images are missing.
    """
    root = layout.existing_root(root, "a folder with vis, nir, test_vis, test_nir and idx", "idx/train_vis.txt")
    train = NAMES.map(lambda name: _list_train(root, f"idx/train_{name}.txt"))
    identities = layout.read_ids(root / "idx" / "test_id.txt")
    test = NAMES.map(lambda name, cameras: _list_test(root / f"test_{name}", identities, cameras), CAMERAS)
    found = {
        "training identities": len({*train.vis.ids, *train.ir.ids}),
        "visible training images": len(train.vis),
        "infrared training images": len(train.ir),
        "test identities": len({*test.vis.ids, *test.ir.ids}),
    }
    counted = layout.check_counts(f"LLCM in {root}", found, OFFICIAL)
    layout.check_matches(f"LLCM in {root}", test.vis, test.ir)
    return Dataset("LLCM", train, test, _protocols(test), counted)


def _list_train(root: Path, name: str) -> Images:
    paths, labels = layout.read_list(root, name)
    found = [_CAMERA.search(Path(path).name) for path in paths]
    cameras = [int(match[1]) if match else -1 for match in found]
    return layout.collect(zip(paths, labels, cameras, strict=True))


def _list_test(root: Path, identities: Sequence[int], cameras: Sequence[int]) -> Images:
    for camera in cameras:
        layout.existing(root / f"cam{camera}", f"the test images of camera {camera}")
    rows = [
        (path, identity, camera)
        for identity in identities
        for camera in cameras
        if (folder := root / f"cam{camera}" / f"{identity:04d}").is_dir()
        for path in layout.list_images(folder)
    ]
    if not rows:
        raise UserError(f"{root}: no image of the {len(identities)} identities in idx/test_id.txt")
    return layout.collect(rows)


def _protocols(test: Pair[Images]) -> tuple[Protocol, ...]:
    drawn = test.map(lambda images, cameras: layout.draw_galleries(images, cameras, layout.choose_random(1)), CAMERAS)
    whole = test.map(lambda images: [layout.everything(images)] * layout.TRIAL_COUNT)
    return (
        Protocol("infrared to visible", "ir", layout.trials(whole.ir, drawn.vis), "llcm"),
        Protocol("visible to infrared (paper)", "vis", layout.trials(whole.vis, drawn.ir), "llcm"),
        Protocol("visible to infrared (official-script)", "ir", layout.trials(drawn.ir, whole.vis), "llcm"),
    )
