"""Training runs of seconds: a tiny network on a small tree."""

from __future__ import annotations

from pathlib import Path

import yaml

from engine import config
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


def start(loaded: Config, folder: Path) -> Trainer:
    return Trainer(loaded, folder)


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
