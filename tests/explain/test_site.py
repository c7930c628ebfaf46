# SPDX-License-Identifier: Apache-2.0
"""The graph of the page against torch, in onnxruntime; test_site_in_browser.py runs it in a browser."""

from __future__ import annotations

import pytest
import torch

from helpers import max_difference, normal, tiny_model
from litv2.errors import UserError
from litv2.explain import site, spectrum
from litv2.export import Settings, export, load

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.extra


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        (dict(local_ws=(0, 0, 2, 3)), ["layers.2.blocks.0", "layers.2.blocks.1", "layers.3.blocks.0"]),  # on maps of 5 x 5 and 2 x 2
        (dict(alpha=0.0), []),
        (dict(alpha=1.0, num_classes=3), []),
    ],
    ids=str,
)
def test_logits_and_spectra_are_torchs(options, blocks, tmp_path):
    model, images = tiny_model(**options), normal(0, 1, 3, 80, 80)
    network = site.network_with_spectra(model)
    assert network.outputs == ("logits", *blocks)
    export(network, "onnx-standard", tmp_path / "model.onnx", Settings((80, 80), dynamic=()))
    logits, *spectra = load("onnx-standard", tmp_path / "model.onnx")(images)
    expected = {(part.block, part.branch): part.magnitude for part in spectrum(model, images)}
    with torch.no_grad():
        assert max_difference(logits, model.eval()(images)) < 1e-4
    for block, found in zip(blocks, spectra, strict=True):
        assert max_difference(found[0], torch.stack([expected[block, "hifi"], expected[block, "lofi"]])) < 1e-4


@pytest.mark.parametrize("fetched", [False, True], ids=["runtime missing", "four channels"])
def test_what_is_wrong_is_said_before_anything_is_written(fetched, tmp_path, monkeypatch):
    model = tiny_model(in_chans=4)
    torch.save({"model": model.state_dict()}, tmp_path / "tiny.pth")
    subject = site.Classifier(tmp_path / "tiny.pth", img_size=64)
    monkeypatch.setattr(site, "PAGE", tmp_path / "page")
    if fetched:
        for file in site.page_files():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    with pytest.raises(UserError, match="has 4 channels" if fetched else r"index.html is not there; .* `make site CHECKPOINT=FILE`"):
        site.write_site(subject, tmp_path / "out")
    assert not (tmp_path / "out").exists()
