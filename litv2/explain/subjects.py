# SPDX-License-Identifier: Apache-2.0
"""What is explained: a classifier, detector or segmenter with its weights, and images as it sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..classes import class_names, thresholds
from ..errors import UserError
from ..factory import load_model
from ..model import LITv2
from ..preprocess import decode, evaluation_box, evaluation_transform

__all__ = ["Classifier", "Subject", "View"]

TOP = 5  # classes that are shown of an image which has one
SHOWN = 1024  # pixels a side of a picture at most


@dataclass(frozen=True)
class View:
    """An image as a model sees it: the part ``box`` of the picture, scaled to ``size``, is the upper left corner of the tensor.

    Attributes:
        tensor: (1, C, H, W), normalised; to the right of and below ``size`` there is padding.
        picture: the whole image, RGB.
        box: left, top, right, bottom in pixels of the picture.
        size: height and width in pixels of the tensor.
        sample: what mmdet or mmseg knows of the image.
    """

    tensor: Tensor
    picture: Image.Image
    box: tuple[float, float, float, float]
    size: tuple[int, int]
    sample: Any = None

    @cached_property
    def seen(self) -> Image.Image:
        """The part of the picture that the model sees, in the picture's own resolution, up to ``SHOWN``."""
        left, top, right, bottom = map(round, self.box)
        part = self.picture.crop((left, top, right, bottom))
        part.thumbnail((SHOWN, SHOWN))
        return part

    def to_tensor(self, x: float, y: float) -> tuple[float, float]:
        """Converts a position in the picture to one in the tensor; both count pixels from the corner, so that 0.5 is a pixel's centre.

        Raises:
            UserError: the model does not see this position.
        """
        left, top, right, bottom = self.box
        if not (left <= x < right and top <= y < bottom):
            W, H = self.picture.size
            seen = f"columns {left:.0f} to {right:.0f} and rows {top:.0f} to {bottom:.0f} of {W} x {H} pixels"
            raise UserError(f"the model does not see position {x:g} {y:g}; it sees {seen}")
        H, W = self.size
        return (x - left) * W / (right - left), (y - top) * H / (bottom - top)


class Subject(ABC):
    """A model that can be explained, and its preprocessing.

    Attributes:
        task: "classification", "detection" or "segmentation".
        model: in evaluation mode.
        network: the LITv2 in it.
        names: of the classes.
        notes: what its file does not state and was therefore assumed, one line each.
    """

    task: str
    model: nn.Module
    network: LITv2
    names: list[str]
    notes: list[str]

    def to(self, device: str) -> None:
        """Moves the model.

        Raises:
            UserError: there is no such device.
        """
        try:
            self.model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error

    @abstractmethod
    def view(self, image: Image.Image) -> View:
        """Returns the image as the model sees it, on the model's device."""

    @abstractmethod
    def predict(self, view: View) -> Any:
        """Returns what the model finds, on the CPU, in pixels of the picture."""

    @abstractmethod
    def scored(self, view: View) -> tuple[nn.Module, Callable[[Any], Tensor], str]:
        """Returns what a class activation map is made of: a module whose output is indexed by image, the score of what it finds in this
        image, as a function of its output for the image, and its name.

        Raises:
            UserError: it finds nothing.
        """


class Classifier(Subject):
    """A classifier, with the preprocessing of its evaluation.

    Attributes:
        transform: that preprocessing, RGB image -> tensor (C, size, size).
        thresholds: confidence from which on a class counts as found, for classifiers of images with any number of classes; None for
            those of images with one class.
    """

    task = "classification"

    def __init__(self, source: str | Path, name: str | None = None, img_size: int | None = None):
        loaded = load_model(source, name)
        self.model, self.network, self.notes = loaded.model.eval(), loaded.model, loaded.notes
        self.names = class_names(loaded.content, loaded.model.num_classes)
        self.thresholds = thresholds(loaded.content, loaded.model.num_classes)
        self.size, self.crop = loaded.image_size if img_size is None else img_size, loaded.crop
        smallest = self.network.feature_info[-1]["reduction"]
        if self.size < smallest:
            raise UserError(f"an image size of {self.size} pixels is too small: this model needs at least {smallest}; set --img-size")
        self.transform = evaluation_transform(self.size, self.crop, self.network.in_chans)
        if self.network.in_chans != 3:
            from torchvision.transforms import Compose, Grayscale

            self.transform = Compose([Grayscale(), self.transform])

    def view(self, image: Image.Image) -> View:
        picture = decode(image, "RGB")
        box = evaluation_box(picture.width, picture.height, self.size, self.crop)
        return View(self.transform(picture)[None].to(self.device), picture, box, (self.size, self.size))

    @property
    def device(self) -> torch.device:
        return self.network.patch_embed.proj.weight.device

    def predict(self, view: View) -> Tensor:
        """Returns the confidence in each class, (classes,)."""
        return self.confidences(view.tensor)[0]

    @torch.inference_mode()
    def confidences(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) that ``transform`` has prepared -> the confidence in each class, (B, classes), on the CPU."""
        return self.probabilities(self.model(images.to(self.device)).float()).cpu()

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """The same images -> the pooled features that the head takes, (B, num_features), on the CPU."""
        return self.network.forward_head(self.network.forward_features(images.to(self.device)), pre_logits=True).float().cpu()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the confidences of logits (..., classes): shares of one, or if an image has any number of classes, each by itself."""
        return logits.softmax(dim=-1) if self.thresholds is None else logits.sigmoid()

    def found(self, confidence: Tensor) -> list[int]:
        """Returns the numbers of the classes to show of an image, the most confident first: the five most likely, or if an image has any
        number of classes, those whose ``confidence`` (classes,) is at least their threshold."""
        order = confidence.argsort(descending=True).tolist()
        if self.thresholds is None:
            return order[:TOP]
        return [i for i in order if confidence[i] >= self.thresholds[i]]

    def scored(self, view: View) -> tuple[nn.Module, Callable[[Any], Tensor], str]:
        confidence, number = self.predict(view).max(dim=0)
        return self.model, lambda logits: logits[number], f"{self.names[number]}, {confidence:.0%}"
