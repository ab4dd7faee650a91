"""Features on the disk: mapped files without names, and memory that does not grow with them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

from engine import config, storage
from engine.errors import UserError
from engine.storage import MEMORY, Storage

LIKE = {dtype: torch.empty(0, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)}


def mapped_files() -> list[str]:
    """Deleted files that this process maps."""
    with open("/proc/self/maps") as maps:
        return [line for line in maps if line.endswith("(deleted)\n") and "/features/" in line]


@pytest.fixture
def disk(tmp_path):
    return Storage(tmp_path / "features")


@pytest.mark.parametrize("like", LIKE.values(), ids=str)
def test_rows_are_taken_alike_into_memory_and_files(disk, like):
    parts = torch.arange(3 * 5 * 4).view(3, 5, 4).to(like.dtype)
    rows = torch.tensor([4, 0, 0, 2])
    for place in (MEMORY, disk):
        taken = place.take(list(parts), rows)
        assert taken.dtype == like.dtype and torch.equal(taken, parts[:, rows])
    assert len(mapped_files()) == 1
    taken[0, 0, 0] = 7
    assert taken[0, 0, 0] == 7


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3)])
def test_what_is_empty_needs_no_file(disk, shape):
    assert disk.empty(*shape, like=LIKE[torch.float64]).shape == shape and not mapped_files()


def test_files_have_no_names_and_end_with_their_tensors(disk):
    rows = disk.empty(1000, 8, like=LIKE[torch.float32])[500:]
    rows.fill_(1)
    assert list(disk.folder.iterdir()) == [] and len(mapped_files()) == 1 and rows.sum() == 4000
    del rows
    assert mapped_files() == []


def test_a_full_disk_is_said_before_anything_is_written(disk, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"needs 32,000 bytes in .*features, where .* are free; .*data\.cache"):
        disk.empty(1000, 8, like=LIKE[torch.float32])


def test_the_setting_names_the_place(tmp_path):
    demo = config.load("demo.yaml", [f"data.cache={tmp_path}"])
    assert storage.of(demo) == MEMORY
    demo = config.load("demo.yaml", [f"data.cache={tmp_path}", "train.features=disk"])
    assert storage.of(demo) == Storage(tmp_path)


LIMITED = """
import resource, sys
import torch
from torch import nn
from torch.nn import functional as F
from engine import config, seeds
from engine.features import extract
from engine.methods.salcr import Salcr
from engine.model.network import Output
from engine.pair import Pair
from engine.phases import Phases

COUNT, CPU = 2000, torch.device("cpu")  # images of a modality: 16 MiB of features, 47 of those of parts

def images(modality):  # of 100 people
    people, noise = torch.rand(100, 4, 4, 3), torch.rand(COUNT, 4, 4, 3)
    return (255 * (0.6 * people.repeat(COUNT // 100, 1, 1, 1) + 0.2 * noise + 0.1 * modality)).byte().numpy()

class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 4 * 2048, bias=False)
    def forward(self, stage, **images):
        (rows,) = images.values()
        found = F.normalize(self.layer(rows.flatten(1)).unflatten(1, (4, 2048)), dim=2)
        return Output(rows, found[:, 0], found[:, 1:].transpose(0, 1)[:, None, None])

def label(place):
    settings = config.load("sysu.yaml", ["data.root=.", f"data.cache={sys.argv[1]}", f"train.features={place}"])
    method = Salcr(settings)
    features = extract(network, pixels, settings, CPU, stage=1)
    labels = method.label(features, 1, Phases(CPU))
    return labels, method.memories(features, labels)

def limit(mib):
    lines = open("/proc/self/status").read().splitlines()
    used = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + mib * 2**20, -1))  # files that are mapped do not count

torch.set_num_threads(1)
torch.manual_seed(0)
network, pixels = Projected(), Pair(images(0), images(1))
expected, memories = label("memory")
sample = {name: bank[:, ::20].clone() for name, bank in memories.items()}
del memories
limit(MIB)
found, memories = label("disk")
for name in ("clusters", "own", "cross"):
    for modality in ("vis", "ir"):
        assert torch.equal(getattr(found, name)[modality], getattr(expected, name)[modality])
assert min(found.counts) >= 50, found.counts
assert all(torch.equal(bank[:, ::20], sample[name]) for name, bank in memories.items()) and len(memories) == 4
del memories
try:
    label("memory")
except RuntimeError as error:
    assert "can't allocate memory" in str(error)
    print("memory alone does not suffice")
"""


def test_labels_are_the_same_in_less_memory_than_the_features_take(tmp_path):
    command = [sys.executable, "-c", LIMITED.replace("MIB", "110"), str(tmp_path)]  # 52 suffice; in memory, 280
    returned = {f"MALLOC_{name}_THRESHOLD_": "65536" for name in ("MMAP", "TRIM")}  # or what was freed counts as used
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | returned)
    assert done.returncode == 0 and "memory alone does not suffice" in done.stdout, done.stderr[-2000:]
