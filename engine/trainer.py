"""The training loop: features -> labels -> memories -> steps -> scores -> checkpoint, epoch after epoch."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine import checkpoint, data, distributed, methods, optim, report, runs, seeds, shards, stopping
from engine.cluster import Labels, quality
from engine.config import Config, Stage, to_dict
from engine.data.dataset import Images
from engine.data.loader import Batch, Loader
from engine.device import pick_device
from engine.errors import UserError
from engine.evaluate import Score, decode, evaluate_network
from engine.features import NAMES, autocast, extract
from engine.model.network import Output
from engine.pair import Pair
from engine.phases import Phases
from engine.shards import Memories
from engine.slices import Slices

# Streams of random numbers; every draw is keyed by one of these, the seed, the epoch and the step.
_SAMPLING, _AUGMENTING, _WARMING = 0, 1, 2


@dataclass
class State:
    """What changes during training, and all that a checkpoint must hold.

    Attributes:
        started: the untrained network is scored and the warm-up is over.
        epoch, step: the next ones to run, counted over all stages and within the epoch.
        labels, memories, totals: of the running epoch (totals: sums of the loss terms so far).
        milestones: scores of the untrained network, at the end of each stage, and so on, for the final table.
        best: number and scores of the best epoch by the main protocol's mAP.
    """

    started: bool = False
    epoch: int = 0
    step: int = 0
    labels: Labels | None = None
    labels_kept: bool = False
    memories: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)
    milestones: list[tuple[str, list[Score]]] = field(default_factory=list)
    best: tuple[int, list[Score]] | None = None


class Trainer:
    """One run in one folder.

    Args:
        config: the run's settings.
        folder: the run folder; made by `run` when it is new.
        resume: go on from the folder's last.pt, or previous.pt where that is damaged.
    """

    def __init__(self, config: Config, folder: Path, *, resume: bool = False) -> None:
        self.config, self.folder = config, folder
        self.device = pick_device(config.device)
        _set_precision(config)
        torch.manual_seed(config.seed)
        with distributed.one_first():
            self.dataset = data.read(config.data)
            self.method = methods.find(config.method.name)(config)
            self.network = self.method.build().to(
                self.device
            )  # missing weights are noticed before anything long begins
            self.slices = Slices(self.network, config)
            self.texts = self.method.texts(self.dataset.train)
            self.test_texts = self.method.texts(self.dataset.test) if self.dataset.test else None
            self.pixels = decode(self.dataset.train, config, "training")
            self.test_pixels = decode(self.dataset.test, config, "test") if self.dataset.test else None
        if config.train.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = optim.build(self.network, config.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.train.precision == "fp16")
        self.state = State()
        self.resume, self.saved = resume, (-1, -1)  # the epoch and the step of the latest checkpoint
        if config.train.start_from and not resume:
            self._start_from(config.train.start_from)
        self.forward: Any = torch.compile(self.network) if config.train.compile else self.network

    @cached_property
    def images(self) -> str:
        """What is trained on; looked at once, as every checkpoint says it and there may be millions of files."""
        return _fingerprint(self.dataset.train)

    def run(self) -> list[tuple[str, Score]]:
        """Train to the end; returns the rows of the final table, which is also in the folder's results.md.

        Raises:
            UserError: another process is at work in the folder, it cannot be written to, or a loss is not finite.
            Stopped: inside of `stopping.graceful`, a signal came; the running step was finished and saved before.
        """
        with runs.hold(self.folder) if distributed.is_main() else nullcontext():
            if self.resume:
                self._restore()
            elif distributed.is_main():
                runs.refuse_taken(self.folder)  # by a process that was quicker
                runs.create(self.folder, self.config)
            try:
                return self._run()
            except stopping.Stopped as stop:
                if self.state.started and not stop.cut and self.saved != (self.state.epoch, self.state.step):
                    with stopping.held():
                        self._save_stopped()  # behind the epoch's last step
                raise
            except RuntimeError as error:
                if "device-side assert" not in str(error):
                    raise
                raise UserError(
                    f"epoch {self.state.epoch + 1}, about step {self.state.step + 1}: the GPU stopped, for the reason that "
                    "it printed above. Checkpoints are as they were; --resume with --set device=cpu repeats the steps "
                    "since then where a loss that is not finite is named and its batch saved"
                ) from error

    def _run(self) -> list[tuple[str, Score]]:
        if distributed.world() > 1:
            self._check_images()
        schedule = list(_schedule(self.config.train.stages))
        self.log = report.Log(self.folder, self.state.epoch, self.config.tensorboard)
        if not self.state.started:
            self._start()
        elif self.state.epoch == len(schedule):
            self.log.say("this run has finished already; its results:")
        elif self.resume:
            self.log.say(f"going on in epoch {self.state.epoch + 1} after step {self.state.step}")
        for epoch, stage in schedule[self.state.epoch :]:
            self._epoch(epoch, stage, len(schedule))
        return self._results()

    def _check_images(self) -> None:
        """Raise a `UserError` where this process, on a machine of its own, has other images than the main one."""
        test = {"test": _fingerprint(self.dataset.test)} if self.dataset.test else {}
        found = {"training": self.images} | test
        for part, expected in distributed.from_main(found).items():
            if found[part] != expected:
                raise UserError(
                    f"the {part} images are not those of the main process ({expected} there, {found[part]} here); every "
                    "machine needs the same data set, whole"
                )

    def _start(self) -> None:
        """Score the network as it is, and warm it up where that is wanted."""
        loaded = bool(self.config.train.start_from)
        self._milestone("as loaded" if loaded else "untrained")
        if self.config.train.warm_up.iterations and not loaded:
            try:
                self._warm_up()
            except RuntimeError as error:
                if "is not finite" not in str(error):
                    raise
                raise UserError(
                    f"{error}; lower optim.lr, or raise train.warm_up.temperature, and start again"
                ) from error
            self._milestone("after warm-up")
        with stopping.held():
            self.state.started = True
            self._save("last.pt")

    def _epoch(self, epoch: int, stage: int, epochs: int) -> None:
        settings = self.config.train.stages[stage]
        within = epoch - sum(earlier.epochs for earlier in self.config.train.stages[:stage])
        state, phases = self.state, Phases(self.device)
        if within == 0 and state.step == 0:
            self.optimizer = optim.build(self.network, self.config.optim)
        rate = optim.learning_rate(self.config.optim, within, settings.epochs)
        if state.step == 0:
            self._label(stage, phases)
        assert state.labels is not None
        first_step = state.step
        with phases("train"):
            self._steps(settings, epoch, within, stage, rate)
            distributed.check_equal(self.network.state_dict() | shards.equal(state.memories))
        last = within == settings.epochs - 1
        scores = []
        with phases("evaluate"):
            if self.test_pixels is not None and (last or (epoch + 1) % self.config.evaluate.every == 0):
                scores = self._scores()
        described = {name: _plain_number(value) for name, value in self.method.describe(state.labels).items()}
        labels = described | quality(state.labels, self.dataset.train.map(lambda x: x.ids))
        kinds = 3 if self.config.augment.channels else 2
        images = kinds * settings.labels * settings.images * (settings.iterations - first_step)
        row = {
            "epoch": epoch + 1,
            "epochs": epochs,
            "stage": stage + 1,
            "lr": rate,
            "labels": labels,
            "labels_kept": state.labels_kept,
            "losses": {name: float(total) / settings.iterations for name, total in state.totals.items()},
            "scores": [asdict(score) for score in scores],
            "seconds": phases.seconds,
            "images_per_second": images / phases.seconds["train"],
            "peak_mib": report.peak_memory(self.device),
        }
        main = [asdict(score) for score in scores if score.protocol == scores[0].protocol]
        with stopping.held():
            self.log.say(report.epoch_block(row | {"scores": main}))
            self.log.record(row)
            state.epoch, state.step, state.totals = epoch + 1, 0, {}
            if scores and (state.best is None or scores[0].values["mAP"] > state.best[1][0].values["mAP"]):
                state.best = (epoch + 1, scores)
                self._save("best.pt")
            if last:
                if scores:
                    end = " (last epoch)" if epoch + 1 == epochs else ""
                    state.milestones.append((f"after stage {stage + 1}{end}", scores))
                self._save(f"stage{stage + 1}.pt")
            self._save("last.pt")

    def _label(self, stage: int, phases: Phases) -> None:
        """The offline step at the start of an epoch: features, pseudo-labels, memories."""
        state = self.state
        if not self.method.lasting:
            state.memories = {}  # beside the features, which they are as large as
        with phases("extract"):
            self.method.memory = state.memories
            features = extract(
                self.network,
                self.pixels,
                self.config,
                self.device,
                stage=stage,
                progress="training images",
                texts=self.texts,
            )
            # Features that are mapped are on the CPU, and so are labels and memories while they are made.
            place = features.whole.vis.device
            self.method.memory = {name: bank.to(place) for name, bank in state.memories.items()}
        with distributed.sharing():
            labels = self.method.label(features, stage, phases)
        distributed.check_equal({"labels": torch.cat([*labels.clusters, *labels.own, *(labels.cross or ())])})
        state.labels_kept = 0 in labels.counts
        if state.labels_kept:
            empty = [word for word, count in zip(NAMES.values(), labels.counts, strict=True) if count == 0]
            if state.labels is None:
                eps, settings = tuple(self.config.cluster.eps), self.config.cluster
                raise UserError(
                    f"no cluster among the {' and '.join(empty)} images: nothing to learn from. Raise cluster.eps (visible "
                    f"{eps[0]}, infrared {eps[1]}), lower cluster.min_samples ({settings.min_samples}), or start from "
                    "better features (model.weights, train.warm_up)"
                )
            self.log.say(f"no cluster among the {' and '.join(empty)} images: the last epoch's labels are kept")
            labels = state.labels.to(place)
        with phases("memories"):
            memories = self.method.memories(features, labels)
            state.memories = self.method.memory = {name: bank.to(self.device) for name, bank in memories.items()}
        state.labels = labels.to(self.device)

    def _steps(self, settings: Stage, epoch: int, within: int, stage: int, rate: float) -> None:
        state, config = self.state, self.config
        assert state.labels is not None
        loader = Loader(self.pixels, config.augment, self.device, (_AUGMENTING, config.seed), self.texts)
        plan = self._plan(settings, epoch)
        batches = loader.batches(plan, state.labels, epoch, ltg=stage == 0, start=state.step)
        title = f"epoch {epoch + 1} (stage {stage + 1}, {within + 1}/{settings.epochs})"
        quiet = None if distributed.is_main() else True
        bar = tqdm(batches, title, settings.iterations, initial=state.step, leave=False, disable=quiet, unit="step")
        self.network.train()
        with stopping.held():
            for batch in bar:
                optim.set_rate(self.optimizer, config.optim, rate, within * settings.iterations + state.step)
                try:
                    terms = self._step(batch, stage)
                except RuntimeError as error:
                    if "is not finite" not in str(error):
                        raise
                    rows = next(islice(self._plan(settings, epoch), state.step, None))
                    raise self._failed(str(error), batch, rows) from error
                for name, value in terms.items():
                    state.totals[name] = state.totals.get(name, torch.zeros((), device=self.device)) + value
                state.step += 1
                every = config.train.checkpoint_steps
                number = distributed.largest(stopping.waiting())
                if number:  # all processes stop behind the same step, whichever was told to
                    self._save_stopped(shards.whole(state.memories))
                    distributed.largest(0)  # when the first one leaves, torchrun ends the one that saves
                    raise stopping.Stopped(number)
                if every and state.step % every == 0 and state.step < settings.iterations:
                    self._save("last.pt", shards.whole(state.memories))
        if state.step < settings.iterations:
            raise UserError(
                f"{config.method.name}: its batches ended after {state.step} steps of an epoch; expected "
                f"{settings.iterations} (train.stages.{stage}.iterations)"
            )
        self._check_network()

    def _plan(self, settings: Stage, epoch: int) -> Iterator[Pair[np.ndarray]]:
        """The rows of every batch of an epoch."""
        assert self.state.labels is not None
        rng = seeds.random_state(_SAMPLING, self.config.seed, epoch)
        return islice(self.method.batches(self.state.labels, settings, rng), settings.iterations)

    def _failed(self, problem: str, batch: Batch, rows: Pair[np.ndarray]) -> UserError:
        """The error for a step whose loss is not finite; what it worked on is saved for a look at it."""
        state, file = self.state, self.folder / "failed_step.pt"
        content: dict[str, Any] = {
            "problem": problem,
            "epoch": state.epoch + 1,
            "step": state.step + 1,
            "rows": vars(rows.map(torch.from_numpy)),
            "paths": vars(self.dataset.train.map(lambda images, chosen: [images.paths[i] for i in chosen], rows)),
            "images": {"vis": batch.vis, "aug": batch.aug, "ir": batch.ir},
            "own": vars(batch.own),
            "cross": batch.cross and vars(batch.cross),
            "memory_norms": {
                name: bank.float().norm(dim=-1) for name, bank in state.memories.items() if bank.dim() > 1
            },
        }
        if distributed.is_main():
            checkpoint.save(file, content)
        return UserError(
            f"epoch {state.epoch + 1}, step {state.step + 1}: {problem}. Nothing of this step was kept but its batch, in "
            f"{file}; start a new run with a lower optim.lr, or train.precision=fp32 ({self._earlier})"
        )

    def _step(self, batch: Batch, stage: int) -> dict[str, Tensor]:
        """One optimiser step and the update of the memories; returns the loss terms."""
        output = self._forward(stage, **self.method.inputs(batch))
        terms = self.method.losses(output, batch, self.state.memories)
        for name, term in terms.items():
            _assert_finite(term, name)
        distributed.check_terms(terms, self.network)
        self.scaler.scale(torch.stack(list(terms.values())).sum()).backward()
        self._descend()
        self.method.update(output, batch, self.state.memories)
        return {name: term.detach() for name, term in terms.items()}

    def _warm_up(self) -> None:
        """Steps on random images, before the first clustering."""
        settings, key = self.config.train.warm_up, (_WARMING, self.config.seed)
        rng = seeds.random_state(*key)
        plan = (
            self.pixels.map(lambda pixels: rng.choice(len(pixels), min(settings.images, len(pixels)), replace=False))
            for _ in range(settings.iterations)
        )
        loader = Loader(self.pixels, self.config.augment, self.device, key, self.texts)
        self.network.train()
        quiet = None if distributed.is_main() else True
        bar = tqdm(loader.views(plan), "warm-up", settings.iterations, leave=False, disable=quiet, unit="step")
        for step, views in enumerate(bar):
            optim.set_rate(self.optimizer, self.config.optim, self.config.optim.lr, step)
            terms = self.method.warm_up(functools.partial(self._forward, 0), views)
            for name, term in terms.items():
                _assert_finite(term, f"warm-up {name}")
            self.scaler.scale(torch.stack(list(terms.values())).sum()).backward()
            self._descend()

    def _descend(self) -> None:
        distributed.add_gradients(self.network)
        if self.config.optim.clip:
            self.scaler.unscale_(self.optimizer)
            optim.clip(self.optimizer, self.config.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _forward(self, stage: int, **inputs: Tensor | Sequence[Tensor]) -> Output:
        """The output for a whole batch, on every process."""

        def forward(**images: Tensor) -> Output:
            if self.config.train.channels_last:
                images = {
                    name: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
                    for name, x in images.items()
                }
            with autocast(self.config, self.device):
                return self.forward(**images, stage=stage)

        return self.slices.compute(forward, inputs)

    def _scores(self) -> list[Score]:
        assert self.test_pixels is not None
        return evaluate_network(
            self.network,
            self.dataset,
            self.test_pixels,
            self.config,
            self.device,
            texts=self.test_texts,
            oracles=self.method.oracles,
        )

    def _milestone(self, name: str) -> None:
        if self.test_pixels is None:
            return
        scores = self._scores()
        self.state.milestones.append((name, scores))
        self.log.say(f"{name}: {scores[0].protocol} R1 {scores[0].values['R1']:.2f} mAP {scores[0].values['mAP']:.2f}")

    def _results(self) -> list[tuple[str, Score]]:
        """Rows of the final table, written to results.md as well."""
        state = self.state
        if not state.milestones:
            return []
        main = self.dataset.protocols[0].name
        rows = [(name, scores[0]) for name, scores in state.milestones]
        if state.best is not None:
            rows.append((f"best epoch ({state.best[0]}), chosen on these scores", state.best[1][0]))
        name, final = state.milestones[-1]
        rows += [(name, score) for score in final if score.protocol != main and not score.rerank]
        rows += [(f"{name} + {score.rerank}", score) for score in final if score.rerank]
        if distributed.is_main():
            checkpoint.write(self.folder / "results.md", (report.table(rows) + "\n").encode())
        return rows

    def _save_stopped(self, memories: Memories | None = None) -> None:
        self._save("last.pt", memories)
        self.log.say(f"stopped in epoch {self.state.epoch + 1} after step {self.state.step}, which is saved")

    def _save(self, name: str, memories: Memories | None = None) -> None:
        """Write a checkpoint; with the epoch's whole memories where steps are still to come."""
        state = self.state
        self._check_network()
        if memories is None:  # most methods begin an epoch with fresh ones
            memories = shards.equal(state.memories) if state.step or self.method.lasting else {}
        latest = name == "last.pt"
        if distributed.is_main():
            content: dict[str, Any] = {
                "config": to_dict(self.config),
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "started": state.started,
                "epoch": state.epoch,
                "step": state.step,
                "labels": _plain_labels(state.labels),
                "labels_kept": state.labels_kept,
                "memories": memories,
                "totals": state.totals,
                "milestones": [[label, [asdict(score) for score in scores]] for label, scores in state.milestones],
                "best": state.best and [state.best[0], [asdict(score) for score in state.best[1]]],
                "rng": torch.get_rng_state(),
                "cuda_rng": [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [],
                "images": self.images,
            }
            checkpoint.save(self.folder / name, content, keep=self.folder / "previous.pt" if latest else None)
        if latest:
            self.saved = state.epoch, state.step

    @property
    def _earlier(self) -> str:
        """How not to begin from nothing with other settings, which a resumed run may not change."""
        return f"train.start_from={self.folder} takes its network after stage 1, where there is one"

    def _check_network(self) -> None:
        """Raise a `UserError` for weights that are not finite, though the losses before them were."""
        wrong = [name for name, value in self.network.state_dict().items() if not value.isfinite().all()]
        if wrong:
            raise UserError(
                f"epoch {self.state.epoch + 1}, step {self.state.step}: '{wrong[0]}' of the network is not finite. Checkpoints "
                f"are as they were; start a new run with a lower optim.lr, with optim.clip, or train.precision=fp32 ({self._earlier})"
            )

    def _restore(self) -> None:
        """Go on from the folder's latest checkpoint."""
        with distributed.one_first():  # what it sets aside, others do not find
            content, path = checkpoint.latest(self.folder)
            if path.name != "last.pt" and distributed.is_main():
                checkpoint.set_damaged_aside(self.folder)
        try:
            self._take_over(content)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: not a checkpoint to go on from ({error!r}); start a new run") from error

    def _take_over(self, content: dict[str, Any]) -> None:
        if content["images"] != self.images:
            raise UserError(
                f"{self.folder}: the training images are not those this run was started with ({content['images']} then, "
                f"{self.images} now); restore the data set, or start a new run"
            )
        checkpoint.load_network(self.network, content)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        memories = shards.share(content["memories"], self.method.shared if self.config.memory.shard else ())
        moved = {name: bank.to(self.device) for name, bank in memories.items()}
        totals = {name: total.to(self.device) for name, total in content["totals"].items()}
        best = content["best"]
        self.state = State(
            content["started"],
            *_place(content, self.config.train.stages),
            _labels(content["labels"], self.device),
            content["labels_kept"],
            moved,
            totals,
            [(label, [Score(**score) for score in scores]) for label, scores in content["milestones"]],
            best and (best[0], [Score(**score) for score in best[1]]),
        )
        self.method.memory = self.state.memories
        self.saved = self.state.epoch, self.state.step
        torch.set_rng_state(content["rng"])
        if content["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["cuda_rng"][0], self.device)  # of a run on other GPUs there may be more

    def _start_from(self, source: str) -> None:
        """Take over a network that finished some stages, and begin after them."""
        content = checkpoint.load(checkpoint.locate(source, "stage1"))
        checkpoint.load_network(self.network, content, fresh="parts")  # stage 1 trains none
        done, ends = content.get("epoch"), list(accumulate(stage.epochs for stage in self.config.train.stages))
        if done not in ends[:-1] or content.get("step") != 0:
            raise UserError(
                f"train.start_from: {source} was saved after {done} epochs; with train.stages of "
                f"{', '.join(str(stage.epochs) for stage in self.config.train.stages)} epochs it must end a stage but the "
                f"last (after {', '.join(map(str, ends[:-1])) or 'none'})"
            )
        self.state.epoch = done


def _set_precision(config: Config) -> None:
    torch.set_float32_matmul_precision("high" if config.train.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = config.train.precision == "tf32"
    torch.use_deterministic_algorithms(config.deterministic)


def _schedule(stages: tuple[Stage, ...]) -> Iterator[tuple[int, int]]:
    """(epoch, stage) for every epoch of the run."""
    epoch = 0
    for index, stage in enumerate(stages):
        for _ in range(stage.epochs):
            yield epoch, index
            epoch += 1


def _place(content: dict[str, Any], stages: tuple[Stage, ...]) -> tuple[int, int]:
    """Epoch and step that a checkpoint goes on with, or a `ValueError` where the run has no such step."""
    epoch, step = content["epoch"], content["step"]
    ends = [*(stages[stage].iterations for _, stage in _schedule(stages)), 0]  # a finished run is behind its last epoch
    if not (type(epoch) is type(step) is int and 0 <= epoch < len(ends) and 0 <= step <= ends[epoch]):
        raise ValueError(f"epoch {epoch!r}, step {step!r}: this run has {len(ends) - 1} epochs")
    return epoch, step


def _assert_finite(term: Tensor, name: str) -> None:
    if not isinstance(term, Tensor) or term.dim():
        found = f"a tensor {list(term.shape)}" if isinstance(term, Tensor) else repr(term)
        raise UserError(f"loss term '{name}': expected a tensor of no dimensions, as .mean() gives, got {found}")
    torch._assert_async(torch.isfinite(term.detach()), f"loss term '{name}' is not finite")


def _plain_number(value: Any) -> Any:
    """A number that JSON can hold, of one that may be torch's or numpy's."""
    return value.item() if isinstance(value, Tensor | np.generic) else value


def _plain_labels(labels: Labels | None) -> list[Any] | None:
    if labels is None:
        return None
    return [part and list(part) for part in (labels.clusters, labels.own, labels.cross)]


def _labels(content: list[Any] | None, device: torch.device) -> Labels | None:
    if content is None:
        return None
    return Labels(*(part and Pair(*(rows.to(device) for rows in part)) for part in content))


def _fingerprint(images: Pair[Images]) -> str:
    """What a run was trained on, wherever it lies: the names and sizes of the files."""
    digest = hashlib.sha256()
    for path in images.vis.paths + images.ir.paths:
        digest.update(f"{'/'.join(Path(path).parts[-3:])} {os.path.getsize(path)}\n".encode())
    return f"{len(images.vis)} visible and {len(images.ir)} infrared images, {digest.hexdigest()[:12]}"
