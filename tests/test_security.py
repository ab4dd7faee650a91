"""Files that come from others: nothing in them is run, nothing outside of the data set is read, and bad ones are only errors."""

from __future__ import annotations

import ast
import copy
import io
import json
import os
import runpy
import shutil
import struct
import sys
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from small_runs import SETTINGS, settings, start

from engine import checkpoint, config, runs, trained
from engine.config import Config
from engine.data import cache, captions, layout, regdb
from engine.errors import UserError
from engine.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("engine", "kernels", "tools") for path in (ROOT / folder).rglob("*.py")]
quickly = examples(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels", "ignore:.*omplex")

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
"""Values of kinds that nobody would give."""


@pytest.fixture(scope="module")
def saved(sysu_tree, tmp_path_factory):
    """The folder of a run, as `train.py` leaves one, stopped within an epoch."""
    folder = tmp_path_factory.mktemp("saved")
    short = (
        "train.stages.0.epochs=1",
        "train.stages.1.epochs=1",
        "train.warm_up.iterations=0",
        "evaluate.rerank.rows=[]",
    )
    start(settings(sysu_tree, folder / "cache", *short), folder / "run").run()
    return folder / "run"


def mutate(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """`content` with runs of bytes replaced, at places that wrap around."""
    for place, length, new in edits:
        start = place % (len(content) + 1)
        content = content[:start] + new + content[start + length :]
    return content


score_arrays = runpy.run_path(str(ROOT / "tools" / "evaluate.py"))["_score_arrays"]
edits = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 40), st.binary(max_size=6)), min_size=1, max_size=4)


# Nothing is run


def test_no_source_reads_what_could_run_code():
    """Pickles, YAML's objects, evaluated text and shells."""
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                wrong += [
                    (path.name, name) for name in names if name in ("pickle", "dill", "cloudpickle", "joblib", "shelve")
                ]
            if isinstance(node, ast.Call):
                called, given = ast.unparse(node.func), ast.unparse(node)
                bad = {
                    "torch.load": "weights_only=True" not in given,
                    "yaml.load": "_Loader" not in given,
                    "eval": True,
                    "os.system": True,
                }.get(called, "allow_pickle=True" in given or "shell=True" in given)
                wrong += [(path.name, given)] if bad else []
    assert wrong == []


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(self.place),)

    def __init__(self, place):
        self.place = place


def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    torch.save({"network": {}, "config": {}, "more": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_arrays_is_refused_and_not_run(tmp_path):
    np.savez(tmp_path / "evil.npz", distance=np.array([Evil(tmp_path / "ran")], dtype=object))
    with pytest.raises(UserError, match="not an .npz file of plain arrays"):
        score_arrays(tmp_path / "evil.npz", "plain", [])
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_would_unpack_to_more_is_refused(saved, tmp_path):
    with zipfile.ZipFile(saved / "last.pt") as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="would unpack to more than it is"):
        checkpoint.load(tmp_path / "bomb.pt")


FOREIGN = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nfrom engine.methods.salcr import Salcr\n"


def test_a_module_that_a_run_names_is_run_only_if_the_user_names_it_too(saved, tmp_path, monkeypatch):
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "own.py").write_text(f"{FOREIGN}\n\nclass Own(Salcr):\n    pass\n")
    folder = shutil.copytree(saved, tmp_path / "run")
    content = checkpoint.load(folder / "last.pt")
    content["config"] |= {"method": {"name": "sent.own"}}
    checkpoint.save(folder / "last.pt", content)
    monkeypatch.syspath_prepend(str(tmp_path))
    for read in (
        lambda *more: trained.load(folder / "last.pt", more),
        lambda *more: runs.reopen(str(folder), list(more)),
    ):
        with pytest.raises(
            UserError, match=r"is the module 'sent\.own', which would be run.*--set method\.name=sent\.own"
        ):
            read()
    assert not (tmp_path / "sent" / "ran").exists() and "sent" not in sys.modules
    trained.load(folder / "last.pt", ["method.name=sent.own"])
    assert (tmp_path / "sent" / "ran").exists()


def test_the_settings_beside_a_checkpoint_are_not_trusted_either(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("name: salcr", "name: sent.own"))
    with pytest.raises(UserError, match="which would be run"):
        runs.reopen(str(folder), [])


# Nothing else is read, nothing is filled


@pytest.mark.parametrize(
    "name", ["../secret.bmp", "/etc/secret.bmp", "Visible/../../secret.bmp", "..", " ../secret.bmp"]
)
def test_a_list_cannot_name_files_outside_of_its_data_set(tmp_path, name):
    (tmp_path / "root" / "idx").mkdir(parents=True)
    (tmp_path / "secret.bmp").write_bytes(b"")
    (tmp_path / "root" / "idx" / "list.txt").write_text(f"{name} 1\n")
    with pytest.raises(UserError, match=r"list\.txt, line 1, names '.*', which leaves .*root"):
        layout.read_list(tmp_path / "root", "idx/list.txt")


def test_a_data_set_may_be_made_of_links(regdb_tree, tmp_path):
    for folder in regdb_tree.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    assert len(regdb.read(tmp_path).train.vis) == len(regdb.read(regdb_tree).train.vis)


def test_only_images_are_decoded_whatever_their_names(tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n")
    with pytest.raises(UserError, match=r"a\.png: cannot identify image"):
        cache.decode(layout.collect([(str(tmp_path / "a.png"), 1, 1)]), (16, 16), folder=str(tmp_path))
    assert Image.open(tmp_path / "a.png").format == "EPS"  # which Pillow would give to Ghostscript


def test_an_absurd_size_is_refused_before_memory_is_taken(tmp_path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0))
    image = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(image)
    with pytest.raises(UserError, match=r"a\.png: has more than 67,108,864 pixels \(data\.max_pixels\)"):
        cache.decode(layout.collect([(str(tmp_path / "a.png"), 1, 1)]), (16, 16), folder=str(tmp_path))


def test_the_cache_cleans_away_its_own_files_alone(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name in ("work.tmp", f"notes-{'a' * 32}.tmp"):
        (tmp_path / name).touch()
    cache.decode(layout.collect([(str(tmp_path / "a.png"), 1, 1)]), (16, 16), folder=str(tmp_path))
    assert len(list(tmp_path.glob("*.tmp"))) == 2


# Bad files are errors, never crashes


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "seed: &me [*me]",
        "[" * 5000,
        "seed: 2001-99-99",
        "seed: 0b",
        "seed: " + "9" * 5000,
        "? [a, b]\n: c",
        "!!python/object/apply:os.mkdir [ran]",
        "\x00",
        "data: {name: demo, root: \ud800}",
    ],
)
def test_hostile_yaml_is_refused(tmp_path, text):
    (tmp_path / "own.yaml").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UserError):
        config.load(str(tmp_path / "own.yaml"))


@quickly
@given(edits)
def test_mutated_settings_are_settings_or_errors(tmp_path, changes):
    (tmp_path / "own.yaml").write_bytes(mutate(SETTINGS.encode(), changes))
    try:
        assert isinstance(config.load(str(tmp_path / "own.yaml")), Config)
    except UserError as error:
        assert len(str(error)) < 5000


def leaves(content, path=()):
    """The paths of all values in nested dictionaries and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(leaf for key, value in items for leaf in leaves(value, (*path, key)))]


def replaced(content, path, value):
    """A copy with `value` at `path`."""
    content = copy.deepcopy(content)
    node = content
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return content


@quickly
@given(st.data())
def test_settings_of_any_kind_are_settings_or_errors(saved, data):
    content = config.read_file(saved / "config.yaml")
    path = data.draw(st.sampled_from(leaves(content)[1:]))
    try:
        assert isinstance(config.parse(replaced(content, path, data.draw(odd))), Config)
    except UserError as error:
        assert len(str(error)) < 5000


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small checkpoint without a checksum, in which PyTorch itself has to notice what is wrong."""
    buffer = io.BytesIO()
    torch.save({"network": {"x": torch.arange(9.0)}, "config": {"seed": 1}, "labels": [None, [torch.ones(3)]]}, buffer)
    return buffer.getvalue()


@quickly
@given(edits)
def test_mutated_checkpoints_load_or_are_errors(small, tmp_path, changes):
    (tmp_path / "x.pt").write_bytes(mutate(small, changes))
    with suppress(UserError):
        assert {"network", "config"} <= checkpoint.load(tmp_path / "x.pt").keys()


@pytest.fixture(scope="module")
def resumed(saved):
    """A trainer, to which a run may go on."""
    return Trainer(config.load(str(saved / "config.yaml")), saved, resume=True)


@examples(quickly, max_examples=20)
@given(st.data())
def test_checkpoints_of_any_content_are_taken_over_or_errors(saved, resumed, tmp_path, data):
    content = checkpoint.load(saved / "last.pt")
    path = data.draw(st.sampled_from([path for path in leaves(content) if 1 <= len(path) <= 3]))
    content = replaced(content, path, data.draw(odd))
    if len(path) == 1 and data.draw(st.booleans()):
        del content[path[0]]
    file = tmp_path / "x.pt"
    checkpoint.save(file, content)
    with mock.patch.object(checkpoint, "latest", lambda _: (checkpoint.load(file), saved / "last.pt")):
        for read in (resumed._restore, lambda: trained.load(file)):
            with suppress(UserError):
                read()


@quickly
@given(st.one_of(st.binary(max_size=40), edits), st.sampled_from(["ids", "list"]))
def test_mutated_lists_are_read_or_errors(tmp_path, changes, kind):
    good = {"ids": b"1,2,3,17\n", "list": b"a/1.png 3\na/2.png 4\n"}[kind]
    (tmp_path / "list.txt").write_bytes(changes if isinstance(changes, bytes) else mutate(good, changes))
    with suppress(UserError):
        layout.read_ids(tmp_path / "list.txt") if kind == "ids" else layout.read_list(tmp_path, "list.txt")


@pytest.mark.parametrize("text", ["9" * 5000, "99999999999999999999", "1,²", "-1"])
def test_numbers_that_no_identity_has_are_refused(tmp_path, text):
    (tmp_path / "ids.txt").write_text(text)
    with pytest.raises(UserError, match="expected identities separated by commas"):
        layout.read_ids(tmp_path / "ids.txt")


@quickly
@given(edits)
def test_mutated_captions_are_read_or_errors(tmp_path, changes):
    rows = {f"cam1/{i}.jpg": {"description": "a person", "aug_description": "somebody"} for i in range(3)}
    (tmp_path / "captions.json").write_bytes(mutate(json.dumps(rows).encode(), changes))
    with suppress(UserError):
        captions.load(tmp_path / "captions.json", tmp_path)


def arrays():
    rng = np.random.default_rng(0)
    ids = np.arange(6) % 3
    columns = {"query_ids": ids, "gallery_ids": ids, "query_cams": ids + 1, "gallery_cams": ids + 2}
    features = {name: rng.normal(size=(6, 4)) for name in ("query_features", "gallery_features")}
    return columns | features | {"distance": rng.random((6, 6))}


@quickly
@given(st.data())
def test_arrays_of_any_kind_are_scored_or_errors(tmp_path, data):
    content = arrays()
    name = data.draw(st.sampled_from(sorted(content)))
    kinds = ["f4", "f2", "i1", "u8", "c8", "?", "U3", ">f8", "M8[s]"]
    shape = data.draw(st.lists(st.integers(0, 7), max_size=3))
    content[name] = np.zeros(shape, data.draw(st.sampled_from(kinds)))
    np.savez(tmp_path / "x.npz", **content)
    rule, rerank = data.draw(st.sampled_from([("plain", []), ("sysu", []), ("plain", ["aim"])]))
    with suppress(UserError):
        score_arrays(tmp_path / "x.npz", rule, rerank)


@quickly
@given(edits)
def test_mutated_arrays_are_scored_or_errors(tmp_path, changes):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays())
    (tmp_path / "x.npz").write_bytes(mutate(buffer.getvalue(), changes))
    with suppress(UserError):
        score_arrays(tmp_path / "x.npz", "plain", [])
