"""Scores: CMC ranks, mAP and mINP by each data set's protocols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from engine import distributed, ops
from engine.config import Config
from engine.data import cache
from engine.data.dataset import Dataset, Images, Protocol, Trial
from engine.features import NAMES, Features, extract
from engine.pair import Modality, Pair
from engine.phases import Phases
from engine.rerank import Reranker

RANKS = (1, 5, 10, 20)
BLOCK_ENTRIES = 1 << 25
"""Distances held at a time, where they are not re-ranked: 128 MB."""
Oracles = Callable[[Features, Pair[Images]], dict[str, Pair[Tensor]]]


@dataclass(frozen=True)
class Score:
    """One row of a results table; percent, mean and population standard deviation over the protocol's trials.

    Attributes:
        protocol: name of the protocol.
        rerank: "" for plain distances, else what was applied at test time ("CMFP(te) k=30"); such rows are never mixed.
        values: "R1", "R5", "R10", "R20", "mAP", "mINP".
        spread: their standard deviations.
        trials: galleries or splits averaged over.
        queries: queries with a match in the gallery, summed over the trials.
        seconds: by device ("2-thread cpu"), what re-ranking took, mean over the trials; empty where not measured.
    """

    protocol: str
    rerank: str
    values: dict[str, float]
    spread: dict[str, float]
    trials: int
    queries: int
    seconds: dict[str, float] = field(default_factory=dict)


def score(
    distance: Tensor, ids: tuple[Tensor, Tensor], cams: tuple[Tensor, Tensor], rule: str
) -> tuple[dict[str, float], int]:
    """One trial.

    Args:
        distance: `[Q, G]`, smaller is more alike.
        ids, cams: int64 of the queries `[Q]` and of the gallery `[G]`.
        rule: "plain", "sysu" or "llcm" (see `engine.ops.rank`).

    Returns:
        Percent by name, and the number of queries with a match.
    """
    ranking = ops.rank(distance, *ids, *cams, protocol=rule, max_rank=max(RANKS))
    values = {f"R{rank}": 100 * float(ranking.cmc[rank - 1]) for rank in RANKS}
    return values | {"mAP": 100 * float(ranking.mAP), "mINP": 100 * float(ranking.mINP)}, int(ranking.valid_queries)


def score_features(
    query: Tensor, gallery: Tensor, ids: tuple[Tensor, Tensor], cams: tuple[Tensor, Tensor], rule: str
) -> tuple[dict[str, float], int]:
    """`score` of the cosine distances of unit features `[Q, D]`, `[G, D]`, which are made in blocks of queries.

    Several processes, all of which must ask for it, share out the blocks.
    """
    rows = max(1, BLOCK_ENTRIES // max(1, len(gallery)))
    blocks = list(zip(query.split(rows), ids[0].split(rows), cams[0].split(rows), strict=True))
    runs = distributed.shares(len(blocks))
    found = [
        score(trial_distance(part, gallery, None), (part_ids, ids[1]), (part_cams, cams[1]), rule)
        for part, part_ids, part_cams in blocks[runs[distributed.rank()]]
    ]
    columns = [*(f"R{rank}" for rank in RANKS), "mAP", "mINP"]
    own = torch.tensor([[*(values[name] for name in columns), count] for values, count in found], dtype=torch.float64)
    every = distributed.gather_shares(own.view(-1, len(columns) + 1).to(query.device), runs).tolist()
    valid = sum(count for *_, count in every)
    sums = [sum(values[i] * values[-1] for values in every) for i in range(len(columns))]
    means = every[0][:-1] if len(every) == 1 else [total / max(valid, 1) for total in sums]
    return dict(zip(columns, means, strict=True)), int(valid)


def summary(
    name: str, rerank: str, trials: Sequence[tuple[dict[str, float], int]], clock: Phases | None = None
) -> Score:
    """Mean and standard deviation over the results of `score`; `clock` is that of `trial_distance`."""
    columns = {column: np.array([values[column] for values, _ in trials]) for column in trials[0][0]}
    return Score(
        name,
        rerank,
        {column: float(numbers.mean()) for column, numbers in columns.items()},
        {column: float(numbers.std()) for column, numbers in columns.items()},
        len(trials),
        sum(valid for _, valid in trials),
        {device: seconds / len(trials) for device, seconds in clock.seconds.items()} if clock else {},
    )


def trial_distance(query: Tensor, gallery: Tensor, reranker: Reranker | None, clock: Phases | None = None) -> Tensor:
    """Distances of one trial: by cosine, or re-ranked.

    Args:
        query, gallery: `[Q, D]`, `[G, D]` unit features.
        clock: counts the seconds of re-ranking, from features to distances, under the name of the device. What is
            loaded or compiled at the first use does not count: a clock's first trial is run twice.

    Returns:
        `[Q, G]`, smaller is more alike.
    """
    if reranker is None:
        return (query @ gallery.T).neg_().add_(1)
    if clock is None:
        return reranker(query, gallery)
    on_gpu = query.device.type == "cuda"
    name = torch.cuda.get_device_name(query.device) if on_gpu else f"{torch.get_num_threads()}-thread cpu"
    if name not in clock.seconds:
        reranker(query, gallery)
    with clock(name):
        return reranker(query, gallery)


def evaluate(
    dataset: Dataset, features: Pair[Tensor], rerankers: Sequence[Reranker] = (), *, timed: bool = False
) -> list[Score]:
    """Every protocol of a data set, plain, and with every re-ranker.

    Args:
        dataset: with test images.
        features: `[N, D]` unit features of `dataset.test`.
        rerankers: see `engine.rerank`. They see one trial at a time.
        timed: measure how long re-ranking takes.

    Returns:
        The rows, all plain ones first.
    """
    test = dataset.test
    assert test is not None
    return [
        _evaluate(protocol, test, features, reranker, Phases(features.vis.device) if timed else None)
        for reranker in (None, *rerankers)
        for protocol in dataset.protocols
    ]


def _evaluate(
    protocol: Protocol, test: Pair[Images], features: Pair[Tensor], reranker: Reranker | None, clock: Phases | None
) -> Score:
    trials = []
    for trial in protocol.trials:
        parts, ids, cams = sides(protocol, trial, test, features)
        if reranker is None:
            trials.append(score_features(*parts, ids, cams, protocol.rule))
        else:
            trials.append(score(trial_distance(*parts, reranker, clock), ids, cams, protocol.rule))
    return summary(protocol.name, reranker.label if reranker else "", trials, clock)


def sides(
    protocol: Protocol, trial: Trial, test: Pair[Images], features: Pair[Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Features, identities and cameras of a trial; of each, the queries' and the gallery's."""
    query: Modality = protocol.query
    gallery: Modality = "ir" if query == "vis" else "vis"

    def both(columns: Pair[Tensor]) -> tuple[Tensor, Tensor]:
        one, other = (
            columns[side][torch.from_numpy(rows).to(columns[side].device)]
            for side, rows in ((query, trial.queries), (gallery, trial.gallery))
        )
        return one, other

    def column(name: str) -> Pair[Tensor]:
        return test.map(lambda images, part: torch.from_numpy(getattr(images, name)).to(part.device), features)

    return both(features), both(column("ids")), both(column("cams"))


def evaluate_network(
    network: nn.Module,
    dataset: Dataset,
    pixels: Pair[np.ndarray],
    config: Config,
    device: torch.device,
    rerankers: Sequence[Reranker] | None = None,
    *,
    texts: Pair[Tensor] | None = None,
    oracles: Oracles | None = None,
    timed: bool = False,
) -> list[Score]:
    """`evaluate` with a network's features of the test images, averaged with those of their mirror images.

    Args:
        pixels: decoded `dataset.test`.
        rerankers: others than those of the configuration.
        texts: `[N, variants, L]` int64 tokens of the images' own captions, for networks that read them.
        oracles: a method's, for rows of features that look at true identities.
    """
    assert dataset.test is not None
    features = extract(network, pixels, config, device, mirror=True, progress="test images", texts=texts)
    chosen = config.evaluate.rerank.chosen if rerankers is None else rerankers
    scores = evaluate(dataset, features.whole, chosen, timed=timed)
    for label, whole in (oracles(features, dataset.test) if oracles else {}).items():
        scores += [replace(row, rerank=label) for row in evaluate(dataset, whole)]
    return scores


def decode(images: Pair[Images], config: Config, part: str) -> Pair[np.ndarray]:
    """`[N, H, W, 3]` uint8 per modality, from the cache where it holds them; `part` names them on the progress bar."""
    return images.map(lambda files, name: decode_part(files, config, f"{name} {part}"), Pair(*NAMES.values()))


def decode_part(files: Images, config: Config, label: str) -> np.ndarray:
    """`decode` of one modality."""
    settings = config.data
    return cache.decode(
        files,
        settings.size,
        folder=settings.cache,
        workers=settings.workers,
        label=label,
        max_pixels=settings.max_pixels,
    )
