"""The page of ``python -m litv2 demo``: what it shows, and in a real browser."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from browser_helpers import chromium, opened
from document_helpers import documented
from helpers import ROOT, TINY, generator, tiny_model
from litv2.__main__ import main
from litv2.errors import UserError
from litv2.explain.loading import load_subject

pytestmark = pytest.mark.extra
pytest.importorskip("gradio", reason="Gradio is not installed: pip install -r requirements-test.txt", exc_type=ImportError)
pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)

NAMES = [f"animal {i}" for i in range(10)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth"
    config = dict(MODEL=dict(LIT=dict(NUM_HEADS=list(TINY["num_heads"]))), DATA=dict(IMG_SIZE=64))
    torch.save(dict(model=tiny_model().state_dict(), config=config, class_names=NAMES), path)
    return path


@pytest.fixture(scope="module")
def page(checkpoint):
    from litv2.explain.page import Page

    return Page(load_subject(checkpoint))


def photograph(path: Path, width: int = 120, height: int = 90) -> Path:
    Image.fromarray(generator(1).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def test_prediction(page, tmp_path):
    path = photograph(tmp_path / "a.png")
    took, found = page.prediction(page.view(str(path)))
    with torch.inference_mode():
        expected = page.subject.model(page.subject.transform(Image.open(path))[None])[0].softmax(0)
    assert list(found) == NAMES and list(found.values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert re.fullmatch(r"\d+ ms for this image on cpu", took)


def test_click(page, tmp_path):
    view = page.view(str(photograph(tmp_path / "a.png")))
    marked = page.at_position(view, (60, 45))[0].axes[0].lines[0].get_xydata()[0]
    assert marked == pytest.approx(view.to_tensor(60.5, 45.5))
    with pytest.raises(UserError, match="does not see position 2.5 45.5; it sees columns"):
        page.at_position(view, (2, 45))
    assert len(page.class_activation(view).axes) == 4


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
def test_images_of_any_mode(page, tmp_path, mode):
    path = tmp_path / "a.tiff"
    Image.new(mode, (80, 70)).save(path)
    assert page.view(str(path)).tensor.shape == (1, 3, 64, 64)


def test_a_turned_photograph_is_upright(page, tmp_path):
    image = Image.open(photograph(tmp_path / "a.png"))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert page.view(str(tmp_path / "turned.jpg")).picture.size == (90, 120)


def test_files_that_are_refused(page, tmp_path):
    whole = photograph(tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (10_000, 6_000)).save(tmp_path / "large.png")
    Image.new("1", (40_000, 30_000)).save(tmp_path / "bomb.png")
    for name, message in (
        ("half.png", "half.png cannot be read as an image: image file is truncated"),
        ("text.png", "text.png cannot be read as an image: cannot identify image file"),
        ("large.png", "large.png has 10000 x 6000 pixels: the page takes up to 50 million"),
        ("bomb.png", "bomb.png is too large: the page takes up to 50 million pixels"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            page.view(str(tmp_path / name))
        assert str(tmp_path) not in str(raised.value)


def test_wrong_flags(checkpoint, capsys):
    for flags, message in (
        (["--port", "70000"], "--port 70000 one of 1 to 65535"),
        (["--max-mb", "0"], "--max-mb 0 must be at least 1"),
        (["--img-size", "8"], "too small"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
    ):
        assert main(["demo", "--checkpoint", str(checkpoint), *flags]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def address(browser, checkpoint, tmp_path_factory):
    """Of the page, served by the command, which keeps nothing of what it was given."""
    folder = tmp_path_factory.mktemp("uploads")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (command,) = documented("docs/explain.md", r"python -m litv2 demo")
    line = [sys.executable, *command.words[1:], "--checkpoint", str(checkpoint), "--port", str(port), "--max-mb", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    with subprocess.Popen(line, cwd=command.folder, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == f"the page is at http://127.0.0.1:{port}/; Ctrl-C ends it\n"
        yield f"http://127.0.0.1:{port}/"
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    assert not [path for path in folder.rglob("*") if path.is_file()]  # uploads and pictures


NOISE = "Method not implemented"  # of Gradio's own scripts


def upload(tab, path: Path) -> None:
    tab.locator("#image input[type=file]").wait_for(state="attached")
    tab.locator("#image input[type=file]").set_input_files(path)


def click(tab, x: float, y: float) -> None:
    """On a pixel of the image, which is shown whole in the middle of its element."""
    image = tab.locator("#image img")
    box, (width, height) = image.bounding_box(), image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    scale = min(box["width"] / width, box["height"] / height)
    if image.evaluate("image => getComputedStyle(image).objectFit") == "scale-down":
        scale = min(scale, 1)
    left, top = (box["width"] - width * scale) / 2, (box["height"] - height * scale) / 2
    image.click(position=dict(x=left + (x + 0.5) * scale, y=top + (y + 0.5) * scale))


def test_upload_and_click(browser, address, page, tmp_path):
    path = photograph(tmp_path / "a.png")
    _, found = page.prediction(page.view(str(path)))
    name, best = max(found.items(), key=lambda item: item[1])
    with opened(browser, address, expected_error=NOISE) as tab:
        upload(tab, path)
        tab.locator("#attention img").wait_for()
        assert tab.locator("#found").get_by_text(name).first.is_visible() and f"{best:.0%}" in tab.locator("#found").inner_text()
        assert "ms for this image on cpu" in tab.locator("#message").inner_text()
        before = tab.locator("#attention img").get_attribute("src")
        click(tab, 60, 45)
        tab.wait_for_function("before => document.querySelector('#attention img').src !== before", arg=before)
        assert re.search(r"Position (59|60|61), (44|45|46)", tab.locator("#message").inner_text())
        click(tab, 2, 45)
        tab.get_by_text("The model does not see position").wait_for()
        for other in ("offsets", "spectrum", "class activation"):
            tab.get_by_role("tab", name=other).click()
            tab.locator(f"#{other.replace(' ', '-')} img").wait_for()


def test_refused_uploads(browser, address, tmp_path):
    whole = photograph(tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "huge.png").write_bytes(bytes(2_000_000))
    with opened(browser, address, expected_error="") as tab:  # the browser itself reports a damaged image and a refused upload
        upload(tab, tmp_path / "half.png")
        tab.get_by_text("Half.png cannot be read as an image").wait_for()
        assert tab.locator("#attention img").count() == 0
    with opened(browser, address, expected_error="") as tab:
        upload(tab, tmp_path / "huge.png")
        tab.get_by_text(re.compile("exceed", re.I)).first.wait_for()


def test_phone(browser, address, tmp_path):
    with opened(browser, address, expected_error=NOISE, viewport=dict(width=360, height=740)) as tab:
        upload(tab, photograph(tmp_path / "a.png"))
        tab.locator("#attention img").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
