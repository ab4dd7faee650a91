"""FIRM: Fusion-Injected Residual Memory (Rong et al., ACML 2025, PMLR 304:1134-1149)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import density, evolve, ops
from engine.cluster import Labels, dense
from engine.config import Config, Stage, check_ranges
from engine.data import captions, sampler
from engine.data.dataset import Images
from engine.data.loader import Batch, Views
from engine.evolve import FUSED, IR, VIS, Gate, Merge, Split, Transport
from engine.features import Features
from engine.losses import instance_contrast
from engine.methods.base import Method, contrast_views, shape, view_inputs, view_rows
from engine.model import clip
from engine.model.network import Output
from engine.model.prompts import PromptNetwork, Vspf
from engine.model.text import encode
from engine.pair import Pair
from engine.phases import Phases

# Where the text cannot be run as printed: the switch, what it is by default, and as printed.
DECISIONS: dict[str, tuple[Any, Any]] = {
    "vspf.keys": ("tokens", "vector"),
    "vspf.text_layers": (2, 0),
    "transport.relax": (0.01, 0.0),
    "transport.marginal": ("counts", "uniform"),
    "split.criterion": ("dispersion", "conf_var"),
    "losses.look_ahead": (True, False),
    "losses.align": (0.1, 1.0),
    "losses.align_directions": (True, False),
}


@dataclass(frozen=True)
class Bootstrap:
    """Clusters of both modalities at once, by the settings of `cluster` for visible images.

    Attributes:
        every: epochs after which images are clustered anew; 0 = only once.
    """

    every: int = 5


@dataclass(frozen=True)
class Losses:
    """Weights and readings of the losses (Eq. 17-20).

    Attributes:
        proto, density, align: weights.
        rise: part of all iterations over which the weight of the density grows to its value.
        momentum: of the statistics of the density.
        look_ahead: prototypes in L_proto and L_Den are those after the coming update and so have a gradient; or constants, as
            printed.
        align_directions: L_align compares directions of normalised class tokens and of prototypes; or the vectors, as printed.
    """

    proto: float = 0.1
    density: float = 0.05
    align: float | None = None
    rise: float = 0.2
    momentum: float = 0.99
    look_ahead: bool | None = None
    align_directions: bool | None = None


@dataclass(frozen=True)
class View:
    """A batch in one view.

    Attributes:
        number: FUSED, VIS or IR.
        rows: which rows of the batch it has.
        features: `[R, D]` unit rows.
        bank: `[C, D]` unit prototypes of the clusters that have the view.
        plan: `[R, C]` where the rows go; rows sum to 1.
        clusters: `[R]` int64 cluster that most of a row goes to.
    """

    number: int
    rows: slice
    features: Tensor
    bank: Tensor
    plan: Tensor
    clusters: Tensor

    @property
    def confidence(self) -> Tensor:
        """omega, `[R]`."""
        return self.plan.amax(1)


class Firm(Method):
    """Captions are fused into the network (VSPF), and clusters live in a memory that evolves (EMCM, `engine.evolve`).

    Besides those of `engine.evolve` the memory has `present.0` to `present.2`: `[C]` int64, the clusters that have a view at
    the start of the epoch; `gaussians`, see `engine.density`; `epoch` and `step`, the numbers of epochs and steps begun.
    """

    @dataclass(frozen=True)
    class Settings:
        """All of FIRM's settings.

        Attributes:
            literal: switches that are not set follow the printed text, for study; see docs/firm.md.
            captions: caption files, names in the data set's folder or paths.
            missing_caption: what is done about an image without a caption: "error", or an "empty" one.
            evolving: EMCM; without it clusters have prototypes that follow the images labelled with them.
            period: epochs between two rounds of merging and splitting.
            oracle_text: score also what Eq. 21 needs, the visible caption of an infrared query's own person, in rows of its own.
        """

        literal: bool = False
        captions: Pair[str] = captions.FILES
        missing_caption: Literal["error", "empty"] = "error"
        evolving: bool = True
        period: int = 5
        oracle_text: bool = False
        vspf: Vspf = field(default_factory=Vspf)
        bootstrap: Bootstrap = field(default_factory=Bootstrap)
        transport: Transport = field(default_factory=Transport)
        gate: Gate = field(default_factory=Gate)
        merge: Merge = field(default_factory=Merge)
        split: Split = field(default_factory=Split)
        losses: Losses = field(default_factory=Losses)

        def __post_init__(self) -> None:
            for path, values in DECISIONS.items():
                module, name = path.split(".")
                section = getattr(self, module)
                if getattr(section, name) is None:
                    object.__setattr__(self, module, replace(section, **{name: values[self.literal]}))
            rules = [
                ("period", self.period, self.period >= 1, "at least 1"),
                ("bootstrap.every", self.bootstrap.every, self.bootstrap.every >= 0, "at least 0"),
                ("vspf.prefix", self.vspf.prefix, 0 <= self.vspf.prefix <= 64, "0 to 64"),
                ("vspf.text_layers", self.vspf.text_layers, (self.vspf.text_layers or 0) >= 0, "at least 0"),
                ("transport.reg", self.transport.reg, self.transport.reg > 0, "a number above 0"),
                ("transport.iterations", self.transport.iterations, self.transport.iterations >= 1, "at least 1"),
                ("transport.relax", self.transport.relax, (self.transport.relax or 0) >= 0, "at least 0"),
                ("gate.step", self.gate.step, 0 <= self.gate.step <= 1, "0 to 1"),
                ("split.least", self.split.least, self.split.least >= 1, "at least 1"),
                ("losses.rise", self.losses.rise, self.losses.rise >= 0, "at least 0"),
                ("losses.momentum", self.losses.momentum, 0 <= self.losses.momentum <= 1, "0 to 1"),
            ]
            for name in ("proto", "density", "align"):
                weight = getattr(self.losses, name)
                rules.append((f"losses.{name}", weight, (weight or 0) >= 0, "at least 0"))
            check_ranges((f"firm.{name}", value, good, expected) for name, value, good, expected in rules)

    settings: Settings
    lasting = True
    copies = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.network: PromptNetwork | None = None

    def build(self) -> nn.Module:
        """The vision transformer with the text encoder beside it."""
        self.network = PromptNetwork(self.config.model, self.config.data.size, self.settings.vspf)
        return self.network

    def texts(self, images: Pair[Images]) -> Pair[Tensor] | None:
        """Tokens of each image's caption and of its paraphrase; none where VSPF is off."""
        if not self.settings.vspf.enabled:
            return None
        settings = self.settings
        found = captions.read(images, self.config.data.root, settings.captions, settings.missing_caption)
        tokenize = clip.tokenizer(self.config.model, settings.vspf.prefix)
        return found.map(lambda side: encode([side.description, side.paraphrase], tokenize))

    def warm_up(self, forward: Callable[..., Output], views: Views) -> dict[str, Tensor]:
        """Contrast of views with their captions; of captions with each other; and of images alone with captions, as CLIP is
        trained, whose weights bring what a network that starts at random has to learn here: a space that images and texts
        of both modalities share.
        """
        temperature = self.config.train.warm_up.temperature
        output = forward(**view_inputs(views))
        terms = contrast_views(output.features, views, temperature)
        if output.content is None:
            return terms
        said = F.normalize(output.content)
        alone = forward(vis=views.first.vis, ir=views.first.ir).features
        vis, _, ir, _ = view_rows(said, views)
        seen_vis, seen_ir = alone.split([len(vis), len(ir)])
        return (
            terms
            | contrast_views(said, views, temperature, "captions.")
            | {
                "clip.vis": instance_contrast(seen_vis, vis, temperature),
                "clip.ir": instance_contrast(seen_ir, ir, temperature),
            }
        )

    def label(self, features: Features, stage: int, phases: Phases) -> Labels:
        """Clusters of both modalities at once, or those that the memory has grown to by now."""
        settings, memory = self.settings, self.memory
        epoch = int(memory["epoch"]) if memory else 0
        if memory:
            memory = memory | {"events": torch.zeros_like(memory["events"])}
        fused = self._fused(features)
        anew = not memory or (settings.bootstrap.every > 0 and epoch % settings.bootstrap.every == 0)
        if anew:
            with phases("cluster"):
                labels = self._cluster(fused)
            if any(bool((part >= 0).any()) == 0 for part in labels):
                if not memory:
                    return Labels(labels, labels, labels)
                anew = False  # the memory knows more than features that show no clusters
            else:
                memory = memory | evolve.rebuild(memory or None, evolve.bootstrap(features.whole, fused, labels))
        if settings.evolving and epoch and epoch % settings.period == 0:
            with phases("evolve"):
                memory = memory if anew else memory | evolve.relabel(memory, fused)
                if settings.merge.enabled:
                    memory = memory | evolve.merge(memory, settings.merge)
                if settings.split.enabled:
                    memory = memory | evolve.split(memory, features.whole, fused, settings.split)
        self.memory = memory
        labels = Pair(memory["labels.vis"], memory["labels.ir"])
        return Labels(labels, labels, labels)

    def memories(self, features: Features, labels: Labels) -> dict[str, Tensor]:
        """The memory as `label` left it, with what the epoch's steps need."""
        memory = dict(self.memory)
        has, device = evolve.present(memory), memory["counts"].device
        for view in (FUSED, VIS, IR):
            memory[f"present.{view}"] = has[view].nonzero().flatten()
        memory["epoch"] = memory.get("epoch", torch.zeros((), dtype=torch.int64, device=device)) + 1
        memory.setdefault("step", torch.zeros((), device=device))
        memory.setdefault("gaussians", density.begin(F.normalize(memory["prototypes"][FUSED])))
        return memory

    def batches(self, labels: Labels, settings: Stage, rng: np.random.RandomState) -> Iterator[Pair[np.ndarray]]:
        """Rows of every batch: labels are groups of clusters, which both modalities share."""
        groups = labels.own.map(lambda part: torch.where(part >= 0, self.memory["groups"][part], -1).cpu().numpy())
        return sampler.joint_batches(groups, **shape(settings, rng))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Images, captions, and which i-th images of both modalities are of one group."""
        given = super().inputs(batch)
        if batch.texts is not None:
            groups = batch.own.map(lambda part: self.memory["groups"][part])
            given |= {"vis_text": batch.texts.vis, "ir_text": batch.texts.ir, "paired": groups.vis == groups.ir}
        return given

    def losses(self, output: Output, batch: Batch, memories: dict[str, Tensor]) -> dict[str, Tensor]:
        """`L_con + .1 L_proto + .05 L_Den + .1 L_align` (Eq. 20)."""
        settings = self.settings.losses
        views = self._views(output, batch, memories)
        terms = {"con": self._contrast(views)}
        if not self.settings.evolving:
            return terms | self._align(output, batch, memories)
        ahead = self._look_ahead(views, memories)
        if settings.proto:
            terms["proto"] = settings.proto * prototype_loss(ahead, evolve.present(memories), memories["split"])
        if settings.density:
            total = sum(stage.epochs * stage.iterations for stage in self.config.train.stages)
            rise = (memories["step"] / max(settings.rise * total, 1)).clamp(max=1)
            found = density.negative_log_likelihood(memories["gaussians"], F.normalize(ahead[FUSED]))
            terms["density"] = settings.density * rise * found
        return terms | self._align(output, batch, memories)

    def update(self, output: Output, batch: Batch, memories: dict[str, Tensor]) -> None:
        """Confident images move the prototypes of their cluster in all views that they have, in batch order (Eq. 13, 14)."""
        views = self._views(output, batch, memories)
        chosen = self._accepted(views)
        for view in views:
            steps = self.settings.gate.step * view.confidence
            evolve.update(memories, view.number, view.features.detach(), chosen[view.rows], steps)
        evolve.count(memories, chosen, views[FUSED].confidence)
        memories["step"] += 1
        if self.settings.losses.density:
            rows = F.normalize(memories["prototypes"][FUSED])
            memories["gaussians"].copy_(density.follow(memories["gaussians"], rows, self.settings.losses.momentum))

    def describe(self, labels: Labels) -> dict[str, float]:
        """Clusters with images of each modality and of both, outliers, and what happened to the memory in this epoch."""
        vis, ir = ({*part[part >= 0].tolist()} for part in labels.own)
        numbers: dict[str, float] = {"clusters.vis": len(vis), "clusters.ir": len(ir), "clusters.both": len(vis & ir)}
        for name, found in (("vis", labels.own.vis), ("ir", labels.own.ir)):
            numbers[f"outliers.{name}"] = int((found < 0).sum())
        return numbers | dict(zip(evolve.EVENTS, self.memory["events"].tolist(), strict=True))

    def oracles(self, features: Features, images: Pair[Images]) -> dict[str, Pair[Tensor]]:
        """`(f^I + f_fus) / 2` of infrared images, compensated by what captions of their own identity's visible images say."""
        content = features.content
        if not self.settings.oracle_text or content is None or not self.settings.vspf.compensation:
            return {}
        assert self.network is not None and self.network.prompts is not None
        ids = np.concatenate([images.vis.ids, images.ir.ids])
        numbers = torch.from_numpy(np.unique(ids, return_inverse=True)[1]).to(content.ir.device)
        vis, ir = numbers.split([len(images.vis), len(images.ir)])
        known = torch.isin(ir, vis).unsqueeze(1)
        said = ops.segment_mean(content.vis, vis, int(numbers.max()) + 1)[ir]
        with torch.no_grad():
            fused = self.network.prompts.fuse(features.whole.ir, torch.where(known, said - content.ir, 0))
        return {"oracle-text": Pair(features.whole.vis, F.normalize(features.whole.ir + fused))}

    def _cluster(self, fused: Pair[Tensor]) -> Pair[Tensor]:
        """DBSCAN over both modalities at once."""
        settings = self.config.cluster
        labels = dense(torch.cat([fused.vis, fused.ir]), settings.k1.vis, settings.eps.vis, settings)
        return Pair(*labels.split([len(fused.vis), len(fused.ir)]))

    def _fused(self, features: Features) -> Pair[Tensor]:
        """Fusion features of all images (Eq. 7-10).

        What an infrared image is compensated by is what captions of visible images of its group say on average; without such,
        what that of the nearest visible image says.
        """
        whole, content = features.whole, features.content
        if content is None or not self.settings.vspf.compensation:
            return whole
        assert self.network is not None and self.network.prompts is not None
        _, nearest = ops.topk(whole.ir, whole.vis, 1)
        said = content.vis[nearest[:, 0]]
        if self.memory:
            groups = Pair(self.memory["labels.vis"], self.memory["labels.ir"]).map(
                lambda part: torch.where(part >= 0, self.memory["groups"][part], -1)
            )
            count = int(self.memory["groups"].max()) + 1
            means = ops.segment_mean(content.vis, groups.vis, count)
            known = torch.isin(groups.ir, groups.vis[groups.vis >= 0])
            said = torch.where(known.unsqueeze(1), means[groups.ir], said)
        with torch.no_grad():
            return Pair(whole.vis, self.network.prompts.fuse(whole.ir, said - content.ir))

    def _views(self, output: Output, batch: Batch, memories: dict[str, Tensor]) -> list[View]:
        """The batch in the fused, the visible and the infrared view, each transported to its prototypes."""
        assert output.fused is not None
        size, found = len(batch.vis), []
        labels = torch.cat([batch.own.vis, batch.own.ir])
        for number, rows in ((FUSED, slice(0, 2 * size)), (VIS, slice(0, size)), (IR, slice(size, 2 * size))):
            features = (output.fused if number == FUSED else output.features)[rows]
            present = memories[f"present.{number}"]
            bank = F.normalize(memories["prototypes"][number][present])
            if self.settings.evolving:
                plan = evolve.transport(features, bank, memories["counts"][present], self.settings.transport)
            else:
                plan = (labels[rows].unsqueeze(1) == present).to(bank.dtype)
            found.append(View(number, rows, features, bank, plan, present[plan.argmax(1)]))
        return found

    def _contrast(self, views: list[View]) -> Tensor:
        """`L_con = sum_m beta_m L_m`: a view weighs by the confidence of its rows (Eq. 18)."""
        temperature = self.config.memory.temperature
        weights = torch.stack([(view.confidence.sum() + 1).log() for view in views])
        terms = [ops.soft_contrast(view.features, view.bank, view.plan, temperature) for view in views]
        return (weights / weights.sum().clamp(min=1e-6) * torch.stack(terms)).sum()

    def _accepted(self, views: list[View]) -> Tensor:
        """Cluster that each row of the batch updates, -1 where the gate is shut (Eq. 13)."""
        own = torch.cat([views[VIS].confidence, views[IR].confidence])
        fused = views[FUSED]
        opened = evolve.gate(fused.confidence, own, self.settings.gate)
        return torch.where(opened, fused.clusters, -1)

    def _look_ahead(self, views: list[View], memories: dict[str, Tensor]) -> Tensor:
        """`[3, K, D]` prototypes one update on, `(1 - b) p + b mean f`, of which the features have a gradient."""
        if not self.settings.losses.look_ahead:
            return memories["prototypes"]
        chosen = self._accepted(views)
        return torch.stack(
            [
                look_ahead(
                    memories["prototypes"][view.number],
                    view.features,
                    chosen[view.rows],
                    self.settings.gate.step * view.confidence,
                )
                for view in views
            ]
        )

    def _align(self, output: Output, batch: Batch, memories: dict[str, Tensor]) -> dict[str, Tensor]:
        """`L_align`: class tokens at all four blocks are drawn to the fused prototype of their cluster (Eq. 11)."""
        settings = self.settings.losses
        if not settings.align or output.classes is None or not self.settings.vspf.enabled:
            return {}
        target = memories["prototypes"][FUSED][torch.cat([batch.own.vis, batch.own.ir])]
        tokens = output.classes
        if settings.align_directions:
            tokens = F.normalize(F.layer_norm(tokens, tokens.shape[-1:]), dim=2)
            target = F.normalize(target)
        return {"align": settings.align * (tokens - target).square().sum(2).mean(1).sum()}


def look_ahead(prototypes: Tensor, features: Tensor, clusters: Tensor, steps: Tensor) -> Tensor:
    """`(1 - b) p + b mean f` for each cluster that rows go to, b the mean of their steps; others stay as they are.

    Args:
        prototypes: `[K, D]`, constant; features: `[B, D]`; clusters: `[B]` int64, -1 = none; steps: `[B]`.
    """
    members = evolve.membership(clusters, len(prototypes)).to(features.dtype)
    number = members.sum(0).clamp(min=1).unsqueeze(1)
    step = members.T @ steps.unsqueeze(1) / number
    return (1 - step) * prototypes + step * (members.T @ features / number)


def prototype_loss(prototypes: Tensor, present: Tensor, split: Tensor) -> Tensor:
    """`L_proto = sum_k |p_fus - p_vis|^2 + |p_fus - p_ir|^2 + .5 [child] |p_vis - p_ir|^2` (Eq. 17).

    A term of a view that a cluster lacks is left out.

    Args:
        prototypes: `[3, K, D]`; present: `[3, K]` bool; split: `[K]` bool.
    """
    fused, vis, ir = prototypes
    pairs = (
        (fused, vis, present[VIS]),
        (fused, ir, present[IR]),
        (vis, ir, 0.5 * (split & present[VIS] & present[IR])),
    )
    return torch.stack([((one - other).square().sum(1) * weight).sum() for one, other, weight in pairs]).sum()
