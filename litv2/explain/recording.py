# SPDX-License-Identifier: Apache-2.0
"""Watches a LITv2 at work: its attention layers and token mergings, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hilo import HiLo, HiLoWeights
from mm_modules.DCN import DeformConv2dPack

from ..errors import UserError, listed
from ..layers import Block
from ..model import LITv2

__all__ = ["Attended", "Merged", "check_images", "evaluating", "network_of", "watched"]


@dataclass(frozen=True)
class Attended:
    """One call of an attention layer on a map of H x W tokens.

    Attributes:
        name: of the block in the network, such as ``layers.2.blocks.0``.
        stride: pixels per token along each side.
        output: tokens (B, H * W, dim), the channels of Hi-Fi first.
        weights: the attention of both branches, if asked for.
    """

    name: str
    hilo: HiLo
    stride: int
    H: int
    W: int
    output: Tensor
    weights: HiLoWeights | None


@dataclass(frozen=True)
class Merged:
    """One call of a token merging on a map of H x W tokens.

    Attributes:
        name: of the merging in the network, such as ``layers.0.downsample``.
        stride: pixels per token of its input along each side.
        offsets: (B, H // 2, W // 2, 4, 2) in tokens of the input, rows first: how far each of the 2 x 2 samples is moved.
    """

    name: str
    stride: int
    H: int
    W: int
    offsets: Tensor


def network_of(model: nn.Module) -> LITv2:
    """Returns the LITv2 in a model: itself, or the backbone of a detector or segmenter.

    Raises:
        UserError: there is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(module, LITv2)]
    if len(found) != 1:
        what = f"{len(found)} of them" if found else "none; of a compiled, packed or fused form, pass the model that it was made from"
        raise UserError(f"explain: expected a model with one LITv2, and a {type(model).__name__} has {what}")
    return found[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode within the block; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def watched(model: LITv2, see: Callable[[Attended | Merged], Any], weights: bool = False) -> Iterator[None]:
    """Within the block, without gradients and in evaluation mode, ``see`` gets each layer's call; no hook is left afterwards.

    Args:
        weights: whether to ask the attention layers for their weights, too.
    """
    names = {module: name for name, module in model.named_modules()}
    strides = {stage: info["reduction"] for stage, info in zip(model.stages, model.feature_info)}
    handles = []
    try:
        for stage in model.stages:
            for block in stage.blocks:
                if isinstance(block, Block) and isinstance(block.attn, HiLo):  # those of a fused form are others
                    handles += _hooks(names[block], block.attn, strides[stage], see, weights)
            if stage.downsample is not None:
                conv, name = stage.downsample.dconv, names[stage.downsample]
                handles.append(conv.register_forward_hook(_merging_hook(name, strides[stage], see)))
        with torch.no_grad(), evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(name: str, hilo: HiLo, stride: int, see: Callable, weights: bool) -> list:
    def ask(module: HiLo, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "need_weights": True}

    def show(module: HiLo, args: tuple, result: Any) -> Tensor:
        output, seen = result if weights else (result, None)
        _, H, W = args
        see(Attended(name, module, stride, H, W, output, seen))
        return output

    asked = [hilo.register_forward_pre_hook(ask, with_kwargs=True)] if weights else []
    return [*asked, hilo.register_forward_hook(show)]


def _merging_hook(name: str, stride: int, see: Callable) -> Callable:
    def show(conv: DeformConv2dPack, args: tuple, result: Tensor) -> None:
        (x,) = args
        offsets = conv.predict_offset(x).unflatten(1, (4, 2)).permute(0, 3, 4, 1, 2)
        see(Merged(name, stride, x.shape[2], x.shape[3], offsets))

    return show


def check_images(model: LITv2, images: Tensor) -> None:
    """Raises UserError unless these are a batch of images that the network takes."""
    smallest = model.feature_info[-1]["reduction"]
    if images.dim() != 4 or images.shape[1] != model.in_chans or min(images.shape[2:]) < smallest or not len(images):
        sizes = f"(B, {model.in_chans}, H, W) with sides of at least {smallest}"
        raise UserError(f"explain: expected images of shape {sizes}, got {listed(images.shape)}")
