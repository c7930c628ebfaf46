# SPDX-License-Identifier: Apache-2.0
"""Frozen stages, stopping early, and the head of other classes; killed and resumed with all of it."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

import engine
from config import load_config
from freezing import Freezing
from heads import keep_shared_classes, names_in
from helpers import FAST, ROOT, normal, run_ranks, same, tiny_model, write_images
from litv2.errors import UserError, run_program
from litv2.weights.reading import read_checkpoint
from main import main

DIGITS = str(ROOT / "classification/configs/litv2-digits.yaml")
STAGES = ["patch_embed.", "layers.0.", "layers.1.", "layers.2.", "layers.3."]


def trainer(*flags, opts: str = "") -> int:
    """The exit status of the program, run in this process."""
    return run_program(lambda: main(["--cfg", DIGITS, *map(str, flags), "--opts", *FAST, "DATA.DATASET", "folder", *opts.split()]))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", {"ant": 13, "bee": 4, "cow": 7}, size=32)
    write_images(root / "val", {"ant": 2, "bee": 2, "cow": 2}, size=32)
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint of FAST's model that knows two of the three classes and another."""
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    model = tiny_model(num_classes=3, embed_dim=16, depths=(1, 1, 1, 1), patch_size=2)
    torch.save(dict(model=model.state_dict(), class_names=["cow", "dog", "ant"]), path)
    return path


def freezing(freeze: str, every: int = 0):
    model = tiny_model(drop_rate=0.5, drop_path_rate=0.5)
    options = ["TRAIN.FREEZE", freeze, "TRAIN.UNFREEZE_EVERY", every, "MODEL.PRETRAINED", "FILE"]
    return model, Freezing(load_config(DIGITS, options if freeze != "0" else []), model)


@pytest.mark.parametrize("freeze, epoch, every, frozen", [
    ("0", 0, 0, []), ("1", 9, 0, STAGES[:2]), ("4", 0, 0, STAGES), ("head", 9, 0, [*STAGES, "norm."]),
    ("2", 2, 3, STAGES[:3]), ("2", 3, 3, STAGES[:2]), ("2", 6, 3, []), ("2", 60, 3, []),
    ("head", 2, 3, [*STAGES, "norm."]), ("head", 3, 3, STAGES[:4]), ("head", 12, 3, []),
])  # fmt: skip
def test_what_is_frozen(freeze, epoch, every, frozen):
    model, parts = freezing(freeze, every)
    parts.apply(0)
    parts.apply(epoch)
    assert parts.apply(epoch) is False
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(frozen)), name


def test_frozen_parts_are_in_evaluation_mode():
    """Batch norm keeps its statistics, and nothing is dropped: two passes give the same features."""
    model, parts = freezing("head")
    parts.apply(0)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    parts.set_modes()
    same(*(model.forward_features(normal(1, 2, 3, 64, 64)) for _ in range(2)))
    assert model.head_drop.training and model.training
    same(dict(model.named_buffers()), before)
    model.train()
    assert not torch.equal(*(model.forward_features(normal(1, 2, 3, 64, 64)) for _ in range(2)))


class Killed(BaseException):
    """As kill -9, it leaves no time to save anything."""


@pytest.mark.parametrize("balance", ["DATA.SAMPLING balanced", pytest.param("TRAIN.CLASS_WEIGHTS auto", marks=pytest.mark.extra)])
def test_resume_is_bit_for_bit(balance, images, pretrained, tmp_path, monkeypatch, capsys):
    """Killed before and after a stage joins the training; everything random is on, the head is of other classes, and evaluations draw
    random numbers, as packages do when they are imported."""
    flags = ("--data-path", images, "--batch-size", 4, "--pretrained", pretrained, "--freeze", "head", "--ema-decay", 0.9)
    opts = f"{balance} TRAIN.UNFREEZE_EVERY 1 TRAIN.EPOCHS 3 TRAIN.PATIENCE 3 SAVE_STEPS 2 AUG.MIXUP 0.8 AUG.REPROB 0.3 MODEL.DROP_RATE 0.1"
    assert trainer(*flags, "--workers", 1, "--output", tmp_path / "whole", opts=opts) == 0
    log = capsys.readouterr().out
    assert "2 of 3 classes keep their rows of the head; new: bee" in log
    assert "frozen: all but the head" in log and "frozen: the first 2 stages" in log
    call, calls = engine.Step.__call__, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) in (4, 12):
            raise Killed
        return call(self, *args)

    def drawing(*args, **kwargs):
        random.random(), np.random.rand(), torch.rand(1)
        return evaluate(*args, **kwargs)

    evaluate = engine.evaluate
    monkeypatch.setattr(engine, "evaluate", drawing)
    monkeypatch.setattr(engine.Step, "__call__", dying)
    for _ in range(2):
        with pytest.raises(Killed):
            trainer(*flags, "--workers", 0, "--output", tmp_path / "killed", opts=opts)
    stopped = read_checkpoint(tmp_path / "killed/litv2_digits/default/latest.pth")["progress"]
    assert (stopped["epoch"], stopped["step"]) == (1, 2)
    assert trainer(*flags, "--workers", 0, "--output", tmp_path / "killed", opts=opts) == 0
    expected, resumed = (read_checkpoint(tmp_path / name / "litv2_digits/default/latest.pth") for name in ("whole", "killed"))
    assert expected["progress"]["updates"] == 18
    for key in expected.keys() - {"config"}:
        same(expected[key], resumed[key], key)


@pytest.mark.extra
def test_two_processes():
    """That each accumulate two batches take the steps of one process and one batch, with a loss of several classes per image, while parts
    of the network join the training; DDP finds a gradient for each parameter that is trained, and for no other."""
    run_ranks("""
sys.path.insert(0, "tests")
from config import load_config
from data.dataset import Batch
from engine import Progress, Step
from freezing import Freezing
from helpers import max_difference, normal, tiny_model
from precision import Precision
from tasks import build_loss
options = "DATA.DATASET csv MODEL.TASK multi MODEL.PRETRAINED FILE TRAIN.FREEZE head TRAIN.UNFREEZE_EVERY 1"
config = load_config("classification/configs/litv2-digits.yaml", options.split())
images, targets = normal(1, 8, 3, 32, 32), normal(2, 8, 10).sigmoid()

class Constant:
    def step_update(self, update): ...

def run(parts, parallel):
    model = tiny_model(alpha=0.5).eval()  # batch norm would see each batch by itself
    freezing, precision = Freezing(config, model), Precision(torch.device("cpu"))
    freezing.apply(0)
    step = Step(distributed.parallel(model, precision.device) if parallel else model, torch.optim.SGD(model.parameters(), lr=0.1),
                Constant(), build_loss(config, False, True), precision)
    counts = []
    for epoch in range(6):
        if freezing.apply(epoch) and parallel:
            step.model = distributed.parallel(distributed.unwrap(step.model), precision.device)
        seen = set()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hooks = [p.register_hook(lambda gradient, name=name: seen.add(name)) for name, p in trained.items()]
        step([Batch(images[part].clone(), targets[part], ["x"] * len(targets[part]), []) for part in parts], Progress())
        for hook in hooks:
            hook.remove()
        assert seen == trained.keys()
        counts.append(len(seen))
    return model, counts

rank = distributed.rank()
ours, counts = run([slice(4 * rank, 4 * rank + 2), slice(4 * rank + 2, 4 * rank + 4)], True)
expected, same_counts = run([slice(0, 8)], False)
assert counts == same_counts == sorted(set(counts)) + counts[-1:] and counts[0] == 2, counts
for (name, value), wanted in zip(ours.named_parameters(), expected.parameters()):
    assert max_difference(value, wanted) < 1e-5, name
assert max_difference(expected.patch_embed.proj.weight, tiny_model(alpha=0.5).patch_embed.proj.weight) > 1e-5
""")


def test_frozen_weights_stay(images, pretrained, tmp_path, capsys):
    """To the bit, with weight decay and a moving average, and they are in no group of the optimizer. Another FREEZE cannot resume."""
    flags = ("--data-path", images, "--batch-size", 8, "--workers", 0, "--ema-decay", 0.9, "--output", tmp_path)
    assert trainer(*flags, "--pretrained", pretrained, "--freeze", 2, opts="TRAIN.WEIGHT_DECAY 0.5 TRAIN.EPOCHS 1") == 0
    before = read_checkpoint(pretrained)["model"]
    state = read_checkpoint(tmp_path / "litv2_digits/default/latest.pth")
    for entry in ("model", "ema"):
        for name, value in before.items():
            if not name.startswith("head."):
                assert torch.equal(state[entry][name], value) == name.startswith(tuple(STAGES[:3])), name
    trained = [name for name, _ in tiny_model(depths=(1, 1, 1, 1)).named_parameters() if not name.startswith(tuple(STAGES[:3]))]
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == len(trained)
    assert trainer(*flags, "--pretrained", pretrained, "--freeze", 1, opts="TRAIN.EPOCHS 2") == 2
    assert "trained with TRAIN.FREEZE=2 and cannot be resumed with 1" in capsys.readouterr().err


def test_early_stopping(images, tmp_path, monkeypatch, capsys):
    """The run ends as a finished one does; running it again changes nothing, and with more patience it goes on."""
    evaluate, top1 = engine.evaluate, [50.0, 60.0, 60.0, 10.0, 20.0]
    monkeypatch.setattr(engine, "evaluate", lambda *args, **kwargs: {**evaluate(*args, **kwargs), "top1": top1.pop(0)})
    flags = ("--data-path", images, "--batch-size", 8, "--workers", 0, "--output", tmp_path)
    words = "stopped after epoch {} of 20: none of the last {} evaluations was better than that of epoch 2"
    folder = tmp_path / "litv2_digits/default"
    latest = []
    for _ in range(2):
        assert trainer(*flags, opts="TRAIN.EPOCHS 20 TRAIN.PATIENCE 2") == 0
        assert words.format(4, 2) in capsys.readouterr().out
        latest.append((folder / "latest.pth").read_bytes())
    assert latest[0] == latest[1] and (folder / "curves.png").is_file()
    assert json.loads((folder / "report/summary.json").read_text())["images"] == 6
    assert trainer(*flags, opts="TRAIN.EPOCHS 20 TRAIN.PATIENCE 3") == 0
    assert words.format(5, 3) in capsys.readouterr().out and not top1


def test_rows_of_shared_classes():
    model = tiny_model(num_classes=3)
    old = {name: value.clone() for name, value in tiny_model(num_classes=3).state_dict().items()}
    old["head.weight"] += 1

    def kept(theirs, ours):
        weights = dict(old)
        line = keep_shared_classes(weights, theirs, model, ours)
        return line, weights

    line, weights = kept(["c", "b", "a"], ["a", "b", "c"])  # as many, in another order
    assert line == "3 of 3 classes keep their rows of the head"
    same([weights["head.weight"], weights["head.bias"]], [old["head.weight"].flip(0), old["head.bias"].flip(0)])
    line, weights = kept(["c", "b", "a"], ["d", "c", "e"])
    assert line == "1 of 3 classes keep their rows of the head; new: d, e"
    same(weights["head.weight"][1], old["head.weight"][0])
    same(weights["head.bias"][[0, 2]], model.head.bias[[0, 2]])
    for theirs in (None, ["a", "b", "c"]):
        line, weights = kept(theirs, ["a", "b", "c"])
        assert line is None
        same(weights, old)
    with pytest.raises(UserError, match="has 2 class names, but its head has 3 outputs"):
        kept(["a", "b"], ["a", "b", "d"])


def test_class_names_of_a_checkpoint():
    assert names_in({}) is names_in(dict(class_names=[])) is None and names_in(dict(class_names=("a", "b"))) == ["a", "b"]
    for names in ("ab", [1, 2], 5):
        with pytest.raises(UserError, match="class_names are no list of names"):
            names_in(dict(class_names=names))
