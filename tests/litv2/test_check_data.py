# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 check-data: what is planted is found, and nothing in data where nothing is wrong."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_helpers import run_here, substituted
from config import load_config
from data.sources import open_sources
from document_helpers import documented
from helpers import ROOT, shared, tiny_model, write_images
from litv2.__main__ import main
from litv2.data_check import duplicates
from litv2.data_check.duplicates import find_groups, near_pairs
from litv2.data_check.labels import NEIGHBOURS, suspicious_labels, votes
from litv2.data_check.listing import find_images

pytest.importorskip("imagehash")

COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}
LEAK, SEVERAL, WITHIN = "The same picture in both splits", "The same picture under several classes", "Duplicates within a class"


def photograph(seed: int, colour: tuple[int, int, int]) -> Image.Image:
    """Shapes of all sizes, the larger the stronger, as photographs have them, around a colour."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((80, 96, 3)) + colour
    for side in (3, 6, 12, 24, 48):
        octave = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((96, 80), Image.Resampling.BICUBIC)
        pixels += (np.asarray(octave) - 128.0) * 1.5 / side
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clean")
    for split, count in (("train", 12), ("val", 5)):
        for number, (name, colour) in enumerate(COLOURS.items()):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                photograph(1000 * len(split) + 100 * number + i, colour).save(root / split / name / f"{i}.jpg", quality=95)
    return root


def check(folder: Path, *flags) -> tuple[int, dict]:
    """The exit status and the findings."""
    out = folder.parent / f"{folder.name}.json"
    status = main(["check-data", str(folder), "--workers", "0", "--json", str(out), *map(str, flags)])
    return status, json.loads(out.read_text())


def test_clean_data(clean, capsys):
    status, found = check(clean)
    assert status == 0 and not any(found["found"].values())
    assert found["classes"] == {"train": dict.fromkeys(COLOURS, 12), "val": dict.fromkeys(COLOURS, 5)}
    assert found["sizes"]["width"] == [96, 96, 96] and found["modes"] == {"RGB": 51}
    assert "train           36 images of 3 classes, largest to smallest 12 : 12 = 1.0\n" in capsys.readouterr().out


@pytest.fixture
def copy(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "data"))


def test_what_is_planted_is_found(copy, tmp_path):
    train, val = copy / "train", copy / "val"
    shutil.copy(train / "red/0.jpg", train / "red/copy.jpg")
    Image.open(train / "red/1.jpg").save(train / "red/other-file.png")  # the same pixels in other bytes
    Image.open(train / "red/2.jpg").resize((60, 50)).save(train / "red/small.jpg", quality=40)
    Image.open(train / "green/3.jpg").resize((200, 160)).save(val / "green/large.webp", quality=60)
    shutil.copy(train / "blue/4.jpg", train / "green/moved.jpg")
    content = (train / "blue/5.jpg").read_bytes()
    (train / "blue/cut.jpg").write_bytes(content[: len(content) // 2])
    (train / "blue/empty.png").touch()
    (train / "blue/notes.txt").touch()
    for grey in (10, 12, 250):  # flat pictures are alike to a perceptual hash
        Image.new("L", (50, 50), grey).save(train / f"blue/flat{grey}.png")
    (train / "none").mkdir()
    status, found = check(copy, "--out", tmp_path / "page")
    assert status == 1
    duplicates = {(group["topic"], group["exact"]): [] for group in found["duplicates"]}
    for group in found["duplicates"]:
        duplicates[group["topic"], group["exact"]].append(set(group["images"]))
    assert duplicates == {
        (WITHIN, True): [{"train/red/0.jpg", "train/red/copy.jpg"}, {"train/red/1.jpg", "train/red/other-file.png"}],
        (WITHIN, False): [{"train/red/2.jpg", "train/red/small.jpg"}],
        (LEAK, False): [{"train/green/3.jpg", "val/green/large.webp"}],
        (SEVERAL, True): [{"train/blue/4.jpg", "train/green/moved.jpg"}],
    }
    assert {entry["image"] for entry in found["unreadable"]} == {"train/blue/cut.jpg", "train/blue/empty.png"}
    assert "truncated" in found["unreadable"][0]["reason"]
    assert found["problems of classes"] == ["classes without images in train: none", "classes of train that are missing in val: none"]
    assert found["ignored files"] == {".txt": 1} and found["modes"]["L"] == 3
    page = (tmp_path / "page/index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 10 and "cut.jpg: image file is truncated" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)|https?://""", page)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_folder_without_splits(copy, workers):
    status, found = check(copy / "train", "--workers", workers)
    assert status == 0 and found["classes"] == {"all": dict.fromkeys(COLOURS, 12)}


def test_the_listing_is_the_trainers(copy):
    (copy / "train/red/more/deep").mkdir(parents=True)
    for name in ("train/red/more/deep/a.PNG", "train/red/more/b.tiff", "train/red/c.gif", "val/red/.hidden.jpg"):
        shutil.copy(copy / "train/red/0.jpg", copy / name)
    config = load_config(ROOT / "classification/configs/litv2-digits.yaml", ["DATA.DATASET", "folder", "DATA.DATA_PATH", str(copy)])
    entries = find_images(copy).entries
    for split, source in zip(("train", "val"), open_sources(config)):
        trained = [(name, source.class_names[target]) for name, target in source.samples]
        assert [(str(entry.path), entry.label) for entry in entries if entry.split == split] == trained


def slow_pairs(hashes: np.ndarray, distance: int) -> set[tuple[int, int]]:
    bits = np.unpackbits(hashes, axis=1)
    return {(i, j) for i in range(len(bits)) for j in range(i + 1, len(bits)) if (bits[i] != bits[j]).sum() <= distance}


@pytest.mark.parametrize("at_once", [5, 1 << 22])
@pytest.mark.parametrize("distance", [0, 15, 16, 30, 47])
def test_near_pairs_are_all_pairs_that_are_near(distance, at_once, monkeypatch):
    monkeypatch.setattr(duplicates, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    bits = rng.random((60, 256)) < 0.5
    copies = bits ^ (rng.random(bits.shape) < rng.uniform(0, 0.2, (60, 1)))
    hashes = np.packbits(np.concatenate([bits, copies]), axis=1)
    found = {pair for i, j in near_pairs(hashes, distance) for pair in zip(i.tolist(), j.tolist())}
    assert found == slow_pairs(hashes, distance) and (len(found) > 5 or distance == 0)


def test_likeness_is_passed_on():
    """Of a chain of copies, each near the next, one group; equal pixels join what has no hash."""
    bits = np.zeros((4, 256), dtype=bool)
    bits[1, :20] = bits[2, :40] = bits[3, 100:200] = True
    hashes = [*np.packbits(bits, axis=1), None, None, None]
    chain, equal = sorted(find_groups(list("abcdeef"), hashes), key=lambda group: group.members)
    assert (chain.members, chain.bits, chain.exact) == ([0, 1, 2], [0, 20, 40], False)
    assert (equal.members, equal.exact) == ([4, 5], True)
    assert find_groups([], []) == []


def clusters(images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(images) % classes
    return rng.normal(0, 1, (classes, 16))[labels] + rng.normal(0, 0.3, (images, 16)), labels


@pytest.mark.parametrize("images", [60, 4], ids=["many", "fewer than neighbours"])
def test_votes_are_those_of_the_nearest(images):
    features, labels = clusters(images, 4)
    shares = votes(features, labels)
    for i in range(images):
        cosines = [features[i] @ other / np.linalg.norm(features[i]) / np.linalg.norm(other) for other in features]
        nearest = sorted((j for j in range(images) if j != i), key=lambda j: -cosines[j])[:NEIGHBOURS]
        assert shares[i] == pytest.approx([np.mean([labels[j] == c for j in nearest]) for c in range(4)])


@pytest.mark.parametrize("classes", [4, 2])
def test_wrong_labels_are_found(classes):
    pytest.importorskip("cleanlab")
    features, labels = clusters(200, classes)
    names = [f"class {label}" for label in labels]
    assert suspicious_labels(features, names) == []
    for i in (3, 50, 101):
        names[i] = f"class {(labels[i] + 1) % classes}"
    found = suspicious_labels(features, names)
    assert {suspicion.image: suspicion.suggested for suspicion in found} == {i: f"class {labels[i]}" for i in (3, 50, 101)}
    assert suspicious_labels(features[:3], ["a", "a", "a"]) == []


def test_a_wrong_label_is_found_with_a_checkpoint(copy):
    """Even random weights tell colours apart."""
    pytest.importorskip("cleanlab")
    lit = dict(EMBED_DIM=32, DEPTHS=[1, 1, 2, 1], NUM_HEADS=[1, 2, 4, 8], LOCAL_WS=[0, 0, 2, 1], IN_CHANS=3)
    config = dict(MODEL=dict(LIT=lit), DATA=dict(IMG_SIZE=64), TEST=dict(CROP=True, IMG_SIZE=0))
    torch.save({"model": tiny_model().state_dict(), "config": config}, copy.parent / "mine.pth")
    shutil.move(copy / "train/red/7.jpg", copy / "train/green/wrong.jpg")
    (copy / "train/blue/empty.png").touch()  # shifts the images that follow
    (command,) = documented("docs/data.md", r"python -m litv2 check-data DIR --checkpoint FILE")
    assert main([*substituted(command, dict(DIR=copy, FILE=copy.parent / "mine.pth"))[3:], "--json", str(copy.parent / "found.json")]) == 1
    first = json.loads((copy.parent / "found.json").read_text())["suspicious labels"][0]
    assert (first["image"], first["label"], first["suggested"]) == ("train/green/wrong.jpg", "green", "red")


def test_damaged_exif_is_no_damage(tmp_path):
    """The trainer does not read it."""
    write_images(tmp_path / "images", {"a": 2}, size=40)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, data in (("turned", exif.tobytes()), ("damaged", b"Exif\0\0no TIFF header")):
        photograph(1, (40, 60, 200)).rotate(90 * len(name)).save(tmp_path / f"images/a/{name}.png", exif=data)
    status, found = check(tmp_path / "images")
    assert found["unreadable"] == [] and status == 0, found


@pytest.mark.parametrize(
    ("folder", "flags", "words"),
    [
        ("nowhere", "", "nowhere does not exist"),
        ("file", "", "file is no folder"),
        ("empty", "", "contains no class folders"),
        ("only_val", "", "there is no folder .*only_val/train"),
        ("no_images", "", "contains no images"),
        ("no_images", "--train-split training", "there is no folder .*no_images/training"),
        ("no_images", "--train-split a --val-split a", "are both a"),
        ("no_images", "--distance 48", "0 to 47 bits, got 48"),
        ("no_images", "--workers -1", "0 or more, got -1"),
        ("no_images", "--json nowhere/found.json", "the folder nowhere of nowhere/found.json does not exist"),
        ("images", "--checkpoint mine.pth --img-size 0", "an image size of 0 pixels is too small"),
        ("images", "--checkpoint mine.pth --device foo", "--device foo: "),
    ],
)
def test_one_line_for_what_cannot_be_checked(folder, flags, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for name in ("empty", "only_val/val/a", "no_images/a"):
        (tmp_path / name).mkdir(parents=True)
    write_images(tmp_path / "images", {"a": 1})
    monkeypatch.chdir(tmp_path)
    lit = dict(EMBED_DIM=32, DEPTHS=[1, 1, 2, 1], NUM_HEADS=[1, 2, 4, 8], LOCAL_WS=[0, 0, 2, 1])
    torch.save(dict(model=tiny_model().state_dict(), config=dict(MODEL=dict(LIT=lit), DATA=dict(IMG_SIZE=32))), "mine.pth")
    assert main(["check-data", str(tmp_path / folder), *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{words}", line)


@pytest.mark.parametrize("command", documented("docs/data.md", r"python -m litv2 check-data DIR --out checked"), ids=str)
def test_documented(command, clean, tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, command, "--workers", 0, "--out", tmp_path / "page", files=dict(DIR=clean))
    assert "Duplicates within a class: 0\n" in capsys.readouterr().out and (tmp_path / "page/index.html").is_file()


@pytest.mark.parametrize("package", ["torchvision.datasets.folder", "imagehash"])
def test_a_missing_package_is_named(package, clean, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["check-data", str(clean)]) == 2
    assert re.search(rf"{package}.*pip install 'litv2\[check\]'", capsys.readouterr().err)


@pytest.mark.extra
def test_nothing_false_in_photographs(tmp_path):
    """1500 of ImageNet, which contain no copies."""
    folder = shared("data/imagenette_mini")
    assert main(["check-data", str(folder), "--json", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["classes"]["train"]
