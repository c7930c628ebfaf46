# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation, against a loop over the views of one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from config import ConfigError, load_config
from data import build_loaders
from data.loader import with_transform
from data.sampler import EvalSampler
from engine import evaluate, logits_of
from helpers import ROOT, generator, tiny_model
from litv2.errors import UserError
from litv2.runs.unreadable import BadFiles
from network import build_model
from precision import Precision
from report import Predictions
from views import MeanPrediction, Views, count_views

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images of different shapes."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for number in range(7):
            place = root / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = generator(number).integers(0, 255, (50 + 9 * (number % 3), 45 + 7 * (number % 4), 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((60 + number, 50)).save(place / f"{number}.png")
    return root


def loaded(folder, *opts):
    fixed = ["DATA.DATASET", "folder", "DATA.DATA_PATH", str(folder), "DATA.IMG_SIZE", 32, "DATA.BATCH_SIZE", 3, "DATA.NUM_WORKERS", 0]
    config = load_config(ROOT / "classification/configs/litv2-small.yaml", [*fixed, "EVAL_MODE", True, *opts])
    return config, build_loaders(config)


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_classes=3, patch_size=2).eval()


def predictions(model, loader, predict) -> dict[str, torch.Tensor]:
    """Name of each image -> its probabilities."""
    seen = Predictions()
    extra = dict(expected=None, bad_files=BadFiles(0, print), log=print, keep=seen)
    evaluate(model, loader, Precision(torch.device("cpu")), predict=predict, **extra)
    return dict(zip(seen.names, torch.cat(seen.logits).double().softmax(dim=1)))


def slow(model, path, crops: int, flip: bool, scales: list[float]) -> torch.Tensor:
    """The mean probabilities for the image at this path, by Pillow and one view at a time."""
    image, total, count = Image.open(path), torch.zeros(3, dtype=torch.float64), 0
    for scale in scales:
        side = round(32 * scale)
        short = int(side * 256 / 224)
        width, height = (int(short * length / min(image.size)) for length in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        corners = [(0, 0), (width - side, 0), (0, height - side), (width - side, height - side)]
        for x, y in [*(corners if crops == 5 else []), (round((width - side) / 2), round((height - side) / 2))]:
            crop = resized.crop((x, y, x + side, y + side))
            for view in (crop, ImageOps.mirror(crop)) if flip else (crop,):
                pixels = torch.from_numpy((np.asarray(view) / 255 - MEAN) / STD).float().permute(2, 0, 1)
                with torch.inference_mode():
                    total += model(pixels[None])[0].double().softmax(dim=0)
                count += 1
    return total / count


@pytest.mark.parametrize("crops, flip, scales", [(1, True, [1.0]), (5, True, [1.0]), (5, False, [1.25, 1.0]), (1, False, [1.5])])
def test_the_mean_over_all_views(crops, flip, scales, folder, model):
    config, loaders = loaded(folder, "TEST.VIEWS.CROPS", crops, "TEST.VIEWS.FLIP", flip, "TEST.VIEWS.SCALES", scales)
    assert count_views(config) == crops * (1 + flip) * len(scales)
    found = predictions(model, with_transform(loaders.val, Views(config)), MeanPrediction(flip))
    assert len(found) == 7
    plain = predictions(model, loaders.val, logits_of)
    for name, probabilities in found.items():
        torch.testing.assert_close(probabilities, slow(model, name, crops, flip, scales), rtol=0, atol=2e-5)
        assert (probabilities - plain[name]).abs().max() > 1e-3  # the views matter


def test_one_view_is_the_plain_evaluation(folder, model):
    config, loaders = loaded(folder)
    assert count_views(config) == 1
    plain, one = (
        predictions(model, loader, predict)
        for loader, predict in ((loaders.val, logits_of), (with_transform(loaders.val, Views(config)), MeanPrediction(False)))
    )
    for name, probabilities in plain.items():
        torch.testing.assert_close(one[name], probabilities, rtol=0, atol=1e-6)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_shares_of_several_processes(processes, folder, model, monkeypatch):
    """Each process sees the images of its own share, and all of them together what one process sees."""
    config, loaders = loaded(folder, "TEST.VIEWS.CROPS", 5, "TEST.VIEWS.FLIP", True)
    alone = predictions(model, with_transform(loaders.val, Views(config)), MeanPrediction(True))
    together = {}
    for rank in range(processes):
        monkeypatch.setattr("distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("distributed.world_size", lambda: processes)
        share = build_loaders(config).val
        monkeypatch.undo()
        assert isinstance(share.sampler, EvalSampler)
        found = predictions(model, with_transform(share, Views(config)), MeanPrediction(True))
        assert not found.keys() & together.keys()
        together |= found
    assert together.keys() == alone.keys()
    for name, probabilities in alone.items():
        torch.testing.assert_close(together[name], probabilities, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "opts, words",
    [
        ("TEST.VIEWS.CROPS 3", "TEST.VIEWS.CROPS must be one of 1, 5, got 3"),
        ("TEST.VIEWS.SCALES [1.0,0.0]", "must be different factors above 0"),
        ("TEST.VIEWS.SCALES []", "must be different factors above 0"),
        ("TEST.VIEWS.CROPS 5 TEST.CROP False", "needs TEST.CROP=True"),
        ("TEST.VIEWS.FLIP True EVAL_MODE False", "are for --eval"),
        ("TEST.VIEWS.FLIP True TEST.CORRUPTIONS fog", "use one of the two"),
        ("TEST.CORRUPTIONS fog TEST.IMG_SIZE 16", "needs images of at least 32 pixels, got 16"),
    ],
)
def test_views_that_make_no_sense(opts, words):
    with pytest.raises(ConfigError, match=words):
        load_config(ROOT / "classification/configs/litv2-small.yaml", ["EVAL_MODE", True, *opts.split()])


def test_views_that_are_too_small_for_the_model():
    config = load_config(ROOT / "classification/configs/litv2-small.yaml", ["EVAL_MODE", True, "TEST.VIEWS.SCALES", [1.0, 0.1]])
    with pytest.raises(UserError, match="TEST.VIEWS.SCALES=22 is too small for this model"):
        build_model(config, 2)
