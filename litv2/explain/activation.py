# SPDX-License-Identifier: Apache-2.0
"""Class activation maps, by the package grad-cam: which parts of an image speak for a class, a box or a region."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingPackage, UserError, listed
from ..layers import channels_first
from ..model import LITv2
from .recording import check_images, evaluating, network_of
from .subjects import Subject, View

try:
    from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM
except ImportError as error:
    raise MissingPackage(f"{error}; class activation maps need grad-cam: pip install 'litv2[explain]'") from error

__all__ = ["METHODS", "cam", "cams_of_finding"]

METHODS = {"gradcam": GradCAM, "gradcam++": GradCAMPlusPlus, "eigencam": EigenCAM, "hirescam": HiResCAM}

Score = Callable[[Any], Tensor]  # of the model's output for one image


def cam(
    model: nn.Module,
    images: Tensor,
    target: int | Score | Sequence[int | Score] | None = None,
    method: str = "gradcam",
    layers: Sequence[nn.Module] | None = None,
) -> Tensor:
    """Returns a class activation map per image, (B, H, W) in [0, 1], at the size of the images.

    Args:
        model: a LITv2 classifier, or a module with a LITv2 inside whose output is indexed by image. Any mode; it is as before afterwards.
        images: (B, C, H, W), normalised.
        target: what is explained, one or one per image: a class, or a function from the model's output for an image to a score; None for
            the predicted class. Eigen-CAM does not depend on it.
        method: "gradcam" (arXiv 1610.02391), "gradcam++" (arXiv 1710.11063), "eigencam" (arXiv 2008.00299), or "hirescam" (arXiv
            2011.08891), which does not average gradients over positions: for boxes, whose score depends on one place. Of a classifier
            it is the same as "gradcam". The sign of Eigen-CAM's principal component is arbitrary: its map may be of what the image shows,
            or of the rest.
        layers: modules of the network whose maps are taken; of several the average is returned. By default the norm before the
            classifier, where Grad-CAM of an average-pooled network is the original class activation map, or the backbone's output norms:
            all of them, since a detector looks for small objects on the early maps and for large ones on the late ones.

    Raises:
        UserError: the method or a class is unknown.
    """
    network = network_of(model)
    check_images(network, images)
    if method not in METHODS:
        raise UserError(f"cam: {method=} must be one of {listed(METHODS)}")
    targets = _targets(network, target, len(images))
    chosen = output_norms(network) if layers is None else list(layers)
    with evaluating(model), _without_gradients_of(model), torch.enable_grad():
        explain = METHODS[method](model=model, target_layers=chosen, reshape_transform=_maps)
        explain.compute_input_gradient = True  # parameters have none here, but the maps need them
        try:  # not as a context manager, which hides an IndexError of a target
            return torch.from_numpy(explain(images.detach().clone(), targets))
        finally:
            explain.activations_and_grads.release()


def cams_of_finding(subject: Subject, view: View) -> tuple[dict[str, Tensor], str]:
    """Returns a map (H, W) by each method for what a subject finds in an image, and its name.

    Raises:
        UserError: it finds nothing.
    """
    model, score, what = subject.scored(view)
    methods = [method for method in METHODS if method != "hirescam" or subject.task != "classification"]
    return {method: cam(model, view.tensor, score, method)[0] for method in methods}, what


def output_norms(network: LITv2) -> list[nn.Module]:
    """The norm before the classifier, or the norms of a backbone's outputs, or where there are none, its stages."""
    if "norm" in network._modules:
        return [network.norm]
    backbone: Any = network
    norms = [backbone.get_submodule(f"norm{i}") for i in backbone.out_norms]
    return norms or [backbone.layers[i] for i in backbone.out_indices]


def _maps(tokens: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), in float32: numpy has no bfloat16, and its singular values no float16."""
    return channels_first(tokens).float()


def _targets(network: LITv2, target: int | Score | Sequence[int | Score] | None, images: int) -> list[Score]:
    """One score per image."""
    if target is None:
        return [lambda logits: logits[logits.argmax()]] * images
    each = list(target) if isinstance(target, Sequence) else [target] * images
    if len(each) != images:
        raise UserError(f"cam: {len(each)} targets for {images} images; expected one, or one for each")
    return [_score_of(one, network.num_classes) if isinstance(one, int) else one for one in each]


def _score_of(number: int, classes: int) -> Score:
    if not 0 <= number < classes:
        raise UserError(f"cam: class {number} must be one of 0 to {classes - 1}")
    return lambda logits: logits[number]


@contextmanager
def _without_gradients_of(model: nn.Module) -> Iterator[None]:
    """Within the block parameters get no gradients, and those that they have are safe: the package resets them."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
