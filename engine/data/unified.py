"""Several data sets as one: trained on together, each scored by its own protocols (SALCR, sec. 4.6 h)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.data import layout
from engine.data.dataset import Dataset, Images, Protocol, Trial
from engine.errors import UserError
from engine.pair import Pair

NOTHING = Images((), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def join(datasets: Sequence[Dataset]) -> Dataset:
    """Data sets one after the other.

    No two of them share an identity, nor a camera that is trained on: numbers are shifted, -1 (unknown) stays. Test
    images keep their cameras, since the rules of protocols go by their numbers and a protocol ranks the images of one
    data set alone. Its name begins with the data set's: "RegDB split 1: visible to infrared"; the first protocol of the
    first data set is the main one.

    Args:
        datasets: at least one; those without test images are trained on only.

    Raises:
        UserError: two hold the same image, which would be trained on as two people, or be both trained on and scored.
    """
    _refuse_shared(datasets)
    names = _names(datasets)
    trains, tests, protocols = [], [], []
    ids, cams, rows = 0, 0, Pair(0, 0)
    for name, dataset in zip(names, datasets, strict=True):
        train, test = dataset.train, dataset.test or Pair(NOTHING, NOTHING)
        trains.append([_shift(images, ids, cams) for images in train])
        tests.append([_shift(images, ids, 0) for images in test])
        protocols += [_move(protocol, name, rows) for protocol in dataset.protocols]
        ids += 1 + max(int(images.ids.max(initial=-1)) for images in (*train, *test))
        cams += 1 + max(int(images.cams.max(initial=-1)) for images in train)
        rows = rows.map(lambda row, images: row + len(images), test)
    return Dataset(
        " + ".join(names),
        _concatenate(trains),
        _concatenate(tests) if protocols else None,
        tuple(protocols),
        {
            f"{name}: {key}": pair
            for name, data in zip(names, datasets, strict=True)
            for key, pair in data.counts.items()
        },
    )


def _refuse_shared(datasets: Sequence[Dataset]) -> None:
    parts = [[*data.train, *(data.test or ())] for data in datasets]
    count = Counter(path for images in parts for path in {path for part in images for path in part.paths})
    shared = sorted(path for path in count if count[path] > 1)
    if shared:
        raise UserError(f"data.also: images in more than one data set: {layout.some(shared)}; join different ones")


def _names(datasets: Sequence[Dataset]) -> list[str]:
    """The data sets' names; a number tells those apart that have the same."""
    names = [data.name for data in datasets]
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _shift(images: Images, ids: int, cams: int) -> Images:
    """The images with these numbers added to the identities and cameras that are known."""
    columns = (np.where(known < 0, -1, known + start) for known, start in ((images.ids, ids), (images.cams, cams)))
    return Images(images.paths, *columns)


def _concatenate(parts: Sequence[Sequence[Images]]) -> Pair[Images]:
    """The images of all parts, each of which has visible and infrared ones."""
    return Pair(
        *(
            Images(
                tuple(path for part in side for path in part.paths),
                np.concatenate([part.ids for part in side]),
                np.concatenate([part.cams for part in side]),
            )
            for side in zip(*parts, strict=True)
        )
    )


def _move(protocol: Protocol, name: str, start: Pair[int]) -> Protocol:
    """A protocol of the data set `name`, whose test images begin at the rows `start`."""
    queries, gallery = start if protocol.query == "vis" else start.swap()
    trials = tuple(Trial(trial.queries + queries, trial.gallery + gallery) for trial in protocol.trials)
    return replace(protocol, name=f"{name}: {protocol.name}", trials=trials)
