"""A network that a run has trained, as evaluation, search, pictures and export take it up."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import checkpoint, data, methods
from engine.config import Config, Source, override, parse, to_dict
from engine.config import load as read_config
from engine.data import transforms
from engine.data.dataset import Images
from engine.device import pick_device
from engine.errors import UserError
from engine.evaluate import Score, decode, evaluate_network
from engine.methods.base import Method
from engine.pair import Pair


@dataclass(frozen=True)
class Trained:
    """A checkpoint, and the network that it holds.

    Attributes:
        config: the run's settings, with what was changed since.
        method: the method, whose `build` made the network.
        network: in evaluation mode, on `device`.
        content: of the checkpoint, as `checkpoint.load` gives it.
        path: of the checkpoint.
    """

    config: Config
    method: Method
    network: nn.Module
    device: torch.device
    content: dict[str, Any]
    path: Path

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the checkpoint's file, which is what `sha256sum` prints."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to an image before the network sees it, in this order, as plain values."""
        return {
            "channels": "RGB",
            "size": list(self.config.data.size),  # height, width
            "resize": "Lanczos (PIL.Image.Resampling.LANCZOS), the whole image, aspect not kept",
            "divisor": 255,
            "mean": [round(value, 6) for value in transforms.MEAN.flatten().tolist()],
            "std": [round(value, 6) for value in transforms.STD.flatten().tolist()],
        }

    @property
    def reads_captions(self) -> bool:
        """Whether the network was trained to look at captions too."""
        return getattr(self.network, "prompts", None) is not None

    def texts(self, images: Pair[Images]) -> Pair[Tensor] | None:
        """Tokens of the images' captions, where the method reads any."""
        return type(self.method)(self.config).texts(images)  # by the tokenizer of the weights that training began with


def load(path: Path, overrides: Sequence[str] = ()) -> Trained:
    """The network of a checkpoint, by the configuration that it carries.

    Args:
        path: as `checkpoint.locate` gives it for a command line.
        overrides: "a.b=c" changes, for example the data set's place, or another data set.

    Raises:
        UserError: not a checkpoint, another network than its settings tell, or a method that is a module of its own and is
            not named in `overrides`.
    """
    content = checkpoint.load(path)
    methods.refuse_foreign(content["config"], overrides, path)
    config = parse(override(content["config"], overrides))
    device = pick_device(config.device)
    blank = replace(config, model=replace(config.model, weights="none"))  # the checkpoint has the weights
    method = methods.find(config.method.name)(blank)
    network = method.build().to(device)
    checkpoint.load_network(network, content)
    return Trained(config, method, network.eval(), device, content, path)


def released(path: Path, cfg: str, overrides: Sequence[str] = ()) -> Trained:
    """A network that others released, without a run of this engine (`engine.model.weights`).

    Args:
        path: of its weights.
        cfg: the configuration, as for `config.load`, whose data set, image size and backbone are meant.

    Raises:
        UserError: not such weights, or of another network than the configuration has.
    """
    config = read_config(cfg, [*overrides, f"model.weights={json.dumps(str(path))}", "method.name=dcl"])
    device = pick_device(config.device)
    method = methods.find(config.method.name)(config)
    network = method.build().to(device)
    content = {"config": to_dict(config), "network": network.state_dict()}
    return Trained(config, method, network.eval(), device, content, path)


def take(run: str, name: str = "last", overrides: Sequence[str] = (), cfg: str = "") -> Trained:
    """The network that a command line names: of a run, a checkpoint, or, with a configuration, a released one."""
    return released(Path(run), cfg, overrides) if cfg else load(checkpoint.locate(run, name), overrides)


def evaluate_checkpoint(path: Path, overrides: Sequence[str] = (), rerank: Sequence[str] | None = None) -> list[Score]:
    """`evaluate_trained` of a checkpoint, by the configuration that it carries; `overrides` as for `load`."""
    return evaluate_trained(load(path, overrides), rerank)


def evaluate_trained(trained: Trained, rerank: Sequence[str] | None = None) -> list[Score]:
    """Score a network on its configuration's data set; re-ranking is timed.

    Args:
        rerank: re-ranked rows other than those of the configuration, as `Rerank.parse` takes them.

    Raises:
        UserError: the data set has nothing to score on, its test images were trained on under these settings, or there
            is no such re-ranker.
    """
    config = trained.config
    rerankers = None if rerank is None else [config.evaluate.rerank.parse(text) for text in rerank]
    refuse_leak(parse(trained.content["config"]), config)
    dataset = data.read(config.data)
    if dataset.test is None:
        raise UserError(f"{dataset.name}: has no query/ and gallery/ to score on")
    pixels = decode(dataset.test, config, "test")
    return evaluate_network(
        trained.network,
        dataset,
        pixels,
        config,
        trained.device,
        rerankers,
        texts=trained.texts(dataset.test),
        oracles=trained.method.oracles,
        timed=True,
    )


def refuse_leak(trained: Config, config: Config) -> None:
    """Raise a `UserError` where a network trained by one configuration has seen what the other one tests on."""
    before = trained.data.sources
    for place, new in config.data.sources.items():
        # At its old place and in its old layout it is the data set trained on, whose root may have moved.
        rivals = [before[place]] if place in before and before[place].name == new.name else before.values()
        for old in rivals:
            if old.name == new.name:
                _refuse_leak_between(old, new, place)


def _refuse_leak_between(old: Source, new: Source, place: str) -> None:
    if old.name == "regdb" and old.trial != new.trial:
        raise UserError(
            f"{place}.trial: the network was trained on split {old.trial} and cannot be scored on split {new.trial}, whose "
            f"test identities it has partly seen; set {place}.trial={old.trial}, or train on split {new.trial}"
        )
    if old.split == "test" and new.split == "val":
        raise UserError(
            f"{place}.split: the network was trained on the val identities; train with data.split=val to score them"
        )
