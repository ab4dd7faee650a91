"""Training runs of seconds: a tiny network on a small tree."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor

from engine import checkpoint, config, methods
from engine.config import Config
from engine.data import captions
from engine.trainer import Trainer

SETTINGS = """
data: {name: sysu, root: ROOT, size: [48, 24], cache: CACHE, workers: 2}
augment: {pad: 2, jitter: 0.2, erase: 0.2, ltg: 0}
model: {backbone: small, weights: none}
cluster: {k1: 8, k2: 3, eps: 0.6, min_samples: 2}
optim: {lr: 0.001}
train:
  warm_up: {iterations: 3, images: 8}
  stages:
    - {epochs: 2, iterations: 3, labels: 2, images: 2}
    - {epochs: 2, iterations: 3, labels: 2, images: 2}
evaluate: {every: 1, batch: 64, rerank: {rows: [cmfp], cmfp: {k: 3}}}
method: {name: salcr}
salcr: {cmfp: {k: 4}, gpcr: {k: 4}}
"""

FIRM = ("method.name=firm", "augment.channels=false", "model.backbone=vit_small", "firm.missing_caption=empty")


def write_settings(root: Path, cache: Path, path: Path) -> Path:
    """A configuration file for `root`, as a user would have one."""
    path.write_text(SETTINGS.replace("ROOT", str(root)).replace("CACHE", str(cache)))
    return path


def settings(root: Path, cache: Path, *overrides: str) -> Config:
    content = yaml.safe_load(SETTINGS.replace("ROOT", str(root)).replace("CACHE", str(cache)))
    return config.parse(config.override(content, overrides))


def write_run(tree: Path, place: Path, seed: int, *overrides: str) -> Path:
    """A run folder with a checkpoint of random weights, which tell people of the trees apart to some degree."""
    loaded = settings(tree, place / "cache", *overrides)
    torch.manual_seed(seed)
    network = methods.find(loaded.method.name)(loaded).build()
    place.mkdir(exist_ok=True)
    checkpoint.save(place / "last.pt", {"network": network.state_dict(), "config": config.to_dict(loaded)})
    return place


def start(loaded: Config, folder: Path) -> Trainer:
    return Trainer(loaded, folder)


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Inside, whoever has trained this many steps is interrupted before the next one."""
    step, done = Trainer._step, list[int]()

    def interrupted(self: Trainer, *arguments: Any) -> dict[str, Tensor]:
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(0)
        return step(self, *arguments)

    with mock.patch.object(Trainer, "_step", interrupted):
        yield


class Inside:
    """A run's process to `tools/experiments.py`, without the seconds that a new interpreter takes."""

    started: list[str]
    failing: tuple[str, ...]

    def __init__(self, run: Any, threads: int) -> None:
        name = run.folder.name
        Inside.started.append(name)
        self.returncode = 0
        try:
            with redirect_stdout(io.StringIO()):
                Trainer(run.config, run.folder, resume=(run.folder / "last.pt").exists()).run()
            if name in Inside.failing:
                raise RuntimeError("made to fail")
        except KeyboardInterrupt:
            self.returncode = 130
        except RuntimeError as error:
            (run.folder / "results.md").unlink()
            (run.folder / "output.txt").write_text(f"a line\n{error}\n")
            self.returncode = 1

    def poll(self) -> int:
        return self.returncode


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, but for times and memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("epoch", "stage", "lr", "labels", "losses", "scores")} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics, network and memories are equal to the bit."""
    assert metrics(one) == metrics(other)
    found, expected = (checkpoint.load(folder / "last.pt") for folder in (one, other))
    for part in ("network", "memories"):
        assert found[part].keys() == expected[part].keys()
        for name, value in found[part].items():
            assert torch.equal(value, expected[part][name]), name


def write_captions(root: Path, folder: Path) -> str:
    """Caption files of a tree in `folder`, a colour per identity, and the setting that names them."""
    words = ("red", "green", "blue", "brown", "black", "grey")
    rows = {}
    for path in root.rglob("*.jpg"):
        word = words[int(path.parent.name) % len(words)]
        rows[str(path)] = (f"a person in a {word} coat", f"somebody wears a {word} coat")
    files = captions.FILES.map(lambda name: folder / name)
    for file in files:
        captions.save(file, root, rows)
    return f"firm.captions={{vis: {files.vis}, ir: {files.ir}}}"
