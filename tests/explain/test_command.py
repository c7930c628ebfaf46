# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 explain, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import TINY, tiny_model
from litv2.__main__ import main
from litv2.explain import attention, offsets, spectrum
from litv2.explain.loading import load_subject


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """With tiny.pth, and three images of which one is in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    config = dict(MODEL=dict(LIT=dict(NUM_HEADS=list(TINY["num_heads"]))), DATA=dict(IMG_SIZE=64))
    torch.save(dict(model=tiny_model().state_dict(), config=config, class_names=[f"animal {i}" for i in range(10)]), "tiny.pth")
    (tmp_path / "more").mkdir()
    noise = np.random.default_rng(0)
    for name, size in (("a.png", (90, 70)), ("b.png", (64, 80)), ("more/a.png", (64, 64))):
        Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def explain(*arguments: object) -> int:
    return main(["explain", *map(str, arguments), "--checkpoint", "tiny.pth"])


def test_pictures_and_arrays_are_those_of_the_functions(folder, capsys):
    assert explain("a.png", "more", "--what", "attention", "offsets", "--at", 40.5, 30.5, "--out", "x") == 0
    assert sorted(path.name for path in Path("x").iterdir()) == [
        "a-2-attention.png", "a-2-offsets.png", "a-2.npz", "a-attention.png", "a-offsets.png", "a.npz",
    ]  # fmt: skip
    assert "more/a.png -> x/a-2-attention.png, x/a-2-offsets.png" in capsys.readouterr().out
    subject = load_subject("tiny.pth")
    view, arrays = subject.view(Image.open("a.png")), np.load("x/a.npz")
    at = view.to_tensor(40.5, 30.5)
    expected = attention(subject.model, view.tensor, at)
    np.testing.assert_allclose(arrays["attention.at"], [at], rtol=1e-6)
    np.testing.assert_array_equal(arrays["attention.rollout"], expected.rollout)
    np.testing.assert_array_equal(arrays["attention.layers.2.blocks.1.hifi"], expected.blocks[1].hifi)
    for part in offsets(subject.model, view.tensor, at):
        np.testing.assert_array_equal(arrays[f"offsets.{part.merging}.points"], part.points)
    for path in Path("x").glob("*.png"):
        assert Image.open(path).size > (300, 300) and np.asarray(Image.open(path)).std() > 10


def test_each_position_has_its_pictures(folder):
    assert explain("a.png", "--what", "attention", "--at", 40, 30, "--at", 20, 45, "--out", "x") == 0
    assert sorted(path.name for path in Path("x").iterdir()) == ["a-attention-1.png", "a-attention-2.png", "a.npz"]


def test_spectrum_of_all_images(folder, capsys):
    assert explain(".", "--what", "spectrum", "--out", "x") == 0
    subject = load_subject("tiny.pth")
    images = torch.cat([subject.view(Image.open(name)).tensor for name in ("a.png", "b.png", "more/a.png")])
    printed, arrays = capsys.readouterr().out.splitlines(), np.load("x/spectrum.npz")
    assert "mean over 3 images" in printed[0]
    for part in spectrum(subject.model, images):
        np.testing.assert_allclose(arrays[f"{part.block}.{part.branch}.magnitude"], part.magnitude, rtol=1e-5)
        row = next(line for line in printed if line.startswith(part.block))
        assert f"{part.high.mean().item():.1%} [" in row
    assert "no heads" in printed[-2] and "no heads" not in printed[2] and Image.open("x/spectrum.png").size > (300, 300)


def test_a_branch_that_is_missing_is_said(folder, capsys):
    torch.save(tiny_model(alpha=1.0).state_dict(), "lofi.pth")
    assert main("explain a.png --what spectrum attention --checkpoint lofi.pth --img-size 64 --out x".split()) == 0
    table = capsys.readouterr().out.splitlines()[2:5]
    assert all(line.split(maxsplit=1)[1].startswith("no heads") for line in table)


def test_images_that_cannot_be_read_do_not_stop_the_others(folder, capsys):
    Path("bad.png").write_bytes(Path("a.png").read_bytes()[:500])
    assert explain("bad.png", "a.png", "--what", "spectrum", "offsets", "--out", "x") == 1
    printed = capsys.readouterr()
    assert "mean over 1 images" in printed.out and "a.png -> x/a-offsets.png" in printed.out
    assert [line.split(" cannot")[0] for line in printed.err.splitlines() if "cannot" in line] == ["error: bad.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png --at 1 2", "the model does not see position 1 2; it sees columns"),
        ("bad.png --what spectrum", "no images"),
        ("empty", "empty: no images (.bmp"),
        ("a.png none.png", "none.png: there is no such image or folder"),
        ("a.png --img-size 8", "too small"),
    ],
)
def test_wrong_input_is_one_line(folder, capsys, line, message):
    Path("bad.png").write_text("no image")
    Path("empty").mkdir()
    assert explain(*line.split(), *([] if "--what" in line else ["--what", "attention"])) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path().rglob("*.tmp"))
