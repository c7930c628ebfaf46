# SPDX-License-Identifier: Apache-2.0
"""Predictions and features of many images, and what is made of features, against the model and scikit-learn called directly."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_helpers import run_here
from document_helpers import documented
from helpers import TINY, tiny_model, write_images
from litv2.__main__ import main
from litv2.errors import UserError
from litv2.explain.subjects import Classifier
from litv2.features import Features, read_features, write_features
from litv2.image_list import image_list
from litv2.preprocess import read_image
from litv2.probes import CS, accuracy, check_labelled, linear_probe, nearest, vote

COUNTS = {"a": 5, "b": 4, "c": 3}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """a/0.png to c/2.png, an image beside the folders, and two files that cannot be read."""
    folder = write_images(tmp_path_factory.mktemp("many") / "images", COUNTS)
    Image.new("L", (40, 60), 90).save(folder / "grey [1].png")
    (folder / "a/2.jpg").write_text("no image")
    (folder / "b/9.png").write_bytes((folder / "b/0.png").read_bytes()[:100])
    (folder / "notes.txt").write_text("no image either")
    return folder


@pytest.fixture(scope="module")
def checkpoint(images) -> Path:
    lit = dict(EMBED_DIM=32, DEPTHS=[1, 1, 2, 1], NUM_HEADS=[1, 2, 4, 8], LOCAL_WS=[0, 0, 2, 1], IN_CHANS=3)
    config = dict(MODEL=dict(LIT=lit), DATA=dict(IMG_SIZE=32), TEST=dict(CROP=True, IMG_SIZE=0))
    path = images.with_name("tiny.pth")
    torch.save(dict(model=tiny_model().state_dict(), class_names=[f"animal, {i}" for i in range(TINY["num_classes"])], config=config), path)
    return path


@pytest.fixture(scope="module")
def embedded(images, checkpoint) -> Path:
    out = images.with_name("features.npz")
    assert main(["embed", str(images), "--checkpoint", str(checkpoint), "--out", str(out), "--batch-size", "4"]) == 1
    return out


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def readable(images: Path) -> list[Path]:
    names = [f"{name}/{i}.png" for name, count in COUNTS.items() for i in range(count)]
    return [images / name for name in [*names, "grey [1].png"]]


def give_stdin(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# As documented


DOCUMENT = "docs/many-images.md"


@pytest.fixture
def files(images, checkpoint, embedded, tmp_path) -> dict[str, Path]:
    """The image beside the folders has no class, which knn and the probe would refuse."""
    written = {name: tmp_path / name for name in ("predictions.csv", "train.npz", "val.npz")}
    content = read_features(embedded)
    for name in ("train.npz", "val.npz"):
        write_features(written[name], replace(content, **{key: getattr(content, key)[:-1] for key in ("features", "images", "classes")}))
    return {"FILE": checkpoint, "DIR": images / "c", "IMAGE": images / "b/1.png", **written}


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m litv2 predict DIR .*"), ids=str)
def test_documented_predict(command, files, monkeypatch):
    run_here(monkeypatch, command, files=files)
    assert len(files["predictions.csv"].read_text().splitlines()) == 4


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m litv2 embed .*"), ids=str)
def test_documented_embed(command, files, monkeypatch):
    run_here(monkeypatch, command, files=files)
    assert read_features(files["train.npz"]).features.shape == (3, 256)


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m litv2 (knn|linear-probe) .*"), ids=str)
def test_documented_probes(command, files, monkeypatch, capsys):
    """With few images; on the training images themselves the nearest neighbour is right."""
    run_here(monkeypatch, command, *(["--k", "1"] if "knn" in command.line else ["--C", "1"]), files=files)
    assert "12 images, 95 % interval" in (printed := capsys.readouterr().out) and (": 100.00%" in printed or "knn" not in command.line)


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m litv2 nearest .*"), ids=str)
def test_documented_nearest(command, files, tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, command, "--out", tmp_path / "nearest.png", files=files)
    assert len(capsys.readouterr().out.splitlines()) == 9 and (tmp_path / "nearest.png").is_file()


# The list of images


def test_order_is_that_of_what_is_given(images, monkeypatch):
    everything = sorted([*readable(images), images / "a/2.jpg", images / "b/9.png"])
    assert image_list([images]) == everything
    assert image_list([images / "c", images / "a/1.png"]) == [*readable(images)[9:12], images / "a/1.png"]
    assert image_list([f"{images}/[bc]"]) == image_list([images / "b", images / "c"])
    assert image_list([f"{images}/**/[0-9].png"]) == [path for path in everything if path.parent != images and path.suffix == ".png"]
    assert image_list([f"{images}/**/*.png", f"{images}/c/*"])[-3:] == readable(images)[9:12]
    assert image_list([f"{images}/grey [1].png"]) == [images / "grey [1].png"]  # a name, though it looks like a pattern
    assert image_list([f"{images}/*"]) == everything  # but notes.txt
    give_stdin(monkeypatch, b"z.png\n\nwith space.png\r\n\xff.png\n")
    assert image_list(["-"]) == [Path("z.png"), Path("with space.png"), Path("\udcff.png")]


def test_a_folder_has_the_images_that_the_trainer_finds(tmp_path):
    """In links to folders, too, and no folder whose name ends as an image's does."""
    extensions = pytest.importorskip("torchvision.datasets.folder").IMG_EXTENSIONS
    write_images(tmp_path / "elsewhere", {"a": 2})
    (tmp_path / "data/b.png").mkdir(parents=True)
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere/a", target_is_directory=True)
    for suffix in extensions:
        (tmp_path / f"data/b.png/x{suffix}").touch()
    names = [*(f"b.png/x{suffix}" for suffix in sorted(extensions)), "link/0.png", "link/1.png"]
    assert image_list([tmp_path / "data"]) == [tmp_path / "data" / name for name in names]


def test_what_cannot_be_a_list_of_images(images, checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    give_stdin(monkeypatch, b"\n")
    for given, message in (
        (["empty"], "empty: no images (.bmp"),
        ([f"{images}/*.tif"], "*.tif: no image matches"),
        ([images, "nowhere"], "nowhere: there is no such image or folder"),
        (["-"], "-: expected the paths of images"),
        ([images, "--batch-size", "0"], "--batch-size 0: expected at least 1"),
        ([images, "--workers", "-1"], "--workers -1: expected at least 0"),
        ([images, "--top", "0"], "--top 0: expected at least 1"),
        ([images, "--csv", "nowhere/p.csv"], "the folder nowhere of nowhere/p.csv does not exist"),
        ([images, "--json", "empty"], "empty is a folder"),
        ([images, "--csv", "p", "--json", "p"], "--csv and --json are both p; expected two files"),
    ):
        assert message in fails(capsys, "predict", *given, "--checkpoint", checkpoint, "--out", "drawn")
    assert "must end in .npz or .parquet" in fails(capsys, "embed", images, "--checkpoint", checkpoint, "--out", "f.npy")
    assert "expected a folder" in fails(capsys, "embed", images / "a/0.png", "--checkpoint", checkpoint, "--out", "f.npz")


# Predictions


@pytest.fixture(scope="module")
def shares(images, checkpoint) -> dict[Path, torch.Tensor]:
    """Of each image alone, by the model itself."""
    classifier = Classifier(checkpoint)
    with torch.inference_mode():
        return {path: classifier.model(classifier.transform(read_image(path))[None])[0].softmax(0) for path in readable(images)}


@pytest.mark.parametrize(
    "flags", ["--batch-size 1 --workers 0", "--batch-size 3 --workers 2 --top 3", "--batch-size 99 --top 99", "--fast --batch-size 4"]
)
def test_tables_hold_what_single_images_give(flags, images, checkpoint, shares, capsys):
    """In the order of the paths, unreadable files left out and named at the end."""
    assert main(["predict", str(images), "--checkpoint", str(checkpoint), "--csv", "p.csv", "--json", "p.json", *flags.split()]) == 1
    out, err = capsys.readouterr()
    err = re.sub(r"note: --fast: the form (native|fused) is .* times as fast .*\n", "", err) if "--fast" in flags else err
    assert out.splitlines() == ["13 images -> p.csv", "13 images -> p.json"] and not Path("predictions").exists()
    *errors, summary = err.splitlines()
    assert [line.partition(" cannot be")[0] for line in errors] == [f"error: {images}/{name}" for name in ("a/2.jpg", "b/9.png")]
    assert summary == "2 of 15 images cannot be read and are left out"
    with open("p.csv", newline="") as file:
        heading, *rows = csv.reader(file)
    top = {"3": 3, "99": 10}.get(flags.partition("--top ")[2], 5)
    assert heading == ["image", *(f"{what}{i + 1}" for i in range(top) for what in ("class", "share"))]
    assert [row[0] for row in rows] == [str(path) for path in readable(images)]
    lines = [json.loads(line) for line in Path("p.json").read_text().splitlines()]
    for (path, expected), row, line in zip(shares.items(), rows, lines, strict=True):
        assert row[1::2] == [f"animal, {i}" for i in expected.argsort(descending=True)[:top].tolist()]
        assert [float(share) for share in row[2::2]] == pytest.approx(expected.sort(descending=True)[0][:top].tolist(), abs=1e-5)
        written = [cell for found in line["classes"] for cell in (found["class"], f"{found['share']:.6f}")]
        assert (line["image"], written) == (str(path), row[1:])


def test_the_list_on_standard_input(images, checkpoint, monkeypatch, capsys):
    """A path that is not there is left out, the same one twice is two rows, and pictures are drawn where --out says."""
    given = [images / "c/0.png", Path("nowhere.png"), images / "c/0.png"]
    give_stdin(monkeypatch, "\n".join(map(str, given)).encode())
    assert main(["predict", "-", "--checkpoint", str(checkpoint), "--csv", "p.csv", "--out", "drawn"]) == 1
    assert [line.split(",")[0] for line in Path("p.csv").read_text().splitlines()] == ["image", str(given[0]), str(given[2])]
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["0-2.png", "0.png"]
    assert "nowhere.png cannot be read as an image: No such file" in capsys.readouterr().err


def test_a_failure_leaves_the_old_table(images, checkpoint, monkeypatch, capsys):
    """A worker that dies, as for lack of memory, is named; the table is not half written."""
    Path("p.csv").write_text("precious")
    monkeypatch.setattr("litv2.image_batches.read_image", lambda path: os._exit(1))
    line = fails(capsys, "predict", images, "--checkpoint", checkpoint, "--csv", "p.csv", "--workers", "1", "--batch-size", "2")
    assert "data-loading worker" in line and [path.name for path in Path().iterdir()] == ["p.csv"]
    assert Path("p.csv").read_text() == "precious"


def test_lack_of_memory_is_no_damaged_image(images, monkeypatch):
    monkeypatch.setattr("litv2.preprocess.decode", lambda file, mode: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        read_image(images / "a/0.png")


def test_grey_images_are_prepared_once(images):
    """A model of one channel sees in a batch what it sees of a single image."""
    config = dict(DATA=dict(IMG_SIZE=32))
    torch.save(dict(model=tiny_model(in_chans=1).state_dict(), config=config), "grey.pth")
    classifier, picture = Classifier("grey.pth"), read_image(images / "a/0.png")
    tensor = classifier.transform(picture)
    assert tensor.shape == (1, 32, 32) and torch.equal(classifier.view(picture).tensor[0], tensor)
    pixels = np.asarray(picture, float) @ (0.299, 0.587, 0.114)  # ITU-R 601
    assert abs(tensor.mean().item() - (pixels.mean() / 255 - 0.449) / 0.226) < 0.1


# Features


def test_embed(images, checkpoint, embedded):
    """The values are the input of the head; a class is the first folder below FOLDER."""
    content, classifier = read_features(embedded), Classifier(checkpoint)
    assert content.images.tolist() == [str(path) for path in readable(images)]
    assert content.classes.tolist() == ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + [""]
    seen: list[torch.Tensor] = []
    classifier.model.head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        for path in readable(images):
            classifier.model(classifier.transform(read_image(path))[None])
    assert content.features.dtype == np.float32
    np.testing.assert_allclose(content.features, torch.stack(seen).numpy(), rtol=1e-4, atol=1e-4)  # summed in another order


@pytest.mark.extra
def test_embed_into_parquet(images, checkpoint, embedded):
    table = pytest.importorskip("pyarrow.parquet")
    assert main(["embed", str(images), "--checkpoint", str(checkpoint), "--out", "f.parquet", "--batch-size", "4"]) == 1
    read, content = table.read_table("f.parquet"), read_features(embedded)
    assert read["image"].to_pylist() == content.images.tolist() and read["class"].to_pylist() == content.classes.tolist()
    assert np.array_equal(np.array(read["features"].to_pylist(), np.float32), content.features)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_names_that_are_no_text(tmp_path, checkpoint, capsys):
    """They, and control characters, come out escaped where text is expected."""
    pytest.importorskip("pyarrow.parquet")
    (tmp_path / "x/a").mkdir(parents=True)
    for name in (b"\xff.png", b"\x1b[31m.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / "x/a" / os.fsdecode(name))
    assert main(["embed", "x", "--checkpoint", str(checkpoint), "--out", "f.parquet"]) == 0
    read = pytest.importorskip("pyarrow.parquet").read_table("f.parquet")["image"].to_pylist()
    assert read == ["x/a/\\x1b[31m.png", "x/a/\\udcff.png"]


def test_nearest(images, checkpoint, embedded, capsys):
    """Against products of all pairs; the picture has the images in that order."""
    content, path = read_features(embedded), images / "b/1.png"
    assert main(["nearest", str(embedded), str(path), "--checkpoint", str(checkpoint), "--top", "4"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    units = [row / np.linalg.norm(row) for row in content.features.astype(np.float64)]
    query = units[readable(images).index(path)]
    expected = sorted(((float(unit @ query), name) for unit, name in zip(units, content.images)), reverse=True)[:4]
    assert [line.split("  ", 1)[1] for line in lines] == [name for _, name in expected] and lines[0] == f"1.0000  {path}"
    assert [float(line.split()[0]) for line in lines] == pytest.approx([similarity for similarity, _ in expected], abs=1e-4)
    strip = Image.open("nearest.png")
    assert last == "-> nearest.png" and strip.size == (6 + 5 * 186, 212)
    for i, name in enumerate([path, *(name for _, name in expected)]):
        middle = np.asarray(strip.crop((6 + 186 * i, 6, 186 + 186 * i, 186)), float).mean(axis=(0, 1))
        assert np.abs(middle - np.asarray(Image.open(name).convert("RGB"), float).mean(axis=(0, 1))).max() < 2


def test_nearest_wants_the_same_model(images, checkpoint, embedded, capsys):
    arguments = ["nearest", embedded, images / "a/0.png", "--checkpoint"]
    assert "another checkpoint or image size" in fails(capsys, *arguments, checkpoint, "--img-size", "64")
    torch.save(torch.load(checkpoint) | dict(model=tiny_model(local_ws=(0, 0, 1, 1), qkv_bias=False).state_dict()), "other.pth")
    assert "another checkpoint" in fails(capsys, *arguments, "other.pth")
    assert "--top 14: expected 1 to 13" in fails(capsys, *arguments, checkpoint, "--top", "14")


def clouds(seed: int, each: int, names: str = "abc", model: str = "m") -> Features:
    """Overlapping clouds of points, one per class."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(len(names), 12)) / 2
    points = np.concatenate([centre + random.normal(size=(each, 12)) for centre in centres]).astype(np.float32)
    return Features(points, np.arange(len(points)).astype(str), np.repeat(list(names), each), model)


def stated(right: int, of: int) -> str:
    """Wilson's interval, by its formula."""
    z, share = 1.959964, right / of
    middle, half = share + z**2 / (2 * of), z * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    low, high = ((middle + sign * half) / (1 + z**2 / of) for sign in (-1, 1))
    return f"{share:.2%} right, {right} of {of} images, 95 % interval {low:.2%} to {high:.2%}"


def test_knn_is_a_vote(tmp_path, capsys):
    train, val = clouds(1, 20), clouds(2, 15)
    write_features(tmp_path / "train.npz", train)
    write_features(tmp_path / "val.npz", val)
    assert main(["knn", "train.npz", "val.npz", "--k", "1", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    units = [content.features / np.linalg.norm(content.features, axis=1, keepdims=True) for content in (train, val)]
    for k, line in zip((1, 8), lines, strict=True):
        right = 0
        for unit, true in zip(units[1], val.classes):
            votes = train.classes[np.argsort(-(units[0] @ unit))[:k]].tolist()
            right += max(sorted(set(votes)), key=votes.count) == true  # of equally many, the first by name
        assert 20 < right < 45 and line == f"k = {k}: {stated(right, 45)}"


def test_linear_probe_is_scikit_learns(tmp_path, capsys):
    """Its parts, called one by one."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    train, val = clouds(1, 20), clouds(2, 15)
    write_features(tmp_path / "train.npz", train)
    write_features(tmp_path / "val.npz", val)

    def right(C: float, fit: np.ndarray, features: np.ndarray, classes: np.ndarray) -> int:
        mean, deviation = train.features[fit].mean(axis=0), train.features[fit].std(axis=0)
        model = LogisticRegression(C=C, max_iter=2000).fit((train.features[fit] - mean) / deviation, train.classes[fit])
        return int((model.predict((features - mean) / deviation) == classes).sum())

    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(train.features, train.classes))
    within = [sum(right(C, fit, train.features[held], train.classes[held]) for fit, held in folds) for C in CS]
    best, everything = CS[int(np.argmax(within))], np.arange(60)
    for flags, C, how in ((["--C", "0.003"], 0.003, ""), ([], best, " by cross-validation")):
        assert main(["linear-probe", "train.npz", "val.npz", *flags]) == 0
        expected = stated(right(C, everything, val.features, val.classes), 45)
        assert capsys.readouterr().out == f"C = {C:g}{how}: {expected}\n"
    assert len(set(within)) > 2 and best not in (CS[0], CS[-1])


def test_what_probes_say(capsys):
    train, val = clouds(1, 4), clouds(1, 2, "abcd")
    assert check_labelled(train, val) == ["2 images are of classes without training images, and count as wrong: d"]
    assert accuracy(vote(clouds(1, 2, "abcd"), val, 1), val).startswith("100.00% right, 8 of 8")
    assert "6 of 8 images" in accuracy(np.where(val.classes == "d", "a", val.classes), val)
    for call, message in (
        (lambda: check_labelled(train, clouds(1, 2, model="other")), "different models"),
        (lambda: check_labelled(replace(train, classes=np.array([""] * 12)), val), "12 of the 12 training images have no class"),
        (lambda: vote(train, val, 13), "--k 13: expected 1 to 12"),
        (lambda: vote(train, val, 0), "--k 0: expected 1 to 12"),
        (lambda: linear_probe(train, val), "the class a has 4 training images, but cross-validation needs 5"),
        (lambda: linear_probe(train, val, 0.0), "--C 0.0: expected a positive number"),
        (lambda: linear_probe(clouds(1, 9, "a"), val), "all of the class a"),
        (lambda: nearest(train, val.features[0], 0), "--top 0: expected 1 to 12"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_damaged_features(tmp_path, capsys):
    """One line each; a pickle is not read, and what is compressed could be of any size."""
    good = tmp_path / "good.npz"
    content = clouds(1, 2)
    write_features(good, content)
    bad = tmp_path / "bad.npz"
    whole, written = good.read_bytes(), vars(content)
    spoiled = content.features.copy()
    spoiled[1, 2] = np.nan
    objects = np.array([{}] * 6, dtype=object)
    for write, message in (
        (lambda: bad.write_bytes(whole[:300]), "File is not a zip file"),
        (lambda: bad.write_bytes(whole.replace(content.features.tobytes()[8:16], b"damaged.")), "Bad CRC-32"),
        (lambda: bad.write_text("text"), "File is not a zip file"),
        (lambda: np.savez_compressed(bad, **written), "it is compressed"),
        (lambda: np.savez(bad, **{**written, "classes": objects}), "Object arrays cannot be loaded"),
        (lambda: np.savez(bad, features=content.features), "images is not a file"),
        (lambda: np.savez(bad, **{**written, "features": spoiled}), "the features of 1 images are infinite"),
        (lambda: np.savez(bad, **{**written, "features": content.features[0]}), "float32 of shape .images, channels., got float32"),
        (lambda: np.savez(bad, **{**written, "features": content.features.astype(float)}), "got float64 of shape .6, 12."),
        (lambda: np.savez(bad, **{**written, "images": content.images[:2]}), "expected 6 texts as images, got"),
    ):
        write()
        with pytest.raises(UserError, match=message) as error:
            read_features(bad)
        assert str(error.value).startswith(f"{bad}") and "\n" not in str(error.value)
    assert "nowhere.npz" in fails(capsys, "knn", "nowhere.npz", good)
