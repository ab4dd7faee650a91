from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import captions, demo, demo_captions, demo_people, sysu
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
    assert set(contents(root)) == images | lists | {demo.MARKER, *captions.FILES}
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


def test_captions_of_this_version_stay_as_they_are(persons: list[demo_people.Person]) -> None:
    """As with the identities above: if this fails, the demo changed."""
    third, first = persons[2], persons[0]
    assert demo.caption(third, 3, 1, 1)[0] == (
        "the person wears a grey jumper, an orange checked skirt and violet footwear, "
        "has blond hair cut short and a brown shoulder bag"
    )
    assert demo.caption(third, 3, 1, 1)[1] == (
        "a pedestrian carrying a brown shoulder bag, dressed in a grey sweater, an orange checked skirt and violet shoes, "
        "having short blond hair"
    )
    assert demo.caption(third, 3, 3, 1)[0] == (
        "the person wears a light jumper, a bright plaid skirt and dark shoes, has short hair and a dark shoulder bag"
    )
    assert first.hair == "shaved" and demo.caption(first, 1, 1, 1)[1] == (  # an error
        "a person with a baseball cap, wearing a navy blue two-tone sweater, short red trousers and black shoes, "
        "carrying a sky blue backpack"
    )
    texts = [demo.caption(person, pid, cam, 1) for pid, person in enumerate(persons, 1) for cam in CAMERAS]
    digest = hashlib.sha256("\n".join(map(repr, texts)).encode()).hexdigest()
    assert (demo.VERSION, digest) == (1, "d04cc21b84925b1221201b95c0d8b983e2086c007a84a97ea6b37ae1ec63c9e5")


def test_infrared_captions_name_no_colour(persons: list[demo_people.Person]) -> None:
    tones = {*demo_people.COLOURS, *demo_people.HAIR_SHADES}
    colours = {word for tone in tones for text in demo_captions.TONE_WORDS.get(tone, (tone,)) for word in text.split()}
    colours -= {"light", "dark"}  # of "light blue"; alone they are shades
    visible, infrared = (
        {word for pid, person in enumerate(persons, 1) for text in demo.caption(person, pid, cam, 1)
         for word in re.findall(r"[\w-]+", text)}
        for cam in (1, 3)
    )  # fmt: skip
    assert colours <= visible
    assert not colours & infrared


@pytest.mark.parametrize("infrared", [False, True])
def test_captioners_err_at_the_set_rate(persons: list[demo_people.Person], infrared: bool) -> None:
    rng = np.random.default_rng(0)
    truths = [demo_captions.truth(person, infrared) for person in persons] * 20
    pairs = [
        (thing, seen.get(part))
        for truth in truths
        for seen in [demo_captions.misread(truth, infrared, rng)]
        for part, thing in truth.items()
    ]
    wrong = [(thing, seen) for thing, seen in pairs if thing != seen]
    rate = demo_captions.ERROR_RATE
    assert len(wrong) / len(pairs) == pytest.approx(rate, abs=5 * (rate * (1 - rate) / len(pairs)) ** 0.5)
    assert {
        "left out" if seen is None else next(name for name, value in vars(thing).items() if value != vars(seen)[name])
        for thing, seen in wrong
    } == {"left out", "kind", "tone", "pattern"}


def test_a_caption_and_its_paraphrase_differ_in_words_alone() -> None:
    things = {"hair": demo_captions.Thing("cap", "orange"), "upper": demo_captions.Thing("coat", "navy", "dots")}
    texts = {
        demo_captions.tell(things, template, np.random.default_rng(seed))
        for template in range(len(demo_captions.TEMPLATES))
        for seed in range(20)
    }
    assert len(texts) > 20
    for text in texts:
        assert re.search(r"an orange (baseball )?cap", text)
        assert re.search(r"(navy|dark) blue (dotted|spotted) (coat|jacket)", text)
        assert "  " not in text and "bag" not in text


def test_every_image_of_the_demo_has_a_caption(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = sysu.read(root, counts=TINY.counts())
        for images in (dataset.train, dataset.test):
            read = captions.read(images, root)
            assert read.map(len) == images.map(len)
            assert all(
                one != other for side in read for one, other in zip(side.description, side.paraphrase, strict=True)
            )


def test_captions_are_added_to_a_demo_made_before_there_were_any(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(root, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    (folder / captions.FILES.vis).unlink()
    (folder / captions.FILES.ir).write_text("{}")  # one's own captions stay
    demo.prepare(folder, TINY)
    assert contents(folder) == contents(root) | {captions.FILES.ir: b"{}"}
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}


def test_a_demo_that_cannot_get_captions_is_used_without(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(root, folder)
    (folder / captions.FILES.vis).unlink()

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(captions, "save", refuse)
    with pytest.warns(UserWarning, match="captions cannot be added"):
        demo.prepare(folder, TINY)
    assert not list(folder.glob(".captions*"))
