# SPDX-License-Identifier: Apache-2.0
"""The page in headless Chromium: its numbers are torch's, and it says what is wrong with a file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from browser_helpers import chromium, opened, served
from command_helpers import run_here
from document_helpers import documented
from helpers import generator, max_difference, tiny_model
from litv2.explain import site, spectrum
from litv2.explain.subjects import Classifier
from litv2.export.images import photographs

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.extra

SIZE = 80
NAMES = [f"class <{i}>" for i in range(10)]
READ = """async () => {
    const {result: {logits, spectra}} = await import("./page.js");
    return {
        logits: [...logits],
        spectra: spectra.map(({height, width, hifi, lofi}) => ({shape: [2, height, width], values: [...hifi, ...lofi]})),
    };
}"""
COUNT_RESULTS = """() => {
    const observer = new MutationObserver(() => document.body.append("shown"));
    observer.observe(document.getElementById("classes"), {childList: true});
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as browser:
        yield browser


class Site:
    """A page of a model of its own, and where it is served."""

    def __init__(self, folder: Path, checkpoint: dict, img_size: int | None):
        missing = [file for file in site.page_files() if not file.is_file()]
        if missing:
            pytest.skip(f"{missing[0].name} is not there: run `npm ci` in docs/site")
        torch.save(checkpoint, folder / "tiny.pth")
        self.folder, self.checkpoint = folder / "out", folder / "tiny.pth"
        self.subject = Classifier(self.checkpoint, img_size=img_size)
        site.write_site(self.subject, self.folder)

    def expected(self, image: Image.Image) -> tuple[Tensor, list[Tensor]]:
        """What torch computes: logits and, of blocks with both branches, the spectra (2, h, w)."""
        tensor = self.subject.view(image).tensor
        parts = {(part.block, part.branch): part.magnitude for part in spectrum(self.subject.model, tensor)}
        blocks = [block for block, branch in parts if branch == "hifi" and (block, "lofi") in parts]
        with torch.no_grad():
            return self.subject.model(tensor)[0], [torch.stack([parts[block, "hifi"], parts[block, "lofi"]]) for block in blocks]


@pytest.fixture(scope="module")
def rgb(tmp_path_factory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("rgb"), {"model": tiny_model().state_dict(), "class_names": NAMES}, SIZE)
    with served(made.folder) as made.address:
        yield made


@pytest.fixture
def page(browser, rgb) -> Iterator:
    with opened(browser, rgb.address) as page:
        yield page


def noise(height: int, width: int, channels: int = 3) -> Image.Image:
    """Of every frequency: a resize that differs shows."""
    return Image.fromarray(generator(0).integers(0, 256, (height, width, channels)).astype(np.uint8).squeeze())


def cut_out(image: Image.Image) -> Image.Image:
    """The image with parts that are transparent, and black: the colours behind them are lost in a browser."""
    shown = noise(*reversed(image.size), channels=1).point(lambda value: 255 * (value > 99))
    image = Image.composite(image, Image.new("RGB", image.size), shown)
    image.putalpha(shown)
    return image


def gamma(value: float) -> PngInfo:
    info = PngInfo()
    info.add(b"gAMA", struct.pack(">I", round(value * 100_000)))
    return info


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def choose(page, path: Path) -> dict:
    """Chooses a file as the first one of a page, and returns what the page then shows."""
    page.set_input_files("#file", path)
    page.wait_for_selector("#result:not([hidden])")
    return page.evaluate(READ)


def assert_as_expected(found: dict, expected: tuple[Tensor, list[Tensor]]) -> None:
    logits, spectra = expected
    assert max_difference(torch.tensor(found["logits"]), logits) < 1e-3
    for part, magnitude in zip(found["spectra"], spectra, strict=True):
        assert max_difference(torch.tensor(part["values"]).view(part["shape"]), magnitude) < 1e-3


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("large.png", noise(701, 1200), {}),
        ("small.png", noise(33, 20), {}),
        ("as-it-is.bmp", noise(91, 93), {}),  # resized to its own size; the crop begins at 5.5 and 6.5 pixels, rounded to 6 and 6
        ("grey.webp", noise(150, 90, 1), dict(lossless=True)),
        ("palette.png", noise(60, 300).quantize(16), {}),
        ("cut-out.png", cut_out(noise(900, 600)), {}),
        ("gamma.png", noise(90, 120), dict(pnginfo=gamma(1.0))),  # screens differ; the model takes the numbers in the file
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_without_loss(name, image, options, page, rgb, tmp_path):
    assert_as_expected(choose(page, saved(tmp_path / name, image, **options)), rgb.expected(image))


def test_photograph(page, rgb):
    path = photographs() / "china.jpg"
    assert_as_expected(choose(page, path), rgb.expected(Image.open(path)))
    logits, _ = rgb.expected(Image.open(path))
    best = logits.softmax(0).topk(5)
    shown = [line.split("\n") for line in page.locator("#classes li").all_inner_texts()]
    assert shown == [[NAMES[i], f"{100 * share:.1f} %"] for share, i in zip(best.values.tolist(), best.indices.tolist())]
    assert page.locator("#spectra figcaption").all_inner_texts() == ["layers.2.blocks.0", "layers.2.blocks.1"]
    assert page.locator("#spectra canvas").evaluate_all("all => all.map(({width, height}) => [width, height])") == [[5, 5]] * 4
    assert "ms for the network" in page.inner_text("#status")


def test_a_turned_photograph_is_seen_as_it_is_shown(page, rgb, tmp_path):
    """Cameras store how they were held."""
    image = noise(100, 140)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    path = saved(tmp_path / "turned.png", image, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    assert upright.size == (100, 140)
    assert_as_expected(choose(page, path), rgb.expected(upright))


def test_grey_squares_without_both_branches(browser, tmp_path):
    """A model of grey images that are squeezed into squares, whose blocks have Lo-Fi alone."""
    config = {"DATA": {"IMG_SIZE": 64}, "TEST": {"CROP": False}}
    made = Site(tmp_path, {"model": tiny_model(in_chans=1, alpha=1.0, num_classes=3).state_dict(), "config": config}, None)
    image = noise(75, 190)
    with served(made.folder) as address, opened(browser, address) as page:
        found = choose(page, saved(tmp_path / "image.png", image))
        assert found["spectra"] == [] and page.is_visible("#nothing") and page.is_hidden("#frequencies")
        assert page.locator("#classes li").count() == 3
        assert_as_expected(found, made.expected(image))


def bad_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files and what the page says of them."""
    whole = saved(folder / "whole.jpg", noise(200, 200)).read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    yield folder / "half.jpg", "half.jpg cannot be read as an image: the file is damaged."
    (folder / "words.png").write_text("no image")
    yield folder / "words.png", "words.png cannot be read as an image: the file is damaged."
    (folder / "empty.png").touch()
    yield folder / "empty.png", "empty.png cannot be read as an image: the file is damaged."
    (folder / "notes.txt").write_text("no image")
    yield folder / "notes.txt", "notes.txt is not an image of a type that is taken: JPEG, PNG, WebP or BMP."
    (folder / "large.jpg").write_bytes(bytes(20_500_000))
    yield folder / "large.jpg", "large.jpg has 20.5 MB; the limit is 20 MB. Save a smaller copy."
    limits = "the limit is 60 megapixels and 16384 pixels a side. Save a smaller copy."
    yield saved(folder / "wide.png", Image.new("1", (16385, 1))), f"wide.png has 16385 × 1 pixels; {limits}"
    yield saved(folder / "huge.png", Image.new("1", (10000, 6001))), f"huge.png has 10000 × 6001 pixels; {limits}"


def test_files_that_are_not_taken(page, rgb, tmp_path):
    """Each is refused with its reason; after each a good one is taken."""
    image = noise(90, 120)
    good = saved(tmp_path / "good.png", image)
    for path, message in bad_files(tmp_path):
        page.set_input_files("#file", path)
        page.wait_for_selector("#error:not(:empty)")
        assert page.inner_text("#error") == message and page.inner_text("#status") == "" and page.is_hidden("#result")
        assert_as_expected(choose(page, good), rgb.expected(image))
        assert page.inner_text("#error") == ""


def test_the_last_image_counts(page, rgb, tmp_path):
    """Of those chosen before the model is there: the others are not shown even for a moment."""
    held, images = [], [noise(90, 120), noise(300, 310), noise(70, 80)]
    page.context.route("**/model.onnx", lambda route: held.append(route))
    with page.expect_request("**/model.onnx"):
        page.reload()
    page.evaluate(COUNT_RESULTS)
    for number, image in enumerate(images):
        page.set_input_files("#file", saved(tmp_path / f"{number}.png", image))
        page.wait_for_selector(f"#status:text('{number}.png')")
    held[-1].continue_()
    page.wait_for_selector("#result:not([hidden])")
    assert_as_expected(page.evaluate(READ), rgb.expected(images[-1]))
    assert page.inner_text("body").count("shown") == 1


def test_dropping(page, rgb):
    code = """async () => {
        const data = new DataTransfer();
        data.items.add(new File([await (await fetch("flower.jpg")).blob()], "flower.jpg", {type: "image/jpeg"}));
        return data;
    }"""
    page.dispatch_event("#drop", "dragover")
    assert page.get_attribute("#drop", "class") == "over"
    page.dispatch_event("h1", "drop", {"dataTransfer": page.evaluate_handle(code)})
    page.wait_for_selector("#result:not([hidden])")
    assert page.get_attribute("#drop", "class") == ""
    assert_as_expected(page.evaluate(READ), rgb.expected(Image.open(photographs() / "flower.jpg")))
    page.dispatch_event("#drop", "drop", {"dataTransfer": page.evaluate_handle("() => new DataTransfer()")})
    assert page.inner_text("#error").startswith("That is not a file.")


def test_by_keyboard_alone(page, rgb):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    assert page.evaluate("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#result:not([hidden])")
    assert_as_expected(page.evaluate(READ), rgb.expected(Image.open(photographs() / "china.jpg")))


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone_nothing_sticks_out(width, browser, rgb, tmp_path):
    long = "very" * 20 + "long.png"
    with opened(browser, rgb.address, viewport=dict(width=width, height=700), is_mobile=True, has_touch=True) as page:
        for name in (long, long.replace(".png", ".txt")):
            page.set_input_files("#file", saved(tmp_path / name, noise(50, 50), format="PNG"))
            page.wait_for_selector("#result:not([hidden]), #error:not(:empty)")
            assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]


def test_light_and_dark_can_be_read(browser, rgb):
    """A contrast of at least 4.5, as WCAG 2.2 asks for text of this size."""
    code = """() => ["body", "small", "a", "#error", "#drop strong"].map((selector) => {
        const found = document.querySelector(selector);
        let ground = found;
        while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
        return [getComputedStyle(found).color, getComputedStyle(ground).backgroundColor].map((colour) => colour.match(/\\d+/g).map(Number));
    })"""
    for scheme in ("light", "dark"):
        with opened(browser, rgb.address, color_scheme=scheme) as page:
            for colours in page.evaluate(code):
                light = (np.array(colours) / 255) ** 2.2 @ (0.2126, 0.7152, 0.0722) + 0.05
                assert light.max() / light.min() > 4.5, (scheme, colours)


def test_a_model_that_is_not_there(browser, rgb, tmp_path):
    shutil.copytree(rgb.folder, tmp_path / "site")
    (tmp_path / "site/model.onnx").unlink()
    with served(tmp_path / "site") as address, opened(browser, address, expected_error="404") as page:
        page.wait_for_selector("#error:not(:empty)")
        assert page.inner_text("#error") == "The model could not be loaded. model.onnx: the server answered 404"


@pytest.mark.parametrize("command", documented("docs/explain.md", r"python -m litv2 site --checkpoint FILE --out DIR"), ids=str)
def test_documented_command(command, rgb, tmp_path, monkeypatch, capsys):
    """It writes what the page consists of, and no more."""
    run_here(monkeypatch, command, "--img-size", SIZE, files={"FILE": rgb.checkpoint, "DIR": tmp_path / "out"})
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"written to {tmp_path / 'out'}; ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in rgb.folder.iterdir()}
    for name in ("index.html", "ort.wasm.bundle.min.js"):
        assert (tmp_path / "out" / name).read_bytes() == (rgb.folder / name).read_bytes()
    about = json.loads((tmp_path / "out/model.json").read_text())
    assert about["classes"] == NAMES and about["size"] == SIZE and about["bytes"] == (tmp_path / "out/model.onnx").stat().st_size
