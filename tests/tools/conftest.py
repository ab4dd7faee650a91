"""Finished runs of every kind, for tools that show or use them."""

from __future__ import annotations

import pytest
import trees
from small_runs import FIRM, settings, start, write_captions


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("pictured")


@pytest.fixture(scope="session")
def salcr(sysu_tree, place):
    start(settings(sysu_tree, place / "cache"), place / "salcr").run()
    return place / "salcr"


@pytest.fixture(scope="session")
def firm(sysu_tree, place):
    captions = write_captions(sysu_tree, place)
    short = ("train.warm_up.iterations=0", "firm.bootstrap.every=1", captions)
    start(settings(sysu_tree, place / "cache", *FIRM, *short), place / "firm").run()
    return place / "firm"


@pytest.fixture(scope="session")
def footage(place):
    root = trees.build_folder(place / "footage", scored=False)
    stage = "train.stages=[{epochs: 1, iterations: 1, labels: 2, images: 2}]"
    changes = ("data.name=folder", "method.name=dcl", "train.warm_up.iterations=0", stage)
    start(settings(root, place / "cache", *changes), place / "unscored").run()
    return place / "unscored"
