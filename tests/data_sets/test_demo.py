from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import demo, demo_people, sysu
from engine.data.demo_drawing import CAMERAS, HEIGHT, WIDTH, Stuff
from engine.errors import UserError

TINY = demo.Size(train=2, val=1, test=2, images=1)
IDENTITY_COUNT = len(list(itertools.chain.from_iterable(demo.Size().lists().values())))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "tiny"
    demo.prepare(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def persons() -> list[demo_people.Person]:
    return demo_people.people(IDENTITY_COUNT, demo.VERSION)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_is_that_of_sysu(root: Path) -> None:
    images = {f"cam{cam}/{pid:04d}/0001.jpg" for cam in range(1, 7) for pid in range(1, 6)}
    lists = {f"exp/{name}_id.txt" for name in ("train", "val", "test")}
    assert set(contents(root)) == images | lists | {demo.MARKER}
    assert [(root / "exp" / f"{name}_id.txt").read_text() for name in ("train", "val", "test")] == [
        "1,2\n",
        "3\n",
        "4,5\n",
    ]


@pytest.mark.parametrize("split", ["test", "val"])
def test_reader_finds_the_counts_that_the_size_promises(root: Path, split: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = sysu.read(root, split=split, counts=TINY.counts())  # type: ignore[arg-type]
    assert not {*dataset.train.vis.ids} & {*dataset.test.vis.ids}  # type: ignore[union-attr]


def test_read_generates_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "Size", lambda: TINY)
    dataset = demo.read(tmp_path / "below" / "demo", split="val")
    assert (dataset.name, len(dataset.train.vis), len(dataset.train.ir)) == ("demo", 8, 4)


def test_same_bytes_every_time(root: Path, tmp_path: Path) -> None:
    demo.prepare(tmp_path / "again", TINY)
    assert contents(tmp_path / "again") == contents(root)


def test_an_image_does_not_depend_on_what_was_drawn_before(persons: list[demo_people.Person]) -> None:
    first = demo.image(persons[4], 5, 3, 1)
    demo.image(persons[0], 1, 1, 1)
    assert first.tobytes() == demo.image(persons[4], 5, 3, 1).tobytes()
    assert first.tobytes() != demo.image(persons[4], 5, 3, 2).tobytes()


def test_an_identity_does_not_depend_on_how_many_follow(persons: list[demo_people.Person]) -> None:
    assert demo_people.people(5, demo.VERSION) == persons[:5]


def test_identities_of_this_version_stay_as_they_are(persons: list[demo_people.Person]) -> None:
    """If this fails, the demo changed: raise `demo.VERSION`, measure anew, and put the new hash here."""
    digest = hashlib.sha256("\n".join(map(repr, persons)).encode()).hexdigest()
    assert (demo.VERSION, digest) == (1, "db7fd9742ff29c67dab3a9e650fdea2a3bd846df848515dc4e3291f27c17cc00")


def test_every_two_identities_differ_in_three_attributes_that_both_modalities_show(
    persons: list[demo_people.Person],
) -> None:
    described = [demo_people.structure(person) for person in persons]
    for one, other in itertools.combinations(described, 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 3


@pytest.mark.parametrize("cam", CAMERAS)
def test_images_have_the_size_and_the_channels_of_their_camera(root: Path, cam: int) -> None:
    pixels = np.asarray(Image.open(root / f"cam{cam}" / "0001" / "0001.jpg"))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    grey = bool((pixels == pixels[..., :1]).all())
    assert grey == (cam in sysu.CAMERAS.ir) == CAMERAS[cam].infrared


@pytest.mark.parametrize("colour", demo_people.COLOURS.values(), ids=demo_people.COLOURS)
@pytest.mark.parametrize("cloth", demo_people.CLOTHS)
def test_patterns_have_one_contrast_sign_in_both_modalities(colour: demo_people.Colour, cloth: str) -> None:
    stuff = Stuff(colour, demo_people.CLOTHS[cloth], "dots", 12)
    base, second = stuff.tones(infrared=False)
    infrared_base, infrared_second = stuff.tones(infrared=True)
    assert np.sign((second - base).sum()) == np.sign((infrared_second - infrared_base).sum())
    assert 0 <= min(infrared_base.min(), infrared_second.min())
    assert max(infrared_base.max(), infrared_second.max()) <= 1


def test_interrupted_generation_leaves_nothing_and_is_made_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Image.Image:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo, "image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.prepare(tmp_path / "demo", TINY)
    assert list(tmp_path.iterdir()) == []
    demo.prepare(tmp_path / "demo", TINY)
    assert contents(tmp_path / "demo") == contents(root)


def test_leftovers_of_a_killed_generation_do_no_harm(root: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".demo-killed" / "demo" / "cam1"
    leftover.mkdir(parents=True)
    (tmp_path / "demo").mkdir()
    demo.prepare(tmp_path / "demo", TINY)
    assert contents(tmp_path / "demo") == contents(root)
    assert leftover.is_dir()


def test_losing_the_race_to_another_process_is_no_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = demo._write

    def write_while_another_finishes(folder: Path, size: demo.Size) -> None:
        write(folder, size)
        write(tmp_path / "demo", size)

    monkeypatch.setattr(demo, "_write", write_while_another_finishes)
    demo.prepare(tmp_path / "demo", TINY)
    assert contents(tmp_path / "demo") == contents(root)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("marker", [json.dumps({"version": 0}), "{", "3"])
def test_another_version_is_refused_and_kept(tmp_path: Path, marker: str) -> None:
    (tmp_path / demo.MARKER).write_text(marker)
    with pytest.raises(UserError, match="remove the folder"):
        demo.prepare(tmp_path, TINY)
    assert (tmp_path / demo.MARKER).read_text() == marker


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("my only copy")
    with pytest.raises(UserError, match="choose another data.root"):
        demo.prepare(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another data.root"):
        demo.prepare(tmp_path / "file", TINY)
    with pytest.raises(UserError, match="cannot be made"):
        demo.prepare(tmp_path / "file" / "demo", TINY)


def test_sheet_shows_every_camera(persons: list[demo_people.Person]) -> None:
    sheet = demo.sheet([2, 5], images=1)
    assert sheet.size == (6 * (WIDTH + 2), 2 * (HEIGHT + 2))
    corner = 3 * (WIDTH + 2), HEIGHT + 2  # second row, fourth visible camera
    shown = sheet.crop((*corner, corner[0] + WIDTH, corner[1] + HEIGHT))
    assert shown.tobytes() == demo.image(persons[4], 5, 5, 1).tobytes()
