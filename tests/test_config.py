"""The strict configuration loader."""

from __future__ import annotations

import dataclasses

import pytest

from engine import config, optim
from engine.errors import UserError
from engine.pair import Pair

NAMES = sorted(path.name for path in config.CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_configuration_loads_and_survives_being_written_out(name):
    loaded = config.load(name)
    assert config.parse(config.to_dict(loaded)) == loaded
    assert config.load(name.removesuffix(".yaml")) == loaded


@pytest.mark.parametrize(
    ("name", "eps", "k", "iterations"),
    [("sysu", 0.6, 30, 300), ("llcm", 0.6, 30, 300), ("regdb", 0.3, 8, 100), ("unified", 0.6, 30, 300)],
)
def test_shipped_configurations_have_the_papers_settings(name, eps, k, iterations):
    loaded = config.load(name)
    assert loaded.data.size == (288, 144)
    assert (loaded.cluster.k1, loaded.cluster.k2, loaded.cluster.min_samples) == (Pair(30, 30), 6, 4)
    assert loaded.cluster.eps == Pair(eps, eps)
    assert loaded.settings.cmfp.k == k
    first, second = loaded.train.stages
    assert first == config.Stage(40, iterations, 12, 12) and second == config.Stage(40, iterations, 8, 8)
    rates = [optim.learning_rate(loaded.optim, epoch, 40) for _ in range(2) for epoch in range(40)]
    assert rates == pytest.approx(2 * (20 * [3.5e-4] + 20 * [3.5e-5]))
    assert loaded.optim.weight_decay == 5e-4
    assert (loaded.memory.temperature, loaded.memory.momentum) == (0.05, 0.1)
    assert loaded.settings.transport.reg == 1 / 5


def test_firms_configuration_has_the_papers_settings():
    loaded = config.load("sysu_firm")
    assert loaded.data.size == (256, 128) and loaded.model.backbone == "vit_b16"
    assert (loaded.cluster.eps, loaded.cluster.min_samples) == (Pair(0.6, 0.6), 4)
    (stage,) = loaded.train.stages
    assert stage.epochs == 60 and stage.labels * stage.images == 32
    chosen = loaded.optim
    assert (chosen.kind, chosen.schedule, chosen.lr, chosen.weight_decay) == ("adamw", "cosine", 3e-5, 0.05)
    assert (chosen.warm_up, chosen.layer_decay, chosen.clip) == (300, 0.95, 5.0)
    firm = loaded.settings
    assert (firm.transport.reg, firm.transport.iterations, firm.gate.step) == (0.05, 5, 0.2)
    assert (firm.gate.fused, firm.gate.own) == (0.5, 0.4)
    assert (firm.merge.fused, firm.merge.vis, firm.merge.ir) == (0.85, 0.75, 0.75)
    assert (firm.split.least, firm.vspf.prefix, firm.period) == (5, 8, 5)
    assert (firm.losses.proto, firm.losses.density, firm.losses.rise) == (0.1, 0.05, 0.2)


def test_numbers_and_words_mean_what_people_mean(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "data: {name: demo, root: no}\noptim: {lr: 1e-4, weight_decay: 0}\n"
        "train: {stages: [{epochs: 1, iterations: 1, labels: 2, images: 2}]}\ncluster: {k1: {vis: 15, ir: 8}, eps: .5}\n"
    )
    loaded = config.load(str(path))
    assert loaded.optim.lr == 1e-4
    assert loaded.optim.weight_decay == 0.0
    assert isinstance(loaded.optim.weight_decay, float)
    assert loaded.data.root == "no"
    assert loaded.cluster.k1 == Pair(15, 8)
    assert loaded.cluster.eps == Pair(0.5, 0.5)


def test_overrides_reach_nested_settings_lists_and_method_sections():
    loaded = config.load(
        "demo.yaml", ["seed=3", "train.stages.1.epochs=2", "salcr.dagl.branch=visible", "train.warm_up.images=8"]
    )
    assert loaded.seed == 3
    assert [stage.epochs for stage in loaded.train.stages][1] == 2
    assert loaded.settings.dagl.branch == "visible"
    assert loaded.train.warm_up.images == 8


def test_reading_sets_the_switches_that_are_left_open():
    paper = config.load("sysu.yaml", ["salcr.reading=paper", "salcr.dagl.relabel=true"]).settings.dagl
    assert (paper.prototypes, paper.relabel, paper.mean) == ("memories", True, "kind")
    released = config.load("sysu.yaml").settings.dagl
    assert (released.prototypes, released.relabel, released.mean) == ("means", True, "bank")


def test_the_section_of_an_unused_method_is_checked_too():
    assert config.load("demo.yaml", ["method.name=dcl"]).settings is not None
    with pytest.raises(UserError, match=r"salcr.dagl.brunch: no such setting; did you mean 'branch'"):
        config.load("demo.yaml", ["method.name=dcl", "salcr.dagl.brunch=dual"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"optim\.lrr: no such setting; did you mean 'lr'\?"),
        ("lr=1", r"^lr: no such setting; did you mean 'optim\.lr'\?"),
        ("train.iterations=1", r"did you mean 'stages\.0\.iterations' or 'warm_up\.iterations'\?"),
        ("optim.LR=1", r"optim\.LR: no such setting; did you mean 'lr'\?"),
        ("slacr.reading=paper", r"slacr: no such setting; did you mean 'salcr'\?"),
        ("base=sysu.yaml", r"base: no such setting; known: data"),
        ("learning_rate=1", r"known: data, train, .*, evaluate, dcl, salcr, firm$"),
        ("optim.lr=fast", r"optim\.lr: expected a number, got 'fast'"),
        ("optim.lr=-1", r"optim\.lr: expected a number above 0, got -1"),
        ("seed=1.5", r"seed: expected a whole number, got 1.5"),
        ("seed=true", r"seed: expected a whole number, got True"),
        ("train.compile=no", r"train\.compile: expected true or false, got 'no'"),
        ("train.precision=bf61", r"train\.precision: expected one of .*bf16.*did you mean 'bf16'\?"),
        ("data.size=[96]", r"data\.size: expected 2 values"),
        ("data.size=96", r"data\.size: expected a list"),
        ("cluster.k1={vis: 3}", r"cluster\.k1: expected one value, or both"),
        ("cluster.eps.ir=2", r"cluster\.eps is a single value here, not settings; give the whole of cluster"),
        ("seed=-1", r"seed: expected 0 or more, below .*, got -1"),
        ("seed=99999999999999999999", r"seed: expected 0 or more, below"),
        ("data.workers=-1", r"data\.workers: expected at least 0, got -1"),
        ("augment.pad=-1", r"augment\.pad: expected at least 0, got -1"),
        ("augment.flip=2", r"augment\.flip: expected a probability, 0 to 1, got 2"),
        ("optim.weight_decay=-1", r"optim\.weight_decay: expected at least 0, got -1"),
        ("optim.drops=[2]", r"optim\.drops\.0: expected a part of the stage, 0 to 1, got 2"),
        ("train.checkpoint_steps=-1", r"train\.checkpoint_steps: expected at least 0, got -1"),
        ("train.warm_up.images=0", r"train\.warm_up\.images: expected at least 1, got 0"),
        ("cluster.eps={vis: 0.5, ir: 6}", r"cluster\.eps\.ir: expected above 0 and below 1, got 6"),
        ("firm.losses.align=-1", r"firm\.losses\.align: expected at least 0, got -1"),
        ("train.stages=[]", r"train\.stages: expected at least one stage"),
        ("train.stages.0.epochs=0", r"train\.stages\.0\.epochs: expected at least 1, got 0"),
        ("train.stages.7.epochs=1", r"expected a position from 0 to 1, got '7'"),
        ("train.stages.0.epoch=1", r"train\.stages\.0\.epoch: no such setting; did you mean 'epochs'"),
        ("seed.deep=1", r"seed is a single value|seed: expected"),
        ("optim=1", r"optim: expected settings \(name: value\), got 1"),
        ("optim", r"expected name=value"),
        ("optim.lr=[", r"not valid YAML"),
        ("method.name=slacr", r"no method 'slacr'; built in: dcl, salcr"),
        ("method.name=no.such.module", r"cannot import 'no\.such\.module'"),
        ("settings=1", r"a method's settings stand under its name"),
        ("data={name: demo}", r"data\.root: missing; give it"),
        ("data.name=market", r"data\.name: expected one of sysu"),
    ],
)
def test_bad_settings_are_named_with_a_remedy(override, message):
    with pytest.raises(UserError, match=message):
        config.load("demo.yaml", [override])


def test_a_wrong_configuration_name_lists_the_right_ones():
    with pytest.raises(UserError, match=r"did you mean 'demo.yaml'\? known ones: .*regdb\.yaml, sysu\.yaml"):
        config.load("dmeo.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "expected settings"), ("", "missing")]
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        config.load(str(path))


def test_differences_name_the_setting():
    old = config.load("demo.yaml")
    new = dataclasses.replace(old, seed=4)
    assert config.differences(config.to_dict(old), config.to_dict(new)) == ["seed: 0 -> 4"]
