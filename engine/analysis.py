"""What there is to see in a run, as numbers; `engine.pictures` draws them.

What a run cannot show is a `UserError` that says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.manifold import TSNE
from torch import Tensor, nn

from engine import checkpoint, data, seeds, trained
from engine.config import parse
from engine.data import transforms
from engine.data.dataset import Dataset, Images, Protocol
from engine.errors import UserError
from engine.evaluate import decode, sides, trial_distance
from engine.evolve import EVENTS
from engine.features import NAMES, autocast, extract
from engine.model.network import Output
from engine.model.parts import PartHead
from engine.model.vit import VisionTransformer
from engine.ops.rank import hidden
from engine.pair import Modality, Pair
from engine.runs import Record
from engine.trained import Trained

BINS = 200
"""Of the distances 0 to 2."""
IMAGES = 40
"""Of an identity and modality that an embedding shows at most."""


class Subject:
    """A run's network and the images it is tested on, each loaded when it is first asked for.

    Args:
        run: a run folder, or a checkpoint file.
        name: of the checkpoint in a folder.
        overrides: "a.b=c" changes, for example the data set's place.
    """

    def __init__(self, run: Path, name: str = "last", overrides: Sequence[str] = ()) -> None:
        self.run, self.checkpoint, self.overrides = run, name, overrides

    @cached_property
    def trained(self) -> Trained:
        """The network."""
        return trained.load(checkpoint.locate(str(self.run), self.checkpoint), self.overrides)

    @cached_property
    def dataset(self) -> Dataset:
        """The data set that it is tested on."""
        config = self.trained.config
        trained.refuse_leak(parse(self.trained.content["config"]), config)
        return data.read(config.data)

    @property
    def test(self) -> Pair[Images]:
        """The test images."""
        if self.dataset.test is None:
            raise UserError(f"{self.dataset.name}: has no test images with identities (query/ and gallery/)")
        return self.dataset.test

    @cached_property
    def features(self) -> Pair[Tensor]:
        """`[N, D]` unit features of the test images, as evaluation scores them, on the CPU."""
        config, device = self.trained.config, self.trained.device
        pixels, texts = decode(self.test, config, "test"), self.trained.texts(self.test)
        found = extract(self.trained.network, pixels, config, device, mirror=True, progress="test images", texts=texts)
        return found.whole.map(lambda rows: rows.cpu())


@dataclass(frozen=True)
class Shot:
    """An image: its file, who is on it (-1 = unknown) and which camera took it (-1 = unknown)."""

    path: str
    identity: int
    camera: int


@dataclass(frozen=True)
class RankingList:
    """What was found for one query.

    Attributes:
        answers: the gallery's images, the nearest first; right: whether each is of the query's identity.
        matches: right images that the query could find.
    """

    query: Shot
    answers: tuple[Shot, ...]
    right: tuple[bool, ...]
    matches: int


@dataclass(frozen=True)
class Rankings:
    """Some queries of a protocol's first trial.

    Attributes:
        lists: queries whose first answer is right, then those whose is wrong.
        query: the modality of the queries.
        found: queries of the trial whose first answer is right; total: all with a right image in the gallery.
        rerank: label of the re-ranking, "" for none.
    """

    lists: tuple[RankingList, ...]
    protocol: str
    query: Modality
    found: int
    total: int
    rerank: str
    seed: int

    @property
    def caption(self) -> str:
        """What is shown, in words."""
        good = sum(one.right[0] for one in self.lists)
        rerank = f", re-ranked by {self.rerank}" if self.rerank else ""
        return (
            f"{self.protocol}{rerank}: the first answer is right for {self.found} of {self.total} queries "
            f"({100 * self.found / self.total:.1f} %); shown, drawn by lot (seed {self.seed}): {good} of these and "
            f"{len(self.lists) - good} of the {self.total - self.found} others"
        )


def rankings(
    subject: Subject, rerank: str = "", protocol: str = "", count: int = 6, top: int = 10, seed: int = 0
) -> Rankings:
    """Ranking lists of a trial, half of them of queries whose first answer is wrong, where there are so many.

    Args:
        rerank: as `engine.rerank.Rerank.parse` takes it, or "".
        protocol: by name; "" = the main one.
        count: queries; top: answers of each.
    """
    found, test = _protocol(subject.dataset, protocol), subject.test
    reranker = subject.trained.config.evaluate.rerank.parse(rerank) if rerank else None
    features, ids, cams = sides(found, found.trials[0], test, subject.features)
    order, right, seen = rank(trial_distance(*features, reranker), ids, cams, found.rule)
    valid = right.any(1)
    if not valid.any():
        raise UserError(f"{found.name}: no query has an image of its identity in the gallery")
    good = np.flatnonzero(valid & right[:, 0])
    rows = choose(good, np.flatnonzero(valid & ~right[:, 0]), ids[0].numpy(), count, seed)
    gallery: Modality = "ir" if found.query == "vis" else "vis"
    trial = found.trials[0]

    def one(row: int) -> RankingList:
        length = min(top, int(seen[row].sum()))
        answers = order[row, :length]
        return RankingList(
            _shot(test[found.query], trial.queries[row]),
            tuple(_shot(test[gallery], trial.gallery[index]) for index in answers),
            tuple(right[row, :length].tolist()),
            int(right[row].sum()),
        )

    label = reranker.label if reranker else ""
    lists = tuple(one(row) for row in rows)
    return Rankings(lists, found.name, found.query, len(good), int(valid.sum()), label, seed)


def rank(
    distance: Tensor, ids: tuple[Tensor, Tensor], cams: tuple[Tensor, Tensor], rule: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gallery in the order of every query, as `engine.ops.rank` has it.

    Returns:
        `[Q, G]` int64 gallery images, those that the rule hides last; `[Q, G]` bool, whether each is right; and whether the
        query sees it.
    """
    same = ids[0].unsqueeze(1) == ids[1]
    removed = hidden(same, *cams, rule)
    order = distance.masked_fill(removed, torch.inf).sort(dim=1, stable=True).indices
    seen = ~removed.gather(1, order)
    return order.numpy(), (same.gather(1, order) & seen).numpy(), seen.numpy()


def choose(good: np.ndarray, bad: np.ndarray, ids: np.ndarray, count: int, seed: int) -> list[int]:
    """Rows drawn by lot, of other identities as long as there are any: first of `good`, then up to half of `bad`."""
    rng = seeds.random_state(seed)
    shuffled = [rows[rng.permutation(len(rows))] for rows in (good, bad)]
    drawn = [rows[np.argsort(_occurrence(ids[rows]), kind="stable")].tolist() for rows in shuffled]
    failures = min(len(bad), max(count // 2, count - len(good)))
    return drawn[0][: count - failures] + drawn[1][:failures]


def _occurrence(values: np.ndarray) -> np.ndarray:
    """How often each value came before."""
    return np.array([np.sum(values[:i] == value) for i, value in enumerate(values)], dtype=np.int64)


@dataclass(frozen=True)
class Distances:
    """Cosine distances of all visible-infrared pairs of test images.

    Attributes:
        edges: `[BINS + 1]`; positive, negative: `[BINS]` shares of the pairs of one identity, of two identities.
        means: of both kinds; counts: how many pairs there are.
        overlap: area that the two histograms share, 0 to 1.
    """

    edges: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    means: tuple[float, float]
    counts: tuple[int, int]

    @property
    def overlap(self) -> float:
        return float(np.minimum(self.positive, self.negative).sum())

    @property
    def caption(self) -> str:
        """What is shown, in words."""
        return (
            f"{self.counts[0]:,} pairs of one identity, mean distance {self.means[0]:.3f}; {self.counts[1]:,} of two, "
            f"mean {self.means[1]:.3f}; the histograms share {100 * self.overlap:.1f} % of their area"
        )


def distances(subject: Subject) -> Distances:
    """The histograms of Fig. 9 of SALCR, of all test images."""
    return pair_distances(subject.features, subject.test.map(lambda images: torch.from_numpy(images.ids)))


def pair_distances(features: Pair[Tensor], ids: Pair[Tensor]) -> Distances:
    """Distances of all pairs.

    Args:
        features: `[N, D]` unit rows; ids: `[N]` int64, -1 = not known.
    """
    features, ids = features.map(lambda rows, who: rows[who >= 0], ids), ids.map(lambda who: who[who >= 0])
    counts, totals = torch.zeros(2, BINS, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for rows, who in zip(features.vis.split(1024), ids.vis.split(1024), strict=True):
        distance = (1 - rows @ features.ir.T).double().clamp(0, 2)
        same = who.unsqueeze(1) == ids.ir
        for kind, chosen in enumerate((distance[same], distance[~same])):
            counts[kind] += torch.histc(chosen, BINS, 0, 2)
            totals[kind] += chosen.sum()
    sums = counts.sum(1)
    if not sums.all():
        raise UserError("the test images have no visible and infrared images of one identity, or of one identity only")
    positive, negative = (counts / sums.unsqueeze(1)).numpy()
    means, numbers = (totals / sums).tolist(), sums.long().tolist()
    edges = np.linspace(0, 2, BINS + 1)
    return Distances(edges, positive, negative, (means[0], means[1]), (numbers[0], numbers[1]))


@dataclass(frozen=True)
class Embedding:
    """Test images of some identities in the plane.

    Attributes:
        points: `[M, 2]` float; identities: `[M]` int64 numbers of identities; infrared: `[M]` bool.
    """

    points: np.ndarray
    identities: np.ndarray
    infrared: np.ndarray
    seed: int

    @property
    def caption(self) -> str:
        """What is shown, in words."""
        vis, ir = int((~self.infrared).sum()), int(self.infrared.sum())
        return (
            f"t-SNE of the features of {vis} visible and {ir} infrared test images of {len(np.unique(self.identities))} "
            f"identities, drawn by lot (seed {self.seed})"
        )


def embedding(subject: Subject, identities: int = 12, seed: int = 0) -> Embedding:
    """t-SNE of Fig. 10 of SALCR: identities that both modalities show, up to `IMAGES` of each in either."""
    ids, rng = subject.test.map(lambda images: images.ids), seeds.random_state(seed)
    common = np.intersect1d(*ids)
    common = common[common >= 0]
    if len(common) < 2:
        raise UserError("fewer than two identities have visible and infrared test images")
    chosen = rng.permutation(common)[:identities]

    def rows(column: np.ndarray) -> np.ndarray:
        return np.concatenate([rng.permutation(np.flatnonzero(column == who))[:IMAGES] for who in chosen])

    picked = ids.map(rows)
    features = torch.cat([*subject.features.map(lambda part, index: part[torch.from_numpy(index)], picked)]).numpy()
    who = np.concatenate([*ids.map(lambda column, index: column[index], picked)])
    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(features)
    infrared = np.arange(len(who)) >= len(picked.vis)
    return Embedding(points, who, infrared, seed)


@dataclass(frozen=True)
class Attention:
    """Where a network looks.

    Attributes:
        titles: of the maps.
        rows: of an identity each, a visible and an infrared image, and the maps of both, `[len(titles), h, w]` in [0, 1].
    """

    titles: tuple[str, ...]
    rows: tuple[tuple[Pair[Shot], Pair[np.ndarray]], ...]
    seed: int

    @property
    def caption(self) -> str:
        """What is shown, in words."""
        return (
            f"{', '.join(self.titles)}; each map from its lowest to its highest value; {len(self.rows)} test identities, "
            f"drawn by lot (seed {self.seed})"
        )


def attention(subject: Subject, count: int = 4, seed: int = 0) -> Attention:
    """Maps of Fig. 11 of SALCR for a visible and an infrared test image of some identities."""
    test, rng, run = subject.test, seeds.random_state(seed), subject.trained
    common = np.intersect1d(test.vis.ids, test.ir.ids)
    chosen = rng.permutation(common[common >= 0])[:count]
    if not len(chosen):
        raise UserError("no identity has visible and infrared test images")
    picked = test.map(lambda images: [int(rng.choice(np.flatnonzero(images.ids == who))) for who in chosen])
    few = test.map(
        lambda images, rows: Images(tuple(images.paths[row] for row in rows), images.ids[rows], images.cams[rows]),
        picked,
    )
    pixels, texts = decode(few, run.config, "pictured"), run.texts(few)
    maps = {
        name: attention_maps(
            run, name, torch.from_numpy(np.array(pixels[name])), None if texts is None else texts[name]
        )
        for name in NAMES
    }
    rows = []
    for i in range(len(chosen)):
        shots = few.map(lambda images, row=i: _shot(images, row))
        rows.append((shots, Pair(*(np.stack([one[i] for one in maps[name].values()]) for name in NAMES))))
    return Attention(tuple(maps["vis"]), tuple(rows), seed)


@torch.no_grad()
def attention_maps(run: Trained, modality: Modality, pixels: Tensor, texts: Tensor | None) -> dict[str, np.ndarray]:
    """`[N, h, w]` maps in [0, 1] by name, of a convolutional network or of a vision transformer.

    Args:
        pixels: `[N, H, W, 3]` uint8; texts: `[N, variants, L]` tokens of their captions.
    """
    network, seen = run.network, list[Tensor]()
    vision = getattr(network, "vision", None)
    hook = None
    if isinstance(vision, VisionTransformer):
        last: Any = vision.layers[-1]
        hook = last.self_attn.register_forward_pre_hook(lambda module, inputs: seen.append(module.weights(inputs[0])))
    read = {} if texts is None else {f"{modality}_text": texts[:, 0].to(run.device)}
    try:
        with autocast(run.config, run.device):
            output: Output = network(**{modality: transforms.normalize(pixels.to(run.device))}, **read)
    finally:
        if hook:
            hook.remove()
    if seen:
        assert isinstance(vision, VisionTransformer)
        found = {"class token": seen[0].float().mean(1)[:, 0, 1:].unflatten(1, vision.grid)}
    elif output.map.dim() == 4:
        found = {"whole image": output.map.float().norm(dim=1)} | _part_maps(network, output.map)
    else:
        raise UserError(f"{type(network).__name__}: gives no map of image positions")
    return {title: _stretched(maps).cpu().numpy() for title, maps in found.items()}


def _part_maps(network: nn.Module, maps: Tensor) -> dict[str, Tensor]:
    head = getattr(network, "parts", None)
    if not isinstance(head, PartHead):
        return {}
    return {f"part {i}": part for i, part in enumerate(head.attention(maps).unbind(1), start=1)}


def _stretched(maps: Tensor) -> Tensor:
    """Each of `[N, h, w]` from 0 to 1."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


@dataclass(frozen=True)
class Line:
    """`[n]` x and `[n]` y; with `Chart.steps` x has n + 1 edges. `run` and `label` decide its looks."""

    run: int
    label: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Chart:
    """Lines over epochs, or over something else.

    Attributes:
        y, x: what the axes are, with the unit.
        runs: names of the runs that are compared.
        borders: epochs after which a stage ended.
        log: logarithmic values; steps: lines are outlines of histograms.
    """

    title: str
    y: str
    runs: tuple[str, ...]
    lines: list[Line] = field(default_factory=list)
    x: str = "epoch"
    borders: tuple[int, ...] = ()
    log: bool = False
    steps: bool = False

    @property
    def caption(self) -> str:
        """What is shown, in words: the last value of every line, or what the histogram is of."""
        parts = []
        for line in self.lines:
            run = f"{self.runs[line.run]} " if len(self.runs) > 1 else ""
            last = f"{sum(line.y):g} in all" if self.steps else f"{line.y[-1]:.4g}"
            parts.append(f"{run}{line.label} {last}".strip())
        return f"{self.title} ({self.y}){'' if self.steps else ', at the end'}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Bars:
    """Stacked bars, one for each epoch: `[n]` heights of every part."""

    title: str
    y: str
    epochs: list[int]
    parts: dict[str, list[float]]

    @property
    def caption(self) -> str:
        """What is shown, in words."""
        sums = ", ".join(f"{name} {sum(values):.4g}" for name, values in self.parts.items())
        return f"{self.title} ({self.y}) by epoch; sums: {sums}"


def curves(records: Sequence[Record]) -> list[Chart]:
    """Scores, loss terms and learning rates over the epochs; of several runs every quantity in a chart of its own."""
    charts, split = _Charts(records), len(records) > 1
    numbered = [(run, row) for run, record in enumerate(records) for row in record.epochs]
    for run, row in numbered:
        if row["scores"]:
            main = row["scores"][0]["protocol"]
            for score in row["scores"]:
                if score["protocol"] == main:
                    title = f"{main}, {score['rerank']}" if score["rerank"] else main
                    for name in ("R1", "mAP", "mINP"):
                        charts.add(
                            run, f"{name}, {title}" if split else title, "percent", name, row, score["values"][name]
                        )
    for run, row in numbered:
        for name, value in row["losses"].items():
            charts.add(run, f"loss {name}" if split else "loss terms", "mean over steps", name, row, value)
    for run, row in numbered:
        charts.add(run, "learning rate", "learning rate", "", row, row["lr"])
    return [replace(chart, log=chart.title == "learning rate") for chart in charts.made()]


def labels(records: Sequence[Record]) -> list[Chart]:
    """Quality of pseudo-labels (Fig. 7 of SALCR), clusters and outliers over the epochs."""
    groups = (
        ("ARI of clusters and identities", "adjusted Rand index", {f"ari.{m}": NAMES[m] for m in NAMES}, 1),
        ("AMI of clusters and identities", "adjusted mutual information", {f"ami.{m}": NAMES[m] for m in NAMES}, 1),
        (
            "visible-infrared pairs",
            "percent of pairs",
            {"cross.precision": "precision", "cross.recall": "recall"},
            100,
        ),
        ("clusters", "clusters", {f"clusters.{m}": NAMES[m] for m in NAMES} | {"clusters.both": "both"}, 1),
        ("outliers", "images", {f"outliers.{m}": NAMES[m] for m in NAMES}, 1),
    )
    charts = _Charts(records)
    for title, y, keys, factor in groups:
        for run, record in enumerate(records):
            for row in record.epochs:
                for key, label in keys.items():
                    if key in row["labels"]:
                        charts.add(run, title, y, label, row, factor * row["labels"][key])
    return charts.made()


def sizes(records: Sequence[Record]) -> Chart:
    """How many images the clusters of the last epoch have, from the runs' last checkpoints."""
    found: dict[tuple[int, str], np.ndarray] = {}
    reasons = []
    for run, record in enumerate(records):
        try:
            content = checkpoint.load(record.folder / "last.pt")
        except UserError as error:
            reasons.append(str(error))
            continue
        own = content["labels"][1] if content.get("labels") else ()
        for name, rows in zip(NAMES.values(), own, strict=False):
            found[run, name] = torch.bincount(rows[rows >= 0]).numpy()
    if not found:
        raise UserError(reasons[0] if reasons else "no epoch has begun, so there are no clusters")
    largest = max((int(counts.max(initial=0)) for counts in found.values()), default=0)
    width = max(1, -(-largest // 20))
    edges = width * np.arange(max(1, -(-largest // width)) + 1) + 0.5
    lines = [
        Line(run, label, edges.tolist(), np.histogram(counts[counts > 0], edges)[0].tolist())
        for (run, label), counts in found.items()
    ]
    names = tuple(record.name for record in records)
    return Chart("sizes of the last clusters", "clusters", names, lines, "images in a cluster", steps=True)


def events(record: Record) -> list[Chart | Bars]:
    """What happened to FIRM's memory: clusters that came and went, updates that it accepted and rejected."""
    rows = [row for row in record.epochs if EVENTS[0] in row["labels"]]
    if not rows:
        _demand_epochs([record])
        raise UserError(f"its method ({_method(record)}) has no memory that evolves, and so no events")
    epochs = [row["epoch"] for row in rows]
    values = {name: [row["labels"][name] for row in rows] for name in EVENTS}
    updates = {name: values.pop(name) for name in ("accepted", "rejected")}
    lines = [Line(0, name, epochs, counts) for name, counts in values.items()]
    return [
        Chart("clusters of the memory", "events", (record.name,), lines, log=True),  # at first all of them are born
        Bars("updates of the memory", "images", epochs, updates),
    ]


def phases(record: Record) -> Bars:
    """Seconds of every phase of every epoch."""
    _demand_epochs([record])
    names = dict.fromkeys(name for row in record.epochs for name in row["seconds"])
    values = {name: [row["seconds"].get(name, 0.0) for row in record.epochs] for name in names}
    return Bars("time", "seconds", [row["epoch"] for row in record.epochs], values)


class _Charts:
    """Charts that grow value by value."""

    def __init__(self, records: Sequence[Record]) -> None:
        _demand_epochs(records)
        self.names = tuple(record.name for record in records)
        ends = {
            row["epoch"]
            for record in records
            for row, after in zip(record.epochs, record.epochs[1:], strict=False)
            if row["stage"] != after["stage"]
        }
        self.borders = tuple(sorted(ends))
        self.found: dict[tuple[str, str], dict[tuple[int, str], Line]] = {}

    def add(self, run: int, title: str, y: str, label: str, row: dict[str, Any], value: float) -> None:
        """A value at the epoch of `row`."""
        lines = self.found.setdefault((title, y), {})
        line = lines.setdefault((run, label), Line(run, label, [], []))
        line.x.append(row["epoch"])
        line.y.append(value)

    def made(self) -> list[Chart]:
        return [
            Chart(title, y, self.names, list(lines.values()), borders=self.borders)
            for (title, y), lines in self.found.items()
        ]


def _demand_epochs(records: Sequence[Record]) -> None:
    if not any(record.epochs for record in records):
        raise UserError("no epoch is finished (metrics.jsonl is empty, or not there)")


def _method(record: Record) -> str:
    return str(record.settings.get("method", {}).get("name"))


def _protocol(dataset: Dataset, name: str) -> Protocol:
    known = {protocol.name: protocol for protocol in dataset.protocols}
    if name and name not in known:
        raise UserError(f"--protocol {name}: expected one of {', '.join(known)}")
    if not known:
        raise UserError(f"{dataset.name}: has no test images with identities (query/ and gallery/)")
    return known[name] if name else dataset.protocols[0]


def _shot(images: Images, row: int) -> Shot:
    return Shot(images.paths[row], int(images.ids[row]), int(images.cams[row]))
