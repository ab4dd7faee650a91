"""Whatever happens to a run, by signals, crashes, disks or other processes: nothing is lost beyond what is promised."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import kill_runs
import pytest
import torch
from small_runs import assert_same_run, metrics, settings, start, write_settings

from engine import checkpoint, methods, report, runs, stopping
from engine.data import cache as image_cache
from engine.data.loader import Loader
from engine.errors import UserError
from engine.stopping import Stopped
from engine.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def loaded(sysu_tree, cache):
    return settings(sysu_tree, cache)


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    """The folder of a finished run, for comparison. Tests only read it."""
    folder = tmp_path_factory.mktemp("whole")
    start(loaded, folder).run()
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A finished run to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@contextmanager
def calling(name, action, at=1):
    """Inside, the `at`-th call of a method of the trainer does `action()` before."""
    method, calls = getattr(Trainer, name), []

    def changed(self, *arguments, **named):
        calls.append(name)
        if len(calls) == at:
            action()
        return method(self, *arguments, **named)

    with mock.patch.object(Trainer, name, changed):
        yield


def signals(*numbers):
    return lambda: [signal.raise_signal(number) for number in numbers]


def go_on(loaded, folder):
    return Trainer(loaded, folder, resume=True).run()


# Signals


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 5), (signal.SIGTERM, 6)])
def test_a_signal_finishes_the_step_and_saves_it(loaded, whole, tmp_path, number, step):
    with calling("_step", signals(number), step), pytest.raises(Stopped) as stop, stopping.graceful():
        start(loaded, tmp_path).run()
    assert stop.value.code == 128 + number
    saved = checkpoint.load(tmp_path / "last.pt")
    assert 3 * saved["epoch"] + saved["step"] == step
    assert f"after step {saved['step']}, which is saved" in (tmp_path / "log.txt").read_text()
    go_on(loaded, tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_signal_that_comes_from_two_sides_is_one(loaded, whole, tmp_path):
    """A scheduler stops all processes, and torchrun passes on what it got."""
    with calling("_step", signals(signal.SIGTERM, signal.SIGTERM), 5), pytest.raises(Stopped), stopping.graceful():
        start(loaded, tmp_path).run()
    saved = checkpoint.load(tmp_path / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 2)


def test_a_second_signal_stops_at_once_with_the_last_checkpoint(loaded, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_ECHO", 0)
    with (
        calling("_step", signals(signal.SIGINT, signal.SIGINT), 5),
        pytest.raises(Stopped) as stop,
        stopping.graceful(),
    ):
        start(loaded, tmp_path).run()
    assert stop.value.cut
    assert (checkpoint.load(tmp_path / "last.pt")["epoch"], checkpoint.load(tmp_path / "last.pt")["step"]) == (1, 0)
    go_on(loaded, tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_signal_while_scores_are_made_loses_no_step(loaded, whole, tmp_path):
    with calling("_scores", signals(signal.SIGTERM), 4), pytest.raises(Stopped), stopping.graceful():
        start(loaded, tmp_path).run()
    saved = checkpoint.load(tmp_path / "last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 3)
    go_on(loaded, tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_signal_before_an_epochs_first_step_leaves_the_checkpoint_as_it_is(loaded, whole, tmp_path):
    held = []

    def interrupt():
        held.append((tmp_path / "last.pt").read_bytes())
        signal.raise_signal(signal.SIGTERM)

    with calling("_label", interrupt, 3), pytest.raises(Stopped), stopping.graceful():
        start(loaded, tmp_path).run()
    assert (tmp_path / "last.pt").read_bytes() == held[0]
    go_on(loaded, tmp_path)
    assert_same_run(tmp_path, whole)


def test_signals_while_a_checkpoint_is_written_leave_it_whole(loaded, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_ECHO", 0)
    write = os.fsync

    def interrupt(descriptor):
        if (tmp_path / ".last.pt.part").exists() and (tmp_path / "last.pt").exists():
            signals(signal.SIGINT, signal.SIGINT)()
        return write(descriptor)

    with mock.patch.object(os, "fsync", interrupt), pytest.raises(Stopped), stopping.graceful():
        start(loaded, tmp_path).run()
    assert not list(tmp_path.glob(".*.part"))
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 0
    go_on(loaded, tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("_warm_up", "there is no checkpoint yet.*the same command starts again"),
        ("_step", "go on with: .* --resume run"),
    ],
)
def test_the_tool_says_how_to_go_on(sysu_tree, cache, tmp_path, monkeypatch, capsys, where, message):
    own = write_settings(sysu_tree, cache, tmp_path / "own.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--cfg", str(own), "--out", "run"])
    with calling(where, signals(signal.SIGTERM)), pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "tools" / "train.py"), run_name="__main__")
    assert exit_.value.code == 143
    assert re.search(message, capsys.readouterr().err)


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping.graceful():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is stopping._handle
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nobody_who_reads_the_output_is_no_error():
    code = """if True:
        import os, signal, sys
        from engine import stopping
        from engine.errors import run_tool
        def main():
            try:
                with stopping.held():
                    signal.raise_signal(signal.SIGINT)
                    saved = True
            except stopping.Stopped as stop:
                os._exit(stop.code if saved and not stop.cut else 1)
        stop = sys.argv[1] == "stop"
        run_tool(main if stop else lambda: print("-" * 100_000) or 0)
    """
    for what, code_expected in (("stop", 130), ("print", 128 + signal.SIGPIPE)):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as gone:
            done = subprocess.run([sys.executable, "-c", code, what], cwd=ROOT, stdout=gone, stderr=gone, check=False)
        assert done.returncode == code_expected


def test_a_log_goes_on_where_nobody_reads_what_it_prints(tmp_path, monkeypatch):
    monkeypatch.setattr(report.tqdm, "write", mock.Mock(side_effect=BrokenPipeError))
    report.Log(tmp_path).say("epoch 1")
    assert (tmp_path / "log.txt").read_text() == "epoch 1\n"


def test_another_thread_may_ask_for_it_and_gets_nothing():
    seen = []

    def ask():
        with stopping.graceful(), stopping.held():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)] and seen != [stopping._handle]


CHILD = "from engine import stopping; import time; stopping.end_with_parent(); print('up', flush=True); time.sleep(100)"
PARENT = f"""
import os, subprocess, sys
environment = os.environ | {{"ENGINE_PARENT": str(os.getpid())}}
subprocess.run([sys.executable, "-c", {CHILD!r}], env=environment)
"""


def test_a_child_ends_with_its_parent_however_that_is_killed():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "up\n"
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == ""  # the end of it: nobody writes any more
    orphan = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment | {"ENGINE_PARENT": "1"}, timeout=60, check=False
    )
    assert orphan.returncode == -signal.SIGTERM


# Crashes


def test_runs_killed_at_random_moments_end_as_one_that_was_left_alone(sysu_tree, cache, tmp_path):
    own = write_settings(sysu_tree, cache, tmp_path / "own.yaml")
    new = ("--cfg", own, "--set", "train.checkpoint_steps=1")
    kills = list(kill_runs.measure(kill_runs.Starter(), tmp_path, new, 3, seed=1))
    assert [kill.problem for kill in kills] == [""] * 3
    assert any("writing" in kill.moment for kill in kills)


def test_lines_that_a_crash_tore_are_mended(loaded, whole, tmp_path):
    with calling("_step", signals(signal.SIGTERM), 5), pytest.raises(Stopped), stopping.graceful():
        start(loaded, tmp_path).run()
    for name, torn in (("metrics.jsonl", b'{"epoch": 2, "epo'), ("log.txt", b"epoch 2/4  \xc2")):
        with open(tmp_path / name, "ab") as file:
            file.write(torn)
    go_on(loaded, tmp_path)
    assert_same_run(tmp_path, whole)
    assert "\ngoing on in epoch 2 after step 2\n" in (tmp_path / "log.txt").read_text(errors="replace")


@pytest.mark.parametrize("damage", ["a bit", "its end", "all of it", "the file"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(loaded, whole, tmp_path, damage):
    with calling("_step", signals(signal.SIGTERM), 8), pytest.raises(Stopped), stopping.graceful():
        start(loaded, tmp_path).run()
    path = tmp_path / "last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    damaged = {"a bit": bytes(content), "its end": bytes(content[:-100]), "all of it": b""}
    if damage in damaged:
        path.write_bytes(damaged[damage])
    else:
        path.unlink()
    with pytest.warns(UserWarning, match=r"last\.pt: (not a readable|no such) checkpoint.*Taking previous\.pt"):
        assert runs.reopen(str(tmp_path), [])[1] == tmp_path
    with pytest.warns(UserWarning, match="the one before"):
        go_on(loaded, tmp_path)
    assert (tmp_path / "damaged.pt").exists() == (damage in damaged)
    assert_same_run(tmp_path, whole)


def test_without_any_whole_checkpoint_the_run_says_so(copy):
    for name in checkpoint.LATEST:
        (copy / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"last\.pt: not a readable checkpoint"):
        runs.reopen(str(copy), [])


def test_a_run_whose_processes_drifted_apart_can_go_on_as_their_message_advises(copy):
    assert runs.reopen(str(copy), ["deterministic=true"])[0].deterministic


def test_every_bit_of_a_checkpoint_is_watched(tmp_path):
    path = tmp_path / "small.pt"
    checkpoint.save(path, {"network": {"x": torch.arange(3)}, "config": {}})
    content = path.read_bytes()
    assert torch.load(path, weights_only=True)["network"]["x"].tolist() == [0, 1, 2]  # with PyTorch alone
    marker = content.index(b"sha256:")
    chance = random.Random(0)
    for place in [*chance.sample(range(marker), 150), *range(marker + 7, len(content), 5)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="checksum does not match"):
            checkpoint.load(path)


def test_checkpoints_from_before_there_were_checksums_load(tmp_path):
    state = {"network": {"x": torch.ones(2)}, "config": {"seed": 1}}
    torch.save(state, tmp_path / "old.pt")
    assert checkpoint.load(tmp_path / "old.pt")["config"] == {"seed": 1}


def test_a_cached_file_that_is_not_whole_is_made_anew(sysu_tree, tmp_path):
    images = start(settings(sysu_tree, tmp_path), tmp_path / "run").dataset.train.vis
    file = next(tmp_path.glob("visible-training-*.npy"))
    expected = file.read_bytes()
    for damaged in (expected[:-9], expected[:40], b""):
        file.write_bytes(damaged)
        pixels = image_cache.decode(images, (48, 24), folder=str(tmp_path), label="visible training")
        assert len(pixels) == len(images) and file.read_bytes() == expected


# A step that cannot be kept


def test_the_batch_of_a_loss_that_is_not_finite_is_kept_for_study(loaded, tmp_path, monkeypatch):
    losses = methods.find("salcr").losses

    def broken(self, output, batch, memories):
        terms = losses(self, output, batch, memories)
        return terms if batch.cross is None else terms | {"dagl.ir": terms["dagl.ir"] * float("inf")}

    monkeypatch.setattr(methods.find("salcr"), "losses", broken)
    with pytest.raises(
        UserError, match=r"epoch 3, step 1: loss term 'dagl\.ir' is not finite.*batch, in .*failed_step\.pt"
    ):
        start(loaded, tmp_path).run()
    found = torch.load(tmp_path / "failed_step.pt", weights_only=True)
    assert (found["epoch"], found["step"]) == (3, 1) and "dagl.ir" in found["problem"]
    for side in ("vis", "ir"):
        assert len(found["rows"][side]) == len(found["paths"][side]) == len(found["images"][side]) == 4
        assert len(found["own"][side]) == len(found["cross"][side]) == 4
    assert all(norms.isfinite().all() for norms in found["memory_norms"].values())
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 2


def test_weights_that_are_not_finite_are_never_saved(loaded, tmp_path):
    def spoil():
        next(iter(run.network.parameters())).data.fill_(float("nan"))

    run = start(loaded, tmp_path)
    with calling("_descend", spoil, 3 + 6), pytest.raises(UserError, match="is not finite.*optim.lr"):
        run.run()  # in the last step of an epoch, after which no loss is looked at
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["epoch"] == 1 and all(value.isfinite().all() for value in saved["network"].values())


def test_warm_up_that_fails_says_what_to_change(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_milestone", lambda self, name: None)
    run = start(loaded, tmp_path)
    next(iter(run.network.parameters())).data.fill_(float("nan"))
    with pytest.raises(UserError, match="warm-up.*lower optim.lr"):
        run.run()


def test_a_gpu_that_stops_is_explained(loaded, tmp_path):
    def stop():
        raise RuntimeError("CUDA error: device-side assert triggered")

    with (
        calling("_step", stop, 2),
        pytest.raises(UserError, match="epoch 1, about step 2: the GPU stopped.*device=cpu"),
    ):
        start(loaded, tmp_path).run()


def test_what_fails_in_the_reading_thread_is_said_and_does_not_hang(loaded, tmp_path, monkeypatch):
    def broken(self, plan, start):
        self.pixels = self.pixels.map(lambda _: {})
        return read(self, plan, start)

    read = Loader._read
    monkeypatch.setattr(Loader, "_read", broken)
    with pytest.raises(TypeError, match="unhashable"):
        start(loaded, tmp_path).run()


# Disks


@pytest.mark.parametrize("name", [".last.pt.part", "log.txt", "metrics.jsonl"])
def test_a_full_disk_is_named_and_what_was_saved_stays(loaded, whole, tmp_path, name):
    def fill():
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("/dev/full")

    with calling("_step", fill, 5), pytest.raises(UserError, match=r"cannot be written \(the disk is full.*--resume"):
        start(loaded, tmp_path).run()
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1
    (tmp_path / name).unlink(missing_ok=True)
    shutil.copy(whole / "metrics.jsonl", tmp_path / "metrics.jsonl")
    go_on(loaded, tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_folder_that_vanishes_is_named(loaded, tmp_path):
    with (
        calling("_step", lambda: shutil.rmtree(tmp_path / "run"), 2),
        pytest.raises(UserError, match="its folder is gone"),
    ):
        start(loaded, tmp_path / "run").run()


def test_a_folder_that_may_not_be_written_is_named(loaded, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot be (made|written) \(.*choose another folder by --out"):
        start(loaded, Path("/sys/vireid")).run()  # where root may not write either
    monkeypatch.setattr("builtins.open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"last\.pt: cannot be written \(Permission denied"):
        checkpoint.save(tmp_path / "last.pt", {})


def test_file_systems_without_links_keep_the_one_before_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for number in range(3):
        state = {"network": {}, "config": {"number": number}}
        checkpoint.save(tmp_path / "last.pt", state, keep=tmp_path / "previous.pt")
    found = [checkpoint.load(tmp_path / name)["config"]["number"] for name in checkpoint.LATEST]
    assert found == [2, 1]


# Other processes, and the clock


def hold_and_wait(folder, ready):
    with runs.hold(folder):
        ready.set()
        time.sleep(100)


def test_two_runs_in_one_folder_are_refused_until_the_first_one_ends_in_any_way(loaded, copy):
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    other = fork.Process(target=hold_and_wait, args=(copy, ready))
    other.start()
    ready.wait(60)
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"process {other.pid} on .* is at work in this run folder"):
            Trainer(loaded, copy, resume=resume).run()
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with runs.hold(copy):
        pass


def test_a_run_that_another_process_began_meanwhile_is_not_written_over(loaded, copy):
    with pytest.raises(UserError, match="holds a run already"):
        start(loaded, copy).run()


def test_jumps_of_the_clock_change_nothing(loaded, whole, tmp_path, monkeypatch):
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(-1e9, 4e9))
    start(loaded, tmp_path).run()
    assert_same_run(tmp_path, whole)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= seconds < 1e6 for row in rows for seconds in row["seconds"].values())
    assert metrics(tmp_path) and report.Log(tmp_path, 4)
