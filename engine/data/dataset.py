"""What every data-set reader returns: lists of image files and the protocols to test on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from engine.pair import Modality, Pair


@dataclass(frozen=True)
class Images:
    """The image files of one modality, in a fixed order.

    Attributes:
        paths: N absolute paths.
        ids: [N] int64 identities for scoring only, -1 where unknown. Training never reads them.
        cams: [N] int64 camera numbers, -1 where unknown.
    """

    paths: tuple[str, ...]
    ids: np.ndarray
    cams: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Trial:
    """One draw of a protocol: rows of the query modality's and of the other modality's test images."""

    queries: np.ndarray
    gallery: np.ndarray


@dataclass(frozen=True)
class Protocol:
    """How one score is made: queries of one modality against galleries of the other, averaged over the trials.

    Attributes:
        name: for example "all single-shot"; the row's label in every table.
        query: modality of the queries; the gallery is of the other one.
        rule: filter of `engine.ops.rank`: "plain", "sysu" or "llcm".
    """

    name: str
    query: Modality
    trials: tuple[Trial, ...]
    rule: str


@dataclass(frozen=True)
class Dataset:
    """A data set, ready to train on and to be scored on.

    Attributes:
        test: the test images of both modalities, or None when there is nothing to score on.
        protocols: the first one is the main one (best epoch, progress lines).
        counts: what was counted, by name: what was found, and what the complete data set has (None where nobody says).
    """

    name: str
    train: Pair[Images]
    test: Pair[Images] | None
    protocols: tuple[Protocol, ...]
    counts: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
