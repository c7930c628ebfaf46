# SPDX-License-Identifier: Apache-2.0
"""The corruptions of ImageNet-C, and the errors under them: published figures, formulas and loops over one image at a time."""

from __future__ import annotations

import builtins
import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from config import load_config
from data import build_loaders
from data.corruption import KINDS, Corruption, corruption_kinds
from helpers import ROOT, generator, run_trainer, tiny_model, write_images
from litv2.classes import imagenet_classes
from litv2.errors import MissingPackage, UserError
from litv2.preprocess import evaluation_transform
from precision import Precision
from robustness import ALEXNET, Robustness, measure_robustness

# Top-1 and corruption error (relative to AlexNet's), in percent, as others publish them for torchvision's ResNet-50.
RESNET50 = {
    "brightness": (68.02, 56.64), "contrast": (39.06, 71.43), "defocus_blur": (38.75, 74.71), "elastic_transform": (45.25, 84.75),
    "fog": (45.83, 66.11), "frost": (38.14, 74.84), "gaussian_noise": (29.29, 79.77), "glass_blur": (26.79, 88.61),
    "impulse_noise": (23.81, 82.58),
}  # fmt: skip


def picture(side: int = 64, mode: str = "RGB") -> Image.Image:
    smooth = generator(1).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(smooth).resize((side, side), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "glass_blur"] + [pytest.param("glass_blur", marks=pytest.mark.extra)])
def test_a_corruption_depends_on_its_arguments_alone(kind, mode):
    """Glass blur is ``extra``: numba takes 10 seconds for it."""
    image, state = picture(mode=mode), np.random.get_state()[1].copy()
    made = np.asarray(Corruption(kind, 3, seed=5)(image))
    Corruption(kind, 4, seed=5)(picture(40, mode))
    np.testing.assert_array_equal(made, np.asarray(Corruption(kind, 3, seed=5)(image)))
    assert made.shape == np.asarray(image).shape and not np.array_equal(made, np.asarray(image))
    assert not np.array_equal(made, np.asarray(Corruption(kind, 4, seed=5)(image)))
    if kind not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"):  # these draw no numbers
        assert not np.array_equal(made, np.asarray(Corruption(kind, 3, seed=6)(image)))
    np.testing.assert_array_equal(state, np.random.get_state()[1])


@pytest.mark.parametrize("severity", range(1, 6))
def test_published_parameters(severity):
    """Those of the paper's code, by other means than the package's."""
    grey = Image.new("RGB", (128, 128), (128, 128, 128))
    if severity < 4:  # the stronger ones are clipped
        noise = np.asarray(Corruption("gaussian_noise", severity, 0)(grey)).astype(float) / 255
        assert noise.std() == pytest.approx((0.08, 0.12, 0.18)[severity - 1], rel=0.03)
    changed = (np.asarray(Corruption("impulse_noise", severity, 0)(grey)) != 128).mean()
    assert changed == pytest.approx((0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1], rel=0.05)
    pixels = np.asarray(picture()).astype(float)
    contrast = (pixels - pixels.mean((0, 1))) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] + pixels.mean((0, 1))
    assert np.abs(np.asarray(Corruption("contrast", severity, 0)(picture())) - contrast).max() <= 1
    file = io.BytesIO()
    picture().save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(Corruption("jpeg_compression", severity, 0)(picture())))


def test_names_of_kinds(monkeypatch):
    assert corruption_kinds("") == [] and corruption_kinds("all") == list(KINDS) and len(KINDS) == 15
    assert corruption_kinds("fog, frost") == ["fog", "frost"]
    with pytest.raises(UserError, match="'forg' is none of the kinds fog, or all"):
        corruption_kinds("forg")
    with pytest.raises(UserError, match="a kind twice"):
        corruption_kinds("fog,fog")
    with pytest.raises(UserError, match="SEVERITIES must be some of 1 to 5"):
        load_config(ROOT / "classification/configs/litv2-small.yaml", ["TEST.SEVERITIES", [0, 1]])
    real = builtins.__import__

    def without(name, *rest):
        if name == "imagecorruptions":
            raise ImportError("No module named 'imagecorruptions'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackage, match=r"pip install 'litv2\[robustness\]'"):
        corruption_kinds("all")


def measured(top1: dict[str, float], imagenet: bool = True) -> Robustness:
    """The same accuracy at all severities."""
    return Robustness(80.0, {(kind, severity): (50_000, value) for kind, value in top1.items() for severity in range(1, 6)}, imagenet)


def test_means():
    accuracies = {kind: 100 - error for kind, error in ALEXNET.items()}
    assert measured(accuracies).mce() == pytest.approx(100)
    assert measured({kind: 100.0 - 10 * (kind == "fog") for kind in KINDS}).mce() == pytest.approx(100 * 10 / 81.9324 / 15)
    assert measured(accuracies).mean_error() == pytest.approx(sum(ALEXNET.values()) / 15)
    for kind, (top1, relative) in RESNET50.items():
        assert 100 * measured({kind: top1}).errors()[kind] / ALEXNET[kind] == pytest.approx(relative, abs=0.02)
    results = {("fog", severity): (100, 100.0 - severity) for severity in range(1, 6)}
    assert Robustness(99.0, results, True).errors() == {"fog": 3.0}
    # Not of some kinds, and not of other classes.
    assert measured({"fog": 50.0}).mce() is None and measured(accuracies, imagenet=False).mce() is None


def test_rows_have_wilson_intervals():
    """Of 81 hits of 263 images, of which E. B. Wilson's interval is 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    header, row = Robustness(50.0, {("fog", 2): (263, 100 * 81 / 263)}, False).table()
    assert header == ["kind", "severity", "images", "top1", "low", "high"]
    assert row[:4] == ["fog", 2, 263, "30.798"]
    assert [float(value) for value in row[4:]] == pytest.approx([25.53, 36.62], abs=0.005)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", {"a": 8, "b": 8}, size=36)
    write_images(root / "val", {"a": 6, "b": 5}, size=36)
    return root


def test_errors_are_those_of_a_loop(images):
    opts = f"DATA.DATASET folder DATA.DATA_PATH {images} DATA.IMG_SIZE 32 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 EVAL_MODE True".split()
    opts += "TEST.CORRUPTIONS gaussian_noise,contrast TEST.SEVERITIES [5,2] SEED 3".split()
    config, lines = load_config(ROOT / "classification/configs/litv2-small.yaml", opts), []
    model, loaders = tiny_model(num_classes=2, patch_size=2).eval(), build_loaders(config)
    arguments = dict(clean=100.0, seconds=1.0, log=lines.append)
    found = measure_robustness(model, loaders, Precision(torch.device("cpu")), config, **arguments)
    resize, crop, to_tensor, normalise = evaluation_transform(32).transforms
    for kind in ("gaussian_noise", "contrast"):
        for severity in (2, 5):
            right = []
            for path, target in loaders.val.dataset.source.samples:
                corrupted = Corruption(kind, severity, 3)(crop(resize(Image.open(path))))
                with torch.inference_mode():
                    right.append(model(normalise(to_tensor(corrupted))[None]).argmax().item() == target)
            assert found.results[kind, severity] == (11, pytest.approx(100 * np.mean(right)))
    assert list(found.results) == [(kind, severity) for kind in ("gaussian_noise", "contrast") for severity in (2, 5)]
    assert lines[0].startswith("corruptions: 2 kinds x 2 severities, at least 0.1 min") and "of AlexNet's" not in lines[-1]
    assert not found.imagenet and list(imagenet_classes())[0] == "n01440764"


@pytest.mark.extra
def test_any_number_of_processes(images, tmp_path):
    """The report's table, picture and summary."""
    flags = ["--data-path", images, "--batch-size", 4, "--workers", 0]
    torch.save(dict(model=weights()), tmp_path / "a.pth")
    flags += ["--eval", "--resume", tmp_path / "a.pth", "--corruptions", "shot_noise,snow"]
    tables = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        run_trainer(*flags, "--output", out, opts="DATA.DATASET folder TEST.SEVERITIES [1,5]", processes=processes)
        report = out / "litv2_digits/default/report"
        tables.append((report / "corruptions.csv").read_text())
        assert Image.open(report / "corruptions.png").width == 1200
        assert "Accuracy on corrupted images" in (report / "report.html").read_text()
    assert tables[0] == tables[1]
    rows = list(csv.DictReader(io.StringIO(tables[0])))
    assert [(row["kind"], row["severity"], row["images"]) for row in rows] == [
        (kind, severity, "11") for kind in ("shot_noise", "snow") for severity in "15"
    ]
    summary = json.loads((report / "summary.json").read_text())["corruptions"]
    assert summary["mean_error"] == pytest.approx(np.mean([100 - float(row["top1"]) for row in rows]), abs=1e-3)
    assert summary["mce"] is None and summary["severities"] == [1, 5] and list(summary["errors"]) == ["shot_noise", "snow"]


def weights() -> dict:
    """Of the model that ``run_trainer`` builds."""
    return tiny_model(num_classes=2, patch_size=2, embed_dim=16, depths=(1, 1, 1, 1)).state_dict()
