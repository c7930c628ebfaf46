# SPDX-License-Identifier: Apache-2.0
"""A page that runs a classifier in the browser: the likeliest classes of an image, and the spectra of Hi-Fi and Lo-Fi in each block."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from hilo import HiLo

from ..errors import MissingPackage, UserError
from ..export import Network, Settings, export
from ..export.images import photographs
from ..files import atomic_write
from ..model import LITv2
from ..preprocess import normalisation, resized_side
from .frequencies import branches, magnitude
from .recording import Attended, Merged, watched
from .subjects import Classifier

__all__ = ["network_with_spectra", "page_files", "write_site"]

PAGE = Path(__file__).resolve().parents[2] / "docs/site"
SOURCES = ("index.html", "style.css", "page.js", "classifier.js", "preprocess.js")
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
SAMPLES = ("china.jpg", "flower.jpg")


def write_site(subject: Classifier, out: Path) -> None:
    """Writes a folder that any web server of static files can serve: the page, onnxruntime-web, two sample images, ``model.onnx`` with
    the report of its comparison, and ``model.json`` with what the page has to know of the model.

    Raises:
        UserError: an image may have several classes, the sources of the page or the runtime are not there, the images have neither 1 nor
            3 channels, or ``export`` fails.
        MissingPackage: a package is missing; the message names it.
    """
    if subject.thresholds is not None:
        raise UserError("site: the page is for images of one class, and this classifier is for images of any number of classes")
    for file in page_files():
        if not file.is_file():
            raise UserError(f"site: {file} is not there; in a checkout, `make site CHECKPOINT=FILE` fetches what the page needs")
    samples = photographs()
    if samples is None:
        raise MissingPackage("site: the page's sample images come with scikit-learn: pip install scikit-learn")
    model = subject.network
    if model.in_chans not in (1, 3):
        raise UserError(f"site: expected a model of RGB or grey images, and this one has {model.in_chans} channels")

    network = network_with_spectra(model)
    export(network, "onnx-standard", out / "model.onnx", Settings((subject.size, subject.size), dynamic=()))
    mean, std = normalisation(model.in_chans)
    about = dict(
        classes=subject.names,
        size=subject.size,
        short_side=resized_side(subject.size) if subject.crop else None,  # None: the whole image, resized to a square
        mean=mean,
        std=std,
        blocks=network.outputs[1:],
        bytes=(out / "model.onnx").stat().st_size,
    )
    with atomic_write(out / "model.json") as draft:
        draft.write_text(json.dumps(about, indent=2) + "\n")
    for file in [*page_files(), *(samples / name for name in SAMPLES)]:
        # Servers that do not know the suffix .mjs send a type that browsers do not run.
        with atomic_write(out / file.name.replace(".mjs", ".js")) as draft:
            shutil.copyfile(file, draft)


def page_files() -> list[Path]:
    """The sources of the page, and the files of onnxruntime-web that it needs, where `npm ci` puts them."""
    return [PAGE / name for name in SOURCES] + [PAGE / "node_modules/onnxruntime-web/dist" / name for name in RUNTIME]


def network_with_spectra(model: LITv2) -> Network:
    """Images -> ``logits`` and, for each block that has both branches, an output named after it: the spectra (B, 2, h, w) of Hi-Fi and
    Lo-Fi, as ``magnitude`` defines them."""
    with_spectra = _WithSpectra(model)
    attention = {name: module for name, module in model.named_modules() if isinstance(module, HiLo)}
    outputs = ("logits", *(name.removesuffix(".attn") for name, hilo in attention.items() if hilo.h_heads and hilo.l_heads))
    return Network(with_spectra, with_spectra, outputs, model.in_chans, model.feature_info[-1]["reduction"], ("logits",))


class _WithSpectra(nn.Module):
    def __init__(self, model: LITv2):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        spectra = []

        def see(layer: Attended | Merged) -> None:
            if isinstance(layer, Attended) and len(maps := branches(layer)) == 2:
                spectra.append(torch.stack([magnitude(part) for part in maps.values()], dim=1))

        with watched(self.model, see):
            logits = self.model(images)
        return logits, *spectra
