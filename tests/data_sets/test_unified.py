"""Several data sets are trained on as one, and each is scored by its own protocols."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import trees
from small_runs import settings, start
from torch.nn import functional as F

import engine.data
from engine import config, runs
from engine.config import Data, Source
from engine.data import folder, llcm, regdb, sysu, unified
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.pair import Pair
from engine.trained import evaluate_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels")


@pytest.fixture(scope="module")
def parts(regdb_tree, sysu_tree, llcm_tree):
    return [regdb.read(regdb_tree), sysu.read(sysu_tree), llcm.read(llcm_tree)]


@pytest.fixture(scope="module")
def both(sysu_tree, regdb_tree, tmp_path_factory):
    """A finished run on two data sets."""
    place = tmp_path_factory.mktemp("unified")
    also = f"data.also=[{{name: regdb, root: {regdb_tree}}}]"
    short = [f"train.stages.{stage}.epochs=1" for stage in (0, 1)]
    start(settings(sysu_tree, place / "cache", also, *short), place / "run").run()
    return place / "run"


def test_images_follow_one_another_and_no_person_or_trained_camera_is_shared(parts):
    joined = unified.join(parts)
    for side in ("vis", "ir"):
        assert joined.train[side].paths == sum((part.train[side].paths for part in parts), ())
    for column in ("ids", "cams"):
        numbers = [set() for _ in parts]
        for side in ("vis", "ir"):
            own = [getattr(part.train[side], column) for part in parts]
            shifted = np.split(getattr(joined.train[side], column), np.cumsum([len(rows) for rows in own])[:-1])
            for seen, before, after in zip(numbers, own, shifted, strict=True):
                assert len(set(after - before)) == 1
                seen |= set(after)
        assert len(set.union(*numbers)) == sum(map(len, numbers))


def test_unknown_identities_and_cameras_stay_unknown(sysu_tree, folder_tree):
    joined = unified.join([sysu.read(sysu_tree), folder.read(folder_tree)])
    assert set(joined.train.vis.ids[-24:]) == set(joined.train.vis.cams[-24:]) == {-1}
    assert joined.test.vis.ids.min() > 0


def test_each_data_set_scores_as_it_does_alone(parts):
    joined = unified.join(parts)
    generator = torch.Generator().manual_seed(0)
    features = [
        part.test.map(lambda images: F.normalize(torch.randn(len(images), 4, generator=generator))) for part in parts
    ]
    together = evaluate(joined, Pair(*(torch.cat(rows) for rows in zip(*features, strict=True))))
    alone = [(part.name, row) for part, rows in zip(parts, features, strict=True) for row in evaluate(part, rows)]
    assert [row.protocol for row in together] == [f"{name}: {row.protocol}" for name, row in alone]
    assert together[0].protocol == "RegDB split 1: visible to infrared"
    for row, (_, expected) in zip(together, alone, strict=True):
        assert (row.values, row.spread, row.queries) == (expected.values, expected.spread, expected.queries)


def test_a_data_set_without_test_images_is_trained_on_only(sysu_tree, tmp_path):
    footage = folder.read(trees.build_folder(tmp_path / "footage", scored=False))
    joined = unified.join([footage, sysu.read(sysu_tree)])
    assert len(joined.train.ir) == 24 + 8 * 2 * 2 and len(joined.test.ir) == 16
    assert joined.protocols[0].name == "SYSU-MM01: all single-shot"
    again = folder.read(trees.build_folder(tmp_path / "again", scored=False))
    assert unified.join([footage, again]).test is None


def test_data_sets_of_one_name_are_numbered(sysu_tree, tmp_path):
    other = sysu.read(trees.build_sysu(tmp_path, identities=(1, 1, 2), images=1, size=(8, 4)))
    names = [protocol.name for protocol in unified.join([sysu.read(sysu_tree), other]).protocols]
    assert names[0] == "SYSU-MM01 (1): all single-shot" and names[4] == "SYSU-MM01 (2): all single-shot"
    assert len(set(names)) == 8


@pytest.mark.parametrize("other", [2, 1])
def test_data_sets_that_share_images_are_refused(regdb_tree, other):
    data = Data("regdb", str(regdb_tree), also=(Source("regdb", str(regdb_tree), trial=other),))
    with pytest.raises(UserError, match=r"data\.also: images in more than one data set: 60 \(.*join different ones"):
        engine.data.read(data)


def test_errors_name_the_data_set_and_its_own_setting(sysu_tree):
    data = Data("sysu", str(sysu_tree), also=(Source("llcm", "gone"), Source("sysu", "gone")))
    with pytest.raises(UserError, match=r"data\.also\.0 \(llcm\): gone not found: .*; check data\.also\.0\.root"):
        engine.data.read(data)
    data = Data("sysu", str(sysu_tree), also=(Source("sysu", str(sysu_tree), gallery="official"),))
    with pytest.raises(UserError, match=r"set data\.also\.0\.gallery to 'agw'"):
        engine.data.read(data)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.also.0.name=regbd", r"data\.also\.0\.name: expected one of .*did you mean 'regdb'\?"),
        ("data.also.0.trial=11", r"data\.also\.0\.trial: expected 1 to 10, got 11"),
        ("data.also.0.size=[96, 48]", r"data\.also\.0\.size: no such setting; known: name, root"),
        ("data.also.0.also=[]", r"data\.also\.0\.also: no such setting"),
        ("data.also=[{name: llcm}]", r"data\.also\.0\.root: missing; give it .*--set data\.also\.0\.root="),
        ("data.also.1.root=data", r"expected a position from 0 to 0, got '1'"),
    ],
)
def test_settings_of_a_joined_data_set_are_checked(override, message):
    with pytest.raises(UserError, match=message):
        config.load("unified.yaml", [override])


def test_a_run_on_two_data_sets_scores_both(both):
    rows = [json.loads(line) for line in (both / "metrics.jsonl").read_text().splitlines()]
    plain = [score["protocol"] for score in rows[1]["scores"] if not score["rerank"]]
    assert plain == [f"SYSU-MM01: {search} {shots}" for search in ("all", "indoor") for shots in sysu.SHOTS] + [
        "RegDB split 1: visible to infrared",
        "RegDB split 1: infrared to visible",
    ]
    assert rows[1]["stage"] == 2 and np.isfinite(list(rows[1]["losses"].values())).all()
    scores = evaluate_checkpoint(both / "last.pt")
    assert [score.values for score in scores] == [score["values"] for score in rows[1]["scores"]]


def test_a_network_is_scored_on_any_data_set(both, regdb_tree, llcm_tree):
    scores = evaluate_checkpoint(both / "last.pt")
    by_name = {(score.protocol, score.rerank): score.values for score in scores}
    regdb_alone = ["data.name=regdb", f"data.root={regdb_tree}", "data.also=[]"]
    for row in evaluate_checkpoint(both / "last.pt", regdb_alone):
        assert row.values == pytest.approx(by_name[f"RegDB split 1: {row.protocol}", row.rerank])
    (first, *_) = evaluate_checkpoint(both / "last.pt", ["data.name=llcm", f"data.root={llcm_tree}", "data.also=[]"])
    assert first.protocol == "infrared to visible" and first.queries == 10 * 3 * 8


@pytest.mark.parametrize("settings", [["data.also.0.trial=2"], ["data.name=regdb", "data.trial=2", "data.also=[]"]])
def test_scoring_people_that_were_trained_on_is_refused(both, settings):
    with pytest.raises(UserError, match=r"trained on split 1 and cannot be scored on split 2"):
        evaluate_checkpoint(both / "last.pt", settings)


def test_a_resumed_run_may_find_each_data_set_elsewhere(both):
    loaded, _ = runs.reopen(str(both), ["data.also.0.root=/elsewhere"])
    assert loaded.data.also[0].root == "/elsewhere"
    with pytest.raises(UserError, match=r"other settings \(data\.also\.0\.trial: 1 -> 2\)"):
        runs.reopen(str(both), ["data.also.0.trial=2"])


def test_the_shipped_configuration_reads_both_data_sets(sysu_tree, regdb_tree):
    loaded = config.load("unified.yaml", [f"data.root={sysu_tree}", f"data.also.0.root={regdb_tree}"])
    assert engine.data.read(loaded.data).name == "SYSU-MM01 + RegDB split 1"
