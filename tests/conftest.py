"""One tree per layout, built once for all tests that only read it. A test that damages a tree builds its own."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
import trees


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks of this size run slower on two threads, and far slower where something else runs too."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """A shell has what it starts in the background, this process and its children, ignore SIGINT, which tests send."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def sysu_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trees.build_sysu(tmp_path_factory.mktemp("sysu"))


@pytest.fixture(scope="session")
def regdb_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trees.build_regdb(tmp_path_factory.mktemp("regdb"))


@pytest.fixture(scope="session")
def llcm_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trees.build_llcm(tmp_path_factory.mktemp("llcm"))


@pytest.fixture(scope="session")
def folder_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trees.build_folder(tmp_path_factory.mktemp("footage"))
