# SPDX-License-Identifier: Apache-2.0
"""Counts the multiply-adds of a detector or segmenter, as in the published tables and in full."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from mmcv.cnn import get_model_complexity_info
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hilo import HiLo, HiLo2d
from mm_modules.DCN import DeformConv2dPack

from ..attentions import SRA, SelfAttention
from ..errors import UserError, listed

__all__ = ["CountedForward", "count_flops"]


def count_flops(model: nn.Module, height: int, width: int) -> dict[str, int]:
    """Counts the multiply-adds for one image of height x width.

    Returns:
        ``published``: the count of the release: mmcv's counter (convolutions, linear layers, norms, ReLU, pooling; a two-stage
        detector with 1000 proposals, 100 of them with masks) plus what mmcv's misses: HiLo's products of queries, keys and
        values, its pooling, and the offset convolutions.
        ``full``: in addition the deformable convolutions themselves, counted like plain ones, which the release leaves out.
        ``products``: only HiLo's products, included in both. (They are missing from the release's number for Mask R-CNN with
        LITv2-M and 4 x 4 windows.)

    Raises:
        UserError: the backbone has another attention than HiLo, whose products nothing here counts.
    """
    if others := {type(module).__name__ for module in model.modules() if isinstance(module, (SelfAttention, SRA))}:
        raise UserError(f"the multiply-adds of HiLo alone are counted here, not of {listed(sorted(others))}; use LITv2.flops")
    extra = dict(products=0, unseen=0, deformable=0)

    def count_hilo(hilo: Any, args: tuple, kwargs: dict, output: Any) -> None:
        given = inspect.signature(hilo.forward).bind(*args, **kwargs).arguments

        def size(map: Tensor) -> tuple[int, int]:
            rows, columns = map.shape[2:] if isinstance(hilo, HiLo2d) else map.shape[1:3]
            return rows, columns

        x, context, E = given["x"], given.get("context"), given.get("extra_tokens", 0)
        H, W = size(x) if x.dim() == 4 else (given["H"], given["W"])
        Hc, Wc = (H, W) if context is None else size(context)
        (sh, sw), (ph, pw) = hilo.window, hilo.pool
        cells, pooled = -(-H // sh) * sh * -(-W // sw) * sw, -(-Hc // ph) * -(-Wc // pw)
        layers = [(name, layer.weight.numel()) for name, layer in hilo.named_children() if isinstance(layer, nn.Linear)]
        linear = sum(weights * ((pooled if name == "l_kv" else cells) + E) for name, weights in layers)
        extra["products"] += hilo.flops(H, W, (Hc, Wc), E) - linear
        extra["unseen"] += linear + (pooled * ph * pw * hilo.dim if hilo.l_heads and hilo.pool != (1, 1) else 0)

    def count_linear(linear: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        """Of HiLo: mmcv sees the cells that it is called with, some without the padding, but the release's count has it everywhere."""
        extra["unseen"] -= args[0].numel() * output.shape[-1]

    def count_deformable(conv: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        cells = output.shape[2] * output.shape[3]
        extra["deformable"] += cells * (conv.weight.numel() + conv.bias.numel())
        extra["unseen"] += cells * (conv.conv_offset.weight.numel() + conv.conv_offset.bias.numel())

    counters = {HiLo: count_hilo, HiLo2d: count_hilo, DeformConv2dPack: count_deformable}
    counted = [(module, counters[type(module)]) for module in model.modules() if type(module) in counters]
    parts = [part for module, _ in counted if isinstance(module, HiLo) for part in module.children() if isinstance(part, nn.Linear)]
    counted += [(part, count_linear) for part in parts]
    hooks = [module.register_forward_hook(counter, with_kwargs=True) for module, counter in counted]
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):  # only shapes are computed, which takes no time
            seen, _ = get_model_complexity_info(CountedForward(model), (3, height, width), print_per_layer_stat=False, as_strings=False)
    finally:
        for hook in hooks:
            hook.remove()
    published = int(seen) + extra["unseen"] + extra["products"]
    return dict(published=published, full=published + extra["deformable"], products=extra["products"])


class CountedForward(nn.Module):
    """The forward pass to count; for a two-stage detector with 1000 boxes and 100 masks, regardless of the image."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> None:
        if not hasattr(self.model, "roi_head"):
            self.model._forward(image)
            return
        self.model.rpn_head(self.model.extract_feat(image))
        heads = self.model.roi_head
        for head, extractor, boxes in (
            (heads.bbox_head, heads.bbox_roi_extractor, 1000),
            (heads.mask_head, heads.mask_roi_extractor, 100),
        ):
            head(image.new_empty(boxes, extractor.out_channels, *extractor.roi_layers[0].output_size))
