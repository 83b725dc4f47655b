"""IMAGENET: labels are in the order of WordNet ids, in every layout that it is distributed in."""

import json
import shutil

import numpy as np
import pytest
import torch
from dataset_helpers import everything, make_config, random_images, save_image
from scipy.io import savemat

import datasets
from datasets import DataError

# In the order of their ids; the development kit numbers them otherwise.
WNIDS = ("n01440764", "n02012849", "n03126707")
WORDS = ("tench, Tinca tinca", "crane", "crane")
NUMBERS = (2, 3, 1)
IMAGES = random_images(18, 8, 8, 3)
PIXELS = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
# Labels of the images of val/, in the order of their names.
TRUTH = (2, 0, 1, 1, 0, 2)


def save(root, name, number):
    """An image that keeps its pixels under the name of a JPEG, as one of ImageNet does."""
    path = save_image(root, f"{name}.png", IMAGES[number])
    (root / f"{name}.png").rename(path.removesuffix("png") + "JPEG")


def make(root, layout, base=""):
    """Twelve images to train on and six of val/."""
    for number in range(12):
        wnid = WNIDS[number // 4]
        save(root, f"{base}train/{wnid}/{wnid}_{number}", number)
    for number, label in enumerate(TRUTH, start=1):
        folder = f"{WNIDS[label]}/" if layout == "folders" else ""
        save(root, f"{base}val/{folder}ILSVRC2012_val_{number:08d}", 11 + number)
    if layout == "csv":
        lines = [f"ILSVRC2012_val_{k:08d},{WNIDS[v]} 1 2 3 4" for k, v in enumerate(TRUTH, 1)]
        text = "\n".join(["ImageId,PredictionString", *reversed(lines)])
        (root / "LOC_val_solution.csv").write_text(text + "\n")
    if layout == "devkit":
        make_devkit(root / "ILSVRC2012_devkit_t12" / "data")
    return root


def make_devkit(folder):
    folder.mkdir(parents=True)
    lines = "".join(f"{NUMBERS[label]}\n" for label in TRUTH)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    # One more is no class but a group of them, as there.
    rows = [(n, w, 0) for n, w in zip(NUMBERS, WNIDS, strict=True)] + [(1001, "n00001740", 3)]
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})


def opened(root, **options):
    config = make_config("IMAGENET", path=str(root), **options)
    return datasets.get_streams(config, evaluation=True)[2]


@pytest.mark.parametrize(
    "layout, base",
    [
        ("folders", ""),
        ("devkit", ""),
        ("csv", ""),
        ("csv", "ILSVRC/Data/CLS-LOC/"),
        ("folders", "Data/CLS-LOC/"),
    ],
)
def test_every_layout_gives_the_same_images_and_labels(tmp_path, layout, base):
    info = opened(make(tmp_path, layout, base))
    images, labels = everything(info.sources["train"])
    order = sorted(range(12), key=lambda n: f"{WNIDS[n // 4]}_{n}")
    assert torch.equal(images, PIXELS[order]) and labels.tolist() == [n // 4 for n in order]
    images, labels = everything(info.sources["test"])
    # Folders of classes come in their own order.
    order = sorted(range(6), key=lambda n: (TRUTH[n], n) if layout == "folders" else n)
    assert torch.equal(images, PIXELS[12:][order])
    assert labels.tolist() == [TRUTH[n] for n in order]
    assert info.class_to_idx == {wnid: k for k, wnid in enumerate(WNIDS)} and info.num_classes == 3


def write_names(root, kind, wnids=WNIDS):
    words = dict(zip(WNIDS, WORDS, strict=True))
    if kind == "imagenet_class_index.json":
        record = {k: [wnid, words[wnid].split(",")[0]] for k, wnid in enumerate(wnids)}
        (root / kind).write_text(json.dumps(record))
    else:
        (root / kind).write_text("".join(f"{wnid} {words[wnid]}\n" for wnid in wnids))


@pytest.mark.parametrize(
    "kind", ["imagenet_class_index.json", "synset_words.txt", "LOC_synset_mapping.txt"]
)
def test_readable_names_of_classes_are_unique_and_agree_with_the_order(tmp_path, kind):
    make(tmp_path, "folders")
    write_names(tmp_path, kind)
    expected = {"tench": 0, "crane (n02012849)": 1, "crane (n03126707)": 2}
    assert opened(tmp_path).class_to_idx == expected
    write_names(tmp_path, kind, WNIDS[::-1])
    with pytest.raises(DataError, match=f"{kind} lists n03126707 out of order"):
        opened(tmp_path)
    write_names(tmp_path, kind, WNIDS[1:])
    with pytest.raises(DataError, match=f"{kind} does not list the class n01440764"):
        opened(tmp_path)
    (tmp_path / kind).write_text('{"1": 2}')
    with pytest.raises(DataError, match=kind):
        opened(tmp_path)


def test_the_split(tmp_path):
    make(tmp_path, "none")  # nothing says the classes of val/
    tenths = opened(tmp_path, split="tenths")
    assert tenths.num_examples == {"train": 11, "test": 1}
    assert everything(tenths.sources["test"])[1].tolist() == [2]
    with pytest.raises(DataError, match=r"no file says their classes: put .*, or set .*=tenths"):
        opened(tmp_path)
    with pytest.raises(DataError, match=r"data.split: there is no image in test of"):
        opened(tmp_path, split="train:test")
    with pytest.raises(DataError, match=r"data.split='last' should name the part to train on"):
        opened(tmp_path, split="last")
    (tmp_path / "val").rename(tmp_path / "other")
    assert opened(tmp_path).num_examples == tenths.num_examples
    (tmp_path / "other").rename(tmp_path / "val")
    make(tmp_path, "csv")
    assert opened(tmp_path, split="train:train").num_examples == {"train": 12, "test": 12}


def test_validation_images_of_classes_without_training_images_are_left_out(tmp_path, caplog):
    make(tmp_path, "csv")
    shutil.rmtree(tmp_path / "train" / WNIDS[1])
    test = opened(tmp_path).sources["test"]
    assert everything(test)[1].tolist() == [1, 0, 0, 1]
    assert torch.equal(everything(test)[0], PIXELS[12:][[0, 1, 4, 5]])
    assert "2 left out because they are of classes without a training image" in caplog.text


@pytest.mark.parametrize("kind", ["link", "garbage"])
def test_images_that_cannot_be_read_are_left_out_on_demand(tmp_path, kind):
    make(tmp_path, "folders")
    file = tmp_path / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    file.unlink()
    file.symlink_to("nowhere") if kind == "link" else file.write_bytes(b"none")
    with pytest.raises(DataError, match=rf"{file.name} in .* is (a broken link|not a readable)"):
        opened(tmp_path)
    assert opened(tmp_path, on_error="skip").num_examples == {"train": 11, "test": 6}


def damaged(root, case):
    """A layout with one fault."""
    if case == "cat":
        save(root, "train/cat/1", 0)
    elif case == "empty":
        (root / "train" / "n00000001").mkdir()
    elif case == "packed":
        (root / "train" / "n00000001.tar").touch()
    elif case == "linked":
        (root / "train" / "n00000001").symlink_to(root / "train" / WNIDS[0])
    elif case == "above":
        return root / "train"
    elif case == "class":
        save(root, "val/n99999999/1", 0)
    elif case == "stem":
        save(root, "val/ILSVRC2012_val_00000007", 0)
    elif case == "link":
        (root / "train").rename(root.parent / "elsewhere")
        (root / "train").symlink_to(root.parent / "elsewhere")
    elif case == "csv":
        (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nx,y\n")
    elif case == "mat":
        (root / "LOC_val_solution.csv").unlink()
        make_devkit(root / "data")
        (root / "data" / "meta.mat").write_bytes(b"none")
    elif case == "number":
        (root / "LOC_val_solution.csv").unlink()
        make_devkit(root / "data")
        (root / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n7\n")
    return root


@pytest.mark.parametrize(
    "case, message",
    [
        ("empty", "train/n00000001 in .* holds no image, .* complete or remove it"),
        ("packed", "train/n00000001.tar in .* holds no image"),
        ("linked", "train/n00000001 in .* holds no image"),
        ("cat", "images in train/cat of .* WordNet ids, as in train/n01440764: .*IMAGES"),
        ("above", "no image in train/ of .*train, .* set it to the folder above, that of train/"),
        ("class", "val/n99999999 of .*, which is none of the 3 classes"),
        ("stem", "LOC_val_solution.csv says no class for val/ILSVRC2012_val_00000007.JPEG"),
        ("link", "train in .* is a link to a folder, .*: set data.path to a folder"),
        ("csv", "line 2 of .*LOC_val_solution.csv says no image and class"),
        ("mat", "meta.mat is missing or damaged"),
        ("number", "line 2 of .*ground_truth.txt is '7', no class of meta.mat"),
    ],
)
def test_faults_are_refused_in_one_sentence(tmp_path, case, message):
    root = tmp_path / "imagenet"
    with pytest.raises(DataError, match=message):
        opened(damaged(make(root, "csv"), case))
