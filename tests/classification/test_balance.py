# SPDX-License-Identifier: Apache-2.0
"""Classes of unequal size: their weights in the loss, and drawing them equally often."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy

from balance import WeightedCrossEntropy, build_weighted_loss, class_weights
from config import load_config
from data.loader import build_loaders
from data.sampler import BalancedSampler
from data.sources import DataError
from helpers import ROOT, normal, run_ranks, write_images
from litv2.errors import UserError

NAMES, COUNTS = ["ant", "bee", "cow"], [1000, 100, 10]
DIGITS = ROOT / "classification/configs/litv2-digits.yaml"


@pytest.mark.parametrize("weighting, beta", [("inverse", 0.0), ("effective", 0.0), ("effective", 0.99), ("auto", 0.0)])
def test_weights(weighting, beta):
    """Against the formulas of the paper, by the ratios of classes; the mean over the images is 1."""
    weights = class_weights(weighting, beta, NAMES, COUNTS).double()
    assert sum(w * n for w, n in zip(weights.tolist(), COUNTS)) == pytest.approx(sum(COUNTS))
    beta = 1 - 3 / 1110 if weighting == "auto" else beta
    effective = [n if weighting == "inverse" else (1 - beta**n) / (1 - beta) for n in COUNTS]
    for i in range(3):
        assert weights[i] / weights[0] == pytest.approx(effective[0] / effective[i], rel=1e-5)


def test_a_class_without_images_has_no_part_in_it():
    for weighting in ("inverse", "effective", "auto"):
        weights = class_weights(weighting, 0.9, [*NAMES, "dog"], [*COUNTS, 0])
        torch.testing.assert_close(weights[:3], class_weights(weighting, 0.9, NAMES, COUNTS))
        assert weights.isfinite().all()


def test_weights_of_a_file(tmp_path):
    """Columns and rows in any order, as a spreadsheet writes them."""
    path = tmp_path / "weights.csv"
    path.write_text("\ufeffweight,class,why\r\n4,cow,rare\r\n1,ant,\r\n2,bee,\r\n", encoding="utf-8")
    weights = class_weights(str(path), 0.0, NAMES, [2, 1, 1])
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 4.0]) / 2)


@pytest.mark.parametrize(
    "text, words",
    [
        ("class,share\nant,1\n", "has no column weight; it needs class and weight, got class, share"),
        ("", "has no column class and weight"),
        ("class,weight\nant,1\ncow,1\n", "does not know the classes: bee"),
        ("class,weight\nant,1\nbee,1\ncow,1\ndog,1\n", "has classes that the training data has not: dog"),
        ("class,weight\nant,1\nbee,1\ncow,1\nbee,2\n", "has more than one row for: bee"),
        ("class,weight\nant,1\nbee,0\ncow,1\n", "the weight of bee must be a positive number, got '0'"),
        ("class,weight\nant,1\nbee,many\ncow,1\n", "the weight of bee must be a positive number, got 'many'"),
        ("class,weight\nant,1\nbee\ncow,inf\n", "the weight of bee must be a positive number, got None"),
        (b"class,weight\n\xff\xfe", "is not a CSV file in UTF-8"),
        (None, "is neither none, inverse, effective, auto nor a file"),
    ],
)
def test_bad_files(text, words, tmp_path):
    path = tmp_path / "weights.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        class_weights(str(path), 0.0, NAMES, COUNTS)


def test_streams_have_no_counts():
    with pytest.raises(UserError, match="TRAIN.CLASS_WEIGHTS=inverse needs the number of images of each class"):
        class_weights("inverse", 0.0, NAMES, None)
    with pytest.raises(DataError, match="DATA.SAMPLING=balanced needs the class of each image; wds/ orders its images itself"):
        build_loaders(load_config(DIGITS, ["DATA.DATASET", "wds/", "DATA.SAMPLING", "balanced"]))


LOGITS, LABELS = normal(0, 6, 3), torch.tensor([0, 2, 1, 0, 2, 2])
WEIGHTS = torch.tensor([0.3, 1.1, 4.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [1.0, 0.7])
def test_weighted_loss(smoothing, share):
    """Against one image after the other, and one label of a mixed image after the other."""
    expected = 0.0
    for logits, first, second in zip(LOGITS, LABELS, LABELS.flip(0)):
        for label, part in ((first, share), (second, 1 - share)):
            expected += part * WEIGHTS[label] * F.cross_entropy(logits, label, label_smoothing=smoothing) / len(LOGITS)
    loss = WeightedCrossEntropy(WEIGHTS, smoothing)
    torch.testing.assert_close(loss(LOGITS, mixup_target(LABELS, 3, share, smoothing)), expected)
    if share == 1:
        torch.testing.assert_close(loss(LOGITS, LABELS), expected)


def test_weighted_loss_against_others():
    plain = F.cross_entropy(LOGITS, LABELS, weight=WEIGHTS, reduction="sum") / len(LABELS)
    torch.testing.assert_close(WeightedCrossEntropy(WEIGHTS)(LOGITS, LABELS), plain)
    torch.testing.assert_close(WeightedCrossEntropy(torch.ones(3), 0.1)(LOGITS, LABELS), LabelSmoothingCrossEntropy(0.1)(LOGITS, LABELS))


def test_loss_of_a_configuration():
    lines = []
    loaders = SimpleNamespace(class_names=NAMES, class_counts=COUNTS)
    loss = build_weighted_loss(load_config(DIGITS, ["TRAIN.CLASS_WEIGHTS", "inverse"]), loaders, lines.append)
    assert loss.smoothing == 0.1 and lines == ["class weights (inverse): from 0.37 (ant) to 37 (cow)"]


def test_counts_of_a_data_set():
    loaders = build_loaders(load_config(DIGITS))
    source = loaders.train.dataset.source
    assert loaders.class_counts == [sum(target == number for _, target in source.samples) for number in range(10)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_balanced_sampler(world):
    """The processes' parts of the very drawing that one process makes; classes and the images of a class come equally often."""
    targets = [0] * 40 + [2] * 12 + [1] * 8
    samplers = [BalancedSampler(targets, 4, rank, world, seed=3) for rank in range(world)]
    epochs = []
    for epoch in range(2):
        shares = []
        for sampler in samplers:
            sampler.epoch = epoch
            shares.append(list(sampler))
        assert {len(share) for share in shares} == {60 // world // 4 * 4}
        drawn = [pair for pairs in zip(*shares) for pair in pairs]
        classes = Counter(targets[index] for index, _ in drawn)
        images = Counter(index for index, _ in drawn)
        assert max(classes.values()) - min(classes.values()) <= 1
        for number in range(3):
            counts = [images[i] for i, target in enumerate(targets) if target == number]
            assert max(counts) - min(counts) <= 1
        assert len({seed for _, seed in drawn}) == len(drawn), "a repeated image is augmented anew"
        whole = BalancedSampler(targets, 60, 0, 1, seed=3)
        whole.epoch = epoch
        assert drawn == list(whole)[: len(drawn)]
        turns = [tuple(targets[index] for index, _ in drawn[first : first + 3]) for first in range(0, len(drawn) - 2, 3)]
        assert {tuple(sorted(turn)) for turn in turns} == {(0, 1, 2)} and len(set(turns)) > 1, "the classes come in random order"
        own = [index for index, _ in drawn if targets[index] == 1]
        assert sorted(own[:8]) == sorted(own[8:16]) == list(range(52, 60)) and own[:8] != own[8:16] != sorted(own[8:16])
        epochs.append(drawn)
    assert epochs[0] != epochs[1]
    samplers[0].skip = 8
    assert list(samplers[0]) == epochs[1][::world][8:] and len(samplers[0]) == len(epochs[1]) // world - 8


def test_balanced_loader_with_workers(tmp_path):
    write_images(tmp_path / "train", {"ant": 9, "bee": 3})
    write_images(tmp_path / "val", {"ant": 1, "bee": 1})
    batches = []
    for workers in (0, 2):
        options = dict(DATASET="folder", DATA_PATH=str(tmp_path), BATCH_SIZE=4, SAMPLING="balanced", NUM_WORKERS=workers)
        loaders = build_loaders(load_config(DIGITS, [word for key, value in options.items() for word in (f"DATA.{key}", value)]))
        batches.append([(batch.names, batch.targets, batch.images) for batch in loaders.train])
    for (names, targets, images), (others, _, same) in zip(*batches, strict=True):
        assert names == others and torch.equal(images, same) and sorted(targets.tolist()) == [0, 0, 1, 1]


@pytest.mark.extra
def test_two_processes():
    """Weights with accumulated steps, and DDP made anew when a part is unfrozen: the gradients of one process with the whole batch."""
    run_ranks("""
import distributed
from balance import WeightedCrossEntropy
from torch import nn
torch.manual_seed(0)
images, labels = torch.randn(8, 5), torch.tensor([0, 2, 1, 0, 2, 2, 1, 1])
loss = WeightedCrossEntropy(torch.tensor([0.3, 1.1, 4.0]), 0.1)
model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
rank = distributed.rank()
model[0].requires_grad_(False)
runner = distributed.parallel(model, torch.device("cpu"))
for trained in (2, 4, 2):
    for parameter in model[0].parameters():
        parameter.requires_grad_(trained == 4)
    runner = distributed.parallel(distributed.unwrap(runner), torch.device("cpu"))
    for step in range(2):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(parameters) == trained
        expected = torch.autograd.grad(loss(model(images), labels), parameters)
        with distributed.without_sync(runner):
            (loss(runner(images[rank::4]), labels[rank::4]) / 2).backward()
        (loss(runner(images[rank + 2 :: 4]), labels[rank + 2 :: 4]) / 2).backward()
        for parameter, gradient in zip(parameters, expected):
            torch.testing.assert_close(parameter.grad, gradient)
        model.zero_grad(set_to_none=True)
""")
