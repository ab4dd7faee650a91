"""Every reader finds what its layout holds, draws the field's galleries, and says clearly what is wrong."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import trees

import engine.data
from engine.config import Data
from engine.data import folder, llcm, regdb, sysu
from engine.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set")
SYSU_NAMES = ("all single-shot", "all multi-shot", "indoor single-shot", "indoor multi-shot")


def edit(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def gallery_paths(data, protocol: int, trial: int) -> list[str]:
    chosen = data.protocols[protocol]
    side = data.test.vis if chosen.query == "ir" else data.test.ir
    return [side.paths[row] for row in chosen.trials[trial].gallery]


# SYSU-MM01


def test_sysu_lists_the_official_parts(sysu_tree):
    data = sysu.read(sysu_tree)
    assert set(data.train.vis.ids) == set(range(1, 9)) and set(data.test.ir.ids) == set(range(9, 13))
    assert len(data.train.vis) == 8 * 4 * 2 and len(data.train.ir) == 8 * 2 * 2
    assert set(data.train.vis.cams) == {1, 2, 4, 5} and set(data.test.ir.cams) == {3, 6}
    assert data.train.vis.ids.dtype == data.train.vis.cams.dtype == np.int64
    for images in (*data.train, *data.test):
        for path, identity, camera in zip(images.paths, images.ids, images.cams, strict=True):
            assert path.split(os.sep)[-3:-1] == [f"cam{camera}", f"{identity:04d}"] and os.path.isabs(path)


def test_sysu_protocols_query_all_infrared_ten_times(sysu_tree):
    data = sysu.read(sysu_tree)
    assert tuple(protocol.name for protocol in data.protocols) == SYSU_NAMES
    for protocol in data.protocols:
        assert (protocol.query, protocol.rule, len(protocol.trials)) == ("ir", "sysu", 10)
        for trial in protocol.trials:
            assert trial.queries.tolist() == list(range(len(data.test.ir)))
            cameras = {1, 2} if protocol.name.startswith("indoor") else {1, 2, 4, 5}
            assert set(data.test.vis.cams[trial.gallery]) == cameras


def test_sysu_val_split_holds_the_val_identities_out(sysu_tree):
    data = sysu.read(sysu_tree, split="val")
    assert set(data.train.vis.ids) == set(range(1, 7)) and set(data.test.vis.ids) == {7, 8}


def test_sysu_single_shot_galleries_are_those_of_seeded_random_choice(sysu_tree):
    data = sysu.read(sysu_tree)
    for protocol, cameras in ((0, (1, 2, 4, 5)), (2, (1, 2))):
        for trial in range(10):
            random.seed(trial)
            expected = [
                random.choice(sorted(str(path) for path in (sysu_tree / f"cam{camera}" / f"{identity:04d}").iterdir()))
                for identity in range(9, 13)
                for camera in cameras
            ]
            assert gallery_paths(data, protocol, trial) == expected


def test_sysu_multi_shot_takes_ten_or_all(tmp_path):
    root = trees.build_sysu(tmp_path, identities=(1, 1, 2), images=12, size=(8, 4))
    for path in sorted((root / "cam2" / "0003").iterdir())[4:]:
        path.unlink()
    data = sysu.read(root)
    for trial in data.protocols[1].trials:
        keys = list(zip(data.test.vis.ids[trial.gallery], data.test.vis.cams[trial.gallery], strict=True))
        assert len(set(trial.gallery)) == len(trial.gallery)
        assert {key: keys.count(key) for key in keys} == {
            (identity, camera): 4 if (identity, camera) == (3, 2) else 10
            for identity in (3, 4)
            for camera in (1, 2, 4, 5)
        }
    assert not np.array_equal(data.protocols[1].trials[0].gallery, data.protocols[1].trials[1].gallery)


def test_sysu_skips_cameras_that_never_saw_an_identity(tmp_path):
    root = trees.build_sysu(tmp_path, identities=(1, 1, 2), size=(8, 4))
    for path in (root / "cam4" / "0003").iterdir():
        path.unlink()
    (root / "cam4" / "0003").rmdir()
    assert len(gallery_paths(sysu.read(root), 0, 0)) == 7


def write_permutations(root: Path, identities: int, numbers: np.ndarray) -> None:
    cells = np.empty((6, 1), dtype=object)
    for camera in range(6):
        cells[camera, 0] = np.empty((identities, 1), dtype=object)
        for identity in range(identities):
            cells[camera, 0][identity, 0] = numbers
    scipy.io.savemat(root / "exp" / "rand_perm_cam.mat", {"rand_perm_cam": cells})


def test_sysu_official_galleries_follow_the_authors_permutations(tmp_path):
    root = trees.build_sysu(tmp_path, identities=(1, 1, 2), images=3, size=(8, 4))
    numbers = np.stack([np.random.RandomState(trial).permutation(3) + 1 for trial in range(10)])
    write_permutations(root, 4, numbers)
    data = sysu.read(root, gallery="official")
    for trial in range(10):
        assert {Path(path).stem for path in gallery_paths(data, 0, trial)} == {f"{numbers[trial, 0]:04d}"}
        assert len(gallery_paths(data, 1, trial)) == 2 * 4 * 3


@pytest.mark.parametrize("numbers", [np.full((10, 3), 7), np.ones((2, 3)), np.array([["x"] * 3] * 10)])
def test_sysu_official_galleries_that_do_not_fit_are_refused(tmp_path, numbers):
    root = trees.build_sysu(tmp_path, identities=(1, 1, 2), images=3, size=(8, 4))
    write_permutations(root, 4, numbers)
    with pytest.raises(UserError, match=r"rand_perm_cam.mat: trial .* does not fit .*data.gallery"):
        sysu.read(root, gallery="official")


def test_sysu_official_galleries_need_a_sound_file(tmp_path):
    root = trees.build_sysu(tmp_path, identities=(1, 1, 2), size=(8, 4))
    with pytest.raises(UserError, match="rand_perm_cam.mat not found.*data.gallery to 'agw'"):
        sysu.read(root, gallery="official")
    edit(root / "exp" / "rand_perm_cam.mat", "no matrix")
    with pytest.raises(UserError, match="is not rand_perm_cam.mat"):
        sysu.read(root, gallery="official")


def test_sysu_official_numbers_are_silent_when_they_hold_and_named_when_not(sysu_tree):
    right = {"training identities": 8, "infrared queries": 16, "all single-shot gallery": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sysu.read(sysu_tree, counts={"test": right})
    with pytest.warns(
        UserWarning, match="SYSU-MM01 in .*training identities 8 .expected 395., .*queries 16 .expected 38"
    ):
        sysu.read(sysu_tree)


def test_sysu_warns_of_test_identities_without_one_modality(tmp_path):
    root = trees.build_sysu(tmp_path, identities=(1, 1, 2), images=1, size=(8, 4))
    for camera in (3, 6):
        (root / f"cam{camera}" / "0004" / "0001.jpg").unlink()
        (root / f"cam{camera}" / "0004").rmdir()
    with pytest.warns(UserWarning, match=r"test identities without infrared images: 1 \(4\)"):
        sysu.read(root)


def break_sysu(root: Path, how: str) -> None:
    if how == "camera":
        (root / "cam3").rename(root / "camera3")
    elif how == "split":
        (root / "exp" / "val_id.txt").unlink()
    elif how == "garbage":
        edit(root / "exp" / "train_id.txt", "1,two,3")
    elif how == "binary":
        (root / "exp" / "train_id.txt").write_bytes(b"\xff\xfe\x00")
    elif how == "empty split":
        edit(root / "exp" / "test_id.txt", "\n")
    elif how == "overlap":
        edit(root / "exp" / "test_id.txt", "1,3,4")
    elif how == "strangers":
        edit(root / "exp" / "test_id.txt", "77")
    elif how == "empty folder":
        for path in (root / "cam1" / "0003").iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("camera", "cam3 not found: expected the images of camera 3; check data.root"),
        ("split", "val_id.txt not found: expected identities separated by commas"),
        ("garbage", "train_id.txt holds 'two': expected identities separated by commas"),
        ("binary", "train_id.txt cannot be read"),
        ("empty split", "test_id.txt is empty"),
        ("overlap", r"both trained on and scored: 1 \(1\)"),
        ("strangers", "no image of 1 identities in cam1, cam2, cam4, cam5"),
        ("empty folder", "cam1/0003 holds no image"),
    ],
)
def test_sysu_damage_is_named(tmp_path, how, message):
    root = trees.build_sysu(tmp_path, identities=(1, 1, 2), images=1, size=(8, 4))
    break_sysu(root, how)
    with pytest.raises(UserError, match=message):
        sysu.read(root)


@pytest.mark.parametrize("read", [sysu.read, regdb.read, llcm.read, folder.read])
def test_a_missing_root_is_named(tmp_path, read):
    with pytest.raises(UserError, match="nowhere not found: expected a folder with .*check data.root"):
        read(tmp_path / "nowhere")


# RegDB


def test_regdb_reads_one_split_in_both_directions(regdb_tree):
    data = regdb.read(regdb_tree, trial=2)
    assert len(data.train.vis) == len(data.train.ir) == 18 and len(data.test.vis) == len(data.test.ir) == 12
    assert [(protocol.name, protocol.query, protocol.rule) for protocol in data.protocols] == [
        ("visible to infrared", "vis", "plain"),
        ("infrared to visible", "ir", "plain"),
    ]
    for protocol in data.protocols:
        (trial,) = protocol.trials
        assert trial.queries.tolist() == trial.gallery.tolist() == list(range(12))
    read = data.test.ir.paths, data.test.ir.ids
    listed = (regdb_tree / "idx" / "test_thermal_2.txt").read_text().splitlines()
    assert [f"{os.path.relpath(p, regdb_tree)} {i}" for p, i in zip(*read, strict=True)] == listed


def test_regdb_trials_are_different_splits(regdb_tree):
    first, second = (regdb.read(regdb_tree, trial=trial) for trial in (1, 2))
    assert set(first.test.vis.paths) != set(second.test.vis.paths)


@pytest.mark.parametrize("trial", [0, 11, -1])
def test_regdb_has_ten_trials(regdb_tree, trial):
    with pytest.raises(UserError, match=f"data.trial must be 1 to 10 for RegDB, got {trial}"):
        regdb.read(regdb_tree, trial=trial)


def test_regdb_warns_of_other_counts(regdb_tree):
    with pytest.warns(UserWarning, match=r"training identities 6 \(expected 206\).*test infrared images 12"):
        regdb.read(regdb_tree)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "train_visible_1.txt",
            "Visible/1/front_vis_000_0001.bmp\n",
            "train_visible_1.txt, line 1, is .*relative/path",
        ),
        ("train_visible_1.txt", "Visible/1/front_vis_000_0001.bmp one\n", "line 1, is .*: expected lines"),
        ("train_visible_1.txt", "Visible/1/gone.bmp 0\n", r"1 \(.*gone.bmp\) of the 1 images in .* not found"),
        ("train_visible_1.txt", "", "train_visible_1.txt is empty"),
        ("test_visible_1.txt", "Visible/1/front_vis_000_0001.bmp 0\n", "both trained on and scored: 1"),
    ],
)
def test_regdb_damage_is_named(tmp_path, name, text, message):
    root = trees.build_regdb(tmp_path, identities=(2, 1), images=1, size=(8, 4))
    edit(root / "idx" / name, text)
    with pytest.raises(UserError, match=message):
        regdb.read(root)


def test_regdb_mixed_up_trials_are_refused(tmp_path):
    root = trees.build_regdb(tmp_path, identities=(2, 1), images=1, size=(8, 4))
    for name in ("visible", "thermal"):
        (root / "idx" / f"test_{name}_2.txt").replace(root / "idx" / f"test_{name}_1.txt")
    with pytest.raises(UserError, match="both trained on and scored"):
        regdb.read(root)


# LLCM


def test_llcm_reads_lists_and_cameras(llcm_tree):
    data = llcm.read(llcm_tree)
    assert len(data.train.vis) == 5 * 9 and len(data.train.ir) == 5 * 8
    assert set(data.train.vis.cams) == set(range(1, 10)) and set(data.test.ir.cams) == set(range(1, 10)) - {3}
    assert set(data.train.vis.ids) == set(range(5)) and set(data.test.vis.ids) == {6, 7, 8}


def test_llcm_camera_is_unknown_where_the_name_has_none(tmp_path):
    root = trees.build_llcm(tmp_path, identities=(1, 1), size=(8, 4))
    (root / "vis" / "plain.jpg").write_bytes(b"image")
    edit(root / "idx" / "train_vis.txt", "vis/plain.jpg 0\n")
    assert llcm.read(root).train.vis.cams.tolist() == [-1]


def test_llcm_protocols_are_those_in_circulation(tmp_path):
    root = trees.build_llcm(tmp_path, identities=(1, 2), images=3, size=(8, 4))
    data = llcm.read(root)
    assert [(protocol.name, protocol.query) for protocol in data.protocols] == [
        ("infrared to visible", "ir"),
        ("visible to infrared (paper)", "vis"),
        ("visible to infrared (official-script)", "ir"),
    ]
    to_visible, paper, script = data.protocols
    for trial in range(10):
        random.seed(trial)
        expected = [
            random.choice(sorted(str(path) for path in (root / "test_nir" / f"cam{camera}" / f"{i:04d}").iterdir()))
            for i in (2, 3)
            for camera in trees.LLCM_CAMERAS["nir"]
        ]
        assert gallery_paths(data, 1, trial) == expected
        assert np.array_equal(script.trials[trial].queries, paper.trials[trial].gallery)
        assert np.array_equal(script.trials[trial].gallery, paper.trials[trial].queries)
        assert len(to_visible.trials[trial].gallery) == 2 * 9 and len(to_visible.trials[trial].queries) == 2 * 8 * 3
    assert {protocol.rule for protocol in data.protocols} == {"llcm"}


def test_llcm_warns_and_fails_clearly(tmp_path):
    root = trees.build_llcm(tmp_path, identities=(1, 1), size=(8, 4))
    with pytest.warns(UserWarning, match=r"LLCM in .*training identities 1 \(expected 713\)"):
        llcm.read(root)
    edit(root / "idx" / "test_id.txt", "9")
    with pytest.raises(UserError, match="no image of the 1 identities in idx/test_id.txt"):
        llcm.read(root)
    (root / "test_nir" / "cam9").rename(root / "test_nir" / "gone")
    edit(root / "idx" / "test_id.txt", "2")
    with pytest.raises(UserError, match="cam9 not found: expected the test images of camera 9"):
        llcm.read(root)


# Own footage


def test_folder_without_test_images_has_nothing_to_score(tmp_path):
    data = folder.read(trees.build_folder(tmp_path, scored=False))
    assert data.test is None and data.protocols == ()
    assert len(data.train.vis) == len(data.train.ir) == 24
    assert set(data.train.vis.ids) == set(data.train.vis.cams) == {-1}
    assert list(data.train.vis.paths) == sorted(data.train.vis.paths)


@pytest.mark.parametrize("query", ["ir", "vis"])
def test_folder_with_test_images_scores_query_against_gallery(tmp_path, query):
    data = folder.read(trees.build_folder(tmp_path, query=query), query=query)
    (protocol,) = data.protocols
    assert (protocol.name, protocol.query, protocol.rule) == ("query to gallery", query, "llcm")
    queries = data.test[query]
    assert all(Path(path).parent.name == "query" for path in queries.paths)
    assert set(queries.ids) == {7, 8, 9} and set(queries.cams) == ({3, 4} if query == "ir" else {1, 2})
    (trial,) = protocol.trials
    assert len(trial.queries) == len(trial.gallery) == 12


def test_folder_takes_any_usual_image_and_nothing_else(tmp_path):
    root = trees.build_folder(tmp_path, identities=(1, 1), images=1, scored=False)
    for name in ("a.JPG", "b.tiff", "c.webp", "Thumbs.db", "notes.txt"):
        (root / "visible" / name).write_bytes(b"-")
    names = [Path(path).name for path in folder.read(root).train.vis.paths]
    assert sorted(names) == ["1_0.png", "a.JPG", "b.tiff", "c.webp"]


@pytest.mark.parametrize(
    ("build", "read", "inner"),
    [
        (trees.build_sysu, sysu.read, "cam1"),
        (trees.build_regdb, lambda root: regdb.read(root, trial=1), "Visible"),
        (trees.build_llcm, llcm.read, "vis"),
    ],
)
def test_a_root_a_level_too_high_or_too_low_is_told_the_right_one(tmp_path, build, read, inner):
    root = build(tmp_path / "a set")
    for wrong in (tmp_path, root / inner):
        with pytest.raises(
            UserError, match=rf"{wrong} has no .*\.txt, {root} has: set data\.root to that, a folder with"
        ):
            read(wrong)


def test_files_that_systems_add_are_no_images(tmp_path):
    """macOS writes ._0001.jpg beside 0001.jpg where a disk knows no attributes."""
    sysu_root, folder_root = trees.build_sysu(tmp_path / "sysu"), trees.build_folder(tmp_path / "folder")
    before = sysu.read(sysu_root).train.vis.paths, folder.read(folder_root).train.vis.paths
    for place in (sysu_root / "cam1" / "0001", folder_root / "visible"):
        for name in ("._0001.jpg", ".DS_Store", "Thumbs.db"):
            (place / name).write_bytes(b"-")
    assert (sysu.read(sysu_root).train.vis.paths, folder.read(folder_root).train.vis.paths) == before


def test_folder_follows_links_but_not_in_circles(tmp_path):
    for name in ("elsewhere/camera", "visible", "infrared/night"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jpg").write_bytes(b"")
    (tmp_path / "visible" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "visible" / "b.jpg").symlink_to(tmp_path / "elsewhere" / "camera" / "a.jpg")
    (tmp_path / "infrared" / "night" / "circle").symlink_to(tmp_path / "infrared")
    found = folder.read(tmp_path).train
    assert [path.removeprefix(str(tmp_path)) for path in (*found.vis.paths, *found.ir.paths)] == [
        "/visible/a.jpg",
        "/visible/b.jpg",
        "/visible/linked/camera/a.jpg",
        "/infrared/night/a.jpg",
    ]


def test_folder_damage_is_named(tmp_path):
    root = trees.build_folder(tmp_path, identities=(1, 1), images=1)
    (root / "query" / "somebody.jpg").write_bytes(b"-")
    with pytest.raises(UserError, match=r"query: 1 \(somebody.jpg\) not named <identity>_c<camera>_"):
        folder.read(root)
    (root / "gallery").rename(root / "other")
    with pytest.raises(UserError, match="gallery not found: query needs it"):
        folder.read(root)
    (root / "infrared").rename(root / "thermal")
    with pytest.raises(UserError, match="infrared not found: expected the infrared images"):
        folder.read(root)


def test_folder_without_images_is_named(tmp_path):
    for name in ("visible", "infrared"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="visible holds no image"):
        folder.read(tmp_path)


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    edit(tmp_path / "visible", "not a folder")
    with pytest.raises(UserError, match="visible holds no image|visible cannot be read"):
        folder.read(tmp_path)


# Settings


@pytest.mark.parametrize("name", ["sysu", "regdb", "llcm", "folder"])
def test_settings_name_the_reader(request, name):
    root = request.getfixturevalue(f"{name}_tree")
    data = engine.data.read(Data(name=name, root=str(root)))
    assert len(data.train.vis) and data.protocols


def test_settings_reach_the_reader(sysu_tree, regdb_tree, folder_tree):
    assert set(engine.data.read(Data(name="sysu", root=str(sysu_tree), split="val")).test.vis.ids) == {7, 8}
    with pytest.raises(UserError, match="rand_perm_cam.mat"):
        engine.data.read(Data(name="sysu", root=str(sysu_tree), gallery="official"))
    assert engine.data.read(Data(name="regdb", root=str(regdb_tree), trial=2)).name == "RegDB split 2"
    assert engine.data.read(Data(name="folder", root=str(folder_tree), query="vis")).protocols[0].query == "vis"
