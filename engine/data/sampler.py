"""Which images form the batches of an epoch. Labels are pseudo-labels; -1 (no cluster) is never drawn."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

from engine.errors import UserError
from engine.pair import Pair

Positions = dict[int, np.ndarray]


def independent_batches(
    labels: Pair[np.ndarray], *, label_count: int, image_count: int, iterations: int, rng: np.random.RandomState
) -> Iterator[Pair[np.ndarray]]:
    """Batches of stage 1: in each modality `label_count` labels x `image_count` images, drawn independently.

    All batches have one shape: with fewer labels than asked for, every label comes and some come again; a label with too
    few images draws them with replacement. The order of draws is that of the SALCR release.

    Args:
        labels: per modality [N] int64 cluster labels, -1 for none.

    Returns:
        Per iteration and modality, [label_count * image_count] int64 rows, the images of a label side by side.

    Raises:
        UserError: a modality has no cluster.
    """
    _check_counts(label_count=label_count, image_count=image_count)
    positions = labels.map(_positions)
    for modality, found in (("visible", positions.vis), ("infrared", positions.ir)):
        _check_labels(len(found), label_count, f"{modality} clusters")

    def batches() -> Iterator[Pair[np.ndarray]]:
        for _ in range(iterations):
            chosen = positions.map(lambda found: _choose_labels(np.array(list(found)), label_count, rng))
            rows = [
                (_draw(positions.vis[vis], image_count, rng), _draw(positions.ir[ir], image_count, rng))
                for vis, ir in zip(chosen.vis, chosen.ir, strict=True)
            ]
            yield _join(rows)

    return batches()


def paired_batches(
    own: Pair[np.ndarray],
    cross: Pair[np.ndarray],
    *,
    label_count: int,
    image_count: int,
    iterations: int,
    rng: np.random.RandomState,
) -> Iterator[Pair[np.ndarray]]:
    """Batches of stage 2: half of the labels from the visible label space, half from the infrared one (the rest of an
    odd number from the visible one; all from one where the other has none that both modalities carry).

    A visible label is carried by visible images (`own.vis`) and by infrared ones (`cross.ir`), an infrared label by
    `own.ir` and `cross.vis`; only labels that both modalities carry are drawn. The i-th visible and the i-th infrared
    image of a batch share a label and form a positive pair. Labels and images repeat as in `independent_batches`.

    Args:
        own: per modality [N] int64 labels in the modality's own label space, -1 for none.
        cross: per modality [N] int64 labels in the other modality's label space, -1 for none.
        label_count: labels of a batch.
        image_count: images per label and modality.

    Returns:
        Per iteration and modality, [label_count * image_count] int64 rows; visible labels come first.

    Raises:
        UserError: no label of either space is carried by both modalities.
    """
    _check_counts(label_count=label_count, image_count=image_count)
    spaces = Pair(vis=Pair(own.vis, cross.ir), ir=Pair(cross.vis, own.ir)).map(lambda space: space.map(_positions))
    shared = spaces.map(lambda space: np.array([label for label in space.vis if label in space.ir], dtype=np.int64))
    counts = Pair(label_count - label_count // 2, label_count // 2)
    if not len(shared.vis) or not len(shared.ir):
        counts = shared.map(lambda labels: label_count if len(labels) else 0)
    what = "labels that both modalities carry"
    _check_labels(max(map(len, shared)), 1, what)
    for labels, count in zip(shared, counts, strict=True):
        if len(labels):
            _check_labels(len(labels), count, what)

    def batches() -> Iterator[Pair[np.ndarray]]:
        for _ in range(iterations):
            chosen = shared.map(lambda labels, count: _choose_labels(labels, count, rng), counts)
            rows = [
                (_draw(space.vis[label], image_count, rng), _draw(space.ir[label], image_count, rng))
                for space, labels in zip(spaces, chosen, strict=True)
                for label in labels
            ]
            yield _join(rows)

    return batches()


def joint_batches(
    labels: Pair[np.ndarray], *, label_count: int, image_count: int, iterations: int, rng: np.random.RandomState
) -> Iterator[Pair[np.ndarray]]:
    """Batches of labels that both modalities share from the start, though not each of them has images of both.

    Half of the labels (the larger half) are drawn among those with visible images, the others among those with infrared
    ones. The i-th visible and the i-th infrared images are of one label where it has both; else a label that the other
    modality alone has stands in, or any that it has where there is none. Labels and images repeat as in
    `independent_batches`.

    Args:
        labels: per modality [N] int64 labels, -1 for none.

    Returns:
        Per iteration and modality, [label_count * image_count] int64 rows, the images of a label side by side.

    Raises:
        UserError: a modality has no labelled image.
    """
    _check_counts(label_count=label_count, image_count=image_count)
    positions = labels.map(_positions)
    for modality, found in (("visible", positions.vis), ("infrared", positions.ir)):
        _check_labels(len(found), 1, f"clusters with {modality} images")
    counts = Pair(label_count - label_count // 2, label_count // 2)
    known = positions.map(lambda found: np.array(list(found)))
    lonely = Pair(np.setdiff1d(known.vis, known.ir), np.setdiff1d(known.ir, known.vis))
    others = lonely.map(lambda alone, every: alone if len(alone) else every, known)

    def batches() -> Iterator[Pair[np.ndarray]]:
        for _ in range(iterations):
            pairs = [
                (label, label if label in positions.ir else rng.choice(others.ir))
                for label in _choose_labels(known.vis, counts.vis, rng)
            ]
            # A label comes twice only where there are too few.
            left = np.setdiff1d(known.ir, [label for pair in pairs for label in pair])
            infrared = _choose_labels(left if len(left) >= counts.ir else known.ir, counts.ir, rng)
            pairs += [(label if label in positions.vis else rng.choice(others.vis), label) for label in infrared]
            yield _join(
                [
                    (_draw(positions.vis[vis], image_count, rng), _draw(positions.ir[ir], image_count, rng))
                    for vis, ir in pairs
                ]
            )

    return batches()


def _positions(labels: np.ndarray) -> Positions:
    """Rows of each label, ascending in both; -1 has none."""
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    groups = zip(found.tolist(), np.split(order, starts[1:]), strict=True) if len(labels) else ()
    return {label: rows for label, rows in groups if label >= 0}


def _choose_labels(labels: np.ndarray, count: int, rng: np.random.RandomState) -> np.ndarray:
    """`count` labels: all different when there are enough, else every label before any comes again."""
    if len(labels) >= count:
        return rng.choice(labels, count, replace=False)
    return np.concatenate([rng.permutation(labels), rng.choice(labels, count - len(labels))])


def _draw(rows: np.ndarray, count: int, rng: np.random.RandomState) -> np.ndarray:
    """`count` of a label's images, with replacement when it has fewer."""
    return rng.choice(rows, count, replace=len(rows) < count)


def _join(rows: list[tuple[np.ndarray, np.ndarray]]) -> Pair[np.ndarray]:
    vis, ir = zip(*rows, strict=True)
    return Pair(np.concatenate(vis), np.concatenate(ir))


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _check_labels(found: int, wanted: int, what: str) -> None:
    if found == 0:
        raise UserError(f"there are no {what}, so no batch can be drawn; raise cluster eps or lower its min_samples")
    if found < wanted:
        warnings.warn(f"{found} {what} for {wanted} places in a batch: labels repeat within batches", stacklevel=3)
