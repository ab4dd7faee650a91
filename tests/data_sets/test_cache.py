"""The cache holds the right pixels, notices changes, survives kills, and says what is wrong with images and disks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from engine.data import cache, layout
from engine.data.dataset import Images
from engine.errors import UserError

SIZE = (12, 6)


@pytest.fixture
def images(tmp_path) -> Images:
    for number in range(5):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        trees.person(number, 1, 0, "vis", (20, 10)).save(path)
    return layout.collect((path, -1, -1) for path in layout.list_images(tmp_path / "images"))


@pytest.fixture
def folder(tmp_path) -> str:
    return str(tmp_path / "cache")


def files(folder: str) -> list[str]:
    return sorted(path.suffix for path in Path(folder).iterdir())


def test_pixels_are_those_of_a_lanczos_resize(images, folder):
    pixels = cache.decode(images, SIZE, folder=folder)
    assert pixels.shape == (5, 12, 6, 3) and pixels.dtype == np.uint8 and isinstance(pixels, np.memmap)
    for path, row in zip(images.paths, pixels, strict=True):
        assert np.array_equal(row, np.asarray(Image.open(path).resize((6, 12), Image.Resampling.LANCZOS)))
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 0


@pytest.mark.parametrize(
    ("kind", "ending"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif"), (np.float32, "tif")]
)
def test_grey_values_of_more_than_eight_bits_keep_their_contrast(tmp_path, kind, ending):
    values = (29000 + np.arange(2000).reshape(50, 40)).astype(kind)
    values[0, 0] = 0  # a dead pixel and a hot one
    values[-1, -1] = 65535
    Image.fromarray(values).save(tmp_path / f"thermal.{ending}")
    found = np.asarray(cache.open_image(str(tmp_path / f"thermal.{ending}")))
    expected = ((values[1:-1] - 29020.0) / 1959 * 255).clip(0, 255)
    assert (found == found[..., :1]).all() and np.abs(found[1:-1, :, 0] - expected).max() < 1.5


def test_a_flat_image_is_black_and_one_of_no_numbers_is_refused(tmp_path):
    flat, wrong = np.full((4, 3), 29000, np.uint16), np.full((4, 3), np.nan, np.float32)
    Image.fromarray(flat).save(tmp_path / "a.png")
    Image.fromarray(wrong).save(tmp_path / "b.tif")
    assert not np.asarray(cache.open_image(str(tmp_path / "a.png"))).any()
    with pytest.raises(UserError, match=r"b\.tif: has values that are NaN or infinite"):
        cache.decode(layout.collect([(str(tmp_path / "b.tif"), -1, -1)]), SIZE, folder=str(tmp_path))


def test_images_are_upright_as_their_exif_tells_unless_it_is_damaged(tmp_path):
    upright = trees.person(1, 1, 0, "vis", (20, 10))
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    for name, tag, expected in (("a.png", exif, upright), ("b.png", b"Exif\0\0not a TIFF", turned)):
        turned.save(tmp_path / name, exif=tag)
        assert np.array_equal(cache.open_image(str(tmp_path / name)), expected)


def test_names_of_any_bytes_are_decoded_and_named(images, folder):
    strange = os.fsdecode(os.fsencode(images.paths[0]) + b"\xe9.png")
    os.rename(images.paths[0], strange)
    renamed = layout.collect((path, -1, -1) for path in (strange, *images.paths[1:]))
    assert len(cache.decode(renamed, SIZE, folder=folder)) == 5
    Path(strange).write_bytes(b"")
    with pytest.raises(UserError, match="0.png\udce9.png: is empty"):
        cache.decode(renamed, SIZE, folder=folder)


@pytest.mark.parametrize("workers", [1, 3])
def test_order_does_not_depend_on_blocks_or_workers(images, folder, monkeypatch, workers):
    expected = cache.decode(images, SIZE, folder=folder + "-other").copy()
    monkeypatch.setattr(cache, "BLOCK", 2)
    assert np.array_equal(cache.decode(images, SIZE, folder=folder, workers=workers), expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, folder, mode):
    path = tmp_path / "image.tiff"
    image = trees.person(1, 1, 0, "vis").convert(mode)
    image.save(path)
    images = Images((str(path),), np.array([-1]), np.array([-1]))
    expected = image.convert("RGB").resize((6, 12), Image.Resampling.LANCZOS)
    assert np.array_equal(cache.decode(images, SIZE, folder=folder)[0], np.asarray(expected))


def test_the_second_call_decodes_nothing(images, folder, monkeypatch):
    first = cache.decode(images, SIZE, folder=folder)
    monkeypatch.setattr(cache, "_decode_one", None)
    assert np.array_equal(cache.decode(images, SIZE, folder=folder), first)
    assert files(folder) == [".npy"]


def test_a_changed_image_list_or_size_is_noticed(images, folder):
    cache.decode(images, SIZE, folder=folder)
    path = images.paths[2]
    stat = os.stat(path)
    trees.person(9, 1, 0, "vis", (20, 10)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = cache.decode(images, SIZE, folder=folder)
    assert np.array_equal(changed[2], np.asarray(Image.open(path).resize((6, 12), Image.Resampling.LANCZOS)))
    turned = Images(images.paths[::-1], images.ids, images.cams)
    assert np.array_equal(cache.decode(turned, SIZE, folder=folder), changed[::-1])
    assert cache.decode(images, (6, 6), folder=folder).shape == (5, 6, 6, 3)
    assert files(folder) == [".npy"] * 4


def test_a_new_format_is_decoded_anew(images, folder, monkeypatch):
    cache.decode(images, SIZE, folder=folder)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    cache.decode(images, SIZE, folder=folder)
    assert files(folder) == [".npy"] * 2


def test_the_default_folder_follows_the_environment(images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cache.decode(images, SIZE)
    assert files(str(tmp_path / "xdg" / "vireid-engine")) == [".npy"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache.decode(images, SIZE)
    assert files(str(tmp_path / "home" / ".cache" / "vireid-engine")) == [".npy"]


def test_all_bad_images_are_named_and_nothing_is_left(images, folder):
    Path(images.paths[0]).write_bytes(b"")
    Path(images.paths[1]).write_bytes(b"no image at all")
    whole = Path(images.paths[3]).read_bytes()
    Path(images.paths[3]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"cannot read 3 \(.*0.png: is empty, .*1.png: cannot identify.*3.png: .*5 images"
    ):
        cache.decode(images, SIZE, folder=folder)
    assert files(folder) == []


def test_only_the_first_bad_images_are_listed(images, folder):
    many = Images(images.paths * 2, np.full(10, -1), np.full(10, -1))
    for path in images.paths:
        Path(path).write_bytes(b"-")
    with pytest.raises(UserError, match=r"cannot read 10 \(.*, \.\.\.\) of 10 images"):
        cache.decode(many, SIZE, folder=folder)


def test_a_missing_image_is_named_with_the_damaged_ones(images, folder):
    os.unlink(images.paths[4])
    Path(images.paths[1]).write_bytes(b"")
    with pytest.raises(
        UserError, match=r"cannot read 2 \(.*1.png: is empty, .*4.png: No such file.*prepare.py names all"
    ):
        cache.decode(images, SIZE, folder=folder)


def test_too_large_an_image_is_refused_by_the_setting(images, folder):
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match=r"cannot read 5 .*0.png: has more than 199 pixels \(data.max_pixels\)"):
        cache.decode(images, SIZE, folder=folder, max_pixels=199)
    assert before == Image.MAX_IMAGE_PIXELS and files(folder) == []
    assert len(cache.decode(images, SIZE, folder=folder, max_pixels=200)) == 5


def test_no_images_are_refused(folder):
    with pytest.raises(UserError, match="no infrared images to decode"):
        cache.decode(Images((), np.empty(0), np.empty(0)), SIZE, folder=folder, label="infrared")


def test_too_little_room_is_said_before_decoding(images, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 7, 7))
    monkeypatch.setattr(cache, "_decode_one", None)
    with pytest.raises(UserError, match=r"needs 1,080 bytes in .*cache, where 7 are free; .*data.cache"):
        cache.decode(images, SIZE, folder=folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_leaves_nothing(images, folder, monkeypatch, code):
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"needs 1,080 bytes in .*cache, where .* are free"):
        cache.decode(images, SIZE, folder=folder)
    assert files(folder) == []


def test_a_folder_that_cannot_be_made_is_named(images, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cache folder .*file/cache cannot be written \(Not a directory\).*data.cache"):
        cache.decode(images, SIZE, folder=str(tmp_path / "file" / "cache"))


def test_a_folder_that_may_not_be_written_is_named(images, folder, monkeypatch):
    def refuse(_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache, "_temporary", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); name another one in data.cache"):
        cache.decode(images, SIZE, folder=folder)


SLOW = """
import sys, time
from engine.data import cache, layout
def slow(path, size):
    print("decoding", flush=True)
    time.sleep(60)
cache._decode_one = slow
cache.decode(layout.collect((p, -1, -1) for p in layout.list_images(__import__("pathlib").Path(sys.argv[1]))),
             (12, 6), folder=sys.argv[2])
"""


def test_a_killed_run_leaves_nothing_valid_and_is_cleaned_up_after(images, folder, tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path / "images"), folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline()
        cache._clean(Path(folder))
        assert files(folder) == [".tmp"]  # a living process keeps its file
        process.send_signal(signal.SIGKILL)
    assert files(folder) == [".tmp"]
    pixels = cache.decode(images, SIZE, folder=folder)
    assert files(folder) == [".npy"] and pixels.any(axis=(1, 2, 3)).all()


def decode_and_sum(images: Images, folder: str, start: float) -> int:
    time.sleep(max(0.0, start - time.time()))
    return int(cache.decode(images, SIZE, folder=folder).astype(np.int64).sum())


def test_processes_that_decode_at_once_agree(images, folder):
    expected = int(cache.decode(images, SIZE, folder=folder + "-other").astype(np.int64).sum())
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        sums = pool.starmap(decode_and_sum, [(images, folder, time.time() + 2)] * 3)
    assert sums == [expected] * 3 and files(folder) == [".npy"]
