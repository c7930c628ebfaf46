# SPDX-License-Identifier: Apache-2.0
"""The page of ``python -m litv2 demo``: what it shows, and in a real browser."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
from litv2.export.images import photographs

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


def photograph(path: Path, width: int = 120, height: int = 90, seed: int = 1) -> Path:
    Image.fromarray(generator(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def test_prediction(page, tmp_path):
    path = photograph(tmp_path / "a.png")
    took, found = page.prediction(page.view(str(path)))
    with torch.inference_mode():
        expected = page.subject.model(page.subject.transform(Image.open(path))[None])[0].softmax(0)
    assert list(found) == NAMES and list(found.values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert re.fullmatch(r"\d+ ms for this image on cpu", took)


def test_pictures(page, tmp_path, monkeypatch):
    from litv2.explain.page import PICTURES

    view = page.view(str(photograph(tmp_path / "a.png")))
    for what in PICTURES:
        assert page.picture(what, view).axes or page.picture(what, view).subfigs
    marked = page.picture("attention", view, (60, 45)).axes[0].lines[0].get_xydata()[0]
    assert marked == pytest.approx(view.to_tensor(60.5, 45.5))
    for what in ("attention", "offsets"):
        with pytest.raises(UserError, match="does not see position 2.5 45.5; it sees columns"):
            page.picture(what, view, (2, 45))


def test_a_tab_says_what_is_missing(page, tmp_path, monkeypatch):
    from litv2.explain.page import PICTURES, build

    monkeypatch.delitem(sys.modules, "litv2.explain.activation", raising=False)
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    file = dict(path=str(photograph(tmp_path / "a.png")))
    explain = {f.fn.args[0]: f.fn for f in build(page, "title").fns.values() if hasattr(f.fn, "args")}
    assert tuple(explain) == PICTURES
    for what, function in explain.items():
        picture, remark = function(file, None).values()
        if what == "class activation":
            assert picture is None and remark.visible
            assert "class activation maps need grad-cam: pip install &#x27;litv2[explain]&#x27;</p>" in remark.value
        else:
            assert picture is not None and not remark.visible


def test_visitors_use_the_model_one_at_a_time(page):
    """What watches the model sees every image that passes, and Gradio limits each function by itself unless they are a group."""
    from litv2.explain.page import PICTURES, build

    functions = [function for function in build(page, "title").fns.values() if function.name != "load_example"]
    assert len(functions) == 2 + len(PICTURES)
    assert {(function.concurrency_id, function.concurrency_limit) for function in functions} == {("model", 1)}


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("RGBA", "webp"), ("P", "gif"), ("I;16", "png"), ("CMYK", "jpg"), ("1", "bmp")])
def test_images_of_any_mode(page, tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
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
    Image.new("RGB", (80, 70)).save(tmp_path / "program.png", format="EPS")  # Pillow would have Ghostscript run it
    for name, message in (
        ("half.png", "^the file half.png cannot be read as an image: image file is truncated"),
        ("text.png", "^the file text.png is damaged, or of another format than BMP, GIF, JPEG, PNG, WEBP$"),
        ("program.png", "^the file program.png is damaged, or of another format than"),
        ("large.png", "^the file large.png has 10000 x 6000 pixels: the page takes up to 50 million$"),
        ("bomb.png", "^the file bomb.png has too many pixels: the page takes up to 50 million$"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            page.view(str(tmp_path / name))
        assert str(tmp_path) not in str(raised.value)


def test_wrong_flags(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, message in (
            (["--port", "70000"], "--port 70000 one of 1 to 65535"),
            (["--max-mb", "0"], "--max-mb 0 must be at least 1"),
            (["--img-size", "8"], "too small"),
            (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
            (["--port", str(port)], f"--host 127.0.0.1 --port {port} cannot be served"),
            (["--host", "192.0.2.1"], "--host 192.0.2.1 cannot be served"),  # an address for documents, which no machine has
        ):
            assert main(["demo", "--checkpoint", str(checkpoint), *flags]) == 2
            assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("host", "others"), [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True)])
def test_others_are_warned_of(checkpoint, host, others, monkeypatch, capsys):
    from litv2.explain import page

    served = []
    monkeypatch.setattr(page, "serve", lambda *arguments: served.append(arguments[2]))
    assert main(["demo", "--checkpoint", str(checkpoint), "--host", host]) == 0
    assert served == [host]
    assert ("warning: everyone who can reach" in capsys.readouterr().err) == others


def test_the_small_classifier_is_the_default(monkeypatch, capsys):
    from litv2.explain import page

    served = []
    monkeypatch.setattr(page, "serve", lambda *arguments: served.append(arguments[:2]))
    assert main(["demo"]) == 0
    ((subject, title),) = served
    assert title == "LITv2: litv2_imagenette" and len(subject.names) == 10 and "without --checkpoint: the small" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


SPY = """
import sys
def write(event, details):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        print(details[0] if event == "socket.getaddrinfo" else details[1][0], file=open({log!r}, "a"))
sys.addaudithook(write)
"""


@pytest.fixture(scope="module")
def address(browser, checkpoint, tmp_path_factory):
    """Of the page, served by the command, which keeps nothing of what it was given, and asks no other machine, whatever the proxy is."""
    folder, spy = tmp_path_factory.mktemp("uploads"), tmp_path_factory.mktemp("spy")
    (spy / "sitecustomize.py").write_text(SPY.format(log=str(spy / "log")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (command,) = documented("docs/explain.md", r"python -m litv2 demo")
    line = [sys.executable, *command.words[1:], "--checkpoint", str(checkpoint), "--port", str(port), "--max-mb", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{spy}{os.pathsep}{ROOT}", "TMPDIR": str(folder)}
    environment |= {"HTTP_PROXY": "http://192.0.2.1:3128", "http_proxy": "http://192.0.2.1:3128"}
    with subprocess.Popen(line, cwd=command.folder, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == f"the page is at http://127.0.0.1:{port}/; Ctrl-C ends it\n"
        yield f"http://127.0.0.1:{port}/"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert not [path for path in folder.rglob("*") if path.is_file()]  # uploads and pictures
    assert set((spy / "log").read_text().split()) <= {"127.0.0.1", "localhost", "::1"}


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


def assert_predicted(tab, page, path: Path) -> None:
    """The classes and their confidence are torch's."""
    _, found = page.prediction(page.view(str(path)))
    best = sorted(found.items(), key=lambda item: -item[1])[:5]
    tab.locator("#found").get_by_text(best[0][0]).first.wait_for()
    words = tab.locator("#found").inner_text().split("\n")
    assert [word for word in words if word.startswith("animal")][-5:] == [name for name, _ in best]
    assert [word for word in words if word.endswith("%")] == [f"{share:.0%}" for _, share in best]


def picture(tab, what: str) -> str:
    """Of a tab: its source, which holds the picture itself."""
    tab.get_by_role("tab", name=what).click()
    image = tab.locator(f"#{what.replace(' ', '-')} img")
    image.wait_for()
    return image.get_attribute("src")


def test_upload_and_click(browser, address, page, tmp_path):
    path = photograph(tmp_path / "a.png")
    with opened(browser, address, expected_error=NOISE) as tab:
        upload(tab, path)
        tab.locator("#message").get_by_text(re.compile(r"^\d+ ms for this image on cpu$")).wait_for()
        assert_predicted(tab, page, path)
        before = {what: picture(tab, what) for what in ("class activation", "spectrum", "offsets", "attention")}
        click(tab, 60, 45)
        tab.locator("#message").get_by_text(re.compile("^Position (59|60|61), (44|45|46)$")).wait_for()
        click(tab, 2, 45)
        tab.get_by_text(re.compile("^The model does not see position .* it sees columns 20 to 99 and rows 5 to 84 ")).wait_for()
        after = {what: picture(tab, what) for what in before}
        assert {what for what in before if before[what] != after[what]} == {"attention", "offsets"}
        tab.locator("#image button[aria-label='Remove Image']").click()
        tab.locator("#attention img").wait_for(state="detached")
        assert tab.locator("#message").inner_text() == ""
        tab.locator("#examples button").first.click()
        assert_predicted(tab, page, photographs() / "china.jpg")


def test_the_last_image_counts(browser, address, page, tmp_path):
    """Whatever is in the queue when it comes; and another visitor sees nothing of it."""
    paths = [photograph(tmp_path / f"{seed}.png", seed=seed) for seed in range(3)]
    with opened(browser, address, expected_error=NOISE) as tab, opened(browser, address, expected_error=NOISE) as other:
        upload(tab, paths[0])
        tab.locator("#message p").wait_for()
        for path in paths[1:]:
            tab.locator("#image button[aria-label='Remove Image']").click()
            upload(tab, path)
        upload(other, paths[2])
        assert_predicted(other, page, paths[2])
        expected = {what: picture(other, what) for what in ("class activation", "spectrum", "offsets", "attention")}
        click(other, 20, 30)
        other.locator("#message").get_by_text("Position").wait_for()
        assert_predicted(tab, page, paths[2])
        for what, image in expected.items():
            picture(tab, what)
            tab.wait_for_function("([id, src]) => document.querySelector(`#${id} img`)?.src === src", arg=[what.replace(" ", "-"), image])


def test_refused_uploads(browser, address, page, tmp_path):
    """What the page says; and after each a good file is taken."""
    good = photograph(tmp_path / "good.png")
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:9000])
    (tmp_path / "huge.png").write_bytes(bytes(2_000_000))
    Image.new("1", (10_000, 6_000)).save(tmp_path / "large.png")
    with opened(browser, address, expected_error="") as tab:  # the browser itself reports a damaged image and a refused upload
        for name, message in (
            ("half.png", "The file half.png cannot be read as an image: image file is truncated"),
            ("large.png", "The file large.png has 10000 x 6000 pixels: the page takes up to 50 million"),
            ("huge.png", 'File(s) exceed the maximum allowed size of 1.0 Mb: "huge.png"'),
        ):
            upload(tab, tmp_path / name)
            tab.get_by_text(message).first.wait_for()
            assert tab.locator("#attention img").count() == 0
            if name != "huge.png":  # which has not come so far as to be shown
                tab.locator("#image button[aria-label='Remove Image']").click()
            upload(tab, good)
            assert_predicted(tab, page, good)
            tab.locator("#attention img").wait_for()
            tab.locator("#image button[aria-label='Remove Image']").click()
            tab.locator("#attention img").wait_for(state="detached")


def test_phone(browser, address, tmp_path):
    """Nothing sticks out; a picture scrolls in its frame."""
    with opened(browser, address, expected_error=NOISE, viewport=dict(width=360, height=740), is_mobile=True, has_touch=True) as tab:
        upload(tab, photograph(tmp_path / "a.png"))
        tab.locator("#attention img").wait_for()
        assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
        image = tab.locator("#attention img")
        assert image.bounding_box()["width"] > 600 and image.bounding_box()["x"] >= 0


@pytest.mark.parametrize("path", ["elsewhere.png", "uploads/../elsewhere.png", "uploads/link.png", "/etc/passwd", None, 5])
def test_a_visitor_sees_no_other_files(page, tmp_path, monkeypatch, path):
    """Gradio passes on whatever path a request names, if the request does not mark it as a file."""
    from gradio.state_holder import SessionState

    from litv2.explain.page import build

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.chdir(tmp_path)
    photograph(tmp_path / "elsewhere.png")
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads/link.png").symlink_to(tmp_path / "elsewhere.png")
    blocks = build(page, "title")
    (predict,) = [function for function in blocks.fns.values() if function.name == "predict"]
    file = dict(path=path)
    if isinstance(path, str):
        with ThreadPoolExecutor() as threads:  # this one may have the event loop of a browser's tests
            (file,) = threads.submit(asyncio.run, blocks.preprocess_data(predict, [file], SessionState(blocks))).result()
        assert file["path"] == path
    message, found, _ = predict.fn(file).values()
    assert "This is no uploaded image" in message and found is None
    photograph(tmp_path / "uploads/mine.png")
    message, found, _ = predict.fn(dict(path=str(tmp_path / "uploads/mine.png"))).values()
    assert "for this image on cpu" in message and len(found) == 10
