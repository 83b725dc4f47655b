"""Folders of very many images: an index gives the names that a walk of the folder finds."""

import logging
import os
import pathlib
import random
import shutil
import time

import numpy as np
import pytest
import torch
from dataset_helpers import everything, make_config, random_images, save_image
from processes import together

import datasets
from score_lib.data import index, listing
from score_lib.data.files import Folder, hidden
from score_lib.data.index import known_listing
from score_lib.data.listing import INDEX, is_current, list_tree
from score_lib.data.names import Names
from score_lib.data.sources import DataError
from score_lib.disk.arrays import load_arrays, save_arrays

PARTS = ["a", "b c", "é", "\U0001f600", "\ue000", os.fsdecode(b"\xff\x80"), ".x", "A1", "a-", "\n"]


@pytest.fixture(autouse=True)
def every_folder_is_large(monkeypatch, tmp_path_factory):
    """An index even for a few files, and a cache folder that is not the user's."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(index, "SMALL", 1)
    return cache / "score_lib"


@pytest.fixture
def listings(monkeypatch):
    """The folders that were listed as a whole."""
    listed = []

    def counted(path):
        listed.append(path)
        return list_tree(path)

    monkeypatch.setattr(index, "list_tree", counted)
    return listed


def make_tree(root, draws):
    """Random folders, files and links."""
    folders = [root]
    for _ in range(12):
        folders.append(draws.choice(folders) / draws.choice(PARTS))
        folders[-1].mkdir(exist_ok=True)
    for _ in range(30):
        file = draws.choice(folders) / (draws.choice(PARTS) + draws.choice(PARTS) + ".png")
        if not os.path.lexists(file):
            kind = draws.randrange(6)
            target = os.path.relpath(draws.choice(folders), file.parent)
            file.symlink_to(target if kind else "nowhere") if kind < 2 else file.touch()
    return folders


def walked(root):
    """Names of files and links, by the standard library."""
    names = []
    for folder, folders, files in os.walk(root):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        names += [os.path.relpath(os.path.join(folder, name), root) for name in files + linked]
    return sorted(name for name in names if name != INDEX)


@pytest.mark.parametrize("seed", range(12))
def test_an_index_holds_the_names_that_a_walk_finds(tmp_path, seed, listings):
    make_tree(tmp_path, random.Random(seed))
    expected = walked(tmp_path)
    first, second = known_listing(tmp_path), known_listing(tmp_path)
    assert len(listings) == 1 and (tmp_path / INDEX).is_file()
    for found in (first, second):
        assert list(found.names) == expected == [found.names[k] for k in range(len(expected))]
        assert set(found.links) == {n for n in expected if (tmp_path / n).is_symlink()}
    assert list(Folder(tmp_path).names) == expected


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_added_removed_and_renamed_files_are_noticed(tmp_path, seed, fresh, listings, monkeypatch):
    draws = random.Random(seed)
    folders = make_tree(tmp_path, draws)
    if not fresh:  # only times are compared
        monkeypatch.setattr(listing, "_TICK", -(10**18))
    for change in range(8):
        known_listing(tmp_path)
        files = [p for p in tmp_path.rglob("*") if p.is_symlink() or p.is_file()]
        file = draws.choice([p for p in files if p.name != INDEX])
        folder = draws.choice(folders)
        if not fresh:
            time.sleep(0.01)  # longer than the clock of a file system waits between ticks
        if change % 4 == 0:
            (folder / f"new{change}.png").touch()
        elif change % 4 == 1:
            file.unlink()
        elif change % 4 == 2:
            file.rename(file.with_name(f"renamed{change}.png"))
        else:
            (folder / f"sub{change}").mkdir()
        before = len(listings)
        assert list(known_listing(tmp_path).names) == walked(tmp_path)
        assert len(listings) == before + 1


def test_a_change_within_a_tick_of_the_clock_is_noticed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    found = list_tree(tmp_path)
    (tmp_path / "a" / "2.png").touch()
    states = found.states.copy()
    states[1, :3] = listing._times(str(tmp_path / "a"))  # as if the clock stood still
    assert not is_current(tmp_path, found._replace(states=states))
    old = found._replace(states=states, begun=found.begun + 10**12)
    assert is_current(tmp_path, old)  # long after the folder's last change, its times suffice


def test_a_file_that_becomes_a_link_is_noticed(tmp_path):
    (tmp_path / "1.png").touch()
    (tmp_path / "2.png").touch()
    known_listing(tmp_path)
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"2.png in .* is a broken link"):
        datasets.get_streams(make_config("IMAGES", path=str(tmp_path)))


def test_examples_are_the_same_with_and_without_an_index(tmp_path, monkeypatch, listings, caplog):
    for number in range(24):
        part, kind = ("train", "test")[number % 3 == 0], ("cat", "dog10", "dog9")[number % 4 % 3]
        save_image(tmp_path, f"{part}/{kind}/{number}.png", random_images(8, 8, 3, seed=number))
    (tmp_path / ".hidden.png").touch()

    def opened():
        info = datasets.get_streams(make_config("IMAGES", path=str(tmp_path)))[2]
        return info.class_to_idx, [everything(source) for source in info.sources.values()]

    monkeypatch.setattr(index, "SMALL", 100)
    classes, parts = opened()
    assert not (tmp_path / INDEX).exists() and classes == {"cat": 0, "dog9": 1, "dog10": 2}
    monkeypatch.setattr(index, "SMALL", 25)
    for _ in range(2):
        caplog.clear()
        again, others = opened()
        assert again == classes and "1 left out because they are not images: .hidden" in caplog.text
        for part, other in zip(parts, others, strict=True):
            assert torch.equal(part[0], other[0]) and torch.equal(part[1], other[1])
    assert len(listings) == 2


def test_a_folder_may_be_both_parts_of_a_split(tmp_path):
    for name in ("a/1.png", "b/2.png", "b/3.png"):
        save_image(tmp_path, name, random_images(8, 8, 3))
    info = datasets.get_streams(make_config("IMAGES", path=str(tmp_path), split="b:a"))[2]
    assert info.num_examples == {"train": 2, "test": 1}
    with pytest.raises(datasets.DataError):  # nothing is left to hold out
        datasets.get_streams(make_config("IMAGES", path=str(tmp_path), split="b:b"))


def damage(file, kind):
    arrays = load_arrays(file)
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "another file":
        save_arrays(file, x=np.zeros(3))
    elif kind == "a later version":
        save_arrays(file, **{**arrays, "version": np.int64(99)})
    elif kind == "ends beyond the text":
        save_arrays(file, **{**arrays, "names_ends": arrays["names_ends"] + 1})
    elif kind == "states of fewer folders":
        save_arrays(file, **{**arrays, "states": arrays["states"][:-1]})
    elif kind == "objects":
        np.savez(file, **{**arrays, "names_text": np.array([{}])})


@pytest.mark.parametrize(
    "kind",
    ["cut", "empty", "another file", "a later version", "ends beyond the text"]
    + ["states of fewer folders", "objects"],
)
def test_a_damaged_index_is_made_again(tmp_path, kind, caplog, listings):
    make_tree(tmp_path, random.Random(0))
    known_listing(tmp_path)
    damage(tmp_path / INDEX, kind)
    assert list(known_listing(tmp_path).names) == walked(tmp_path)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert f"{tmp_path} is listed again: the index {tmp_path / INDEX} " in caplog.text
    assert len(listings) == 2
    known_listing(tmp_path)
    assert len(listings) == 2 and len(caplog.records) == 1


def test_an_index_of_another_folder_is_not_used(tmp_path, listings):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / f"{name}.png").touch()
    known_listing(tmp_path / "a")
    shutil.copy(tmp_path / "a" / INDEX, tmp_path / "b" / INDEX)
    assert list(known_listing(tmp_path / "b").names) == ["sub/b.png"]


def refuse_to_write(monkeypatch, *folders):
    """Let folders be as if they were read-only, also for the superuser."""

    def save(file, **arrays):
        if pathlib.Path(file).parent in folders:
            raise PermissionError(13, "Permission denied", str(file))
        save_arrays(file, **arrays)

    monkeypatch.setattr(index, "save_arrays", save)


def test_the_index_of_a_read_only_folder_is_in_the_cache(
    tmp_path, monkeypatch, every_folder_is_large, listings, caplog
):
    make_tree(tmp_path, random.Random(1))
    refuse_to_write(monkeypatch, tmp_path)
    expected = walked(tmp_path)
    for _ in range(2):
        assert list(known_listing(tmp_path).names) == expected
    assert len(listings) == 1 and not (tmp_path / INDEX).exists()
    (file,) = every_folder_is_large.iterdir()
    file.write_bytes(b"")
    refuse_to_write(monkeypatch, tmp_path, every_folder_is_large)
    assert list(known_listing(tmp_path).names) == expected
    assert "is listed at each start, since no index can be kept" in caplog.text


def test_an_index_may_be_made_by_several_processes_at_once(tmp_path):
    make_tree(tmp_path, random.Random(2))
    expected = walked(tmp_path)

    def names():
        for _ in range(5):
            (tmp_path / INDEX).unlink(missing_ok=True)
            found = list(known_listing(tmp_path).names)
            if found != expected:
                return found
        return expected

    assert together(2, names) == [expected, expected]
    assert list(index._load(tmp_path / INDEX).names) == expected
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(f".{INDEX}.")] == []


def test_small_folders_get_no_index(tmp_path, monkeypatch):
    assert listing.SMALL == 10_000
    monkeypatch.setattr(index, "SMALL", 3)
    for count in (1, 2, 3):
        (tmp_path / f"{count}.png").touch()
        known_listing(tmp_path)
        assert (tmp_path / INDEX).exists() == (count == 3)


def test_a_bar_is_shown_for_large_folders_only(tmp_path, monkeypatch):
    shown = []

    class Bar:
        n = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            shown.append(self.n)

        def update(self, count):
            self.n += count

    monkeypatch.setattr(listing, "progress_bar", lambda *_: Bar())
    monkeypatch.setattr(listing, "SMALL", 3)
    for folder in "ab":
        list_tree(tmp_path)
        (tmp_path / folder).mkdir()
        for k in range(3):
            (tmp_path / folder / f"{k}.png").touch()
    assert shown == []
    list_tree(tmp_path)
    assert shown == [6]


def test_folders_that_are_too_deep_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "_DEEPEST", 3)
    (tmp_path / "a/b/c").mkdir(parents=True)
    list_tree(tmp_path)
    (tmp_path / "a/b/c/d").mkdir()
    with pytest.raises(DataError, match="too deep"):
        list_tree(tmp_path)


def test_names_of_200_000_files_take_a_few_bytes_more_than_their_text():
    count = 200_000
    names = Names.of(f"class_{k % 1000:04d}/image_{k:08d}.png" for k in range(count))
    text = len("class_0000/image_00000000.png") * count
    assert names.nbytes == text + 2 * 8 * count < 10e6
    chosen = names.chosen(np.arange(0, count, 2))
    assert chosen.text is names.text and chosen[3] == names[6] and len(chosen) == count // 2
    assert names[-1] == "class_0999/image_00199999.png"


@pytest.mark.parametrize(
    "name, expected",
    [(".a/b.png", True), ("a/.b", True), ("__MACOSX/b", True), ("../b", True), ("a/__MACOSX", True)]
    + [("./a", False), ("a//b", False), ("/a.b", False), ("a/b.", False), ("a__MACOSX/b", False)],
)
def test_hidden_names(name, expected):
    assert hidden(name) == expected
