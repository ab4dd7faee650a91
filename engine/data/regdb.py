"""RegDB: `<root>/{Visible,Thermal}/<n>/<name>.bmp`, ten splits in `<root>/idx` (Nguyen et al., Sensors 2017)."""

from __future__ import annotations

from pathlib import Path

from engine.data import layout
from engine.data.dataset import Dataset, Images, Protocol, Trial
from engine.errors import UserError
from engine.pair import Pair

NAMES = Pair(vis="visible", ir="thermal")
CAMERAS = Pair(vis=1, ir=2)
OFFICIAL = {
    f"{part} {count_of}": count
    for part in ("training", "test")
    for count_of, count in (("identities", 206), ("visible images", 2060), ("infrared images", 2060))
}


def read(root: str | Path, *, trial: int = 1) -> Dataset:
    """Read one of RegDB's ten splits; training and test parts come from the same one, as another one's would leak.

    Protocols: "visible to infrared" (the main one) and "infrared to visible", all images of one modality against all of
    the other, one trial. Published numbers are means over ten runs, one per split.

    Args:
        root: folder with Visible, Thermal and idx.
        trial: split 1 to 10.

    Raises:
        UserError: no such split; a split file is missing, empty or malformed; images are missing, or both trained on
            and scored.
    """
    if trial not in range(1, 11):
        raise UserError(f"data.trial must be 1 to 10 for RegDB, got {trial}")
    sign = f"idx/train_visible_{trial}.txt"
    root = layout.existing_root(root, "a folder with Visible, Thermal and idx", sign)
    train = NAMES.map(lambda name, camera: _list(root, f"train_{name}_{trial}.txt", camera), CAMERAS)
    test = NAMES.map(lambda name, camera: _list(root, f"test_{name}_{trial}.txt", camera), CAMERAS)
    shared = sorted(set(train.vis.paths + train.ir.paths) & set(test.vis.paths + test.ir.paths))
    if shared:
        raise UserError(
            f"{root / 'idx'}, split {trial}: images both trained on and scored: {layout.some(shared)}; "
            "restore the split files"
        )
    found = {
        f"{part} {count_of}": count
        for part, images in (("training", train), ("test", test))
        for count_of, count in (
            ("identities", len({*images.vis.ids, *images.ir.ids})),
            ("visible images", len(images.vis)),
            ("infrared images", len(images.ir)),
        )
    }
    counted = layout.check_counts(f"RegDB in {root}, split {trial},", found, OFFICIAL)
    layout.check_matches(f"RegDB in {root}, split {trial}", test.vis, test.ir)
    vis, ir = test.map(layout.everything)
    protocols = (
        Protocol("visible to infrared", "vis", (Trial(vis, ir),), "plain"),
        Protocol("infrared to visible", "ir", (Trial(ir, vis),), "plain"),
    )
    return Dataset(f"RegDB split {trial}", train, test, protocols, counted)


def _list(root: Path, name: str, camera: int) -> Images:
    paths, labels = layout.read_list(root, f"idx/{name}")
    return layout.collect((path, label, camera) for path, label in zip(paths, labels, strict=True))
