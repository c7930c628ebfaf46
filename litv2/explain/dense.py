# SPDX-License-Identifier: Apache-2.0
"""Detectors and segmenters as subjects, with the preprocessing of their configurations; this needs mmdet or mmseg."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.ops import box_iou

from ..errors import UserError
from ..openmmlab.build import build_model
from ..openmmlab.config import image_steps, load_config
from ..preprocess import decode
from ..weights.download import fetch
from .recording import network_of
from .subjects import Subject, View

__all__ = ["Detector", "Segmenter", "load_dense"]


class Dense(Subject):
    """What detectors and segmenters share."""

    model: Any

    def __init__(self, model: Any, config: Any):
        self.model, self.network, self.names, self.notes = model, network_of(model), list(model.dataset_meta["classes"]), []
        load, *steps = image_steps(config.test_dataloader.dataset)
        self.pipeline = Compose([{**load, "type": f"{config.default_scope}.LoadImageFromNDArray"}, *steps])

    def view(self, image: Image.Image) -> View:
        """The image upright, as its EXIF data say: OpenMMLab's loaders turn it, too."""
        picture = decode(ImageOps.exif_transpose(image), "RGB")
        data = self.pipeline(dict(img=np.ascontiguousarray(np.asarray(picture)[..., ::-1]), img_id=0))  # BGR, as they read files
        batch = self.model.data_preprocessor(dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]), False)
        (sample,) = batch["data_samples"]
        box = (0.0, 0.0, float(picture.width), float(picture.height))
        return View(batch["inputs"], picture, box, sample.img_shape[:2], sample)


class Detector(Dense):
    """A detector, with masks or without."""

    task = "detection"

    def predict(self, view: View) -> Any:
        """Returns mmdet's InstanceData: ``bboxes`` (n, 4) as left, top, right, bottom and ``masks`` (n, H, W), if it has them, in the
        picture, ``scores`` and ``labels`` (n,)."""
        with torch.inference_mode():
            return self.model.predict(view.tensor, [copy.deepcopy(view.sample)], rescale=True)[0].pred_instances.cpu()

    def scored(self, view: View) -> tuple[nn.Module, Callable[[Any], Tensor], str]:
        """Of the most confident box."""
        with torch.inference_mode():
            found = self.model.predict(view.tensor, [copy.deepcopy(view.sample)], rescale=False)[0].pred_instances
        if not len(found.scores):
            raise UserError("the detector finds nothing in this image, so that there is no box to explain")
        best = found[found.scores.argmax().item()]
        label = best.labels.item()
        return self.boxes(view), score_of_box(best.bboxes[0].clone(), label), f"{self.names[label]}, {best.scores.item():.0%}"

    def boxes(self, view: View) -> nn.Module:
        """Returns a module from the view's tensor to its ``Boxes``, with gradients, for ``score_of_box``."""
        return _OneStage(self.model) if hasattr(self.model, "bbox_head") else _TwoStage(self.model, view.sample)


class Segmenter(Dense):
    """A semantic segmenter."""

    task = "segmentation"

    def predict(self, view: View) -> Tensor:
        """Returns the class of each pixel of the picture, (H, W)."""
        with torch.inference_mode():
            return self.model.predict(view.tensor, [copy.deepcopy(view.sample)])[0].pred_sem_seg.data[0].cpu()

    def scored(self, view: View) -> tuple[nn.Module, Callable[[Any], Tensor], str]:
        """Of the class with the largest area: the sum of its logits over that area."""
        module = _Logits(self.model)
        with torch.inference_mode():
            labels = module(view.tensor)[0].argmax(dim=0)
        number = labels.flatten().mode().values.item()
        area = (labels == number).clone()
        return module, lambda logits: logits[number][area].sum(), f"{self.names[number]}, {area.float().mean():.0%} of the image"


def load_dense(checkpoint: str | Path, config: str | Path) -> Dense:
    """Loads a detector or segmenter from a file, URL or zoo name and its configuration.

    Raises:
        UserError: the file or the configuration does not fit.
        OSError: one of them cannot be found or downloaded.
    """
    settings = load_config(config)
    model = build_model(settings, str(fetch(str(checkpoint))))
    return (Detector if settings.default_scope == "mmdet" else Segmenter)(model, settings)


Boxes = tuple[Tensor, Tensor]  # (n, 4) as left, top, right, bottom in pixels of the tensor, and the scores (n, classes)


def score_of_box(box: Tensor, label: int) -> Callable[[Boxes], Tensor]:
    """The highest score, for a class, of the boxes that overlap this one by half or more, as non-maximum suppression takes it; else 0."""

    def score(found: Boxes) -> Tensor:
        boxes, scores = found
        overlapping = torch.where(box_iou(boxes, box[None])[:, 0] >= 0.5, scores[:, label], 0.0)
        return nn.functional.pad(overlapping, (0, 1)).amax()  # the 0 is for where nothing is found at all

    return score


class _OneStage(nn.Module):
    """(1, C, H, W) -> [boxes of all anchors and their scores]: mmdet's own predictions have no gradient."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Boxes]:
        head = self.model.bbox_head
        classes, deltas = self.model(images, mode="tensor")
        anchors = torch.cat(head.prior_generator.grid_priors([level.shape[2:] for level in classes], device=images.device))
        scores, deltas = (
            torch.cat([level[0].permute(1, 2, 0).reshape(-1, n) for level in levels])
            for levels, n in ((classes, head.cls_out_channels), (deltas, 4))
        )
        return [(head.bbox_coder.decode(anchors, deltas), scores.sigmoid())]


class _TwoStage(nn.Module):
    """(1, C, H, W) -> [boxes that are found and their scores, 0 for other classes than the box's own]."""

    def __init__(self, model: Any, sample: Any):
        super().__init__()
        self.model, self.sample = model, sample

    def forward(self, images: Tensor) -> list[Boxes]:
        found = self.model.predict(images, [copy.deepcopy(self.sample)], rescale=False)[0].pred_instances
        own = nn.functional.one_hot(found.labels, self.model.roi_head.bbox_head.num_classes)
        return [(found.bboxes, found.scores[:, None] * own)]


class _Logits(nn.Module):
    """(1, C, H, W) -> (1, classes, H / 4, W / 4)."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, mode="tensor")
