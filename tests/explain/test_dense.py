# SPDX-License-Identifier: Apache-2.0
"""Detectors and segmenters as subjects: views, predictions, and scores that a class activation map is made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT, fill, generator

pytestmark = pytest.mark.extra
pytest.importorskip("mmdet", exc_type=ImportError)
pytest.importorskip("mmseg", exc_type=ImportError)
pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)

CONFIGS = {
    "retinanet": ROOT / "detection/configs/litv2/retinanet_litv2_s_fpn_1x_coco.py",
    "mask_rcnn": ROOT / "detection/configs/litv2/mask_rcnn_litv2_s_fpn_1x_coco.py",
    "fpn": ROOT / "segmentation/configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py",
}
SIZE = {"test_dataloader.dataset.pipeline.1.scale": (160, 128)}
SCORES: dict[str, dict] = {
    "retinanet": {"model.test_cfg.score_thr": 0.0},
    "mask_rcnn": {"model.test_cfg.rcnn.score_thr": 0.0, "model.test_cfg.rpn.max_per_img": 20},
    "fpn": {},
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def subject(request):
    """With a tiny backbone, for images of at most 160 x 128 pixels; any score counts, since random weights are not confident."""
    from litv2.explain.dense import Detector, Segmenter
    from litv2.openmmlab.build import build_model
    from mm_helpers import tiny_config

    config = tiny_config(CONFIGS[request.param], **SIZE, **SCORES[request.param])
    return (Segmenter if request.param == "fpn" else Detector)(fill(build_model(config)).eval(), config)


def photograph(width: int = 150, height: int = 130) -> Image.Image:
    return Image.fromarray(generator(0).integers(0, 255, (height, width, 3), dtype=np.uint8)).resize((width, height))


def test_view_and_prediction_are_those_of_the_library(subject, tmp_path):
    """Which reads the file itself."""
    from mmengine.dataset import Compose

    path = tmp_path / "image.png"
    photograph().save(path)
    view = subject.view(Image.open(path))
    assert view.tensor.shape == ((1, 3, 128, 148) if subject.task == "segmentation" else (1, 3, 128, 160))  # padded to 32
    assert view.size == (128, 148) and view.box == (0, 0, 150, 130)
    assert view.to_tensor(75, 65) == pytest.approx((74, 64))
    found = subject.predict(view)
    data = Compose([{"type": "LoadImageFromFile"}, *subject.pipeline.transforms[1:]])(dict(img_path=str(path), img_id=0))
    with torch.inference_mode():
        (expected,) = subject.model.test_step(dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]))
    if subject.task == "segmentation":
        assert found.shape == (130, 150) and torch.equal(found, expected.pred_sem_seg.data[0])
    else:
        expected = expected.pred_instances
        torch.testing.assert_close(found.bboxes, expected.bboxes)
        torch.testing.assert_close(found.scores, expected.scores)
        assert len(found) and found.bboxes[:, 2].max() <= 150 and found.bboxes[:, 3].max() <= 130


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_modes(subject, mode):
    assert subject.view(photograph().convert(mode)).tensor.shape[1] == 3


def test_a_turned_photograph_is_upright(subject):
    image = photograph()
    image.getexif()[0x0112] = 6  # to be turned by 90 degrees
    assert subject.view(image).picture.size == (130, 150)


def test_score_is_that_of_the_prediction(subject):
    """With a gradient that reaches the image."""
    view = subject.view(photograph())
    module, score, what = subject.scored(view)
    images = view.tensor.clone().requires_grad_()
    value = score(module(images)[0])
    value.backward()
    assert images.grad.abs().max() > 0
    if subject.task == "detection":
        best = subject.predict(view).scores.max()
        assert value.item() == pytest.approx(best.item(), abs=1e-5) and what.endswith(f", {best.item():.0%}")
    else:
        labels = subject.model(view.tensor, mode="tensor")[0].argmax(0)
        number = labels.flatten().bincount().argmax().item()
        assert value.item() == pytest.approx(module(images)[0][number][labels == number].sum().item(), rel=1e-5)
        assert what.startswith(subject.names[number])


def test_activation_maps_and_attention(subject):
    from litv2.explain import attention, offsets, spectrum
    from litv2.explain.activation import cam

    view = subject.view(photograph())
    module, score, _ = subject.scored(view)
    for method in ("gradcam", "eigencam"):
        (found,) = cam(module, view.tensor, score, method)
        assert found.shape == view.tensor.shape[2:] and found.min() >= 0 and found.max() == pytest.approx(1, abs=1e-5)
    seen = attention(subject.model, view.tensor, view.to_tensor(75, 65))
    assert seen.rollout.sum().item() == pytest.approx(1, abs=1e-5) and len(seen.blocks) == 2
    assert len(offsets(subject.model, view.tensor)) == 3 and len(spectrum(subject.model, view.tensor)) == 3


def test_a_box_that_is_gone_has_no_score():
    from litv2.explain.dense import score_of_box

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    scores = torch.tensor([[0.1, 0.0], [0.3, 0.4], [0.9, 0.8]])
    assert score_of_box(torch.tensor([0.0, 0, 10, 10]), 0)((boxes, scores)) == 0.3
    assert score_of_box(torch.tensor([0.0, 0, 10, 20]), 0)((boxes, scores)) == 0.1  # the second overlaps by 0.45
    assert score_of_box(torch.tensor([20.0, 20, 30, 30]), 0)((boxes, scores)) == 0
    assert score_of_box(torch.tensor([0.0, 0, 10, 10]), 0)((boxes[:0], scores[:0])) == 0  # nothing is found in the image


def test_the_command_takes_dense_checkpoints(tmp_path, monkeypatch, capsys):
    from litv2.__main__ import main
    from litv2.openmmlab.build import build_model
    from mm_helpers import tiny_config

    monkeypatch.chdir(tmp_path)
    photograph().save("image.png")
    config = tiny_config(CONFIGS["retinanet"], **SIZE, **SCORES["retinanet"])
    config.dump("mine.py")
    torch.save(dict(state_dict=fill(build_model(config)).state_dict(), meta={}), "mine.pth")
    flags = ["--checkpoint", "mine.pth", "--config", "mine.py", "--out", "x"]
    assert main(["explain", "image.png", *flags, "--what", "cam", "offsets", "--at", "30", "40"]) == 0
    assert {path.name for path in Path("x").iterdir()} == {"image-cam.png", "image-offsets.png", "image.npz"}
    assert main(["explain", "image.png", *flags, "--img-size", "64"]) == 2
    assert "as its configuration says" in capsys.readouterr().err


def test_page(subject, tmp_path, monkeypatch):
    """What `python -m litv2 demo` shows, as its component takes it."""
    gradio = pytest.importorskip("gradio", exc_type=ImportError)
    from litv2.explain import page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(page, "LEAST_SCORE", 0.0)
    view = subject.view(photograph())
    text, (picture, shapes) = page.Page(subject).prediction(view)
    found = subject.predict(view)
    assert text.endswith("ms for this image on cpu") and picture.size == (150, 130)
    if subject.task == "segmentation":
        assert [label for _, label in shapes] == [subject.names[i] for i in found.unique()]
        assert sum(area.astype(int) for area, _ in shapes).tolist() == np.ones((130, 150)).tolist()
    else:
        assert text.startswith(f"{len(found)} objects, ")
        names = [f"{subject.names[i]} {score:.0%}" for i, score in zip(found.labels, found.scores)]
        assert [label for _, label in shapes] == names and len(names) > 1
        expected = found.masks if "masks" in found else found.bboxes.round()
        np.testing.assert_array_equal(np.stack([shape for shape, _ in shapes]), expected)
    drawn = gradio.AnnotatedImage().postprocess((picture, shapes[:3]))
    assert [part.label for part in drawn.annotations] == [label for _, label in shapes[:3]]
